"""What only JAX has: stateless updates, and variables spread over devices."""

import jax
import numpy as np
import pytest

import oracle
from cases import PRECISION, values
from compare import assert_step_close
from keras_support import Adamax, keras, numpy, options, variable

DEVICES = 4  # tests/keras/test_back_ends.py asks XLA for them


def spread(kind):
    """A distribution of Keras over all devices."""
    devices = keras.distribution.list_devices()
    assert len(devices) == DEVICES
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, DEVICES), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*embedding/embeddings"] = ("model", None)
    layout[".*dense/kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def trained(x, y):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((4,), dtype="int32"),
            layers.Embedding(32, 8, name="embedding"),
            layers.Flatten(),
            layers.Dense(8, name="dense"),
        ]
    )
    model.compile(optimizer=Adamax(0.01, weight_decay=0.1), loss="mse")
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("kind", ["data", "model"])
def test_distributed_training_gives_the_result_of_one_device(kind, rng):
    x = rng.integers(0, 32, (32, 4)).astype("int32")
    y = rng.normal(size=(32, 8)).astype("float32")
    alone = trained(x, y)
    keras.distribution.set_distribution(spread(kind))
    try:
        many = trained(x, y)
    finally:
        keras.distribution.set_distribution(None)
    for one, other in zip(alone.variables, many.variables, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-4, atol=1e-5)
    if kind == "model":
        table, (momentum, norm) = many.layers[0].embeddings, many.optimizer.variables[2:4]
        for v in (table, momentum, norm):
            assert v.value.sharding.shard_shape(v.shape) == (32 // DEVICES, 8)


@pytest.mark.parametrize(
    "schedule", [0.1, lambda step: 0.1 / (1 + step)], ids=["", "schedule"]
)
def test_stateless_steps_in_one_compiled_function(schedule, rng):
    w = variable(values(rng, (5, 9), "float32"))
    optimizer = Adamax(**options({"learning_rate": schedule}))
    optimizer.build([w])
    rule = oracle.Rule(learning_rate=schedule)
    step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    weights, state = [w.value.copy()], [v.value.copy() for v in optimizer.variables]
    for number in range(5):
        before = oracle.State.of(numpy(weights[0]), *map(numpy, state[-2:]))
        gradient = values(rng, (5, 9), "float32")
        weights, state = step(state, [jax.numpy.asarray(gradient)], weights)
        assert_step_close(
            PRECISION["float32"],
            before,
            oracle.State.of(numpy(weights[0]), *map(numpy, state[-2:])),
            oracle.step(rule, [before], [gradient], number)[0],
            rule.step_size(number),
            rule.epsilon,
        )
    assert step._cache_size() == 1
    assert int(state[0]) == 5


def test_a_sparse_matrix_is_taken_for_the_dense_gradient_it_stands_for(rng):
    from jax.experimental import sparse

    dense = np.where(rng.random((5, 9)) < 0.3, rng.normal(size=(5, 9)), 0)
    results = []
    for gradient in (dense, sparse.BCOO.fromdense(dense)):
        w = variable(np.ones((5, 9), np.float32))
        Adamax(0.1, clipnorm=1.0).apply([gradient], [w])
        results.append(numpy(w))
    np.testing.assert_array_equal(*results)
