"""Contestants on a GPU, and the memory that their steps need there."""

from collections.abc import Callable
from typing import Any

from .contestants import TableWork, Torch
from .gpu import why_not
from .meters import CannotMeasureError, Measure, Meter
from .workloads import Array, Dense, Gradient

DEVICE = "cuda"


def _check(needed: int) -> None:
    """Raise unless a GPU is there that has ``needed`` bytes of free memory."""
    if reason := why_not():
        raise CannotMeasureError(reason)
    import torch

    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        raise CannotMeasureError(
            f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free"
        )


def _wait() -> None:
    import torch

    torch.cuda.synchronize()


class TorchOnGpu(Torch):
    """An optimizer of tensors on a GPU. A step is over when the GPU has done it."""

    def __init__(self, work: TableWork, optimizer: str, **options: Any) -> None:
        _check(work.memory)
        super().__init__(work, optimizer, device=DEVICE, **options)

    def take(self, draw: list[Gradient]) -> None:
        for parameter in self._parameters:
            parameter.grad = None  # its memory is used again, as in training
        super().take(draw)
        _wait()

    def step(self) -> None:
        super().step()
        _wait()


class Copy:
    """``tensor.copy_()`` of as many bytes as a step reads and writes."""

    def __init__(self, work: TableWork) -> None:
        numbers = _bytes_of_step(work) // 8  # each of 4 bytes is read once, written once
        _check(8 * numbers)
        import torch

        self._source = torch.zeros(numbers, device=DEVICE)
        self._target = torch.zeros(numbers, device=DEVICE)

    def take(self, draw: list[Gradient]) -> None:
        _wait()

    def step(self) -> None:
        self._target.copy_(self._source)
        _wait()

    def parameters(self) -> list[Array]:
        return []


def _bytes_of_step(work: TableWork) -> int:
    """Of w, m, u and g, which are read, and of w, m and u, which are written."""
    if isinstance(work, Dense):
        return 4 * 7 * work.arrays * work.length
    return 4 * 7 * work.ids * work.width  # a few less, as some ids repeat


def _growth() -> Measure:
    import torch

    def measure(step: Callable[[], None]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)

    return measure


GPU_MEMORY = Meter("GPU memory of a step", "B", _growth)
