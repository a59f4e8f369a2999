"""What only TensorFlow has: graphs, XLA, variables that are copied when read, mirrors."""

import functools
import gc

import numpy as np
import pytest

import oracle
from adamax.keras import tensorflow as back_end
from cases import LARGE_TABLE, PATTERNS, values
from frameworks import framework
from keras_support import Adamax, as_gradient, draw, follow, keras, numpy, variable

tf = framework("tensorflow")
tf_keras = framework("tf_keras")

CLIPPING = [{}, {"clipnorm": 0.5}, {"clipvalue": 0.3}, {"global_clipnorm": 0.5}]


# Before TensorFlow is used, which is when tests run.
(_CPU,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    _CPU, [tf.config.LogicalDeviceConfiguration()] * 2
)

WAYS = ("eager", "graph", "graph of any size", "XLA", "XLA of any size")


def in_surroundings(way, optimizer, table):
    """``apply`` of one sparse gradient, in what surrounds it in a user's program."""

    def apply(indices, rows):
        optimizer.apply([tf.IndexedSlices(rows, indices, tuple(table.shape))], [table])

    if way == "eager":
        return apply
    signature = [
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((None, *table.shape[1:]), tf.float32),
    ]
    return tf.function(
        apply,
        jit_compile="XLA" in way,
        input_signature=signature if "any size" in way else None,
    )


