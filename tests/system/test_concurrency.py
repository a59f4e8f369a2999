"""Threads, forks, interrupts, exits, and caches that cannot be written."""

import linecache
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import DTYPES, PRECISION, values
from compare import assert_same_contents, contents

import numpy as np
from adamax import Adamax, IndexedSlices, get_num_threads, set_num_threads
from adamax._kernels import _threads

PACKAGE = Path(sys.modules["adamax"].__file__).parent

# Steps of all kinds, in the words of a program: large enough for several threads. Clipping
# by norm is not among them: it adds up in an order that is each implementation's own.
STEPS = """
import hashlib
import numpy as np
from adamax import Adamax, IndexedSlices

def taken(seed, steps=4, dtypes=("float32", "float64", "float16")):
    rng = np.random.default_rng(seed)
    dense = [rng.normal(size=(301, 1003)).astype(dtype) for dtype in dtypes]
    tables = [rng.normal(size=(2000, 70)).astype(dtype) for dtype in dtypes]
    optimizer = Adamax(0.01, weight_decay=0.1, clipvalue=2.0)
    for _ in range(steps):
        pairs = [(rng.normal(size=w.shape).astype(w.dtype), w) for w in dense]
        for w in tables:
            indices = rng.integers(2000, size=3000)
            rows = rng.normal(size=(3000, 70)).astype(w.dtype)
            pairs.append((IndexedSlices(rows, indices), w))
        optimizer.apply_gradients(pairs)
    digest = hashlib.sha256()
    for array in (*dense, *tables, *optimizer.state_dict().values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
"""
_program: dict = {}
exec(STEPS, _program)
taken = _program["taken"]


def _in_one_thread(*seeds, **chosen):
    before = get_num_threads()
    set_num_threads(1)
    digests = [taken(seed, **chosen) for seed in seeds]
    set_num_threads(before)
    assert len(set(digests)) == len(digests)
    return digests


@pytest.fixture(scope="module")
def expected():
    """What the steps come to with one thread in this process, for two seeds."""
    return _in_one_thread(0, 1)


@pytest.fixture(scope="module")
def expected_float32():
    """The same in one dtype, for where code must be compiled anew."""
    return _in_one_thread(0, 1, dtypes=["float32"])


# --- Threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_threads_may_step_two_optimizers(expected, use_threads, threads):
    use_threads(threads)
    start = threading.Barrier(2)

    def together(seed):
        start.wait()
        return taken(seed)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(together, range(2))) == expected


def test_many_threads_may_step_many_small_optimizers():
    def trajectory(seed):
        rng = np.random.default_rng(seed)
        w = values(rng, (7, 3), "float32")
        optimizer = Adamax(0.1)
        for _ in range(50):
            indices = rng.integers(7, size=5)
            optimizer.apply_gradients([(values(rng, (7, 3), "float32"), w)])
            optimizer.apply_gradients(
                [(IndexedSlices(values(rng, (5, 3), "float32"), indices), w)]
            )
        return contents(optimizer, [w])

    with ThreadPoolExecutor(8) as pool:
        for seed, actual in enumerate(pool.map(trajectory, range(16))):
            assert_same_contents(actual, trajectory(seed))


def test_the_first_steps_may_be_in_two_threads(expected_float32, run_python, tmp_path):
    """The first call compiles; here there is no cache to take the code from."""
    program = STEPS + (
        "import threading, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "start = threading.Barrier(2)\n"
        "def together(seed):\n"
        "    start.wait()\n"
        "    return taken(seed, dtypes=['float32'])\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    print(*pool.map(together, range(2)))\n"
    )
    cache = str(tmp_path / "cache")
    assert run_python(program, NUMBA_CACHE_DIR=cache).split() == expected_float32
    assert list((tmp_path / "cache").rglob("*.nbc"))


def test_the_number_of_threads_may_change_between_steps(rng, use_threads):
    start = values(rng, (700, 601), "float32")
    gradients = [values(rng, start.shape, "float32") for _ in range(6)]
    results = []
    for threads in ([1] * 6, [1, 4, 2, 8, 1, 3]):
        w, optimizer = start.copy(), Adamax(clipnorm=1.0)
        for gradient, number in zip(gradients, threads, strict=True):
            use_threads(number)
            optimizer.apply_gradients([(gradient, w)])
        results.append(contents(optimizer, [w]))
    assert_same_contents(results[1], results[0])


