"""Gradients of some rows of a table, for JAX: the type, and how to get and use them."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import optax

PyTree: TypeAlias = Any

_MOST_ROWS = np.iinfo(np.int32).max


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "indices"),
    meta_fields=("distinct",),
)
@dataclass(frozen=True, eq=False)
class IndexedSlices:
    """Gradients, or updates, of some rows of a table: a node of a pytree, for ``jax.jit``.

    Row ``indices[i]`` of the table has ``values[i]``; where an index repeats, its values
    are summed. Rows whose index is absent are not touched. An index outside ``[0, rows of
    the table)``, negative ones included, is of no row: its values are dropped.

    Adding one to an array adds its values to the rows, so that :func:`optax.apply_updates`
    takes updates of this kind; in a jitted function that owns the array
    (``donate_argnums``) this happens in place.

    Both fields are leaves of the pytree. A transformation of optax that works on leaves
    (``optax.clip_by_global_norm``, say) would treat indices as numbers: wrap it in
    :func:`on_rows`.

    Args:
        values: shape ``(n, ...)``, of the rows.
        indices: shape ``(n,)``, integers, in any order.
        distinct: promises that ``indices`` are strictly ascending, so that nothing has to
            be summed. :func:`sum_repeats` returns such.

    >>> import jax.numpy as jnp
    >>> table = jnp.zeros((5, 2))
    >>> gradient = IndexedSlices(jnp.ones((3, 2)), jnp.array([4, 1, 4]))
    >>> (table + gradient)[:, 0]
    Array([0., 1., 0., 0., 2.], dtype=float32)
    """

    values: Any
    indices: Any
    distinct: bool = field(default=False, kw_only=True)

    # So that NumPy leaves the sum to the method below.
    __array_ufunc__ = None

    def __radd__(self, table: Any) -> jax.Array:
        if not isinstance(table, jax.Array | np.ndarray):
            return NotImplemented
        table = jnp.asarray(table)
        check_rows(self, table, "the updates")
        if jnp.finfo(table.dtype).bits < 32:
            # One rounding for each element, hence repeats are summed first.
            rows = sum_repeats(self, len(table))
            wide = table_rows(table, rows).astype(jnp.float32) + rows.values
            return put_rows(table, rows, wide.astype(table.dtype))
        indices = known_rows(self.indices, len(table))
        return table.at[indices].add(
            jnp.asarray(self.values).astype(table.dtype),
            mode="drop",
            indices_are_sorted=self.distinct,
            unique_indices=self.distinct,
        )


def is_slices(node: object) -> bool:
    return isinstance(node, IndexedSlices)


def like_given(given: Any, new: Any) -> Any:
    """``new`` without the promise to be distinct, unless that was ``given``."""
    return replace(new, distinct=given.distinct) if is_slices(given) else new


def is_gradient(node: object) -> bool:
    """Whether a node of a tree of gradients, None included, belongs to one parameter."""
    return node is None or is_slices(node)


def check_rows(slices: IndexedSlices, table: Any, name: str) -> None:
    """Raise unless ``slices`` can be of rows of ``table``."""
    values, indices = jnp.asarray(slices.values), jnp.asarray(slices.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"indices of {name} must be integers, got {indices.dtype}; wrap a "
            f"transformation that is applied to gradients of rows in adamax.jax.on_rows"
        )
    if indices.ndim != 1:
        raise ValueError(f"indices of {name} must have one axis, got {indices.shape}")
    if table.ndim == 0:
        raise ValueError(f"the parameter of {name} has no rows, its shape is ()")
    expected = (*indices.shape, *table.shape[1:])
    if values.shape != expected:
        raise ValueError(
            f"values of {name} must have the shape {expected} for {indices.shape[0]} "
            f"indices and a table of shape {table.shape}, got {values.shape}"
        )


def sum_repeats(slices: IndexedSlices, rows: int) -> IndexedSlices:
    """The same gradient with each row once, for a table of ``rows`` rows.

    Shapes stay as they are: the distinct rows come first, in ascending order, and the
    places that are then left over have zeros and indices of ``rows`` and above, which are
    of no row. Values are summed in the order in which they are given, 16-bit ones in
    float32.

    Args:
        slices: the gradient; one that is ``distinct`` is returned as it is.
        rows: of the table.

    >>> import jax.numpy as jnp
    >>> values = jnp.array([[1.0], [2.0], [4.0], [8.0]])
    >>> slices = IndexedSlices(values, jnp.array([3, 9, 3, -1]))
    >>> sum_repeats(slices, rows=5)
    IndexedSlices(values=Array([[5.],
           [0.],
           [0.],
           [0.]], dtype=float32), indices=Array([3, 6, 7, 8], dtype=int32), distinct=True)
    """
    if slices.distinct:
        return slices
    values = jnp.asarray(slices.values)
    number = values.shape[0]
    if rows + number > _MOST_ROWS:
        raise ValueError(f"a table can have {_MOST_ROWS - number} rows, got {rows}")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    indices = known_rows(slices.indices, rows)
    ordered = jnp.sort(indices)
    place = jnp.cumsum(jnp.diff(ordered, prepend=-1) != 0, dtype=jnp.int32) - 1
    # Looking for the place of each index is faster than sorting positions along.
    place_of_each = place[jnp.searchsorted(ordered, indices)]
    summed = jnp.zeros_like(values).at[place_of_each].add(values)
    left_over = rows + jnp.arange(number, dtype=jnp.int32)
    distinct = left_over.at[place].set(ordered, indices_are_sorted=True)
    # The values of unknown rows have been summed as well.
    known = distinct < rows
    summed = jnp.where(known.reshape(-1, *(1,) * (values.ndim - 1)), summed, 0)
    return IndexedSlices(summed, jnp.where(known, distinct, left_over), distinct=True)


def known_rows(indices: Any, rows: int) -> jax.Array:
    """As int32, where an index of no row is ``rows``."""
    indices = jnp.asarray(indices)
    if jnp.iinfo(indices.dtype).bits < 32:
        indices = indices.astype(jnp.int32)
    known = (indices >= 0) & (indices < rows)
    return jnp.where(known, indices, rows).astype(jnp.int32)


def table_rows(table: jax.Array, rows: IndexedSlices) -> jax.Array:
    """The distinct ``rows`` of ``table``, zeros for indices of no row."""
    got: jax.Array = table.at[_not_from_the_end(rows.indices)].get(
        mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
    )
    return got


def put_rows(table: jax.Array, rows: IndexedSlices, values: jax.Array) -> jax.Array:
    """``table`` with ``values`` in the distinct ``rows``."""
    return table.at[_not_from_the_end(rows.indices)].set(
        values, mode="drop", indices_are_sorted=True, unique_indices=True
    )


def _not_from_the_end(indices: Any) -> jax.Array:
    """Negative ones are of no row; JAX would count from the end."""
    indices = jnp.asarray(indices)
    return jnp.where(indices < 0, np.iinfo(indices.dtype).max, indices)


# --- Transformations that look at leaves ------------------------------------------------


def on_rows(
    inner: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Have a transformation of optax see the rows of an :class:`IndexedSlices`.

    In place of each gradient of rows, ``inner`` is given the values, after repeats have
    been summed, and in place of its parameter the rows of it. So a norm is that of the
    summed gradient. Gradients of whole arrays are passed on as they are.

    Args:
        inner: any transformation whose state does not have the shapes of the parameters:
            clipping, scaling, weight decay, schedules.

    >>> import jax.numpy as jnp, optax
    >>> gradients = {"table": IndexedSlices(jnp.array([[3.0], [1.0]]), jnp.array([7, 7]))}
    >>> clip = on_rows(optax.clip_by_global_norm(1.0))
    >>> params = {"table": jnp.zeros((10, 1))}
    >>> clipped, _ = clip.update(gradients, clip.init(params), params)
    >>> (params["table"] + clipped["table"])[7]
    Array([1.], dtype=float32)
    """
    import optax  # which Keras does without

    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        structure: Any
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_gradient)
        summed = [_summed(leaf, None) for leaf in leaves]
        if params is not None:
            tables = structure.flatten_up_to(params)
            summed = [_summed(*pair) for pair in zip(leaves, tables, strict=True)]
            params = structure.unflatten(
                table_rows(table, rows) if is_slices(rows) else table
                for table, rows in zip(tables, summed, strict=True)
            )
        values = (rows.values if is_slices(rows) else rows for rows in summed)
        updates, state = inner.update(
            structure.unflatten(values), state, params, **extra_args
        )
        changed = structure.flatten_up_to(updates)
        return structure.unflatten(
            IndexedSlices(new, rows.indices, distinct=True) if is_slices(rows) else new
            for new, rows in zip(changed, summed, strict=True)
        ), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _summed(gradient: Any, table: Any) -> Any:
    if not is_slices(gradient):
        return gradient
    # Without the table: as if it had as many rows as there can be.
    rows = _MOST_ROWS - len(gradient.values) if table is None else len(table)
    if table is not None:
        check_rows(gradient, table, "a gradient of rows")
    return sum_repeats(gradient, rows)


