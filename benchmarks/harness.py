"""Runs cases: contestants by turns, medians of rounds, ratios taken round by round."""

import gc
import multiprocessing
import os
import time
import unittest.mock
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from .machine import available_memory
from .meters import SECONDS, CannotMeasureError, Meter
from .oracle import TOLERANCE, Rule
from .workloads import Array, Work

THREADS = 2

# A virtual machine maps memory that was new to it in larger pages some seconds after it was
# first used; until then random access to it takes up to three times as long.
SECONDS_FOR_MEMORY = 20.0

# The idle threads of one contestant (OpenMP's, TensorFlow's) spin for a while, on a core
# that the next one needs. Until they sleep the harness keeps all cores busy, as training
# would, since a core that slept starts slowly.
_SECONDS_TO_SETTLE = 0.01
_FILLER = bytes(8192)  # little, not to replace what the caches hold

Samples: TypeAlias = Mapping[str, Array]  # of each contestant, one for each round


class Entry(Protocol):
    """A contestant with its own copy of the parameters of a work, and its state."""

    def take(self, draw: Any) -> None:
        """Get ready for a step with what a stream drew. Not measured."""

    def step(self) -> None:
        """Take the step. Measured; returns when the parameters are updated."""

    def parameters(self) -> list[Array]: ...


@dataclass(frozen=True)
class Contestant:
    """Somebody to measure. ``rule`` is what it should compute, None to not compare."""

    name: str
    make: Callable[[Any], Entry]
    work: Work
    rule: Rule | None
    ours: bool = False
    meter: Meter = SECONDS


@dataclass(frozen=True)
class Statistics:
    median: float
    quartiles: tuple[float, float]
    most: float

    @classmethod
    def of(cls, numbers: Sequence[float] | Array) -> "Statistics":
        first, median, third, most = np.percentile(numbers, [25, 50, 75, 100]).tolist()
        return cls(median, (first, third), most)


@dataclass(frozen=True)
class Verdict:
    """What a bar asks for and what came out; ``unit`` is empty for a ratio."""

    text: str
    value: float
    quartiles: tuple[float, float]
    limit: float
    unit: str
    met: bool


class Bar(Protocol):
    def judge(self, samples: Samples) -> Verdict: ...


@dataclass(frozen=True)
class Faster:
    """``ours`` is at least ``times`` as fast as the fastest of ``peers``."""

    ours: str
    peers: tuple[str, ...]
    times: float

    def judge(self, samples: Samples) -> Verdict:
        peer = min(self.peers, key=lambda name: float(np.median(samples[name])))
        ratio = Statistics.of(samples[peer] / samples[self.ours])
        met = ratio.median >= self.times
        text = f"speed of {self.ours} relative to {peer}: at least {self.times:g}"
        return Verdict(text, ratio.median, ratio.quartiles, self.times, "", met)


@dataclass(frozen=True)
class CostsAtMost:
    """``contestant`` takes at most ``times`` as long as ``other``."""

    contestant: str
    other: str
    times: float

    def judge(self, samples: Samples) -> Verdict:
        ratio = Statistics.of(samples[self.contestant] / samples[self.other])
        met = ratio.median <= self.times
        text = f"time of {self.contestant} relative to {self.other}: at most {self.times:g}"
        return Verdict(text, ratio.median, ratio.quartiles, self.times, "", met)


@dataclass(frozen=True)
class Below:
    """The median of ``contestant``, or its ``worst`` sample, is at most ``limit``."""

    contestant: str
    limit: float
    meter: Meter = SECONDS
    worst: bool = False

    def judge(self, samples: Samples) -> Verdict:
        spread = Statistics.of(samples[self.contestant])
        value = spread.most if self.worst else spread.median
        limit = self.meter.format(self.limit)
        text = f"{self.meter.name} of {self.contestant}: at most {limit}"
        met = value <= self.limit
        return Verdict(text, value, spread.quartiles, self.limit, self.meter.unit, met)


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    contestants: tuple[Contestant, ...]
    bars: tuple[Bar, ...] = ()
    rounds: int = 15
    warm_ups: int = 2
    steps: int = 2  # of each contestant in a round; the first counts if it is the only one
    settle: float = 0.0  # seconds between the warm-ups and the rounds
    environment: Mapping[str, str] = field(default_factory=dict)  # of the process
    note: str = ""

    @property
    def memory(self) -> int:
        return sum(contestant.work.memory for contestant in self.contestants)

    def toy(self) -> "Case":
        small = tuple(replace(c, work=c.work.toy()) for c in self.contestants)
        return replace(self, contestants=small, rounds=2, settle=0.0)