COUNT_THREADS = """
import threading, sys
import numpy as np
import adamax

started = adamax.get_num_threads()
if len(sys.argv) > 1:
    adamax.set_num_threads(int(sys.argv[1]))
before = threading.active_count()
w = np.ones(5_000_000, np.float32)
adamax.Adamax().apply_gradients([(w, w)])
print(started, threading.active_count() - before)
"""


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("1", 1), ("3", 3), ("3,2", 3), (" 2 ", 2), ("100000", 256)],
)
def test_the_environment_says_how_many_threads(monkeypatch, variable, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert _threads._default_num_threads.__wrapped__() == expected


@pytest.mark.parametrize("variable", [None, "", "0", "-1", "two", "1.5"])
def test_without_it_there_is_a_thread_for_each_cpu(monkeypatch, variable):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    actual = _threads._default_num_threads.__wrapped__()
    if hasattr(os, "sched_getaffinity"):
        assert actual == min(len(os.sched_getaffinity(0)), 256)
    else:
        assert actual == min(os.cpu_count() or 1, 256)


@pytest.mark.parametrize(
    ("environment", "argument", "started", "most"),
    [("1", (), 1, 0), ("3", (), 3, 2), ("3", (1,), 3, 0), ("1", (3,), 1, 2)],
)
def test_a_step_uses_as_many_threads_as_it_may(
    run_python, environment, argument, started, most
):
    printed = run_python(COUNT_THREADS, *argument, OMP_NUM_THREADS=environment)
    actual_started, helpers = map(int, printed.split())
    assert actual_started == started
    # One helper that is quick may do the work of two.
    assert helpers == most if most == 0 else 1 <= helpers <= most


def test_small_steps_start_no_threads(run_python):
    program = COUNT_THREADS.replace("5_000_000", "10_000")
    assert run_python(program, OMP_NUM_THREADS="4") == "4 0"


# --- Interrupts ---------------------------------------------------------------------------

INTERRUPTED = """
import signal

def interrupted(count):
    # Timers of many lengths, so that interrupts arrive everywhere in a step.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    w = np.zeros((500, 1009), np.float32)
    table = np.zeros((2000, 70))
    rows = IndexedSlices(np.ones((3000, 70)), np.arange(3000) % 2000)
    arrived = 0
    for number in range(1, 100 * count):
        optimizer = Adamax()
        try:
            # Again after a while, as Python drops an interrupt that arrives in a callback.
            signal.setitimer(signal.ITIMER_REAL, number % 97 * 1e-4 + 1e-5, 5)
            while True:
                optimizer.apply_gradients([(np.ones_like(w), w), (rows, table)])
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            arrived += 1
        if arrived == count:
            return
    raise AssertionError(arrived)
"""


interrupts = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs timers of POSIX"
)


@interrupts
@pytest.mark.parametrize("threads", ["1", "3"])
def test_interrupts_leave_the_process_healthy(expected, run_python, threads):
    program = (
        "first = taken(0), taken(1)\ninterrupted(120)\nprint(*first, taken(0), taken(1))\n"
    )
    printed = run_python(STEPS + INTERRUPTED + program, OMP_NUM_THREADS=threads)
    assert printed.split() == expected * 2


@interrupts
def test_interrupts_while_code_is_compiled_leave_it_whole(
    expected_float32, run_python, tmp_path
):
    # Imports that an interrupt ends in the middle are not ours to mend.
    program = (
        "from adamax._kernels import kernels\n"
        "kernels()\n"
        "interrupted(20)\n"
        "print(taken(0, dtypes=['float32']))\n"
    )
    cache = str(tmp_path / "cache")
    printed = run_python(STEPS + INTERRUPTED + program, NUMBA_CACHE_DIR=cache)
    assert printed == expected_float32[0]


