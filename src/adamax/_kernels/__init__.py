"""The arithmetic of Adamax: what every implementation must offer, and which one is used.

The verbs take memory addresses, so that one launch serves any number of arrays of any
front end. The caller keeps the memory alive and has checked it: contiguous, aligned, of
the native byte order, writable where it is written, and no gradient overlapping anything
that is written. Nothing is allocated in proportion to a parameter.

``dense_step(storage, addresses, lengths, factors, coefficients, threads)``
    One step of the rule on ``n`` arrays. ``addresses``: int64 ``(n, 4)``, of ``w``,
    ``m``, ``u`` and ``g``. ``lengths``: int64 ``(n,)``, in elements. ``factors``: float64
    ``(n, 4)``, see :class:`Factor`.
``dense_square_sums(storage, addresses, lengths, threads)``
    The sum of squares of each of ``n`` gradients, as float64 ``(n,)``, the same for any
    number of threads. ``addresses`` and ``lengths``: int64 ``(n,)``.
``group_rows(indices, rows)``
    The distinct rows of a 1-D int32 or int64 array and where each occurs, in a form that
    only the same implementation understands. Raises ``IndexError`` for an index outside
    ``[0, rows)``. The number of distinct rows is not known at this point.
``rows_step(storage, groups, addresses, row_length, factors, coefficients, threads)``
    One step of the rule on the rows in ``groups``. ``addresses``: int64 ``(4,)``, of ``w``,
    ``m``, ``u`` and of the gradient's values, one row of ``row_length`` elements for each
    index that was grouped. ``factors``: float64
    ``(4,)``.
``rows_square_sum(storage, groups, address, row_length, threads)``
    The sum of squares of the summed gradient, as a float.

``catch_up_rows(storage, groups, addresses, row_length, history, now, epsilon, threads)``
    Bring the rows in ``groups`` to the end of the ``history`` of their table, as step
    ``now``; returns how many were behind. ``addresses``: int64 ``(5,)``, of ``w``, ``m``,
    ``u``, of the rows' stamps and of where to put a copy of ``w``, one row for each index
    that was grouped, or 0 for none. Stamps are uint32, one for each row of the table: the
    step that it is up to date with, modulo ``2**32``.
``catch_up_table(storage, rows, addresses, row_length, history, now, epsilon, threads)``
    The same for a range of rows, ``(start, stop)``. ``addresses``: int64 ``(4,)``.
``find_behind(groups, stamps, now)``
    A row in ``groups`` whose stamp at the address ``stamps`` is not ``now``, or -1.
``stamp_rows(groups, stamps, now)``
    Set the stamps of the rows in ``groups``.

``advance(storage, addresses)``
    Add 1 to each of ``n`` step counters of float32 or float64 at int64 addresses ``(n,)``
    and return the new values, as float64 ``(n,)``.

``array_address(array)``
    Where the elements of a NumPy array begin.
``array_layouts(arrays)``, ``find_arrays(like, arrays, writeable=...)``
    What the latter compares with, and where the elements of ``n`` arrays begin, as int64
    ``(n,)``; or None unless each is a ``np.ndarray`` of the same dtype, shape and strides
    as the one that ``like`` has the layout of, aligned, and writeable if it should be.

``w`` and ``g`` are of the given :class:`Storage`, ``m`` and ``u`` and all arithmetic of
:func:`state_dtype` of it.
"""

import enum
import functools
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

import numpy as np
from adamax._exact import History
from adamax._rule import Coefficients

from ._threads import get_num_threads, set_num_threads

__all__ = [
    "Factor",
    "Kernels",
    "Storage",
    "get_num_threads",
    "kernels",
    "set_num_threads",
    "state_dtype",
]

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Storage(enum.Enum):
    """How the elements of a parameter and its gradient are stored."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @classmethod
    def of(cls, dtype: object) -> "Storage | None":
        """The storage of a dtype of NumPy (``ml_dtypes`` included), None for any other."""
        return _STORAGE_OF_NAME.get(str(dtype))

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self]


_STORAGE_OF_NAME = {storage.value: storage for storage in Storage}
_ITEMSIZE = {
    Storage.FLOAT32: 4,
    Storage.FLOAT64: 8,
    Storage.FLOAT16: 2,
    Storage.BFLOAT16: 2,
}


def state_dtype(storage: Storage) -> np.dtype[np.float32] | np.dtype[np.float64]:
    """The dtype of ``m``, ``u`` and the arithmetic: at least float32."""
    if storage is Storage.FLOAT64:
        return np.dtype(np.float64)
    return np.dtype(np.float32)


class Factor(enum.IntEnum):
    """The columns of ``factors``, what may differ between the arrays of one launch."""

    STEP_SIZE = 0  # learning rate / (1 - beta_1**t)
    DECAY = 1  # what w is multiplied by
    SCALE = 2  # what g is multiplied by, before it is clamped
    COUPLED_DECAY = 3  # what part of w is then added to g (L2 regularisation)


class RowGroups(Protocol):
    """Grouped indices; opaque to everything but the implementation that made them."""


class ArrayLayouts(Protocol):
    """Layouts of arrays; opaque to everything but the implementation that made them."""


class Kernels(Protocol):
    """The verbs; their meaning is in the docstring of this module."""

    def dense_step(
        self,
        storage: Storage,
        addresses: Int64Array,
        lengths: Int64Array,
        factors: Float64Array,
        coefficients: Coefficients,
        threads: int,
    ) -> None: ...

    def dense_square_sums(
        self, storage: Storage, addresses: Int64Array, lengths: Int64Array, threads: int
    ) -> Float64Array: ...

    def group_rows(
        self, indices: npt.NDArray[np.int32] | Int64Array, rows: int
    ) -> RowGroups: ...

    def rows_step(
        self,
        storage: Storage,
        groups: RowGroups,
        addresses: Int64Array,
        row_length: int,
        factors: Float64Array,
        coefficients: Coefficients,
        threads: int,
    ) -> None: ...

    def rows_square_sum(
        self,
        storage: Storage,
        groups: RowGroups,
        address: int,
        row_length: int,
        threads: int,
    ) -> float: ...

    def catch_up_rows(
        self,
        storage: Storage,
        groups: RowGroups,
        addresses: Int64Array,
        row_length: int,
        history: History,
        now: int,
        epsilon: float,
        threads: int,
    ) -> int: ...

    def catch_up_table(
        self,
        storage: Storage,
        rows: tuple[int, int],
        addresses: Int64Array,
        row_length: int,
        history: History,
        now: int,
        epsilon: float,
        threads: int,
    ) -> int: ...

    def find_behind(self, groups: RowGroups, stamps: int, now: int) -> int: ...

    def stamp_rows(self, groups: RowGroups, stamps: int, now: int) -> None: ...

    def advance(self, storage: Storage, addresses: Int64Array) -> Float64Array: ...

    def array_address(self, array: npt.NDArray[Any]) -> int: ...

    def array_layouts(self, arrays: Sequence[npt.NDArray[Any]]) -> ArrayLayouts: ...

    def find_arrays(
        self, like: ArrayLayouts, arrays: Sequence[npt.NDArray[Any]], *, writeable: bool
    ) -> Int64Array | None: ...


@functools.cache
def kernels() -> Kernels:
    """The fastest implementation for the CPU, loaded when it is first needed.

    That is Numba's, unless the user has switched compilation off (``NUMBA_DISABLE_JIT``).
    """
    import numba

    switched_off = bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]
    name = "_reference" if switched_off else "_cpu"
    implementation: Any = importlib.import_module(f"adamax._kernels.{name}")
    verbs: Kernels = implementation
    return verbs
