"""What steps need of CUDA besides memory, and which parameters the Triton kernels serve."""

import functools
import importlib.util
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .batch import FLOATS, PLAIN_TENSORS

_IS_CUDA = attrgetter("is_cuda")


class Device:
    """NVIDIA GPUs. Tests replace it to run on memory of the CPU."""

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


def triton_serves(params: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels can update all parameters, or what is here of them."""
    return (
        DEVICE.holds(params)
        and {param.dtype for param in params} <= FLOATS
        and set(map(type, params)) <= {*PLAIN_TENSORS, distributed_tensor()}
        and has_triton()
    )


def distributed_tensor() -> Any:
    """The class DTensor if it has been imported."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


@functools.cache
def has_triton() -> bool:
    """Whether there is Triton for NVIDIA GPUs; warns once where a GPU lacks it."""
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
