"""Steps in torch's own operations, for any device and for autograd."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._core import rule
from . import _compat
from .batch import (
    FLOATS,
    Batch,
    Called,
    Work,
    check_counter,
    check_operands,
    check_state,
    described,
)
from .options import Options, check_count, kind_of
from .sparse import SparseRows, sparse_rows


class _OnTensors:
    """Methods of tensors, applied to one tensor of lists after the other."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)

        def over_lists(tensors: list[Tensor], *others: Any) -> list[Tensor]:
            columns = [o if isinstance(o, list) else [o] * len(tensors) for o in others]
            return [method(*row) for row in zip(tensors, *columns, strict=True)]

        return over_lists


class _OnLists:
    """The same methods in one operation on lists each, where torch has it."""

    def __getattr__(self, name: str) -> Any:
        return _compat.foreach_operation(name) or getattr(_ON_TENSORS, name)


_ON_TENSORS, _ON_LISTS = _OnTensors(), _OnLists()


def prepare(
    batch: Batch, options: Options, scale: float, called: Called, *, foreach: bool
) -> list[Work]:
    """All that can fail in a step of some parameters; returns what remains to be done.

    Args:
        batch: the parameters.
        options: of their group.
        scale: what gradients are multiplied by.
        called: what messages call a parameter.
        foreach: work on lists of tensors.

    Raises:
        IndexError: an index of a sparse gradient is out of range.
        RuntimeError: compact state or stochastic rounding, which this has not.
        TypeError: a parameter that is neither float nor complex.
        ValueError: shapes that do not fit, or a step counter that is none.
    """
    for param in batch.params:
        if param.dtype not in FLOATS:
            raise TypeError(f"parameters must be float or complex, got {param.dtype}")
    dense, sparse = batch.by_layout()
    check_operands(dense, called)
    for param, exp_avg in zip(batch.params, batch.exp_avgs, strict=True):
        if options.needs_kernels or kind_of(exp_avg) != "float32":
            raise RuntimeError(
                f"compact state and stochastic_rounding need the compiled kernels, and "
                f"those need tables whose rows lie in their order where gradients are "
                f"sparse, got {called(param)}, a {described(param)}"
            )
    work: list[Work] = []
    for one in sparse.singles():
        (param,), (grad,), (exp_avg,), (exp_inf,), _ = one.lists()
        check_state(param, exp_avg, exp_inf, called)
        rows = sparse_rows(param, grad, called)
        rows.check_in_range()
        sizes = _step_sizes(one, options, called)
        work.append(partial(_step_rows, one, rows, options, scale, sizes))
    # Otherwise one after the other, which matters for parameters that share memory.
    keys = [(param.device, param.dtype) for param in dense.params]
    for part in dense.split(keys).values() if foreach else dense.singles():
        sizes = _step_sizes(part, options, called)
        on = _ON_LISTS if foreach else _ON_TENSORS
        work.append(partial(_step, part, options, scale, sizes, on))
    return work


def _step_sizes(
    batch: Batch, options: Options, called: Called
) -> tuple[list[Any], Any] | None:
    """``lr / (1 - beta_1**t)`` of each parameter and the decay factor; None on a device."""
    if options.capturable:
        return None
    beta_1, sizes = options.hyperparameters.beta_1, []
    lr: Any = options.lr if options.differentiable else options.rate
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    for param, step in zip(batch.params, batch.steps, strict=True):
        check_counter(step, param, called)
        count = float(step)
        check_count(count, param, called)
        sizes.append(rule.step_size(lr, beta_1, int(count) + 1))
    return sizes, rule.decay_factor(lr, options.decay)


def _step_sizes_on_device(steps: list[Tensor], options: Options) -> tuple[list[Any], Any]:
    """The same after counters have been advanced, without reading them."""
    beta_1 = options.hyperparameters.beta_1
    lr: Any = options.lr.reshape(()) if isinstance(options.lr, Tensor) else options.lr
    logarithm = math.log(beta_1) if beta_1 else -math.inf
    sizes = [lr / -torch.expm1(step * logarithm) for step in steps]
    return sizes, rule.decay_factor(lr, options.decay)


