"""What optax and JAX do with gradients, for gradients of rows among them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._compat import is_varying
from .rows import (
    IndexedSlices,
    NotAnArray,
    PyTree,
    check_rows,
    is_gradient,
    is_slices,
    sum_repeats,
    table_rows,
)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters with the updates added, those of rows too.

    As :func:`optax.apply_updates`, which does the same for updates of rows; here an update
    of None leaves its parameter alone. To change large tables in place, call it in a jitted
    function that the parameters are donated to.

    Args:
        params: a pytree of arrays.
        updates: a pytree of the same structure, where a leaf may be None or an
            :class:`IndexedSlices`.

    >>> import jax.numpy as jnp
    >>> apply_updates(jnp.zeros(3), IndexedSlices(jnp.ones(2), jnp.array([0, 2])))
    Array([1., 0., 1.], dtype=float32)
    """

    def added(param: Any, update: Any) -> Any:
        if param is None or update is None:
            return param
        param = jnp.asarray(param)
        return (param + update).astype(param.dtype)

    return jax.tree.map(added, params, updates, is_leaf=lambda node: node is None)


def on_rows(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Have a transformation of optax see the rows of an :class:`IndexedSlices`.

    In place of each gradient of rows, ``inner`` is given the values, after repeats have
    been summed, and in place of its parameter the rows of it. So a norm is that of the
    summed gradient. Gradients of whole arrays are passed on as they are.

    Args:
        inner: any transformation whose state does not have the shapes of the parameters:
            clipping, scaling, weight decay, schedules. It comes before :func:`adamax` in a
            chain; where that has ``sparse="exact"``, it cannot look at parameters.

    >>> import jax.numpy as jnp, optax
    >>> gradients = {"table": IndexedSlices(jnp.array([[3.0], [1.0]]), jnp.array([7, 7]))}
    >>> clip = on_rows(optax.clip_by_global_norm(1.0))
    >>> params = {"table": jnp.zeros((10, 1))}
    >>> clipped, _ = clip.update(gradients, clip.init(params), params)
    >>> (params["table"] + clipped["table"])[7]
    Array([1.], dtype=float32)
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        structure: Any
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_gradient)
        tables = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        summed = [_summed(*pair) for pair in zip(leaves, tables, strict=True)]
        if params is not None:
            params = structure.unflatten(
                _rows_of(table, rows) for table, rows in zip(tables, summed, strict=True)
            )
        values = structure.unflatten(map(_values, summed))
        updates, state = inner.update(values, state, params, **extra_args)
        changed = structure.flatten_up_to(updates)
        return structure.unflatten(
            replace(rows, values=new) if is_slices(rows) else new
            for new, rows in zip(changed, summed, strict=True)
        ), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def global_norm(gradients: PyTree) -> jax.Array:
    """:func:`optax.global_norm`, where repeated rows are summed first.

    >>> import jax.numpy as jnp
    >>> table = IndexedSlices(jnp.array([[1.0], [2.0]]), jnp.array([7, 7]))
    >>> global_norm({"table": table, "weights": jnp.array([4.0])})
    Array(5., dtype=float32)
    """
    values = jax.tree.map(lambda g: _values(_summed(g)), gradients, is_leaf=is_slices)
    norm: jax.Array = optax.tree.norm(values)
    return norm


def psum(gradients: PyTree, axis_name: Any) -> PyTree:
    """:func:`jax.lax.psum`, the sum over all devices along an axis.

    Arrays are summed. Of an :class:`IndexedSlices`, the rows of all devices are gathered.
    For the mean, divide by ``jax.lax.axis_size(axis_name)``.

    Args:
        gradients: a pytree of arrays and of :class:`IndexedSlices`.
        axis_name: of a mesh in ``jax.shard_map``, or of ``jax.vmap``.

    >>> import jax, jax.numpy as jnp
    >>> gradients = IndexedSlices(jnp.ones((2, 3, 1)), jnp.array([[1, 2, 3], [3, 4, 5]]))
    >>> summed = jax.vmap(lambda g: psum(g, "devices"), axis_name="devices")(gradients)
    >>> summed.indices[0]
    Array([1, 2, 3, 3, 4, 5], dtype=int32)
    """

    def gathered(array: jax.Array) -> jax.Array:
        to = "invarying" if is_varying(array, axis_name) else "varying"
        return jax.lax.all_gather(array, axis_name, tiled=True, to=to)

    def summed(gradient: Any) -> Any:
        if not is_slices(gradient):
            return jax.lax.psum(gradient, axis_name)
        values, indices = gathered(gradient.values), gathered(gradient.indices)
        return IndexedSlices(values, indices, current=gradient.current)

    return jax.tree.map(summed, gradients, is_leaf=is_slices)


class _StaleParameter(NotAnArray):
    """In place of rows of a table that may be stale."""

    def advice(self) -> str:
        return (
            "a transformation in on_rows() that looks at parameters cannot be used before "
            "exact updates, since their rows in the table may be stale (adamax() has a "
            "weight_decay of its own)"
        )


def _rows_of(table: Any, rows: Any) -> Any:
    if not is_slices(rows):
        return table
    return _StaleParameter() if rows.current else table_rows(table, rows)


def _values(gradient: Any) -> Any:
    return gradient.values if is_slices(gradient) else gradient


def _summed(gradient: Any, table: Any = None) -> Any:
    if not is_slices(gradient):
        return gradient
    # Without the table: as if it had as many rows as there can be.
    rows = np.iinfo(np.int32).max - len(gradient.values) if table is None else len(table)
    if table is not None:
        check_rows(gradient, table, "a gradient of rows")
    return sum_repeats(gradient, rows)
