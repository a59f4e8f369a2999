"""Steps by the Triton kernels, for tensors on an NVIDIA GPU.

Nothing here waits for the device, and nothing is read back from it: step counters, what a
``GradScaler`` says, and a learning rate that is a tensor stay where they are.
"""

import functools
import importlib
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import numpy.typing as npt
from torch.autograd.graph import increment_version

import numpy as np
import torch
from torch import Tensor

from .._core.kernels import Int64Array
from . import device, operations
from .batch import FLOATS, Batch, Called, Scaling, Work, check_operands, check_state
from .options import Options, state_dtype
from .sparse import sparse_rows

_KIND = attrgetter("layout", "dtype", "device")

# What graphs copy from whenever they are replayed. They may outlive everything else.
_READ_BY_GRAPHS: list[Tensor] = []


@functools.cache
def kernels() -> Any:
    """The Triton kernels on whole parameters."""
    return importlib.import_module("adamax.torch.triton")


@functools.cache
def row_kernels() -> Any:
    """The Triton kernels on rows."""
    return importlib.import_module("adamax.torch.triton_rows")


class Uploads:
    """Integers on devices, uploaded where they have changed since the last step."""

    def __init__(self) -> None:
        self._of: dict[Hashable, _Uploaded] = {}

    def tensor(self, key: Hashable, array: Int64Array, on: torch.device) -> Tensor:
        """``array`` on a device; ``key`` is that of similar arrays in other steps."""
        return self._of.setdefault(key, _Uploaded()).tensor(array, on)


class _Uploaded:
    def __init__(self) -> None:
        self._array: Int64Array | None = None
        self._stream = -1
        self._tensor = torch.empty(0)
        self._spare = torch.empty(0)

    def tensor(self, array: Int64Array, on: torch.device) -> Tensor:
        if device.DEVICE.is_capturing():
            # The graph copies them anew: what lies on the device may be gone by then.
            # Memory is better not pinned while a graph is captured, so there is a spare.
            source = self._spare if len(self._spare) == array.size else None
            self._spare = torch.empty(0)
            source = device.DEVICE.staging(array.size) if source is None else source
            _READ_BY_GRAPHS.append(source)
            return _upload(source, array, on)
        stream = device.DEVICE.stream(on)
        known = self._array is not None and np.array_equal(self._array, array)
        if not (known and self._stream == stream):
            self._tensor = _upload(device.DEVICE.staging(array.size), array, on)
            self._array, self._stream = array, stream
            if len(self._spare) != array.size:
                self._spare = device.DEVICE.staging(array.size)
        return self._tensor


def _upload(staging: Tensor, array: Int64Array, on: torch.device) -> Tensor:
    staging.numpy()[:] = array
    return staging.to(on, non_blocking=True, copy=True)


def of_step(options: Options, scaling: Scaling, on: torch.device) -> Any:
    """What the kernels need of options besides tensors."""
    lr = options.lr
    if isinstance(lr, Tensor) and device.DEVICE.holds([lr]):
        lr = lr.to(on, non_blocking=True)  # it is not read here
    else:
        lr = options.rate
    return kernels().OfStep(
        hyperparameters=options.hyperparameters,
        lr=lr,
        decay=options.decay,
        coupled_decay=options.coupled_decay,
        sign=-1.0 if options.maximize else 1.0,
        grad_scale=_there(scaling.grad_scale, on),
        found_inf=_there(scaling.found_inf, on),
    )


def _there(tensor: Tensor | None, on: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(on, non_blocking=True)


def prepare(
    batch: Batch,
    options: Options,
    scaling: Scaling,
    called: Called,
    where: tuple[int, Uploads],
) -> list[Work]:
    """All that can fail in a step of some parameters; returns what remains to be done.

    ``where`` is the number of the group, and what has been uploaded in other steps.

    Raises:
        RuntimeError: a step counter that is not on the device of its parameter.
        ValueError: tensors that do not fit their parameters.
    """
    _check_counters(batch, called)
    dense, sparse = batch.by_layout()
    check_operands(dense, called)
    work: list[Work] = []
    for one in sparse.singles():
        if in_place(one):
            work.append(prepare_rows(one, options, scaling, called))
        elif not scaling.skips:  # it is rare enough to wait for the device
            number = scaling.number
            work += operations.prepare(one, options, number, called, foreach=False)
    keys = [
        (p.device, p.dtype, step.dtype, grad.dtype)
        for p, grad, step in zip(dense.params, dense.grads, dense.steps, strict=True)
    ]
    for part, key in zip(dense.split(keys), dict.fromkeys(keys), strict=True):
        with device.DEVICE.current(key[0]):
            work.append(_prepare_dense(part, options, scaling, (where[0], key), where[1]))
    return work


def _check_counters(batch: Batch, called: Called) -> None:
    for param, step in zip(batch.params, batch.steps, strict=True):
        if step.device != param.device or step.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"the step counter of {called(param)}, which fused kernels update, must be "
                f"float32 or float64 on its device {param.device}, got {step.dtype} on "
                f"{step.device}; load_state_dict() puts it there"
            )


