"""Rows of tables: gradients of some of them, and reading, summing and writing rows."""

from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self, TypeAlias

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ._compat import is_row_ids, numbers_of, row_ids
from .primitives import FLOATS, primitive

PyTree: TypeAlias = Any

_MOST_ROWS = np.iinfo(np.int32).max


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, init=False)
class IndexedSlices:
    """A gradient, or an update, of some rows of a table.

    Row ``indices[i]`` of the table has ``values[i]``. Where an index repeats, its values
    are summed. Rows whose index is absent are not touched. An index outside ``[0, rows of
    the table)``, negative ones included, is of no row, and its values are dropped.

    ``g + h`` is the gradient of the rows of both, ``c * g`` and ``g / c`` scale the values,
    and ``table + g`` adds them to the rows of an array, in place in a jitted function that
    owns it. So trees of gradients are added with whole slices as leaves::

        is_slices = lambda node: isinstance(node, IndexedSlices)
        total = jax.tree.map(operator.add, one, two, is_leaf=is_slices)

    It is a node of a pytree with two leaves, and passes through ``jax.jit`` and all
    transformations. Row ids are not numbers: arithmetic on that leaf, by a function that
    knows no rows, is an error of JAX. Use the operators above, :func:`on_rows` around a
    transformation of optax, :func:`psum` for ``jax.lax.psum`` and :func:`global_norm`.

    Args:
        values: ``(n, *shape of a row)``.
        indices: ``(n,)``, integers in any order. As an attribute they are int32.
        distinct: promises that ``indices`` are strictly ascending, so that nothing has to
            be summed. :func:`sum_repeats` makes this promise.
        current: promises that the rows were up to date when they were read, which a table
            with ``sparse="exact"`` asks for. :func:`value_and_sparse_grad` makes this
            promise.

    Raises:
        TypeError: ``indices`` are not integers.

    >>> import jax.numpy as jnp
    >>> table = jnp.zeros((5, 2))
    >>> gradient = IndexedSlices(jnp.ones((3, 2)), jnp.array([4, 1, 4]))
    >>> (table + gradient / 2)[:, 0]
    Array([0. , 0.5, 0. , 0. , 1. ], dtype=float32)
    """

    values: Any
    indices: Any  # as an attribute, numbers made of the row ids
    distinct: bool
    current: bool

    def __init__(
        self, values: Any, indices: Any, *, distinct: bool = False, current: bool = False
    ) -> None:
        ids = _as_ids(indices)
        self.__dict__.update(values=values, _ids=ids, distinct=distinct, current=current)

    def __getattr__(self, name: str) -> Any:
        if name != "indices" or "_ids" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return _as_numbers(self._ids)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[bool, bool]]:
        key = jax.tree_util.GetAttrKey
        children = (key("values"), self.values), (key("indices"), self._ids)
        return children, (self.distinct, self.current)

    @classmethod
    def tree_unflatten(cls, promises: tuple[bool, bool], children: Any) -> Self:
        self = object.__new__(cls)  # whatever the children are: there are other trees
        self.__dict__.update(zip(("values", "_ids"), children, strict=True))
        self.__dict__.update(zip(("distinct", "current"), promises, strict=True))
        return self

    # NumPy leaves operators to the methods below, and JAX does.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, IndexedSlices):
            return self.__radd__(other)
        pairs = (self.values, other.values), (self.indices, other.indices)
        values, indices = (jnp.concatenate(pair) for pair in pairs)
        return IndexedSlices(values, indices, current=self.current and other.current)

    def __radd__(self, table: Any) -> Any:
        if isinstance(table, int) and table == 0:  # where sum() begins
            return self
        if not isinstance(table, jax.Array | np.ndarray):
            return NotImplemented
        table, values = jnp.asarray(table), jnp.asarray(self.values)
        check_rows(self, table, "the updates")
        has_verb = {table.dtype, values.dtype} <= FLOATS
        return (_add_p.bind if has_verb else _add)(table, self.indices, values)[0]

    def __neg__(self) -> Self:
        return replace(self, values=-self.values)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, table: Any) -> Any:
        return table + -self

    def __mul__(self, factor: Any) -> Any:
        return replace(self, values=self.values * factor) if _is_scalar(factor) else _NO

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return replace(self, values=self.values / divisor) if _is_scalar(divisor) else _NO

    def flattened(self) -> "IndexedSlices":
        """One gradient of all rows in a batch, which has leading axes in both leaves.

        ``jax.vmap``, ``jax.lax.scan`` and ``jax.lax.all_gather`` return such batches.

        >>> import jax.numpy as jnp
        >>> batch = IndexedSlices(jnp.ones((3, 8, 2)), jnp.ones((3, 8), jnp.int32))
        >>> batch.flattened().values.shape
        (24, 2)
        """
        values, indices = jnp.asarray(self.values), self.indices.reshape(-1)
        of_row = values.shape[self.indices.ndim :]
        return IndexedSlices(values.reshape(-1, *of_row), indices, current=self.current)


