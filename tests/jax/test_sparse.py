"""Gradients of rows in ``adamax.jax``: rows that are touched, rows that are not, ids."""

import gc
import itertools

import numpy as np
import pytest

from cases import DTYPES, LARGE_TABLE, PATTERNS, TABLES, values
from compare import assert_same_bits
from jax_cases import (
    PATHS,
    contents,
    follow,
    jax,
    jnp,
    optax,
    precision,
    rows,
    rule,
    take_step,
)

from adamax.jax import primitives  # isort: skip  (not without jax)
from adamax.jax.rows import put_rows  # isort: skip
from adamax.jax import (  # isort: skip
    IndexedSlices,
    adamax,
    apply_updates,
    lookup,
    on_rows,
    sum_repeats,
    value_and_sparse_grad,
)

paths = pytest.mark.parametrize("path", PATHS)


def batch(rng, shape, dtype, pattern):
    indices = PATTERNS[pattern](rng, shape[0])
    of_rows = values(rng, (indices.size, *shape[1:]), dtype)
    return IndexedSlices(jnp.asarray(of_rows), jnp.asarray(indices, jnp.int32))


# --- The oracle ---------------------------------------------------------------------------


@paths
@pytest.mark.parametrize(
    ("table", "pattern"),
    [*itertools.product(TABLES, ["repeated"]), *itertools.product(["rows"], PATTERNS)],
)
def test_steps_follow_the_oracle(rng, table, pattern, path):
    w = jnp.asarray(values(rng, TABLES[table], "float32"))
    steps = [[batch(rng, w.shape, "float32", pattern)] for _ in range(2)]
    chosen = {"learning_rate": 0.1, "weight_decay": 0.1}
    follow(adamax(**chosen), path, rule(**chosen), [w], steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes(rng, dtype):
    with precision(dtype):
        w = jnp.asarray(values(rng, (40, 7), dtype))
        steps = [[batch(rng, w.shape, dtype, "repeated")] for _ in range(3)]
        follow(adamax(0.1), "step", rule(learning_rate=0.1), [w], steps)


@paths
def test_large_tables_and_dense_leaves_in_one_tree(rng, path):
    params = [jnp.asarray(values(rng, shape, "float32")) for shape in (LARGE_TABLE, (9, 4))]
    steps = [
        [
            batch(rng, LARGE_TABLE, "float32", "repeated"),
            jnp.asarray(values(rng, (9, 4), "float32")),
        ]
        for _ in range(2)
    ]
    follow(adamax(0.1), path, rule(learning_rate=0.1), params, steps)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_updates_of_rows_of_16_bit_tables_are_rounded_once_more(rng, dtype):
    w = jnp.asarray(values(rng, (40, 7), dtype))
    g = batch(rng, w.shape, dtype, "repeated")
    optimizer = adamax(0.1)
    updates, state = jax.jit(optimizer.update)(g, optimizer.init(w), w)
    assert updates.values.dtype == w.dtype
    whole, of_whole = jax.jit(optimizer.step)(w, optimizer.init(w), g)
    assert_same_bits(state[0].nu, of_whole[0].nu)
    after = apply_updates(w, updates)
    roundings = 3 * float(jnp.finfo(dtype).eps)
    error = abs(after.astype(np.float32) - whole.astype(np.float32))
    assert (error <= roundings * (abs(w.astype(np.float32)) + 0.1)).all()


@paths
def test_the_norm_takes_the_sum_of_repeats(path):
    w = jnp.zeros((5, 1))
    optimizer = adamax(0.1)
    g = IndexedSlices(jnp.array([[3.0], [-3.0], [2.0]]), jnp.array([1, 1, 2]))
    w, state = take_step(optimizer, path)(w, optimizer.init(w), g)
    np.testing.assert_array_equal(state[0].nu[:, 0], [0, 0, 2, 0, 0])
    np.testing.assert_array_equal(w[1], 0)


@paths
@pytest.mark.parametrize("pattern", ["repeated", "distinct", "none"])
def test_rows_that_are_not_touched_stay_bit_for_bit(rng, pattern, path):
    shape = (40, 7)
    optimizer = adamax(0.1, weight_decay=0.3)
    w = jnp.asarray(values(rng, shape, "float32"))
    state, step = optimizer.init(w), take_step(optimizer, path, donate=True)
    w, state = step(w, state, batch(rng, shape, "float32", "every"))
    for _ in range(3):
        g = batch(rng, shape, "float32", pattern)
        others = np.setdiff1d(np.arange(40), g.indices)
        before = contents(w, state)
        w, state = step(w, state, g)
        for name, after in contents(w, state).items():
            assert_same_bits(after[others], before[name][others], name)


@paths
def test_a_row_of_zeros_is_touched(path):
    optimizer = adamax(0.1, weight_decay=0.5)
    w = jnp.ones((3, 2))
    g = IndexedSlices(jnp.zeros((1, 2)), jnp.array([1]))
    w, _ = take_step(optimizer, path)(w, optimizer.init(w), g)
    np.testing.assert_allclose(w[:, 0], [1, 0.95, 1], rtol=1e-6)


@paths
def test_a_mask_keeps_rows_from_decaying(path):
    optimizer = adamax(0.1, weight_decay=0.5, mask={"a": False, "b": True})
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    g = IndexedSlices(jnp.zeros((1, 2)), jnp.array([1]))
    after, _ = take_step(optimizer, path)(params, optimizer.init(params), {"a": g, "b": g})
    assert_same_bits(after["a"], params["a"])
    np.testing.assert_allclose(after["b"][:, 0], [1, 0.95, 1], rtol=1e-6)


# --- Indices of no row --------------------------------------------------------------------


@paths
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_indices_of_no_row_are_dropped(rng, dtype, path):
    limits = np.iinfo(dtype)
    shape = (100, 3)
    known = [7, 99, 7, 0]
    outside = [100, 101, int(limits.max), int(limits.min) or 120, limits.max - 1]
    outside += [] if limits.min == 0 else [-1, -100, -99]
    indices = np.array(known + outside, np.int64).astype(dtype)
    rng.shuffle(indices)
    g = rows(rng, indices, np.zeros(shape))
    g = IndexedSlices(g.values, jnp.asarray(indices))
    only = np.isin(indices, known)
    clean = IndexedSlices(g.values[only], jnp.asarray(indices[only].astype(np.int32)))
    optimizer = adamax(0.1, weight_decay=0.1)
    w = jnp.asarray(values(rng, shape, "float32"))
    step = take_step(optimizer, path)
    expected = contents(*step(w, optimizer.init(w), clean))
    for name, after in contents(*step(w, optimizer.init(w), g)).items():
        assert_same_bits(after, expected[name], name)


@pytest.mark.parametrize("indices", [[2**40], [-(2**40)], [2**32 + 1], [2**63 - 1]])
@paths
def test_wide_indices_are_not_cut_off(indices, path):
    with jax.enable_x64(True):
        optimizer, w = adamax(0.1), jnp.ones((5, 2), jnp.float32)
        g = IndexedSlices(jnp.ones((1, 2), jnp.float32), jnp.asarray(indices, jnp.int64))
        after, state = take_step(optimizer, path)(w, optimizer.init(w), g)
        assert_same_bits(after, w)
        assert not state[0].nu.any()


def test_a_promise_that_is_not_kept_reaches_no_other_row():
    """Negative indices that are said to be distinct do not count from the end."""
    w = jnp.ones((5, 2))
    g = IndexedSlices(jnp.ones((2, 2)), jnp.array([-1, 2]), distinct=True)
    optimizer = adamax(0.1)
    for path in PATHS:
        after, _ = take_step(optimizer, path)(w, optimizer.init(w), g)
        np.testing.assert_array_equal(
            (np.asarray(after) != 1).any(axis=1), np.arange(5) == 2
        )
    np.testing.assert_array_equal((w + g)[:, 0], [1, 1, 2, 1, 1])


@paths
def test_values_of_no_row_may_be_nan(path):
    optimizer, w = adamax(0.1), jnp.ones((3, 2))
    of_rows = jnp.array([[jnp.nan, 1.0], [1.0, 1.0], [jnp.inf, 1.0]])
    g = IndexedSlices(of_rows, jnp.array([-1, 1, 3]))
    after, state = take_step(optimizer, path)(w, optimizer.init(w), g)
    assert np.isfinite(after).all()
    assert np.isfinite(state[0].nu).all()


# --- Sums of repeats ----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sum_repeats(rng, pattern):
    g = batch(rng, (40, 3), "float32", pattern)
    summed = jax.jit(sum_repeats, static_argnums=1)(g, 40)
    assert summed.distinct
    number = len(np.unique(g.indices))
    np.testing.assert_array_equal(summed.indices[:number], np.unique(g.indices))
    assert (summed.indices[number:] >= 40).all()
    assert (np.diff(summed.indices) > 0).all()
    assert not summed.values[number:].any()
    expected = np.zeros((40, 3))
    np.add.at(expected, np.asarray(g.indices), np.asarray(g.values, np.float64))
    np.testing.assert_allclose(
        summed.values[:number], expected[np.unique(g.indices)], rtol=1e-4, atol=1e-4
    )
    assert sum_repeats(summed, 40) is summed


def test_16_bit_values_are_summed_in_float32():
    g = IndexedSlices(
        jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16), jnp.array([0, 0, 0])
    )
    assert sum_repeats(g, 1).values[0, 0] == 258