# --- Dense gradients -------------------------------------------------------------------


def _prepare_dense(
    batch: Batch, options: Options, scaling: Scaling, key: Hashable, uploads: Uploads
) -> Work:
    """A launch for parameters of one device and dtype."""
    columns, copies = _fitted(batch)
    params, _, _, grads = columns
    dtype, on = params[0].dtype, params[0].device
    addresses = np.array(
        [[t.data_ptr() for t in c] for c in (*columns[:3], batch.steps, grads)], np.int64
    )
    sizes = np.array([[t.nbytes for t in c] for c in columns], np.int64)
    apart, overlapping = _overlaps(addresses[[0, 1, 2, 4]], sizes)
    for i in overlapping.tolist():
        grads[i] = grads[i].clone()
        addresses[4, i] = grads[i].data_ptr()

    lengths = np.array([p.numel() for p in params], np.int64)
    lengths *= 2 if dtype.is_complex else 1
    chunk = kernels().chunk_of(int(lengths.sum()))
    programs = -(-lengths // chunk)
    first = np.concatenate([[0], np.cumsum(programs)])
    rows = np.concatenate([addresses, [lengths, first[:-1]]]).T
    owners = np.repeat(np.arange(len(params)), programs)
    # Parameters that share memory are updated one after the other, as in torch.
    bounds = [(0, int(first[-1]))] if apart else pairwise(first.tolist())
    uploaded = uploads.tensor(key, np.concatenate([rows.ravel(), owners]), on)
    return _DenseLaunch(
        batch,
        columns,
        copies,
        of_step(options, scaling, on),
        (uploaded[: rows.size], uploaded[rows.size :]),
        torch.empty((len(params), 8), dtype=torch.float64, device=on),
        chunk,
        [range(start, end) for start, end in bounds if end > start],
    )


def _fitted(batch: Batch) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Parameters, state and gradients as the kernels need them; what to copy back where.

    Nothing is copied where a parameter has no holes in memory, whatever the order of its
    dimensions, and its gradient and state have the same order.
    """
    params, grads, exp_avgs, exp_infs, _ = batch.lists()
    dtype, gradient = params[0].dtype, grads[0].dtype
    number = state_dtype(dtype)
    if gradient not in FLOATS or gradient.is_complex != dtype.is_complex:
        gradient = number
    columns = [params, exp_avgs, exp_infs, grads]
    dtypes = [dtype, number, number, gradient]
    pairs = list(zip(columns, dtypes, strict=True))
    if all(_are_flat(column, dtype, params[0].device) for column, dtype in pairs):
        return [list(column) for column in columns], []
    # Of a parameter's shape and order of dimensions, without holes; no memory.
    layouts = [
        torch.empty_like(p, device="meta", memory_format=torch.preserve_format)
        for p in params
    ]
    fitted = [
        [_fit(t, x, dtype, params[0].device) for t, x in zip(column, layouts, strict=True)]
        for column, dtype in pairs
    ]
    written = zip(chain(*columns[:3]), chain(*fitted[:3]), strict=True)
    return fitted, [(tensor, copy) for tensor, copy in written if copy is not tensor]


def _are_flat(tensors: list[Tensor], dtype: torch.dtype, on: torch.device) -> bool:
    """Whether the elements of each tensor lie in memory as its indices count them."""
    return (
        set(map(_KIND, tensors)) == {(torch.strided, dtype, on)}
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_conj, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def _fit(tensor: Tensor, like: Tensor, dtype: torch.dtype, on: torch.device) -> Tensor:
    """``tensor`` if it has the layout of ``like``, else a copy that has."""
    same = tensor.stride() == like.stride() and _are_of_kind(tensor, dtype, on)
    return tensor if same else torch.empty_like(like, dtype=dtype, device=on).copy_(tensor)


def _are_of_kind(tensor: Tensor, dtype: torch.dtype, on: torch.device) -> bool:
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.dtype is dtype and tensor.device == on and not lazy


def _overlaps(
    addresses: Int64Array, sizes: Int64Array
) -> tuple[bool, npt.NDArray[np.intp]]:
    """Whether what is written lies apart, and which gradients overlap what is written.

    The rows are of parameters, first moments, norms and gradients.
    """
    starts, ends = addresses[:3].ravel(), (addresses + sizes)[:3].ravel()
    order = np.argsort(starts[ends > starts])
    starts, ends = starts[ends > starts][order], ends[ends > starts][order]
    reach = np.maximum.accumulate(ends)
    apart = bool((reach[:-1] <= starts[1:]).all())
    # The first that ends behind the start of a gradient.
    following = np.searchsorted(reach, addresses[3], side="right")
    starts = np.append(starts, np.iinfo(np.int64).max)
    return apart, np.flatnonzero(starts[following] < addresses[3] + sizes[3])


@dataclass(frozen=True, slots=True)
class _DenseLaunch:
    """Holds the memory that it has the addresses of."""

    batch: Batch
    columns: list[list[Tensor]]
    copies: list[tuple[Tensor, Tensor]]
    of_step: Any
    uploaded: tuple[Tensor, Tensor]  # the table, and the parameter of each program
    scalars: Tensor
    chunk: int
    launches: list[range]  # programs that may run at once

    def __call__(self) -> None:
        param, grad = self.columns[0][0], self.columns[3][0]
        table, owners = self.uploaded
        with device.DEVICE.current(param.device):
            counter = self.batch.steps[0].dtype
            kernels().advance(table, counter, self.scalars, self.of_step)
            for programs in self.launches:
                kernels().dense_step(
                    (param.dtype.to_real(), grad.dtype.to_real()),
                    table,
                    owners,
                    self.scalars,
                    self.of_step,
                    self.chunk,
                    programs,
                )
            for target, source in self.copies:
                target.copy_(source)
        increment_version(self.batch.params)


# --- Sparse gradients ------------------------------------------------------------------


def in_place(one: Batch) -> bool:
    """Whether kernels can work on the rows of a table where they lie."""
    (param,), _, exp_avg, exp_inf, _ = one.lists()
    wanted = state_dtype(param.dtype)
    return param.is_contiguous() and all(
        state.is_contiguous() and _are_of_kind(state, wanted, param.device)
        for state in (*exp_avg, *exp_inf)
    )


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    """The rows of one table."""

    batch: Batch
    of_step: Any
    values: Tensor
    rows: int
    row_length: int  # in numbers
    ids: Tensor  # sorted
    order: Tensor  # the place that each had
    scalars: Tensor

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), (step,) = self.batch.lists()
        with device.DEVICE.current(param.device):
            kernels().advance(None, step, self.scalars, self.of_step)
            if len(self.ids) and self.row_length:
                row_kernels().rows_step(
                    param.dtype.to_real(),
                    tuple(map(as_numbers, (param, exp_avg, exp_inf, self.values))),
                    (self.ids, self.order),
                    self.rows,
                    self.row_length,
                    self.scalars,
                    self.of_step,
                )
        increment_version(param)


def prepare_rows(
    batch: Batch, options: Options, scaling: Scaling, called: Called
) -> RowsLaunch:
    """A step on the rows of one table, which can be updated in place."""
    (param,), (grad,), (exp_avg,), (exp_inf,), _ = batch.lists()
    check_state(param, exp_avg, exp_inf, called)
    with device.DEVICE.current(param.device):
        rows = sparse_rows(param, grad, called)
        ids, order = torch.sort(rows.flat(wait=False), stable=True)
        values = rows.values.resolve_conj().resolve_neg().contiguous()
        memory = values.untyped_storage().data_ptr()
        if memory in (t.untyped_storage().data_ptr() for t in (param, exp_avg, exp_inf)):
            values = values.clone()
        return RowsLaunch(
            batch,
            of_step(options, scaling, param.device),
            values,
            rows.count,
            rows.row_length,
            ids,
            order,
            torch.empty((1, 8), dtype=torch.float64, device=param.device),
        )


def as_numbers(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
