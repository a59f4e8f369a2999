"""NumPy arrays as memory that the kernels can work on.

Everything here that can fail fails before anything is written.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ._kernels import Float64Array, Int64Array, Storage, kernels, state_dtype
from ._rule import Coefficients, Hyperparameters, clip_factor

Array: TypeAlias = npt.NDArray[Any]


@runtime_checkable
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
        self.check_unchanged()

    @property
    def state_layout(self) -> tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]:
        """Shape, dtype and memory order of ``m`` and ``u``."""
        return self.shape, state_dtype(self.storage), self.order

    def check_unchanged(self) -> None:
        """Raise if the array cannot be written, or is no longer what it was."""
        parameter = self.parameter
        if not parameter.flags.writeable:
            raise ValueError(f"parameter {self.name!r} is read-only")
        if parameter.shape != self.shape or parameter.dtype != self.dtype:
            raise ValueError(
                f"parameter {self.name!r} has state for the shape {self.shape} and dtype "
                f"{self.dtype}, but now has {parameter.shape} and {parameter.dtype}"
            )

    def hold(self, m: Array, u: Array) -> None:
        """Take ``m`` and ``u`` as the state."""
        self.m, self.u = m, u
        self.addresses = (_address(self.parameter), _address(m), _address(u))

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_variable, (self.parameter, self.name, self.m, self.u)


def _copied_variable(parameter: Array, name: str, m: Array, u: Array) -> Variable:
    variable = Variable(parameter, name)
    # A copy of a strided array may be contiguous, in either order.
    order = variable.order
    variable.hold(np.asarray(m, order=order), np.asarray(u, order=order))
    return variable


class DenseUpdate:
    """One step of a whole parameter."""

    __slots__ = ("gradient", "variable", "w")

    def __init__(self, gradient: Any, variable: Variable) -> None:
        gradient = _as_array(gradient, variable)
        if gradient.shape != variable.shape:
            raise ValueError(
                f"the gradient of parameter {variable.name!r} must have the shape "
                f"{variable.shape}, got {gradient.shape}"
            )
        flags = gradient.flags
        in_order = flags.c_contiguous if variable.order == "C" else flags.f_contiguous
        if gradient.dtype != variable.native_dtype or not in_order or not flags.aligned:
            gradient = _converted(gradient, variable)
        self.variable = variable
        self.gradient = gradient
        self.w = variable.parameter
        if not variable.direct:
            self.w = _converted(variable.parameter, variable)

    def addresses(self) -> tuple[int, int, int, int]:
        w, m, u = self.variable.addresses
        if self.w is not self.variable.parameter:
            w = _address(self.w)
        return w, m, u, _address(self.gradient)

    def write_back(self) -> None:
        if self.w is not self.variable.parameter:
            self.variable.parameter[...] = self.w


class RowsUpdate:
    """One step of some rows of a table.

    Where kernels cannot work on the table itself, ``w``, ``m`` and ``u`` are copies of
    its distinct ``rows``.
    """

    __slots__ = ("gradient", "groups", "m", "row_length", "rows", "u", "variable", "w")

    def __init__(self, gradient: SparseGradient, variable: Variable) -> None:
        shape, name = variable.shape, variable.name
        if not shape:
            raise ValueError(f"parameter {name!r} has no rows, but its gradient is sparse")
        indices = np.asarray(gradient.indices)
        if indices.dtype.kind not in "iu" and indices.size:
            raise TypeError(
                f"the indices of the gradient of parameter {name!r} must be integers, "
                f"got {indices.dtype}"
            )
        if indices.ndim != 1:
            raise ValueError(
                f"the indices of the gradient of parameter {name!r} must have one "
                f"dimension, got the shape {indices.shape}"
            )
        values = _as_array(gradient.values, variable)
        expected = (indices.size, *shape[1:])
        if values.shape != expected:
            raise ValueError(
                f"the values of the gradient of parameter {name!r} must have the shape "
                f"{expected}, got {values.shape}"
            )
        dense_shape = getattr(gradient, "dense_shape", None)
        if dense_shape is not None and tuple(np.asarray(dense_shape)) != shape:
            raise ValueError(
                f"the dense_shape of the gradient of parameter {name!r} must be {shape}, "
                f"got {tuple(np.asarray(dense_shape).tolist())}"
            )
        if indices.dtype not in (np.int32, np.int64) or not indices.dtype.isnative:
            indices = indices.astype(np.int64)
        flags = values.flags
        if values.dtype != variable.native_dtype or not (
            flags.c_contiguous and flags.aligned
        ):
            values = np.require(values, variable.native_dtype, ["C", "A"])
        self.variable = variable
        self.gradient = values
        self.row_length = math.prod(shape[1:])
        self.w, self.m, self.u = variable.parameter, variable.parameter, variable.parameter
        self.rows: Array | None = None
        try:
            self.groups = kernels().group_rows(indices, shape[0])
        except IndexError as error:
            raise IndexError(f"the gradient of parameter {name!r}: {error}") from None
        if not (variable.direct and variable.order == "C"):
            self.rows, place = np.unique(indices, return_inverse=True)
            self.groups = kernels().group_rows(place.astype(np.int64), self.rows.size)

    def addresses(self) -> tuple[int, int, int, int]:
        w, m, u = self.variable.addresses
        if self.rows is not None:
            # Not in the constructor: the state may not have been there yet.
            variable, native = self.variable, self.variable.native_dtype
            self.w = np.require(variable.parameter[self.rows], native, ["C", "A"])
            self.m = np.ascontiguousarray(variable.m[self.rows])
            self.u = np.ascontiguousarray(variable.u[self.rows])
            w, m, u = _address(self.w), _address(self.m), _address(self.u)
        return w, m, u, _address(self.gradient)

    def write_back(self) -> None:
        if self.rows is not None:
            self.variable.parameter[self.rows] = self.w
            self.variable.m[self.rows] = self.m
            self.variable.u[self.rows] = self.u


Update: TypeAlias = DenseUpdate | RowsUpdate


def update_of(gradient: Any, variable: Variable) -> Update:
    """What ``gradient`` asks for, checked."""
    if type(gradient) is not np.ndarray and isinstance(gradient, SparseGradient):
        return RowsUpdate(gradient, variable)
    return DenseUpdate(gradient, variable)


class Memory:
    """The memory that steps write: that of all parameters and of their state."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self._parameters = [variable.parameter for variable in variables]
        self._names = [variable.name for variable in variables]
        spans = [_span(array) for array in self._parameters]
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.array([end for _, end in spans], np.int64)
        spans += [_span(array) for v in variables for array in (v.m, v.u)]
        self._merged_starts, self._merged_ends = _merged(spans)

    def check_disjoint(self, fresh: Iterable[Variable]) -> None:
        """Raise if a new parameter shares memory with another, old or new."""
        known = list(zip(self._parameters, self._names, strict=True))
        starts, ends = list(self._starts), list(self._ends)
        for variable in fresh:
            start, end = _span(variable.parameter)
            near = np.flatnonzero((np.array(starts) < end) & (np.array(ends) > start))
            for index in near:
                other, name = known[index]
                if _share_memory(variable.parameter, other):
                    raise ValueError(
                        f"parameter {variable.name!r} shares memory with parameter "
                        f"{name!r}, which has state; pass the same array object in every "
                        f"step, not a new view of it"
                    )
            known.append((variable.parameter, variable.name))
            starts.append(start)
            ends.append(end)

    def protect(self, updates: Sequence[Update]) -> None:
        """Copy the gradients that lie in this memory, so that no write changes them."""
        starts = np.array([_address(update.gradient) for update in updates])
        ends = starts + [update.gradient.nbytes for update in updates]
        place = np.searchsorted(self._merged_ends, starts, side="right")
        inside = place < self._merged_starts.size
        inside[inside] = self._merged_starts[place[inside]] < ends[inside]
        for index in np.flatnonzero(inside).tolist():
            update = updates[index]
            update.gradient = update.gradient.copy(order="K")


