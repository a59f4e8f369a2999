"""Adamax, dense and sparse, at the speed of memory.

``adamax.Adamax`` updates NumPy arrays in place. Importing this package imports no
framework.
"""

from ._core.threads import get_num_threads, set_num_threads
from .numpy import Adamax, IndexedSlices

__all__ = ["Adamax", "IndexedSlices", "get_num_threads", "set_num_threads"]

__version__ = "0.1.0"
