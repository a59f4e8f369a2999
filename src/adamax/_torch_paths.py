"""The ways in which a step of :class:`adamax.torch.Adamax` can be carried out.

``prepare`` does all that can fail and returns what remains to be done, so that a step that
raises has changed nothing.
"""

import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

from torch.autograd.graph import increment_version

import numpy as np
import torch
from torch import Tensor

from . import _rule
from ._deferred import DeferredRows
from ._kernels import Factor, Float64Array, Int64Array, Storage, kernels
from ._kernels._memory import Ranges
from ._rule import Coefficients, Hyperparameters

Work: TypeAlias = Callable[[], None]

STORAGE = {
    torch.float32: Storage.FLOAT32,
    torch.float64: Storage.FLOAT64,
    torch.float16: Storage.FLOAT16,
    torch.bfloat16: Storage.BFLOAT16,
    torch.complex64: Storage.FLOAT32,  # as pairs of numbers
    torch.complex128: Storage.FLOAT64,
}
_KIND = attrgetter("layout", "dtype", "is_cpu")
_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state of a parameter: its own, but float32 for 16 bits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def fused_dtypes(params: Sequence[Tensor]) -> set[torch.dtype] | None:
    """The dtypes of these parameters if the CPU kernels can update all of them."""
    dtypes = {param.dtype for param in params}
    serves = (
        dtypes <= STORAGE.keys()
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


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a ``GradScaler`` leaves to the optimizer. To ask for it waits for the device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def number(self) -> float:
        """What gradients are multiplied by."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @property
    def skips(self) -> bool:
        """Whether there is to be no step."""
        return self.found_inf is not None and bool(self.found_inf)


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

    The same tensors where they were are not examined again: with hundreds of small
    parameters that would take most of a step. Gradients are new in each step.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._dtype = torch.float32
        self._sizes: list[int] = []
        self._table = _Table([], [], [])

    def remember(self, batch: Batch, table: "_Table") -> None:
        self._tensors = written(batch)
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._dtype = batch.params[0].dtype
        self._sizes = [param.numel() for param in batch.params]
        self._table = table

    def launch(self, batch: Batch, options: Options, scale: float) -> "_DenseLaunch | None":
        """A launch if all tensors are known and the gradients are fit too."""
        if not len(batch) == len(self._sizes) > 0:
            return None
        tensors = written(batch)
        if (
            all(map(operator.is_, tensors, self._tensors))
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and all(map(Tensor.is_contiguous, batch.params))  # not transposed in place
            and _all_flat(batch.grads, self._dtype, self._sizes)
        ):
            return _DenseLaunch(batch, options, scale, self._table, batch.grads, [])
        return None


def written(batch: Batch) -> list[Tensor]:
    return [*batch.params, *batch.exp_avgs, *batch.exp_infs, *batch.steps]


def prepare_fused(
    batch: Batch,
    options: Options,
    scale: float,
    dtypes: set[torch.dtype],
    known: KnownTensors,
) -> list[Work]:
    """A step through the CPU kernels; gradients are multiplied by ``scale`` first.

    ``dtypes`` are those of the parameters.
    """
    dense, sparse = batch.by_layout()
    work: list[Work] = [_rows_launch(part, options, scale) for part in sparse.singles()]
    if dense.params:
        parts = dense.split([param.dtype for param in dense.params])
        known = known if dense is batch and len(dtypes) == 1 else KnownTensors()
        work += [_dense_launch(part, options, scale, known) for part in parts]
    return work


class _Counters:
    """The step counters of some parameters."""

    def __init__(self, steps: list[Tensor]) -> None:
        self._steps = steps
        dtypes = {step.dtype for step in steps}
        self._addresses: Int64Array | None = None
        if dtypes in ({torch.float32}, {torch.float64}) and all(s.is_cpu for s in steps):
            self._storage = STORAGE[dtypes.pop()]
            self._addresses = np.array([step.data_ptr() for step in steps], np.int64)

    def advance(self) -> Float64Array:
        """Add 1 to each, and return them."""
        if self._addresses is not None:
            return kernels().advance(self._storage, self._addresses)
        for step in self._steps:
            step += 1
        return np.array([float(step) for step in self._steps])


class _Table:
    """Where the kernels find dense parameters, their state and their step counters."""

    def __init__(
        self, params: list[Tensor], state: list[Tensor], steps: list[Tensor]
    ) -> None:
        """``state`` is all first moments, then all norms."""
        tensors = [*params, *state]
        written = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        sizes = np.array([tensor.nbytes for tensor in tensors], np.int64)
        count = len(params)
        self._addresses = np.empty((count, 4), np.int64)
        self._addresses[:, :3] = written.reshape(3, count).T
        self._written = Ranges(written, sizes)
        self._grad_sizes = sizes[:count]
        self.lengths = np.array([param.numel() for param in params], np.int64)
        if any(param.is_complex() for param in params):
            self.lengths *= 2
        self.counters = _Counters(steps)

    def addresses(self, grads: list[Tensor]) -> Int64Array:
        """Of w, m, u and g."""
        addresses = self._addresses.copy()
        addresses[:, 3] = list(map(Tensor.data_ptr, grads))
        return addresses

    def lie_apart(self, addresses: Int64Array) -> bool:
        """Whether the parameters at these addresses can be updated in any order."""
        return len(addresses) == 1 or (
            self._written.lie_apart
            and not self._written.overlap(addresses[:, 3], self._grad_sizes)
        )


@dataclass(frozen=True, slots=True)
class _DenseLaunch:
    """All dense parameters of one dtype. Holds all memory that it has the addresses of."""

    batch: Batch
    options: Options
    scale: float
    table: _Table
    grads: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]  # which to copy back where

    def __call__(self) -> None:
        storage = STORAGE[self.batch.params[0].dtype]
        factors = _factors(self.table.counters, self.options, self.scale)
        coefficients = Coefficients.of(self.options.hyperparameters)
        threads = torch.get_num_threads()
        addresses = self.table.addresses(self.grads)
        # Parameters that share memory are updated one after the other, as in torch.
        count = len(addresses)
        at_once = count if self.table.lie_apart(addresses) else 1
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            kernels().dense_step(
                storage,
                addresses[part],
                self.table.lengths[part],
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
    number = state_dtype(dtype)
    sizes = [param.numel() for param in batch.params]
    params, grads = batch.params, batch.grads
    state = [*batch.exp_avgs, *batch.exp_infs]
    copies: list[tuple[Tensor, Tensor]] = []
    if (
        _all_flat(params, dtype, sizes)
        and _all_flat(state, number, [*sizes, *sizes])
        and _all_flat(grads, dtype, sizes)
    ):
        table = _Table(params, state, batch.steps)
        known.remember(batch, table)
    else:
        columns = [batch.params, batch.exp_avgs, batch.exp_infs, batch.grads]
        (params, *moments, grads), copies = _flattened(
            columns, [dtype, number, number, dtype]
        )
        table = _Table(params, [*moments[0], *moments[1]], batch.steps)
    return _DenseLaunch(batch, options, scale, table, grads, copies)


def _all_flat(tensors: list[Tensor], dtype: torch.dtype, sizes: list[int]) -> bool:
    """Whether the elements of each tensor lie in memory as its indices count them."""
    return (
        set(map(_KIND, tensors)) == {(torch.strided, dtype, True)}
        and all(map(Tensor.is_contiguous, tensors))
        and list(map(Tensor.numel, tensors)) == sizes
        and not (dtype.is_complex and any(map(Tensor.is_conj, tensors)))
        # Imaginary parts of conjugates, which have holes unless they are one number.
        and not (1 in sizes and any(map(Tensor.is_neg, tensors)))
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
        like = layout_of(tensors[0])
        for tensor, dtype, column in zip(tensors, dtypes, flat, strict=True):
            fit = fitted(tensor, like, dtype, tensors[0].device)
            column.append(fit)
            if fit is not tensor and column is not flat[-1]:  # gradients are not written
                copies.append((tensor, fit))
    return flat, copies


def layout_of(param: Tensor) -> Tensor:
    """Of the parameter's shape and order of dimensions, without holes; no memory."""
    return torch.empty_like(param, device="meta", memory_format=torch.preserve_format)


def fitted(
    tensor: Tensor, like: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``tensor`` if it has the layout of ``like``, else a copy that has."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"the state of a parameter of shape {tuple(like.shape)} must have its shape, "
            f"got {tuple(tensor.shape)}"
        )
    fits = (
        tensor.stride() == like.stride()
        and tensor.dtype is dtype
        and tensor.device == device
        and not (tensor.is_conj() or tensor.is_neg())
    )
    return (
        tensor if fits else torch.empty_like(like, dtype=dtype, device=device).copy_(tensor)
    )


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    """The rows of one table. Holds the memory that it has the addresses of."""

    batch: Batch
    options: Options
    scale: float
    rows: "SparseRows"
    groups: Any
    deferred: DeferredRows | None = None  # in exact mode
    flush: Work | None = None  # what brings all rows up to date

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), steps = self.batch.lists()
        tensors = (param, exp_avg, exp_inf, self.rows.values)
        factors = _factors(_Counters(steps), self.options, self.scale)[0]
        if self.deferred is not None and self.flush is not None:
            hyperparameters = self.options.hyperparameters
            betas = hyperparameters.beta_1, hyperparameters.beta_2
            if self.deferred.must_flush(*betas):
                self.flush()
            self.deferred.record(
                float(factors[Factor.STEP_SIZE]), float(factors[Factor.DECAY]), *betas
            )
            self.deferred.stamp(self.groups)
        kernels().rows_step(
            STORAGE[param.dtype],
            self.groups,
            np.array([tensor.data_ptr() for tensor in tensors], np.int64),
            numbers_in_row(param, self.rows),
            factors,
            Coefficients.of(self.options.hyperparameters),
            torch.get_num_threads(),
        )
        increment_version(param)