@dataclass(frozen=True)
class Result:
    """``errors`` are in learning rates; a contestant without a rule has none."""

    case: Case
    samples: Samples
    errors: Mapping[str, float]

    def verdicts(self) -> list[Verdict]:
        return [bar.judge(self.samples) for bar in self.case.bars]

    def wrong(self) -> list[str]:
        """Those of ours whose answer is wrong; a NaN is wrong."""
        return [
            c.name
            for c in self.case.contestants
            if c.ours and c.name in self.errors and not self.errors[c.name] <= TOLERANCE
        ]

    def relative(self, contestant: Contestant) -> Statistics | None:
        """Time relative to ours on the same work."""
        for other in self.case.contestants:
            same = other.work == contestant.work and other.meter == contestant.meter
            if other.ours and same and other.meter == SECONDS:
                ratios = self.samples[contestant.name] / self.samples[other.name]
                return Statistics.of(ratios)
        return None


def run(case: Case) -> Result:
    """Run ``case`` in a process of its own, whose memory is free again afterwards."""
    available = available_memory()
    if available is not None and available < case.memory:
        needed, there = (f"{number / 2**30:.1f} GiB" for number in (case.memory, available))
        raise CannotMeasureError(f"needs {needed} of memory, {there} are available")
    spawn = multiprocessing.get_context("spawn")
    with (
        unittest.mock.patch.dict(os.environ, case.environment),
        ProcessPoolExecutor(1, mp_context=spawn) as executor,
    ):
        samples, errors = executor.submit(_measure, case).result()
    return Result(case, samples, errors)


def _measure(case: Case) -> tuple[Samples, Mapping[str, float]]:
    streams = {
        work: work.stream({c.rule for c in case.contestants if c.work == work and c.rule})
        for work in dict.fromkeys(c.work for c in case.contestants)
    }
    if not case.warm_ups:
        _load_and_compile(case.toy())
    entries = [contestant.make(contestant.work) for contestant in case.contestants]
    measures = [contestant.meter.start() for contestant in case.contestants]
    samples: dict[str, list[float]] = {c.name: [] for c in case.contestants}
    executor = ThreadPoolExecutor(THREADS)
    gc.freeze()
    gc.disable()
    for number in range(-case.warm_ups, case.rounds):
        if number == 0:
            time.sleep(case.settle)
        draws = {
            work: [stream.draw() for _ in range(case.steps)]
            for work, stream in streams.items()
        }
        gc.collect()
        for contestant, entry, measure in zip(
            case.contestants, entries, measures, strict=True
        ):
            # Steps follow one another in training: the caches hold the contestant's code
            # and data from its own last step, not from those of the others.
            measured = []
            for position, draw in enumerate(draws[contestant.work]):
                entry.take(draw)
                if position == 1:
                    _keep_cores_busy(executor, _SECONDS_TO_SETTLE)
                measured.append(measure(entry.step))
            if number >= 0:
                sample = np.median(measured[1:] or measured)
                samples[contestant.name].append(float(sample))
    errors = {
        c.name: streams[c.work].error(c.rule, entry.parameters())
        for c, entry in zip(case.contestants, entries, strict=True)
        if c.rule
    }
    return {name: np.array(numbers) for name, numbers in samples.items()}, errors


def _load_and_compile(toy: Case) -> None:
    for contestant in toy.contestants:
        entry, stream = contestant.make(contestant.work), contestant.work.stream(())
        entry.take(stream.draw())
        entry.step()


def _keep_cores_busy(executor: ThreadPoolExecutor, seconds: float) -> None:
    end = time.perf_counter() + seconds

    def task(_: int) -> None:
        while time.perf_counter() < end:
            zlib.crc32(_FILLER)  # without the GIL

    list(executor.map(task, range(THREADS)))
