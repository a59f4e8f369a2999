"""What the tests of ``sparse="exact"`` share: runs, and the dense rule on a whole table."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

EPSILON = 1e-7

# What the bar asks for, relative to the largest parameter.
FLOAT64 = 1e-12


@dataclass
class Dense:
    """The dense rule on a whole table, in more digits than the dtype that is tested has."""

    w: np.ndarray
    beta_1: float
    beta_2: float
    weight_decay: float = 0.0
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        wide = np.longdouble if self.w.dtype == np.float64 else np.float64
        self.w = self.w.astype(wide)
        self.m, self.u = np.zeros_like(self.w), np.zeros_like(self.w)
        self.steps = 0

    def step(self, g: Any, learning_rate: float) -> None:
        self.steps += 1
        bias = -math.expm1(self.steps * math.log(self.beta_1)) if self.beta_1 else 1.0
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * np.asarray(g, self.w.dtype)
        self.u = np.maximum(self.beta_2 * self.u, np.abs(g))
        self.w = (1 - learning_rate * self.weight_decay) * self.w
        self.w -= learning_rate / bias * self.m / (self.u + self.epsilon)


@dataclass(frozen=True)
class Run:
    """A drawn configuration: Zipf ids, gradients of one scale, warm-up and cosine."""

    seed: int
    dtype: str
    steps: int
    beta_1: float
    beta_2: float
    weight_decay: float
    scale: float
    peak: float
    warm_up: int
    rows: int = 2000
    width: int = 2
    ids: int = 20

    def learning_rate(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak * min((step + 1) / self.warm_up, 1.0) * cosine

    def table(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        return (0.05 * rng.normal(size=(self.rows, self.width))).astype(self.dtype)

    def gradients(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and values, for each step."""
        rng = np.random.default_rng(self.seed + 1)
        share = 1 / np.arange(1, self.rows + 1)
        share /= share.sum()
        for _ in range(self.steps):
            ids = rng.choice(self.rows, self.ids, p=share)
            values = self.scale * rng.normal(size=(self.ids, self.width))
            yield ids, values.astype(self.dtype)

    def densified(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        dense = np.zeros((self.rows, self.width), self.dtype)
        np.add.at(dense, ids, values)
        return dense

    def oracle(self) -> Dense:
        return Dense(self.table(), self.beta_1, self.beta_2, self.weight_decay)


def drawn(seed: int, dtype: str = "float32", steps: int = 3000) -> Run:
    rng = np.random.default_rng(seed)
    pick: Callable[..., float] = lambda *choices: float(rng.choice(choices))  # noqa: E731
    beta_1 = pick(0.8, 0.9, 0.95)
    wide = dtype == "float64"
    return Run(
        seed=seed,
        dtype=dtype,
        steps=steps,
        beta_1=beta_1,
        beta_2=pick(0.999, 0.9995) if wide else pick(0.99, 0.995, 0.999, 0.9999),
        weight_decay=(0.0, 0.1)[seed % 2],
        scale=10.0 ** rng.uniform(-8, 3),
        peak=10.0 ** rng.uniform(-4, -1),
        warm_up=int(rng.integers(1, 500)),
    )
