"""State of parameters: making it, and checking what comes from outside."""

from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._core.memory import LARGE, zeros_beside
from .batch import FLOATS, PLAIN_TENSORS, by_shape, check_state
from .device import triton_serves
from .options import DEFAULTS, Options, check_count, state_dtype

STATE = ("step", "exp_avg", "exp_inf")


def new_state(param: Tensor, name: str) -> Tensor:
    """Zeros for ``exp_avg`` or ``exp_inf``, laid out as the parameter."""
    dtype = state_dtype(param.dtype)
    if not (
        type(param) in PLAIN_TENSORS
        and param.is_cpu
        and param.dtype in FLOATS
        and param.nbytes >= LARGE
    ):
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    layout = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    zeros = zeros_beside(
        param.data_ptr(),
        STATE.index(name),
        (param.numel(),),
        str(dtype).removeprefix("torch."),
    )
    return torch.from_numpy(zeros).as_strided(layout.shape, layout.stride())


def new_step(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter, of torch's default dtype as those of torch's optimizers."""
    wide = torch.get_default_dtype() is torch.float64
    dtype = torch.float64 if wide else torch.float32
    return torch.zeros((), dtype=dtype, device=counts_on(param, group))


def counts_on(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where the steps of a parameter are counted."""
    fused, foreach = group["fused"], group["foreach"]
    compiled = not group["differentiable"] and (fused or fused is foreach is None)
    on_device = group["capturable"] or (compiled and triton_serves([param]))
    return param.device if on_device else torch.device("cpu")


def check_parameter(param: Tensor) -> None:
    """Raise a ValueError for a parameter that no step could write to."""
    if torch.nn.parameter.is_lazy(param):
        return
    if param.layout is not torch.strided:
        raise ValueError("parameters must be strided tensors, got a sparse one")
    if param.is_conj() or param.is_neg():
        raise ValueError("parameters must not be conjugate views, got one; clone it")
    strides = param.stride() if param.numel() else ()
    if any(stride == 0 and param.shape[i] > 1 for i, stride in enumerate(strides)):
        raise ValueError("parameters must not be expanded tensors, got one; clone it")


# --- Checkpoints -------------------------------------------------------------------------


def pairs_of(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> Iterable[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters and what a checkpoint has for them, as torch pairs them."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    state = state_dict["state"]
    return [(p, state[i]) for i, p in zip(saved, params, strict=False) if i in state]


def check_checkpoint(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError unless a checkpoint can be loaded."""
    for group in state_dict["param_groups"]:
        needed = ("lr", "betas", "eps", "weight_decay")
        if any(name not in group for name in needed):
            raise ValueError(
                f"a parameter group must have {', '.join(needed)}, got {', '.join(group)}"
            )
        # What these options exclude may be changed after loading.
        Options.from_group({**DEFAULTS, **{name: group[name] for name in needed}})
    for param, state in pairs_of(optimizer, state_dict):
        missing = [name for name in STATE if name not in state]
        if missing:
            raise ValueError(
                f"the state of a parameter must have {', '.join(STATE)}, "
                f"got {', '.join(map(str, state)) or 'nothing'}"
            )
        check_state(param, state["exp_avg"], state["exp_inf"], by_shape)
        _check_step(param, state["step"])


def _check_step(param: Tensor, step: Any) -> None:
    readable = isinstance(step, Real)
    if isinstance(step, Tensor):
        strided = step.layout is torch.strided and not step.is_meta
        readable = strided and step.numel() == 1 and not step.is_complex()
    if not readable:
        raise ValueError(f"step of {by_shape(param)} must be a number, got {step!r}")
    check_count(float(step), param, by_shape)
