"""A table larger than memory: parameters and Adamax' state in memory-mapped files.

    python examples/larger_than_memory.py
    python examples/larger_than_memory.py --rows 4000000 --width 64 --ids 512

Embedding tables are often larger than anything else in a model, and an optimizer with two
states per parameter makes them three times as large. With `np.memmap` parameters and
`Adamax(state_dir=...)` all of that lies in files, of which the operating system keeps in
memory what is in use. A sparse step reads and writes the touched rows only.

To show it, a process trains such a table under an imposed memory limit that is several
times smaller. Some of its rows are trained once more in ordinary memory and must come out
the same, bit for bit. Then a process tries to train the whole table in ordinary memory
under the same limit, and fails. Linux only, because of the limit.
"""

import argparse
import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adamax import Adamax, IndexedSlices

Array = npt.NDArray[Any]

LEARNING_RATE = 0.05
CHECKED_ROWS = 64
MIB = 2**20


class CannotRunError(Exception):
    """The example cannot run here; the message is one line that says why."""


# --- Training --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Every row of a table learns a vector of its own; some rows are met more often."""

    rows: int
    width: int
    ids: int  # rows of one step, with repeats
    steps: int

    @property
    def table_bytes(self) -> int:
        return 4 * self.rows * self.width

    def draw_ids(self, random: np.random.Generator) -> Array:
        """The k-th most popular row is drawn about 1/k as often as the first."""
        popularity = (self.rows ** random.random(self.ids)).astype(np.int64)
        return popularity * 2_654_435_761 % self.rows  # spread over the table

    def gradient(self, vectors: Array, ids: Array) -> Array:
        """Of half the squared distance between the rows and what they should learn."""
        phases = ids[:, np.newaxis] + np.arange(self.width)
        return vectors - np.sin(phases).astype(np.float32)


def train(task: Task, directory: Path | None) -> dict[str, Any]:
    """Train the table in files of ``directory``, or in ordinary memory if it is None."""
    shape = (task.rows, task.width)
    table: Array
    if directory is None:
        table = np.zeros(shape, np.float32)
        optimizer = Adamax(LEARNING_RATE)
    else:
        # A new file reads as zeros, and takes up disk only where it is written.
        table = np.memmap(directory / "table", np.float32, mode="w+", shape=shape)
        optimizer = Adamax(LEARNING_RATE, state_dir=directory / "state")
        optimizer.build([table])
        for array in (table, *optimizer.state_dict().values()):
            read_no_further(array)

    random = np.random.default_rng(0)
    check = Check(task)
    losses, most_anonymous = [], 0
    start = time.perf_counter()
    for _ in range(task.steps):
        ids = task.draw_ids(random)
        gradient = task.gradient(table[ids], ids)
        optimizer.apply_gradients([(IndexedSlices(gradient, ids), table)])
        check.step(ids)
        losses.append(float(np.mean(gradient**2)) / 2)
        most_anonymous = max(most_anonymous, resident("RssAnon"))
    part = max(1, task.steps // 10)
    return {
        "seconds": time.perf_counter() - start,
        "first_loss": float(np.mean(losses[:part])),
        "last_loss": float(np.mean(losses[-part:])),
        "rows_checked": check.rows.size,
        "rows_agree": check.agrees(table),
        "most_anonymous": most_anonymous,
        "most_resident": resident("VmHWM"),
    }


def read_no_further(array: Array) -> None:
    """Tell the system not to read the neighbours of a row too: they are rarely next."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_RANDOM)


class Check:
    """Some rows, trained in ordinary memory beside the table."""

    def __init__(self, task: Task) -> None:
        self._task = task
        drawn = task.draw_ids(np.random.default_rng(0))
        self.rows = np.unique(drawn[:CHECKED_ROWS])
        self._table = np.zeros((self.rows.size, task.width), np.float32)
        self._optimizer = Adamax(LEARNING_RATE)

    def step(self, ids: Array) -> None:
        ids = ids[np.isin(ids, self.rows)]
        places = np.searchsorted(self.rows, ids)
        gradient = self._task.gradient(self._table[places], ids)
        self._optimizer.apply_gradients([(IndexedSlices(gradient, places), self._table)])

    def agrees(self, table: Array) -> bool:
        return bool(np.array_equal(table[self.rows], self._table) and self._table.any())


def resident(field: str) -> int:
    """Resident memory of this process: ``VmHWM`` the most so far, ``RssAnon`` anonymous."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise CannotRunError(f"/proc/self/status has no {field}: needs Linux 4.5 or later")


# --- The limit -------------------------------------------------------------------------
#
# RLIMIT_DATA limits anonymous memory, which only swap could relieve, and leaves mappings of
# files alone, whose pages the system can write back and drop at any time. RLIMIT_AS would
# count the files too, at their full size. A memory cgroup is stricter than either: it
# counts what is resident, pages of files included, so the system must keep dropping them.
# Making one takes rights that not everybody has; then RLIMIT_DATA is all there is.


@dataclass(frozen=True)
class Group:
    """A memory cgroup."""

    path: Path
    version: int

    @property
    def limit(self) -> Path:
        return self.path / ("memory.limit_in_bytes" if self.version == 1 else "memory.max")

    @property
    def peak(self) -> Path:
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return self.path / name


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Group | None]:
    """A new cgroup with this limit, inside the one we are in; None if it cannot be made."""
    for group in possible_groups():
        try:
            group.path.mkdir()
        except OSError:
            continue
        try:
            group.limit.write_text(str(limit))
        except OSError:  # the controller is not enabled here
            group.path.rmdir()
            continue
        try:
            yield group
        finally:
            remove(group)
        return
    yield None


