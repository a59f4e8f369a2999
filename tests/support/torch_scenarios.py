"""What the processes of test_torch_distributed.py do: a table of scenarios.

Each process of a group runs the same scenario. It trains a small model together with the
others, trains the same model on the whole batches alone, and compares the two.
"""

import copy
import datetime
import faulthandler
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own, at import
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

from adamax._core.kernels import kernels
from adamax.torch import Adamax, clip_grad_norm_

PATHS: dict[str, dict[str, bool]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
}
FUSED = ("default", "fused")
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.01}
BATCHES, BATCH = 6, 24
HALF = BATCHES // 2


# --- Processes ----------------------------------------------------------------------------


def serve(connection: Connection, rank: int, size: int, place: Path, limit: float) -> None:
    """Join a group of processes and run what ``connection`` asks for, until it closes.

    The answers, one on joining and one to each question, are None or the traceback of what
    went wrong. A process that waits for another gives up after ``limit`` seconds. One that
    takes longer than it was given writes the stacks of its threads to a file in ``place``.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(place / "meeting"), size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=limit),
    )
    connection.send(None)
    with (place / f"stacks of rank {rank}").open("w") as stacks:
        while True:
            try:
                name, arguments, given = connection.recv()
            except (EOFError, OSError):
                break
            faulthandler.dump_traceback_later(given, file=stacks)
            error = None
            try:
                SCENARIOS[name](**arguments)
            except Exception:
                error = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                connection.send(error)
    dist.destroy_process_group()


def fails(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("this is meant to fail")
    dist.barrier()


def never_ends() -> None:
    time.sleep(3600)


def gathered(thing: Any) -> list[Any]:
    """What each process has."""
    things: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


# --- Model and data -----------------------------------------------------------------------


class Model(torch.nn.Module):
    """A table and two layers, of numbers of rows that 2 and 4 do not divide."""

    def __init__(
        self, sparse: bool, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(29, 6, sparse=sparse, dtype=dtype)
        self.hidden = torch.nn.Linear(6, 7, dtype=dtype)
        self.output = torch.nn.Linear(7, 1, dtype=dtype)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.hidden(self.table(indices).sum(dim=1))
        return self.output(torch.tanh(hidden)).sum(dim=1)


USED_ROWS = 20


class Batch(NamedTuple):
    indices: Tensor  # some of them repeat
    targets: Tensor


def make_batches(dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randint(0, USED_ROWS, (BATCH, 3), generator=generator),
            torch.randn(BATCH, generator=generator).to(dtype),
        )
        for _ in range(BATCHES)
    ]


def own_parts(batches: Iterable[Batch]) -> list[Batch]:
    """This process' part of each batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [Batch(*(tensor.chunk(size)[rank] for tensor in batch)) for batch in batches]


def backward(model: torch.nn.Module, batch: Batch) -> None:
    (model(batch.indices) - batch.targets).square().mean().backward()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    max_norm: float | None = None,
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def trained_alone(
    batches: list[Batch], sparse: bool, max_norm: float | None = None
) -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    model = Model(sparse, batches[0].targets.dtype)
    optimizer = Adamax(model.parameters(), **OPTIONS)
    train(model, optimizer, batches, max_norm)
    return contents(model.named_parameters(), optimizer)


# --- Comparison ---------------------------------------------------------------------------


