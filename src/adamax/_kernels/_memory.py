"""Which pieces of memory lie apart, as the kernels require."""

import numpy as np
import numpy.typing as npt

from . import Int64Array


def overlaps(
    written: Int64Array, written_bytes: Int64Array, read: Int64Array, read_bytes: Int64Array
) -> tuple[bool, npt.NDArray[np.bool_]]:
    """Whether any two written ranges overlap, and which read ones overlap a written one.

    Ranges are given by their addresses and sizes. What is said of the read ones holds if
    the written ones lie apart.
    """
    order = np.argsort(written)
    starts = written[order]
    ends = starts + written_bytes[order]
    # The first written range that ends behind the start of a read one.
    place = np.searchsorted(ends, read, side="right")
    inside = place < len(starts)
    inside[inside] = starts[place[inside]] < (read + read_bytes)[inside]
    return bool((ends[:-1] > starts[1:]).any()), inside
