"""NumPy arrays as memory that the kernels can work on.

Everything here that can fail fails before anything is written.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy.typing as npt

import numpy as np

from ._deferred import DeferredRows
from ._kernels import Factor, Float64Array, Int64Array, Storage, kernels, state_dtype
from ._kernels._memory import Ranges
from ._rule import Coefficients, Hyperparameters, clip_factor

Array: TypeAlias = npt.NDArray[Any]


class SparseGradient(Protocol):
    """Anything with ``values`` and ``indices``: ``IndexedSlices``, TensorFlow's too."""

    @property
    def values(self) -> Any: ...
    @property
    def indices(self) -> Any: ...


class Variable:
    """A parameter and its state.

    ``m`` and ``u`` have the shape of the parameter, and its memory order where that is
    contiguous. ``direct`` says that kernels can work on the parameter where it lies.
    """

    m: Array
    u: Array
    addresses: tuple[int, int, int]  # of the parameter, m and u
    deferred: DeferredRows | None = None  # of a table in exact mode

    def __init__(self, parameter: Array, name: str) -> None:
        if not isinstance(parameter, np.ndarray):
            raise TypeError(
                f"parameter {name!r} must be a NumPy array, which is updated in place; "
                f"got {type(parameter).__name__}"
            )
        storage = Storage.of(parameter.dtype.name)
        if storage is None:
            expected = ", ".join(storage.value for storage in Storage)
            raise TypeError(
                f"parameter {name!r} must have one of the dtypes {expected}, "
                f"got {parameter.dtype}"
            )
        self.parameter = parameter
        self.name = name
        self.storage = storage
        self.shape = parameter.shape
        self.dtype = parameter.dtype
        self.native_dtype = parameter.dtype.newbyteorder("=")
        flags = parameter.flags
        self.order: Literal["C", "F"] = "F" if flags.fnc else "C"
        self.direct = flags.forc and flags.aligned and self.dtype == self.native_dtype
        self.strides = parameter.strides
        self.check_unchanged()
        if not flags.forc and _may_overlap_itself(parameter):
            raise ValueError(f"parameter {name!r} has elements that overlap in memory")

    @property
    def state_layout(self) -> tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]:
        """Shape, dtype and memory order of ``m`` and ``u``."""
        return self.shape, state_dtype(self.storage), self.order

    def check_unchanged(self) -> None:
        """Raise if the array cannot be written, or is no longer what it was."""
        parameter = self.parameter
        if not parameter.flags.writeable:
            raise ValueError(f"parameter {self.name!r} is read-only")
        layout = (parameter.shape, parameter.dtype, parameter.strides)
        if layout != (self.shape, self.dtype, self.strides):
            raise ValueError(
                f"parameter {self.name!r} has state for the shape {self.shape}, dtype "
                f"{self.dtype} and strides {self.strides}, but now has {layout}"
            )

    @property
    def address(self) -> int:
        return kernels().array_address(self.parameter)

    def hold(self, m: Array, u: Array) -> None:
        """Take ``m`` and ``u`` as the state."""
        self.m, self.u = m, u
        address = kernels().array_address
        self.addresses = (self.address, address(m), address(u))

    @property
    def row_length(self) -> int:
        return math.prod(self.shape[1:])

    def defer(self, hyperparameters: Hyperparameters) -> DeferredRows:
        """What says which rows are behind; made when it is first needed."""
        if self.deferred is None:
            self.deferred = DeferredRows(
                self.storage,
                self.shape[0],
                self.row_length,
                hyperparameters.beta_1,
                hyperparameters.beta_2,
                hyperparameters.epsilon,
            )
        return self.deferred

    @property
    def rows_in_place(self) -> bool:
        """Whether kernels can work on rows where they lie."""
        return self.direct and self.order == "C"

    def lookup(self, ids: Any, threads: int) -> Array:
        """A copy of some rows, which are brought up to date first."""
        what = f"ids for parameter {self.name!r}"
        indices = _checked_indices(ids, self.shape[0], what, what)
        flat = indices.ravel()
        try:
            groups = kernels().group_rows(flat, self.shape[0])
        except IndexError as error:
            raise IndexError(f"{what}: {error}") from None
        if self.deferred is None or not self.deferred.may_be_behind:
            return np.asarray(self.parameter[indices])
        if not self.rows_in_place:
            self._catch_up_copies(self.deferred, np.unique(flat), threads)
            return np.asarray(self.parameter[indices])
        rows: Array = np.empty((*indices.shape, *self.shape[1:]), self.dtype)
        copy = kernels().array_address(rows)
        self.deferred.catch_up(groups, self.addresses, copy, threads)
        return rows

    def flush(self, threads: int) -> None:
        """Bring all rows up to date."""
        deferred = self.deferred
        if deferred is None or not deferred.may_be_behind:
            return
        self.check_unchanged()

        def catch_up(start: int, stop: int) -> None:
            if self.rows_in_place:
                deferred.catch_up_range(start, stop, self.addresses, threads)
            else:
                self._catch_up_copies(deferred, slice(start, stop), threads)

        deferred.flush(catch_up, f"parameter {self.name!r}")

    def _catch_up_copies(
        self, deferred: DeferredRows, rows: Int64Array | slice, threads: int
    ) -> None:
        work = self.copies_of(rows)
        w, m, u = map(kernels().array_address, work)
        deferred.catch_up_copies(rows, (w, m, u), threads)
        self.put_back(rows, work)
        deferred.set_current(rows)

    def copies_of(self, rows: Int64Array | slice) -> tuple[Array, Array, Array]:
        """Rows of the parameter, ``m`` and ``u`` that kernels can work on."""
        return (
            np.array(self.parameter[rows], self.native_dtype, order="C"),
            np.array(self.m[rows], order="C"),
            np.array(self.u[rows], order="C"),
        )

    def put_back(self, rows: Int64Array | slice, work: Sequence[Array]) -> None:
        for target, copies in zip((self.parameter, self.m, self.u), work, strict=True):
            target[rows] = copies

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_variable, (self.parameter, self.name, self.m, self.u)


