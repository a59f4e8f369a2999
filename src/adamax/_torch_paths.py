"""The ways in which a step of :class:`adamax.torch.Adamax` can be carried out.

``prepare`` does all that can fail and returns what remains to be done, so that a step that
raises has changed nothing.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _rule
from ._kernels import Factor, Float64Array, Int64Array, Storage, kernels
from ._kernels._memory import Ranges
from ._rule import Coefficients, Hyperparameters

Work: TypeAlias = Callable[[], None]

_STORAGE = {
    torch.float32: Storage.FLOAT32,
    torch.float64: Storage.FLOAT64,
    torch.float16: Storage.FLOAT16,
    torch.bfloat16: Storage.BFLOAT16,
    torch.complex64: Storage.FLOAT32,  # as pairs of numbers
    torch.complex128: Storage.FLOAT64,
}
_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state of a parameter: its own, but float32 for 16 bits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def fused_dtypes(params: Sequence[Tensor]) -> set[torch.dtype] | None:
    """The dtypes of these parameters if the CPU kernels can update all of them."""
    dtypes = {param.dtype for param in params}
    serves = (
        dtypes <= _STORAGE.keys()
        and set(map(type, params)) <= _PLAIN_TENSORS
        and {param.is_cpu for param in params} == {True}
    )
    return dtypes if serves else None


@dataclass(frozen=True, slots=True)
class Options:
    """What all parameters of a group share in one step."""

    hyperparameters: Hyperparameters
    lr: float | Tensor
    decoupled: bool
    maximize: bool
    capturable: bool
    differentiable: bool

    @property
    def lr_number(self) -> float:
        return self.lr.item() if isinstance(self.lr, Tensor) else float(self.lr)

    @property
    def decay(self) -> float:
        """Decoupled decay: what the learning rate is multiplied by."""
        return self.hyperparameters.weight_decay if self.decoupled else 0.0

    @property
    def coupled_decay(self) -> float:
        """L2 regularisation: what part of a parameter is added to its gradient."""
        return 0.0 if self.decoupled else self.hyperparameters.weight_decay


@dataclass(slots=True)
class Batch:
    """Parameters of one group with their gradients and state, in parallel lists."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_infs: list[Tensor]
    steps: list[Tensor]

    def __len__(self) -> int:
        return len(self.params)

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_infs, self.steps

    def select(self, chosen: Sequence[int]) -> "Batch":
        if len(chosen) == len(self):
            return self
        return Batch(*([tensors[i] for i in chosen] for tensors in self.lists()))

    def split(self, keys: Sequence[Hashable]) -> "list[Batch]":
        """Batches of the parameters that have the same key."""
        if len(set(keys)) == 1:
            return [self]
        positions: dict[Hashable, list[int]] = {}
        for position, key in enumerate(keys):
            positions.setdefault(key, []).append(position)
        return [self.select(chosen) for chosen in positions.values()]

    def singles(self) -> "list[Batch]":
        return [self.select([i]) for i in range(len(self))]

    def by_layout(self) -> "tuple[Batch, Batch]":
        """The parameters with dense gradients, and those with sparse ones."""
        if {grad.layout for grad in self.grads} == {torch.strided}:
            return self, Batch([], [], [], [], [])
        strided = [grad.layout is torch.strided for grad in self.grads]
        return (
            self.select([i for i, dense in enumerate(strided) if dense]),
            self.select([i for i, dense in enumerate(strided) if not dense]),
        )


# --- Numba kernels, for tensors on the CPU ---------------------------------------------


