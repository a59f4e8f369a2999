"""Whether pieces of memory lie apart."""

import numpy as np

from . import Int64Array


def overlap(starts: Int64Array, sizes: Int64Array) -> bool:
    """Whether any two of the ranges ``[start, start + size)`` of addresses overlap.

    An empty range counts as a point.
    """
    order = np.argsort(starts)
    starts = starts[order]
    ends = starts + sizes[order]
    return bool((ends[:-1] > starts[1:]).any())
