"""Runs cases: hot and cold, by medians of interleaved rounds, in processes of their own."""

import gc
import multiprocessing
import os
import time
import unittest.mock
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import pages
from .bars import COLD, HOT, Bar, Samples, Statistics, Verdict
from .machine import available_memory
from .meters import SECONDS, CannotMeasureError, Meter
from .oracle import TOLERANCE, Rule
from .workloads import Entry, Work

THREADS = 2

# A virtual machine maps memory that was new to it in larger pages some seconds after it was
# first used; until then random access to it takes up to three times as long.
SECONDS_FOR_MEMORY = 20.0

_FILLER = bytes(8192)  # small enough to leave the caches as they are

_STEPS_TO_COUNT = 20  # of each contestant, for events such as page faults


@dataclass(frozen=True)
class Contestant:
    """What is measured. ``rule`` is what it should compute; None compares nothing."""

    name: str
    make: Callable[[Any], Entry]
    work: Work
    rule: Rule | None
    ours: bool = False
    meter: Meter = SECONDS


@dataclass(frozen=True)
class Case:
    """Contestants that are measured together, and the bars for them.

    Attributes:
        steps: of each contestant in a round, for each way; a sample is their median.
        ways: how the steps follow one another; without hot steps, where a step is a new
            process or memory is measured.
        settle: seconds between the warm-ups and the first round.
        pause: seconds between the steps of two contestants. The idle threads of one
            (OpenMP's, TensorFlow's) spin for a while, on a core that the next one needs.
            Until they sleep the harness keeps all cores busy, as the rest of a training
            loop does, since a core that slept starts slowly.
        environment: variables of the process.
        huge_pages: whether large arrays are in huge pages; None leaves it to the system and
            to each contestant.
        count_pages: count page faults and TLB misses after the rounds.
    """

    name: str
    title: str
    contestants: tuple[Contestant, ...]
    bars: tuple[Bar, ...] = ()
    rounds: int = 21
    warm_ups: int = 2
    steps: int = 5
    ways: tuple[str, ...] = (HOT, COLD)
    settle: float = 0.0
    pause: float = 0.01
    environment: Mapping[str, str] = field(default_factory=dict)
    huge_pages: bool | None = None
    count_pages: bool = False
    note: str = ""

    @property
    def memory(self) -> int:
        return sum(contestant.work.memory for contestant in self.contestants)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of the process, those for huge pages included."""
        return {**self.environment, **pages.VARIABLES[self.huge_pages]}

    def toy(self) -> "Case":
        small = tuple(replace(c, work=c.work.toy()) for c in self.contestants)
        counts: dict[str, Any] = {"rounds": 1, "warm_ups": 0, "steps": min(self.steps, 2)}
        return replace(self, contestants=small, settle=0.0, pause=0.0, **counts)


@dataclass(frozen=True)
class Result:
    """What was measured of a case.

    Attributes:
        samples: by way.
        errors: in learning rates; a contestant without a rule has none.
        counts: events per step of each contestant, where they are counted; None for an
            event that cannot be counted on this machine.
        in_huge_pages: the share of the process' memory, where pages are counted.
    """

    case: Case
    samples: Mapping[str, Samples]
    errors: Mapping[str, float]
    counts: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    in_huge_pages: float | None = None

    def verdicts(self) -> list[Verdict]:
        return [v for bar in self.case.bars for v in bar.verdicts(self.samples)]

    def wrong(self) -> list[str]:
        """Those of ours whose answer is wrong; a NaN is wrong."""
        return [
            c.name
            for c in self.case.contestants
            if c.ours and c.name in self.errors and not self.errors[c.name] <= TOLERANCE
        ]

    def relative(self, contestant: Contestant, way: str) -> Statistics | None:
        """Time relative to ours on the same work."""
        for other in self.case.contestants:
            same = other.work == contestant.work and other.meter == contestant.meter
            if other.ours and same and other.meter == SECONDS:
                samples = self.samples[way]
                return Statistics.of(samples[contestant.name] / samples[other.name])
        return None


@contextmanager
def new_process(variables: Mapping[str, str]) -> Iterator[Executor]:
    """A process with these environment variables, whose memory is free again afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with (
        unittest.mock.patch.dict(os.environ, variables),
        ProcessPoolExecutor(1, mp_context=spawn) as executor,
    ):
        yield executor