class Watched:
    """A task that knows whether helpers are at it, and whether any came too late."""

    def __init__(self):
        self._helped = threading.Event()
        self._change = threading.Condition()
        self._closed = False
        self.working = self.late = 0
        self.returned = False

    def work(self):
        assert self._helped.wait(timeout=60)

    def help(self):
        with self._change:
            if self._closed:
                return
            self.working += 1
            self.late += self.returned
        self._helped.set()
        threading.Event().wait(timeout=0.05)  # as long as a step may take
        with self._change:
            self.working -= 1
            self._change.notify_all()

    def close(self):
        with self._change:
            self._closed = True
            assert self._change.wait_for(lambda: not self.working, timeout=60)


class Together:
    """A task that all threads must be at to end."""

    def __init__(self, threads):
        self._barrier = threading.Barrier(threads)

    def work(self):
        self._barrier.wait(timeout=60)

    help = work

    def close(self):
        pass


def _with_an_interrupt(call, at, codes):
    """Raise KeyboardInterrupt at one of the lines of ``codes``; how many of them ran.

    Leaving a ``with`` is a line to a tracer, but nowhere that an interrupt can arrive.
    """
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        code = frame.f_code
        if code not in codes:
            return None
        text = linecache.getline(code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)  # of this thread, and not of the helpers
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(previous)
    return lines


def _run_with_an_interrupt(task, at):
    return _with_an_interrupt(lambda: _threads.run(task, 3), at, [_threads.run.__code__])


def test_an_interrupt_at_any_line_leaves_no_call_behind():
    """It ends by itself, and with it the process, which waits for it."""
    codes = [_threads.run_uninterrupted.__code__, _threads._Call.wait.__code__]
    ended = []

    def function():
        threading.Event().wait(timeout=0.05)
        ended.append(True)

    def call():
        _threads.run_uninterrupted(function)

    lines = _with_an_interrupt(call, 0, codes)
    assert lines > 5
    for at in range(1, lines + 1):
        _with_an_interrupt(call, at, codes)
        _threads.run_uninterrupted(function)
    deadline = time.monotonic() + 60
    while _threads._calls and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _threads._calls
    assert len(ended) > 1 + lines


def test_an_interrupt_at_any_line_waits_for_the_helpers():
    """The caller may free memory that they write to as soon as it goes on."""
    lines = _run_with_an_interrupt(Watched(), at=0)
    assert lines > 5
    tasks = []
    for at in range(1, lines + 1):
        tasks.append(Watched())
        _run_with_an_interrupt(tasks[-1], at)
        tasks[-1].returned = True
        assert tasks[-1].working == 0, f"interrupt at line {at}"
    # Helpers that nobody waited for have had their turn when these have.
    _threads.run(Together(3), 3)
    assert not any(task.late for task in tasks)


def test_an_error_of_a_helper_reaches_the_caller():
    class Broken(Together):
        def help(self):
            try:
                raise ZeroDivisionError("in a helper")
            finally:
                super().help()

        def close(self):
            time.sleep(0.05)  # a helper that raises is not waited for

    with pytest.raises(ZeroDivisionError, match="in a helper"):
        _threads.run(Broken(2), 2)
    _threads.run(Together(2), 2)  # the helper has survived


def test_helpers_end_with_the_thread_they_help():
    def alive():
        return sum(thread.name == "adamax" for thread in threading.enumerate())

    before = alive()
    during = []

    def caller():
        _threads.run(Together(4), 4)
        during.append(alive())

    for _ in range(3):
        thread = threading.Thread(target=caller)
        thread.start()
        thread.join()
    assert min(during) >= before + 3
    deadline = time.monotonic() + 60
    while alive() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() == before


# --- Forks --------------------------------------------------------------------------------

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# In interpreters of their own: frameworks that other tests have imported warn of forks, or
# do not survive them.
FORKS = (
    STEPS
    + """
import multiprocessing, os, signal, threading, warnings
from adamax import set_num_threads

# Python 3.12 warns of every fork beside threads; this is about those that are safe.
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork.*", DeprecationWarning)

def begun_in_a_fork(seed):
    "The child's process id, and where it writes its digest and number of threads."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            digest = taken(seed)
            os.write(writing, f"{digest} {threading.active_count()}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    return child, os.fdopen(reading)

def ended(child, result):
    with result:
        digest, threads = result.read().split()
    assert os.waitpid(child, 0)[1] == 0
    assert int(threads) > 1  # of its own, as those of the parent are not in the child
    return digest
"""
)


