"""Several threads, forks, and the end of the process."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from adamax import Adamax, IndexedSlices, get_num_threads, set_num_threads
from adamax._core import threads as counting
from cases import values
from compare import assert_same_contents, contents
from stepping import STEPS, taken
from verbs import NATIVE


@pytest.fixture(scope="module")
def expected():
    """What the steps come to with one thread in this process, for two seeds."""
    before = get_num_threads()
    set_num_threads(1)
    digests = [taken(0), taken(1)]
    set_num_threads(before)
    assert len(set(digests)) == 2
    return digests


# --- Threads of Python --------------------------------------------------------------------


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


def test_the_first_steps_may_be_in_two_threads(expected, run_python):
    program = STEPS + (
        "import threading, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "start = threading.Barrier(2)\n"
        "def together(seed):\n"
        "    start.wait()\n"
        "    return taken(seed)\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    print(*pool.map(together, range(2)))\n"
    )
    assert run_python(program).split() == expected


@pytest.mark.parametrize("readers", [1, 3])
def test_other_threads_may_look_rows_up_during_exact_steps(use_threads, readers):
    """They wait for each other; the table ends where it would without readers."""
    use_threads(2)
    results = []
    for count in (0, readers):
        table = np.random.default_rng(1).normal(size=(3000, 40))
        optimizer, stop = Adamax(0.01, sparse="exact", weight_decay=0.1), threading.Event()
        optimizer.build([table])
        errors = []

        def read(table=table, optimizer=optimizer, stop=stop, errors=errors):
            rng = np.random.default_rng(threading.get_ident() % 2**32)
            try:
                while not stop.is_set():
                    ids = rng.integers(3000, size=300)
                    assert np.isfinite(optimizer.lookup(table, ids)).all()
                    optimizer.flush(table)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for step in range(300):
                rng = np.random.default_rng(step)
                ids = rng.integers(3000, size=500)
                while True:  # a step of another thread may come between the two calls
                    optimizer.lookup(table, ids)
                    gradient = IndexedSlices(rng.normal(size=(500, 40)), ids)
                    optimizer.apply_gradients([(gradient, table)])
                    break
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors
        optimizer.flush()
        results.append(table)
    np.testing.assert_allclose(*results, rtol=1e-9, atol=1e-11)


# --- How many threads ---------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("1", 1), ("3", 3), ("3,2", 3), (" 2 ", 2), ("100000", 256)],
)
def test_the_environment_says_how_many_threads(monkeypatch, variable, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert counting._default_num_threads.__wrapped__() == expected


@pytest.mark.parametrize("variable", [None, "", "0", "-1", "two", "1.5"])
def test_without_it_there_is_a_thread_for_each_cpu(monkeypatch, variable):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(counting, "_cpu_quota", lambda: 256)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    actual = counting._default_num_threads.__wrapped__()
    if hasattr(os, "sched_getaffinity"):
        assert actual == min(len(os.sched_getaffinity(0)), 256)
    else:
        assert actual == min(os.cpu_count() or 1, 256)


@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [
        ("max 100000", None, 256),
        ("150000 100000", None, 2),
        ("50000 100000", None, 1),
        ("max 100000", "300000 100000", 3),
        ("400000 100000", "300000 100000", 3),
        ("nonsense", None, 256),
        (None, None, 256),
        ("100000 0", None, 256),
    ],
)
def test_the_quota_of_a_container_counts(monkeypatch, tmp_path, own, above, expected):
    folder = tmp_path / "slice" / "scope"
    folder.mkdir(parents=True)
    for path, text in ((folder, own), (folder.parent, above)):
        if text is not None:
            (path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(counting, "_own_cgroup", lambda: folder)
    assert counting._cpu_quota() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert counting._default_num_threads.__wrapped__() == min(expected, 64)


COUNT_THREADS = """
import os, sys
import numpy as np
import adamax

def threads():
    return len(os.listdir("/proc/self/task"))

started = adamax.get_num_threads()
if len(sys.argv) > 1:
    adamax.set_num_threads(int(sys.argv[1]))
