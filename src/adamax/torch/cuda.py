"""Steps by the Triton kernels, for tensors on an NVIDIA GPU.

Nothing here waits for the device, and nothing is read back from it: step counters, what a
``GradScaler`` says, and a learning rate that is a tensor stay where they are.
"""

import functools
import importlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._core.kernels import Int64Array
from . import device, operations
from .batch import (
    FLOATS,
    Batch,
    Called,
    Scaling,
    Work,
    check_operands,
    check_state,
    described,
)
from .options import Options, kind_of, state_dtype, stored_dtype
from .sparse import SparseRows, by_frames, every_row, frame_of_rows, sparse_rows

_KIND = attrgetter("layout", "dtype", "device")

# What graphs copy from whenever they are replayed. They may outlive everything else.
_READ_BY_GRAPHS: list[Tensor] = []


@functools.cache
def kernels(name: str = "triton") -> Any:
    """The Triton kernels on whole parameters, or on rows: ``"triton_rows"``."""
    return importlib.import_module(f"adamax.torch.{name}")


class Uploads:
    """Integers on devices, uploaded where they have changed since the last step."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Int64Array, int, Tensor]] = {}
        self._spare: dict[Hashable, Tensor] = {}

    def tensor(self, key: Hashable, array: Int64Array, on: torch.device) -> Tensor:
        """``array`` on a device; ``key`` is that of similar arrays in other steps."""
        if device.DEVICE.is_capturing():
            # The graph copies them anew: what lies on the device may be gone by then.
            # Memory is better not pinned while a graph is captured, so there is a spare.
            source = self._spare.pop(key, torch.empty(0))
            if len(source) != array.size:
                source = device.DEVICE.staging(array.size)
            _READ_BY_GRAPHS.append(source)
            return _upload(source, array, on)
        stream = device.DEVICE.stream(on)
        known = self._known.get(key)
        if known is None or known[1] != stream or not np.array_equal(known[0], array):
            tensor = _upload(device.DEVICE.staging(array.size), array, on)
            self._known[key] = known = array, stream, tensor
            if len(self._spare.get(key, "")) != array.size:
                self._spare[key] = device.DEVICE.staging(array.size)
        return known[2]


def _upload(staging: Tensor, array: Int64Array, on: torch.device) -> Tensor:
    staging.numpy()[:] = array
    return staging.to(on, non_blocking=True, copy=True)


@dataclass(frozen=True, slots=True)
class OfStep:
    """What the kernels need besides parameters: see ``advance`` in ``triton.py``."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    numbers: tuple[float, ...]

    @classmethod
    def on(cls, where: torch.device, options: Options, scaling: Scaling) -> "OfStep":
        lr, h = options.lr, options.hyperparameters
        stays = isinstance(lr, Tensor) and device.DEVICE.holds([lr])  # it is not read here
        lr_tensor, grad_scale, found_inf = (
            t.to(where, non_blocking=True) if isinstance(t, Tensor) else None
            for t in (lr if stays else None, scaling.grad_scale, scaling.found_inf)
        )
        numbers = (
            0.0 if stays else options.rate,
            math.log(h.beta_1) if h.beta_1 else -math.inf,
            options.decay,
            -1.0 if options.maximize else 1.0,
            options.coupled_decay,
            1.0 - h.beta_1,
            h.beta_2,
            h.epsilon,
        )
        return cls((lr_tensor, grad_scale, found_inf), numbers)

    @property
    def flags(self) -> tuple[Tensor | None, bool]:
        """What skips a step, and whether there is coupled decay."""
        return self.tensors[2], bool(self.numbers[4])


class Positions:
    """The positions of parameters in a step, which their random bits depend on.

    As in the native core those with dense gradients come first.

    Args:
        dense: how many those are.
    """

    def __init__(self, dense: int) -> None:
        self._dense, self._tables = 0, dense

    def of_dense(self, count: int) -> range:
        """Those of the next ``count`` parameters with dense gradients."""
        self._dense += count
        return range(self._dense - count, self._dense)

    def of_table(self) -> int:
        """That of the next table of which rows are updated."""
        self._tables += 1
        return self._tables - 1


