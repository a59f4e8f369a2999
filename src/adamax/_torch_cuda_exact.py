"""``sparse="exact"`` for tables on a GPU: stamps on the device, the history on the host.

A step reads the learning rate and what a ``GradScaler`` found, if they are on the device,
to take note of them. Nothing else is waited for: whether a row was up to date when it was
read, the device finds out, and stops with an assertion if it was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import increment_version

import torch
from torch import Tensor

from . import _rule
from . import _torch_cuda as cuda
from ._deferred import DeferredRows
from ._kernels import Float64Array, Storage
from ._torch_cuda import RowsOnDevice, as_numbers, triton_kernels

WithState = tuple[Tensor, Tensor, Tensor]  # a parameter and its state


class DeferredRowsOnDevice(DeferredRows):
    """The rows of one table on a GPU, some of which are behind."""

    def __init__(
        self,
        storage: Storage,
        rows: int,
        row_length: int,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        device: torch.device,
    ) -> None:
        # Its own stamps are zeros that nobody touches, and so take up no memory.
        super().__init__(storage, rows, row_length, beta_1, beta_2, epsilon)
        self.device = device
        self._stamps_of_rows = torch.zeros(rows, dtype=torch.int32, device=device)
        self._counter: tuple[Tensor, int, int] | None = None
        self._uploaded = _UploadedHistory()

    def count(self, step: Tensor) -> int:
        """The number of the next step; reads the counter only if others have changed it."""
        if self._counter is not None:
            known, version, count = self._counter
            if known is step and version == step._version:
                return count + 1
        return int(step) + 1

    def counted(self, step: Tensor, count: int) -> None:
        self._counter = step, step._version, count

    def stamp(self, ids: object) -> None:
        """Take note that the rows in sorted ``ids`` have made the step that is recorded."""
        triton_kernels().stamp_rows(
            ids, self.rows, self._stamps_of_rows, _int32(self._now - 1), _int32(self._now)
        )

    def bring_ids_up_to_date(self, tables: WithState, ids: Tensor) -> None:
        """Bring the rows that are read at ``ids`` up to date."""
        with cuda.DEVICE.current(self.device):
            flat = ids.detach().reshape(-1).to(self.device)
            self.bring_up_to_date(tables, torch.sort(flat).values)
        increment_version(tables[0])

    def bring_up_to_date(
        self, tables: WithState, ids: Tensor | None, rows: range | None = None
    ) -> None:
        """Bring the rows in sorted ``ids``, or in a range, up to date."""
        history, kernels = self._history, triton_kernels()
        with cuda.DEVICE.current(self.device):
            sums, products = self._uploaded.tensors(history, self.device)
            kernels.catch_up(
                self.storage,
                tuple(map(as_numbers, tables)),
                self._stamps_of_rows,
                ids,
                range(self.rows) if rows is None else rows,
                self.row_length,
                kernels.DeviceHistory(
                    sums,
                    products,
                    tuple(history.zeros.tolist()),
                    history.steps,
                    history.window,
                    _int32(self._now),
                ),
                self.epsilon,
            )


def _int32(stamp: int) -> int:
    """Stamps are modulo 2**32."""
    return (stamp + 2**31) % 2**32 - 2**31


class _UploadedHistory:
    """A history on the device, of which the entries that have changed are uploaded."""

    def __init__(self) -> None:
        self._history: Any = None
        self._steps = -1
        self._stream = -1
        self._sums = self._products = torch.empty(0)

    def tensors(self, history: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        stream = cuda.DEVICE.stream(device)
        if history is not self._history or stream != self._stream:
            self._history, self._stream, self._steps = history, stream, -1
            shapes = history.sums.shape, history.products.shape
            self._sums, self._products = (
                torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes
            )
        first, end = max(0, self._steps - history.window), history.steps + 1
        if self._steps < history.steps:
            _upload(history.sums, self._sums, first, end)
            _upload(history.products, self._products, max(0, self._steps), end)
            self._steps = history.steps
        return self._sums, self._products


def _upload(source: Float64Array, target: Tensor, first: int, end: int) -> None:
    part = source[first:end]
    staging = cuda.DEVICE.staging(part.size, torch.float64)
    staging.numpy()[:] = part.ravel()
    target[first:end].copy_(staging.view(part.shape), non_blocking=True)


@dataclass(frozen=True, slots=True)
class ExactRowsOnDevice:
    """The rows of one table, and taking note of the step for all others."""

    launch: RowsOnDevice
    deferred: DeferredRowsOnDevice
    flush: Callable[[], None]
    count: int

    @classmethod
    def prepare(
        cls, launch: RowsOnDevice, deferred: DeferredRowsOnDevice, flush: Callable[[], None]
    ) -> "ExactRowsOnDevice":
        (step,) = launch.batch.steps
        return cls(launch, deferred, flush, deferred.count(step))

    def __call__(self) -> None:
        deferred, options = self.deferred, self.launch.options
        hyperparameters, lr = options.hyperparameters, options.lr_number
        betas = hyperparameters.beta_1, hyperparameters.beta_2
        if deferred.must_flush(*betas):
            self.flush()
        deferred.record(
            _rule.step_size(lr, hyperparameters.beta_1, self.count),
            _rule.decay_factor(lr, options.decay),
            *betas,
        )
        with cuda.DEVICE.current(deferred.device):
            deferred.stamp(self.launch.ids)
        self.launch()
        deferred.counted(self.launch.batch.steps[0], self.count)
