"""Adamax for PyTorch: dense and sparse gradients in one optimizer, with fused kernels."""

from .attach import Attachment
from .clip import clip_grad_norm_, clip_grad_value_
from .optimizer import Adamax

__all__ = ["Adamax", "Attachment", "clip_grad_norm_", "clip_grad_value_"]
