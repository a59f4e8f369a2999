"""Gradients of some rows of a table, for JAX."""

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import jax.numpy as jnp

import jax
import numpy as np

from ._jax_primitives import primitive

if TYPE_CHECKING:
    import optax

PyTree: TypeAlias = Any

_MOST_ROWS = np.iinfo(np.int32).max


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "indices"),
    meta_fields=("distinct", "current"),
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
        current: promises, where a table has ``sparse="exact"``, that the rows were up to
            date when they were read. :func:`value_and_sparse_grad` returns such.

    >>> import jax.numpy as jnp
    >>> table = jnp.zeros((5, 2))
    >>> gradient = IndexedSlices(jnp.ones((3, 2)), jnp.array([4, 1, 4]))
    >>> (table + gradient)[:, 0]
    Array([0., 1., 0., 0., 2.], dtype=float32)
    """

    values: Any
    indices: Any
    distinct: bool = field(default=False, kw_only=True)
    current: bool = field(default=False, kw_only=True)

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
        values = jnp.asarray(self.values).astype(table.dtype)
        return _with_rows(_add_p[self.distinct], table, self.indices, values)


class NotAnArray:
    """What stands where an array would be, and says why if it is taken for one."""

    def advice(self) -> str:
        raise NotImplementedError

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(self.advice())

    __jax_array__ = __array__ = __getitem__ = __iter__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = _refuse


class RowsBehind(NotAnArray):
    """In place of rows of a table that are not up to date."""

    def advice(self) -> str:
        return (
            "a transformation in on_rows() that looks at parameters cannot be used before "
            "exact updates, since their rows in the table may be behind (adamax() has a "
            "weight_decay of its own)"
        )


def is_slices(node: object) -> bool:
    return isinstance(node, IndexedSlices)


def like_given(given: Any, new: Any) -> Any:
    """``new`` without promises, unless they were ``given``."""
    if not is_slices(given):
        return new
    return replace(new, distinct=given.distinct, current=given.current)


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
    >>> summed = sum_repeats(slices, rows=5)
    >>> summed.values[:, 0], summed.indices
    (Array([5., 0., 0., 0.], dtype=float32), Array([3, 6, 7, 8], dtype=int32))
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
    summed = _with_rows(_add_p[False], jnp.zeros_like(values), place_of_each, values)
    left_over = rows + jnp.arange(number, dtype=jnp.int32)
    distinct = left_over.at[place].set(ordered, indices_are_sorted=True)
    # The values of unknown rows have been summed as well.
    known = distinct < rows
    summed = jnp.where(known.reshape(-1, *(1,) * (values.ndim - 1)), summed, 0)
    return replace(
        slices,
        values=summed,
        indices=jnp.where(known, distinct, left_over),
        distinct=True,
    )


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
    return _with_rows(_put_p, table, rows.indices, values)


def _put(table: jax.Array, indices: jax.Array, values: jax.Array) -> tuple[jax.Array]:
    into = table.at[_not_from_the_end(indices)]
    return (into.set(values, mode="drop", indices_are_sorted=True, unique_indices=True),)


def _add(
    distinct: bool, table: jax.Array, indices: jax.Array, values: jax.Array
) -> tuple[jax.Array]:
    into = table.at[_not_from_the_end(indices)]
    added = into.add(
        values, mode="drop", indices_are_sorted=distinct, unique_indices=distinct
    )
    return (added,)


# What XLA makes of these on a CPU goes from element to element, in one thread.
_put_p = primitive("put", _put, in_place=1)
_add_p = [
    primitive("add", functools.partial(_add, distinct), in_place=1)
    for distinct in (False, True)
]


def _with_rows(change: Any, table: jax.Array, indices: Any, values: jax.Array) -> jax.Array:
    """``table`` after a change of the rows at ``indices``."""
    indices = jnp.asarray(indices)
    if indices.dtype != jnp.int32:
        indices = known_rows(indices, len(table))
    changed: jax.Array = change.bind(table, indices, values)[0]
    return changed


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
                _rows_of(table, rows) for table, rows in zip(tables, summed, strict=True)
            )
        values = (rows.values if is_slices(rows) else rows for rows in summed)
        updates, state = inner.update(
            structure.unflatten(values), state, params, **extra_args
        )
        changed = structure.flatten_up_to(updates)
        return structure.unflatten(
            replace(rows, values=new) if is_slices(rows) else new
            for new, rows in zip(changed, summed, strict=True)
        ), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _rows_of(table: Any, rows: Any) -> Any:
    if not is_slices(rows):
        return table
    return RowsBehind() if rows.current else table_rows(table, rows)


def _summed(gradient: Any, table: Any) -> Any:
    if not is_slices(gradient):
        return gradient
    # Without the table: as if it had as many rows as there can be.
    rows = _MOST_ROWS - len(gradient.values) if table is None else len(table)
    if table is not None:
        check_rows(gradient, table, "a gradient of rows")
    return sum_repeats(gradient, rows)
