r"""What rows have missed: the dense rule over any gap, in closed form.

A row that was last brought up to date at step ``s`` and has seen zero gradients until step
``T`` has, with ``a_t`` for the step size ``lr_t / (1 - beta_1**t)``, ``d_t`` for the decay
factor ``1 - lr_t * weight_decay``, and ``P(i, T)`` for ``d_{i+1} * ... * d_T``::

    m_T = beta_1**(T - s) * m
    u_T = beta_2**(T - s) * u
    w_T = P(s, T) * w - sum over j = 1 .. T - s of
              P(s + j, T) * a_{s+j} * beta_1**j * m / (beta_2**j * u + epsilon)

Only the denominator ties ``j`` to the element. With ``x = u / (u + epsilon)``, which is in
[0, 1), and ``r_j = beta_2**(j / 2)`` it has a Chebyshev series in ``2 * x - 1``::

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
and not on ``u`` or ``epsilon``.

Everything here is float64, in NumPy, and knows no table: see ``_deferred.py`` for that.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

import numpy as np

Float64Array = npt.NDArray[np.float64]

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
                f"steps; sparse='lazy' takes any"
            )
        return expansion

    def covers(self, other: "Expansion") -> bool:
        """Whether sums of this length are long enough where ``other`` is needed."""
        return self.terms >= other.terms and self.window >= other.window


@functools.lru_cache(maxsize=64)
def _expansion(beta_1: float, beta_2: float, dtype: np.dtype[Any]) -> Expansion | None:
    if beta_1 == 0.0:  # momentum is gone after a step, so that nothing is paid out
        return Expansion(1 + _FOUR, 1, np.zeros((1, 1 + _FOUR)))
    if beta_1 >= beta_2:  # what is paid out grows without end while u is above epsilon
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
    logarithm = math.log(beta_2)
    # This z is (1 - r) / (1 + r) without cancellation.
    return np.exp(j * (math.log(beta_1) - logarithm / 2)), np.tanh(j * (-logarithm / 4))


def _weights(first: Float64Array, z: Float64Array, terms: int) -> Float64Array:
    weights = np.empty((len(z), terms))
    weights[:, 0] = first
    weights[:, 1:] = 2 * first[:, None] * z[:, None] ** np.arange(1, terms)
    weights.setflags(write=False)
    return weights


class History:
    """What a row has missed since each of the last steps.

    Entry ``i`` is for rows that were up to date ``i`` steps after the beginning of this
    history; ``steps`` are recorded. Of an entry older than the window, ``sums`` are those
    of ``window`` steps after it, to be multiplied by the decay of all later steps.
    Learning rate, weight decay and betas may differ from step to step.

    Attributes:
        sums: ``(limit + 1, terms)``, the ``S_n``.
        products: ``(limit + 1, 6)``, the products of all decay factors, ``beta_1`` and
            ``beta_2`` from the beginning on, as mantissas and exponents of 2, since over
            millions of steps they leave the range of float64.
        zeros: ``(3,)``, the last step whose factor was 0, which products leave out.
    """

    def __init__(
        self, beta_1: float, beta_2: float, dtype: npt.DTypeLike, limit: int
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.expansion = Expansion.of(beta_1, beta_2, dtype)
        self.betas = beta_1, beta_2
        self.steps = 0
        # Takes up memory only as far as steps have been recorded.
        self.sums: Float64Array = np.zeros((limit + 1, self.expansion.terms))
        self.products: Float64Array = np.zeros((limit + 1, 2 * _FACTORS))
        self.products[0, :_FACTORS] = 1.0
        self.zeros: npt.NDArray[np.int64] = np.zeros(_FACTORS, np.int64)
        self._products = [(1.0, 0)] * _FACTORS
        self._weights: Float64Array | None = self.expansion.weights
        self._same_betas_since = 0

    @property
    def window(self) -> int:
        """How many steps after it an entry of ``sums`` is final."""
        return self.expansion.window

    @property
    def is_full(self) -> bool:
        """Whether no more steps can be recorded."""
        return self.steps == len(self.sums) - 1

    def takes(self, beta_1: float, beta_2: float) -> bool:
        """Whether a step with these betas can be recorded."""
        return self.betas == (beta_1, beta_2) or self.expansion.covers(
            Expansion.of(beta_1, beta_2, self.dtype)
        )

    def record(self, step_size: float, decay: float, beta_1: float, beta_2: float) -> None:
        """Take note of a step; all rows are then one step further behind."""
        if self.betas != (beta_1, beta_2):
            self.betas = beta_1, beta_2
            self._weights = None
            self._same_betas_since = self.steps
        now = self.steps + 1
        for column, factor in enumerate((decay, beta_1, beta_2)):
            if factor == 0.0:
                self.zeros[column] = now
            product, exponent = self._products[column]
            mantissa, more = math.frexp(product * (factor or 1.0))
            self._products[column] = mantissa, exponent + more
            self.products[now, column] = mantissa
            self.products[now, column + _FACTORS] = exponent + more
        first = max(0, now - self.window)
        changing = self.sums[first:now]
        if decay != 1.0:
            changing *= decay
        if beta_1 != 0.0:
            if self._same_betas_since > first:
                weights = self._mixed_weights(first, now)
            else:
                weights = self._same_weights()[now - first - 1 :: -1]
            changing += step_size * weights
        self.steps = now

    def _same_weights(self) -> Float64Array:
        """The weights where betas have been these for all of the window."""
        if self._weights is None:
            self._weights = _weights(
                *_series(*self.betas, self.window), self.expansion.terms
            )
        return self._weights

    def _mixed_weights(self, first: int, now: int) -> Float64Array:
        """The weights at step ``now`` where betas have changed since some entries."""
        entries = np.arange(first, now)
        r = np.sqrt(self._product(BETA_2, entries, now))
        z = (1 - r) / (1 + r)
        with np.errstate(divide="ignore"):
            weight = self._product(BETA_1, entries, now) / r
        weight[r == 0] = 0.0  # then beta_1 had to be 0 too
        return _weights(weight, z, self.expansion.terms)

    def _product(self, column: int, entries: npt.NDArray[np.int64], now: int) -> Any:
        """The product of the factors in a column of the steps after ``entries``."""
        product = np.ldexp(
            self.products[now, column] / self.products[entries, column],
            (
                self.products[now, column + _FACTORS]
                - self.products[entries, column + _FACTORS]
            ).astype(np.int32),
        )
        return np.where(entries < self.zeros[column], 0.0, product)

    def missed(self, entries: npt.NDArray[np.int64]) -> tuple[Float64Array, Float64Array]:
        """What rows of these entries have missed.

        Returns:
            The sums, ``(n, terms)``, and the factors of ``w``, ``m`` and ``u``, ``(n, 3)``.

        >>> history = History(0.5, 0.9, "float32", limit=10)
        >>> history.record(step_size=0.1, decay=1.0, beta_1=0.5, beta_2=0.9)
        >>> history.missed(np.array([0]))[1]
        array([[1. , 0.5, 0.9]])
        """
        factors = np.stack(
            [self._product(column, entries, self.steps) for column in range(_FACTORS)], 1
        )
        final = entries + self.window
        changing = final >= self.steps
        later = self._product(DECAY, np.where(changing, self.steps, final), self.steps)
        return self.sums[entries] * later[:, None], factors
