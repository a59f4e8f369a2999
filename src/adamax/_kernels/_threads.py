"""How many threads a kernel may use, and running one on them.

A pool of plain threads that call compiled code with the GIL released, rather than Numba's
parallel back ends: those abort the process when two threads enter them at once
(workqueue) or after a fork (GNU OpenMP), and bring a second OpenMP beside the host's.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_MOST_THREADS = 256
_SECONDS_BETWEEN_LOOKS = 1e-5

_num_threads: int | None = None
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def get_num_threads() -> int:
    """The number of threads one optimizer step may use.

    What :func:`set_num_threads` was given, else ``OMP_NUM_THREADS``, else the number of
    CPUs this process may run on.
    """
    if _num_threads is not None:
        return _num_threads
    from_environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if from_environment.isdecimal() and int(from_environment) > 0:
        return min(int(from_environment), _MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    return min(os.cpu_count() or 1, _MOST_THREADS)


def set_num_threads(num_threads: int) -> None:
    """Let one optimizer step use up to ``num_threads`` threads from now on.

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


def run(task: Callable[[], None], threads: int) -> None:
    """Call ``task`` in up to ``threads`` threads, the caller's included, and wait for all.

    ``task`` takes pieces of the work from a shared counter until none are left, so a
    thread that starts late, or never, costs nothing but its share. The caller may be
    interrupted; threads that have begun are waited for all the same, since they write to
    memory that the caller may free next.
    """
    if threads <= 1:
        task()
        return
    job = _Job(task)
    try:
        try:
            _call_helpers(job, threads - 1)
            task()
        finally:
            job.close()
    finally:
        job.close()  # again, since an interrupt may have come between


def _call_helpers(job: "_Job", count: int) -> None:
    try:
        pool = _shared_pool()
        for _ in range(count):
            pool.submit(job.help)
    except RuntimeError:
        # The interpreter is shutting down or no thread can be started: the caller's own
        # thread does all of the work.
        pass


class _Job:
    """A task that helpers may join until its owner closes it."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task = task
        # A plain lock: an interrupt inside a Condition could leave it locked for good.
        self._lock = threading.Lock()
        self._running = 0
        self._closed = False
        self._error: BaseException | None = None

    def help(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._running += 1
        try:
            self._task()
        except BaseException as error:
            self._error = error
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """Let no more helpers join, and wait for those that have."""
        with self._lock:
            self._closed = True
        while self._running:  # they end when the caller does, within one piece of work
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._error is not None:
            raise self._error


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="adamax")
        return _pool


def _forget_pool() -> None:
    # A forked child has the pool's bookkeeping but none of its threads.
    global _pool, _pool_lock
    _pool = None
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
