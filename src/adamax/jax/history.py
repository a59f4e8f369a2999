"""The history of an exact table: the steps that its stale rows have not taken.

``_core/exact.py`` has the mathematics. Here the history is a part of the state, in arrays
of fixed shapes: the sums of the last steps, which each step brings forward, and a ring of
older ones. Each step also catches up some rows that nobody asked for, in turn, so that no
row is ever more stale than the ring goes back. Sums have two parts, since there may be no
64-bit numbers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from .._core.exact import Expansion
from .rule import Three, quotient, state_dtype

# Entries of the ring: a power of 2, so that step numbers may overflow.
_FEWEST_ENTRIES = 1 << 12
_ROWS_FOR_AN_ENTRY = 64

# A power of a beta is a product of one for each digit of the exponent.
_DIGITS, _BASE = 4, 256

# The logarithm of a factor of 0: its powers are 0, and sums of it are not infinite.
_LOG_OF_ZERO = -1e4


class StaleRows(NamedTuple):
    """The part of a state that knows which rows of a table are stale, and by what.

    Attributes:
        steps: how many there have been, int32 (which may overflow).
        stamps: of each row the step that it is up to date with, ``(rows,)``, int32.
        recent: the sums ``S_n`` of the rows that are 1, 2, ... steps behind, and what
            rounding has left out of them, ``(2, window, terms)``.
        final: those of older entries, ``window`` steps after each, ``(entries, terms)``,
            the entry of step ``s`` at ``s % entries``.
        decay: of the product of all decay factors up to step ``s``, at ``s % entries``, the
            logarithm in two parts and the number of negative factors, modulo 2:
            ``(entries, 3)``. None without weight decay.
    """

    steps: Any
    stamps: Any
    recent: Any
    final: Any
    decay: Any


jax.export.register_namedtuple_serialization(
    StaleRows, serialized_name="adamax.jax.StaleRows"
)


def init_stale_rows(param: Any, expansion: Expansion, decays: bool) -> StaleRows:
    """Of a table all of whose rows are up to date; ``param`` may be abstract."""
    rows, dtype = jnp.shape(param)[0], state_dtype(jnp.result_type(param))
    enough = max(_FEWEST_ENTRIES, 2 * expansion.window, rows // _ROWS_FOR_AN_ENTRY)
    entries = 1 << (enough - 1).bit_length()
    return StaleRows(
        jnp.zeros((), jnp.int32),
        zeros_by_rows(param, jnp.int32),
        jnp.zeros((2, *expansion.weights.shape), dtype),
        jnp.zeros((entries, expansion.terms), dtype),
        jnp.zeros((entries, 3), dtype) if decays else None,
    )


def zeros_by_rows(param: Any, dtype: Any) -> jax.Array:
    """A zero for each row, on the devices where the row is."""
    is_traced = isinstance(param, jax.core.Tracer)
    sharding: Any = None if is_traced else getattr(param, "sharding", None)
    by_rows = None
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.Mesh):
        by_rows = sharding.update(spec=jax.P(*sharding.spec[:1]))
    return jnp.zeros(jnp.shape(param)[0], dtype, device=by_rows)


def check_stale_rows(stale: StaleRows, param: Any, expansion: Expansion, name: str) -> None:
    """Raise unless each part has the dtype and the shape that it has for ``param``."""
    dtype = state_dtype(param.dtype)
    entries = jnp.shape(stale.final)[:1]
    is_power = len(entries) == 1 and entries[0].bit_count() == 1
    if not is_power or entries[0] < 2 * expansion.window:
        entries = ("a power of 2",)  # type: ignore[assignment]
    expected = {
        "steps": ((), jnp.dtype(jnp.int32)),
        "stamps": (param.shape[:1], jnp.dtype(jnp.int32)),
        "recent": ((2, *expansion.weights.shape), dtype),
        "final": ((*entries, expansion.terms), dtype),
        "decay": ((*entries, 3), dtype),
    }
    for field, (shape, of_field) in expected.items():
        part = getattr(stale, field)
        if part is None and field == "decay":
            continue
        if jnp.shape(part) != shape or part.dtype != of_field:
            raise ValueError(
                f"{field} in the state{name} must be {of_field} of shape {shape} for a "
                f"table of {param.dtype} and shape {param.shape} with these betas, got "
                f"{part.dtype} of shape {jnp.shape(part)}; a state of other betas ends "
                f"with flush() of its optimizer, and init(params)[2:] of this one begins "
                f"another"
            )


# --- Recording steps ---------------------------------------------------------------------


def recorded(
    stale: StaleRows, weights: Any, step_size: jax.Array, decay_rate: Any
) -> StaleRows:
    """The history after one more step; the stamps are as they were.

    Args:
        stale: before the step.
        weights: of the betas, see ``Expansion``.
        step_size: ``lr_t / (1 - beta_1**t)``.
        decay_rate: ``lr_t * weight_decay``, or None without weight decay.
    """
    steps, stamps, recent, final, decay = stale
    last = len(final) - 1
    older = jnp.pad(recent[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if decay is not None:
        older = (1 - decay_rate) * older
    recent = jnp.stack(_added(older, step_size * jnp.asarray(weights, recent.dtype)))
    now = steps + 1
    final = final.at[(now - len(weights)) & last].set(recent[0, -1])
    if decay is not None:
        before, factor = decay[steps & last], 1 - decay_rate
        is_small = decay_rate < 0.5
        of_small = jnp.log1p(-jnp.where(is_small, decay_rate, 0))
        logarithm = jnp.where(is_small, of_small, jnp.log(abs(factor)))
        high, low = _added(before[:2], jnp.maximum(logarithm, _LOG_OF_ZERO))
        negative = jnp.where(factor < 0, 1 - before[2], before[2])
        decay = decay.at[now & last].set(jnp.stack([high, low, negative]))
    return StaleRows(now, stamps, recent, final, decay)


def _added(sums: jax.Array, terms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums in two parts each with terms added to them, almost without rounding."""
    high, low = sums[0], sums[1]
    total = high + terms
    of_terms = total - high
    low = low + ((high - (total - of_terms)) + (terms - of_terms))
    high = total + low
    return high, low - (high - total)