@pytest.mark.parametrize("dtype", [*DTYPES, "complex64"])
def test_adding_rows_to_an_array(rng, dtype):
    with precision(dtype):
        table = jnp.asarray(np.arange(20).reshape(10, 2), dtype)
        updates = IndexedSlices(jnp.full((4, 2), 0.5, dtype), jnp.array([3, -1, 3, 12]))
        for after in (table + updates, optax.apply_updates(table, updates)):
            assert after.dtype == dtype
            expected = np.arange(20.0).reshape(10, 2)
            expected[3] += 1
            np.testing.assert_array_equal(np.asarray(after).astype(complex), expected)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        *itertools.product(TABLES, ["float32"]),
        *itertools.product(["rows"], [*DTYPES, "complex64"]),
    ],
)
def test_the_verbs_change_rows_as_jax_does(rng, monkeypatch, table, dtype):
    shape = TABLES[table]
    with precision(dtype):
        w = jnp.asarray(values(rng, shape, "float64"), dtype)
        indices = rng.integers(-2, shape[0] + 2, size=2 * shape[0])
        of_rows = values(rng, (indices.size, *shape[1:]), "float64")
        g = IndexedSlices(jnp.asarray(of_rows, dtype), jnp.asarray(indices))

        def change(w, g):
            # New functions, as JAX has compiled what it has seen.
            summed = jax.jit(lambda g: sum_repeats(g, shape[0]))(g)
            put = jax.jit(lambda w, g: put_rows(w, g, g.values.astype(w.dtype)))
            by_verbs = "adamax_put" in put.lower(w, summed).as_text()
            return by_verbs, (summed, put(w, summed), jax.jit(lambda w, g: w + g)(w, g))

        by_verbs, (summed, *changed) = change(w, g)
        assert by_verbs == (dtype in DTYPES)
        monkeypatch.setattr(primitives, "_targets", frozenset())
        by_verbs, (expected, *of_expected) = change(w, g)
        assert not by_verbs
        np.testing.assert_array_equal(summed.indices, expected.indices)
        # Their sums differ by roundings: of the dtype, and where it is narrow of float32.
        wide = dtype if dtype in ("float64", "complex64") else "float32"
        for dtype_of_sums, ours, theirs in (
            (wide, summed.values, expected.values),
            (dtype, changed[0], of_expected[0]),
            (dtype, changed[1], of_expected[1]),
        ):
            assert ours.dtype == theirs.dtype
            roundings = 8 * float(jnp.finfo(dtype_of_sums).eps)
            largest = np.abs(of_rows).max(initial=1.0)
            error = roundings * (np.abs(np.asarray(theirs, complex)) + largest)
            difference = np.abs(np.asarray(ours, complex) - np.asarray(theirs, complex))
            assert (difference <= error).all()


