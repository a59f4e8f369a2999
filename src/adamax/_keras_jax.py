"""What :class:`adamax.keras.Adamax` does on Keras' JAX back end."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from jax.experimental.sparse import JAXSparse

from ._keras_rule import step_size, stepped
from ._rule import decay_factor


class BackendOptimizer(keras.optimizers.Optimizer):
    """The update is a part of what XLA compiles, Keras' train step."""

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        # Embeddings have dense gradients here; sparse ones come from sparse inputs.
        dense = [g.todense() if isinstance(g, JAXSparse) else g for g in grads]
        super().apply(dense, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a variable and its state."""
        m, u = self._state_of(variable)
        size = step_size(learning_rate, self.beta_1, self.iterations + 1, m.dtype)
        learning_rate = keras.ops.cast(learning_rate, m.dtype)
        decay = decay_factor(learning_rate, self._weight_decay_of(variable))
        coefficients = self._coefficients()
        new = stepped(
            variable.value,
            m.value,
            u.value,
            gradient,
            size,
            decay,
            coefficients.one_minus_beta_1,
            coefficients.beta_2,
            coefficients.epsilon,
        )
        for target, value in zip((variable, m, u), new, strict=True):
            self.assign(target, value)


def summed(gradient: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The values of a gradient, and what puts them back; all are dense here."""
    return gradient, lambda values: values
