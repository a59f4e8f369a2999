"""Contestants on a GPU, and the memory that their steps need there."""

from collections.abc import Callable
from typing import Any

from .contestants import TableWork, Torch
from .machine import why_no_gpu
from .meters import CannotMeasureError, Measure, Meter
from .oracle import Array
from .workloads import Dense, Gradient

DEVICE = "cuda"


def check_memory(needed: int) -> None:
    """Raise a CannotMeasureError unless a GPU has ``needed`` bytes of free memory."""
    if reason := why_no_gpu():
        raise CannotMeasureError(reason)
    import torch

    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        raise CannotMeasureError(
            f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free"
        )


def wait() -> None:
    import torch

    torch.cuda.synchronize()


class TorchOnGpu(Torch):
    """An optimizer of tensors on a GPU. A step ends when the GPU has finished it."""

    def __init__(self, work: TableWork, optimizer: str, **options: Any) -> None:
        check_memory(work.memory)
        super().__init__(work, optimizer, device=DEVICE, **options)

    def take(self, draw: list[Gradient]) -> None:
        for parameter in self._parameters:
            parameter.grad = None  # its memory is reused, as in training
        super().take(draw)
        wait()

    def step(self) -> None:
        super().step()
        wait()


class Copy:
    """``tensor.copy_()`` of as many bytes as a step reads and writes."""

    def __init__(self, work: TableWork) -> None:
        numbers = _bytes_of_step(work) // 8  # each of 4 bytes is read once, written once
        check_memory(8 * numbers)
        import torch

        self._source = torch.zeros(numbers, device=DEVICE)
        self._target = torch.zeros(numbers, device=DEVICE)

    def take(self, draw: list[Gradient]) -> None:
        wait()

    def step(self) -> None:
        self._target.copy_(self._source)
        wait()

    def parameters(self) -> list[Array]:
        return []


def _bytes_of_step(work: TableWork) -> int:
    """Of w, m, u and g, which are read, and of w, m and u, which are written."""
    if isinstance(work, Dense):
        return 4 * 7 * work.arrays * work.length
    return 4 * 7 * work.number * work.width  # a few less, as some ids repeat


def _growth() -> Measure:
    import torch

    def measure(step: Callable[[], None]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)

    return measure


GPU_MEMORY = Meter("GPU memory of a step", "B", _growth)
