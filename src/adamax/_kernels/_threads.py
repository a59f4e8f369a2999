"""How many threads a kernel may use, and running one on them.

Plain threads that call compiled code with the GIL released, rather than Numba's parallel
back ends: those abort the process when two threads enter them at once (workqueue) or after
a fork (GNU OpenMP), and bring a second OpenMP beside the host's. Each calling thread has
helpers of its own, so that two of them can step at once.
"""

import _thread
import atexit
import functools
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

_MOST_THREADS = 256

_num_threads: int | None = None


def get_num_threads() -> int:
    """The number of threads one optimizer step may use.

    What :func:`set_num_threads` was given, else ``OMP_NUM_THREADS``, else the number of
    CPUs this process may run on.
    """
    return _default_num_threads() if _num_threads is None else _num_threads


@functools.cache
def _default_num_threads() -> int:
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


class Task(Protocol):
    """Work that several threads can share."""

    def work(self) -> None:
        """Take pieces of the work until none are left."""

    def help(self) -> None:
        """The same in another thread; once the task is closed, do nothing."""

    def close(self) -> None:
        """Let no helper begin, and wait for those that have. May be called twice."""


def run(task: Task, threads: int) -> None:
    """Have up to ``threads`` threads, the caller's included, do ``task``.

    A thread that starts late, or never, costs nothing but its share. The caller may be
    interrupted; threads that have begun are waited for all the same, since they write to
    memory that the caller may free next.
    """
    if threads <= 1:
        task.work()
        return
    job = _Job(task)
    try:
        try:
            _own.helpers.call(job, threads - 1)
            task.work()
        finally:
            task.close()
    finally:
        task.close()  # again, since an interrupt may have come between
        job.task = None
    if job.error is not None:
        raise job.error


def run_uninterrupted(function: Callable[[], None]) -> None:
    """Call ``function`` in another thread, where no KeyboardInterrupt arrives.

    The caller may be interrupted; it waits for the end all the same.
    """
    call = _Call(function)
    try:
        # A threading.Thread that is interrupted while it starts may never run, nor end.
        _thread.start_new_thread(call.run, ())
    except RuntimeError:  # there can be no more threads
        function()
        return
    try:
        call.wait()
    finally:
        call.wait()  # again, if an interrupt came
    if call.error is not None:
        raise call.error


class _Call:
    """A call of a function in a thread of its own."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._ended = False
        self._end = _thread.allocate_lock()
        self._end.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        _calls.add(self)
        try:
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            self._ended = True
            _calls.discard(self)
            self._end.release()

    def wait(self) -> None:
        # The lock is free once only, and not for whoever is interrupted then.
        while not self._ended:
            self._end.acquire(timeout=0.1)


# Those that have begun.
_calls: set[_Call] = set()


class _Job:
    """A task in the queue of some helpers, until it is closed."""

    def __init__(self, task: Task) -> None:
        self.task: Task | None = task
        self.error: BaseException | None = None

    def help(self) -> None:
        task = self.task
        if task is not None:
            try:
                task.help()
            except BaseException as error:
                self.error = error


class _Helpers:
    """Threads that wait for jobs.

    Queue and threads are all there is: no lock that an interrupt of the caller could leave
    locked.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        _all_helpers.add(self)

    def call(self, job: _Job, count: int) -> None:
        """Let ``count`` threads help, or as many as can be started."""
        while len(self._threads) < count:
            thread = threading.Thread(
                target=_serve, args=(self._jobs,), name="adamax", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                break
            self._threads.append(thread)
        for _ in range(min(count, len(self._threads))):
            self._jobs.put(job)

    def dismiss(self) -> None:
        """Let the threads end when they have done their jobs; there will be no more."""
        self._jobs.put(None)

    def join(self) -> None:
        for thread in list(self._threads):
            thread.join()

    def __del__(self) -> None:
        self.dismiss()


def _serve(jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.help()
        del job  # what it refers to may be freed before the next one comes
    jobs.put(None)  # for the others, however many there are


class _Own(threading.local):
    def __init__(self) -> None:
        self.helpers = _Helpers()


_all_helpers: "weakref.WeakSet[_Helpers]" = weakref.WeakSet()
_own = _Own()


@atexit.register
def _end_all() -> None:
    # A thread in compiled code while the interpreter is torn down could crash it.
    for call in list(_calls):
        call.wait()
    everybody = list(_all_helpers)
    for helpers in everybody:
        helpers.dismiss()
    for helpers in everybody:
        helpers.join()


def _forget_helpers() -> None:
    # A forked child has the lists of threads but none of the threads.
    global _own
    _all_helpers.clear()
    _calls.clear()
    _own = _Own()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
