"""States that were saved before the native core: they load, and training goes on.

``data/lazy.npz`` and ``data/exact.npz`` have parameters and state after 20 steps, and those
after 40, of the version that compiled its kernels with Numba.
"""

from pathlib import Path

import numpy as np
import pytest

from jax_cases import PATHS, jax, jnp, optax, take_step

from adamax.jax import IndexedSlices, adamax  # isort: skip  (not without jax)

DATA = Path(__file__).with_name("data")


def gradients(number, current):
    rng = np.random.default_rng(number)
    ids = rng.integers(60, size=4)
    of_rows = rng.normal(size=(4, 3)).astype(np.float32)
    weights = rng.normal(size=5).astype(np.float32)
    return {"table": IndexedSlices(of_rows, ids, current=current), "weights": weights}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_states_of_older_versions_go_on(sparse, path):
    saved = np.load(DATA / f"{sparse}.npz")
    kinds = {"table": sparse, "weights": "lazy"} if sparse == "exact" else "lazy"
    rate = optax.linear_schedule(0.1, 0.0, 50)
    optimizer = adamax(rate, weight_decay=0.1, sparse=kinds)
    params = {"table": jnp.zeros((60, 3)), "weights": jnp.zeros(5)}
    new = params, optimizer.init(params)
    paths, structure = jax.tree.flatten_with_path(new)
    names = [f"saved{jax.tree_util.keystr(key)}" for key, _ in paths]
    assert set(names) == {name for name in saved if name.startswith("saved")}
    params, state = structure.unflatten(jnp.asarray(saved[name]) for name in names)
    step = take_step(optimizer, path)
    for number in range(20, 40):
        params, state = step(params, state, gradients(number, sparse == "exact"))
    params, state = optimizer.flush(params, state)
    for key, leaf in jax.tree.leaves_with_path((params, state[:2])):
        expected = saved[f"end{jax.tree_util.keystr(key)}"]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=2e-6)