def _copied_variable(parameter: Array, name: str, m: Array, u: Array) -> Variable:
    variable = Variable(parameter, name)
    # A copy of a strided array may be contiguous, in either order.
    order = variable.order
    variable.hold(np.asarray(m, order=order), np.asarray(u, order=order))
    return variable


@dataclass(slots=True)
class Scalars:
    """What all launches of a step are given."""

    step_size: float
    decay: float
    betas: tuple[float, float]
    scales: Float64Array  # what the gradient of each pair is multiplied by
    coefficients: Coefficients
    threads: int


class Update:
    """One step of one parameter, checked.

    ``work`` holds copies for the kernels to work on where they cannot work on the
    parameter itself, because it is not contiguous, aligned and of the native byte order.
    """

    __slots__ = ("address", "gradient", "position", "variable", "work")

    address: int  # of the gradient

    def __init__(self, gradient: Array, variable: Variable, position: int) -> None:
        self.gradient = gradient
        self.variable = variable
        self.position = position  # among the pairs of the step
        self.work: tuple[Array, ...] = ()

    def prepare(self, written: Ranges) -> None:
        """Make the copies that are needed, if any; the state has been allocated.

        ``written`` is the memory that steps write, of which a gradient may be a view.
        """
        self.address = kernels().array_address(self.gradient)
        if written.overlap_one(self.address, self.gradient.nbytes):
            self.gradient = self.gradient.copy(order="K")
            self.address = kernels().array_address(self.gradient)

    def finish(self) -> None:
        """Copy ``work`` back."""

    def addresses(self) -> tuple[int, ...]:
        """Of ``w``, ``m``, ``u`` and the gradient."""
        in_place = self.variable.addresses[len(self.work) :]
        return *map(kernels().array_address, self.work), *in_place, self.address


