"""Gradients of the rows that a loss looks up."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from ._compat import trace_state
from .exact import is_current
from .rows import IndexedSlices, PyTree, known_rows


@dataclass
class _Lookups:
    """What :func:`lookup` reads while a loss is traced."""

    tables: Sequence[Any]
    taps: Sequence[jax.Array] | None = None
    place: Any = field(default_factory=trace_state)  # where the loss begins
    found: list[int] = field(default_factory=list)  # which of the tables
    shapes: list[jax.ShapeDtypeStruct] = field(default_factory=list)  # of the rows
    indices: list[jax.Array] = field(default_factory=list)


class _Tracing(threading.local):
    lookups: _Lookups | None = None


_tracing = _Tracing()


@contextmanager
def _recording(lookups: _Lookups) -> Iterator[None]:
    before, _tracing.lookups = _tracing.lookups, lookups
    try:
        yield
    finally:
        _tracing.lookups = before


def lookup(table: jax.Array, indices: Any) -> jax.Array:
    """The rows of ``table`` at ``indices``: ``(*indices.shape, *table.shape[1:])``.

    In a loss that :func:`value_and_sparse_grad` differentiates, the gradient of the table
    becomes an :class:`IndexedSlices` of these rows. Elsewhere this is an ordinary gather.
    An index outside ``[0, len(table))``, negative ones included, gives a row of zeros, and
    its gradient is dropped, so that ``-1`` can stand for padding.

    Args:
        table: the parameter itself, with at least one axis; or, where some rows are stale,
            what :meth:`Adamax.current` has in its place.
        indices: integers, of any shape.

    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: in :func:`value_and_sparse_grad`, ``table`` is not one of the parameters
            but was computed from one, or passed through a transformation of JAX; or this is
            called in such a transformation (``jax.vmap``, ``jax.lax.scan``).

    >>> import jax.numpy as jnp
    >>> lookup(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, -1]))
    Array([[3., 4.],
           [0., 0.]], dtype=float32)
    """
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    lookups = _tracing.lookups
    if lookups is None:
        return _gathered(table, indices)
    arrays = map(_array, lookups.tables)
    number = next((i for i, array in enumerate(arrays) if array is _array(table)), None)
    if number is None:
        raise ValueError(
            f"the table of lookup() must be one of the parameters as they were passed to "
            f"the loss, got another array of shape {jnp.shape(_array(table))}: look rows "
            f"up outside of jax.jit, jax.checkpoint and the like, and convert the rows "
            f"instead of the table"
        )
    if isinstance(indices, jax.core.Tracer) and lookups.place != trace_state():
        raise ValueError(
            "lookup() in a transformation of JAX that is in the loss (jax.vmap, "
            "jax.lax.scan, jax.lax.map, jax.lax.cond) cannot tell its indices: look up the "
            "rows of the whole batch before, and pass them in"
        )
    lookups.found.append(number)
    lookups.indices.append(indices)
    if lookups.taps is None:
        shape = (*indices.shape, *table.shape[1:])
        lookups.shapes.append(jax.eval_shape(lambda: jnp.zeros(shape, table.dtype)))
        return jnp.zeros(shape, table.dtype)
    return _tapped(_gathered(table, indices), lookups.taps[len(lookups.found) - 1])


def _gathered(table: Any, indices: jax.Array) -> jax.Array:
    indices = known_rows(indices, len(table))
    if is_current(table):
        rows: jax.Array = table.rows(indices)
        return rows
    return jnp.asarray(table).at[indices].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _tapped(rows: jax.Array, tap: jax.Array) -> jax.Array:
    """``rows``, with the gradient going to ``tap``, which is never read."""
    return rows


_tapped.defvjp(lambda rows, tap: (rows, None), lambda _, gradient: (None, gradient))


def value_and_sparse_grad(
    loss: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """As :func:`jax.value_and_grad` for the first argument, with gradients of rows.

    The gradient of a parameter that ``loss`` reads with :func:`lookup` is an
    :class:`IndexedSlices` of all rows it looked up, and nothing of the table's size is
    computed. So is the gradient of a table from :meth:`Adamax.current`, also where no row
    was looked up. All other gradients are as usual. Use it inside ``jax.jit``, since it
    traces the loss twice.

    Args:
        loss: a function of a pytree of parameters, and more, that returns a scalar, or a
            pair of that and anything else if ``has_aux``.
        has_aux: as in :func:`jax.value_and_grad`.

    Returns:
        A function with the arguments of ``loss`` that returns its result and the gradients.

    Raises:
        ValueError: a table is also read in another way than with :func:`lookup`, so that
            its gradient is not one of some rows.

    >>> import jax.numpy as jnp
    >>> def loss(params, ids):
    ...     return (lookup(params["table"], ids) @ params["weights"]).sum()
    >>> params = {"table": jnp.ones((1000, 2)), "weights": jnp.array([1.0, 2.0])}
    >>> value, gradients = value_and_sparse_grad(loss)(params, jnp.array([7, 7, 3]))
    >>> value, gradients["weights"]
    (Array(9., dtype=float32), Array([3., 3.], dtype=float32))
    >>> gradients["table"].indices
    Array([7, 7, 3], dtype=int32)
    """

    @functools.wraps(loss)
    def value_and_gradients(
        params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        structure: Any
        leaves, structure = jax.tree.flatten(params, is_leaf=is_current)
        leaves = [leaf if is_current(leaf) else jnp.asarray(leaf) for leaf in leaves]

        def called(leaves: Sequence[Any], lookups: _Lookups) -> Any:
            with _recording(lookups):
                return loss(structure.unflatten(leaves), *args, **kwargs)

        found, shapes = _find_lookups(called, leaves)
        of_rows_alone = {*found, *(i for i, leaf in enumerate(leaves) if is_current(leaf))}
        dense = {i: leaf for i, leaf in enumerate(leaves) if i not in of_rows_alone}

        def tapped(dense: dict[int, Any], taps: Sequence[jax.Array]) -> Any:
            # New objects, since one array may be in the tree twice.
            again = [dense.get(i, leaf) for i, leaf in enumerate(_renewed(leaves))]
            lookups = _Lookups(again, taps)
            value = called(again, lookups)
            value, aux = value if has_aux else (value, None)
            return value, (aux, lookups.indices)

        taps = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        differentiated = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
        (value, (aux, indices)), (gradients, of_rows) = differentiated(dense, taps)
        for number in of_rows_alone:
            gradients[number] = _joined(
                leaves[number],
                [
                    (ids, rows)
                    for place, ids, rows in zip(found, indices, of_rows, strict=True)
                    if place == number
                ],
            )
        ordered = structure.unflatten(gradients[i] for i in range(len(leaves)))
        return ((value, aux) if has_aux else value), ordered

    return value_and_gradients


def _array(table: Any) -> Any:
    """What a table is recognised by, since frameworks make new nodes of a tree."""
    return table.table if is_current(table) else table


def _renewed(leaves: Sequence[Any]) -> list[Any]:
    arrays = (jax.lax.stop_gradient(_array(leaf)) for leaf in leaves)
    return [
        replace(leaf, table=array) if is_current(leaf) else array
        for leaf, array in zip(leaves, arrays, strict=True)
    ]


def _find_lookups(
    called: Callable[[Sequence[Any], _Lookups], Any], leaves: Sequence[Any]
) -> tuple[list[int], list[jax.ShapeDtypeStruct]]:
    """Which of the leaves each lookup is of, and the shapes of what it reads."""
    seen: list[_Lookups] = []

    def trace(leaves: Sequence[Any]) -> Any:
        seen.append(_Lookups(leaves))
        return called(leaves, seen[-1])

    jaxpr = jax.make_jaxpr(trace)(list(leaves)).jaxpr
    lookups = seen[-1]
    # The lookups of this pass do not read the tables.
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    used |= {id(v) for v in jaxpr.outvars}
    # An exact table is several inputs, the table itself the first of them.
    first = [0, *itertools.accumulate(len(jax.tree.leaves(leaf)) for leaf in leaves)]
    for number, leaf in enumerate(leaves):
        inputs = jaxpr.invars[first[number] : first[number + 1]]
        if used.isdisjoint(map(id, inputs)):
            continue
        if is_current(leaf):
            raise ValueError(f"the loss reads parts of an exact table: {leaf.advice()}")
        if number in lookups.found:
            raise ValueError(
                f"the table of shape {leaf.shape} is read with lookup() and also in "
                f"another way, so that its gradient is not one of some rows; use "
                f"jax.value_and_grad"
            )
    return lookups.found, lookups.shapes


def _joined(table: Any, parts: Sequence[tuple[jax.Array, jax.Array]]) -> IndexedSlices:
    of_row = table.shape[1:]
    if not parts:
        parts = [(jnp.zeros(0, jnp.int32), jnp.zeros((0, *of_row), table.dtype))]
    indices = [indices.reshape(-1) for indices, _ in parts]
    values = [rows.reshape(-1, *of_row) for _, rows in parts]
    if len(parts) > 1:
        indices, values = [jnp.concatenate(indices)], [jnp.concatenate(values)]
    return IndexedSlices(values[0], indices[0], current=is_current(table))
