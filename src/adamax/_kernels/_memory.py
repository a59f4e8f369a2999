"""Where memory lies: which pieces overlap, and which get in each other's way."""

import math
from bisect import bisect_right
from typing import Any, Literal

import numpy.typing as npt

import numpy as np

from . import Int64Array

_PERIOD = 64 * 1024  # more than what repeats in the mapping of addresses to memory banks
_STEP = 16 * 1024
LARGE = 1 << 20  # bytes; less than that stays in caches


class Ranges:
    """Ranges of memory, given by their addresses and their sizes in bytes."""

    def __init__(self, addresses: Int64Array, sizes: Int64Array) -> None:
        addresses, sizes = addresses[sizes > 0], sizes[sizes > 0]
        order = np.argsort(addresses)
        self._ends = addresses[order] + sizes[order]
        # One more, behind the last end, that nothing reaches.
        self._starts = np.append(addresses[order], np.iinfo(np.int64).max)
        self.lie_apart = not (self._ends[:-1] > self._starts[1:-1]).any()

    def overlap(self, addresses: Int64Array, sizes: Int64Array) -> bool:
        """Whether any of other ranges overlaps one of these, if these lie apart."""
        # The first of these that ends behind the start of the other.
        place = np.searchsorted(self._ends, addresses, side="right")
        return bool((self._starts[place] < addresses + sizes).any())

    def overlap_one(self, address: int, size: int) -> bool:
        """:meth:`overlap` for one range, without making arrays."""
        return bool(self._starts[bisect_right(self._ends, address)] < address + size)


def zeros_beside(
    address: int,
    number: int,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    order: Literal["C", "F"],
) -> npt.NDArray[Any]:
    """Zeros to be read in one pass with the memory at ``address``, as array ``number``.

    Large arrays of NumPy all begin at nearly the same place of a page. What is at the same
    place of several of them competes for the same banks of memory, and a pass over four
    takes up to 1.5 times as long as it must. So each begins at a place of its own.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return np.zeros(shape, dtype, order)
    room = np.zeros(size + _PERIOD, np.uint8)
    wanted = address - address % dtype.itemsize + number * _STEP
    start = (wanted - room.ctypes.data) % _PERIOD
    return room[start : start + size].view(dtype).reshape(shape, order=order)