def rows_in_turn(steps: jax.Array, entries: int, rows: int) -> jax.Array:
    """The rows that a step catches up: each one once within half the entries."""
    cycle = entries // 2
    number = -(-rows // cycle)
    return (steps & (cycle - 1)) * number + jnp.arange(number, dtype=jnp.int32)


# --- Catching up -------------------------------------------------------------------------

History: TypeAlias = Sequence[jax.Array]


def operands(stale: StaleRows, b1: float, b2: float, eps: float) -> History:
    """All that says what rows have missed, as :func:`caught_up` and the verbs take it."""
    dtype = stale.recent.dtype
    return (
        stale.recent,
        stale.final,
        jnp.zeros((0, 3), dtype) if stale.decay is None else stale.decay,
        jnp.asarray(_powers(b1, b2, dtype)),
        jnp.asarray([eps], dtype),
        stale.steps.reshape(1),
    )


@functools.lru_cache(maxsize=64)
def _powers(b1: float, b2: float, dtype: Any) -> np.ndarray[Any, Any]:
    """``beta ** (i * 256**digit)`` at ``[0 or 1, digit, i]``."""
    betas = np.array([b1, b2])[:, None, None]
    exponents = np.arange(_BASE) * float(_BASE) ** np.arange(_DIGITS)[:, None]
    with np.errstate(under="ignore"):
        return (betas**exponents).astype(dtype)


def caught_up(tables: Sequence[jax.Array], history: History) -> Three:
    """Rows of the parameter, ``mu``, ``nu`` and the stamps, up to date.

    They are in the dtype of the state.
    """
    w, m, u, stamps = tables
    recent, final, decay, powers, (eps,), (now,) = history
    behind = now - stamps
    window, last = recent.shape[1], len(final) - 1
    of_row = (slice(None), *(None,) * (w.ndim - 1))

    older = final[(now - behind) & last]
    of_w = jnp.ones((), final.dtype)
    if len(decay):  # else there is no weight decay
        when_final = jnp.where(behind > window, now - behind + window, now)
        older = older * _decayed(decay, when_final, now)[:, None]
        of_w = _decayed(decay, now - behind, now)[of_row]
    newer = recent[0, jnp.clip(behind - 1, 0, window - 1)]
    sums = jnp.where((behind > window)[:, None], older, newer)

    of_m, of_u = (factor[of_row] for factor in _decays(behind, powers))

    denominator = u + eps
    two_t = 4 * quotient(u, denominator) - 2  # t = 2 * x - 1
    # Clenshaw's recurrence for a Chebyshev series in t.
    first = second = jnp.zeros_like(u)
    for n in range(final.shape[1] - 1, 0, -1):
        first, second = sums[:, n][of_row] + two_t * first - second, first
    series = sums[:, 0][of_row] + 0.5 * two_t * first - second
    wide = w.astype(m.dtype)
    new = of_w * wide - quotient(m, denominator) * series, of_m * m, of_u * u
    is_stale = (behind != 0)[of_row]
    after, m, u = (
        jnp.where(is_stale, new, old) for new, old in zip(new, (wide, m, u), strict=True)
    )
    # As it is read, and stored.
    return after.astype(w.dtype).astype(m.dtype), m, u


def decay_of_norms(stamps: jax.Array, history: History) -> jax.Array:
    """What the norms of rows have decayed by since their stamps."""
    *_, powers, _, (now,) = history
    return _decays(now - stamps, powers)[1]


def _decays(behind: jax.Array, powers: jax.Array) -> jax.Array:
    """The factors of the moments, and of the norms, of rows that are behind."""
    of_digits = [
        powers[:, place, (behind // _BASE**place) & (_BASE - 1)] for place in range(_DIGITS)
    ]
    return functools.reduce(jnp.multiply, of_digits)


def _decayed(decay: jax.Array, since: jax.Array, now: jax.Array) -> jax.Array:
    """The product of the decay factors of the steps after ``since`` until ``now``."""
    last = len(decay) - 1
    before, after = decay[since & last], decay[now & last]
    logarithm = (after[0] - before[:, 0]) + (after[1] - before[:, 1])
    sign = 1 - 2 * abs(after[2] - before[:, 2])
    return sign * jnp.exp(logarithm)
