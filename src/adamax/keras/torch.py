"""What :class:`adamax.keras.Adamax` does on Keras' PyTorch back end."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch import Tensor

from ..torch.batch import Batch
from ..torch.cuda import Uploads
from ..torch.dispatch import take_step
from ..torch.options import DEFAULTS, Options
from ..torch.state import counts_on


class BackendOptimizer(keras.optimizers.Optimizer):
    """Updates by the kernels of :class:`adamax.torch.Adamax`."""

    def build(self, variables: Sequence[Any]) -> None:
        super().build(variables)
        # The kernels count steps of a parameter; Keras counts those of an optimizer.
        place = counts_on(variables[0].value, self._group(0.0, 0.0)) if variables else None
        self._step_counts = torch.zeros(len(variables), dtype=torch.float64, device=place)
        self._steps = list(self._step_counts.unbind())
        self._uploads = Uploads()

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if self.gradient_accumulation_steps:  # the accumulators are dense
            grads = [g.to_dense() if _is_sparse(g) else g for g in grads]
        super().apply(grads, trainable_variables)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        lr = float(keras.ops.convert_to_numpy(learning_rate))
        self._step_counts.fill_(int(self.iterations))
        batches: dict[float, Batch] = {}
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            weight_decay = self._weight_decay_of(variable)
            batch = batches.setdefault(weight_decay, Batch([], [], [], [], []))
            m, u = self._state_of(variable)
            row = (
                variable.value,
                keras.ops.convert_to_tensor(gradient),
                m.value,
                u.value,
                self._steps[self._get_variable_index(variable)],
            )
            for tensors, tensor in zip(batch.lists(), row, strict=True):
                tensors.append(tensor)
        take_step(
            [
                (batch, Options.from_group(self._group(lr, weight_decay)))
                for weight_decay, batch in batches.items()
            ],
            uploads=self._uploads,
        )

    def _group(self, lr: float, weight_decay: float) -> dict[str, Any]:
        """Options as :class:`adamax.torch.Adamax` has them."""
        return {
            **DEFAULTS,
            "lr": lr,
            "betas": (self.beta_1, self.beta_2),
            "eps": self.epsilon,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
        }

    @torch.no_grad()
    def _backend_increment_gradient_accumulators(
        self, grads: Sequence[Any], acc_grads: Sequence[Any]
    ) -> None:
        for gradient, accumulator in zip(grads, acc_grads, strict=True):
            accumulator.value.add_(gradient)


def summed(gradient: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The values of a gradient, with repeated rows summed, and what puts them back."""
    if not _is_sparse(gradient):
        return gradient, lambda values: values
    gradient = gradient.coalesce()

    def with_values(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(
            gradient.indices(),
            values,
            gradient.shape,
            is_coalesced=True,
            check_invariants=False,
        )

    return gradient.values(), with_values


def _is_sparse(gradient: Any) -> bool:
    return isinstance(gradient, Tensor) and gradient.layout is torch.sparse_coo
