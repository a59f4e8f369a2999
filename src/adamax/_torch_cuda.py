"""Steps of :class:`adamax.torch.Adamax` through the Triton kernels, for CUDA tensors.

Nothing here waits for the device, and nothing is read back from it: step counters, what a
``GradScaler`` says, and a learning rate that is a tensor stay where they are.
"""

import functools
import importlib
import importlib.util
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

from torch.autograd.graph import increment_version

import numpy as np
import torch
from torch import Tensor

from ._kernels import Int64Array
from ._kernels._memory import Ranges
from ._rule import Coefficients
from ._torch_paths import (
    _PLAIN_TENSORS,
    STORAGE,
    Batch,
    Options,
    Scaling,
    SparseStep,
    Work,
    fitted,
    in_place,
    layout_of,
    numbers_in_row,
    sparse_rows,
    state_dtype,
    written,
)

_DTYPE = attrgetter("dtype")
_IS_CUDA = attrgetter("is_cuda")
_KIND = attrgetter("layout", "dtype", "device")

# --- Who is served ---------------------------------------------------------------------


def cuda_serves(params: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels can update all parameters, or what is here of them."""
    return (
        DEVICE.holds(params)
        and set(map(_DTYPE, params)) <= STORAGE.keys()
        and set(map(type, params)) <= {*_PLAIN_TENSORS, _distributed_tensor()}
        and has_triton()
    )


def wants_cuda(options: Mapping[str, Any]) -> bool:
    """Whether the options of a group leave its CUDA parameters to the Triton kernels."""
    fused, foreach = options["fused"], options["foreach"]
    unasked = fused is None and foreach is None
    return not options["differentiable"] and (fused or unasked)


def _distributed_tensor() -> Any:
    module: Any = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


@functools.cache
def has_triton() -> bool:
    """Whether there is Triton for NVIDIA GPUs; warns, once, where a GPU lacks it."""
    if torch.version.hip is not None:
        return False  # never tried there
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "adamax has fused CUDA kernels that need Triton, which is not installed; torch's "
        "foreach operations are used instead (pip install triton)",
        stacklevel=2,
    )
    return False


@functools.cache
def triton_kernels() -> Any:
    return importlib.import_module("adamax._kernels._triton")


# --- The device ------------------------------------------------------------------------


class Device:
    """What steps need of CUDA besides memory."""

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        return all(map(_IS_CUDA, tensors))

    def current(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where kernels are launched within the context."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def staging(self, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Memory of the host that is copied from without waiting."""
        return torch.empty(count, dtype=dtype, pin_memory=True)


DEVICE = Device()

# What graphs copy from whenever they are replayed. They may outlive everything else.
_READ_BY_GRAPHS: list[Tensor] = []


class _Uploaded:
    """Integers on a device, uploaded when they change."""

    def __init__(self) -> None:
        self._array: Int64Array | None = None
        self._stream = -1
        self._tensor = torch.empty(0)
        self._spare = torch.empty(0)

    def tensor(self, array: Int64Array, device: torch.device) -> Tensor:
        if DEVICE.is_capturing():
            # The graph copies them anew: what lies on the device may be gone by then.
            # Memory is better not pinned while a graph is captured, so there is a spare.
            source = self._spare if len(self._spare) == array.size else None
            self._spare = torch.empty(0)
            source = DEVICE.staging(array.size) if source is None else source
            _READ_BY_GRAPHS.append(source)
            return _upload(source, array, device)
        stream = DEVICE.stream(device)
        known = self._array is not None and np.array_equal(self._array, array)
        if not (known and self._stream == stream):
            self._tensor = _upload(DEVICE.staging(array.size), array, device)
            self._array, self._stream = array, stream
            if len(self._spare) != array.size:
                self._spare = DEVICE.staging(array.size)
        return self._tensor


def _upload(staging: Tensor, array: Int64Array, device: torch.device) -> Tensor:
    staging.numpy()[:] = array.ravel()
    return staging.to(device, non_blocking=True, copy=True)


def is_on_device(tensor: Tensor) -> bool:
    return DEVICE.holds([tensor])


def _there(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _step_options(options: Options, scaling: Scaling, device: torch.device) -> Any:
    lr = options.lr
    if isinstance(lr, Tensor) and is_on_device(lr):
        lr = lr.to(device, non_blocking=True)  # not read here
    else:
        lr = options.lr_number
    return triton_kernels().StepOptions(
        lr=lr,
        beta_1=options.hyperparameters.beta_1,
        decay=options.decay,
        sign=-1.0 if options.maximize else 1.0,
        coupled_decay=options.coupled_decay,
        grad_scale=_there(scaling.grad_scale, device),
        found_inf=_there(scaling.found_inf, device),
    )


# --- Steps -----------------------------------------------------------------------------


def prepare_cuda(
    batch: Batch, options: Options, scaling: Scaling, known: "KnownOnDevice"
) -> list[Work]:
    """A step through the Triton kernels.

    Raises:
        RuntimeError: a step counter that is not on the device of its parameter.
    """
    dense, sparse = batch.by_layout()
    _check_counters(sparse)
    work: list[Work] = []
    for one in sparse.singles():
        work += _rows_launch(one, options, scaling)
    if dense.params:
        for part, grads in known.parts(dense):
            work.append(_DenseLaunch.prepare(part, grads, options, scaling))
    return work


def _check_counters(batch: Batch) -> None:
    for param, step in zip(batch.params, batch.steps, strict=True):
        if step.device != param.device or step.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"the step counter of a parameter that fused kernels update must be "
                f"float32 or float64 on its device {param.device}, got {step.dtype} on "
                f"{step.device}; load_state_dict() puts it there"
            )


# --- Dense gradients -------------------------------------------------------------------


class KnownOnDevice:
    """Parameters and state that were found fit for the kernels, and their tables.

    As :class:`adamax._torch_paths.KnownTensors`: the same tensors where they were are not
    examined again.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._parts: list[_Part] = []

    def parts(self, batch: Batch) -> "list[tuple[_Part, list[Tensor]]]":
        """What is updated in a launch each, with its gradients."""
        tensors = written(batch)
        addresses = list(map(Tensor.data_ptr, tensors))
        strides = list(map(Tensor.stride, batch.params))  # may be transposed in place
        if not (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and addresses == self._addresses
            and strides == self._strides
        ):
            _check_counters(batch)
            kinds = zip(map(_KIND, batch.params), batch.steps, strict=True)
            parts = [_Part(p) for p in batch.split([(k, step.dtype) for k, step in kinds])]
            if any(part.copies for part in parts):
                return self._with_gradients(parts, batch)
            self._tensors, self._addresses = tensors, addresses
            self._strides, self._parts = strides, parts
        return self._with_gradients(self._parts, batch)

    def _with_gradients(
        self, parts: "list[_Part]", batch: Batch
    ) -> "list[tuple[_Part, list[Tensor]]]":
        if len(parts) == 1:
            return [(parts[0], batch.grads)]
        gradient_of = {id(p): g for p, g in zip(batch.params, batch.grads, strict=True)}
        return [(part, [gradient_of[id(p)] for p in part.params]) for part in parts]


class _Part:
    """Dense parameters that one launch updates: of one device and dtype."""

    def __init__(self, batch: Batch) -> None:
        self.params = batch.params
        self.dtype = batch.params[0].dtype
        self.device = batch.params[0].device
        self.counter = batch.steps[0].dtype
        self.copies: list[tuple[Tensor, Tensor]] = []  # which to copy back where

        self._layouts = [layout_of(param) for param in batch.params]
        self._strides = [like.stride() for like in self._layouts]
        self._sizes = [like.numel() for like in self._layouts]
        number = state_dtype(self.dtype)
        columns = (
            self._fitted(batch.params, self.dtype),
            self._fitted(batch.exp_avgs, number),
            self._fitted(batch.exp_infs, number),
        )
        # The table has their addresses.
        self._held = [*columns, batch.steps]
        addresses = [[tensor.data_ptr() for tensor in column] for column in self._held]
        numbers = 2 if self.dtype.is_complex else 1
        lengths = numbers * np.array(self._sizes, np.int64)
        self.chunk = triton_kernels().chunk_of(int(lengths.sum()))
        programs = -(-lengths // self.chunk)
        self._first = np.concatenate([[0], np.cumsum(programs)])
        rows = np.array([*addresses, lengths, self._first[:-1]], np.int64).T
        owners = np.repeat(np.arange(len(lengths)), programs)
        self._table = np.concatenate([rows.ravel(), owners])
        self._uploaded_table, self._uploaded_gradients = _Uploaded(), _Uploaded()

        w, m, u = (np.array([t.nbytes for t in column], np.int64) for column in columns)
        self._bytes = w
        self._ranges = Ranges(
            np.array(addresses[:3], np.int64).ravel(), np.concatenate([w, m, u])
        )

    def __len__(self) -> int:
        return len(self.params)

    def _fitted(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        fit = [
            fitted(t, x, dtype, self.device)
            for t, x in zip(tensors, self._layouts, strict=True)
        ]
        pairs = zip(tensors, fit, strict=True)
        self.copies += [(tensor, copy) for tensor, copy in pairs if copy is not tensor]
        return fit

    def fitted_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients in the memory order of their parameters, those that are not copied."""
        if (
            set(map(_KIND, grads)) == {(torch.strided, self.dtype, self.device)}
            and list(map(Tensor.stride, grads)) == self._strides
            and list(map(Tensor.numel, grads)) == self._sizes
            and not any(map(Tensor.is_neg, grads))
            and not (self.dtype.is_complex and any(map(Tensor.is_conj, grads)))
        ):
            return grads
        pairs = zip(grads, self._layouts, strict=True)
        return [fitted(grad, like, self.dtype, self.device) for grad, like in pairs]

    def upload(self, gradients: Int64Array) -> tuple[Tensor, Tensor, Tensor]:
        """The table, the parameter of each program, and the addresses of gradients."""
        table = self._uploaded_table.tensor(self._table, self.device)
        rows = len(triton_kernels().Column) * len(self)
        addresses = self._uploaded_gradients.tensor(gradients, self.device)
        return table[:rows], table[rows:], addresses

    def launches(self, gradients: Int64Array) -> list[range]:
        """Programs that may run at once."""
        first = self._first.tolist()
        if len(self) == 1 or (
            self._ranges.lie_apart and not self._ranges.overlap(gradients, self._bytes)
        ):
            bounds = [(0, first[-1])]
        else:
            # Parameters that share memory are updated one after the other, as in torch.
            bounds = list(pairwise(first))
        return [range(start, end) for start, end in bounds if end > start]


@dataclass(frozen=True, slots=True)
class _DenseLaunch:
    """Holds the memory that it has the addresses of."""

    part: _Part
    grads: list[Tensor]
    options: Options
    of_step: Any  # the kernels' StepOptions
    uploaded: tuple[Tensor, Tensor, Tensor]
    factors: Tensor
    launches: list[range]

    @classmethod
    def prepare(
        cls, part: _Part, grads: list[Tensor], options: Options, scaling: Scaling
    ) -> "_DenseLaunch":
        with DEVICE.current(part.device):
            grads = part.fitted_gradients(grads)
            addresses = np.array(list(map(Tensor.data_ptr, grads)), np.int64)
            return cls(
                part,
                grads,
                options,
                _step_options(options, scaling, part.device),
                part.upload(addresses),
                torch.empty((len(part), 4), dtype=torch.float64, device=part.device),
                part.launches(addresses),
            )

    def __call__(self) -> None:
        part = self.part
        table, owners, gradients = self.uploaded
        with DEVICE.current(part.device):
            triton_kernels().advance(
                table, len(part), part.counter, self.factors, self.of_step
            )
            for programs in self.launches:
                triton_kernels().dense_step(
                    STORAGE[part.dtype],
                    table,
                    owners,
                    gradients,
                    self.factors,
                    self.of_step.found_inf,
                    Coefficients.of(self.options.hyperparameters),
                    bool(self.options.coupled_decay),
                    part.chunk,
                    programs,
                )
            for target, source in part.copies:
                target.copy_(source)
        increment_version(part.params)


# --- Sparse gradients ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowsOnDevice:
    """The rows of one table."""

    batch: Batch
    options: Options
    of_step: Any  # the kernels' StepOptions
    values: Tensor
    rows: int
    row_length: int  # in numbers
    ids: Tensor  # sorted
    order: Tensor  # the place that each had
    sums: Tensor
    factors: Tensor

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), (step,) = self.batch.lists()
        with DEVICE.current(param.device):
            triton_kernels().advance_one(step, self.factors, self.of_step)
            if len(self.ids) and self.row_length:
                tensors = (param, exp_avg, exp_inf, self.values)
                triton_kernels().rows_step(
                    STORAGE[param.dtype],
                    tuple(map(as_numbers, tensors)),
                    (self.ids, self.order),
                    self.sums,
                    self.rows,
                    self.row_length,
                    self.factors,
                    self.of_step.found_inf,
                    Coefficients.of(self.options.hyperparameters),
                    bool(self.options.coupled_decay),
                )
        increment_version(param)


def _rows_launch(batch: Batch, options: Options, scaling: Scaling) -> list[Work]:
    (param,), _, (exp_avg,), (exp_inf,), _ = batch.lists()
    if not in_place(param, exp_avg, exp_inf):
        # Rare enough to wait for the device.
        if scaling.skips:
            return []
        return [SparseStep.prepare(batch, options, scaling.number)]
    return [prepare_rows(batch, options, scaling)]


def prepare_rows(batch: Batch, options: Options, scaling: Scaling) -> RowsOnDevice:
    """A step on the rows of one table, which can be updated in place."""
    _check_counters(batch)
    (param,), (grad,), (exp_avg,), _, _ = batch.lists()
    with DEVICE.current(param.device):
        rows = sparse_rows(param, grad, wait=False)
        ids, order = torch.sort(rows.indices, stable=True)
        row_length = numbers_in_row(param, rows)
        sums = triton_kernels().sums_of(rows.values, row_length, exp_avg.dtype.to_real())
        return RowsOnDevice(
            batch,
            options,
            _step_options(options, scaling, param.device),
            rows.values,
            rows.count,
            row_length,
            ids,
            order,
            sums,
            torch.empty(4, dtype=torch.float64, device=param.device),
        )


def as_numbers(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