def contents(
    named: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters, and what this process' optimizer has for them, as if not distributed."""
    tensors = {}
    for name, param in named:
        name = name.removeprefix("module.")  # of DistributedDataParallel
        tensors[name] = whole(param)
        for entry, value in optimizer.state.get(param, {}).items():
            tensors[f"{name} {entry}"] = whole(value)
    return tensors


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal, but for the order in which processes add up their gradients."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0.0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@contextmanager
def native_steps() -> Iterator[list[tuple[int, int]]]:
    """The steps of the native core: elements of whole parameters, and tables."""
    steps: list[tuple[int, int]] = []
    verb = kernels().step

    def step(*args: Any) -> Any:
        result = verb(*args)
        if result is None:
            steps.append((sum(w.numel() for w in args[0]), len(args[6])))
        return result

    with mock.patch.object(kernels(), "step", step):
        yield steps


# --- Data parallelism ---------------------------------------------------------------------


def data_parallel(path: str, max_norm: float | None) -> None:
    """Sparse and dense gradients, averaged over processes, in one optimizer."""
    model = DistributedDataParallel(Model(sparse=True))
    optimizer = Adamax(model.parameters(), **OPTIONS, **PATHS[path])
    with native_steps() as steps:
        train(model, optimizer, own_parts(make_batches()), max_norm)
    table = model.module.table.weight
    assert table.grad.is_sparse
    layers = sum(param.numel() for param in model.parameters()) - table.numel()
    assert steps == ([(layers, 1)] * BATCHES if path in FUSED else [])

    actual = contents(model.named_parameters(), optimizer)
    assert_close(actual, trained_alone(make_batches(), True, max_norm))
    for elsewhere in gathered(actual):
        assert_same(actual, elsewhere)
    unused = Model(sparse=True).table.weight[USED_ROWS:]
    assert torch.equal(table[USED_ROWS:], unused)


def exact_data_parallel() -> None:
    """Rows that have a gradient because another process has read them."""
    decoupled = {**OPTIONS, "decoupled_weight_decay": True}
    batches = make_batches() * 3
    model, alone = DistributedDataParallel(Model(sparse=True)), Model(sparse=False)
    optimizer = Adamax(model.parameters(), **decoupled, sparse="exact")
    attachment = optimizer.attach(model)
    assert attachment.names == ("module.table.weight",)
    expected = Adamax(alone.parameters(), **decoupled)
    train(model, optimizer, own_parts(batches))
    train(alone, expected, batches)
    optimizer.flush()
    actual = contents(model.named_parameters(), optimizer)
    assert_close(actual, contents(alone.named_parameters(), expected))
    for elsewhere in gathered(actual):
        assert_same(actual, elsewhere)

    # A row that no process has read through the model.
    train(model, optimizer, own_parts(batches[:1]))
    weight = model.module.table.weight
    before = contents(model.named_parameters(), optimizer)
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 25]]),
        torch.ones(2, 6, dtype=weight.dtype),
        weight.shape,
        check_invariants=True,
    )
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "row 25 of parameter 'module.table.weight' has a gr" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a stale row was stepped")
    assert_same(contents(model.named_parameters(), optimizer), before)


def uneven_data_parallel() -> None:
    """Processes with more batches than others, as ``join()`` allows for."""
    decoupled = {**OPTIONS, "decoupled_weight_decay": True}
    batches = make_batches() * (1 + dist.get_rank())

    def trained(sparse: bool, flush: bool) -> tuple[Any, Adamax]:
        model = DistributedDataParallel(Model(sparse))
        mode = "exact" if sparse else "lazy"
        optimizer = Adamax(model.parameters(), **decoupled, sparse=mode)
        if sparse:
            optimizer.attach(model)
        with model.join():
            train(model, optimizer, batches)
            if flush:
                optimizer.flush()
        return model, optimizer

    model, optimizer = trained(sparse=True, flush=True)
    expected, _ = trained(sparse=False, flush=True)
    assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))
    for elsewhere in gathered(model.module.table.weight.detach()):
        assert torch.equal(model.module.table.weight, elsewhere)
    train(model, optimizer, own_parts(make_batches()))

    # Rows that were stale at the end have been replaced by those of the last process.
    model, optimizer = trained(sparse=True, flush=False)
    for read in (optimizer.flush, lambda: model(batches[0].indices)):
        try:
            read()
        except RuntimeError as error:
            assert "were stale at the end of join()" in str(error)  # noqa: PT017
        else:
            raise AssertionError("rows were caught up that had been replaced")


def accumulated_data_parallel() -> None:
    """Gradients of two batches are added up, and only then averaged over processes."""
    batches = make_batches()
    model = DistributedDataParallel(Model(sparse=True))
    alone = Model(sparse=True)
    optimizers = [Adamax(m.parameters(), **OPTIONS) for m in (model, alone)]
    for number, (batch, part) in enumerate(zip(batches, own_parts(batches), strict=True)):
        last = number % 2 == 1
        with nullcontext() if last else model.no_sync():
            backward(model, part)
        backward(alone, batch)
        if last:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    actual, expected = (
        contents(m.named_parameters(), optimizer)
        for m, optimizer in zip((model, alone), optimizers, strict=True)
    )
    assert_close(actual, expected)


# --- Sharded parameters -------------------------------------------------------------------


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Model) -> Model:
    """Shard the layers, and the table too unless its gradients are sparse."""
    fully_shard(model.hidden, mesh=world())
    fully_shard(model.output, mesh=world())
    if model.table.sparse:
        model.table.weight.register_post_accumulate_grad_hook(average_gradient)
    else:
        fully_shard(model, mesh=world())
    return model


