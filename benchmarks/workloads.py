"""What a step works on: parameters, and gradients, which are drawn untimed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from .oracle import Array, Rule, Trajectory

_SEED = 20150507
_SAMPLE = 4096  # elements of each array, or rows, that are compared with the oracle


@dataclass(frozen=True, eq=False)
class Rows:
    """A sparse gradient: ``values[i]`` is for row ``ids[i]``; ids repeat."""

    ids: Array
    values: Array


Gradient: TypeAlias = Array | Rows


class Stream(Protocol):
    """The gradients of a run, one draw per step, the same for all that share the work."""

    def draw(self) -> Any:
        """What the contestants of this work need for their next step."""

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        """How far ``parameters`` are from what ``rule`` makes of the gradients drawn."""


class Work(Protocol):
    """A frozen description, equal for the contestants that share gradients."""

    @property
    def memory(self) -> int:
        """The bytes that each contestant needs: parameters, state and gradients."""

    def toy(self) -> Self:
        """The same work at a size that takes no time."""

    def stream(self, rules: Iterable[Rule]) -> Stream: ...


class Entry(Protocol):
    """A contestant with its own copy of the parameters of a work, and its state."""

    def take(self, draw: Any) -> None:
        """Get ready for a step with what a stream drew. Not measured."""

    def step(self) -> None:
        """Take the step. Measured; returns when the parameters are updated."""

    def parameters(self) -> list[Array]: ...


@dataclass(frozen=True)
class Dense:
    """Float32 arrays, each with a gradient of its own shape."""

    arrays: int
    length: int

    @property
    def memory(self) -> int:
        return 4 * 4 * self.arrays * self.length

    def toy(self) -> Self:
        return replace(self, arrays=min(self.arrays, 5), length=min(self.length, 4096))

    def initial(self) -> list[Array]:
        """A new copy of the parameters, all of its memory touched."""
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


@dataclass(frozen=True)
class Sparse:
    """A float32 table and, for each step, a number of ids with one gradient row each.

    ``ids`` are "uniform" or "zipf": the k-th most frequent has a share of about 1 / k.
    """

    rows: int
    ids: str = "uniform"
    number: int = 4096
    width: int = 64

    @property
    def memory(self) -> int:
        return 3 * self.table_bytes

    @property
    def table_bytes(self) -> int:
        return 4 * self.rows * self.width

    def toy(self) -> Self:
        return replace(self, rows=max(100, self.rows // 1000), number=min(self.number, 64))

    def initial(self) -> list[Array]:
        """A new copy of the table, all of its memory touched."""
        block = _parameters(min(self.rows, 1000) * self.width)
        return [np.resize(block, (self.rows, self.width))]

    def draw_ids(self, random: np.random.Generator) -> Array:
        """The ids of one step."""
        if self.ids == "uniform":
            return random.integers(0, self.rows, self.number)
        ranks = (self.rows ** random.random(self.number)).astype(np.int64)
        return ranks * 2_654_435_761 % self.rows  # popular rows are not neighbours

    def stream(self, rules: Iterable[Rule]) -> "_SparseStream":
        return _SparseStream(self, rules)


class _SparseStream:
    def __init__(self, work: Sparse, rules: Iterable[Rule]) -> None:
        self._work = work
        self._random = np.random.default_rng(_SEED)
        # Compares the rows of the first step, and some that are most likely untouched.
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
class NewProcess:
    """A program that checks its own answer; there is nothing to draw."""

    memory: int = 0

    def toy(self) -> Self:
        return self

    def stream(self, rules: Iterable[Rule]) -> "NewProcess":
        return self

    def draw(self) -> None:
        return None

    def error(self, rule: Rule, parameters: Sequence[Array]) -> float:
        raise NotImplementedError("programs check their own answers")


def _parameters(count: int) -> Array:
    return 0.05 * np.random.default_rng(_SEED + 1).standard_normal(count, np.float32)
