r"""Exact sparse updates: the dense rule over any number of steps, in closed form.

A row that is up to date with step ``s`` and has a gradient of zero until step ``T`` ends
with, where ``a_t`` is the step size ``lr_t / (1 - beta_1**t)``, ``d_t`` the decay factor
``1 - lr_t * weight_decay``, and ``P(i, T)`` the product ``d_{i+1} * ... * d_T``::

    m_T = beta_1**(T - s) * m
    u_T = beta_2**(T - s) * u
    w_T = P(s, T) * w - sum over j = 1 .. T - s of
              P(s + j, T) * a_{s+j} * beta_1**j * m / (beta_2**j * u + epsilon)

Only the denominator ties ``j`` to the element. With ``x = u / (u + epsilon)``, which is in
[0, 1], and ``r_j = beta_2**(j / 2)`` it has a Chebyshev series in ``2 * x - 1``::

    1 / (beta_2**j * u + epsilon) = 1 / (u + epsilon) * 1 / (1 - (1 - r_j**2) * x)
    1 / (1 - (1 - r_j**2) * x) = (1 + sum over n >= 1 of 2 * z_j**n * T_n(2 * x - 1)) / r_j
    z_j = (1 - r_j) / (1 + r_j)

so that ``w_T = P(s, T) * w - m / (u + epsilon) * sum over n of S_n(s, T) * T_n(2 * x - 1)``
with sums that depend on the row through ``s`` alone::

    S_n(s, T) = sum over j = 1 .. T - s of P(s + j, T) * a_{s+j} * weight(j, n)
    weight(j, n) = beta_1**j / r_j * (1 if n == 0 else 2 * z_j**n)

One step multiplies all ``S_n(s, .)`` by ``d_T`` and adds ``a_T * weight(T - s, n)``. The
weights die out with ``j``: after :attr:`Expansion.window` steps an entry changes by the
common factor only, which is kept apart. How fast the series converges depends on the betas,
and not on ``u`` or ``epsilon``. ``docs/exact.md`` has the derivation.

Everything here is float64, in NumPy, and knows no table: see ``stale.py`` for that.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

# The part of a move that may be lost where a series or a sum ends: far less than what one
# rounding of the result loses, so that learning rates may rise within a gap.
_LOSS = {np.dtype(np.float32): 2.0**-32, np.dtype(np.float64): 2.0**-56}
# Terms come as one and some fours: the kernels take four at a time.
_FOUR = 4
_MOST_TERMS = 1 + 16 * _FOUR
_LONGEST_WINDOW = 1 << 15

# The columns of ``History.products``: mantissas, then the exponents of 2.
DECAY, BETA_1, BETA_2 = range(3)
_FACTORS = 3
# The entries of ``History.clock``; there are three last steps with a factor of 0.
STEPS, WINDOW, START, LAST_ZERO = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Expansion:
    """How far the sums must go for some betas and a dtype.

    ``weights[j - 1, n]`` is ``weight(j, n)`` of the module's docstring.
    """

    terms: int
    window: int
    weights: Float64Array

    @classmethod
    def of(
        cls, beta_1: float, beta_2: float, dtype: npt.DTypeLike, names: Any = None
    ) -> "Expansion":
        """The shortest expansion that loses no more than rounding to ``dtype`` does.

        ``names`` maps ``beta_1`` and ``beta_2`` to what the front end calls them.

        Raises:
            ValueError: it would take too many terms or steps for the betas.

        >>> Expansion.of(0.9, 0.999, "float32").terms
        5
        """
        expansion = _expansion(float(beta_1), float(beta_2), np.dtype(dtype))
        if expansion is None:
            names = names or {}
            name_1, name_2 = (names.get(name, name) for name in ("beta_1", "beta_2"))
            raise ValueError(
                f"sparse='exact' needs {name_1} further from 1 and {name_2} nearer to 1 "
                f"for {np.dtype(dtype)}, got {name_1}={beta_1!r} and {name_2}={beta_2!r}, "
                f"which would take more than {_MOST_TERMS} terms or {_LONGEST_WINDOW} "
                f"steps; sparse='lazy' supports any betas"
            )
        return expansion


@functools.lru_cache(maxsize=256)
def _expansion(beta_1: float, beta_2: float, dtype: np.dtype[Any]) -> Expansion | None:
    if beta_1 == 0.0:  # momentum is gone after a step, so that the row does not move
        return Expansion(1 + _FOUR, 1, np.zeros((1, 1 + _FOUR)))
    if beta_1 >= beta_2:  # the moves grow without end while u is above epsilon
        return None
    loss = _LOSS[dtype]
    window = math.ceil(math.log(loss) / math.log(beta_1 / beta_2))
    if window > _LONGEST_WINDOW:
        return None
    first, z = _series(beta_1, beta_2, window)
    # What the terms from n on can add up to, relative to the smallest sum there is.
    with np.errstate(divide="ignore"):
        rest = 2 * first / (1 - z)
    smallest = beta_1 / (1 - beta_1)
    for terms in range(1, _MOST_TERMS + 1):
        rest = rest * z
        if terms % _FOUR == 1 and terms > 1 and rest.sum() <= loss * smallest:
            return Expansion(terms, window, _weights(first, z, terms))
    return None


def _series(beta_1: float, beta_2: float, window: int) -> tuple[Float64Array, Float64Array]:
    """``beta_1**j / r_j`` and ``z_j`` for ``j = 1 .. window``."""
    j = np.arange(1, window + 1)
    if beta_1 == 0.0:
        return np.zeros(window), np.zeros(window)
    logarithm = math.log(beta_2)
    # This z is (1 - r) / (1 + r) without cancellation.
    return np.exp(j * (math.log(beta_1) - logarithm / 2)), np.tanh(j * (-logarithm / 4))


def _weights(first: Float64Array, z: Float64Array, terms: int) -> Float64Array:
    weights = np.empty((len(z), terms))
    weights[:, 0] = first
    weights[:, 1:] = 2 * first[:, None] * z[:, None] ** np.arange(1, terms)
    weights.setflags(write=False)
    return weights


class HistoryFull(Exception):  # noqa: N818
    """All rows must be caught up before a step with these betas can be recorded."""


class Recorded(NamedTuple):
    """What one more step changes in a history; see :meth:`History.commit`."""

    sums: Float64Array  # of the entries that change, up to and including the new one
    products: Float64Array  # of the new entry
    clock: Int64Array


class History:
    """The last steps, for rows that have yet to take them.

    Arrays are rings: an entry for each of the last steps, at that step's number modulo the
    number of entries, a power of two. An entry is for rows that are up to date with its
    step. The learning rate, weight decay and betas may differ from step to step.

    Attributes:
        arrays: ``sums``, ``products`` and ``clock``, as the verbs take them.
        sums: ``(entries, terms)``, the ``S_n`` of the module's docstring. Those of an entry
            that is older than the window are of ``window`` steps after it, and are to be
            multiplied by the decay of all later steps.
        products: ``(entries, 6)``, the products of all decay factors, ``beta_1`` and
            ``beta_2`` since the beginning, as mantissas and exponents of 2, since over
            millions of steps they leave the range of float64.
        clock: ``(6,)``, the number of the last step, the window, the step with which all
            rows were last up to date, and the last steps whose decay factor, ``beta_1``
            and ``beta_2`` were 0, which products leave out.

    Args:
        beta_1: of the next step.
        beta_2: of the next step.
        dtype: of the arithmetic on the rows.
        entries: how many steps the history goes back, at least.

    Raises:
        ValueError: betas that would need too many terms or too long a window.
    """

    def __init__(
        self, beta_1: float, beta_2: float, dtype: npt.DTypeLike, entries: int
    ) -> None:
        self.dtype = np.dtype(dtype)
        # Zeros take up memory only where steps have been recorded. The arrays are replaced
        # together, so that an interrupt cannot come between.
        self.arrays: tuple[Float64Array, Float64Array, Int64Array] = (
            np.zeros((_power_of_two(entries), 1)),
            np.zeros((_power_of_two(entries), 2 * _FACTORS)),
            np.zeros(6, np.int64),
        )
        self._restart(beta_1, beta_2)

    @property
    def sums(self) -> Float64Array:
        return self.arrays[0]

    @property
    def products(self) -> Float64Array:
        return self.arrays[1]

    @property
    def clock(self) -> Int64Array:
        return self.arrays[2]

    def restart(self) -> None:
        """Begin anew at the present step, with which all rows are up to date."""
        self._restart(*self._betas)

    def _restart(self, beta_1: float, beta_2: float) -> None:
        expansion = Expansion.of(beta_1, beta_2, self.dtype)
        sums, products, clock = self.arrays
        shape = self._shape_for(expansion.window, expansion.terms)
        if shape != sums.shape:
            sums, products = np.zeros(shape), np.zeros((shape[0], 2 * _FACTORS))
        clock = clock.copy()
        clock[WINDOW], clock[START] = expansion.window, self.steps
        products[self.steps & (len(products) - 1)] = [1, 1, 1, 0, 0, 0]
        self.arrays = sums, products, clock
        self._betas = beta_1, beta_2
        self._extremes = beta_1, beta_2  # the largest beta_1 and the smallest beta_2
        self._weights: Float64Array | None = None
        self._same_betas_since = self.steps

    def _shape_for(self, window: int, terms: int) -> tuple[int, int]:
        """Of sums that have room for so long a window and so many terms."""
        entries = max(self.entries, _power_of_two(4 * window))
        return entries, max(self.terms, terms)

    @property
    def steps(self) -> int:
        """The number of the last step that was recorded."""
        return int(self.clock[STEPS])

    @property
    def start(self) -> int:
        """The step with which all rows were last up to date."""
        return int(self.clock[START])

    @property
    def window(self) -> int:
        """How many steps after it an entry of ``sums`` is final."""
        return int(self.clock[WINDOW])

    @property
    def entries(self) -> int:
        return len(self.sums)

    @property
    def terms(self) -> int:
        terms: int = self.sums.shape[1]
        return terms

    def check_betas(self, beta_1: float, beta_2: float, names: Any = None) -> None:
        """Raise a ValueError if no history could have these betas."""
        if (beta_1, beta_2) != self._betas:
            Expansion.of(beta_1, beta_2, self.dtype, names)

    def recorded(
        self,
        step_size: float,
        decay: float,
        beta_1: float,
        beta_2: float,
        *,
        all_current: bool,
    ) -> Recorded:
        """What one more step changes, without changing it.

        Args:
            step_size: ``lr_t / (1 - beta_1**t)``.
            decay: ``1 - lr_t * weight_decay``.
            beta_1: of this step; :meth:`check_betas` has passed.
            beta_2: of this step.
            all_current: whether all rows are up to date.

        Raises:
            HistoryFull: the betas of the steps that rows have yet to take would need too
                many terms together; not with ``all_current``.
        """
        self._prepare_for(beta_1, beta_2, all_current)
        steps, now, last = self.steps, self.steps + 1, self.entries - 1
        clock = self.clock.copy()
        clock[STEPS] = now
        products = self.products[steps & last].copy()
        for column, factor in enumerate((decay, beta_1, beta_2)):
            if factor == 0.0:
                clock[LAST_ZERO + column] = now
            mantissa, exponent = math.frexp(products[column] * (factor or 1.0))
            products[column] = mantissa
            products[column + _FACTORS] += exponent

        entries = np.arange(max(self.start, now - self.window), now)
        sums = np.zeros((len(entries) + 1, self.terms))
        changing = sums[:-1]
        np.multiply(self.sums[entries & last], decay, out=changing)
        if beta_1 != 0.0:
            if self._same_betas_since > entries[0]:
                weights = self._mixed_weights(entries, products, clock)
            else:
                weights = self._same_weights()[now - entries - 1]
            changing += step_size * weights
        return Recorded(sums, products, clock)

    def commit(self, recorded: Recorded) -> None:
        """Take the step that :meth:`recorded` described: all rows are a step behind."""
        commit(*self.arrays, recorded)

    def _prepare_for(self, beta_1: float, beta_2: float, all_current: bool) -> None:
        """Make room for a step with these betas."""
        if self._betas == (beta_1, beta_2):
            return
        if all_current:
            self._restart(beta_1, beta_2)
        extremes = max(self._extremes[0], beta_1), min(self._extremes[1], beta_2)
        expansion = _expansion(*extremes, self.dtype)
        if expansion is None:
            raise HistoryFull
        self._grow(expansion)
        self._extremes, self._betas = extremes, (beta_1, beta_2)
        self._weights, self._same_betas_since = None, self.steps

    def _grow(self, expansion: Expansion) -> None:
        """Make room for more terms and a longer window; seldom, if betas rise steadily."""
        window = self.window
        if window < expansion.window:
            window = max(expansion.window, min(2 * window, _LONGEST_WINDOW))
        entries, terms = self._shape_for(window, expansion.terms)
        if (entries, terms, window) == (*self.sums.shape, self.window):
            return
        live = np.arange(max(self.start, self.steps - self.entries + 1), self.steps + 1)
        old, new = live & (self.entries - 1), live & (entries - 1)
        sums, products = np.zeros((entries, terms)), np.zeros((entries, 2 * _FACTORS))
        # Sums that were final are now final at a later step, after more decay.
        final, until = (np.minimum(live + w, self.steps) for w in (self.window, window))
        zero = self.clock[LAST_ZERO + DECAY]
        before, after = (self.products[s & (self.entries - 1)] for s in (final, until))
        decay = _product(DECAY, before, after, (final < zero) & (zero <= until))
        sums[new, : self.terms] = self.sums[old] * decay[:, None]
        products[new] = self.products[old]
        clock = self.clock.copy()
        clock[WINDOW] = window
        self.arrays = sums, products, clock

    def _same_weights(self) -> Float64Array:
        """The weights where betas have been these for all of the window."""
        if self._weights is None:
            self._weights = _weights(*_series(*self._betas, self.window), self.terms)
        return self._weights

    def _mixed_weights(
        self, entries: Int64Array, products: Float64Array, clock: Int64Array
    ) -> Float64Array:
        """The weights of a step where betas have changed since some entries."""
        since = self.products[entries & (self.entries - 1)]
        betas = (
            _product(column, since, products, entries < clock[LAST_ZERO + column])
            for column in (BETA_1, BETA_2)
        )
        of_m, of_u = betas
        r = np.sqrt(of_u)
        z = (1 - r) / (1 + r)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = of_m / r
        weight[r == 0] = 0.0  # then beta_1 had to be 0 too
        return _weights(weight, z, self.terms)


def commit(
    sums: Float64Array, products: Float64Array, clock: Int64Array, recorded: Recorded
) -> None:
    """Write what a step changes into the arrays of a history."""
    now, last = int(recorded.clock[STEPS]), len(sums) - 1
    entries = np.arange(now + 1 - len(recorded.sums), now + 1)
    sums[entries & last] = recorded.sums
    products[now & last] = recorded.products
    clock[:] = recorded.clock


def product_since(
    column: int, products: Float64Array, clock: Int64Array, steps: Int64Array
) -> Float64Array:
    """The product of the factors in a column of all steps after each of ``steps``."""
    last = len(products) - 1
    after = products[int(clock[STEPS]) & last]
    zero = steps < clock[LAST_ZERO + column]
    return _product(column, products[steps & last], after, zero)


def _product(
    column: int, before: Float64Array, after: Float64Array, zero: npt.NDArray[np.bool_]
) -> Float64Array:
    after = np.atleast_2d(after)
    exponents = after[:, column + _FACTORS] - before[:, column + _FACTORS]
    exact = np.ldexp(after[:, column] / before[:, column], exponents.astype(np.int32))
    return np.where(zero, 0.0, exact)


def gaps(
    sums: Float64Array, products: Float64Array, clock: Int64Array, steps: Int64Array
) -> tuple[Float64Array, Float64Array]:
    """What to tell rows that are up to date with ``steps``, by the arrays of a history.

    Returns:
        The sums, ``(n, terms)``, and the factors of ``w``, ``m`` and ``u``, ``(n, 3)``.

    >>> history = History(0.5, 0.9, "float32", entries=10)
    >>> history.commit(history.recorded(0.1, 1.0, 0.5, 0.9, all_current=True))
    >>> gaps(*history.arrays, np.array([0]))[1]
    array([[1. , 0.5, 0.9]])
    """
    factors = [product_since(c, products, clock, steps) for c in range(_FACTORS)]
    final = np.minimum(steps + clock[WINDOW], clock[STEPS])
    later = product_since(DECAY, products, clock, final)
    return sums[steps & (len(sums) - 1)] * later[:, None], np.stack(factors, 1)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 1).bit_length()