class KnownTensors:
    """Parameters and state that were found fit for the kernels, and where they lie.

    A tensor that is where it was, for a parameter as large as it was, is not examined
    again: with hundreds of small parameters that would take most of a step.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self.table = _Table([], [])

    def update(self, batch: Batch, dtype: torch.dtype) -> bool:
        """Take those of this batch; False if the kernels cannot work on them."""
        sizes = [param.numel() for param in batch.params]
        tensors = [*batch.params, *batch.exp_avgs, *batch.exp_infs]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if (
            sizes == self._sizes
            and addresses == self._addresses
            and all(map(operator.is_, tensors, self._tensors))
        ):
            return True
        if not (
            _all_flat(batch.params, dtype, sizes)
            and _all_flat(batch.exp_avgs, state_dtype(dtype), sizes)
            and _all_flat(batch.exp_infs, state_dtype(dtype), sizes)
        ):
            return False
        self._sizes, self._tensors, self._addresses = sizes, tensors, addresses
        self.table = _Table(tensors, addresses)
        return True


class _Table:
    """The addresses and lengths that a launch takes, but for the gradients'."""

    def __init__(self, tensors: list[Tensor], addresses: list[int]) -> None:
        """``tensors`` are all parameters, then all first moments, then all norms."""
        count = len(tensors) // 3
        self._addresses = np.empty((count, 4), np.int64)
        self._addresses[:, :3] = np.array(addresses, np.int64).reshape(3, count).T
        sizes = np.array([tensor.nbytes for tensor in tensors], np.int64)
        self._written = Ranges(np.array(addresses, np.int64), sizes)
        self._grad_sizes = sizes[:count]
        self.lengths = np.array([tensor.numel() for tensor in tensors[:count]], np.int64)
        if any(tensor.is_complex() for tensor in tensors[:1]):
            self.lengths *= 2

    def with_grads(self, grads: list[Tensor]) -> tuple[Int64Array, bool]:
        """All addresses, and whether parameters can be updated in any order."""
        addresses = self._addresses.copy()
        addresses[:, 3] = [grad.data_ptr() for grad in grads]
        lie_apart = len(grads) == 1 or (
            self._written.lie_apart
            and not self._written.overlap(addresses[:, 3], self._grad_sizes).any()
        )
        return addresses, lie_apart


Known: TypeAlias = defaultdict[torch.dtype, KnownTensors]


def prepare_fused(
    batch: Batch, options: Options, scale: float, dtypes: set[torch.dtype], known: Known
) -> list[Work]:
    """A step through the CPU kernels; gradients are multiplied by ``scale`` first.

    ``dtypes`` are those of the parameters.
    """
    dense, sparse = batch.by_layout()
    work: list[Work] = [_rows_launch(part, options, scale) for part in sparse.singles()]
    parts = [dense] if len(dtypes) == 1 else dense.split([p.dtype for p in dense.params])
    for part in parts:
        if part.params:
            work.append(_dense_launch(part, options, scale, known[part.params[0].dtype]))
    return work


@dataclass(frozen=True, slots=True)
class _DenseLaunch:
    """All dense parameters of one dtype.

    Holds ``memory``, the tensors that it has the addresses of.
    """

    batch: Batch
    options: Options
    scale: float
    memory: list[list[Tensor]]
    copies: list[tuple[Tensor, Tensor]]
    addresses: Int64Array
    lengths: Int64Array
    lie_apart: bool

    def __call__(self) -> None:
        storage = _STORAGE[self.batch.params[0].dtype]
        factors = _factors(self.batch.steps, self.options, self.scale)
        coefficients = Coefficients.of(self.options.hyperparameters)
        threads = torch.get_num_threads()
        # Parameters that share memory are updated one after the other, as in torch.
        count = len(self.batch)
        at_once = count if self.lie_apart else 1
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            kernels().dense_step(
                storage,
                self.addresses[part],
                self.lengths[part],
                factors[part],
                coefficients,
                threads,
            )
        for target, source in self.copies:
            target.copy_(source)
        increment_version(self.batch.params)


def _dense_launch(
    batch: Batch, options: Options, scale: float, known: KnownTensors
) -> _DenseLaunch:
    dtype = batch.params[0].dtype
    memory = [batch.params, batch.exp_avgs, batch.exp_infs, batch.grads]
    copies: list[tuple[Tensor, Tensor]] = []
    sizes = [param.numel() for param in batch.params]
    if _all_flat(batch.grads, dtype, sizes) and known.update(batch, dtype):
        table = known.table
    else:
        memory, copies = _flattened(memory, [dtype, *[state_dtype(dtype)] * 2, dtype])
        tensors = [tensor for column in memory[:3] for tensor in column]
        table = _Table(tensors, [tensor.data_ptr() for tensor in tensors])
    addresses, lie_apart = table.with_grads(memory[3])
    return _DenseLaunch(
        batch, options, scale, memory, copies, addresses, table.lengths, lie_apart
    )


