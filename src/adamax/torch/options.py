"""The options of a parameter group, validated, and the scalars of its steps."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .._core import compact, rule
from .._core.kernels import Float64Array
from .._core.rule import Hyperparameters
from . import device
from .batch import Called

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "foreach": None,
        "maximize": False,
        "differentiable": False,
        "capturable": False,
        "fused": None,
        "decoupled_weight_decay": False,
        "sparse": "lazy",
        "state_dtype": "float32",
        "stochastic_rounding": False,
    }
)
# What messages call a hyperparameter, where that differs.
NAMES = {
    "learning_rate": "lr",
    "beta_1": "betas[0]",
    "beta_2": "betas[1]",
    "epsilon": "eps",
}
# Counters are floats, which count no further.
MOST_STEPS = 2**53


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a group, in one step.

    Attributes:
        hyperparameters: all but the learning rate.
        lr: a float, or the user's tensor.
        path: ``"compiled"``, ``"foreach"`` or ``"loop"``.
        fused: whether only the compiled kernels will do.
        decay: the weight decay that multiplies parameters.
        coupled_decay: the weight decay that is added to gradients.
        maximize: ascend.
        capturable: step counters are on the device.
        differentiable: autograd may record the step.
        exact: rows of tables are stepped by ``sparse="exact"``.
        state_dtype: how new state is stored.
        stochastic: whether bfloat16 parameters are rounded by random bits.
    """

    hyperparameters: Hyperparameters
    lr: float | Tensor
    path: str
    fused: bool
    decay: float
    coupled_decay: float
    maximize: bool
    capturable: bool
    differentiable: bool
    exact: bool
    state_dtype: str
    stochastic: bool

    @classmethod
    def from_group(cls, group: Mapping[str, Any], reads_lr: bool = False) -> "Options":
        """The options of a parameter group.

        Args:
            group: of an optimizer.
            reads_lr: whether to wait for a learning rate that is on a device. It is not
                read while a CUDA graph may be captured.

        Raises:
            RuntimeError: options that exclude each other.
            TypeError: a value of the wrong type.
            ValueError: a value out of its range.
        """
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            rule.checked_number("learning_rate", lr, "lr")
        elif lr.numel() != 1:
            raise ValueError(f"lr must have one element, got the shape {tuple(lr.shape)}")
        elif lr.is_complex() or _may_be_read(lr, group, reads_lr):
            rule.checked_number("learning_rate", lr.item(), "lr")
        hyperparameters = _hyperparameters(group)
        path, fused = _path(group)
        decoupled, exact = group["decoupled_weight_decay"], group["sparse"] == "exact"
        weight_decay = hyperparameters.weight_decay
        if exact:
            _check_exact(group)
        _check_compact(group, hyperparameters, path)
        return cls(
            hyperparameters=hyperparameters,
            lr=lr,
            path=path,
            fused=fused,
            decay=weight_decay if decoupled else 0.0,
            coupled_decay=0.0 if decoupled else weight_decay,
            maximize=group["maximize"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            exact=exact,
            state_dtype=group["state_dtype"],
            stochastic=group["stochastic_rounding"],
        )

    @property
    def needs_kernels(self) -> bool:
        """Whether only the compiled kernels will do."""
        return self.state_dtype != "float32" or self.stochastic

    @property
    def rate(self) -> float:
        """The learning rate as a number, for which a device is waited for."""
        if isinstance(self.lr, Tensor):
            return rule.checked_number("learning_rate", self.lr.item(), "lr")
        return float(self.lr)

    def scalars(self, count: float, scale: float) -> Float64Array:
        """The scalars of the rule, in the order of :class:`adamax._core.rule.Scalar`.

        Args:
            count: how many steps there have been; :func:`check_count` has passed.
            scale: what gradients are multiplied by.
        """
        rate = self.rate
        return rule.scalars_of(
            self.hyperparameters,
            rule.step_size(rate, self.hyperparameters.beta_1, int(count) + 1),
            rule.decay_factor(rate, self.decay),
            -scale if self.maximize else scale,
            self.coupled_decay,
            seed=count + 1,
            stochastic=self.stochastic,
        )


def _may_be_read(lr: Tensor, group: Mapping[str, Any], reads_lr: bool) -> bool:
    if lr.is_cpu and not device.DEVICE.holds([lr]):
        return True
    return reads_lr and not group["capturable"]


def check_count(count: float, param: Tensor, called: Called) -> None:
    """Raise a ValueError unless a step counter can have this value."""
    if not (0 <= count < MOST_STEPS and count == int(count)):
        raise ValueError(
            f"step of {called(param)} must be a whole number in [0, 2**53), got {count!r}"
        )


def _path(group: Mapping[str, Any]) -> tuple[str, bool]:
    fused, foreach = group["fused"], group["foreach"]
    if fused and foreach:
        raise RuntimeError("fused and foreach cannot both be True")
    if group["differentiable"]:
        if fused or foreach:
            raise RuntimeError("differentiable excludes fused and foreach")
        return "loop", False
    if foreach:
        return "foreach", False
    if fused is False or (foreach is False and not fused):
        return "loop", False
    return "compiled", bool(fused)


def _check_compact(group: Mapping[str, Any], h: Hyperparameters, path: str) -> None:
    """Raise for options that compact state and stochastic rounding exclude."""
    kind = compact.check_state_dtype(group["state_dtype"])
    stochastic = compact.check_stochastic_rounding(group["stochastic_rounding"])
    if kind == "8bit":
        compact.check_betas(h.beta_1, h.beta_2, "betas")
    if (kind != "float32" or stochastic) and (path != "compiled" or group["capturable"]):
        what = f"state_dtype={kind!r}" if kind != "float32" else "stochastic_rounding=True"
        raise RuntimeError(
            f"{what} excludes foreach, fused=False, differentiable and capturable"
        )


def _check_exact(group: Mapping[str, Any]) -> None:
    """Raise for options that exact updates exclude."""
    for name in ("differentiable", "capturable"):
        if group[name]:
            raise RuntimeError(f"sparse='exact' excludes {name}=True")
    if group["foreach"] or group["fused"] is False:
        raise RuntimeError(
            f"sparse='exact' needs the compiled kernels, got foreach={group['foreach']} "
            f"and fused={group['fused']}"
        )
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            f"sparse='exact' needs decoupled_weight_decay=True for weight_decay="
            f"{group['weight_decay']!r}: an L2 penalty gives every row of a table a "
            f"gradient in every step"
        )