def clip_factors(
    updates: Sequence[Update], hyperparameters: Hyperparameters, threads: int
) -> Float64Array:
    """What each gradient is multiplied by for ``clipnorm`` or ``global_clipnorm``."""
    limit = hyperparameters.clipnorm or hyperparameters.global_clipnorm
    if limit is None:
        return np.ones(len(updates))
    square_sums = _square_sums(updates, threads)
    if hyperparameters.global_clipnorm is not None:
        return np.full(len(updates), clip_factor(math.sqrt(square_sums.sum()), limit))
    return np.array([clip_factor(math.sqrt(s), limit) for s in square_sums])


def launch(
    updates: Sequence[Update],
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    """Run the kernels: one launch for all dense updates of a dtype, one for each table."""
    addresses = np.array([update.addresses() for update in updates], np.int64)
    for storage, chosen in _dense_by_storage(updates):
        lengths = np.array([updates[i].gradient.size for i in chosen], np.int64)
        kernels().dense_step(
            storage, addresses[chosen], lengths, factors[chosen], coefficients, threads
        )
    for index, update in enumerate(updates):
        if isinstance(update, RowsUpdate):
            kernels().rows_step(
                update.variable.storage,
                update.groups,
                addresses[index],
                update.row_length,
                factors[index],
                coefficients,
                threads,
            )
    for update in updates:
        update.write_back()


def _square_sums(updates: Sequence[Update], threads: int) -> Float64Array:
    sums = np.empty(len(updates))
    for storage, chosen in _dense_by_storage(updates):
        gradients = [updates[i].gradient for i in chosen]
        addresses = np.array([_address(gradient) for gradient in gradients], np.int64)
        lengths = np.array([gradient.size for gradient in gradients], np.int64)
        sums[chosen] = kernels().dense_square_sums(storage, addresses, lengths, threads)
    for index, update in enumerate(updates):
        if isinstance(update, RowsUpdate):
            sums[index] = kernels().rows_square_sum(
                update.variable.storage,
                update.groups,
                _address(update.gradient),
                update.row_length,
                threads,
            )
    return sums


def _dense_by_storage(updates: Sequence[Update]) -> list[tuple[Storage, list[int]]]:
    chosen: dict[Storage, list[int]] = {}
    for index, update in enumerate(updates):
        if isinstance(update, DenseUpdate):
            chosen.setdefault(update.variable.storage, []).append(index)
    return list(chosen.items())


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


def _converted(array: Array, variable: Variable) -> Array:
    """A copy that kernels can work on, in the memory order of the variable's state."""
    return np.require(array, variable.native_dtype, [variable.order, "A"])


def _address(array: Array) -> int:
    return array.ctypes.data


def _span(array: Array) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[Int64Array, Int64Array]:
    """The union of address ranges, as ascending starts and ends."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif start < end:
            merged.append((start, end))
    starts, ends = np.array(merged, np.int64).reshape(-1, 2).T
    return np.ascontiguousarray(starts), np.ascontiguousarray(ends)


def _share_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
