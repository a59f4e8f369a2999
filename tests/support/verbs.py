"""Calling the verbs in tests: each implementation, and arrays with margins around them."""

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adamax._core import reference
from adamax._core.rule import Hyperparameters, Scalar, scalars_of
from cases import PRECISION, values
from compare import assert_same_bits

INF = math.inf


def native() -> Any:
    """The native core, or None where it was not built."""
    try:
        return importlib.import_module("adamax._native.verbs")
    except ModuleNotFoundError:
        return None


def instruction_sets() -> list[str]:
    """Those of the native core that this processor has."""
    core = native()
    found = []
    if core is not None:
        before = core.use_isa(None)
        for name in ("base", "avx2", "avx512"):
            try:
                found.append(core.use_isa(name))
            except ValueError:
                continue
        core.use_isa(before)
    return found


NATIVE = instruction_sets()
IMPLEMENTATIONS = (*NATIVE, "reference")


class Using:
    """An implementation of the verbs, with the loops of one instruction set."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Any:
        if self.name == "reference":
            return reference
        self._before = native().use_isa(None)
        native().use_isa(self.name)
        return native()

    def __exit__(self, *_: object) -> None:
        if self.name != "reference":
            native().use_isa(self._before)


def scalars(
    step_size: float = 0.01,
    decay: float = 1.0,
    scale: float = 1.0,
    coupled_decay: float = 0.0,
    **others: float,
) -> np.ndarray:
    """Of a step with the default betas; ``others`` by the names of :class:`Scalar`."""
    array = scalars_of(Hyperparameters(), step_size, decay, scale, coupled_decay)
    for name, value in others.items():
        array[Scalar[name.upper()]] = value
    return array


@dataclass
class Arrays:
    """w, m, u and g, each with a margin at both ends that must not be written."""

    w: np.ndarray
    m: np.ndarray
    u: np.ndarray
    g: np.ndarray
    margin: int = 9
    buffers: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in "wmug":
            setattr(self, name, self._framed(getattr(self, name)))

    def _framed(self, array: np.ndarray) -> np.ndarray:
        buffer = np.full(array.size + 2 * self.margin, 7, array.dtype)
        inside = buffer[self.margin : buffer.size - self.margin].reshape(array.shape)
        inside[...] = array
        self.buffers.append(buffer)
        return inside

    def copy(self) -> "Arrays":
        return Arrays(self.w, self.m, self.u, self.g)

    def assert_same(self, other: "Arrays", what: str = "") -> None:
        for name in "wmug":
            assert_same_bits(getattr(self, name), getattr(other, name), f"{name} {what}")
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            assert_same_bits(mine, theirs, f"margins {what}")


def arrays(
    rng: np.random.Generator, dtype: str, shape: Any, values_shape: Any = None
) -> Arrays:
    state = PRECISION[dtype].state
    return Arrays(
        w=values(rng, shape, dtype),
        m=values(rng, shape, "float32").astype(state),
        u=np.abs(values(rng, shape, "float32")).astype(state),
        g=values(rng, shape if values_shape is None else values_shape, dtype),
    )


def dense_problem(verbs: Any, several: Any, scalars_: Any, threads: int = 1) -> Any:
    columns = [[getattr(a, name) for a in several] for name in "wmug"]
    rows = np.atleast_2d(scalars_)
    return verbs.step(*columns, rows, None, (), (), INF, INF, threads)


def dense_step(verbs: Any, several: Any, scalars_: Any = None, threads: int = 1) -> None:
    scalars_ = scalars() if scalars_ is None else scalars_
    assert dense_problem(verbs, several, scalars_, threads) is None


def rows_problem(verbs: Any, table: Any, indices: Any, scalars_: Any, threads: int) -> Any:
    part = (table.w, table.m, table.u, indices, table.g, scalars_, None, None)
    none = np.zeros((1, len(Scalar)))
    return verbs.step((), (), (), (), none, None, [part], (), INF, INF, threads)


def rows_step(
    verbs: Any, table: Any, indices: Any, scalars_: Any = None, threads: int = 1
) -> None:
    scalars_ = scalars() if scalars_ is None else scalars_
    assert rows_problem(verbs, table, indices, scalars_, threads) is None


def norm(verbs: Any, gradient: Any, threads: int = 1) -> Any:
    """Of a dense gradient, as one row of a sparse one."""
    return verbs.norm(np.array([0]), gradient.reshape(1, -1), 1, threads)