def _rows_launch(batch: Batch, options: Options, scale: float) -> Work:
    (param,), (grad,), (exp_avg,), (exp_inf,), _ = batch.lists()
    if not in_place(param, exp_avg, exp_inf):
        return SparseStep.prepare(batch, options, scale)
    rows = sparse_rows(param, grad)
    return RowsLaunch(batch, options, scale, rows, grouped(rows))


def in_place(param: Tensor, exp_avg: Tensor, exp_inf: Tensor) -> bool:
    """Whether kernels can work on rows where they lie."""
    wanted = state_dtype(param.dtype)
    return param.is_contiguous() and all(
        state.is_contiguous()
        and state.device == param.device
        and state.dtype is wanted
        and state.shape == param.shape
        for state in (exp_avg, exp_inf)
    )


def _factors(counters: _Counters, options: Options, scale: float) -> Float64Array:
    """Advance the step counters, and the factors of a launch that follow from them."""
    t = counters.advance()
    lr, beta_1 = options.lr_number, options.hyperparameters.beta_1
    factors = np.empty((len(t), len(Factor)))
    for count, chosen in _equal(t):
        factors[chosen] = (  # in the order of Factor
            _rule.step_size(lr, beta_1, int(count)),
            _rule.decay_factor(lr, options.decay),
            -scale if options.maximize else scale,
            options.coupled_decay,
        )
    return factors