@pytest.mark.parametrize("number", [2, 10**6])
def test_a_row_that_is_repeated_often_is_summed_in_float64(number):
    of_rows = np.full((number, 1), 0.1, np.float32)
    g = IndexedSlices(jnp.asarray(of_rows), jnp.zeros(number, jnp.int32))
    exact = number * float(np.float32(0.1))
    w = jnp.zeros((1, 1))
    optimizer = adamax(0.1)
    _, state = jax.jit(optimizer.step)(w, optimizer.init(w), g)
    for total in (sum_repeats(g, 1).values[0, 0], (w + g)[0, 0], state[0].nu[0, 0]):
        assert total == np.float32(exact)


def test_adding_rows_under_vmap_and_grad():
    w, indices = jnp.arange(8.0).reshape(4, 2), jnp.array([[1, 1, 9], [0, -1, 3]])
    of_rows = jnp.ones((2, 3, 2))

    def add(w, values, indices):
        return w + IndexedSlices(values, indices)

    added = jax.vmap(add, in_axes=(None, 0, 0))(w, of_rows, indices)
    np.testing.assert_array_equal((added - w)[..., 0], [[0, 2, 0, 0], [1, 0, 0, 1]])
    of_w, of_values = jax.grad(lambda *given: (add(*given, indices[0]) ** 2).sum(), (0, 1))(
        w, of_rows[0]
    )
    np.testing.assert_array_equal(of_w, 2 * added[0])
    row = 2 * added[0, 1]
    np.testing.assert_array_equal(of_values, [row, row, jnp.zeros(2)])