@pytest.mark.parametrize(
    ("size", "clipping"), [(LARGE_TABLE, {}), *(((40, 7), c) for c in CLIPPING)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_all_surroundings_give_the_rule(way, size, clipping, rng):
    table = variable(values(rng, size, "float32"))
    optimizer = Adamax(0.1, **clipping)
    optimizer.build([table])
    step = in_surroundings(way, optimizer, table)
    gradients = [[draw(rng, size, pattern)] for pattern in ("repeated", "one", "every")]

    def apply(given, _):
        step(given[0].indices, given[0].values)

    follow(optimizer, oracle.Rule(learning_rate=0.1, **clipping), [table], gradients, apply)


def test_the_number_of_indices_may_vary_without_compiling_each_time(rng):
    table = variable(values(rng, LARGE_TABLE, "float32"))
    optimizer = Adamax(0.1)
    optimizer.build([table])
    before = len(back_end._COMPILED)
    for count in range(1, 30):
        indices = rng.integers(0, LARGE_TABLE[0], count)
        rows = oracle.Rows(values(rng, (count, LARGE_TABLE[1]), "float32"), indices)
        optimizer.apply([as_gradient(rows, table)])
    assert len(back_end._COMPILED) - before <= 2


def test_compiled_updates_outlive_the_variables_they_were_made_for(rng):
    for way in ("graph", "eager", "graph", "XLA", "graph"):
        table = variable(values(rng, LARGE_TABLE, "float32"))
        optimizer = Adamax(0.25)
        optimizer.build([table])
        rows = draw(rng, LARGE_TABLE, "one")
        in_surroundings(way, optimizer, table)(rows.indices, rows.values)
        assert numpy(optimizer.variables[3])[rows.indices].any()
        del table, optimizer
        gc.collect()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("size", [(40, 7), LARGE_TABLE], ids=["small", "large"])
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_variables_may_be_on_another_device(way, size, sparse, rng):
    for own, other in (("CPU:1", "CPU:0"), ("CPU:0", "CPU:1")):
        with tf.device(own):
            first, second = (variable(np.ones(s, np.float32)) for s in (size, (3,)))
        optimizer = Adamax(0.5)
        optimizer.build([first, second])
        rows = draw(rng, size, "every")
        gradient = as_gradient(rows, first) if sparse else tf.ones(size)

        step = functools.partial(optimizer.apply, [gradient, tf.ones(3)])
        with tf.device(other):
            tf.function(step)() if way == "graph" else step()
        moved = numpy(first) != 1
        assert (
            moved == (np.isin(np.arange(len(moved)), rows.indices)[:, None])
        ).mean() > 0.9
        np.testing.assert_allclose(numpy(second), 0.5, rtol=1e-6)


def test_other_betas_are_not_compiled_anew(rng):
    table = variable(values(rng, LARGE_TABLE, "float32"))
    optimizer = Adamax(0.1)
    counts = []
    for beta_1 in (0.9, 0.8, 0.7):
        optimizer.beta_1 = beta_1
        optimizer.apply([tf.ones(LARGE_TABLE)], [table])
        counts.append(len(back_end._COMPILED))
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("size", [(40, 7), LARGE_TABLE], ids=["small", "large"])
def test_shapes_that_are_known_late_are_checked_then(size):
    table = variable(np.ones(size, np.float32))
    optimizer = Adamax(0.5)
    optimizer.build([table])

    @tf.function
    def step(rows):
        gradient = tf.numpy_function(
            lambda n: np.ones((n, size[1]), np.float32), [rows], tf.float32
        )
        optimizer.apply([gradient])

    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(1))
    assert (numpy(table) == 1).all()
    step(tf.constant(size[0]))
    np.testing.assert_allclose(numpy(table), 0.5, rtol=1e-6)


def test_many_shapes_make_no_warning_about_tracing(rng, caplog):
    caplog.set_level("WARNING")
    for width in range(1, 9):
        table = variable(np.ones((2**16, width), np.float32))
        Adamax().apply([as_gradient(draw(rng, (2**16, width), "one"), table)], [table])
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
def test_no_operation_of_a_sparse_step_is_of_the_size_of_the_table(clipping, rng):
    shape = (54_321, 3)
    table = variable(np.ones(shape, np.float32))
    optimizer = Adamax(0.1, weight_decay=0.1, **clipping)
    optimizer.build([table])
    rows = as_gradient(draw(rng, shape, "one"), table)
    concrete = tf.function(lambda: optimizer.apply([rows], [table])).get_concrete_function()

    def of_table_size(function_graph):
        for operation in function_graph.get_operations():
            for output in operation.outputs:
                size = output.shape.num_elements() if output.shape.rank is not None else 0
                if size and size >= shape[0] * shape[1]:
                    yield operation.type, output.shape

    graphs = [concrete.graph]
    for name in {f.signature.name for f in concrete.graph.as_graph_def().library.function}:
        graphs.append(concrete.graph._functions[name].graph)
    assert len(graphs) > 1  # the compiled update is there
    assert [found for graph in graphs for found in of_table_size(graph)] == []


def address(tensor):
    return np.asarray(memoryview(tensor)).ctypes.data


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_training_an_embedding_never_copies_its_table(eager, rng):
    """Nor the forward pass, although Keras' Embedding reads the variable as a whole."""
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((2,), dtype="int32"),
            layers.Embedding(30_000, 8),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer=Adamax(0.1), loss="mse", run_eagerly=eager)
    x, y = rng.integers(0, 30_000, (64, 2)), rng.normal(size=64)
    model.fit(x, y, batch_size=16, verbose=0)
    tables = [model.layers[0].embeddings, *model.optimizer.variables[2:4]]
    places = [address(table.value.read_value()) for table in tables]
    before = numpy(tables[0])
    model.fit(x, y, batch_size=16, verbose=0)
    changed = np.flatnonzero((numpy(tables[0]) != before).any(axis=1))
    np.testing.assert_array_equal(changed, np.unique(x))
    for table, place in zip(tables, places, strict=True):
        first, second = table.value.read_value(), table.value.read_value()
        # A step that copied would leave the table elsewhere; scatter operations would make
        # each read a copy.
        assert address(first) == address(second) == place
    kept, values_kept = tables[0].value.read_value(), numpy(tables[0])
    model.fit(x, y, batch_size=16, verbose=0)
    np.testing.assert_array_equal(kept.numpy(), values_kept)  # a read is a value


