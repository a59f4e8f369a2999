"""NumPy arrays as memory that the kernels can work on.

Everything here that can fail fails before anything is written.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ._kernels import Float64Array, Int64Array, Storage, kernels, state_dtype
from ._kernels._memory import Ranges
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
    sizes: tuple[int, int, int]  # in bytes

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

    def hold(self, m: Array, u: Array) -> None:
        """Take ``m`` and ``u`` as the state."""
        self.m, self.u = m, u
        self.addresses = (_address(self.parameter), _address(m), _address(u))
        self.sizes = (self.parameter.nbytes, m.nbytes, u.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_variable, (self.parameter, self.name, self.m, self.u)


def _copied_variable(parameter: Array, name: str, m: Array, u: Array) -> Variable:
    variable = Variable(parameter, name)
    # A copy of a strided array may be contiguous, in either order.
    order = variable.order
    variable.hold(np.asarray(m, order=order), np.asarray(u, order=order))
    return variable


class Update:
    """One step of one parameter, checked.

    ``work`` holds copies for the kernels to work on where they cannot work on the
    parameter itself, because it is not contiguous, aligned and of the native byte order.
    """

    __slots__ = ("address", "gradient", "variable", "work")

    gradient: Array
    address: int  # of the gradient

    def __init__(self, gradient: Array, variable: Variable) -> None:
        self.variable = variable
        self.work: tuple[Array, ...] = ()
        self.take(gradient)

    def take(self, gradient: Array) -> None:
        self.gradient = gradient
        self.address = _address(gradient)

    def prepare(self) -> None:
        """Make the copies in ``work``, if any; the state has been allocated."""

    def finish(self) -> None:
        """Copy ``work`` back."""

    def addresses(self) -> tuple[int, ...]:
        """Of ``w``, ``m``, ``u`` and the gradient."""
        in_place = self.variable.addresses[len(self.work) :]
        return *map(_address, self.work), *in_place, self.address

    def sizes(self) -> tuple[int, ...]:
        """Of the memory at :meth:`addresses`, in bytes."""
        in_place = self.variable.sizes[len(self.work) :]
        return *(array.nbytes for array in self.work), *in_place, self.gradient.nbytes


class DenseUpdate(Update):
    """One step of a whole parameter."""

    __slots__ = ()

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
            gradient = _converted(gradient, variable.native_dtype, variable.order)
        super().__init__(gradient, variable)

    def prepare(self) -> None:
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

    __slots__ = ("groups", "row_length", "rows")

    def __init__(self, gradient: SparseGradient, variable: Variable) -> None:
        shape, name = variable.shape, variable.name
        if not shape:
            raise ValueError(f"parameter {name!r} has no rows, but its gradient is sparse")
        indices = _checked_indices(gradient.indices, shape[0], name)
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
        super().__init__(_converted(values, variable.native_dtype, "C"), variable)
        self.row_length = math.prod(shape[1:])
        try:
            self.groups = kernels().group_rows(indices, shape[0])
        except IndexError as error:
            raise IndexError(f"the gradient of parameter {name!r}: {error}") from None
        self.rows: Array | None = None
        if not (variable.direct and variable.order == "C"):
            # The kernels work on copies of the distinct rows, so number those.
            self.rows, numbered = np.unique(indices, return_inverse=True)
            self.groups = kernels().group_rows(
                numbered.astype(np.int64, copy=False), self.rows.size
            )

    def prepare(self) -> None:
        if self.rows is not None:
            variable = self.variable
            self.work = (
                _converted(variable.parameter[self.rows], variable.native_dtype, "C"),
                np.ascontiguousarray(variable.m[self.rows]),
                np.ascontiguousarray(variable.u[self.rows]),
            )

    def finish(self) -> None:
        if self.rows is not None:
            variable = self.variable
            targets = (variable.parameter, variable.m, variable.u)
            for target, rows in zip(targets, self.work, strict=True):
                target[self.rows] = rows


def update_of(gradient: Any, variable: Variable) -> Update:
    """What ``gradient`` asks for, checked."""
    if _is_sparse(gradient):
        return RowsUpdate(gradient, variable)
    return DenseUpdate(gradient, variable)


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


def _is_sparse(gradient: Any) -> bool:
    if type(gradient) is np.ndarray or not isinstance(gradient, SparseGradient):
        return False
    return not callable(gradient.values)  # a method of dense tensors of torch too


class KnownBatch:
    """Dense parameters that a step can take as they were in the last one.

    With hundreds of small arrays, examining each in turn takes longer than updating it.
    """

    def __init__(self, updates: Sequence[Update] = ()) -> None:
        storages = {update.variable.storage for update in updates}
        usable = len(storages) == 1 and all(
            isinstance(update, DenseUpdate) and update.variable.direct for update in updates
        )
        variables = [update.variable for update in updates] if usable else []
        self._parameters = [variable.parameter for variable in variables]
        self._shapes = [variable.shape for variable in variables]
        self._strides = [variable.parameter.strides for variable in variables]
        if variables:
            self._storage = variables[0].storage
            self._dtype = variables[0].dtype
            self._written = np.array([v.addresses for v in variables], np.int64)
            sizes = np.array([v.sizes for v in variables], np.int64)
            self._ranges = Ranges(self._written.ravel(), sizes.ravel())
            self._gradient_sizes = sizes[:, 0].copy()
            self._lengths = self._gradient_sizes // self._dtype.itemsize

    def addresses(
        self, gradients: Sequence[Any], parameters: Sequence[Any]
    ) -> Int64Array | None:
        """Of w, m, u and g; None if anything is not as it was, or needs a copy."""
        count = len(self._parameters)
        if not (
            count == len(parameters) > 0
            and all(map(operator.is_, parameters, self._parameters))
            and set(map(type, gradients)) == {np.ndarray}
            and all([parameter.flags.writeable for parameter in parameters])  # noqa: C419
            and [parameter.shape for parameter in parameters] == self._shapes
            and [parameter.strides for parameter in parameters] == self._strides
            and [parameter.dtype for parameter in parameters].count(self._dtype) == count
            and [gradient.shape for gradient in gradients] == self._shapes
            and [gradient.strides for gradient in gradients] == self._strides
            and [gradient.dtype for gradient in gradients].count(self._dtype) == count
        ):
            return None
        read = kernels().array_addresses(gradients)
        if (read % self._dtype.alignment).any():
            return None
        if self._ranges.overlap(read, self._gradient_sizes).any():
            return None
        return np.column_stack([self._written, read])

    def clip_factors(
        self, addresses: Int64Array, hyperparameters: Hyperparameters, threads: int
    ) -> Float64Array:
        if not _clips_norms(hyperparameters):
            return np.ones(len(addresses))
        read = addresses[:, 3].copy()
        sums = kernels().dense_square_sums(self._storage, read, self._lengths, threads)
        return _clip_factors_of(sums, hyperparameters)

    def launch(
        self,
        addresses: Int64Array,
        factors: Float64Array,
        coefficients: Coefficients,
        threads: int,
    ) -> None:
        kernels().dense_step(
            self._storage, addresses, self._lengths, factors, coefficients, threads
        )


def clip_factors(
    updates: Sequence[Update], hyperparameters: Hyperparameters, threads: int
) -> Float64Array:
    """What each gradient is multiplied by for ``clipnorm`` or ``global_clipnorm``."""
    if not _clips_norms(hyperparameters):
        return np.ones(len(updates))
    return _clip_factors_of(_square_sums(updates, threads), hyperparameters)


def _clips_norms(hyperparameters: Hyperparameters) -> bool:
    given = (hyperparameters.clipnorm, hyperparameters.global_clipnorm)
    return given != (None, None)


def _clip_factors_of(
    square_sums: Float64Array, hyperparameters: Hyperparameters
) -> Float64Array:
    if (limit := hyperparameters.global_clipnorm) is not None:
        factor = clip_factor(math.sqrt(square_sums.sum()), limit)
        return np.full(len(square_sums), factor)
    limit = hyperparameters.clipnorm or math.inf
    return np.array([clip_factor(math.sqrt(s), limit) for s in square_sums.tolist()])


def launch(
    updates: Sequence[Update],
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    """Run the kernels: one launch for all dense updates of a dtype, one for each table."""
    for update in updates:
        update.prepare()
    addresses = np.array([update.addresses() for update in updates], np.int64)
    _protect_gradients(updates, addresses)
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
        update.finish()


def _protect_gradients(updates: Sequence[Update], addresses: Int64Array) -> None:
    """Copy the gradients that lie in memory the step writes, such as a view of it."""
    sizes = np.array([update.sizes() for update in updates], np.int64)
    written = Ranges(addresses[:, :3].ravel(), sizes[:, :3].ravel())
    inside = written.overlap(addresses[:, 3], sizes[:, 3])
    for index in np.flatnonzero(inside).tolist():
        update = updates[index]
        update.take(update.gradient.copy(order="K"))
        addresses[index, 3] = update.address


def _square_sums(updates: Sequence[Update], threads: int) -> Float64Array:
    sums = np.empty(len(updates))
    for storage, chosen in _dense_by_storage(updates):
        addresses = np.array([updates[i].address for i in chosen], np.int64)
        lengths = np.array([updates[i].gradient.size for i in chosen], np.int64)
        sums[chosen] = kernels().dense_square_sums(storage, addresses, lengths, threads)
    for index, update in enumerate(updates):
        if isinstance(update, RowsUpdate):
            sums[index] = kernels().rows_square_sum(
                update.variable.storage,
                update.groups,
                update.address,
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


def _checked_indices(
    indices: Any, rows: int, name: str
) -> npt.NDArray[np.int32] | Int64Array:
    array = np.asarray(indices)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(
            f"the indices of the gradient of parameter {name!r} must be integers, "
            f"got {array.dtype}"
        )
    if array.ndim != 1:
        raise ValueError(
            f"the indices of the gradient of parameter {name!r} must have one dimension, "
            f"got the shape {array.shape}"
        )
    if array.dtype == np.int32 or array.dtype == np.int64:
        return array
    if array.dtype == np.uint64 and (outside := np.flatnonzero(array >= rows)).size:
        position = int(outside[0])  # int64 could not hold it
        raise IndexError(
            f"the gradient of parameter {name!r}: indices[{position}] must be in "
            f"[0, {rows}), got {array[position]}"
        )
    return array.astype(np.int64)


def _converted(array: Array, dtype: np.dtype[Any], order: Literal["C", "F"]) -> Array:
    """``array`` itself if the kernels can work on it, else a copy that they can."""
    return np.require(array, dtype, [order, "A"])


def _address(array: Array) -> int:
    return array.ctypes.data


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
