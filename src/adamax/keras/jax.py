"""What :class:`adamax.keras.Adamax` does on Keras' JAX back end."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import keras
from jax.experimental.sparse import JAXSparse

from ..jax.rule import stacked, step_array
from .rule import step_scalars


class BackendOptimizer(keras.optimizers.Optimizer):
    """The update is a part of what XLA compiles, Keras' train step.

    On a CPU it is one pass over memory, by the kernels of ``adamax.jax``.
    """

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        # Embeddings have dense gradients here; sparse ones come from sparse inputs.
        dense = [g.todense() if isinstance(g, JAXSparse) else g for g in grads]
        super().apply(dense, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a variable and its state."""
        m, u = self._state_of(variable)
        dtype = m.value.dtype
        scalars = step_scalars(
            self._hyperparameters(),
            learning_rate,
            self._weight_decay_of(variable),
            self.iterations + 1,
            str(dtype),
        )
        new = step_array(
            variable.value,
            m.value,
            u.value,
            jnp.asarray(gradient),
            stacked(dtype, *scalars),
        )
        for target, value in zip((variable, m, u), new, strict=True):
            self.assign(target, value)


def summed(gradient: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The values of a gradient, and what puts them back; all are dense here."""
    return gradient, lambda values: values