def possible_groups() -> Iterator[Group]:
    mount, name = Path("/sys/fs/cgroup"), f"larger-than-memory-{os.getpid()}"
    own = {}  # cgroups of this process by controllers; those of version 2 have none
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    if "memory" in own:
        yield Group(mount / "memory" / own["memory"] / name, version=1)
    elif "" in own:
        yield Group(mount / own[""] / name, version=2)
        # A group that has processes cannot pass its controllers on, so one beside it.
        yield Group(mount / Path(own[""]).parent / name, version=2)


def remove(group: Group) -> None:
    for _ in range(300):  # it is busy until the last of its processes has ended
        try:
            group.path.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    print(f"could not remove the empty cgroup {group.path}", file=sys.stderr)


@dataclass(frozen=True)
class Outcome:
    """What a limited process reported, and how it was limited."""

    report: dict[str, Any]
    limit: str
    peak: int | None  # of the cgroup, if there was one


def train_under_limit(task: Task, directory: Path | None, limit: int) -> Outcome:
    """:func:`train` in a process of its own, limited from its very start."""
    script = f'ulimit -d {limit // 1024} && exec "$@"'  # of the shell, then of Python
    kind, peak = "RLIMIT_DATA (anonymous memory; no memory cgroup can be made)", None
    with memory_group(limit) as group:
        if group is not None:
            script = f"echo $$ > {group.path}/cgroup.procs && {script}"
            kind = f"memory cgroup (v{group.version}, page cache included) and RLIMIT_DATA"
        report = output_of(["sh", "-c", script, "sh"], task, directory)
        if group is not None and group.peak.exists():
            peak = int(group.peak.read_text())
    return Outcome(report, kind, peak)


def output_of(prefix: Sequence[str], task: Task, directory: Path | None) -> dict[str, Any]:
    work = json.dumps([vars(task), None if directory is None else str(directory)])
    command = [*prefix, sys.executable, __file__, "--train", work]
    # OpenBLAS, which is not used here, would reserve memory for every core.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode == -9:
        raise CannotRunError("killed at the limit; a larger --limit may help")
    if child.returncode != 0:
        lines = child.stderr.splitlines() or [f"exit status {child.returncode}"]
        raise CannotRunError(f"the training failed; is --limit too small? {lines[-1]}")
    report: dict[str, Any] = json.loads(child.stdout)
    return report