def _all_flat(tensors: list[Tensor], dtype: torch.dtype, sizes: list[int]) -> bool:
    """Whether the elements of each tensor lie in memory as its indices count them."""
    return (
        {tensor.is_contiguous() for tensor in tensors} == {True}
        and {tensor.is_cpu for tensor in tensors} == {True}
        and {tensor.dtype for tensor in tensors} == {dtype}
        and [tensor.numel() for tensor in tensors] == sizes
        and not (dtype.is_complex and any(tensor.is_conj() for tensor in tensors))
        # Imaginary parts of conjugates, which have holes unless they are one number.
        and not any(t.is_neg() for t, n in zip(tensors, sizes, strict=True) if n == 1)
    )


def _flattened(
    columns: list[list[Tensor]], dtypes: list[torch.dtype]
) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Parameters, state and gradients as the kernels need them; what to copy back where.

    Nothing is copied where a parameter has no holes in memory, whatever the order of its
    dimensions, and its gradient and state have the same order.
    """
    flat: list[list[Tensor]] = [[], [], [], []]
    copies: list[tuple[Tensor, Tensor]] = []
    for tensors in zip(*columns, strict=True):
        # Of the parameter's shape and order of dimensions, without holes; no memory.
        like = torch.empty_like(
            tensors[0], device="meta", memory_format=torch.preserve_format
        )
        for tensor, dtype, column in zip(tensors, dtypes, flat, strict=True):
            if tensor.shape != like.shape:
                raise ValueError(
                    f"the state of a parameter of shape {tuple(like.shape)} must have its "
                    f"shape, got {tuple(tensor.shape)}"
                )
            fits = (
                tensor.stride() == like.stride()
                and tensor.dtype is dtype
                and tensor.is_cpu
                and not (tensor.is_conj() or tensor.is_neg())
            )
            if fits:
                column.append(tensor)
                continue
            copy = torch.empty_like(like, dtype=dtype, device="cpu").copy_(tensor)
            column.append(copy)
            if column is not flat[-1]:  # gradients are not written
                copies.append((tensor, copy))
    return flat, copies


@dataclass(frozen=True, slots=True)
class _RowsLaunch:
    """The rows of one table. Holds the memory that it has the addresses of."""

    batch: Batch
    options: Options
    scale: float
    rows: "SparseRows"
    groups: Any

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), steps = self.batch.lists()
        tensors = (param, exp_avg, exp_inf, self.rows.values)
        kernels().rows_step(
            _STORAGE[param.dtype],
            self.groups,
            np.array([tensor.data_ptr() for tensor in tensors], np.int64),
            _numbers_in_row(param, self.rows),
            _factors(steps, self.options, self.scale)[0],
            Coefficients.of(self.options.hyperparameters),
            torch.get_num_threads(),
        )
        increment_version(param)


def _rows_launch(batch: Batch, options: Options, scale: float) -> Work:
    (param,), (grad,), (exp_avg,), (exp_inf,), _ = batch.lists()
    wanted = state_dtype(param.dtype)
    in_place = param.is_contiguous() and all(
        state.is_contiguous()
        and state.is_cpu
        and state.dtype is wanted
        and state.shape == param.shape
        for state in (exp_avg, exp_inf)
    )
    if not in_place:
        return _SparseStep.prepare(batch, options, scale)
    rows = sparse_rows(param, grad)
    return _RowsLaunch(batch, options, scale, rows, grouped(rows))


def _factors(steps: list[Tensor], options: Options, scale: float) -> Float64Array:
    """Advance the step counters, and the factors of a launch that follow from them."""
    lr = options.lr_number
    dtypes = {step.dtype for step in steps}
    if dtypes in ({torch.float32}, {torch.float64}) and {s.is_cpu for s in steps} == {True}:
        addresses = np.array([step.data_ptr() for step in steps], np.int64)
        t = kernels().advance(_STORAGE[steps[0].dtype], addresses).tolist()
    else:
        for step in steps:
            step += 1
        t = [float(step) for step in steps]
    factors = np.empty((len(steps), len(Factor)))
    beta_1 = options.hyperparameters.beta_1
    sizes = {count: _rule.step_size(lr, beta_1, int(count)) for count in set(t)}
    factors[:, Factor.STEP_SIZE] = [sizes[count] for count in t]
    factors[:, Factor.DECAY] = _rule.decay_factor(lr, options.decay)
    factors[:, Factor.SCALE] = -scale if options.maximize else scale
    factors[:, Factor.COUPLED_DECAY] = options.coupled_decay
    return factors


# --- Sparse gradients ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A sparse COO gradient as rows of the parameter seen as a table."""

    indices: Tensor  # (n,), not necessarily distinct
    values: Tensor  # (n, ...)
    count: int  # rows of the table
    row_length: int


