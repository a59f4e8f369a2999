"""The Triton kernels on tensors of the CPU, through Triton's interpreter.

Whatever steps need of CUDA besides memory is in one place of the package, which is replaced
here. All else is what runs on a GPU.
"""

import importlib
from contextlib import nullcontext
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from frameworks import framework
from torch_cases import torch

from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from adamax.torch import device  # isort: skip  (not without torch)


class Host(device.Device):
    """Memory of the CPU as if it were that of a GPU."""

    def __init__(self):
        self.capturing = False
        self.of_stream = 0
        self.staged = []

    def holds(self, tensors):
        return all(tensor.is_cpu for tensor in tensors)

    def current(self, device):
        return nullcontext()

    def stream(self, device):
        return self.of_stream

    def is_capturing(self):
        return self.capturing

    def staging(self, count, dtype=torch.int64):
        self.staged.append(torch.empty(count, dtype=dtype))
        return self.staged[-1]


def _convert_float(numbers, source, target, rounding):
    """Between float32 and bfloat16. Triton's own truncates where GPUs round to nearest."""
    if target.is_bf16():
        with np.errstate(all="ignore"):
            return numbers.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return numbers.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)


@pytest.fixture
def host(monkeypatch):
    """Steps go through the interpreted kernels from here on."""
    triton = framework("triton")
    if not triton.knobs.runtime.interpret:
        pytest.fail("TRITON_INTERPRET must be set before Triton is imported")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    # As kernels are launched that have assertions; otherwise Triton leaves them out.
    options = replace(
        interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False
    )
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    of_cpu = Host()
    monkeypatch.setattr(device, "DEVICE", of_cpu)
    with np.errstate(all="ignore"):  # NumPy does the arithmetic, and NaN is no accident
        yield of_cpu


class NothingIsRead(TorchDispatchMode):
    """Fails where a number is read, or where a shape depends on numbers."""

    _READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name.startswith(read) for read in self._READS), name
        return function(*args, **kwargs or {})