def train_and_report(work: str) -> None:
    """What the limited process does."""
    task, directory = json.loads(work)
    try:
        report = train(Task(**task), directory and Path(directory))
    except MemoryError as error:
        report = {"memory_error": str(error)}
    print(json.dumps(report))


# --- The demonstration -----------------------------------------------------------------


def demonstrate(task: Task, limit: int, parent: Path) -> bool:
    """Print what happens; whether it is what should."""
    if task.table_bytes <= limit:
        raise CannotRunError(
            f"the table ({megabytes(task.table_bytes)}) is not larger than the limit "
            f"({megabytes(limit)}): choose more --rows or a smaller --limit"
        )
    needed, free = 3 * task.table_bytes, shutil.disk_usage(parent).free
    if needed > free:
        raise CannotRunError(
            f"may need {megabytes(needed)} in {parent}, where {megabytes(free)} are free: "
            f"choose fewer --rows or another --directory"
        )
    print(
        f"table    {task.rows:,} rows of {task.width} float32: "
        f"{megabytes(task.table_bytes)}, with state {megabytes(needed)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=parent, prefix="larger-than-memory-") as name:
        outcome = train_under_limit(task, Path(name), limit)
        size, used = disk_use(Path(name))
    report = outcome.report
    if "memory_error" in report:
        raise CannotRunError(f"--limit is too small: {report['memory_error']}")
    equal = "equal" if report["rows_agree"] else "NOT EQUAL"
    peak = f"{megabytes(outcome.peak)} in the cgroup, " if outcome.peak else ""
    print(
        f"limit    {megabytes(limit)}, {needed / limit:.1f} times smaller, by "
        f"{outcome.limit}\n"
        f"trained  {task.steps} steps of {task.ids} rows in {report['seconds']:.1f} s, "
        f"loss {report['first_loss']:.3f} to {report['last_loss']:.3f}\n"
        f"checked  {report['rows_checked']} rows {equal}, bit for bit, to the same rows "
        f"in ordinary memory\n"
        f"memory   at most {peak}{megabytes(report['most_resident'])} resident with "
        f"shared libraries, {megabytes(report['most_anonymous'])} anonymous\n"
        f"disk     files of {megabytes(size)}, of which {megabytes(used)} took up space",
        flush=True,
    )
    failure = train_under_limit(task, None, limit).report.get("memory_error")
    result = f"MemoryError: {failure}" if failure else "it worked, which it should not"
    print(f"without  files, in ordinary memory under the same limit: {result}")
    return report["rows_agree"] and failure is not None


def disk_use(directory: Path) -> tuple[int, int]:
    """The size of the files, and of what they really take up."""
    found = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(s.st_size for s in found), sum(512 * s.st_blocks for s in found)


def megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a table that is larger than the memory it may use."
    )
    parser.add_argument("--rows", type=positive, default=64_000, help="of the table")
    parser.add_argument("--width", type=positive, default=4096, help="of a row")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument(
        "--ids", type=positive, default=96, help="rows that one step touches"
    )
    parser.add_argument(
        "--limit", type=positive, default=256, metavar="MIB", help="on memory, in MiB"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),  # unlike /tmp it is hardly ever kept in memory
        help="on a disk, where a temporary directory is made (default: %(default)s)",
    )
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        train_and_report(options.train)
        return 0
    try:
        if sys.platform != "linux":
            raise CannotRunError(
                "needs Linux, where the memory of a process can be limited"
            )
        task = Task(options.rows, options.width, options.ids, options.steps)
        return 0 if demonstrate(task, options.limit * MIB, options.directory) else 1
    except (CannotRunError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