def _step_rows(
    batch: Batch,
    rows: SparseRows,
    options: Options,
    scale: float,
    sizes: tuple[list[Any], Any] | None,
) -> None:
    """The touched rows of one table, gathered, stepped and put back."""
    (param,), _, (exp_avg,), (exp_inf,), steps = batch.lists()
    distinct, place = torch.unique(rows.flat(), return_inverse=True)
    values = rows.values.to(_dtype_of_sums(rows.values))
    summed = values.new_zeros((len(distinct), *values.shape[1:]))
    summed.index_add_(0, place, values)
    tables = [param, exp_avg, exp_inf]
    if not rows.sizes:
        tables = [table.unsqueeze(0) for table in tables]
    at = torch.unravel_index(distinct, rows.sizes) if len(rows.sizes) > 1 else (distinct,)
    w, m, u = (table[at] for table in tables)
    _step(Batch([w], [summed], [m], [u], steps), options, scale, sizes, _ON_TENSORS)
    for table, new in zip(tables, (w, m, u), strict=True):
        table[at] = new


def _dtype_of_sums(values: Tensor) -> torch.dtype:
    if values.device.type == "mps":  # has no float64
        return torch.promote_types(values.dtype, torch.float32)
    return torch.promote_types(values.dtype, torch.float64)


def _step(
    batch: Batch,
    options: Options,
    scale: float,
    sizes: tuple[list[Any], Any] | None,
    on: Any,
) -> None:
    """The rule, on lists of tensors."""
    hyperparameters = options.hyperparameters
    for step in batch.steps:
        step += 1
    step_sizes, decay = sizes or _step_sizes_on_device(batch.steps, options)
    params, given, exp_avgs, exp_infs = map(_as_real, batch.lists()[:4])
    number = [exp_avg.dtype for exp_avg in exp_avgs]
    wide = [w.to(dtype) for w, dtype in zip(params, number, strict=True)]

    factor = -scale if options.maximize else scale
    grads = []
    for g, dtype in zip(given, number, strict=True):
        # A gradient that is wider than the arithmetic is scaled before it is rounded.
        g = g.to(torch.promote_types(g.dtype, dtype))
        grads.append((g if factor == 1.0 else g * factor).to(dtype))
    if options.coupled_decay:
        grads = on.add(grads, on.mul(wide, _rounded(options.coupled_decay, number[0])))
    on.lerp_(exp_avgs, grads, 1.0 - hyperparameters.beta_1)
    decayed = on.mul(exp_infs, hyperparameters.beta_2)
    on.copy_(exp_infs, on.maximum(decayed, on.abs(grads)))
    # Autograd keeps the dividend, which the next step changes.
    moments = on.clone(exp_avgs) if options.differentiable else exp_avgs
    epsilon = _rounded(hyperparameters.epsilon, number[0])
    denominators = on.add(exp_infs, epsilon)
    if epsilon == 0.0:  # then a quotient of zeros is to be 0
        denominators = [d.masked_fill(d == 0, math.inf) for d in denominators]
    updates = on.div(moments, denominators)
    updates = on.mul(updates, [_rounded(size, number[0]) for size in step_sizes])
    if options.decay:
        on.mul_(wide, _rounded(decay, number[0]))
    on.sub_(wide, updates)
    for param, result in zip(params, wide, strict=True):
        if param is not result:
            param.copy_(result)


def _as_real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _rounded(number: Any, dtype: torch.dtype) -> Any:
    """A number that stays finite in ``dtype``; a tensor as it is."""
    if isinstance(number, Tensor):
        return number
    return float(rule.rounded(number, str(dtype).removeprefix("torch.")))
