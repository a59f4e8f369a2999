"""Which way each parameter takes in a step: all that can fail first, and then the step."""

from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import _compat, cuda, device, operations
from .batch import (
    FLOATS,
    PLAIN_TENSORS,
    Batch,
    Called,
    Scaling,
    Work,
    by_shape,
    check_operands,
    described,
)
from .cuda_exact import ExactLaunch
from .device import triton_serves
from .exact import Tables, part_of_step
from .native import Call
from .options import Options, check_count
from .sparse import by_frames, check_sparse_in_rows, every_row, has_rows, sparse_rows

_IS_SPARSE, _IS_CPU, _DTYPE = map(attrgetter, ("is_sparse", "is_cpu", "dtype"))
_NO_SCALING = Scaling()


def take_step(
    groups: Sequence[tuple[Batch, Options]],
    scaling: Scaling = _NO_SCALING,
    tables: Tables | None = None,
    uploads: cuda.Uploads | None = None,
) -> None:
    """One step of parameters with their options. Where it raises, it has changed nothing.

    Args:
        groups: the parameters.
        scaling: what a ``GradScaler`` says.
        tables: what knows the stale rows of an optimizer.
        uploads: what has been uploaded to a device in other steps.
    """
    if not groups:
        return
    called = by_shape if tables is None else tables.called
    if all(_is_simple(batch, options) for batch, options in groups):
        if tables is not None:
            for batch, _ in groups:
                tables.check_lazy(batch.params)
        # Usually all are on the CPU and fit, which the native core finds out by itself.
        call = Call(scaling, called)
        for batch, options in groups:
            call.add(batch, options)
        if call.attempt() is None:
            return

    call, work = Call(scaling, called), []
    uploads = cuda.Uploads() if uploads is None else uploads
    positions = _positions(groups)
    for batch, options in groups:
        if options.exact and tables is not None:
            batch, sparse = batch.by_layout()
            tables.check_dense(batch.params)
            for one in sparse.singles():
                work += _prepare_exact(one, options, scaling, tables, call, positions)
        elif tables is not None:
            tables.check_lazy(batch.params)
        if batch.params:
            batch = _local(batch)
            _check_leaves(batch, options)
            if batch.frames is not None:
                for param, grad in zip(batch.params, batch.grads, strict=True):
                    check_sparse_in_rows(param, grad, "state_dtype='8bit'", called)
            for way, part in _ways(batch, options):
                if way not in ("native", "triton") and options.needs_kernels:
                    raise RuntimeError(
                        f"state_dtype={options.state_dtype!r} and stochastic_rounding need "
                        f"strided parameters on the CPU or, with Triton installed, on an "
                        f"NVIDIA GPU, got {described(part.params[0])}"
                    )
                if way == "native":
                    work += _add_to(call, part, options, scaling, called)
                elif way == "triton":
                    work += cuda.prepare(part, options, scaling, called, uploads, positions)
                else:
                    foreach, scale = way == "foreach", scaling.number
                    work += operations.prepare(
                        part, options, scale, called, foreach=foreach
                    )
    call.run()
    for each in work:
        each()


def _positions(groups: Sequence[tuple[Batch, Options]]) -> cuda.Positions:
    """Those of a step; nothing is rounded by random bits where all state is plain."""
    if not any(options.needs_kernels for _, options in groups):
        return cuda.Positions(0)
    dense = (by_frames(batch.by_layout()[0])[0] for batch, _ in groups)
    return cuda.Positions(sum(len(part.params) for part in dense))


def _is_simple(batch: Batch, options: Options) -> bool:
    """Whether the native core may serve a group, whose gradients are dense."""
    return (
        options.path == "compiled"
        and not (options.exact or options.capturable)
        and _are_plain(batch.params)
        # To be refused by DLPack takes a sparse tensor more than a millisecond.
        and not any(map(_IS_SPARSE, batch.grads))
        and not any(map(has_rows, batch.frames or ()))
    )