def _equal(numbers: Float64Array) -> Iterator[tuple[float, Any]]:
    """The distinct numbers, and an index of where each is."""
    distinct = set(numbers.tolist())
    for number in distinct:
        yield number, slice(None) if len(distinct) == 1 else numbers == number


# --- Sparse gradients ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A sparse COO gradient as rows of the parameter seen as a table."""

    indices: Tensor  # (n,), not necessarily distinct
    values: Tensor  # (n, ...)
    count: int  # rows of the table
    row_length: int


def sparse_rows(param: Tensor, grad: Tensor, *, wait: bool = True) -> SparseRows:
    """``grad`` as rows of the table that the leading, sparse dimensions make.

    Several sparse dimensions are checked, which waits for the device; if that is not wanted
    an index out of range becomes -1.
    """
    if grad.layout is not torch.sparse_coo:
        raise ValueError(
            f"a sparse gradient must have the layout torch.sparse_coo, got {grad.layout}"
        )
    indices, values = grad._indices(), grad._values()
    sizes, row_shape = param.shape[: len(indices)], param.shape[len(indices) :]
    if len(sizes) != 1:
        if wait:
            _check_in_range(indices, sizes)
        table_rows = indices.new_zeros(indices.shape[1:])
        for index, size in zip(indices, sizes, strict=True):
            table_rows = table_rows * size + index
        if not wait:
            table_rows.masked_fill_(_outside(indices, sizes), -1)
    else:
        table_rows = indices[0]
    if values.dtype is not param.dtype or not values.is_contiguous() or _is_lazy(values):
        values = values.to(param.dtype).resolve_conj().resolve_neg().contiguous()
    return SparseRows(
        table_rows,
        values,
        math.prod(sizes),
        math.prod(row_shape),
    )


