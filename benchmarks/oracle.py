"""The rules of the contestants in float64, written from their papers and documentation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Every contestant gets the same hyperparameters.
LEARNING_RATE = 1e-3
BETA_1 = 0.9
BETA_2 = 0.999
EPSILON = 1e-7

# How far a float32 contestant may be from its rule, in learning rates.
TOLERANCE = 1e-3

# Of w, m, u, g and t: w, m and u one step later.
Update: TypeAlias = Callable[[Array, Array, Array, Array, int], tuple[Array, Array, Array]]


def _adamax(w: Array, m: Array, u: Array, g: Array, t: int) -> tuple[Array, Array, Array]:
    m = BETA_1 * m + (1 - BETA_1) * g
    u = np.maximum(BETA_2 * u, abs(g))
    return w - LEARNING_RATE / (1 - BETA_1**t) * m / (u + EPSILON), m, u


def _adam(w: Array, m: Array, v: Array, g: Array, t: int) -> tuple[Array, Array, Array]:
    m = BETA_1 * m + (1 - BETA_1) * g
    v = BETA_2 * v + (1 - BETA_2) * g**2
    root = np.sqrt(v / (1 - BETA_2**t))
    return w - LEARNING_RATE * m / (1 - BETA_1**t) / (root + EPSILON), m, v


def _sparse_adam(
    w: Array, m: Array, v: Array, g: Array, t: int
) -> tuple[Array, Array, Array]:
    m = BETA_1 * m + (1 - BETA_1) * g
    v = BETA_2 * v + (1 - BETA_2) * g**2
    step_size = LEARNING_RATE * np.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
    return w - step_size * m / (np.sqrt(v) + EPSILON), m, v


def _move(w: Array, m: Array, u: Array, g: Array, t: int) -> tuple[Array, Array, Array]:
    return g, w.copy(), m.copy()


@dataclass(frozen=True)
class Rule:
    """What a contestant should compute. A lazy rule skips rows without a gradient."""

    update: Update
    lazy: bool = False


ADAMAX = Rule(_adamax)
LAZY_ADAMAX = Rule(_adamax, lazy=True)
ADAM = Rule(_adam)
SPARSE_ADAM = Rule(_sparse_adam, lazy=True)  # as torch: epsilon before bias correction
MOVE = Rule(_move)
MOVE_ROWS = Rule(_move, lazy=True)


class Trajectory:
    """Some elements of the parameters, moved by a rule."""

    def __init__(self, rule: Rule, w: Array) -> None:
        self._rule = rule
        self._state = (w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape))
        self._t = 0

    def step(self, g: Array, touched: Array) -> None:
        """Take a step; ``touched`` marks the elements (rows) that have a gradient."""
        self._t += 1
        moved = self._rule.update(*self._state, g.astype(np.float64), self._t)
        if self._rule.lazy:
            for old, new in zip(self._state, moved, strict=True):
                old[touched] = new[touched]
        else:
            self._state = moved

    def error(self, w: Array) -> float:
        """The largest deviation of ``w``, in learning rates; NaN if there is a NaN."""
        return float(np.max(abs(w - self._state[0]))) / LEARNING_RATE
