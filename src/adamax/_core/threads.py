"""How many threads the verbs may use."""

import functools
import os
from pathlib import Path

_MOST_THREADS = 256
_CGROUPS = Path("/sys/fs/cgroup")

_num_threads: int | None = None


def get_num_threads() -> int:
    """The number of threads that one step of a NumPy optimizer may use.

    What :func:`set_num_threads` was given, else ``OMP_NUM_THREADS``, else the number of
    CPUs that this process may use, by its affinity and the CPU quota of its container.
    The other front ends use as many threads as their framework does.
    """
    return _default_num_threads() if _num_threads is None else _num_threads


@functools.cache
def _default_num_threads() -> int:
    from_environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if from_environment.isdecimal() and int(from_environment) > 0:
        return min(int(from_environment), _MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return max(1, min(cpus, _cpu_quota(), _MOST_THREADS))


def _cpu_quota() -> int:
    """The CPUs that a container may use, rounded up, by version 2 of Linux' cgroups."""
    quota = _MOST_THREADS
    for folder in (_own_cgroup(), *_own_cgroup().parents):
        try:
            microseconds, period = (folder / "cpu.max").read_text().split()
            quota = min(quota, -(-int(microseconds) // int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no such file, or "max": no limit
    return quota


def _own_cgroup() -> Path:
    """The folder of this process' cgroup, or of the root where it cannot be seen."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("0::/"):
            return _CGROUPS / line.removeprefix("0::/")
    return _CGROUPS


def set_num_threads(num_threads: int) -> None:
    """Let one step of a NumPy optimizer use up to ``num_threads`` threads.

    PyTorch has its own setting, ``torch.set_num_threads``, and so have TensorFlow and JAX.

    Raises:
        TypeError: ``num_threads`` is not an int.
        ValueError: it is less than 1 or more than 256.

    >>> import adamax
    >>> adamax.set_num_threads(2)
    >>> adamax.get_num_threads()
    2
    """
    global _num_threads
    if not isinstance(num_threads, int) or isinstance(num_threads, bool):
        raise TypeError(f"num_threads must be an int, got {num_threads!r}")
    if not 1 <= num_threads <= _MOST_THREADS:
        raise ValueError(f"num_threads must be in [1, {_MOST_THREADS}], got {num_threads}")
    _num_threads = num_threads
