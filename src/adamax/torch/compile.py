"""The step as one operator, for graphs of ``torch.compile``."""

from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .dispatch import take_step
from .options import DEFAULTS, Options

# Older versions do not infer it from lists of tensors.
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_infs, "
    "Tensor(d!)[] steps, Tensor lr, float[] betas, float eps, float weight_decay, "
    "bool decoupled_weight_decay, bool maximize) -> ()"
)


@torch.library.custom_op(
    "adamax::step_",
    mutates_args=("params", "exp_avgs", "exp_infs", "steps"),
    schema=_SCHEMA,
)
def step_operator(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_infs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    betas: list[float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """One step of a group, opaque to the compiler."""
    group = {
        **DEFAULTS,
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "maximize": maximize,
        "capturable": not steps[0].is_cpu,
    }
    options = Options.from_group(group)
    take_step([(Batch(params, grads, exp_avgs, exp_infs, steps), options)])


@step_operator.register_fake
def _(*args: Any) -> None:
    return None


def compiled_step(optimizer: Any) -> None:
    """A step of an optimizer, as the compiler traces it."""
    for group in optimizer.param_groups:
        lists: tuple[list[Tensor], ...] = [], [], [], [], []
        optimizer._init_group(group, *lists)
        if lists[0]:
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                # A tensor may change without a graph of its own for each number.
                lr = torch.ones((), dtype=torch.float64) * lr
            torch.ops.adamax.step_(
                *lists,
                lr,
                list(group["betas"]),
                group["eps"],
                group["weight_decay"],
                group["decoupled_weight_decay"],
                group["maximize"],
            )