class DenseUpdate(Update):
    """One step of a whole parameter."""

    __slots__ = ()

    def __init__(self, gradient: Any, variable: Variable, position: int) -> None:
        gradient = _as_array(gradient, variable)
        if gradient.shape != variable.shape:
            raise ValueError(
                f"the gradient of parameter {variable.name!r} must have the shape "
                f"{variable.shape}, got {gradient.shape}"
            )
        gradient = _converted(gradient, variable.native_dtype, variable.order)
        super().__init__(gradient, variable, position)

    def prepare(self, written: Ranges) -> None:
        super().prepare(written)
        variable = self.variable
        if not variable.direct:
            self.work = (
                _converted(variable.parameter, variable.native_dtype, variable.order),
            )

    def finish(self) -> None:
        if self.work:
            self.variable.parameter[...] = self.work[0]


class RowsUpdate(Update):
    """One step of some rows of a table."""

    __slots__ = ("groups", "row_length", "rows", "table_groups")

    def __init__(self, gradient: SparseGradient, variable: Variable, position: int) -> None:
        shape, name = variable.shape, variable.name
        if not shape:
            raise ValueError(f"parameter {name!r} has no rows, but its gradient is sparse")
        where = f"the gradient of parameter {name!r}"
        what = f"the indices of {where}"
        indices = _checked_indices(gradient.indices, shape[0], what, where)
        if indices.ndim != 1:
            raise ValueError(
                f"{what} must have one dimension, got the shape {indices.shape}"
            )
        values = _as_array(gradient.values, variable)
        expected = (indices.size, *shape[1:])
        if values.shape != expected:
            raise ValueError(
                f"the values of the gradient of parameter {name!r} must have the shape "
                f"{expected}, got {values.shape}"
            )
        dense_shape = getattr(gradient, "dense_shape", None)
        if dense_shape is not None and tuple(np.asarray(dense_shape).tolist()) != shape:
            raise ValueError(
                f"the dense_shape of the gradient of parameter {name!r} must be {shape}, "
                f"got {tuple(np.asarray(dense_shape).tolist())}"
            )
        values = _converted(values, variable.native_dtype, "C")
        super().__init__(values, variable, position)
        self.row_length = variable.row_length
        try:
            self.groups = kernels().group_rows(indices, shape[0])
        except IndexError as error:
            raise IndexError(f"{where}: {error}") from None
        self.table_groups = self.groups
        self.rows: Int64Array | None = None
        if not variable.rows_in_place:
            # The kernels work on copies of the distinct rows, so number those.
            self.rows, numbered = np.unique(indices, return_inverse=True)
            self.groups = kernels().group_rows(
                numbered.astype(np.int64, copy=False), self.rows.size
            )

    def prepare(self, written: Ranges) -> None:
        super().prepare(written)
        if self.rows is not None:
            self.work = self.variable.copies_of(self.rows)

    def finish(self) -> None:
        if self.rows is not None:
            self.variable.put_back(self.rows, self.work)

    @property
    def positions(self) -> int:
        return self.position

    def square_sums(self, threads: int) -> float:
        return kernels().rows_square_sum(
            self.variable.storage,
            self.groups,
            self.address,
            self.row_length,
            threads,
        )

    def launch(self, step: Scalars) -> None:
        deferred = self.variable.deferred
        if deferred is not None:
            if deferred.must_flush(*step.betas):
                self.variable.flush(step.threads)
            deferred.record(step.step_size, step.decay, *step.betas)
            deferred.stamp(self.table_groups)
        kernels().rows_step(
            self.variable.storage,
            self.groups,
            np.array(self.addresses(), np.int64),
            self.row_length,
            # In the order of Factor.
            np.array([step.step_size, step.decay, step.scales[self.position], 0.0]),
            step.coefficients,
            step.threads,
        )