_NO: Any = NotImplemented


def _is_scalar(number: Any) -> bool:
    is_number = isinstance(
        number, jax.Array | np.ndarray | np.generic | int | float | complex
    )
    return is_number and jnp.ndim(number) == 0


def _as_ids(indices: Any) -> Any:
    """Integers as row ids. What stands for an array in a tree is left alone."""
    if isinstance(indices, jax.ShapeDtypeStruct):
        as_array = jax.ShapeDtypeStruct(indices.shape, indices.dtype)
        return indices.update(dtype=jax.eval_shape(_as_ids, as_array).dtype)
    if is_row_ids(indices) or not isinstance(
        indices, jax.Array | np.ndarray | list | tuple
    ):
        return indices
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.dtype != jnp.int32:
        indices = known_rows(indices, _MOST_ROWS, no_row=-1)
    return _int32_as_ids(indices)


def _as_numbers(ids: Any) -> Any:
    if not is_row_ids(ids):
        return ids
    if isinstance(ids, jax.ShapeDtypeStruct):
        return ids.update(dtype=jnp.int32)
    return _ids_as_int32(ids)


_int32_as_ids = jax.jit(row_ids, inline=True)
_ids_as_int32 = jax.jit(numbers_of, inline=True)

jax.export.register_pytree_node_serialization(
    IndexedSlices,
    serialized_name="adamax.jax.IndexedSlices",
    serialize_auxdata=bytes,
    deserialize_auxdata=lambda promises: tuple(map(bool, promises)),
)


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


def is_slices(node: object) -> bool:
    return isinstance(node, IndexedSlices)


def is_gradient(node: object) -> bool:
    """Whether a node of a tree of gradients, None included, belongs to one parameter."""
    return node is None or is_slices(node)


def check_rows(slices: IndexedSlices, table: Any, name: str) -> None:
    """Raise unless ``slices`` can be of rows of ``table``."""
    shape, of_indices = jnp.shape(slices.values), jnp.shape(slices.indices)
    if len(of_indices) != 1:
        raise ValueError(
            f"indices of {name} must have one axis, got {of_indices}; "
            f"IndexedSlices.flattened() makes one gradient of a batch of them"
        )
    if table.ndim == 0:
        raise ValueError(f"the parameter of {name} has no rows, its shape is ()")
    expected = (*of_indices, *table.shape[1:])
    if shape != expected:
        raise ValueError(
            f"values of {name} must have the shape {expected} for {of_indices[0]} indices "
            f"and a table of shape {table.shape}, got {shape}"
        )


# --- Sums of repeated rows ---------------------------------------------------------------


