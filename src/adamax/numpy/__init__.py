"""Adamax for NumPy arrays, which it updates in place."""

from .gradients import IndexedSlices
from .optimizer import Adamax

__all__ = ["Adamax", "IndexedSlices"]