def _is_lazy(values: Tensor) -> bool:
    return values.is_conj() or values.is_neg()


def grouped(rows: SparseRows) -> Any:
    """The rows as the CPU kernels want them; raises for an index out of range."""
    return kernels().group_rows(rows.indices.numpy(), rows.count)


def _check_in_range(indices: Tensor, sizes: Sequence[int]) -> None:
    outside = _outside(indices, sizes).nonzero()
    if len(outside):
        position = int(outside[0])
        raise IndexError(
            f"indices[:, {position}] of a sparse gradient must be in the shape "
            f"{tuple(sizes)}, got {tuple(indices[:, position].tolist())}"
        )


def _outside(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    outside = indices.new_zeros(indices.shape[1:], dtype=torch.bool)
    for index, size in zip(indices, sizes, strict=True):
        outside |= (index < 0) | (index >= size)
    return outside


def square_sum(param: Tensor, rows: SparseRows) -> float:
    """The sum of squares of a summed sparse gradient on the CPU."""
    return kernels().rows_square_sum(
        STORAGE[param.dtype],
        grouped(rows),
        rows.values.data_ptr(),
        numbers_in_row(param, rows),
        torch.get_num_threads(),
    )


def numbers_in_row(param: Tensor, rows: SparseRows) -> int:
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
    work: list[Work] = [SparseStep.prepare(b, options, scale) for b in sparse.singles()]
    for part in dense.split([(param.device, param.dtype) for param in dense.params]):
        work.append(partial(_step, part, options, scale, _FOREACH))
    return work


def prepare_for_loop(batch: Batch, options: Options, scale: float) -> list[Work]:
    """A step through torch's operations on one tensor at a time."""
    _check_dtypes(batch.params)
    dense, sparse = batch.by_layout()
    work: list[Work] = [SparseStep.prepare(b, options, scale) for b in sparse.singles()]
    # One after the other, which matters for parameters that share memory.
    work += [partial(_step, b, options, scale, _FOR_LOOP) for b in dense.singles()]
    return work


def _check_dtypes(params: Sequence[Tensor]) -> None:
    for param in params:
        if param.dtype not in STORAGE:
            raise TypeError(f"parameters must be float or complex, got {param.dtype}")


@dataclass(frozen=True, slots=True)
class SparseStep:
    """The touched rows of one table, gathered, stepped and put back."""

    batch: Batch
    options: Options
    scale: float
    rows: SparseRows
    distinct: Tensor
    place: Tensor  # of each index among the distinct ones

    @classmethod
    def prepare(cls, batch: Batch, options: Options, scale: float) -> "SparseStep":
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
    beta_1 = options.hyperparameters.beta_1
    lr: Any = options.lr
    if isinstance(lr, Tensor) and (options.capturable or options.differentiable):
        lr = lr.reshape(())  # not read, so known to autograd and still on the device
    else:
        lr = options.lr_number
    decay = _rule.decay_factor(lr, options.decay)
    if options.capturable:
        logarithm = math.log(beta_1) if beta_1 else -math.inf
        return [lr / -torch.expm1(step * logarithm) for step in steps], decay
    return [_rule.step_size(lr, beta_1, int(step)) for step in steps], decay
