"""Adamax for Keras 3, on its TensorFlow, JAX and PyTorch back ends."""

from .optimizer import Adamax

__all__ = ["Adamax"]