def average_gradient(param: Tensor) -> None:
    assert param.grad is not None
    dist.all_reduce(param.grad)
    param.grad /= dist.get_world_size()


def fully_sharded(path: str, sparse: bool, max_norm: float | None) -> None:
    """Processes hold unequal parts of parameters, the last one nothing of some."""
    model = shard(Model(sparse))
    optimizer = Adamax(model.parameters(), **OPTIONS, **PATHS[path])
    sharded = [param for param in model.parameters() if isinstance(param, DTensor)]
    assert len(sharded) == (4 if sparse else 5)
    rows_held = gathered([param.to_local().shape[0] for param in sharded])
    assert rows_held[0] != rows_held[-1]
    assert 0 in rows_held[-1]

    with native_steps() as steps:
        train(model, optimizer, own_parts(make_batches()), max_norm)
    assert model.table.weight.grad.is_sparse is sparse
    held = sum(param.to_local().numel() for param in sharded)
    assert steps == ([(held, int(sparse))] * BATCHES if path in FUSED else [])
    actual = contents(model.named_parameters(), optimizer)
    assert_close(actual, trained_alone(make_batches(), sparse, max_norm))


def tensor_parallel() -> None:
    """Sharded layers whose outputs are added up, and a whole table in each process."""
    model = Model(sparse=True)
    plan = {
        "hidden": ColwiseParallel(use_local_output=False),  # which would have to be even
        "output": RowwiseParallel(),
    }
    parallelize_module(model, world(), plan)
    optimizer = Adamax(model.parameters(), **OPTIONS, fused=True)
    train(model, optimizer, make_batches(), max_norm=0.3)
    actual = contents(model.named_parameters(), optimizer)
    assert_close(actual, trained_alone(make_batches(), True, max_norm=0.3))


PLACEMENTS = {"0": Shard(0), "1": Shard(1), "R": Replicate(), "P": Partial()}
PARAM_LAYOUTS = (*"R01", "R0", "R1", "0R", "00", "01")  # a letter per dimension of the mesh
GRAD_LAYOUTS = (*"R01P", "R0", "PR", "P1", "PP", "10")


def layouts(path: str) -> None:
    """Parameters and gradients that are laid out over processes in any two ways."""
    for of_param, of_grad in product(PARAM_LAYOUTS, GRAD_LAYOUTS):
        if len(of_param) == len(of_grad):
            try:
                steps_with_layouts(of_param, of_grad, path)
            except Exception as error:
                error.add_note(f"the parameter is {of_param}, the gradient {of_grad}")
                raise


