"""Cases as data, and the one table of tolerances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# --- Dtypes and tolerances ----------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """How exact one operation on a parameter of some dtype is."""

    dtype: np.dtype
    state: np.dtype  # of m, u and the arithmetic

    @property
    def roundoff(self) -> float:
        """The largest relative error of one operation."""
        return float(np.finfo(self.state).epsneg)

    @property
    def smallest(self) -> float:
        return float(np.finfo(self.state).smallest_subnormal)


PRECISION = {
    "float32": Precision(np.dtype(np.float32), np.dtype(np.float32)),
    "float64": Precision(np.dtype(np.float64), np.dtype(np.float64)),
    "float16": Precision(np.dtype(np.float16), np.dtype(np.float32)),
    "bfloat16": Precision(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
}
DTYPES = tuple(PRECISION)

# A tolerance is this many roundings of the largest term that an element of m, u or w is
# made of in one step. The path from the inputs to w is: c = 1 - beta_1, the scale and the
# scaled gradient (3), g - m, c * (g - m), m + c * (g - m) (3); beta_2, beta_2 * u and
# u + epsilon (3); the quotient, the step size and their product (3); the decay, its
# product with w and the difference (3). That is 15, and the oracle's own path in float64,
# which counts where the package also computes in float64, is 9 long. Nothing is added for
# luck, and nothing that fails is let off.
ROUNDINGS = 24

# --- Dense --------------------------------------------------------------------------------

SHAPES = {
    "0-d": (),
    "one": (1,),
    "empty": (0,),
    "empty matrix": (3, 0),
    "vector": (37,),
    "matrix": (5, 9),
    "4-d": (2, 3, 1, 5),
}
# Enough for several threads and for a last piece of work that is not full.
LARGE = (601, 503)

# Hyperparameters as front ends and the oracle take them.
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "learning rate": {"learning_rate": 0.1},
    "no learning": {"learning_rate": 0.0},
    "schedule": {"learning_rate": lambda step: 0.1 / (1 + step)},
    "no memory": {"beta_1": 0.0, "beta_2": 0.0},
    "long memory": {"beta_1": 0.999, "beta_2": 0.99999},
    "short norm": {"beta_1": 0.95, "beta_2": 0.5},
    "large epsilon": {"epsilon": 0.5, "learning_rate": 0.1},
    "smallest epsilon": {"epsilon": 2.0**-126},
    "no epsilon": {"epsilon": 0.0},
    "weight decay": {"learning_rate": 0.1, "weight_decay": 0.3},
    "scheduled decay": {"learning_rate": lambda step: 0.2**step, "weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.7},
    "clipnorm not reached": {"clipnorm": 1e9},
    "clipvalue": {"clipvalue": 0.05},
    "global_clipnorm": {"global_clipnorm": 1.3},
    "clipnorm and decay": {"clipnorm": 0.7, "weight_decay": 0.01, "learning_rate": 0.01},
}


def values(rng: np.random.Generator, shape: Any, dtype: str) -> np.ndarray:
    """Numbers of both signs between about 1e-4 and 1e2, with some zeros."""
    numbers = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, size=shape)
    numbers = np.where(rng.random(shape) < 0.05, 0.0, numbers)
    return np.asarray(numbers).astype(PRECISION[dtype].dtype)


# --- Rows ---------------------------------------------------------------------------------

TABLES = {
    "vector": (40,),
    "column": (40, 1),
    "rows": (40, 7),
    "rows of matrices": (40, 3, 2),
    "rows of nothing": (40, 0),
}
LARGE_TABLE = (3001, 65)

# How a batch may address the rows of a table.
PATTERNS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "none": lambda rng, rows: np.zeros(0, np.int64),
    "one": lambda rng, rows: rng.integers(rows, size=1),
    "first and last": lambda rng, rows: np.array([rows - 1, 0]),
    "distinct": lambda rng, rows: rng.permutation(rows)[: rows // 2],
    "ascending": lambda rng, rows: np.arange(0, rows, 3),
    "descending": lambda rng, rows: np.arange(rows)[::-1],
    "every": lambda rng, rows: rng.permutation(rows),
    "repeated": lambda rng, rows: rng.integers(rows, size=2 * rows),
    "repeated and ascending": lambda rng, rows: np.sort(rng.integers(rows, size=rows)),
    "all the same": lambda rng, rows: np.full(rows, rows // 2),
}
