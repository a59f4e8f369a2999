"""The rule on tensors of Keras: the step size, and all of it for TensorFlow."""

import math
from typing import Any

from keras import ops


def step_size(learning_rate: Any, beta_1: float, t: Any, dtype: str) -> Any:
    """``learning_rate / (1 - beta_1**t)`` on tensors, computed in ``dtype``."""
    learning_rate = ops.cast(learning_rate, dtype)
    if beta_1 == 0.0:
        return learning_rate
    return learning_rate / -ops.expm1(ops.cast(t, dtype) * math.log(beta_1))


def stepped(
    w: Any,
    m: Any,
    u: Any,
    g: Any,
    size: Any,
    decay: Any,
    one_minus_beta_1: Any,
    beta_2: Any,
    epsilon: Any,
) -> tuple[Any, Any, Any]:
    """New values of ``w``, ``m`` and ``u``; all arithmetic is in the dtype of ``m``."""
    wide, g = ops.cast(w, m.dtype), ops.cast(g, m.dtype)
    m = m + one_minus_beta_1 * (g - m)
    u = _maximum(beta_2 * u, ops.abs(g))
    wide = decay * wide - size * (m / (u + epsilon))
    return ops.cast(wide, w.dtype), m, u


def _maximum(a: Any, b: Any) -> Any:
    """The larger, NaN if either is: TensorFlow's XLA returns the other one."""
    return ops.where(ops.logical_or(ops.greater(a, b), ops.isnan(a)), a, b)