def sum_repeats(slices: IndexedSlices, rows: int) -> IndexedSlices:
    """The same gradient with each row once, for a table of ``rows`` rows.

    Shapes stay as they are. The distinct rows come first, in ascending order. The places
    that are left over have zeros, and indices of ``rows`` and above, which are of no row.
    Values are summed in float64 on a CPU, in at least float32 elsewhere; the sums are at
    least float32.

    Args:
        slices: the gradient; one that is ``distinct`` is returned as it is.
        rows: of the table.

    Raises:
        ValueError: a table of so many rows that they and the places have no int32 indices.

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
    if rows + len(values) > _MOST_ROWS:
        raise ValueError(f"a table can have {_MOST_ROWS - len(values)} rows, got {rows}")
    sum_ = _sum_p.bind if values.dtype in FLOATS else _sum
    indices, sums = sum_(slices.indices, values, jnp.full(1, rows, jnp.int32))
    return replace(slices, values=sums, indices=indices, distinct=True)


def _sum(
    indices: jax.Array, values: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (number,) = rows
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    indices = known_rows(indices, number)
    ordered = jnp.sort(indices)
    place = jnp.cumsum(jnp.diff(ordered, prepend=-1) != 0, dtype=jnp.int32) - 1
    # Looking for the place of each index is faster than sorting positions along.
    place_of_each = place[jnp.searchsorted(ordered, indices)]
    sums = jnp.zeros_like(values).at[place_of_each].add(values)
    left_over = number + jnp.arange(len(values), dtype=jnp.int32)
    distinct = left_over.at[place].set(ordered, indices_are_sorted=True)
    # The values of unknown rows have been summed as well.
    known = distinct < number
    sums = jnp.where(known.reshape(-1, *(1,) * (values.ndim - 1)), sums, 0)
    return jnp.where(known, distinct, left_over), sums


def _shapes_of_sum(indices: Any, values: Any, rows: Any) -> list[Any]:
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return [indices, values.update(dtype=dtype)]


# --- Reading and writing -----------------------------------------------------------------


def known_rows(indices: Any, rows: Any, no_row: Any = None) -> jax.Array:
    """As int32, where an index of no row is ``no_row``, or else ``rows``."""
    indices = jnp.asarray(indices)
    if jnp.iinfo(indices.dtype).bits < 32:
        indices = indices.astype(jnp.int32)
    known = (indices >= 0) & (indices < rows)
    no_row = rows if no_row is None else no_row
    return jnp.where(known, indices.astype(jnp.int32), no_row)


def table_rows(table: jax.Array, rows: IndexedSlices) -> jax.Array:
    """The distinct ``rows`` of ``table``, zeros for indices of no row."""
    got: jax.Array = table.at[_not_from_the_end(rows.indices)].get(
        mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
    )
    return got


def put_rows(table: jax.Array, rows: IndexedSlices, values: jax.Array) -> jax.Array:
    """``table`` with ``values``, as its dtype, in the distinct ``rows``."""
    operands = table, rows.indices, values.astype(table.dtype)
    put = _put
    if table.dtype in FLOATS or table.dtype == jnp.int32:
        put = _put_p.bind
    elif table.dtype in (jnp.int8, jnp.uint8):
        put = _put_codes_p.bind
    changed: jax.Array = put(*operands)[0]
    return changed


def _put(table: jax.Array, indices: jax.Array, values: jax.Array) -> tuple[jax.Array]:
    into = table.at[_not_from_the_end(indices)]
    return (into.set(values, mode="drop", indices_are_sorted=True, unique_indices=True),)


def _add(table: jax.Array, indices: jax.Array, values: jax.Array) -> tuple[jax.Array]:
    """``table`` with values added to some rows, each element rounded once."""
    rows = sum_repeats(IndexedSlices(values, indices), len(table))
    return (put_rows(table, rows, table_rows(table, rows) + rows.values),)


def _not_from_the_end(indices: jax.Array) -> jax.Array:
    """Negative ones are of no row; JAX would count from the end."""
    return jnp.where(indices < 0, _MOST_ROWS, indices)


# What XLA makes of these on a CPU goes from element to element, in one thread.
_sum_p = primitive("sum", _sum, outputs=_shapes_of_sum)
_put_p = primitive("put", _put, in_place=1)
_put_codes_p = primitive("8bit_put", _put, in_place=1)
_add_p = primitive("add", _add, in_place=1)
