"""Bars: the limits that the results of a case must reach, hot and cold."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from .meters import format_with_unit
from .oracle import Array

HOT, COLD = "hot", "cold"

Samples: TypeAlias = Mapping[str, Array]  # of each contestant, one number per round


@dataclass(frozen=True)
class Statistics:
    median: float
    quartiles: tuple[float, float]
    most: float

    @classmethod
    def of(cls, numbers: Array) -> "Statistics":
        first, median, third, most = np.percentile(numbers, [25, 50, 75, 100]).tolist()
        return cls(median, (first, third), most)


@dataclass(frozen=True)
class Verdict:
    """What a bar asks for, and what was measured; a ratio has no unit."""

    text: str
    way: str
    measured: Statistics
    unit: str
    met: bool


@dataclass(frozen=True)
class Bar:
    """A limit for a number that each round yields, hot, cold or both.

    Attributes:
        text: what the number is, with a place for each name.
        number: makes it of the samples of the contestant and of another.
        contestant: who is judged.
        others: whom it is compared with; the fastest of them counts.
        hot: the limit for hot steps, or None.
        cold: the limit for cold steps, or None.
        judged: makes of the numbers the one that is held against the limit.
    """

    text: str
    number: Callable[[Array, Array], Array]
    contestant: str
    others: tuple[str, ...] = ()
    hot: float | None = None
    cold: float | None = None
    unit: str = ""
    at_least: bool = False
    judged: Callable[[Array], Any] = np.median

    def verdicts(self, samples: Mapping[str, Samples]) -> list[Verdict]:
        limits = {HOT: self.hot, COLD: self.cold}
        return [
            self._verdict(way, limit, samples[way])
            for way, limit in limits.items()
            if limit is not None
        ]

    def _verdict(self, way: str, limit: float, samples: Samples) -> Verdict:
        others = self.others or (self.contestant,)
        other = min(others, key=lambda name: float(np.median(samples[name])))
        numbers = self.number(samples[self.contestant], samples[other])
        holds, most = (operator.ge, "least") if self.at_least else (operator.le, "most")
        what = self.text.format(self.contestant, other)
        text = f"{what}: at {most} {format_with_unit(limit, self.unit)}"
        met = bool(holds(self.judged(numbers), limit))
        return Verdict(text, way, Statistics.of(numbers), self.unit, met)


def _speed(time: Array, other: Array) -> Array:
    return other / time


def _itself(number: Array, _: Array) -> Array:
    return number


speed = partial(Bar, "speed of {} relative to {}", _speed, at_least=True)
relative_time = partial(Bar, "time of {} relative to {}", operator.truediv)
seconds_more = partial(Bar, "time of {} beyond {}", operator.sub, unit="s")
seconds = partial(Bar, "time of {}", _itself, unit="s")
most_memory = partial(Bar, "memory of {}", _itself, unit="B", judged=np.max)
