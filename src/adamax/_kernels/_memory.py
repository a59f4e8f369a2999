"""Which pieces of memory lie apart, as the kernels require."""

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from . import Int64Array


class Ranges:
    """Ranges of memory, given by their addresses and their sizes in bytes."""

    def __init__(self, addresses: Int64Array, sizes: Int64Array) -> None:
        addresses, sizes = addresses[sizes > 0], sizes[sizes > 0]
        order = np.argsort(addresses)
        self._starts = addresses[order]
        self._ends = self._starts + sizes[order]
        self._start_list, self._end_list = self._starts.tolist(), self._ends.tolist()
        self.lie_apart = not (self._ends[:-1] > self._starts[1:]).any()

    def overlap(self, addresses: Int64Array, sizes: Int64Array) -> npt.NDArray[np.bool_]:
        """Which of other ranges overlap one of these, if these lie apart."""
        # The first of these that ends behind the start of the other.
        place = np.searchsorted(self._ends, addresses, side="right")
        inside = place < len(self._ends)
        inside[inside] = self._starts[place[inside]] < (addresses + sizes)[inside]
        return inside

    def overlap_one(self, address: int, size: int) -> bool:
        """:meth:`overlap` for one range, without the cost of arrays."""
        place = bisect_right(self._end_list, address)
        return place < len(self._end_list) and self._start_list[place] < address + size
