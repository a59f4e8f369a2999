"""What the tests of ``adamax.jax`` share: paths, arrays, snapshots and the oracle."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

import compare
import oracle
from cases import PRECISION
from frameworks import framework

try:
    jax, optax = framework("jax"), framework("optax")
except pytest.skip.Exception as missing:
    pytest.skip(str(missing), allow_module_level=True)

import jax.numpy as jnp

from adamax.jax import IndexedSlices, apply_updates

# The two ways to take a step.
PATHS = ("update", "step")

# Options in optax's terms, and as the oracle has them.
NAMES = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no learning": {"learning_rate": 0.0},
    "no memory": {"b1": 0.0, "b2": 0.0},
    "long memory": {"b1": 0.999, "b2": 0.99999},
    "short norm": {"b1": 0.95, "b2": 0.5},
    "large eps": {"eps": 0.5, "learning_rate": 0.1},
    "smallest eps": {"eps": 2.0**-126},
    "no eps": {"eps": 0.0},
    "weight decay": {"learning_rate": 0.1, "weight_decay": 0.3},
    "schedule": {"learning_rate": lambda step: 0.1 / (1 + step)},
    "scheduled decay": {"learning_rate": lambda step: 0.2**step, "weight_decay": 0.1},
}


def options(name: str) -> dict[str, Any]:
    return {"learning_rate": 0.001, **OPTIONS[name]}


def rule(**chosen: Any) -> oracle.Rule:
    chosen = {"eps": 1e-8, **chosen}
    return oracle.Rule(**{NAMES.get(name, name): value for name, value in chosen.items()})


def precision(dtype: str) -> Any:
    """A context in which JAX has this dtype."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def take_step(optimizer: Any, path: str, *, donate: bool = False) -> Callable[..., Any]:
    """A jitted function of parameters, state and gradients, that returns the first two."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        if path == "step":
            return optimizer.step(params, state, gradients)
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def contents(params: Any, state: Any) -> dict[str, np.ndarray]:
    """A copy of all that a step may change."""
    moments = state[0]
    trees = {"w": params, "m": moments.mu, "u": moments.nu}
    return {
        f"{name}{jax.tree_util.keystr(path)}": np.array(leaf)
        for name, tree in trees.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def follow(
    optimizer: Any,
    path: str,
    of_oracle: oracle.Rule,
    params: Sequence[Any],
    steps: Iterable[Sequence[Any]],
) -> tuple[list[Any], Any]:
    """Take steps, and hold each to the oracle's step from the same state."""
    params, step = list(params), take_step(optimizer, path)
    state = optimizer.init(params)
    for number, gradients in enumerate(steps):
        before = _states(state, params)
        for_oracle = [compare.rows(gradient) for gradient in gradients]
        expected = oracle.step(of_oracle, before, for_oracle, number)
        params, state = step(params, state, list(gradients))
        assert int(state[0].count) == number + 1
        for i, (after, param) in enumerate(
            zip(_states(state, params), params, strict=True)
        ):
            compare.assert_step_close(
                PRECISION[str(param.dtype)],
                before[i],
                after,
                expected[i],
                of_oracle.step_size(number),
                of_oracle.epsilon,
                compare.error_of_sums(for_oracle[i], np.asarray(param)),
                what=f"step {number}, parameter {i}",
            )
    return params, state


def _states(state: Any, params: Sequence[Any]) -> list[oracle.State]:
    moments = state[0]
    columns = zip(params, moments.mu, moments.nu, strict=True)
    return [oracle.State.of(*map(np.asarray, column)) for column in columns]


def rows(rng: np.random.Generator, indices: Any, table: Any) -> IndexedSlices:
    """A gradient of some rows of ``table``, float32."""
    indices = np.asarray(indices)
    values = rng.normal(size=(indices.size, *table.shape[1:])).astype(np.float32)
    return IndexedSlices(jnp.asarray(values), jnp.asarray(indices, jnp.int32))
