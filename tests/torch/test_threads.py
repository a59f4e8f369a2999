"""Threads and processes of torch beside those of ``adamax.torch.Adamax``."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adamax._core.kernels import kernels
from torch_cases import (
    DTYPES,
    PATHS,
    assert_same_contents,
    contents,
    rows_of,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)


@pytest.fixture
def set_num_threads():
    """``torch.set_num_threads`` until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def taken(seed, dtype="float32", path="fused", steps=3):
    """Steps that are worth several threads, dense and sparse."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

    params = [torch.nn.Parameter(numbers(*shape)) for shape in ((301, 1003), (2000, 70))]
    optimizer = Adamax(params, lr=0.01, weight_decay=0.1, **PATHS[path])
    for _ in range(steps):
        places = torch.randint(2000, (3000,), generator=generator)
        rows = rows_of(numbers(3000, 70), places, (2000, 70))
        take_steps(optimizer, [[numbers(301, 1003), rows]])
    return contents(optimizer)


@pytest.mark.parametrize("path", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(set_num_threads, dtype, path):
    results = []
    for number in (1, 2, 5):
        set_num_threads(number)
        results.append(taken(0, dtype, path))
    assert_same_contents(results[1], results[0])
    assert_same_contents(results[2], results[0])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_uses_the_threads_that_torch_may_use(set_num_threads, monkeypatch, number):
    """And neither those that NumPy's front end may, nor one more."""
    used = []
    step = kernels().step

    def watch(*args):
        used.append(args[-1])
        return step(*args)

    monkeypatch.setattr(kernels(), "step", watch)
    set_num_threads(number)
    taken(0, steps=1)
    assert set(used) == {number}
    assert torch.get_num_threads() == number


def test_two_threads_may_step_two_optimizers():
    expected = [taken(seed) for seed in range(2)]
    start = threading.Barrier(2)

    def together(seed):
        start.wait()
        return taken(seed)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(together, range(2)))
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_contents(actual, wanted)


def test_many_threads_may_step_many_small_optimizers():
    def trajectory(seed):
        generator = torch.Generator().manual_seed(seed)
        table = torch.nn.Parameter(torch.randn(7, 3, generator=generator))
        optimizer = Adamax([table], lr=0.1)
        for _ in range(40):
            places = torch.randint(7, (5,), generator=generator)
            rows = rows_of(torch.randn(5, 3, generator=generator), places, (7, 3))
            take_steps(optimizer, [[rows], [torch.randn(7, 3, generator=generator)]])
        return contents(optimizer)

    with ThreadPoolExecutor(8) as pool:
        for seed, actual in enumerate(pool.map(trajectory, range(16))):
            assert_same_contents(actual, trajectory(seed))


@pytest.mark.parametrize("number", [1, 3])
def test_backward_and_step_in_a_thread_of_their_own(set_num_threads, number):
    """Autograd calls hooks, and a step in one, in threads that it chooses."""
    set_num_threads(number)
    results = []

    def train():
        start = torch.linspace(-1, 1, 300 * 700).view(300, 700)
        weight = torch.nn.Parameter(start)
        optimizer = Adamax([weight], lr=0.1)
        weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
        for _ in range(3):
            weight.grad = None
            weight.sin().sum().backward()
        results.append(contents(optimizer))

    train()
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert_same_contents(*results)


STARTED = """
    import os, signal, sys, warnings
    import torch
    from adamax.torch import Adamax

    warnings.simplefilter("ignore")  # Python 3.12 warns of every fork beside threads
    torch.set_num_threads(3)

    def started():
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(700, 1000))
        table = torch.nn.Embedding(5000, 80, sparse=True)
        optimizer = Adamax([w, *table.parameters()], lr=0.1)
        w.grad = torch.randn(700, 1000)
        table(torch.randint(5000, (4000,))).sin().sum().backward()
        optimizer.step()  # the threads are there
        return optimizer

    def digest(optimizer):
        import hashlib
        params = optimizer.param_groups[0]["params"]
        state = [t for p in params for t in optimizer.state[p].values()]
        arrays = [tensor.detach().numpy().tobytes() for tensor in (*params, *state)]
        return hashlib.sha256(b"".join(arrays)).hexdigest()
"""

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_a_fork_after_steps_can_step(run_python):
    program = """
    optimizer = started()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
    for _ in range(3):
        optimizer.step()
    if child == 0:
        os.write(writing, digest(optimizer).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(os.read(reading, 100).decode(), digest(optimizer))
    again = started()
    for _ in range(3):
        again.step()
    print(digest(again))
    """
    assert len(set(run_python(STARTED + program).split())) == 1


@fork
def test_processes_of_torch_may_share_parameters(run_python):
    """What one process steps in shared memory, the other has."""
    program = """
    def work(optimizer):
        signal.alarm(120)
        optimizer.step()

    optimizer, expected = started(), started()
    for param in optimizer.param_groups[0]["params"]:
        param.share_memory_()
        for value in optimizer.state[param].values():
            value.share_memory_()
    context = torch.multiprocessing.get_context("fork")
    for _ in range(2):
        process = context.Process(target=work, args=(optimizer,))
        process.start()
        process.join()
        assert process.exitcode == 0
        expected.step()
    optimizer.step()
    expected.step()
    print(digest(optimizer), digest(expected))
    """
    assert len(set(run_python(STARTED + program).split())) == 1


def test_arrays_of_numpy_may_be_parameters():
    """They share memory with the tensors; both see the steps."""
    array = np.ones((4, 3))
    w = torch.nn.Parameter(torch.from_numpy(array))
    take_steps(Adamax([w], lr=0.25), [[torch.ones(4, 3, dtype=torch.float64)]])
    np.testing.assert_allclose(array, 0.75, rtol=1e-7)
