"""What can be measured about a step: its time, or the memory it needs for itself."""

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


class CannotMeasureError(Exception):
    """Something cannot be measured here; the message says why."""


Measure: TypeAlias = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Meter:
    """``start()`` returns what measures the steps of one contestant."""

    name: str
    unit: str
    start: Callable[[], Measure] = field(compare=False)


def format_with_unit(number: float, unit: str) -> str:
    if unit == "B":
        return f"{number / 1e6:,.2f} MB"
    if unit == "s":
        return f"{number:.3g} s" if abs(number) >= 1 else f"{number * 1e3:.3g} ms"
    return f"{number:.3g}"


def _stopwatch() -> Measure:
    def measure(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return measure


class _GrowthOfPeak:
    """How far peak resident memory has risen above what there was before the first step.

    Not step by step: an allocator may keep what the first step needed.
    """

    _PROCESS = Path("/proc/self")

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise CannotMeasureError("peak memory can only be measured on Linux")
        self._before: int | None = None

    def __call__(self, step: Callable[[], None]) -> float:
        if self._before is None:
            # Memory that is free and still resident would hide growth.
            ctypes.CDLL(None).malloc_trim(0)
            (self._PROCESS / "clear_refs").write_text("5")  # resets the peak
            self._before = self._status("VmRSS")
        step()
        return float(self._status("VmHWM") - self._before)

    def _status(self, field: str) -> int:
        lines = (self._PROCESS / "status").read_text().splitlines()
        (kibibytes,) = (n.split()[1] for n in lines if n.startswith(f"{field}:"))
        return 1024 * int(kibibytes)


SECONDS = Meter("time", "s", _stopwatch)
GROWTH_OF_PEAK = Meter("growth of peak resident memory", "B", _GrowthOfPeak)
