"""One step on one parameter, for JAX: the rule in operations of JAX, and in one pass.

The pass is a primitive each for whole arrays and for rows; see ``_jax_primitives.py``.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp

import jax
import numpy as np

from ._jax_primitives import primitive
from ._jax_rows import IndexedSlices, put_rows, sum_repeats, table_rows
from ._kernels import Storage

Three: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def state_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of ``mu``, ``nu`` and the arithmetic: at least float32."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


def moments(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, one_minus_b1: Any, b2: Any, eps: Any
) -> Three:
    """The rule up to the step size: ``mu / (nu + eps)``, and the new ``mu`` and ``nu``."""
    dtype = state_dtype(mu.dtype)
    gradient, mu = gradient.astype(dtype), mu.astype(dtype)
    mu = mu + one_minus_b1 * (gradient - mu)
    # The maximum of JAX hands on a NaN of either. optax has a complex norm for a complex
    # parameter.
    norm = jnp.maximum(b2 * nu.real.astype(mu.real.dtype), abs(gradient))
    return mu / (norm + eps), mu, norm.astype(dtype)


def stepped(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """The rule in operations of JAX; see :func:`step_array`."""
    step_size, decay, one_minus_b1, b2, eps = (scalars[i] for i in range(5))
    ratio, mu, nu = moments(gradient, mu, nu, one_minus_b1, b2, eps)
    wide = decay * param.astype(ratio.dtype) - step_size * ratio
    return wide.astype(param.dtype), mu, nu


def _stepped_rows(
    param: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    indices: jax.Array,
    values: jax.Array,
    scalars: jax.Array,
) -> Three:
    rows = sum_repeats(IndexedSlices(values, indices), len(param))
    tables = param, mu, nu
    of_rows = [table_rows(table, rows) for table in tables]
    new = stepped(of_rows[0], of_rows[1], of_rows[2], rows.values, scalars)
    param, mu, nu = (
        put_rows(table, rows, values) for table, values in zip(tables, new, strict=True)
    )
    return param, mu, nu


def step_array(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """The parameter and its state after a step, of a gradient of its shape.

    ``scalars``: the step size, what the parameter is multiplied by, ``1 - b1``, ``b2`` and
    ``eps``, of the real dtype of the state.
    """
    if _fits(param, mu, nu, gradient):
        return tuple(_array_p.bind(param, mu, nu, gradient, scalars))
    return stepped(param, mu, nu, gradient, scalars)


def step_rows(
    param: jax.Array, mu: jax.Array, nu: jax.Array, rows: IndexedSlices, scalars: jax.Array
) -> Three:
    """The same of a gradient of rows, whose indices are int32."""
    if _fits(param, mu, nu, rows.values):
        return tuple(_rows_p.bind(param, mu, nu, rows.indices, rows.values, scalars))
    return _stepped_rows(param, mu, nu, rows.indices, rows.values, scalars)


def _fits(param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> bool:
    """Whether there are kernels for these dtypes."""
    return (
        Storage.of(param.dtype) is not None
        and gradient.dtype == param.dtype
        and mu.dtype == nu.dtype == state_dtype(param.dtype)
    )


_array_p = primitive("dense", stepped)
_rows_p = primitive("rows", _stepped_rows)