@fork
def test_a_fork_after_steps_can_step(expected, run_python):
    program = """
set_num_threads(3)
print(taken(0))  # the threads are there
child = begun_in_a_fork(1)
print(taken(1))  # at the same time
print(ended(*child))
print(taken(0))
"""
    printed = run_python(FORKS + program).split()
    assert printed == [expected[0], expected[1], expected[1], expected[0]]


@fork
def test_a_fork_in_the_midst_of_a_step_of_another_thread_can_step(expected, run_python):
    program = """
set_num_threads(3)
taken(0)  # all is compiled, so that no lock of the compiler is taken when the fork comes
stop = threading.Event()
digests = set()

def stepping():
    while not stop.is_set():
        digests.add(taken(0))

other = threading.Thread(target=stepping)
other.start()
try:
    print(*[ended(*begun_in_a_fork(1)) for _ in range(3)])
finally:
    stop.set()
    other.join()
print(*digests)
"""
    printed = run_python(FORKS + program).split()
    assert printed == [*3 * [expected[1]], expected[0]]


@fork
def test_a_pool_of_forked_processes_can_step(expected, run_python):
    program = """
set_num_threads(2)
taken(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(*pool.map(taken, range(2)))
"""
    assert run_python(FORKS + program).split() == expected


# --- The end of the process ---------------------------------------------------------------


def test_a_step_at_exit_works(expected, run_python):
    program = STEPS + (
        "import atexit\n"
        "taken(0)\n"
        "atexit.register(lambda: print(taken(1)))\n"
        "print(taken(0))\n"
    )
    printed = run_python(program, OMP_NUM_THREADS="3")
    assert printed.split() == expected


def test_the_first_step_may_be_at_exit(expected, run_python):
    program = STEPS + "import atexit\natexit.register(lambda: print(taken(1)))\n"
    assert run_python(program, OMP_NUM_THREADS="3") == expected[1]


STEPPING_AT_EXIT = """
import sys, threading, time
import numpy as np
import adamax

def stepping():
    w, optimizer = np.ones(1_000_000, np.float32), adamax.Adamax()
    while True:
        optimizer.apply_gradients([(w.copy(), w)])
        steps.append(1)

steps = []
for _ in range(2):
    threading.Thread(target=stepping, daemon=True).start()
while len(steps) < int(sys.argv[1]):
    time.sleep(0.001)
print("ends")
"""


@pytest.mark.parametrize("steps", [1, 50, 100, 101, 150])
def test_a_process_ends_while_daemon_threads_step(run_python, steps):
    assert run_python(STEPPING_AT_EXIT, steps, OMP_NUM_THREADS="4") == "ends"


# --- Compiled code ------------------------------------------------------------------------


def test_without_compilation_the_bits_are_the_same(expected, run_python):
    program = STEPS + (
        "print(taken(0), taken(1))\n"
        "import sys\n"
        "assert 'adamax._kernels._cpu' not in sys.modules\n"
        "assert 'adamax._kernels._reference' in sys.modules\n"
    )
    assert run_python(program, NUMBA_DISABLE_JIT="1").split() == expected


def test_without_compilation_norms_are_as_close(run_python, tmp_path):
    """With clipping by norm, which adds up in another order."""
    program = """
        import sys
        import ml_dtypes
        import numpy as np
        from adamax import Adamax

        rng = np.random.default_rng(5)
        clipped = {}
        for dtype in sys.argv[2:]:
            w = np.zeros(1000, np.float32).astype(dtype)
            optimizer = Adamax(beta_1=0, clipnorm=1.0)
            optimizer.apply_gradients([(rng.normal(size=1000).astype(dtype), w)])
            clipped[dtype] = optimizer.state_dict()["0.m"]
        np.savez(sys.argv[1], **clipped)
    """
    results = []
    for switched_off in "01":
        path = tmp_path / f"{switched_off}.npz"
        run_python(program, path, *DTYPES, NUMBA_DISABLE_JIT=switched_off)
        results.append(np.load(path))
    for dtype, precision in PRECISION.items():
        first, second = (result[dtype] for result in results)
        np.testing.assert_allclose(second, first, rtol=4 * precision.roundoff)
        norm = np.linalg.norm(first.astype(np.float64))
        assert norm == pytest.approx(1.0, rel=4 * precision.roundoff)