def _add_to(
    call: Call, batch: Batch, options: Options, scaling: Scaling, called: Called
) -> list[Work]:
    """Have a call of the native core step parameters; returns what it cannot do."""
    dense, sparse = batch.by_layout()
    dense, of_rows = by_frames(dense)
    for one in of_rows:
        check_operands(one, called)
        call.add_rows(one, options, every_row(one.grads[0]))
    call.add(dense, options)
    work: list[Work] = []
    for one in sparse.singles():
        rows = sparse_rows(one.params[0], one.grads[0], called)
        if not call.add_rows(one, options, rows):
            # Several dimensions are sparse, and strides do not allow to see them as one.
            work += operations.prepare(one, options, scaling.number, called, foreach=False)
    return work


def _prepare_exact(
    one: Batch,
    options: Options,
    scaling: Scaling,
    tables: Tables,
    call: Call,
    positions: cuda.Positions,
) -> list[Work]:
    table, flush = tables.prepare(one, options)
    if table.on_device is not None:
        launch = cuda.prepare_rows(one, options, scaling, tables.called, positions)
        count = table.on_device.count(one.steps[0])
        check_count(count, one.params[0], tables.called)
        return [ExactLaunch(launch, table.on_device, options, flush, int(count))]
    rows = sparse_rows(one.params[0], one.grads[0], tables.called)
    tables.share(one.params[0], rows, table)
    assert table.stale is not None
    call.add_rows(one, options, rows, partial(part_of_step, table.stale, flush))
    return []


def _check_leaves(batch: Batch, options: Options) -> None:
    recorded = options.differentiable and torch.is_grad_enabled()
    if recorded and any(p.is_leaf and p.requires_grad for p in batch.params):
        raise RuntimeError(
            "differentiable=True needs parameters that are computed from others, got a "
            "leaf that requires a gradient"
        )


def _ways(batch: Batch, options: Options) -> Iterator[tuple[Any, Batch]]:
    """The ways that a step of a group takes, with the parameters that take each."""
    if options.path != "compiled":
        yield options.path, batch
        return
    ways: list[str | None] = [_compiled(batch.params)] * len(batch.params)
    if ways[0] is None:
        ways = [_compiled([param]) for param in batch.params]
    if options.capturable and "native" in ways:
        raise RuntimeError("capturable=True needs parameters on an accelerator")
    if None in ways:
        unfit = batch.params[ways.index(None)]
        if options.fused:
            raise RuntimeError(
                f"fused=True needs float or complex parameters on the CPU or, with Triton "
                f"installed, on an NVIDIA GPU, got {type(unfit).__name__} of {unfit.dtype} "
                f"on {unfit.device}"
            )
        devices = _compat.foreach_devices()
        others = ["foreach" if p.device.type in devices else "loop" for p in batch.params]
        ways = [way or other for way, other in zip(ways, others, strict=True)]
    yield from batch.split(ways).items()


def _compiled(params: Sequence[Tensor]) -> str | None:
    """The compiled kernels that serve all of these parameters, if any do."""
    if triton_serves(params):
        return "triton"
    are_on_cpu = _are_plain(params) and all(map(_IS_CPU, params))
    return "native" if are_on_cpu and set(map(_DTYPE, params)) <= FLOATS else None


def _are_plain(params: Sequence[Tensor]) -> bool:
    """Whether parameters may be on the CPU; looks at the device of the first alone."""
    plain = set(map(type, params)) <= PLAIN_TENSORS
    return plain and not device.DEVICE.holds(params[:1])


def _local(batch: Batch) -> Batch:
    """This process' part of DTensors, which the rule can be applied to by itself."""
    distributed = device.distributed_tensor()
    if distributed is None or distributed not in set(map(type, batch.params)):
        return batch

    def part(tensor: Any, like: Any) -> Tensor:
        if isinstance(tensor, distributed):
            if tensor.placements != like.placements:
                tensor = tensor.redistribute(placements=like.placements)
            tensor = tensor.to_local()
        local: Tensor = tensor
        return local

    params, grads, exp_avgs, exp_infs = (
        [part(tensor, param) for tensor, param in zip(column, batch.params, strict=True)]
        for column in batch.lists()[:4]
    )
    return Batch(params, grads, exp_avgs, exp_infs, batch.steps, batch.frames)