def sparse_rows(param: Tensor, grad: Tensor) -> SparseRows:
    """``grad`` as rows of the table that the leading, sparse dimensions make."""
    if grad.layout is not torch.sparse_coo:
        raise ValueError(
            f"a sparse gradient must have the layout torch.sparse_coo, got {grad.layout}"
        )
    indices, values = grad._indices(), grad._values()
    sizes, row_shape = param.shape[: len(indices)], param.shape[len(indices) :]
    if len(sizes) != 1:
        _check_in_range(indices, sizes)
        table_rows = indices.new_zeros(indices.shape[1:])
        for index, size in zip(indices, sizes, strict=True):
            table_rows = table_rows * size + index
    else:
        table_rows = indices[0]
    return SparseRows(
        table_rows,
        values.to(param.dtype).resolve_conj().resolve_neg().contiguous(),
        math.prod(sizes),
        math.prod(row_shape),
    )


def grouped(rows: SparseRows) -> Any:
    """The rows as the CPU kernels want them; raises for an index out of range."""
    return kernels().group_rows(rows.indices.numpy(), rows.count)


def _check_in_range(indices: Tensor, sizes: Sequence[int]) -> None:
    limits = torch.tensor(sizes, device=indices.device)[:, None]
    outside = ((indices < 0) | (indices >= limits)).any(dim=0).nonzero()
    if len(outside):
        position = int(outside[0])
        raise IndexError(
            f"indices[:, {position}] of a sparse gradient must be in the shape "
            f"{tuple(sizes)}, got {tuple(indices[:, position].tolist())}"
        )


def square_sum(param: Tensor, rows: SparseRows) -> float:
    """The sum of squares of a summed sparse gradient on the CPU."""
    return kernels().rows_square_sum(
        _STORAGE[param.dtype],
        grouped(rows),
        rows.values.data_ptr(),
        _numbers_in_row(param, rows),
        torch.get_num_threads(),
    )


def _numbers_in_row(param: Tensor, rows: SparseRows) -> int:
    return rows.row_length * (2 if param.is_complex() else 1)


# --- torch operations, for any device and for autograd ----------------------------------


class _Foreach:
    """torch._foreach_* by the names of the tensor methods."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, f"_foreach_{name}")


class _ForLoop:
    """The same operations one tensor at a time, which autograd can differentiate."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def over_lists(tensors: list[Tensor], *others: Any) -> list[Tensor]:
            columns = [o if isinstance(o, list) else [o] * len(tensors) for o in others]
            return [method(*row) for row in zip(tensors, *columns, strict=True)]

        return over_lists


_FOREACH, _FOR_LOOP = _Foreach(), _ForLoop()


def prepare_foreach(batch: Batch, options: Options, scale: float) -> list[Work]:
    """A step through torch's operations on lists of tensors."""
    _check_dtypes(batch.params)
    dense, sparse = batch.by_layout()
    work: list[Work] = [_SparseStep.prepare(b, options, scale) for b in sparse.singles()]
    for part in dense.split([(param.device, param.dtype) for param in dense.params]):
        work.append(partial(_step, part, options, scale, _FOREACH))
    return work


def prepare_for_loop(batch: Batch, options: Options, scale: float) -> list[Work]:
    """A step through torch's operations on one tensor at a time."""
    _check_dtypes(batch.params)
    dense, sparse = batch.by_layout()
    work: list[Work] = [_SparseStep.prepare(b, options, scale) for b in sparse.singles()]
    # One after the other, which matters for parameters that share memory.
    work += [partial(_step, b, options, scale, _FOR_LOOP) for b in dense.singles()]
    return work


