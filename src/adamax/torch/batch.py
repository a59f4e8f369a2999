"""Parameters with their gradients and state, in parallel lists, and checks of them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Work: TypeAlias = Callable[[], None]
Called: TypeAlias = Callable[[Tensor], str]  # what messages call a parameter

FLOATS = frozenset(
    getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
)
PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})


def by_shape(param: Tensor) -> str:
    return f"a parameter of shape {tuple(param.shape)}"


@dataclass(slots=True)
class Batch:
    """Parameters of one group."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_infs: list[Tensor]
    steps: list[Tensor]
    frames: list[Tensor | None] | None = None  # of 8-bit state

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_infs, self.steps

    def select(self, chosen: Sequence[int]) -> "Batch":
        frames = None if self.frames is None else [self.frames[i] for i in chosen]
        params, grads, exp_avgs, exp_infs, steps = (
            [tensors[i] for i in chosen] for tensors in self.lists()
        )
        return Batch(params, grads, exp_avgs, exp_infs, steps, frames)

    def split(self, keys: Sequence[Hashable]) -> "dict[Hashable, Batch]":
        """Batches of the parameters that have the same key."""
        positions: dict[Hashable, list[int]] = {}
        for position, key in enumerate(keys):
            positions.setdefault(key, []).append(position)
        if len(positions) == 1:
            return dict.fromkeys(positions, self)
        return {key: self.select(chosen) for key, chosen in positions.items()}

    def singles(self) -> "list[Batch]":
        return [self.select([i]) for i in range(len(self.params))]

    def by_layout(self) -> "tuple[Batch, Batch]":
        """The parameters with dense gradients, and those with sparse ones."""
        parts = self.split([grad.layout is torch.strided for grad in self.grads])
        nothing = Batch([], [], [], [], [])
        return parts.get(True, nothing), parts.get(False, nothing)


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a ``GradScaler`` leaves to the optimizer. To read it waits for the device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def number(self) -> float:
        """What gradients are multiplied by."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @property
    def skips(self) -> bool:
        """Whether there is to be no step."""
        return self.found_inf is not None and bool(self.found_inf)


def check_operands(batch: Batch, called: Called) -> None:
    """Raise a ValueError unless state and dense gradients go with their parameters."""
    for param, grad, exp_avg, exp_inf, _ in zip(*batch.lists(), strict=True):
        check_state(param, exp_avg, exp_inf, called)
        if grad.shape != param.shape or (grad.is_complex() and not param.is_complex()):
            raise _unlike("the gradient", param, grad, called)


def check_state(param: Tensor, exp_avg: Tensor, exp_inf: Tensor, called: Called) -> None:
    """Raise a ValueError unless state could belong to a parameter."""
    dtypes = getattr(exp_avg, "dtype", None), getattr(exp_inf, "dtype", None)
    is_8bit = dtypes == (torch.int8, torch.uint8)
    for name, value in (("exp_avg", exp_avg), ("exp_inf", exp_inf)):
        if not (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and value.shape == param.shape
            and value.is_complex() == param.is_complex()
            and (value.is_floating_point() or value.is_complex() or is_8bit)
            and value.is_meta == param.is_meta
        ):
            raise _unlike(name, param, value, called)


def _unlike(name: str, param: Tensor, value: object, called: Called) -> ValueError:
    return ValueError(
        f"{name} of {called(param)} must be like it, {param.dtype} of shape "
        f"{tuple(param.shape)}, got {described(value)}"
    )


def check_counter(step: object, param: Tensor, called: Called) -> None:
    """Raise a ValueError unless a step counter can be read."""
    if not (
        isinstance(step, Tensor)
        and step.numel() == 1
        and step.layout is torch.strided
        and not (step.is_meta or step.is_complex())
    ):
        raise ValueError(
            f"step of {called(param)} must be a tensor of one number, got {described(step)}"
        )


def described(value: object) -> str:
    """A value for a message; of a tensor, what kind it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    return (
        f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}, "
        f"{value.layout}, on {value.device}"
    )