@dataclass(frozen=True, slots=True)
class DenseLaunch:
    """One step of many whole parameters of one dtype."""

    positions: Sequence[int] | slice  # among the pairs of the step
    storage: Storage
    addresses: Int64Array  # of w, m, u and g
    lengths: Int64Array

    @classmethod
    def of(cls, updates: Sequence[DenseUpdate]) -> "DenseLaunch":
        return cls(
            [update.position for update in updates],
            updates[0].variable.storage,
            np.array([update.addresses() for update in updates], np.int64),
            np.array([update.gradient.size for update in updates], np.int64),
        )

    def square_sums(self, threads: int) -> Float64Array:
        read = self.addresses[:, 3].copy()
        return kernels().dense_square_sums(self.storage, read, self.lengths, threads)

    def launch(self, step: Scalars) -> None:
        factors = np.zeros((len(self.lengths), len(Factor)))
        factors[:, Factor.STEP_SIZE] = step.step_size
        factors[:, Factor.DECAY] = step.decay
        factors[:, Factor.SCALE] = step.scales[self.positions]
        kernels().dense_step(
            self.storage,
            self.addresses,
            self.lengths,
            factors,
            step.coefficients,
            step.threads,
        )


Launch: TypeAlias = DenseLaunch | RowsUpdate


def prepared(updates: Sequence[Update], written: Ranges) -> list[Launch]:
    """The launches for ``updates``; all memory that they need has been allocated."""
    dense: dict[Storage, list[DenseUpdate]] = {}
    launches: list[Launch] = []
    for update in updates:
        update.prepare(written)
        if isinstance(update, DenseUpdate):
            dense.setdefault(update.variable.storage, []).append(update)
        elif isinstance(update, RowsUpdate):
            launches.append(update)
    return [*map(DenseLaunch.of, dense.values()), *launches]


def written_by_steps(variables: Iterable[Variable]) -> Ranges:
    """The memory that steps of ``variables`` write while they read gradients."""
    ranges = [
        (address, array.nbytes)
        for v in variables
        for array, address in zip((v.parameter, v.m, v.u), v.addresses, strict=True)
        if v.direct or array is not v.parameter  # else kernels write to a copy
    ]
    starts, sizes = np.array(ranges, np.int64).reshape(-1, 2).T
    return Ranges(starts, sizes)


def check_disjoint(known: Iterable[Variable], fresh: Sequence[Variable]) -> None:
    """Raise if a new parameter shares memory with another, old or new."""
    spans = [(*_span(v.parameter), v) for v in (*known, *fresh)]
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, Variable]] = []
    for start, end, variable in spans:
        open_spans = [span for span in open_spans if span[1] > start]
        for _, _, other in open_spans:
            if _share_memory(variable.parameter, other.parameter):
                new, old = (variable, other) if variable in fresh else (other, variable)
                raise ValueError(
                    f"parameter {new.name!r} shares memory with {old.name!r}; "
                    f"pass the same array in every step, not a new view of it"
                )
        open_spans.append((start, end, variable))


def is_sparse(gradient: Any) -> bool:
    """Whether ``gradient`` is a :class:`SparseGradient`."""
    if type(gradient) is np.ndarray or not hasattr(gradient, "indices"):
        return False
    # Dense tensors of torch have methods of these names.
    return not callable(getattr(gradient, "values", callable))