# --- Gradients of rows ------------------------------------------------------------------


@dataclass
class _Lookups:
    """What :func:`lookup` has read while a loss is traced."""

    tables: Sequence[Any]
    taps: Sequence[jax.Array] | None = None
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
    becomes an :class:`IndexedSlices` of these rows; elsewhere this is an ordinary gather.
    An index outside ``[0, len(table))``, negative ones included, gives a row of zeros, and
    its gradient is dropped: ``-1`` can stand for padding.

    Args:
        table: the parameter itself, at least one axis.
        indices: integers, of any shape.

    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: in :func:`value_and_sparse_grad`, ``table`` is not one of the parameters
            but something computed from one, or passed through a transformation of JAX.

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
    number = next((i for i, t in enumerate(lookups.tables) if t is table), None)
    if number is None:
        raise ValueError(
            f"the table of lookup() must be one of the parameters as they were passed to "
            f"the loss, got an array of shape {jnp.shape(table)} that is not; look it up "
            f"outside of jax.jit, jax.checkpoint and the like, and convert the rows "
            f"instead of it"
        )
    lookups.found.append(number)
    if lookups.taps is None:
        shape = (*indices.shape, *table.shape[1:])
        lookups.shapes.append(jax.ShapeDtypeStruct(shape, table.dtype))
        return jnp.zeros(shape, table.dtype)
    lookups.indices.append(indices)
    return _tapped(_gathered(table, indices), lookups.taps[len(lookups.found) - 1])


