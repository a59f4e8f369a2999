"""The rule on one parameter, in operations of JAX and as primitives.

``_core/rule.py`` has the formulas. The scalars of a step are an array of the real dtype of
the state: the step size ``lr_t / (1 - beta_1**t)``, the factor of the parameter,
``1 - beta_1``, ``beta_2`` and epsilon. With a factor of ``-lr_t * weight_decay`` the result
is not the new parameter but what is to be added to it, an update of optax.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._core.rule import rounded
from .primitives import FLOATS, primitive
from .rows import IndexedSlices, put_rows, sum_repeats, table_rows

Three: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def state_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of ``mu``, ``nu`` and the arithmetic: at least float32."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


def quotient(m: jax.Array, denominator: jax.Array) -> jax.Array:
    """``m / denominator``, or 0 where the latter is 0; NaN comes through."""
    is_zero = denominator == 0
    # The inner one keeps the NaN of 0 / 0 out of derivatives.
    return jnp.where(is_zero, 0 * m, m / jnp.where(is_zero, 1, denominator))


def stepped(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """The parameter and its state after a step.

    The dtype of ``mu`` is that of the arithmetic. The norm of a complex parameter is
    complex, as in optax.
    """
    step_size, factor, one_minus_b1, b2, eps = (scalars[i] for i in range(5))
    gradient, wide = gradient.astype(mu.dtype), param.astype(mu.dtype)
    mu = mu + one_minus_b1 * (gradient - mu)
    # The maximum of JAX hands on a NaN of either.
    norm = jnp.maximum(b2 * nu.real.astype(mu.real.dtype), abs(gradient))
    wide = factor * wide - step_size * quotient(mu, norm + eps)
    return wide.astype(param.dtype), mu, norm.astype(mu.dtype)


def updated_rows(
    param: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    slices: IndexedSlices,
    scalars: jax.Array,
) -> tuple[IndexedSlices, jax.Array, jax.Array]:
    """The touched rows of a parameter after a step, and its state.

    A ``param`` without axes stands for all of its rows.
    """
    rows = sum_repeats(slices, len(mu))
    before = table_rows(param, rows) if param.ndim else param
    of_state = table_rows(mu, rows), table_rows(nu, rows)
    after, mu_rows, nu_rows = stepped(before, *of_state, rows.values, scalars)
    mu, nu = put_rows(mu, rows, mu_rows), put_rows(nu, rows, nu_rows)
    return replace(rows, values=after), mu, nu


def _stepped_rows(*operands: jax.Array) -> Three:
    param, mu, nu, indices, values, scalars = operands
    rows, mu, nu = updated_rows(param, mu, nu, IndexedSlices(values, indices), scalars)
    return put_rows(param, rows, rows.values), mu, nu


_dense_p = primitive("dense", stepped, in_place=3)
_rows_p = primitive("rows", _stepped_rows, in_place=3)


def step_array(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """:func:`stepped` for a gradient of the whole parameter, in one pass if possible."""
    operands = param, mu, nu, gradient, scalars
    return tuple((_dense_p.bind if _fit(*operands[:4]) else stepped)(*operands))


def step_rows(
    param: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    slices: IndexedSlices,
    scalars: jax.Array,
) -> Three:
    """The same for a gradient of rows."""
    operands = param, mu, nu, slices.indices, slices.values, scalars
    fit = _fit(param, mu, nu, slices.values)
    return tuple((_rows_p.bind if fit else _stepped_rows)(*operands))


def _fit(param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> bool:
    """Whether there are verbs for these dtypes."""
    of_state = {mu.dtype, nu.dtype}
    return {param.dtype, gradient.dtype} <= FLOATS and of_state == {
        state_dtype(param.dtype)
    }


# --- Scalars -----------------------------------------------------------------------------


@dataclass(frozen=True)
class StepScalars:
    """The numbers of a step, floats or arrays of JAX; ``count`` is the 1-based step."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    count: jax.Array

    def decay_rate(self, dtype: Any) -> Any:
        """What part of a parameter decay takes away."""
        return _scalar(self.learning_rate, dtype) * _scalar(self.weight_decay, dtype)

    def array(self, dtype: Any, decays: bool, as_update: bool = False) -> jax.Array:
        """As the functions above take them, for a state of ``dtype``."""
        dtype = jnp.finfo(dtype).dtype
        factor = (0.0 if as_update else 1.0) - (self.decay_rate(dtype) if decays else 0.0)
        one_minus_b1 = 1.0 - _scalar(self.b1, dtype)
        return stacked(
            dtype, self._step_size(dtype), factor, one_minus_b1, self.b2, self.eps
        )

    def _step_size(self, dtype: Any) -> jax.Array:
        """``lr_t / (1 - beta_1**t)``; a finite number stays finite, as in other kernels."""
        # 1 - beta_1**t, exact also where beta_1**t is close to 1.
        if isinstance(self.b1, float):
            logarithm: Any = math.log(self.b1) if self.b1 else -math.inf
        else:
            logarithm = jnp.log1p(self.b1.astype(dtype) - 1)  # the difference is exact
        correction = -jnp.expm1(self.count.astype(dtype) * logarithm)
        if not isinstance(self.learning_rate, float):
            return self.learning_rate.astype(dtype) / correction
        largest = jnp.finfo(dtype).max
        return jnp.clip(rounded(self.learning_rate, dtype) / correction, -largest, largest)


def stacked(dtype: Any, *scalars: Any) -> jax.Array:
    """Numbers as an array."""
    return jnp.stack([jnp.asarray(scalar, dtype) for scalar in scalars])


def _scalar(number: Any, dtype: Any) -> Any:
    """A number that does not change the dtype of what it is combined with."""
    return number if isinstance(number, float) else number.astype(dtype)