class KnownBatch:
    """Dense parameters that a step can take as they were in the last one.

    With hundreds of small arrays, examining each in turn takes longer than updating it.
    """

    def __init__(self, updates: Sequence[Update] = ()) -> None:
        dense = [update for update in updates if isinstance(update, DenseUpdate)]
        storages = {update.variable.storage for update in dense}
        usable = len(storages) == 1 and all(update.variable.direct for update in dense)
        variables = [update.variable for update in dense] if usable else []
        self._parameters = [variable.parameter for variable in variables]
        self._ids = set(map(id, self._parameters))
        if variables:
            self._storage = variables[0].storage
            self._layouts = kernels().array_layouts(self._parameters)
            self._state = np.array([v.addresses[1:] for v in variables], np.int64)
            self._sizes = np.array([p.nbytes for p in self._parameters], np.int64)
            self._lengths = self._sizes // self._storage.itemsize

    def holds(self, parameters: Iterable[Any]) -> bool:
        """Whether any of ``parameters`` is one of these."""
        return not self._ids.isdisjoint(map(id, parameters))

    def launch(
        self,
        gradients: Sequence[Any],
        parameters: Sequence[Any],
        positions: Sequence[int] | slice,
        written: Ranges,
    ) -> DenseLaunch | None:
        """None if anything is not as it was, or needs a copy."""
        if not (
            len(self._parameters) == len(parameters) > 0
            and all(map(operator.is_, parameters, self._parameters))
        ):
            return None
        find = kernels().find_arrays
        own = find(self._layouts, parameters, writeable=True)
        read = find(self._layouts, gradients, writeable=False)
        if own is None or read is None or written.overlap(read, self._sizes):
            return None
        addresses = np.column_stack([own, self._state, read])
        return DenseLaunch(positions, self._storage, addresses, self._lengths)


def clip_factors(
    launches: Iterable[Launch],
    count: int,
    hyperparameters: Hyperparameters,
    threads: int,
) -> Float64Array:
    """What each of ``count`` gradients is multiplied by, so that norms are in bounds."""
    clipnorm, global_clipnorm = hyperparameters.clipnorm, hyperparameters.global_clipnorm
    if clipnorm is None and global_clipnorm is None:
        return np.ones(count)
    square_sums = np.empty(count)
    for part in launches:
        square_sums[part.positions] = part.square_sums(threads)
    if global_clipnorm is not None:
        factor = clip_factor(math.sqrt(square_sums.sum()), global_clipnorm)
        return np.full(count, factor)
    limit = clipnorm or math.inf
    return np.array([clip_factor(math.sqrt(s), limit) for s in square_sums.tolist()])


def _as_array(gradient: Any, variable: Variable) -> Array:
    """``gradient`` as an array of some real dtype."""
    array = gradient if type(gradient) is np.ndarray else np.asarray(gradient)
    dtype = array.dtype
    real = dtype.kind in "fiu" or Storage.of(dtype.name) is not None
    if not real:
        raise TypeError(
            f"the gradient of parameter {variable.name!r} must be an array of real "
            f"numbers, got {type(gradient).__name__} of dtype {dtype}"
        )
    return array


def _checked_indices(
    indices: Any, rows: int, what: str, where: str
) -> npt.NDArray[np.int32] | Int64Array:
    """``indices`` as the kernels take them; ``what`` and ``where`` are for the errors."""
    array = np.asarray(indices)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{what} must be integers, got {array.dtype}")
    if array.dtype == np.int32 or array.dtype == np.int64:
        return array
    if array.dtype == np.uint64 and (outside := np.flatnonzero(array >= rows)).size:
        position = int(outside[0])  # int64 could not hold it
        raise IndexError(
            f"{where}: indices[{position}] must be in [0, {rows}), "
            f"got {array.ravel()[position]}"
        )
    return array.astype(np.int64)


def _converted(array: Array, dtype: np.dtype[Any], order: Literal["C", "F"]) -> Array:
    """``array`` itself if the kernels can work on it, else a copy that they can."""
    flags = array.flags
    in_order = flags.c_contiguous if order == "C" else flags.f_contiguous
    if array.dtype == dtype and in_order and flags.aligned:
        return array
    return np.require(array, dtype, [order, "A"])


def _span(array: Array) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)


def _may_overlap_itself(array: Array) -> bool:
    """Whether dimensions reach into each other's strides, as only as_strided makes them."""
    reach = array.itemsize
    for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _share_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
