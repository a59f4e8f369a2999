"""What a step works on: parameters, and a stream of gradients drawn outside the timer."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from .oracle import Rule, Trajectory

Array = npt.NDArray[Any]

_SEED = 20150507
_SAMPLE = 4096  # elements of each array, or rows, that are compared with the oracle


@dataclass(frozen=True, eq=False)
class Rows:
    """A sparse gradient: ``values[i]`` is for row ``ids[i]``; ids repeat."""

    ids: Array
    values: Array


Gradient: TypeAlias = Array | Rows


class Stream(Protocol):
    """The gradients of a run, one draw per step, the same for all who share the work."""

    def draw(self) -> Any:
        """Whatever the contestants of this work need for their next step."""

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        """How far ``parameters`` are from what ``rule`` makes of the gradients drawn."""


class Work(Protocol):
    """A frozen description, equal for contestants that share gradients."""

    @property
    def title(self) -> str: ...
    @property
    def memory(self) -> int:
        """The bytes that each contestant needs: parameters, two states, gradients."""

    def toy(self) -> Self:
        """The same at a size that takes no time."""

    def stream(self, rules: Iterable[Rule]) -> Stream: ...


@dataclass(frozen=True)
class Dense:
    """Float32 arrays, each with a gradient of its own shape."""

    arrays: int
    length: int

    @property
    def title(self) -> str:
        return f"{self.arrays} x {self.length:,} float32"

    @property
    def memory(self) -> int:
        return 4 * 4 * self.arrays * self.length

    def toy(self) -> Self:
        return replace(self, arrays=min(self.arrays, 5), length=min(self.length, 4096))

    def initial(self) -> list[Array]:
        """A fresh copy of the parameters, all of its memory touched."""
        block = _parameters(min(self.length, 1 << 16))
        return [np.resize(block, self.length) for _ in range(self.arrays)]

    def stream(self, rules: Iterable[Rule]) -> "_DenseStream":
        return _DenseStream(self, rules)


class _DenseStream:
    def __init__(self, work: Dense, rules: Iterable[Rule]) -> None:
        self._work = work
        self._random = np.random.default_rng(_SEED)
        w = self._sampled(work.initial())
        self._trajectories = {rule: Trajectory(rule, w) for rule in rules}

    def draw(self) -> list[Gradient]:
        shape = (self._work.arrays, self._work.length)
        gradients = self._random.standard_normal(shape, np.float32)
        for trajectory in self._trajectories.values():
            sample = self._sampled(gradients)
            trajectory.step(sample, np.full(sample.shape, True))
        return list(gradients)

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        return self._trajectories[rule].error(self._sampled(parameters))

    def _sampled(self, arrays: Iterable[Array]) -> Array:
        stride = max(1, self._work.length // _SAMPLE)
        return np.concatenate([array[::stride] for array in arrays])


ROWS = {"1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000}  # of tables


@dataclass(frozen=True)
class Sparse:
    """A float32 table and, for each step, new ids with one gradient row each."""

    rows: int
    ids: int = 4096
    width: int = 64
    zipf: bool = False

    @property
    def title(self) -> str:
        ids = "Zipf" if self.zipf else "uniform"
        return f"{self.ids:,} {ids} ids, {self.rows:,} x {self.width} float32"

    @property
    def memory(self) -> int:
        return 3 * self.table_bytes

    @property
    def table_bytes(self) -> int:
        return 4 * self.rows * self.width

    def toy(self) -> Self:
        return replace(self, rows=self.rows // 1000, ids=min(self.ids, 64))

    def initial(self) -> list[Array]:
        """A fresh copy of the table, all of its memory touched."""
        block = _parameters(min(self.rows, 1000) * self.width)
        return [np.resize(block, (self.rows, self.width))]

    def draw_ids(self, random: np.random.Generator) -> Array:
        """Ids of one step. Zipf: the k-th most frequent has a share of about 1 / k."""
        if not self.zipf:
            return random.integers(0, self.rows, self.ids)
        ranks = (self.rows ** random.random(self.ids)).astype(np.int64)
        return ranks * 2_654_435_761 % self.rows  # popular rows are not neighbours

    def stream(self, rules: Iterable[Rule]) -> "_SparseStream":
        return _SparseStream(self, rules)


class _SparseStream:
    def __init__(self, work: Sparse, rules: Iterable[Rule]) -> None:
        self._work = work
        self._random = np.random.default_rng(_SEED)
        # Compared are the rows of the first step and some that are most likely untouched.
        first = work.draw_ids(np.random.default_rng(_SEED))[:_SAMPLE]
        spread = np.linspace(0, work.rows - 1, 100).astype(np.int64)
        self._sample = np.union1d(first, spread)
        block = _parameters(min(work.rows, 1000) * work.width).reshape(-1, work.width)
        w = block[self._sample % len(block)]
        self._trajectories = {rule: Trajectory(rule, w) for rule in rules}

    def draw(self) -> list[Gradient]:
        ids = self._work.draw_ids(self._random)
        shape = (ids.size, self._work.width)
        values = self._random.standard_normal(shape, np.float32)
        place = np.searchsorted(self._sample, ids) % self._sample.size
        known = self._sample[place] == ids
        g = np.zeros((self._sample.size, self._work.width))
        np.add.at(g, place[known], values[known])
        touched = np.isin(self._sample, ids)
        for trajectory in self._trajectories.values():
            trajectory.step(g, touched)
        return [Rows(ids, values)]

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        (table,) = parameters
        return self._trajectories[rule].error(table[self._sample])


@dataclass(frozen=True)
class Epoch:
    """An epoch of a model that looks up ``ids`` rows for each of its examples."""

    rows: int
    width: int = 32
    ids: int = 16
    batch: int = 64
    batches: int = 20

    @property
    def title(self) -> str:
        return (
            f"{self.batches} batches of {self.batch}, {self.rows:,} x {self.width} float32"
        )

    @property
    def memory(self) -> int:
        return 4 * 4 * self.rows * self.width

    def toy(self) -> Self:
        return replace(self, rows=self.rows // 1000, batches=2)

    def stream(self, rules: Iterable[Rule]) -> "_Examples":
        return _Examples(self)


class _Examples:
    def __init__(self, work: Epoch) -> None:
        self._work = work
        self._random = np.random.default_rng(_SEED)

    def draw(self) -> tuple[Array, Array, int]:
        """Ids, targets and the size of a batch."""
        work, random = self._work, self._random
        count = work.batch * work.batches
        ids = random.integers(0, work.rows, (count, work.ids))
        return ids, random.random((count, 1)), work.batch

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        raise NotImplementedError("contestants draw their own initial parameters")


@dataclass(frozen=True)
class Startup:
    """A first step in a new process; every round has a new directory for compiled code."""

    memory: int = 0

    @property
    def title(self) -> str:
        return "interpreter start, import, first dense and first sparse step"

    def toy(self) -> Self:
        return self

    def stream(self, rules: Iterable[Rule]) -> "_CacheDirectories":
        return _CacheDirectories()


class _CacheDirectories:
    def __init__(self) -> None:
        self._parent = tempfile.TemporaryDirectory(prefix="adamax-benchmark-")

    def draw(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._parent.name))

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        raise NotImplementedError("the processes check their own answers")


def _parameters(count: int) -> Array:
    return 0.05 * np.random.default_rng(_SEED + 1).standard_normal(count, np.float32)
