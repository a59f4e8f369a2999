"""What can be measured about a step: its time, or the memory it needs for itself."""

import ctypes
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias


class CannotMeasureError(Exception):
    """Something cannot be measured here; the message says why."""


Measure: TypeAlias = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Meter:
    """``start()`` gives what measures the steps of one contestant, from the first on."""

    name: str
    unit: str
    start: Callable[[], Measure]

    def format(self, number: float) -> str:
        return format_with_unit(number, self.unit)


def format_with_unit(number: float, unit: str) -> str:
    if unit == "B":
        return f"{number / 1e6:,.2f} MB"
    if unit == "s":
        return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
    return f"{number:.3g}"


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class _GrowthOfPeak:
    """How far resident memory has ever been above what it was before the first step.

    Not step by step: an allocator may keep what the first step needed.
    """

    _PROCESS = Path("/proc/self")

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise CannotMeasureError("peak memory can only be measured on Linux")
        self._before: int | None = None

    def __call__(self, step: Callable[[], None]) -> float:
        if self._before is None:
            ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would hide growth
            (self._PROCESS / "clear_refs").write_text("5")  # the peak so far is forgotten
            self._before = self._status("VmRSS")
        step()
        return float(self._status("VmHWM") - self._before)

    def _status(self, field: str) -> int:
        lines = (self._PROCESS / "status").read_text().splitlines()
        (kibibytes,) = (n.split()[1] for n in lines if n.startswith(f"{field}:"))
        return 1024 * int(kibibytes)


def _traced_peak(step: Callable[[], None]) -> float:
    """What ``step`` allocated through Python and NumPy, at its highest point."""
    tracemalloc.start()
    try:
        step()
        return float(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def _stateless(measure: Measure) -> Measure:
    return measure


SECONDS = Meter("time", "s", partial(_stateless, _seconds))
GROWTH_OF_PEAK = Meter("growth of peak resident memory", "B", _GrowthOfPeak)
TRACED_PEAK = Meter(
    "memory allocated through NumPy", "B", partial(_stateless, _traced_peak)
)
