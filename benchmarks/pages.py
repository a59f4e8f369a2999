"""Huge pages on and off, and what memory pages cost: page faults and TLB misses."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .workloads import Entry

EVENTS = ("page-faults", "dTLB-load-misses", "dTLB-store-misses")

# The C library and NumPy ask for huge pages, or do not, from the start of a process on.
VARIABLES: dict[bool | None, dict[str, str]] = {
    None: {},
    True: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "NUMPY_MADVISE_HUGEPAGE": "1"},
    False: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "NUMPY_MADVISE_HUGEPAGE": "0"},
}

_PR_SET_THP_DISABLE = 41


def set_huge_pages(*, allowed: bool) -> None:
    """Allow or forbid huge pages for the memory that this process will allocate."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, int(not allowed), 0, 0, 0)


def share_of_huge_pages() -> float | None:
    """The share of this process' anonymous memory that is in huge pages, on Linux."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {fields[0]: int(fields[1]) for fields in map(str.split, lines)}
    return sizes["AnonHugePages:"] / max(1, sizes["Anonymous:"])


def count_events(entry: Entry, draws: Sequence[Any]) -> dict[str, float | None]:
    """The events per step, by ``perf stat``.

    Virtual machines often have no counters of TLB misses, and containers no perf. What
    cannot be counted is None.
    """
    counts: dict[str, float | None] = dict.fromkeys(EVENTS)
    if (program := shutil.which("perf")) is None:
        return counts
    (commands, tell), (told, answers) = os.pipe(), os.pipe()
    options = [f"--pid={os.getpid()}", f"--control=fd:{commands},{answers}", "--delay=-1"]
    perf = subprocess.Popen(
        [program, "stat", "--field-separator=,", f"--event={','.join(EVENTS)}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(commands, answers),
        text=True,
    )
    os.close(commands)
    os.close(answers)

    def command(text: bytes) -> None:
        with suppress(BrokenPipeError):  # perf has ended, since it may not count
            os.write(tell, text)
            os.read(told, 16)  # waits until it is done

    for draw in draws:
        entry.take(draw)
        command(b"enable\n")
        entry.step()
        command(b"disable\n")
    perf.send_signal(signal.SIGINT)  # perf writes the counts and ends
    for line in perf.communicate()[1].splitlines():
        number, _, event, *_ = [*line.split(","), "", ""]
        event = event.partition(":")[0]  # without a modifier, as for user space alone
        if event in counts and number.isdecimal():
            counts[event] = int(number) / len(draws)
    os.close(tell)
    os.close(told)
    return counts