LEGACY = {
    "defaults": {},
    "schedule": {"learning_rate": "schedule"},
    "clipvalue": {"clipvalue": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
}


@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.parametrize("size", [(30, 8), (4096, 16)], ids=["small", "large"])
def test_200_steps_agree_with_tf_keras(name, size, rng):
    """Its sparse updates, its dense ones, its schedules and its clipping.

    Rows are distinct where it clips: it clips before it sums.
    """

    def made(package, make):
        arguments = {"learning_rate": 0.01, **LEGACY[name]}
        if arguments["learning_rate"] == "schedule":
            schedule = package.optimizers.schedules.CosineDecay(0.05, 150)
            arguments["learning_rate"] = schedule
        return make(**arguments)

    ours = made(keras, Adamax)
    theirs = made(tf_keras, tf_keras.optimizers.legacy.Adamax)
    start = [rng.normal(size=s).astype(np.float32) for s in (size, (5, 3))]
    own = [variable(w) for w in start]
    other = [tf.Variable(w) for w in start]
    pattern = "distinct" if "clip" in name else "repeated"

    def apply(indices, rows, dense):
        slices = tf.IndexedSlices(rows, indices, size)
        ours.apply([slices, dense], own)
        theirs.apply_gradients(zip([slices, dense], other, strict=True))

    any_number = [
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((None, size[1]), tf.float32),
        tf.TensorSpec((5, 3), tf.float32),
    ]
    ours.build(own)
    theirs._create_all_weights(other)
    step = tf.function(apply, input_signature=any_number)
    for _ in range(200):
        rows = draw(rng, size, pattern)
        rows = oracle.Rows(rng.normal(size=rows.values.shape), rows.indices)
        step(rows.indices, rows.values.astype(np.float32), rng.normal(size=(5, 3)))
    for mine, peer in zip(own, other, strict=True):
        np.testing.assert_allclose(numpy(mine), peer.numpy(), rtol=2e-5, atol=2e-5)


def test_mirrored_variables_get_the_result_of_one_device(rng):
    """Two replicas, each with a gradient of its own: dense, small and large tables."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    shapes = [(40, 7), LARGE_TABLE, (5, 3), (400, 200)]
    start = [values(rng, shape, "float32") for shape in shapes]
    with strategy.scope():
        mirrored = [variable(w) for w in start]
        optimizer = Adamax(0.1, weight_decay=0.1)
        optimizer.build(mirrored)
    alone = [variable(w) for w in start]
    single = Adamax(0.1, weight_decay=0.1)

    @tf.function
    def step(indices, tables, dense):
        def of_replica():
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            rows = [
                tf.IndexedSlices(t[number], indices[number], s)
                for t, s in zip(tables, shapes[:2], strict=True)
            ]
            optimizer.apply([*rows, *(d[number] for d in dense)], mirrored)

        strategy.run(of_replica)

    for _ in range(3):
        indices = rng.integers(0, 40, (2, 10))
        tables = [values(rng, (2, 10, s[1]), "float32") for s in shapes[:2]]
        dense = [values(rng, (2, *s), "float32") for s in shapes[2:]]
        step(tf.constant(indices), [*map(tf.constant, tables)], [*map(tf.constant, dense)])
        rows = [
            tf.IndexedSlices(t.reshape(-1, t.shape[-1]), indices.ravel(), s)
            for t, s in zip(tables, shapes[:2], strict=True)
        ]
        single.apply([*rows, *(tf.constant(d.sum(axis=0)) for d in dense)], alone)
    for many, one in zip(mirrored, alone, strict=True):
        for copy in strategy.experimental_local_results(many.value):
            np.testing.assert_allclose(copy.numpy(), numpy(one), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_tensorflow_is_restored(rng, tmp_path):
    table = variable(values(rng, LARGE_TABLE, "float32"))
    optimizer = Adamax(0.1)
    gradients = [draw(rng, LARGE_TABLE, pattern) for pattern in PATTERNS]
    for rows in gradients[:5]:
        optimizer.apply([as_gradient(rows, table)], [table])
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, table=table.value)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    results = []
    for _ in range(2):
        checkpoint.restore(path).assert_consumed()
        for rows in gradients[5:]:
            optimizer.apply([as_gradient(rows, table)], [table])
        results.append([numpy(v) for v in (table, *optimizer.variables)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
