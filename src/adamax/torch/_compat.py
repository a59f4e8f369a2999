"""The private names of PyTorch that are used, seen in 2.13.

Where a version lacks one, something public serves, or what depends on it is left out.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _private(module: str, name: str) -> Any:
    """``module.name``, or None where there is no such name."""
    found: Any = torch
    for part in [*module.split(".")[1:], name]:
        found = getattr(found, part, None)
    return found


def disable_dynamo(function: _Function) -> _Function:
    """Leave ``function`` to Python under ``torch.compile``.

    The public function imports the compiler at once, which takes more than a second.
    """
    disable = _private("torch._compile", "_disable_dynamo") or torch.compiler.disable
    disabled: _Function = disable(function)
    return disabled


def records_if_differentiable(step: _Function) -> _Function:
    """Let autograd record a step if the optimizer's defaults say so, and otherwise not.

    torch's own decorator breaks the graph around the step too, so that the compiler sees
    that nothing is recorded.
    """
    module = importlib.import_module("torch.optim.optimizer")  # shadowed in torch.optim
    decorate = getattr(module, "_use_grad_for_differentiable", _set_grad_mode)
    decorated: _Function = decorate(step)
    return decorated


def _set_grad_mode(step: _Function) -> _Function:
    @functools.wraps(step)
    def recorded(self: Any, *args: Any, **keywords: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **keywords)

    wrapped: Any = recorded
    typed: _Function = wrapped
    return typed


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Warn, or raise, where a step and the capture of a CUDA graph do not go together."""
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",  # its older name
    ):
        check = getattr(optimizer, name, None)
        if check is not None:
            check()
            return


def foreach_devices() -> list[str]:
    """The types of devices on which operations on lists of tensors are fast."""
    devices = _private(
        "torch.utils._foreach_utils", "_get_foreach_kernels_supported_devices"
    )
    return list(devices()) if devices else ["cuda", "xpu"]


def foreach_operation(name: str) -> Callable[..., list[Tensor]] | None:
    """A method of tensors as an operation on lists of them, if there is one."""
    operation: Callable[..., list[Tensor]] | None = getattr(torch, f"_foreach_{name}", None)
    return operation


def sparse_parts(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The indices and values of a COO tensor, as they are or else coalesced."""
    if hasattr(gradient, "_indices") and hasattr(gradient, "_values"):
        return gradient._indices(), gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices(), gradient.values()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor has been written to, if that is known."""
    version: int | None = getattr(tensor, "_version", None)
    return version


def is_in_join(parallel: torch.nn.Module) -> bool:
    """Whether a DistributedDataParallel is within its ``join()``."""
    return bool(getattr(getattr(parallel, "_join_config", None), "enable", False))


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, which older versions do not tell."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return bool(exporting and exporting())


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is at work."""
    tracing = getattr(torch.jit, "is_tracing", None)
    return bool(tracing and tracing())
