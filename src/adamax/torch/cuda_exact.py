"""``sparse="exact"`` for tables on a GPU: stamps on the device, the history on the host.

A step reads the learning rate and what a ``GradScaler`` found, if they are on the device,
since both belong to the history. Nothing else is waited for: whether a row was up to date
when it was read, the device finds out, and stops with an assertion if it was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._core import compact, rule
from .._core.exact import History
from .._core.kernels import Float64Array, Int64Array
from .._core.stale import StaleRows
from . import _compat, device
from .cuda import RowsLaunch, as_numbers, kernels
from .options import Options
from .sparse import frame_of_rows

_DTYPES = torch.float64, torch.float64, torch.int64

WithState = tuple[Tensor, Tensor, Tensor]  # a parameter and its state


class TableOnDevice(NamedTuple):
    """A table, its state, and how that is rounded.

    Attributes:
        param: the table.
        exp_avg: its moments.
        exp_inf: its norms.
        frame: of 8-bit state.
        seed: of the random bits with which stale rows are rounded, as an int64.
        stochastic: whether a table of bfloat16 is rounded by them, too.
    """

    param: Tensor
    exp_avg: Tensor
    exp_inf: Tensor
    frame: Tensor | None
    seed: int
    stochastic: bool

    @classmethod
    def of(
        cls,
        tensors: WithState,
        frame: Tensor | None,
        step: float,
        position: int,
        stochastic: bool,
    ) -> "TableOnDevice":
        """A table after some steps, at a position in the step that is taken, if any is."""
        # All bits the other way round: not those of the step itself.
        seed = ~np.uint64(compact.seed_of(step, position)).astype(np.int64)
        is_16_bit = tensors[0].dtype is torch.bfloat16
        return cls(*tensors, frame, int(seed), stochastic and is_16_bit)


class RowsOnDevice:
    """The stale rows of one table, whose stamps are on its device."""

    def __init__(self, stale: StaleRows, dtype: torch.dtype) -> None:
        self.stale = stale
        self._dtype = dtype.to_real()
        self._counter: tuple[Tensor, int | None, int] | None = None
        self._uploaded = _UploadedHistory()

    def count(self, step: Tensor) -> float:
        """How many steps there have been; reads the counter if others have changed it."""
        if self._counter is not None:
            known, version, count = self._counter
            if known is step and version == _compat.version_of(step) is not None:
                return count
        return float(step)

    def counted(self, step: Tensor, count: int) -> None:
        self._counter = step, _compat.version_of(step), count

    def catch_up_ids(self, table: TableOnDevice, ids: Tensor) -> None:
        on = table.param.device
        with device.DEVICE.current(on):
            flat = ids.detach().reshape(-1).to(on)
            self.catch_up(table, torch.sort(flat).values)
        increment_version(table.param)

    def catch_up(self, table: TableOnDevice, rows: range | Tensor) -> None:
        """Catch up the rows in sorted ids, or in a range."""
        history, on = self.stale.history, table.param.device
        frame = table.frame
        with device.DEVICE.current(on):
            kernels("triton_rows").catch_up(
                self._dtype,
                tuple(map(as_numbers, table[:3])),
                self.stale.stamps,
                rows,
                self.stale.row_length,
                self._uploaded.tensors(history, on),
                self.stale.epsilon,
                None if frame is None else frame_of_rows(frame, self.stale.rows),
                table.seed,
                table.stochastic,
            )

    def catch_up_in_turn(self, table: TableOnDevice) -> None:
        """Catch up some rows, so that none is ever staler than the history goes back."""
        history, rows = self.stale.history, self.stale.rows
        cycle = history.entries // 2
        number = -(-rows // cycle)
        start = (history.steps - history.start) % cycle * number
        self.catch_up(table, range(min(start, rows), min(start + number, rows)))


class _UploadedHistory:
    """A history on the device, of which the entries that have changed are uploaded."""

    def __init__(self) -> None:
        self._sums: Float64Array | None = None
        self._key: tuple[int, ...] = ()
        self._steps = -1
        self._tensors: tuple[Tensor, ...] = ()

    def tensors(self, history: History, on: torch.device) -> tuple[Tensor, ...]:
        key = device.DEVICE.stream(on), history.start, history.window
        if history.sums is not self._sums or key != self._key:
            self._sums, self._key, self._steps = history.sums, key, -1
            self._tensors = tuple(
                torch.empty(array.shape, dtype=dtype, device=on)
                for array, dtype in zip(history.arrays, _DTYPES, strict=True)
            )
        now, last = history.steps, history.entries - 1
        if self._steps < now:
            sums, products, clock = self._tensors
            oldest = max(history.start, now - last)
            for array, tensor, lag in (
                (history.sums, sums, history.window),
                (history.products, products, 0),
            ):
                first = max(oldest, self._steps - lag)
                _upload(array, tensor, np.arange(first, now + 1) & last)
            _upload(history.clock, clock, np.arange(len(clock)))
            self._steps = now
        return self._tensors


def _upload(source: npt.NDArray[Any], target: Tensor, entries: Int64Array) -> None:
    """Copy entries of a ring, which are next to each other but for its end."""
    wraps = np.flatnonzero(entries == 0)[:1]
    for part in np.split(entries, wraps):
        if len(part):
            first, end = int(part[0]), int(part[-1]) + 1
            array = source[first:end]
            staging = device.DEVICE.staging(array.size, target.dtype)
            staging.numpy()[:] = array.ravel()
            target[first:end].copy_(staging.view(array.shape), non_blocking=True)


@dataclass(frozen=True, slots=True)
class ExactLaunch:
    """The rows of one table, and what the step means to all others.

    ``count`` is how many steps there have been.
    """

    launch: RowsLaunch
    rows: RowsOnDevice
    options: Options
    flush: Callable[[], None]
    count: int

    def __call__(self) -> None:
        (param,), _, (exp_avg,), (exp_inf,), (step,) = self.launch.batch.lists()
        stale, rate = self.rows.stale, self.options.rate
        h, count = self.options.hyperparameters, self.count
        recorded = stale.record(
            rule.step_size(rate, h.beta_1, count + 1),
            rule.decay_factor(rate, self.options.decay),
            h.beta_1,
            h.beta_2,
            h.epsilon,
            self.flush,
        )
        self.rows.catch_up_in_turn(
            TableOnDevice.of(
                (param, exp_avg, exp_inf),
                self.launch.frame,
                count + 1,
                self.launch.position or 0,
                self.launch.stochastic,
            )
        )
        with device.DEVICE.current(param.device):
            kernels("triton_rows").stamp_rows(
                self.launch.ids, stale.rows, stale.stamps, stale.history.steps + 1
            )
        self.launch()
        stale.history.commit(recorded)
        self.rows.counted(step, count + 1)