def test_adding_rows_to_an_array_of_numpy():
    updates = IndexedSlices(jnp.ones((1, 2)), jnp.array([1]))
    after = np.zeros((2, 2), np.float32) + updates
    assert isinstance(after, jax.Array)
    np.testing.assert_array_equal(after, [[0, 0], [1, 1]])


def test_adding_rows_to_something_else_is_refused():
    with pytest.raises(TypeError, match="unsupported operand"):
        3.0 + IndexedSlices(jnp.ones((1, 2)), jnp.array([0]))


# --- Errors -------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize(
    ("shape", "indices", "error", "message"),
    [
        ((2, 3), [0, 1], ValueError, r"must have the shape \(2, 2\) .* got \(2, 3\)"),
        ((3, 2), [0, 1], ValueError, r"must have the shape \(2, 2\) .* got \(3, 2\)"),
        ((1, 1, 2), [[0]], ValueError, r"must have one axis, got \(1, 1\)"),
    ],
)
def test_wrong_gradients_of_rows_are_refused(path, shape, indices, error, message):
    w = {"a": jnp.ones((5, 2))}
    optimizer = adamax(0.1)
    g = {"a": IndexedSlices(jnp.ones(shape), jnp.array(indices))}
    with pytest.raises(error, match=message):
        take_step(optimizer, path)(w, optimizer.init(w), g)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (jnp.array([0.0, 1.0]), "indices must be integers, got float32"),
        (np.array([True, False]), "indices must be integers, got bool"),
        ([0.5], "indices must be integers, got float32"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "must be integers, got float32"),
    ],
)
def test_indices_that_are_no_integers_are_refused_at_once(indices, message):
    with pytest.raises(TypeError, match=message):
        IndexedSlices(jnp.ones((2, 2)), indices)


@paths
def test_a_parameter_without_rows_is_refused(path):
    optimizer, w = adamax(0.1), jnp.ones(())
    g = IndexedSlices(jnp.ones(2), jnp.array([0, 1]))
    with pytest.raises(ValueError, match="has no rows"):
        take_step(optimizer, path)(w, optimizer.init(w), g)


def test_a_transformation_that_takes_indices_for_numbers_is_told_of():
    params = jnp.ones((5, 2))
    chained = optax.chain(optax.scale(0.5), adamax(0.1))
    g = IndexedSlices(jnp.ones((2, 2)), jnp.array([0, 1]))
    with pytest.raises(TypeError, match=r"row ids of an IndexedSlices: use .*\.on_rows"):
        chained.update(g, chained.init(params), params)


# --- In jit -------------------------------------------------------------------------------


@paths
def test_no_recompilation_from_step_to_step(rng, path):
    params = {"table": jnp.ones((50, 3)), "weights": jnp.ones(4)}
    optimizer = adamax(optax.linear_schedule(0.1, 0.0, 100), weight_decay=0.1)
    traces = []

    @jax.jit
    def step(params, state, gradients):
        traces.append(path)
        if path == "step":
            return optimizer.step(params, state, gradients)
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(5):
        ids = rng.integers(-5, 60, size=20)
        gradients = {"table": rows(rng, ids, params["table"]), "weights": jnp.ones(4)}
        params, state = step(params, state, gradients)
    assert len(traces) == 1
    assert step._cache_size() == 1


@paths
def test_donated_tables_are_changed_where_they_are(rng, path):
    shape = (4000, 16)
    optimizer = adamax(0.1)
    w = jnp.zeros(shape)
    state = optimizer.init(w)
    step = take_step(optimizer, path, donate=True)
    before = [x.unsafe_buffer_pointer() for x in (w, state[0].mu, state[0].nu)]
    for _ in range(3):
        old = w
        w, state = step(w, state, rows(rng, rng.integers(4000, size=9), old))
        assert old.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in (w, state[0].mu, state[0].nu)] == before