def _check_dtypes(params: Sequence[Tensor]) -> None:
    for param in params:
        if param.dtype not in _STORAGE:
            raise TypeError(f"parameters must be float or complex, got {param.dtype}")


@dataclass(frozen=True, slots=True)
class _SparseStep:
    """The touched rows of one table, gathered, stepped and put back."""

    batch: Batch
    options: Options
    scale: float
    rows: SparseRows
    distinct: Tensor
    place: Tensor  # of each index among the distinct ones

    @classmethod
    def prepare(cls, batch: Batch, options: Options, scale: float) -> "_SparseStep":
        rows = sparse_rows(batch.params[0], batch.grads[0])
        _check_in_range(rows.indices[None], [rows.count])
        distinct, place = torch.unique(rows.indices, return_inverse=True)
        return cls(batch, options, scale, rows, distinct, place)

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), steps = self.batch.lists()
        targets = (param, exp_avg, exp_inf)
        values = self.rows.values.to(exp_avg.dtype)
        shape = (self.rows.count, *values.shape[1:])
        summed = values.new_zeros((len(self.distinct), *shape[1:]))
        summed.index_add_(0, self.place, values)
        tables = [target.reshape(shape) for target in targets]
        w, m, u = (table.index_select(0, self.distinct) for table in tables)
        _step(Batch([w], [summed], [m], [u], steps), self.options, self.scale, _FOR_LOOP)
        for target, table, new in zip(targets, tables, (w, m, u), strict=True):
            table.index_copy_(0, self.distinct, new)
            if not target.is_contiguous():  # then reshape() has made a copy
                target.copy_(table.reshape(target.shape))


def _step(batch: Batch, options: Options, scale: float, ops: Any) -> None:
    """The rule, on lists of tensors."""
    hyperparameters = options.hyperparameters
    for step in batch.steps:
        step += 1
    params, grads, exp_avgs, exp_infs = map(_as_real, batch.lists()[:4])
    number = [exp_avg.dtype for exp_avg in exp_avgs]
    wide = [w.to(dtype) for w, dtype in zip(params, number, strict=True)]
    grads = [g.to(dtype) for g, dtype in zip(grads, number, strict=True)]

    factor = -scale if options.maximize else scale
    if factor != 1.0:
        grads = ops.mul(grads, factor)
    if options.coupled_decay:
        grads = ops.add(grads, ops.mul(wide, options.coupled_decay))
    ops.lerp_(exp_avgs, grads, 1.0 - hyperparameters.beta_1)
    decayed = ops.mul(exp_infs, hyperparameters.beta_2)
    ops.copy_(exp_infs, ops.maximum(decayed, ops.abs(grads)))
    # Autograd keeps the dividend, which the next step changes.
    moments = ops.clone(exp_avgs) if options.differentiable else exp_avgs
    updates = ops.div(moments, ops.add(exp_infs, hyperparameters.epsilon))
    step_sizes, decay = _step_sizes(batch.steps, options)
    updates = ops.mul(updates, step_sizes)
    if options.decay:
        ops.mul_(wide, decay)
    ops.sub_(wide, updates)
    for param, result in zip(params, wide, strict=True):
        if param is not result:
            param.copy_(result)


def _as_real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _step_sizes(steps: list[Tensor], options: Options) -> tuple[list[Any], Any]:
    """``lr / (1 - beta_1**t)`` for each parameter, and what decay multiplies it by."""
    beta_1, lr = options.hyperparameters.beta_1, options.lr
    if options.capturable or (options.differentiable and isinstance(lr, Tensor)):
        # Tensors all the way: on the device, and known to autograd.
        logarithm = math.log(beta_1) if beta_1 else -math.inf
        on_device = [lr / -torch.expm1(step * logarithm) for step in steps]
        return on_device, 1.0 - lr * options.decay
    lr = options.lr_number
    sizes = [_rule.step_size(lr, beta_1, int(step)) for step in steps]
    return sizes, _rule.decay_factor(lr, options.decay)