before = threads()
w = np.ones(5_000_000, np.float32)
adamax.Adamax().apply_gradients([(w.copy(), w)])
print(started, threads() - before)
"""
counted = pytest.mark.skipif(
    not (NATIVE and Path("/proc/self/task").exists()),
    reason="the native core was not built, or its threads cannot be counted here",
)


@counted
@pytest.mark.parametrize(
    ("environment", "argument", "started", "helpers"),
    [("1", (), 1, 0), ("3", (), 3, 2), ("3", (1,), 3, 0), ("1", (3,), 1, 2)],
)
def test_a_step_uses_as_many_threads_as_it_may(
    run_python, environment, argument, started, helpers
):
    printed = run_python(COUNT_THREADS, *argument, OMP_NUM_THREADS=environment)
    assert printed == f"{started} {helpers}"


@counted
def test_small_steps_start_no_threads(run_python):
    program = COUNT_THREADS.replace("5_000_000", "10_000")
    assert run_python(program, OMP_NUM_THREADS="4") == "4 0"


@counted
def test_a_step_works_where_no_thread_can_be_started(expected, run_python):
    """A limit of the address space leaves no room for the stack of a thread."""
    program = STEPS + (
        "import resource\n"
        "set_num_threads(64)\n"
        "import threading\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + 400 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(taken(0))\n"
    )
    assert run_python(program) == expected[0]


# --- Forks --------------------------------------------------------------------------------

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# In interpreters of their own: frameworks that other tests have imported warn of forks, or
# do not survive them.
FORKS = (
    STEPS
    + """
import multiprocessing, threading, warnings

# Python 3.12 warns of every fork beside threads; this is about those that are safe.
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork.*", DeprecationWarning)

def begun_in_a_fork(seed):
    "The child's process id, and where it writes its digest."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            os.write(writing, taken(seed).encode())
        finally:
            os._exit(0)
    os.close(writing)
    return child, os.fdopen(reading)

def ended(child, result):
    with result:
        digest = result.read()
    assert os.waitpid(child, 0)[1] == 0
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
@pytest.mark.parametrize("first", ["taken(0)", "None"])
def test_a_fork_in_the_midst_of_a_step_of_another_thread_can_step(
    expected, run_python, first
):
    """Also of the first step in the process."""
    program = f"""
set_num_threads(3)
{first}
stop = threading.Event()
digests = set()

def stepping():
    while not stop.is_set():
        digests.add(taken(0))

other = threading.Thread(target=stepping)
other.start()
try:
    print(*[ended(*begun_in_a_fork(1)) for _ in range(5)])
finally:
    stop.set()
    other.join()
print(*digests)
"""
    printed = run_python(FORKS + program).split()
    assert printed == [*5 * [expected[1]], expected[0]]


@fork
def test_a_child_of_a_fork_can_look_rows_up_whatever_the_parent_does(run_python):
    """A thread of the parent may hold the lock of the tables when the fork comes."""
    program = """
optimizer, table, take, result = trained("exact")
take()
stop = threading.Event()

def reading():
    while not stop.is_set():
        optimizer.lookup(table, np.arange(2000))

other = threading.Thread(target=reading)
other.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        optimizer.lookup(table, np.arange(2000))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
stop.set()
other.join()
print("ends")
"""
    assert run_python(FORKS + program, OMP_NUM_THREADS="3") == "ends"


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


# --- Memory and implementations -----------------------------------------------------------


def test_the_reference_has_the_same_bits(expected, run_python):
    program = STEPS + (
        "print(taken(0), taken(1))\n"
        "import sys\n"
        "assert 'adamax._native.verbs' not in sys.modules\n"
    )
    assert run_python(program, ADAMAX_KERNELS="reference").split() == expected


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


@pytest.mark.skipif(sys.platform == "win32", reason="counts pages by /proc")
def test_many_steps_take_no_more_memory(run_python):
    program = """
        import gc, numpy as np
        from adamax import Adamax, IndexedSlices

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        rng = np.random.default_rng(0)
        table, w = np.ones((2000, 16), np.float32), np.ones(100)
        lazy, exact = Adamax(), Adamax(sparse="exact")
        other = table.copy()
        for step in range(12000):
            if step == 4000:  # rings of the history have gone round
                gc.collect()
                before = resident()
            ids = rng.integers(2000, size=20)
            g = IndexedSlices(rng.normal(size=(20, 16)), ids)
            lazy.apply_gradients([(g, table), (np.ones(100), w)])
            exact.lookup(other, ids)
            exact.apply_gradients([(g, other)])
        print(resident() - before < 2_000_000)
    """
    assert run_python(program) == "True"