def prepare(
    batch: Batch,
    options: Options,
    scaling: Scaling,
    called: Called,
    uploads: Uploads,
    positions: Positions,
) -> list[Work]:
    """All that can fail in a step of some parameters; returns what remains to be done.

    Raises:
        RuntimeError: a step counter that is not on the device of its parameter, or a table
            with compact state that is not contiguous.
        ValueError: tensors that do not fit their parameters.
    """
    dense, sparse = batch.by_layout()
    _check_counters(dense, called)
    check_operands(dense, called)
    _check_frames(dense, called)
    dense, of_rows = by_frames(dense)
    work: list[Work] = []
    for one in (*of_rows, *sparse.singles()):
        if in_place(one):
            work.append(prepare_rows(one, options, scaling, called, positions))
        elif not scaling.skips:  # it is rare enough to wait for the device
            scale = scaling.number
            work += operations.prepare(one, options, scale, called, foreach=False)
    keys = [
        (p.device, p.dtype, step.dtype, grad.dtype, kind_of(exp_avg))
        for p, grad, exp_avg, _, step in zip(*dense.lists(), strict=True)
    ]
    of_dense = positions.of_dense(len(keys))
    for key, part in dense.split(keys).items():
        of_part = [p for p, its in zip(of_dense, keys, strict=True) if its == key]
        with device.DEVICE.current(part.params[0].device):
            work.append(_DenseLaunch.of(part, options, scaling, key, uploads, of_part))
    return work


def _check_counters(batch: Batch, called: Called) -> None:
    for param, step in zip(batch.params, batch.steps, strict=True):
        if step.device != param.device or step.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"the step counter of {called(param)}, which fused kernels update, must be "
                f"float32 or float64 on its device {param.device}, got {step.dtype} on "
                f"{step.device}; load_state_dict() puts it there"
            )


def _check_frames(batch: Batch, called: Called) -> None:
    """Raise a ValueError unless each 8-bit state has a frame beside its parameter."""
    frames = batch.frames or [None] * len(batch.params)
    for param, exp_avg, frame in zip(batch.params, batch.exp_avgs, frames, strict=True):
        if exp_avg.dtype is torch.int8 and not (
            isinstance(frame, Tensor)
            and frame.dtype is torch.float32
            and frame.ndim == 1
            and frame.device == param.device
            and frame.is_contiguous()
        ):
            raise ValueError(
                f"frame of {called(param)} must be a contiguous float32 tensor on "
                f"{param.device}, got {described(frame)}"
            )


def _shift(options: Options) -> float:
    """What a step adds to the frames of 8-bit state."""
    beta_2 = options.hyperparameters.beta_2
    return -4 * math.log2(beta_2) if beta_2 else math.inf


def _is_stochastic(param: Tensor, options: Options) -> bool:
    return options.stochastic and param.dtype is torch.bfloat16