def _gathered(table: Any, indices: jax.Array) -> jax.Array:
    table = jnp.asarray(table)
    return table.at[known_rows(indices, len(table))].get(mode="fill", fill_value=0)


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
    computed. All other gradients are as usual. It is used inside ``jax.jit``; the loss is
    traced twice.

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
        leaves, structure = jax.tree.flatten(params)
        leaves = [jnp.asarray(leaf) for leaf in leaves]

        def called(leaves: Sequence[Any], lookups: _Lookups) -> Any:
            with _recording(lookups):
                return loss(structure.unflatten(leaves), *args, **kwargs)

        found, shapes = _find_lookups(called, leaves)
        dense = {i: leaf for i, leaf in enumerate(leaves) if i not in found}

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
        for number in dict.fromkeys(found):
            gradients[number] = _joined(
                [
                    (ids.reshape(-1), rows.reshape(-1, *leaves[number].shape[1:]))
                    for place, ids, rows in zip(found, indices, of_rows, strict=True)
                    if place == number
                ]
            )
        ordered = structure.unflatten(gradients[i] for i in range(len(leaves)))
        return ((value, aux) if has_aux else value), ordered

    return value_and_gradients


def _renewed(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [jax.lax.stop_gradient(leaf) for leaf in leaves]


def _find_lookups(
    called: Callable[[Sequence[Any], _Lookups], Any], leaves: Sequence[jax.Array]
) -> tuple[list[int], list[jax.ShapeDtypeStruct]]:
    """Which of the leaves each lookup is of, and the shapes of what is read."""
    seen: list[_Lookups] = []

    def trace(leaves: Sequence[Any]) -> Any:
        seen.append(_Lookups(leaves))
        return called(leaves, seen[-1])

    jaxpr = jax.make_jaxpr(trace)(list(leaves)).jaxpr
    lookups = seen[-1]
    # The lookups of this pass do not read the tables.
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    used |= {id(v) for v in jaxpr.outvars}
    for number in set(lookups.found):
        if id(jaxpr.invars[number]) in used:
            raise ValueError(
                f"the table of shape {leaves[number].shape} is read with lookup() and "
                f"also in another way, so that its gradient is not one of some rows; use "
                f"jax.value_and_grad"
            )
    return lookups.found, lookups.shapes


def _joined(parts: Sequence[tuple[jax.Array, jax.Array]]) -> IndexedSlices:
    if len(parts) == 1:
        [(indices, values)] = parts
        return IndexedSlices(values, indices)
    indices = jnp.concatenate([indices for indices, _ in parts])
    return IndexedSlices(jnp.concatenate([values for _, values in parts]), indices)
