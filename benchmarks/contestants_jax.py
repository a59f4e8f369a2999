"""Factories of contestants for JAX, which is imported when one is made."""

import dataclasses
from typing import Any

import numpy as np

from .contestants import TableWork, by_name
from .oracle import BETA_1, BETA_2, EPSILON, LEARNING_RATE, Array
from .workloads import Gradient, Rows


class Jax:
    """A transformation of optax by its full name, jitted and donated.

    With a ``method``, that takes the whole step. An optimizer that is ``dense`` gets
    gradients of rows as the dense ones they stand for.
    """

    def __init__(
        self,
        work: TableWork,
        optimizer: str,
        *,
        method: str | None = None,
        dense: bool = False,
        **options: Any,
    ) -> None:
        import jax

        from adamax.jax import apply_updates

        self._jax: Any = jax
        self._dense = dense
        transformation = by_name(optimizer)(
            LEARNING_RATE, BETA_1, BETA_2, EPSILON, **options
        )
        self._transformation = transformation

        def update(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(gradients, state, params)
            return apply_updates(params, updates), state

        step = update if method is None else getattr(transformation, method)
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._params = [jax.numpy.array(array) for array in work.initial()]
        self._state = transformation.init(self._params)
        # New gradients go where the last ones were, as they do for the speed of memory:
        # memory that is new to a virtual machine is slow for a while.
        self._put = jax.jit(lambda old, new: old.at[:].set(new), donate_argnums=0)
        self._gradients: list[Any] = []

    def take(self, draw: list[Gradient]) -> None:
        before = self._gradients or [None] * len(draw)
        entries = zip(draw, self._params, before, strict=True)
        self._gradients = [self._array(*entry) for entry in entries]
        self._jax.block_until_ready(self._gradients)

    def _array(self, gradient: Gradient, param: Any, before: Any) -> Any:
        from adamax.jax import IndexedSlices

        numpy = self._jax.numpy
        if not isinstance(gradient, Rows):
            return numpy.array(gradient) if before is None else self._put(before, gradient)
        ids = numpy.array(gradient.ids, numpy.int32)
        if self._dense:
            return numpy.zeros_like(param).at[ids].add(gradient.values)
        return IndexedSlices(numpy.array(gradient.values), ids, current=True)

    def step(self) -> None:
        self._params, self._state = self._step(self._params, self._state, self._gradients)
        self._jax.block_until_ready((self._params, self._state))

    def parameters(self) -> list[Array]:
        return [np.asarray(param) for param in self._params]


class JaxExact(Jax):
    """Ours in exact mode, with the lookup of the rows that comes before a step."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, "adamax.jax.adamax", sparse="exact")
        optimizer, numpy = self._transformation, self._jax.numpy

        def look_and_step(params: Any, state: Any, gradients: Any) -> Any:
            (gradient,) = gradients
            (rows,) = optimizer.lookup(params, state, [gradient.indices])
            # As in a training step, the gradient depends on the rows: XLA has to read them,
            # before it changes the tables in place.
            values = numpy.where(numpy.isnan(rows), rows, gradient.values)
            gradients = [dataclasses.replace(gradient, values=values)]
            return optimizer.step(params, state, gradients)

        self._step = self._jax.jit(look_and_step, donate_argnums=(0, 1))

    def parameters(self) -> list[Array]:
        flush = self._jax.jit(self._transformation.flush, donate_argnums=(0, 1))
        self._params, self._state = flush(self._params, self._state)
        return super().parameters()
