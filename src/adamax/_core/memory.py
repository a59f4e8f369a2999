"""Where the state of large parameters should lie."""

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_PERIOD = 64 * 1024  # more than what repeats in the mapping of addresses to memory banks
_STEP = 16 * 1024
LARGE = 1 << 20  # bytes; less than that stays in caches


def zeros_beside(
    address: int,
    number: int,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    order: Literal["C", "F"] = "C",
) -> npt.NDArray[Any]:
    """Zeros that are read in one pass with the memory at ``address``, as array ``number``.

    Large arrays of NumPy all begin at nearly the same place of a page. What is at the same
    place of several of them competes for the same banks of memory, and a pass over four of
    them takes up to 1.5 times as long as it must. So each begins at a place of its own.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return np.zeros(shape, dtype, order)
    room = np.zeros(size + _PERIOD, np.uint8)
    wanted = address - address % dtype.itemsize + number * _STEP
    start = (wanted - room.ctypes.data) % _PERIOD
    return room[start : start + size].view(dtype).reshape(shape, order=order)


def may_overlap_itself(array: npt.NDArray[Any]) -> bool:
    """Whether dimensions reach into each other's strides, as only as_strided makes them."""
    if array.size == 0:
        return False
    reach = array.itemsize
    for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False