@paths
def test_nothing_of_the_size_of_the_table_is_needed_beside_it(path):
    """By what XLA says of the compiled program."""
    shape = (100_000, 16)
    optimizer = adamax(0.1, weight_decay=0.1)
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    g = IndexedSlices(
        jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    )
    state = jax.eval_shape(optimizer.init, w)
    compiled = take_step(optimizer, path, donate=True).lower(w, state, g).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_000
    assert memory.alias_size_in_bytes >= 3 * 4 * shape[0] * shape[1]


def test_steps_leave_no_arrays_behind(rng):
    w = jnp.zeros((100, 4))
    optimizer = adamax(0.1)
    state, step = optimizer.init(w), take_step(optimizer, "step", donate=True)
    counts = []
    for _ in range(4):
        w, state = step(w, state, rows(rng, rng.integers(100, size=9), w))
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert counts[0] == counts[-1]


# --- Transformations of leaves ------------------------------------------------------------


@paths
def test_clipping_by_the_norm_of_the_summed_gradient(path):
    params = {"table": jnp.zeros((10, 1)), "weights": jnp.zeros(1)}
    gradients = {
        "table": IndexedSlices(jnp.array([[1.0], [2.0], [100.0]]), jnp.array([7, 7, -1])),
        "weights": jnp.array([4.0]),
    }
    clip = on_rows(optax.clip_by_global_norm(1.0))
    clipped, _ = clip.update(gradients, clip.init(params), params)
    np.testing.assert_allclose(clipped["weights"], [0.8], rtol=1e-6)
    np.testing.assert_allclose((params["table"] + clipped["table"])[7], [0.6], rtol=1e-6)

    chained = optax.chain(clip, adamax(0.1))
    updates, state = jax.jit(chained.update)(gradients, chained.init(params), params)
    np.testing.assert_allclose(state[1][0].nu["table"][7], [0.6], rtol=1e-6)
    assert jax.tree.structure(updates["weights"]) == jax.tree.structure(params["weights"])
    assert (params["table"] + updates["table"])[7] < 0
    # Without the parameters, too.
    alone, _ = clip.update(gradients, clip.init(params))
    np.testing.assert_allclose(alone["weights"], [0.8], rtol=1e-6)


def test_a_transformation_sees_the_rows_of_the_parameters():
    params = jnp.arange(10.0).reshape(5, 2)
    decay = on_rows(optax.add_decayed_weights(1.0))
    g = IndexedSlices(jnp.zeros((3, 2)), jnp.array([3, 3, 9]))
    updates, _ = decay.update(g, decay.init(params), params)
    np.testing.assert_array_equal(updates.values[0], params[3])


def test_extra_arguments_are_handed_on():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    on_rows(inner).update(jnp.ones(2), (), None, value=3)
    assert seen == {"value": 3}


# --- Gradients ----------------------------------------------------------------------------


def _loss(params, ids, scale):
    vectors = lookup(params["table"], ids) * scale
    context = lookup(params["table"], ids[:, :2]).sum(axis=1)
    logits = jnp.einsum("bnd,bd->bn", vectors, context) @ params["weights"]
    return jnp.tanh(logits).sum(), logits


def _dense_loss(params, ids, scale):
    known = (ids >= 0) & (ids < len(params["table"]))
    vectors = jnp.where(known[..., None], params["table"][ids], 0)
    logits = jnp.einsum("bnd,bd->bn", vectors * scale, vectors[:, :2].sum(axis=1))
    logits = logits @ params["weights"]
    return jnp.tanh(logits).sum(), logits