# --- Dense gradients -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _DenseLaunch:
    """Parameters of one device and dtype; holds the memory that it has the addresses of."""

    batch: Batch
    columns: list[list[Tensor]]
    copies: list[tuple[Tensor, Tensor]]  # which to copy back where
    of_step: OfStep
    table: Tensor
    owners: Tensor  # the parameter of each program
    places: Tensor | None  # positions and the addresses of frames, for random bits
    shift: float | None  # of frames
    stochastic: bool
    scalars: Tensor
    chunk: int
    launches: list[range]  # programs that may run at once

    @classmethod
    def of(
        cls,
        batch: Batch,
        options: Options,
        scaling: Scaling,
        key: Hashable,
        uploads: Uploads,
        positions: Sequence[int],
    ) -> "_DenseLaunch":
        columns, copies = _fitted(batch)
        params, grads = columns[0], columns[3]
        dtype, on = params[0].dtype, params[0].device
        five = (*columns[:3], batch.steps, grads)
        addresses = np.array([[t.data_ptr() for t in c] for c in five], np.int64)
        sizes = np.array([[t.nbytes for t in c] for c in columns], np.int64)
        apart, overlapping = _overlaps(addresses[[0, 1, 2, 4]], sizes)
        for i in overlapping.tolist():
            grads[i] = grads[i].clone()
            addresses[4, i] = grads[i].data_ptr()

        lengths = np.array([p.numel() for p in params], np.int64) * (1 + dtype.is_complex)
        chunk = kernels().chunk_of(int(lengths.sum()))
        programs = -(-lengths // chunk)
        first = np.concatenate([[0], np.cumsum(programs)])
        rows = np.concatenate([addresses, [lengths, first[:-1]]]).T
        owners = np.repeat(np.arange(len(params)), programs)
        places = np.empty((0, 2), np.int64)
        is_8bit = columns[1][0].dtype is torch.int8
        stochastic = _is_stochastic(params[0], options)
        frames: list[Any] = [0] * len(params)
        if is_8bit and batch.frames is not None:
            frames = [f.data_ptr() for f in batch.frames if f is not None]
        if stochastic or kind_of(columns[1][0]) != "float32":
            places = np.array([positions, frames], np.int64).T
        parts = rows.ravel(), owners, places.ravel()
        uploaded = uploads.tensor(key, np.concatenate(parts), on)
        of_table, of_owners, of_places = torch.split(uploaded, [p.size for p in parts])
        # Parameters that share memory are updated one after the other, as in torch.
        bounds = [(0, int(first[-1]))] if apart else pairwise(first.tolist())
        return cls(
            batch,
            columns,
            copies,
            OfStep.on(on, options, scaling),
            of_table,
            of_owners,
            of_places if places.size else None,
            _shift(options) if is_8bit else None,
            stochastic,
            _empty_scalars(len(params), on),
            chunk,
            [range(start, end) for start, end in bounds if end > start],
        )

    def __call__(self) -> None:
        dtypes = tuple(column[0].dtype.to_real() for column in self.columns)
        of_step, counter = self.of_step, self.batch.steps[0].dtype
        with device.DEVICE.current(self.scalars.device):
            kernels().advance(
                self.table,
                counter,
                self.scalars,
                of_step.tensors,
                of_step.numbers,
                self.places,
                self.shift,
            )
            for programs in self.launches:
                kernels().dense_step(
                    dtypes,
                    self.table,
                    self.owners,
                    self.scalars,
                    *of_step.flags,
                    self.chunk,
                    programs,
                    self.stochastic,
                )
            for target, source in self.copies:
                target.copy_(source)
        increment_version(self.batch.params)


def _empty_scalars(count: int, on: torch.device) -> Tensor:
    return torch.empty((count, kernels().SCALARS), dtype=torch.float64, device=on)


def _fitted(batch: Batch) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Parameters, state and gradients as the kernels need them; what to copy back where.

    Nothing is copied where a parameter has no holes in memory, whatever the order of its
    dimensions, and its gradient and state have the same order.
    """
    params, grads, exp_avgs, exp_infs, _ = batch.lists()
    dtype, of_gradients, on = params[0].dtype, grads[0].dtype, params[0].device
    if of_gradients not in FLOATS or of_gradients.is_complex != dtype.is_complex:
        of_gradients = state_dtype(dtype)
    columns = [params, exp_avgs, exp_infs, grads]
    of_state = (
        stored_dtype(dtype, kind_of(exp_avgs[0]), name) for name in ("exp_avg", "exp_inf")
    )
    dtypes = [dtype, *of_state, of_gradients]
    if all(
        set(map(_KIND, column)) == {(torch.strided, wanted, on)}
        and all(map(Tensor.is_contiguous, column))
        and not any(map(Tensor.is_conj, column))
        and not any(map(Tensor.is_neg, column))
        for column, wanted in zip(columns, dtypes, strict=True)
    ):
        return [list(column) for column in columns], []
    # Of a parameter's shape and order of dimensions, without holes; no memory.
    layouts = [
        torch.empty_like(p, device="meta", memory_format=torch.preserve_format)
        for p in params
    ]
    fitted = [
        [
            tensor
            if tensor.stride() == like.stride() and _is_fit(tensor, wanted, on)
            else torch.empty_like(like, dtype=wanted, device=on).copy_(tensor)
            for tensor, like in zip(column, layouts, strict=True)
        ]
        for column, wanted in zip(columns, dtypes, strict=True)
    ]
    written = zip(chain(*columns[:3]), chain(*fitted[:3]), strict=True)
    return fitted, [(tensor, copy) for tensor, copy in written if copy is not tensor]


def _is_fit(tensor: Tensor, dtype: torch.dtype, on: torch.device) -> bool:
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


# --- Sparse gradients ------------------------------------------------------------------


def in_place(one: Batch) -> bool:
    """Whether kernels can work on the rows of a table where they lie."""
    (param,), _, (exp_avg,), (exp_inf,), _ = one.lists()
    kind = kind_of(exp_avg)
    return param.is_contiguous() and all(
        state.is_contiguous()
        and _is_fit(state, stored_dtype(param.dtype, kind, name), param.device)
        for name, state in (("exp_avg", exp_avg), ("exp_inf", exp_inf))
    )


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    """The rows of one table."""

    batch: Batch
    of_step: OfStep
    values: Tensor
    rows: int
    row_length: int  # in numbers
    ids: Tensor  # sorted
    order: Tensor  # the place that each had
    position: int | None  # for random bits
    frame: Tensor | None
    shift: float  # of frames
    stochastic: bool
    scalars: Tensor

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), (step,) = self.batch.lists()
        of_step, scales = self.of_step, None
        with device.DEVICE.current(param.device):
            kernels().advance(
                None, step, self.scalars, of_step.tensors, of_step.numbers, self.position
            )
            if self.frame is not None:
                frames = frame_of_rows(self.frame, self.rows)
                if len(self.ids):
                    scales = kernels("triton_rows").advance_frames(
                        frames, self.ids, self.shift, of_step.tensors[2]
                    )
            if len(self.ids) and self.row_length:
                kernels("triton_rows").rows_step(
                    param.dtype.to_real(),
                    tuple(map(as_numbers, (param, exp_avg, exp_inf, self.values))),
                    (self.ids, self.order),
                    self.rows,
                    self.row_length,
                    self.scalars,
                    *of_step.flags,
                    scales,
                    self.stochastic,
                )
        increment_version(param)


def prepare_rows(
    batch: Batch,
    options: Options,
    scaling: Scaling,
    called: Called,
    positions: Positions,
) -> RowsLaunch:
    """A step on the rows of one table, which can be updated in place.

    A dense gradient is one of all rows.
    """
    (param,), (grad,), (exp_avg,), (exp_inf,), _ = batch.lists()
    _check_counters(batch, called)
    check_state(param, exp_avg, exp_inf, called)
    _check_frames(batch, called)
    stochastic, position = _is_stochastic(param, options), positions.of_table()
    is_rounded = stochastic or kind_of(exp_avg) != "float32"
    with device.DEVICE.current(param.device):
        is_dense = grad.layout is torch.strided
        rows = every_row(grad) if is_dense else sparse_rows(param, grad, called)
        frame = _frame_of(batch, rows, called)
        ids, order = torch.sort(rows.flat(wait=False), stable=True)
        values = rows.values.resolve_conj().resolve_neg().contiguous()
        memory = values.untyped_storage().data_ptr()
        if memory in (t.untyped_storage().data_ptr() for t in (param, exp_avg, exp_inf)):
            values = values.clone()
        return RowsLaunch(
            batch,
            OfStep.on(param.device, options, scaling),
            values,
            rows.count,
            rows.row_length,
            ids,
            order,
            position if is_rounded else None,
            frame,
            _shift(options),
            stochastic,
            _empty_scalars(1, param.device),
        )


def _frame_of(one: Batch, rows: SparseRows, called: Called) -> Tensor | None:
    """The frame of 8-bit state that has one number or one for each row."""
    if one.exp_avgs[0].dtype is not torch.int8 or one.frames is None:
        return None
    frame = one.frames[0]
    if frame is not None and frame.numel() not in (1, rows.count):
        raise ValueError(
            f"frame of {called(one.params[0])} must have 1 or {rows.count} elements, got "
            f"{frame.numel()}"
        )
    return frame


def as_numbers(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
