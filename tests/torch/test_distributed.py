"""``adamax.torch`` in several processes, held to what one process computes."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytestmark = pytest.mark.xdist_group("processes")

PATHS = ["default", "fused", "foreach", "one by one"]
SIZES = [2, 4]
LIMIT = 120.0  # seconds that a scenario may take


# --- Groups of processes ------------------------------------------------------------------


class Group:
    """Processes that run scenarios of torch_scenarios.py together, one after the other."""

    def __init__(self, size: int, place: Path) -> None:
        import torch_scenarios

        # All are forked from one process, which imports this once and does nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "adamax.torch"])
        self.place = place
        self.processes = []
        self.connections = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=torch_scenarios.serve,
                args=(theirs, rank, size, place, LIMIT / 2),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self._check_answers(LIMIT)

    @property
    def usable(self) -> bool:
        return bool(self.processes)

    def run(self, scenario: str, limit: float = LIMIT, **arguments: Any) -> None:
        """Run a scenario in all processes; fail with what the first to fail says."""
        for connection in self.connections:
            connection.send((scenario, arguments, limit))
        self._check_answers(limit + 2)  # for stacks, and for answers to arrive

    def _check_answers(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        unanswered = dict(enumerate(self.connections))
        while unanswered:
            ready = wait([*unanswered.values()], max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = (self.place / f"stacks of rank {rank}" for rank in unanswered)
                told = "\n".join(path.read_text() for path in stacks if path.exists())
                self._fail(f"no answer from ranks {[*unanswered]}\n{told}")
            for rank, connection in [*unanswered.items()]:
                if connection in ready:
                    del unanswered[rank]
                    try:
                        error = connection.recv()
                    except (EOFError, OSError):
                        error = "the process has ended"
                    if error is not None:
                        self._fail(f"in rank {rank} of {len(self.processes)}: {error}")

    def _fail(self, reason: str) -> NoReturn:
        self.close(wait_for=0.0)  # processes may be waiting for each other
        pytest.fail(reason, pytrace=False)

    def close(self, wait_for: float = 10.0) -> None:
        """End the processes, which do so by themselves if given some time."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(wait_for)
            process.kill()
            process.join()
            process.close()
        self.processes, self.connections = [], []


GroupOf = Callable[[int], Group]


@pytest.fixture(scope="module")
def group_of(torch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupOf]:
    """Groups by their size, which tests share; a failure ends one, and a new one starts."""
    groups: dict[int, Group] = {}

    def get(size: int) -> Group:
        if size not in groups or not groups[size].usable:
            groups[size] = Group(size, tmp_path_factory.mktemp(f"group of {size}"))
        return groups[size]

    with ExitStack() as at_exit:
        yield get
        for group in groups.values():
            at_exit.callback(group.close)


@pytest.fixture(params=SIZES, ids=[f"{size} processes" for size in SIZES])
def group(request: pytest.FixtureRequest, group_of: GroupOf) -> Group:
    return group_of(request.param)


# --- Training -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_data_parallel(group, path, max_norm):
    group.run("data_parallel", path=path, max_norm=max_norm)


def test_exact_data_parallel(group):
    group.run("exact_data_parallel")


def test_data_parallel_with_uneven_batches(group):
    group.run("uneven_data_parallel")


def test_data_parallel_with_accumulated_gradients(group):
    group.run("accumulated_data_parallel")


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("sparse", [False, True], ids=["all sharded", "and a sparse table"])
@pytest.mark.parametrize("path", PATHS)
def test_fully_sharded(group, path, sparse, max_norm):
    group.run("fully_sharded", path=path, sparse=sparse, max_norm=max_norm)


def test_tensor_parallel(group):
    group.run("tensor_parallel")


@pytest.mark.parametrize("path", ["fused", "foreach"])
def test_layouts(group, path):
    group.run("layouts", path=path)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_zero_redundancy(group, sparse, bucket_view):
    group.run("zero_redundancy", sparse=sparse, parameters_as_bucket_view=bucket_view)


# --- Checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "flatten"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("size", SIZES)
def test_checkpoints_load_in_any_number_of_processes(
    torch, group_of, tmp_path, size, dtype, flatten
):
    options = {
        "directory": tmp_path,
        "dtype": getattr(torch, dtype),
        "flatten": flatten,
    }
    group_of(size).run("checkpoint_saved", **options)
    for other in (1, *SIZES):
        group_of(other).run("checkpoint_loaded", sharded=True, **options)
    group_of(1).run("checkpoint_loaded", sharded=False, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_state_dicts(torch, group, dtype):
    group.run("whole_state_dict", dtype=getattr(torch, dtype))


# --- The groups themselves ----------------------------------------------------------------


def test_a_failure_in_one_process_fails_the_test(group_of):
    group = group_of(2)
    expected = r"^in rank 1 of 2: Traceback(?s:.*)ArithmeticError: this is meant to fail"
    with pytest.raises(pytest.fail.Exception, match=expected):
        group.run("fails", rank=1)
    assert not group.usable


def test_processes_that_hang_fail_the_test(group_of):
    group = group_of(2)
    expected = r"^no answer from ranks \[0, 1\]\n(?s:.*)never_ends(?s:.*)never_ends"
    with pytest.raises(pytest.fail.Exception, match=expected):
        group.run("never_ends", limit=1.0)
    assert not group.usable


def test_a_process_that_is_gone_fails_the_test(group_of):
    group = group_of(2)
    group.processes[0].kill()
    with pytest.raises(pytest.fail.Exception, match=r"^in rank 0 of 2: the process has e"):
        group.run("fails", rank=0)
    assert not group.usable
