"""Ctrl-C at any moment of a step."""

import signal

import pytest

from adamax import get_num_threads, set_num_threads
from stepping import STEPS, taken, trained

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs timers of POSIX"
)

INTERRUPTED = """
def interrupted(call, count):
    "Call again and again until so many interrupts have arrived, everywhere in it."
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    arrived = number = 0
    while arrived < count:
        number += 1
        try:
            # Again after a while, as Python drops an interrupt that arrives in a callback.
            signal.setitimer(signal.ITIMER_REAL, number % 97 * 7e-5 + 1e-5, 5)
            while True:
                call()
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            arrived += 1
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_interrupts_leave_the_process_healthy(run_python, threads):
    before = get_num_threads()
    set_num_threads(1)
    expected = [taken(0), taken(1)]
    set_num_threads(before)
    program = """
optimizer, table, take, result = trained("lazy")
first = taken(0), taken(1)
interrupted(take, 200)
print(*first, taken(0), taken(1))
"""
    printed = run_python(STEPS + INTERRUPTED + program, OMP_NUM_THREADS=threads)
    assert printed.split() == expected * 2


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_an_interrupted_step_has_happened_or_has_not(run_python, sparse, threads):
    """Taken again where it has not, all ends in the bits of steps without interrupts."""
    program = """
import sys
optimizer, table, take, result = trained(sys.argv[1])
interrupted(take, 300)
steps = optimizer.iterations
digest = result()
optimizer, table, take, result = trained(sys.argv[1])
for _ in range(steps):
    take()
print(digest == result(), steps)
"""
    printed = run_python(
        STEPS + INTERRUPTED + program, sparse, OMP_NUM_THREADS=threads
    ).split()
    assert printed[0] == "True"
    assert int(printed[1]) > 20


def test_an_interrupted_flush_and_lookup_can_be_repeated(run_python):
    """In memory of any order: no row is caught up twice."""
    program = """
for order, dtype in (("C", "f4"), ("F", "f4"), ("C", ">f8"), ("F", ">f8")):
    results = []
    for interrupts in (0, 150):
        table = np.asarray(np.random.default_rng(3).normal(size=(3000, 70)), dtype, order)
        optimizer = Adamax(0.01, weight_decay=0.1, sparse="exact")
        for step in range(20):
            ids = np.random.default_rng(step).integers(3000, size=50)
            optimizer.lookup(table, ids)
            values = np.random.default_rng(step).normal(size=(50, 70))
            optimizer.apply_gradients([(IndexedSlices(values, ids), table)])

        def read():
            optimizer.lookup(table, np.random.default_rng(1).integers(3000, size=500))
            optimizer.flush()
            optimizer._parameters.find(table).stale.history.steps

        if interrupts:
            interrupted(read, interrupts)
        read()
        results.append(table.astype(dtype[-2:]).tobytes())
    print(results[0] == results[1])
"""
    printed = run_python(STEPS + INTERRUPTED + program, OMP_NUM_THREADS="3")
    assert printed.split() == ["True"] * 4


def test_this_is_what_the_program_does():
    """The steps can be taken in this process too."""
    optimizer, _, take, result = trained("exact")
    take()
    assert optimizer.iterations == 1
    assert len(result()) == 64