def test_gradients_of_rows_are_those_of_the_table(rng):
    params = {
        "table": jnp.asarray(rng.normal(size=(20, 3)).astype(np.float32)),
        "weights": jnp.asarray(rng.normal(size=5).astype(np.float32)),
    }
    ids = jnp.asarray(rng.integers(-2, 22, size=(6, 5)))
    ours = jax.jit(value_and_sparse_grad(_loss, has_aux=True))
    theirs = jax.value_and_grad(_dense_loss, has_aux=True)
    (value, aux), gradients = ours(params, ids, 2.0)
    (expected, of_expected), dense = theirs(params, ids, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux, of_expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients["weights"], dense["weights"], rtol=1e-4, atol=1e-5)
    assert gradients["table"].values.shape == (6 * 5 + 6 * 2, 3)
    summed = jnp.zeros((20, 3)) + gradients["table"]
    np.testing.assert_allclose(summed, dense["table"], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_table_is_computed_for_its_gradient():
    def loss(table, ids):
        return (lookup(table, ids) ** 2).sum()

    table = jax.ShapeDtypeStruct((100_000, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    compiled = jax.jit(value_and_sparse_grad(loss)).lower(table, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000


def test_ids_may_be_computed_in_the_loss(rng):
    def loss(params, x):
        ids = jnp.argmax(x @ params["weights"], axis=-1)
        return lookup(params["table"], ids).sum()

    params = {"table": jnp.ones((7, 2)), "weights": jnp.asarray(rng.normal(size=(4, 7)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    _, gradients = jax.jit(value_and_sparse_grad(loss))(params, x)
    np.testing.assert_array_equal(
        gradients["table"].indices, np.argmax(x @ params["weights"], axis=-1)
    )


def test_a_loss_without_lookups_has_the_usual_gradients():
    value, gradient = value_and_sparse_grad(lambda x: (x**2).sum())(jnp.array([1.0, 2.0]))
    assert value == 5
    np.testing.assert_array_equal(gradient, [2, 4])


def test_one_array_may_be_two_parameters():
    table = jnp.ones((4, 2))

    def loss(params):
        return lookup(params[0], jnp.array([1])).sum() + (params[1] ** 2).sum()

    _, (sparse, dense) = value_and_sparse_grad(loss)([table, table])
    np.testing.assert_array_equal(sparse.indices, [1])
    np.testing.assert_array_equal(dense, 2 * table)


def test_a_table_that_is_read_in_another_way_too_is_refused():
    def loss(table):
        return lookup(table, jnp.array([1])).sum() + (table**2).sum()

    with pytest.raises(ValueError, match=r"table of shape \(4, 2\) is read .* another way"):
        value_and_sparse_grad(loss)(jnp.ones((4, 2)))


def test_a_table_that_is_no_parameter_is_refused():
    def loss(table):
        return lookup(2 * table, jnp.array([1])).sum()

    with pytest.raises(ValueError, match=r"must be one of the parameters .* \(4, 2\)"):
        value_and_sparse_grad(loss)(jnp.ones((4, 2)))
    # and after that all is as before
    assert lookup(2 * jnp.ones((4, 2)), jnp.array([1])).sum() == 4


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "over",
    [
        lambda read, ids: jax.vmap(read)(ids).sum(),
        lambda read, ids: jax.lax.map(read, ids).sum(),
        lambda read, ids: jax.lax.scan(lambda sum_, i: (sum_ + read(i), None), 0.0, ids)[0],
        lambda read, ids: jax.lax.cond(ids[0] > 0, read, read, ids[0]),
    ],
)
def test_a_lookup_in_a_transformation_is_refused(over, jit):
    def loss(table, ids):
        return over(lambda i: lookup(table, i[None]).sum(), ids)

    differentiated = value_and_sparse_grad(loss)
    with pytest.raises(ValueError, match=r"lookup\(\) in a transformation of JAX"):
        (jax.jit(differentiated) if jit else differentiated)(
            jnp.ones((5, 2)), jnp.arange(3)
        )


def test_ids_must_be_integers():
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        lookup(jnp.ones((4, 2)), jnp.array([1.0]))


def test_training_ends_where_dense_training_of_the_touched_rows_does(rng):
    """A whole loop: gradients of rows, clipped, stepped with, in one jitted function."""
    params = {
        "table": jnp.asarray(rng.normal(size=(30, 3)).astype(np.float32)),
        "weights": jnp.asarray(rng.normal(size=5).astype(np.float32)),
    }
    ids = [jnp.asarray(rng.integers(30, size=(8, 5))) for _ in range(20)]
    clip, optimizer = on_rows(optax.clip_by_global_norm(0.5)), adamax(0.01)

    @jax.jit
    def train(params, state, ids):
        (loss, _), gradients = value_and_sparse_grad(_loss, has_aux=True)(params, ids, 1.0)
        gradients, _ = clip.update(gradients, clip.init(params), params)
        params, state = optimizer.step(params, state, gradients)
        return params, state, loss

    state = optimizer.init(params)
    losses = []
    for _ in range(5):
        for each in ids:
            params, state, loss = train(params, state, each)
            losses.append(float(loss))
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 5
    assert train._cache_size() == 1