def _uncached(directory: Path, way: str) -> dict[str, str | None]:
    """The environment for a copy of the package with no place for a cache.

    A file where a directory should be stops a user who may write anywhere as well.
    """
    shutil.copytree(
        PACKAGE, directory / "adamax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for folder in (directory / "adamax").rglob("*"):
        if folder.is_dir():
            (folder / "__pycache__").touch()
    (directory / "adamax" / "__pycache__").touch()
    (directory / "file").touch()
    no_directory = str(directory / "file" / "below")
    return {
        "PYTHONPATH": str(directory),
        "HOME": no_directory,
        "XDG_CACHE_HOME": no_directory,
        "LOCALAPPDATA": no_directory,
        "NUMBA_CACHE_DIR": no_directory if way == "NUMBA_CACHE_DIR" else None,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.mark.parametrize("way", ["NUMBA_CACHE_DIR", "no variable"])
def test_no_place_for_a_cache_is_no_error(expected_float32, run_python, tmp_path, way):
    environment = _uncached(tmp_path, way)
    program = STEPS + (
        "import adamax\nprint(adamax.__file__, taken(0, dtypes=['float32']))\n"
    )
    where, digest = run_python(program, **environment).split()
    assert Path(where).parent == tmp_path / "adamax"
    assert digest == expected_float32[0]
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
def test_a_cache_without_room_is_no_error(expected_float32, run_python, tmp_path):
    """As on a disk that is full: there is a place, and then no room."""
    program = STEPS + (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "print(taken(0, dtypes=['float32']))\n"
        "assert Path(sys.argv[1]).is_dir()\n"
    )
    cache = tmp_path / "cache"
    printed = run_python(program, cache, NUMBA_CACHE_DIR=str(cache))
    assert printed == expected_float32[0]
    assert not any(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def test_code_is_taken_from_the_cache(run_python, tmp_path):
    program = STEPS + (
        "taken(0, steps=1, dtypes=['float32'])\n"
        "from adamax._kernels import kernels\n"
        "stats = [k.stats for k in vars(kernels()).values() if hasattr(k, 'stats')]\n"
        "hits = sum(sum(s.cache_hits.values()) for s in stats)\n"
        "misses = sum(sum(s.cache_misses.values()) for s in stats)\n"
        "print(hits, misses)\n"
    )
    cache = str(tmp_path / "cache")
    hits, misses = map(int, run_python(program, NUMBA_CACHE_DIR=cache).split())
    assert hits == 0
    assert misses > 0
    hits, misses = map(int, run_python(program, NUMBA_CACHE_DIR=cache).split())
    assert hits > 0
    assert misses == 0


def test_threads_have_scratch_memory_of_their_own(run_python):
    """Where all allocate from one place, what one thread has freed is what another gets."""
    program = """
        import numpy as np
        from adamax import Adamax, IndexedSlices, set_num_threads

        rng = np.random.default_rng(0)
        ids = rng.integers(60, size=1200)
        values = rng.normal(size=(1200, 1003)).astype(np.float32)

        def trained(threads, sparse):
            set_num_threads(threads)
            table = np.ones((60, 1003), np.float32)
            optimizer = Adamax(0.1, global_clipnorm=1.0, sparse=sparse)
            for _ in range(20):
                if sparse == "exact":
                    optimizer.lookup(table, ids)
                optimizer.apply_gradients([(IndexedSlices(values, ids), table)])
            optimizer.flush()
            return table.tobytes()

        print(all(trained(1, sparse) == trained(3, sparse) for sparse in ("lazy", "exact")))
    """
    assert run_python(program, MALLOC_ARENA_MAX="1", MALLOC_PERTURB_="165") == "True"
