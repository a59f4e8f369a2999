"""The moments of all parameters, float32 or compact: new ones, checks, conversions."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import optax

from .._core.compact import check_state_dtype
from ._compat import is_placeholder
from .compact import decode, encode
from .history import zeros_by_rows
from .rows import PyTree
from .rule import state_dtype
from .trees import Leaves, at

_PARTS = "mu", "nu", "frame"
_DTYPES: dict[str, tuple[Any, ...]] = {
    "float32": (None, None),  # those of the arithmetic
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "8bit": (jnp.int8, jnp.uint8, jnp.float32),
}


class CompactState(NamedTuple):
    """The first part of a state with ``state_dtype="8bit"``.

    ``count``, ``mu`` and ``nu`` are as in ``optax.ScaleByAdamState``, but with codes of
    eight bits for moments. ``frame`` has a float32 array for each parameter, of the shape
    ``(rows,)`` where that has two or more axes, else ``(1,)``.
    """

    count: Any
    mu: PyTree
    nu: PyTree
    frame: PyTree


jax.export.register_namedtuple_serialization(
    CompactState, serialized_name="adamax.jax.CompactState"
)


def zero_moments(params: PyTree, kind: str) -> Any:
    """The first part of a new state."""

    def zeros(of_state: Any, path: Any, param: Any) -> jax.Array:
        dtype = jnp.result_type(param)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"parameters must be floating-point, got {dtype}{at(path)}; "
                f"optax.masked() leaves parameters out"
            )
        check_parameter(dtype, kind, at(path))
        return jnp.zeros_like(param, of_state or state_dtype(dtype))

    # Two of each, as all may be donated.
    count, dtypes = jnp.zeros([], jnp.int32), _DTYPES[kind][:2]
    moments = (
        jax.tree.map_with_path(functools.partial(zeros, dtype), params) for dtype in dtypes
    )
    if kind != "8bit":
        return optax.ScaleByAdamState(count, *moments)
    # For optax.tree_map_params, nothing in frames is like parameters.
    frames = jnp.zeros(()) if is_placeholder(params) else jax.tree.map(new_frame, params)
    return moments_of(count, [*moments, frames])


def new_frame(param: Any) -> jax.Array:
    """Zeros for a parameter, or for its moments."""
    if jnp.ndim(param) < 2:
        return jnp.zeros(1, jnp.float32)
    return zeros_by_rows(param, jnp.float32)


def trees_of(moments: Any) -> tuple[PyTree, ...]:
    """``mu``, ``nu``, and the frames of 8-bit state."""
    frames = (moments.frame,) if hasattr(moments, "frame") else ()
    return moments.mu, moments.nu, *frames


def moments_of(count: jax.Array, trees: Sequence[PyTree]) -> Any:
    """The other way round."""
    kind: Any = CompactState if len(trees) == 3 else optax.ScaleByAdamState
    return kind(count, *trees)


def check_parameter(dtype: Any, kind: str, name: str) -> None:
    """Raise unless a parameter of this dtype can have state of the kind."""
    if kind != "float32" and state_dtype(dtype) != jnp.float32:
        raise ValueError(
            f"state_dtype={kind!r} needs real parameters of at most 32 bits, got "
            f"{dtype}{name}"
        )


# --- State that is given -----------------------------------------------------------------


def check_kind(moments: Any, kind: str) -> None:
    """Raise unless this can be the first part of a state of the kind."""
    has_frames = hasattr(moments, "frame")
    if has_frames == (kind == "8bit"):
        return
    found = "is 8-bit" if has_frames else "is not 8-bit"
    raise ValueError(f"the state {found}, and state_dtype is {kind!r}{_remedy(kind)}")


def checked(
    kind: str, shape: tuple[int, ...], given: Sequence[Any], name: str
) -> list[jax.Array]:
    """The compact state of a parameter of some shape as arrays.

    Raises:
        ValueError: it has other dtypes or shapes.
    """
    state = list(map(jnp.asarray, given))
    rows = shape[0] if shape else 1
    for part, array, dtype in zip(_PARTS, state, _DTYPES[kind], strict=False):
        shapes = [(1,), (rows,)] if part == "frame" else [shape]
        if array.dtype == dtype and array.shape in shapes:
            continue
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"{part} in the state must be {jnp.dtype(dtype)} of shape {expected}, as "
            f"state_dtype is {kind!r}, got {array.dtype} of shape {array.shape}{name}"
            f"{_remedy(kind) if array.dtype != dtype else ''}"
        )
    return state


def check_frame_of_rows(table: jax.Array, frame: jax.Array, name: str) -> None:
    """Raise unless each row has a frame."""
    if jnp.shape(frame) == jnp.shape(table)[:1]:
        return
    raise ValueError(
        f"a gradient of rows needs 8-bit state with a frame for each row, and a parameter "
        f"of shape {table.shape} has {len(frame)}{name}; init() makes a frame for each row "
        f"of parameters with two or more axes, such as {(len(table), 1)}, and "
        f"convert_state(state, 'float32') and back makes them in a state that lacks them"
    )


def _remedy(kind: str) -> str:
    return f"; adamax.jax.convert_state(state, {kind!r}) converts it"


# --- Conversions -------------------------------------------------------------------------


def convert_state(state: PyTree, state_dtype: str) -> PyTree:
    """A state with its moments in another ``state_dtype``, rounded to nearest.

    For a checkpoint of :func:`optax.adamax` or of :func:`adamax` that is to go on with
    compact state, and for one with compact state that another Adamax is to load.

    Args:
        state: that of :func:`adamax` or :func:`optax.adamax`, or a pytree that has such
            states, as that of ``optax.chain``. Moments of other optimizers that are an
            ``optax.ScaleByAdamState`` are converted, too.
        state_dtype: ``"float32"``, ``"bfloat16"`` or ``"8bit"``. Moments that have it are
            returned as they are.

    Raises:
        ValueError: another ``state_dtype``, or moments in float64 or complex numbers that
            are to be compact.
        TypeError: there is no such state in it.

    >>> import jax.numpy as jnp, optax
    >>> from adamax.jax import adamax
    >>> params = jnp.ones(1000)
    >>> stock = optax.adamax(0.1).init(params)
    >>> state = convert_state(stock, "8bit")
    >>> params, state = adamax(0.1, state_dtype="8bit").step(params, state, jnp.ones(1000))
    >>> state[0].mu.dtype, convert_state(state, "float32")[0].mu.dtype
    (dtype('int8'), dtype('float32'))
    """
    check_state_dtype(state_dtype)
    found = 0

    def converted(node: Any) -> Any:
        nonlocal found
        if not _is_moments(node):
            return node
        found += 1
        return _converted(node, state_dtype)

    result = jax.tree.map(converted, state, is_leaf=_is_moments)
    if not found:
        raise TypeError(
            f"state must have an optax.ScaleByAdamState or a CompactState in it, got "
            f"{type(state).__name__}"
        )
    return result


def _is_moments(node: object) -> bool:
    return isinstance(node, optax.ScaleByAdamState | CompactState)


def _converted(moments: Any, kind: str) -> Any:
    each = Leaves(*trees_of(moments))

    def converted(leaf: int, *parts: Any) -> tuple[jax.Array, ...]:
        return _converted_leaf(list(map(jnp.asarray, parts)), kind, each.names[leaf])

    return moments_of(moments.count, each.map(converted, results=len(_DTYPES[kind])))


def _converted_leaf(parts: list[jax.Array], kind: str, name: str) -> tuple[jax.Array, ...]:
    if tuple(part.dtype for part in parts) == _DTYPES[kind]:
        return tuple(parts)
    if len(parts) == 3:
        parts = list(decode(*parts))
    expected = {state_dtype(part.dtype) for part in parts}
    if kind != "float32" and expected != {jnp.dtype(jnp.float32)}:
        raise ValueError(
            f"state_dtype={kind!r} needs real moments of at most 32 bits, got "
            f"{parts[0].dtype} and {parts[1].dtype}{name}"
        )
    m, u = (part.astype(state_dtype(part.dtype)) for part in parts)
    if kind == "8bit":
        frame = new_frame(m)
        return *encode(m, u, frame), frame
    dtype = _DTYPES[kind][0] or m.dtype
    return m.astype(dtype), u.astype(dtype)