def run(case: Case, process: Executor) -> Result:
    """Measure ``case`` in ``process``, which has the variables of the case."""
    available = available_memory()
    if available is not None and available < case.memory:
        needed, there = (f"{number / 2**30:.1f} GiB" for number in (case.memory, available))
        raise CannotMeasureError(f"needs {needed} of memory, {there} are available")
    return Result(case, *process.submit(measure, case).result())


def measure(case: Case) -> tuple[Any, ...]:
    """Measure ``case`` in this process: what a :class:`Result` has beside the case."""
    pages.set_huge_pages(allowed=case.huge_pages is not False)
    run = _Run(case)
    samples: dict[str, dict[str, list[float]]] = {
        way: {c.name: [] for c in case.contestants} for way in case.ways
    }
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(-case.warm_ups, case.rounds):
            if number == 0:
                time.sleep(case.settle)
            for way in case.ways:
                times = run.hot() if way == HOT else run.cold()
                if number >= 0:
                    for c, measured in zip(case.contestants, times, strict=True):
                        samples[way][c.name].append(float(np.median(measured)))
            gc.collect()
        errors = run.errors()
        counts = run.count_pages() if case.count_pages else {}
        share = pages.share_of_huge_pages() if case.count_pages else None
        return _arrays(samples), errors, counts, share
    finally:
        gc.enable()
        gc.unfreeze()
        run.close()


def _arrays(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Samples]:
    return {
        way: {name: np.array(numbers) for name, numbers in of_way.items()}
        for way, of_way in samples.items()
    }


class _Run:
    """The contestants of a case with their data, and rounds of their steps."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._streams = {
            work: work.stream(
                {c.rule for c in case.contestants if c.work == work and c.rule}
            )
            for work in dict.fromkeys(c.work for c in case.contestants)
        }
        if any(c.meter != SECONDS for c in case.contestants):
            _load_code(case.toy())
        self._entries = [
            contestant.make(contestant.work) for contestant in case.contestants
        ]
        self._measures = [contestant.meter.start() for contestant in case.contestants]
        self._turns = deque(range(len(case.contestants)))
        self._fillers = ThreadPoolExecutor(THREADS)

    def close(self) -> None:
        self._fillers.shutdown()

    def hot(self) -> list[list[float]]:
        """Several steps of each contestant in a row. The first of them does not count."""
        draws = [self._draw() for _ in range(self._case.steps + 1)]
        return [
            [
                self._step(number, draw, pause=position == 1)
                for position, draw in enumerate(draws)
            ][1:]
            for number in range(len(self._entries))
        ]

    def cold(self) -> list[list[float]]:
        """One step of each contestant after the other, from each turn on another first."""
        times: list[list[float]] = [[] for _ in self._entries]
        for _ in range(self._case.steps):
            draw = self._draw()
            for number in self._turns:
                times[number].append(self._step(number, draw, pause=True))
            self._turns.rotate()
        return times

    def count_pages(self) -> dict[str, Mapping[str, float | None]]:
        """Events per step of each contestant, hot."""
        counts: dict[str, Mapping[str, float | None]] = {}
        for contestant, entry in zip(self._case.contestants, self._entries, strict=True):
            stream = self._streams[contestant.work]
            draws = [stream.draw() for _ in range(_STEPS_TO_COUNT)]
            counts[contestant.name] = pages.count_events(entry, draws)
        return counts

    def errors(self) -> dict[str, float]:
        return {
            c.name: self._streams[c.work].error(c.rule, entry.parameters())
            for c, entry in zip(self._case.contestants, self._entries, strict=True)
            if c.rule
        }

    def _draw(self) -> dict[Work, Any]:
        return {work: stream.draw() for work, stream in self._streams.items()}

    def _step(self, number: int, draw: Mapping[Work, Any], *, pause: bool) -> float:
        entry = self._entries[number]
        entry.take(draw[self._case.contestants[number].work])
        if pause:
            _keep_cores_busy(self._fillers, self._case.pause)
        return self._measures[number](entry.step)


def _load_code(toy: Case) -> None:
    """Load what a first step loads, whose memory is not the step's."""
    for contestant in toy.contestants:
        entry, stream = contestant.make(contestant.work), contestant.work.stream(())
        entry.take(stream.draw())
        entry.step()


def _keep_cores_busy(fillers: Executor, seconds: float) -> None:
    end = time.perf_counter() + seconds

    def fill(_: int) -> None:
        while time.perf_counter() < end:
            zlib.crc32(_FILLER)  # releases the GIL

    list(fillers.map(fill, range(THREADS)))