def _hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    # The cache must not see a tensor: it would not notice that its value changes.
    numbers = [_number(x) for x in (*betas, group["eps"], group["weight_decay"])]
    try:
        return _validated(*numbers, group["sparse"])
    except TypeError:  # perhaps only because something cannot be hashed
        return _validated.__wrapped__(*numbers, group["sparse"])


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


@functools.lru_cache(maxsize=256, typed=True)
def _validated(
    beta_1: float, beta_2: float, eps: float, weight_decay: float, sparse: str
) -> Hyperparameters:
    return Hyperparameters(
        learning_rate=0.0,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=eps,
        weight_decay=weight_decay,
        sparse=sparse,
        names=NAMES,
    )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state of a parameter: its own, but float32 for 16 bits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def kind_of(exp_avg: Tensor) -> str:
    """How existing state is stored."""
    kinds = {torch.int8: "8bit", torch.bfloat16: "bfloat16"}
    return kinds.get(exp_avg.dtype, "float32")


def stored_dtype(dtype: torch.dtype, kind: str, name: str) -> torch.dtype:
    """The dtype of ``exp_avg`` or ``exp_inf`` for a parameter of ``dtype``.

    Args:
        dtype: of the parameter.
        kind: of the state: ``"float32"``, ``"bfloat16"`` or ``"8bit"``.
        name: of the state.

    Raises:
        ValueError: compact state for numbers that are not real, or of more than 32 bits.
    """
    if kind == "float32":
        return state_dtype(dtype)
    if state_dtype(dtype) is not torch.float32:
        raise ValueError(
            f"state_dtype={kind!r} needs real parameters of at most 32 bits, got {dtype}"
        )
    if kind == "bfloat16":
        return torch.bfloat16
    return torch.int8 if name == "exp_avg" else torch.uint8
