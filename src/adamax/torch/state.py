"""State of parameters: making it, and checking what comes from outside."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._core.compact import LARGEST, MOMENT_CODES, NOT_FINITE, SMALLEST_POWER
from .._core.memory import LARGE, zeros_beside
from .batch import FLOATS, PLAIN_TENSORS, by_shape, check_state, described
from .device import triton_serves
from .options import DEFAULTS, Options, check_count, stored_dtype

STATE = ("step", "exp_avg", "exp_inf")


def state_of(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """New state for a parameter."""
    kind = group["state_dtype"]
    state = {
        "step": new_step(param, group),
        "exp_avg": new_state(param, "exp_avg", kind),
        "exp_inf": new_state(param, "exp_inf", kind),
    }
    if kind == "8bit":
        state["frame"] = torch.zeros(1, dtype=torch.float32, device=param.device)
    return state


def new_state(param: Tensor, name: str, kind: str = "float32") -> Tensor:
    """Zeros for ``exp_avg`` or ``exp_inf``, laid out as the parameter."""
    dtype = stored_dtype(param.dtype, kind, name)
    if not (
        type(param) in PLAIN_TENSORS
        and param.is_cpu
        and param.dtype in FLOATS
        and param.numel() * dtype.itemsize >= LARGE
        and dtype is not torch.bfloat16  # which NumPy lacks
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
        if state["exp_avg"].dtype is torch.int8:
            _check_frame(param, state.get("frame"))
        _check_step(param, state["step"])


def _check_step(param: Tensor, step: Any) -> None:
    readable = isinstance(step, Real)
    if isinstance(step, Tensor):
        strided = step.layout is torch.strided and not step.is_meta
        readable = strided and step.numel() == 1 and not step.is_complex()
    if not readable:
        raise ValueError(f"step of {by_shape(param)} must be a number, got {step!r}")
    check_count(float(step), param, by_shape)


def _check_frame(param: Tensor, frame: Any) -> None:
    rows = len(param) if param.ndim else 1
    if not (
        isinstance(frame, Tensor)
        and frame.dtype is torch.float32
        and frame.layout is torch.strided
        and frame.ndim == 1
        and not frame.is_meta
        and bool(((frame >= 0) & (frame < 1)).all())
    ):
        raise ValueError(
            f"frame of {by_shape(param)} must be a float32 tensor of numbers in [0, 1), "
            f"got {described(frame)}"
        )
    if len(frame) not in (1, rows):
        raise ValueError(
            f"frame of {by_shape(param)} must have 1 or {rows} elements, got {len(frame)}"
        )


# --- Conversions -------------------------------------------------------------------------


def converted(param: Tensor, given: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """The moments of a checkpoint as state of a kind, beside the parameter."""
    stored = {name: new_state(param, name, kind) for name in ("exp_avg", "exp_inf")}
    dtypes = [given[name].dtype for name in stored]
    if dtypes == [tensor.dtype for tensor in stored.values()]:
        for name, tensor in stored.items():
            tensor.copy_(given[name])
        frame = given.get("frame")
    else:
        exp_avg, exp_inf = (x.to(param.device) for x in _moments(given))
        frame = torch.zeros(1)
        if kind == "8bit":
            codes = torch.round(4 * torch.log2(exp_inf) + 4 * SMALLEST_POWER)
            codes = codes.clamp(0, LARGEST)
            largest = torch.exp2(codes / 4 - SMALLEST_POWER)
            levels = torch.round(exp_avg / largest * float(MOMENT_CODES)).clamp(-127, 127)
            finite = exp_avg.isfinite() & exp_inf.isfinite()
            exp_avg = levels.nan_to_num().where(codes > 0, 0.0)
            exp_inf = codes.where(finite, float(NOT_FINITE))
        for tensor, values in zip(stored.values(), (exp_avg, exp_inf), strict=True):
            tensor.copy_(values)
    if kind == "8bit":
        assert frame is not None
        stored["frame"] = frame.detach().to(param.device, torch.float32, copy=True)
    return stored


def in_float32(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, not compact."""
    if "exp_avg" not in state or not is_compact(state):
        return dict(state)
    exp_avg, exp_inf = _moments(state)
    return {"step": state["step"], "exp_avg": exp_avg, "exp_inf": exp_inf}


def is_compact(state: Mapping[str, Any]) -> bool:
    return state["exp_avg"].dtype in (torch.int8, torch.bfloat16)


def _moments(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``exp_avg`` and ``exp_inf`` as floats."""
    exp_avg, exp_inf = state["exp_avg"], state["exp_inf"]
    if exp_avg.dtype is not torch.int8:
        wide = exp_avg.dtype in (torch.float16, torch.bfloat16)
        return (exp_avg.float(), exp_inf.float()) if wide else (exp_avg, exp_inf)
    codes = exp_inf.float()
    frame = state["frame"].to(exp_inf.device)
    frame = frame.reshape(-1, *(1,) * (codes.ndim - 1)) if codes.ndim else frame[0]
    norm = torch.exp2((codes - frame) / 4 - SMALLEST_POWER).where(codes > 0, 0.0)
    norm = norm.where(codes != NOT_FINITE, math.nan)
    return exp_avg.float() / float(MOMENT_CODES) * norm, norm
