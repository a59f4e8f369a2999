"""The scalars of a step on tensors of Keras, and the rule in its operations.

``_core/rule.py`` has the formulas.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from .._core.rule import Hyperparameters, decay_factor


def step_scalars(
    hyperparameters: Hyperparameters,
    learning_rate: Any,
    weight_decay: float,
    t: Any,
    dtype: str,
) -> tuple[Any, Any, float, float, float]:
    """What :func:`stepped` takes besides memory, computed in ``dtype``.

    That is the step size ``learning_rate / (1 - beta_1**t)``, the decay factor,
    ``1 - beta_1``, ``beta_2`` and ``epsilon``. Infinity would make NaN of a gradient of
    zero, so that numbers end at the largest of ``dtype``.
    """
    h, largest = hyperparameters, float(np.finfo(dtype).max)
    learning_rate = ops.minimum(ops.cast(learning_rate, dtype), largest)
    size = learning_rate
    if h.beta_1 != 0.0:
        bias = -ops.expm1(ops.cast(t, dtype) * math.log(h.beta_1))
        size = ops.minimum(learning_rate / bias, largest)
    decay = decay_factor(learning_rate, weight_decay)
    return size, decay, 1.0 - h.beta_1, h.beta_2, h.epsilon


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
    wide = decay * wide - size * _quotient(m, u + epsilon)
    return ops.cast(wide, w.dtype), m, u


def _maximum(a: Any, b: Any) -> Any:
    """The larger, NaN if either is: TensorFlow's XLA returns the other one."""
    return ops.where(ops.logical_or(ops.greater(a, b), ops.isnan(a)), a, b)


def _quotient(m: Any, denominator: Any) -> Any:
    """``m / denominator``, or 0 where the latter is 0; NaN comes through."""
    return ops.where(ops.equal(denominator, 0), 0 * m, m / denominator)
