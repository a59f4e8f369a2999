"""The rule in float64 NumPy, written from the paper and slow on purpose.

Steps are numbered from 0, as learning-rate schedules count; the paper's ``t`` is one more.

Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1, with an
epsilon in the denominator, decoupled weight decay, clipping, and rows. Nothing of the
package is imported here: this is what the package is held against.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """A sparse gradient: row ``indices[i]`` of the table has the gradient ``values[i]``."""

    values: Any
    indices: Any


Gradient = Any  # an array, Rows, or None


@dataclass(frozen=True, kw_only=True)
class Rule:
    learning_rate: float | Callable[[int], float] = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    weight_decay: float = 0.0  # decoupled
    coupled_decay: float = 0.0  # L2 regularisation, added to the gradient after clipping
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None

    def learning_rate_at(self, number: int) -> float:
        if callable(self.learning_rate):
            return float(self.learning_rate(number))
        return float(self.learning_rate)

    def step_size(self, number: int) -> float:
        """``learning_rate / (1 - beta_1**t)``; the power is exact, so nothing cancels."""
        bias = float(1 - Fraction(self.beta_1) ** (number + 1))
        return self.learning_rate_at(number) / bias


@dataclass
class State:
    """A parameter, its first moment and its infinity norm."""

    w: np.ndarray
    m: np.ndarray
    u: np.ndarray

    @classmethod
    def of(cls, w: Any, m: Any = None, u: Any = None) -> "State":
        w = np.array(w).astype(np.float64)
        zero = np.zeros(w.shape)
        return cls(
            w,
            zero.copy() if m is None else np.array(m).astype(np.float64),
            zero.copy() if u is None else np.array(u).astype(np.float64),
        )


def step(
    rule: Rule, states: Sequence[State], gradients: Sequence[Gradient], number: int
) -> list[State]:
    """The states after the step of this 0-based number; those given are left alone."""
    summed = [_summed(gradient) for gradient in gradients]
    clipped = _clipped(rule, summed)
    return [
        _stepped(rule, state, gradient, number)
        for state, gradient in zip(states, clipped, strict=True)
    ]


def trajectory(
    rule: Rule, states: Sequence[State], gradients: Sequence[Sequence[Gradient]]
) -> list[State]:
    """The states after one step for each entry of ``gradients``."""
    states = list(states)
    for number, of_this_step in enumerate(gradients):
        states = step(rule, states, of_this_step, number)
    return states


def square_sum(gradient: Gradient) -> float:
    """Of a gradient whose repeated indices are summed first."""
    gradient = _summed(gradient)
    if gradient is None:
        return 0.0
    values = gradient.values if isinstance(gradient, Rows) else gradient
    return math.fsum(np.square(values).ravel().tolist())


def _summed(gradient: Gradient) -> Gradient:
    if gradient is None:
        return None
    if not isinstance(gradient, Rows):
        return np.array(gradient).astype(np.float64)
    sums: dict[int, np.ndarray] = {}
    values = np.array(gradient.values).astype(np.float64)
    for index, value in zip(np.array(gradient.indices).tolist(), values, strict=True):
        sums[index] = sums[index] + value if index in sums else value
    distinct = sorted(sums)
    rows = [sums[index] for index in distinct]
    return Rows(np.array(rows).reshape(len(rows), *values.shape[1:]), distinct)


def _clipped(rule: Rule, gradients: Sequence[Gradient]) -> list[Gradient]:
    if rule.clipvalue is not None:
        limit = rule.clipvalue
        return [
            _mapped(g, lambda values: np.clip(values, -limit, limit)) for g in gradients
        ]
    square_sums = [square_sum(gradient) for gradient in gradients]
    if rule.global_clipnorm is not None:
        square_sums = [math.fsum(square_sums)] * len(gradients)
    limit = rule.clipnorm if rule.global_clipnorm is None else rule.global_clipnorm
    if limit is None:
        return list(gradients)
    norms = [math.sqrt(square_sum) for square_sum in square_sums]
    return [
        _mapped(g, lambda v, norm=norm: v * limit / norm) if norm > limit else g
        for g, norm in zip(gradients, norms, strict=True)
    ]


def _mapped(gradient: Gradient, function: Callable[[np.ndarray], np.ndarray]) -> Gradient:
    if gradient is None:
        return None
    if isinstance(gradient, Rows):
        return Rows(function(gradient.values), gradient.indices)
    return function(gradient)


def _stepped(rule: Rule, state: State, gradient: Gradient, number: int) -> State:
    new = State(state.w.copy(), state.m.copy(), state.u.copy())
    if gradient is None:
        return new
    at, g = ..., gradient
    if isinstance(gradient, Rows):
        g, at = gradient.values, np.array(gradient.indices, np.int64)
    if rule.coupled_decay:
        g = g + rule.coupled_decay * state.w[at]
    decay = 1 - rule.learning_rate_at(number) * rule.weight_decay
    new.m[at] = rule.beta_1 * state.m[at] + (1 - rule.beta_1) * g
    new.u[at] = np.maximum(rule.beta_2 * state.u[at], np.abs(g))
    denominator = new.u[at] + rule.epsilon
    moves = denominator != 0  # else only gradients of zero have been seen
    quotient = np.divide(new.m[at], denominator, where=moves, out=np.zeros_like(new.m[at]))
    new.w[at] = decay * state.w[at] - rule.step_size(number) * quotient
    return new