def steps_with_layouts(of_param: str, of_grad: str, path: str) -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,) if len(of_param) == 1 else (2, size // 2))
    generator = torch.Generator().manual_seed(2)
    shape = (4, size - 1, 5)  # sharded, it leaves nothing for the last process
    start, *grads = torch.randn(shape, dtype=torch.float64, generator=generator)
    param = torch.nn.Parameter(laid_out(start, mesh, of_param))
    alone = torch.nn.Parameter(start.clone())
    optimizer = Adamax([param], **OPTIONS, **PATHS[path])
    alone_optimizer = Adamax([alone], **OPTIONS, **PATHS[path])
    for grad in grads:
        param.grad, alone.grad = laid_out(grad, mesh, of_grad), grad
        optimizer.step()
        alone_optimizer.step()
        assert param.grad.placements == tuple(PLACEMENTS[letter] for letter in of_grad)
        assert torch.equal(whole(param.grad), grad)
    actual = contents([("w", param)], optimizer)
    assert_same(actual, contents([("w", alone)], alone_optimizer))


def laid_out(tensor: Tensor, mesh: DeviceMesh, letters: str) -> DTensor:
    placements = [PLACEMENTS[letter] for letter in letters]
    partial = [p if p.is_partial() else Replicate() for p in placements]
    summands = [mesh.size(i) for i, p in enumerate(placements) if p.is_partial()]
    for count in summands:
        tensor = tensor / count  # 2 or 4, so this is exact
    start: list[Placement] = [*partial]
    return DTensor.from_local(tensor, mesh, start).redistribute(placements=placements)


# --- Sharded state ------------------------------------------------------------------------


def zero_redundancy(sparse: bool, parameters_as_bucket_view: bool) -> None:
    """Each process has the state of some parameters; one of them collects it all."""

    def make(seed: int) -> tuple[DistributedDataParallel, ZeroRedundancyOptimizer]:
        model = DistributedDataParallel(Model(sparse, seed=seed))
        return model, ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=Adamax,
            parameters_as_bucket_view=parameters_as_bucket_view,
            **OPTIONS,
        )

    batches = make_batches()
    model, optimizer = make(seed=0)
    train(model, optimizer, own_parts(batches[:HALF]))
    named = dict(model.named_parameters())
    has_state = gathered([param in optimizer.optim.state for param in named.values()])
    assert [sum(of_param) for of_param in zip(*has_state, strict=True)] == [1] * len(named)
    optimizer.consolidate_state_dict(to=0)
    state_dict = optimizer.state_dict() if dist.get_rank() == 0 else None
    saved: list[Any] = [copy.deepcopy(state_dict)]  # it shares memory with the optimizer
    dist.broadcast_object_list(saved)

    # Training goes on from there in a single process,
    alone = Model(sparse, seed=3)
    alone.load_state_dict(model.module.state_dict())
    alone_optimizer = Adamax(alone.parameters(), lr=1.0)
    alone_optimizer.load_state_dict(saved[0])
    train(alone, alone_optimizer, batches[HALF:])
    expected = trained_alone(batches, sparse)
    assert_close(contents(alone.named_parameters(), alone_optimizer), expected)

    # and in several.
    other, other_optimizer = make(seed=4)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(saved[0])
    actual = contents(other.named_parameters(), other_optimizer.optim)
    assert_same(actual, contents(named.items(), optimizer.optim))
    for either, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        train(either, its_optimizer, own_parts(batches[HALF:]))
        actual = contents(either.named_parameters(), its_optimizer.optim)
        assert_close(actual, {name: expected[name] for name in actual})


# --- Checkpoints --------------------------------------------------------------------------
#
# Here all processes have the same batches. The mean of 1, 2 or 4 equal gradients is exact,
# and so training is the same, to the last bit, in any number of processes.


def make_sharded(seed: int, dtype: torch.dtype) -> tuple[Model, Adamax]:
    model = shard(Model(sparse=False, dtype=dtype, seed=seed))
    return model, Adamax(model.parameters(), **OPTIONS)


def assert_goes_on(model: Model, optimizer: Adamax, batches: list[Batch]) -> None:
    """``model`` is as after half of the batches, and learns the rest like any other."""
    actual = contents(model.named_parameters(), optimizer)
    assert_same(actual, trained_alone(batches[:HALF], sparse=False))
    train(model, optimizer, batches[HALF:])
    actual = contents(model.named_parameters(), optimizer)
    assert_same(actual, trained_alone(batches, sparse=False))


def checkpoint_saved(directory: Path, dtype: torch.dtype, flatten: bool) -> None:
    batches = make_batches(dtype)
    model, optimizer = make_sharded(0, dtype)
    train(model, optimizer, batches[:HALF])
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=directory)
    assert_goes_on(model, optimizer, batches)


def checkpoint_loaded(
    directory: Path, dtype: torch.dtype, flatten: bool, sharded: bool
) -> None:
    model = Model(sparse=False, dtype=dtype, seed=3)
    if sharded:
        shard(model)
    optimizer = Adamax(model.parameters(), lr=1.0)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=of_model,
        optim_state_dict=of_optimizer,
        options=options,
    )
    assert_goes_on(model, optimizer, make_batches(dtype))


def whole_state_dict(dtype: torch.dtype) -> None:
    """One process collects model and state, which the others then get from it."""
    batches = make_batches(dtype)
    model, optimizer = make_sharded(0, dtype)
    train(model, optimizer, batches[:HALF])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    assert bool(of_optimizer) is (dist.get_rank() == 0)

    model, optimizer = make_sharded(3, dtype)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, of_model, options=options)
    set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
    assert_goes_on(model, optimizer, batches)


SCENARIOS: dict[str, Callable[..., None]] = {
    scenario.__name__: scenario
    for scenario in (
        fails,
        never_ends,
        data_parallel,
        exact_data_parallel,
        uneven_data_parallel,
        accumulated_data_parallel,
        fully_sharded,
        tensor_parallel,
        layouts,
        zero_redundancy,
        checkpoint_saved,
        checkpoint_loaded,
        whole_state_dict,
    )
}
