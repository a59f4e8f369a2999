"""Cases of the JAX front end, ``adamax.jax``: whole steps, and updates that are applied."""

import os
from functools import partial
from typing import Any

import numpy as np

from .contestants import MemoryLimit, TableWork, by_name
from .harness import SECONDS_FOR_MEMORY, THREADS, Case, Contestant, CostsAtMost, Faster
from .oracle import ADAMAX, BETA_1, BETA_2, EPSILON, LAZY_ADAMAX, LEARNING_RATE, MOVE, Rule
from .workloads import ROWS, Array, Dense, Gradient, Rows, Sparse

STEP = "adamax.jax (step)"
UPDATE = "adamax.jax (update)"
OPTAX = "optax.adamax"
LIMIT = "memory limit"


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
    ) -> None:
        os.environ.setdefault("NPROC", str(THREADS))  # of XLA's pool
        import jax

        from adamax.jax import apply_updates

        self._jax = jax
        self._dense = dense
        transformation = by_name(optimizer)(LEARNING_RATE, BETA_1, BETA_2, EPSILON)

        def update(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(gradients, state, params)
            return apply_updates(params, updates), state

        step = update if method is None else getattr(transformation, method)
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._params = [jax.numpy.array(array) for array in work.initial()]
        self._state = transformation.init(self._params)
        # Where the last gradients were, as for the memory limit: memory that is new to a
        # virtual machine is slow for a while.
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
        return IndexedSlices(numpy.array(gradient.values), ids)

    def step(self) -> None:
        self._params, self._state = self._step(self._params, self._state, self._gradients)
        self._jax.block_until_ready((self._params, self._state))

    def parameters(self) -> list[Array]:
        return [np.asarray(param) for param in self._params]


_MAKE = {
    STEP: partial(Jax, optimizer="adamax.jax.adamax", method="step"),
    UPDATE: partial(Jax, optimizer="adamax.jax.adamax"),
    OPTAX: partial(Jax, optimizer="optax.adamax", dense=True),
}


def _contestant(way: str, work: Dense | Sparse, rule: Rule, name: str = "") -> Contestant:
    return Contestant(name or way, _MAKE[way], work, rule, ours=way != OPTAX)


def _beside_optax(rows: str) -> Case:
    table = Sparse(ROWS[rows])
    return Case(
        f"jax-sparse-{rows}",
        f"4096 uniform ids into rows of 64, table of {rows} rows",
        (
            _contestant(STEP, table, LAZY_ADAMAX),
            _contestant(UPDATE, table, LAZY_ADAMAX),
            _contestant(OPTAX, table, ADAMAX),
        ),
        (Faster(STEP, (OPTAX,), 20), Faster(UPDATE, (OPTAX,), 20)),
        rounds=11,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
        note="optax has no gradients of rows: it gets the dense gradient, which is made "
        "outside of what is measured, and moves all rows.",
    )


def _flat(way: str, name: str) -> Case:
    names = {size: f"{way}, {size} rows" for size in ROWS}
    return Case(
        name,
        "4096 uniform ids into rows of 64, tables of 1e5 to 1e7 rows",
        tuple(
            _contestant(way, Sparse(rows), LAZY_ADAMAX, names[size])
            for size, rows in ROWS.items()
        ),
        (CostsAtMost(names["1e7"], names["1e5"], 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


_DENSE = Dense(arrays=1, length=32 << 20)

CASES = (
    Case(
        "jax-dense",
        "One array of 32 Mi float32, jitted and donated",
        (
            *(_contestant(way, _DENSE, ADAMAX) for way in (STEP, UPDATE, OPTAX)),
            Contestant(LIMIT, MemoryLimit, _DENSE, MOVE),
        ),
        (
            Faster(STEP, (OPTAX,), 1.0),
            Faster(UPDATE, (OPTAX,), 1.0),
            Faster(STEP, (LIMIT,), 0.75),
        ),
        rounds=15,
        steps=3,
        note="Of the updates of both, XLA makes the same three passes over memory.",
    ),
    _beside_optax("1e6"),
    _flat(STEP, "jax-sparse-flat"),
    _flat(UPDATE, "jax-sparse-flat-update"),
)
