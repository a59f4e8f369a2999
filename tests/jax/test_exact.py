"""``sparse="exact"`` in ``adamax.jax``: the dense trajectory at the cost of some rows."""

import copy
from functools import cache, partial
from itertools import product

import numpy as np
import pytest

from cases import DTYPES, PRECISION, TABLES, values
from compare import assert_same_bits, trajectory_error
from exact_cases import EPSILON, FLOAT64, Dense, drawn
from frameworks import framework
from jax_cases import jax, jnp, optax, precision, take_step

import adamax  # isort: skip
from adamax.jax import history, primitives  # isort: skip  (not without jax)
from adamax.jax import (  # isort: skip
    IndexedSlices,
    apply_updates,
    lookup,
    on_rows,
    value_and_sparse_grad,
)

# The kernels, the operations that XLA compiles elsewhere, and what optax users call.
WAYS = ("kernels", "operations", "update")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    return request.getfixturevalue(f"by_{request.param}")


@pytest.fixture
def by_kernels():
    return "step"


@pytest.fixture
def by_operations(monkeypatch):
    monkeypatch.setattr(primitives, "_targets", frozenset())
    return "step"


@pytest.fixture
def by_update():
    return "update"


def exact(learning_rate=0.1, sparse="exact", **chosen):
    return adamax.jax.adamax(learning_rate, sparse=sparse, **chosen)


def of(ids, of_rows):
    return IndexedSlices(jnp.asarray(of_rows), jnp.asarray(ids, jnp.int32), current=True)


@cache
def jitted(optimizer, method):
    """A bound method is another function each time, which JAX would compile again."""
    return jax.jit(getattr(optimizer, method))


def rows_of(optimizer, w, state, ids):
    return jitted(optimizer, "lookup")(w, state, jnp.asarray(ids, jnp.int32))


def flushed(optimizer, w, state):
    return jitted(optimizer, "flush")(w, state)


def table(rows=50, width=3, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, width)), dtype)


def train(optimizer, w, state, steps, path="step", start=0, rows=2, step=None):
    """Steps with a few rows each; which rows and gradients depends on the number only."""
    step = step or take_step(optimizer, path)
    for number in range(start, start + steps):
        rng = np.random.default_rng(number)
        ids = rng.integers(len(w), size=rows)
        g = rng.normal(size=(rows, *w.shape[1:])).astype(w.dtype)
        w, state = step(w, state, of(ids, g))
    return w, state


def trained_densely(w, steps, learning_rate=0.1, weight_decay=0.0, rows=2):
    """What :func:`train` does, by the dense rule in more digits."""
    expected = Dense(np.asarray(w), 0.9, 0.999, weight_decay, 1e-8)
    for number in range(steps):
        rng = np.random.default_rng(number)
        ids = rng.integers(len(w), size=rows)
        g = np.zeros(w.shape)
        np.add.at(g, ids, rng.normal(size=(rows, *w.shape[1:])).astype(w.dtype))
        expected.step(g, learning_rate)
    return expected


def optimizers(run):
    """An exact and a dense one, and what the learning rates of the run are for them."""
    rates = np.array([run.learning_rate(step) for step in range(run.steps)], run.dtype)
    schedule = lambda step: jnp.asarray(rates)[step]  # noqa: E731
    chosen = {"b1": run.beta_1, "b2": run.beta_2, "weight_decay": run.weight_decay}
    make = partial(adamax.jax.adamax, schedule, eps=EPSILON, **chosen)
    return make(sparse="exact"), make(), rates.astype(np.float64)


# --- The trajectory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "seed"),
    [*product(["kernels"], range(6)), *product(["operations", "update"], range(2))],
    indirect=["way"],
)
def test_it_is_nearer_to_the_oracle_than_dense_float32(way, seed):
    run = drawn(seed, steps=1500)
    optimizer, dense, rates = optimizers(run)
    ours, theirs, expected = (
        jnp.asarray(run.table()),
        jnp.asarray(run.table()),
        run.oracle(),
    )
    state, of_theirs = optimizer.init(ours), dense.init(theirs)
    step, dense_step = take_step(optimizer, way), take_step(dense, "step")
    for number, (ids, g) in enumerate(run.gradients()):
        whole = run.densified(ids, g)
        ours, state = step(ours, state, of(ids, g))
        theirs, of_theirs = dense_step(theirs, of_theirs, jnp.asarray(whole))
        expected.step(whole, rates[number])
    ours, state = flushed(optimizer, ours, state)
    error = np.abs(ours - expected.w).max()
    assert error <= np.abs(theirs - expected.w).max(), run
    for moment, of_oracle in ((state[0].mu, expected.m), (state[0].nu, expected.u)):
        limit = 1e-4 * np.abs(of_oracle).max()
        assert np.abs(moment - of_oracle).max() <= limit


@pytest.mark.parametrize("seed", range(2))
def test_float64_is_the_oracle(way, seed):
    run = drawn(seed, "float64", steps=600)
    with precision("float64"):
        optimizer, _, rates = optimizers(run)
        w, expected = jnp.asarray(run.table()), run.oracle()
        state, step = optimizer.init(w), take_step(optimizer, way)
        for number, (ids, g) in enumerate(run.gradients()):
            w, state = step(w, state, of(ids, g))
            expected.step(run.densified(ids, g), rates[number])
        w, state = flushed(optimizer, w, state)
        for actual, of_oracle in (
            (w, expected.w),
            (state[0].mu, expected.m),
            (state[0].nu, expected.u),
        ):
            error = np.abs(np.asarray(actual) - of_oracle).max()
            assert error <= FLOAT64 * np.abs(of_oracle).max()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_gap(way, weight_decay):
    """Row i is touched in step i alone, and looked up once and at the end."""
    rows = 450
    with precision("float64"):
        optimizer = exact(0.01, weight_decay=weight_decay)
        w = table(rows, 2, "float64")
        state, step = optimizer.init(w), take_step(optimizer, way)
        expected = Dense(np.asarray(w), 0.9, 0.999, weight_decay, 1e-8)
        for number in range(rows):
            g = np.zeros((rows, 2))
            g[number] = 1.0, -3.0
            w, state = step(w, state, of([number], g[[number]]))
            expected.step(g, 0.01)
            if number in (0, 1, 2, 250, rows - 1):
                current = rows_of(optimizer, w, state, np.arange(rows))
                np.testing.assert_allclose(current, expected.w, rtol=1e-12, atol=1e-13)
        w, state = flushed(optimizer, w, state)
        np.testing.assert_allclose(w, expected.w, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(state[0].mu, expected.m, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(state[0].nu, expected.u, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_that_nobody_asks_for_are_brought_up_to_date_in_turn(
    monkeypatch, way, weight_decay
):
    """The ring is far shorter than the run: an entry is used again after 64 steps."""
    monkeypatch.setattr(history, "_FEWEST_ENTRIES", 1)
    optimizer = exact(0.01, b1=0.3, weight_decay=weight_decay)
    w = table(70, 3)
    state = optimizer.init(w)
    assert len(state[2].final) == 64
    expected = Dense(np.asarray(w), 0.3, 0.999, weight_decay, 1e-8)
    step = take_step(optimizer, way)
    g = np.zeros(w.shape, np.float32)
    for number in range(500):
        g[:] = 0
        g[number % 3] = 1.0 + number % 7
        w, state = step(w, state, of([number % 3], g[[number % 3]]))
        expected.step(g, 0.01)
        behind = int(state[2].steps) - np.asarray(state[2].stamps)
        assert behind.max() <= 33
    ours, _ = flushed(optimizer, w, state)
    np.testing.assert_allclose(ours, expected.w, rtol=3e-5, atol=3e-6)


def test_all_ways_agree_and_can_be_taken_in_turns(monkeypatch):
    optimizer, w = exact(weight_decay=0.1), table()
    start = w, optimizer.init(w)
    by_steps = train(optimizer, *start, 60)
    by_updates = train(optimizer, *start, 60, "update")
    in_turns = start
    step, update = take_step(optimizer, "step"), take_step(optimizer, "update")
    for number in range(60):
        path = step if number % 2 else update
        in_turns = train(optimizer, *in_turns, 1, start=number, step=path)
    ends = [flushed(optimizer, *end) for end in (by_steps, by_updates, in_turns)]
    for w, state in ends[1:]:
        np.testing.assert_allclose(w, ends[0][0], rtol=3e-6, atol=3e-6)
        np.testing.assert_allclose(state[0].nu, ends[0][1][0].nu, rtol=3e-6)


def test_it_is_the_exact_mode_of_numpy():
    run = drawn(3, steps=400)
    optimizer, _, rates = optimizers(run)
    w, of_numpy = jnp.asarray(run.table()), run.table()
    theirs = adamax.Adamax(
        lambda step: rates[step],
        run.beta_1,
        run.beta_2,
        EPSILON,
        weight_decay=run.weight_decay,
        sparse="exact",
    )
    state, step = optimizer.init(w), take_step(optimizer, "step")
    for ids, g in run.gradients():
        rows = theirs.lookup(of_numpy, ids)
        ours = rows_of(optimizer, w, state, ids)
        np.testing.assert_allclose(ours, rows, rtol=1e-4, atol=1e-6)
        theirs.apply_gradients([(adamax.IndexedSlices(g, ids), of_numpy)])
        w, state = step(w, state, of(ids, g))
    theirs.flush()
    w, _ = flushed(optimizer, w, state)
    np.testing.assert_allclose(w, of_numpy, rtol=1e-4, atol=1e-6)


def test_rows_that_are_touched_in_every_step_are_those_of_the_dense_rule(rng):
    w = jnp.asarray(values(rng, (9, 5), "float32"))
    optimizer, dense = exact(), adamax.jax.adamax(0.1)
    other, state, of_other = w, optimizer.init(w), dense.init(w)
    step, dense_step = take_step(optimizer, "step"), take_step(dense, "step")
    for _ in range(50):
        ids, g = rng.permutation(9), values(rng, (9, 5), "float32")
        assert_same_bits(rows_of(optimizer, w, state, ids), other[ids])
        w, state = step(w, state, of(ids, g[ids]))
        other, of_other = dense_step(other, of_other, jnp.asarray(g))
    assert_same_bits(w, other)


@pytest.mark.parametrize(
    ("shape", "dtype"), sorted({*product(TABLES, ["float32"]), *product(["rows"], DTYPES)})
)
def test_tables_of_all_dtypes_and_shapes(rng, way, shape, dtype):
    with precision(dtype):
        w = jnp.asarray(values(rng, TABLES[shape], dtype))
        optimizer = exact(0.01)
        state, step = optimizer.init(w), take_step(optimizer, way)
        expected = Dense(np.asarray(w).astype(np.float64), 0.9, 0.999, 0.0, 1e-8)
        for _ in range(20):
            ids = rng.integers(len(w), size=min(5, 3 * len(w)))
            g = np.abs(values(rng, (ids.size, *w.shape[1:]), dtype)) + dtype_of(dtype)(1)
            w, state = step(w, state, of(ids, g))
            whole = np.zeros(w.shape)
            np.add.at(whole, ids, g.astype(np.float64))
            expected.step(whole, 0.01)
        w, _ = flushed(optimizer, w, state)
        error = 20 * trajectory_error(PRECISION[dtype], np.asarray(w), [0.01] * 20)
        # Each time it is brought up to date, or steps, a parameter is rounded.
        error += 40 * float(jnp.finfo(dtype).eps) * (np.abs(expected.w) + 0.2)
        assert (np.abs(np.asarray(w, np.float64) - expected.w) <= error).all()


def dtype_of(dtype):
    return jnp.dtype(dtype).type


def test_large_tables_take_several_threads(rng, way):
    w = jnp.asarray(values(rng, (3000, 128), "float32"))
    optimizer = exact(0.01)
    w, state = train(optimizer, w, optimizer.init(w), 5, way, rows=2048)
    current = rows_of(optimizer, w, state, np.arange(3000))
    w, state = flushed(optimizer, w, state)
    np.testing.assert_allclose(current, w, rtol=2e-6, atol=2e-6)


def test_what_the_learning_rate_was_in_each_step_counts(way):
    """Decay factors of 0 and below, and steps that do not move, included."""
    rates = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.1, 0.0, 0.7, 2.5, 1e-3] * 30, np.float32)
    optimizer = exact(lambda step: jnp.asarray(rates)[step], weight_decay=1.0)
    w = table(6, 2)
    state, step = optimizer.init(w), take_step(optimizer, way)
    expected = Dense(np.asarray(w), 0.9, 0.999, 1.0, 1e-8)
    for number, rate in enumerate(rates):
        g = np.zeros(w.shape, np.float32)
        g[0] = 1.0
        if number < 3:
            g[1:4] = -2.0
        ids = np.flatnonzero(g[:, 0])
        w, state = step(w, state, of(ids, g[ids]))
        expected.step(g, float(rate))
        if number in (5, 9, 40, 299):
            current = rows_of(optimizer, w, state, np.arange(6))
            np.testing.assert_allclose(current, expected.w, rtol=2e-5, atol=2e-5)


def test_a_step_without_the_table_is_none_for_it(way):
    params = {"a": table(9, 2), "b": table(5, 2)}
    optimizer = exact(0.01)
    state, step = optimizer.init(params), take_step(optimizer, way)
    a, b = of([1], np.ones((1, 2), np.float32)), of([2], np.ones((1, 2), np.float32))
    params, state = step(params, state, {"a": a, "b": b})
    before = optimizer.lookup(params, state, {"a": jnp.arange(9)})["a"]
    for _ in range(5):
        params, state = step(params, state, {"a": None, "b": b})
    assert int(state[2]["a"].steps) == 1
    assert int(state[2]["b"].steps) == int(state[0].count) == 6
    assert_same_bits(optimizer.lookup(params, state, {"a": jnp.arange(9)})["a"], before)


def test_a_gradient_of_no_rows_is_a_step(way):
    optimizer, w = exact(), table(5, 2)
    state, step = optimizer.init(w), take_step(optimizer, way)
    none = of(np.zeros(0), np.zeros((0, 2), np.float32))
    expected = Dense(np.asarray(w), 0.9, 0.999, 0.0, 1e-8)
    g = np.zeros((5, 2), np.float32)
    g[3] = 2.0
    w, state = step(w, state, of([3], g[[3]]))
    expected.step(g, 0.1)
    for _ in range(3):
        w, state = step(w, state, none)
        expected.step(0 * g, 0.1)
    w, _ = flushed(optimizer, w, state)
    np.testing.assert_allclose(w, expected.w, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 2)])
def test_tables_of_no_elements(way, shape):
    optimizer, w = exact(), jnp.zeros(shape)
    state, step = optimizer.init(w), take_step(optimizer, way)
    for _ in range(2):
        w, state = step(w, state, of([1, -1], np.ones((2, *shape[1:]), np.float32)))
    w, state = flushed(optimizer, w, state)
    assert w.shape == shape
    assert rows_of(optimizer, w, state, [1]).shape == (1, *shape[1:])


def test_indices_of_no_row_are_dropped(way):
    optimizer, w = exact(), table(5, 2)
    start = w, optimizer.init(w)
    step = take_step(optimizer, way)
    ids, g = [-1, 3, 5, 2**31 - 1], np.ones((4, 2), np.float32)
    g[[0, 2, 3]] = np.nan
    bad, good = step(*start, of(ids, g)), step(*start, of([3], g[[1]]))
    jax.tree.map(assert_same_bits, flushed(optimizer, *bad), flushed(optimizer, *good))
    rows = rows_of(optimizer, *bad, ids)
    assert_same_bits(rows[np.array([0, 2, 3])], np.zeros((3, 2), np.float32))
    assert_same_bits(rows[1], good[0][3])


def test_repeats_are_summed(way):
    optimizer, w = exact(), table(5, 2)
    start = w, optimizer.init(w)
    step = take_step(optimizer, way)
    g = np.array([[1.0, 2.0], [4.0, -8.0], [-1.0, 6.0]], np.float32)
    once = step(*start, of([3, 1], [g[0] + g[2], g[1]]))
    often = step(*start, of([3, 1, 3], g))
    for (w, state), (other, of_other) in [(once, often)]:
        np.testing.assert_allclose(w, other, rtol=1e-6)
        assert_same_bits(state[0].nu, of_other[0].nu)


def test_a_gradient_that_is_not_finite_reaches_its_row_alone(way):
    optimizer, w = exact(), table(5, 2)
    state, step = optimizer.init(w), take_step(optimizer, way)
    for bad in (np.nan, np.inf):
        of_bad, of_state = step(w, state, of([2], np.full((1, 2), bad, np.float32)))
        of_bad, of_state = step(of_bad, of_state, of([1], np.ones((1, 2), np.float32)))
        of_bad, _ = flushed(optimizer, of_bad, of_state)
        assert np.isnan(of_bad[2]).all()
        assert np.isfinite(np.delete(of_bad, 2, axis=0)).all()


def test_numbers_of_steps_may_overflow(monkeypatch, way):
    optimizer, w = exact(weight_decay=0.1), table(20, 2)
    state = optimizer.init(w)
    late = 2**31 - 40
    of_late = state[2]._replace(
        steps=jnp.int32(late), stamps=jnp.full_like(state[2].stamps, late)
    )
    w_late, state_late = train(optimizer, w, (*state[:2], of_late), 80, way)
    assert int(state_late[2].steps) < 0
    early = train(optimizer, w, state, 80, way)
    ours, theirs = flushed(optimizer, w_late, state_late), flushed(optimizer, *early)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


# --- Reading ------------------------------------------------------------------------------


def test_a_lookup_reads_what_the_dense_rule_has(way):
    optimizer, w = exact(), table(20, 2)
    w, state = train(optimizer, w, optimizer.init(w), 30, way)
    expected = trained_densely(table(20, 2), 30)
    ids = np.array([[3, 3], [19, 0]])
    rows = rows_of(optimizer, w, state, ids)
    np.testing.assert_allclose(rows, expected.w[ids], rtol=2e-5, atol=2e-6)
    # Reading has changed nothing.
    again = rows_of(optimizer, w, state, ids)
    assert_same_bits(again, rows)
    flat, _ = flushed(optimizer, w, state)
    np.testing.assert_allclose(flat[ids], rows, rtol=1e-6, atol=1e-6)


def test_the_rows_that_are_read_are_the_rows_that_step():
    """A gradient of 0 and no momentum leaves what was read, bit for bit."""
    for dtype in ("float32", "float16"):
        optimizer = exact(0.01, b1=0.5)
        w = table(8, 3, dtype)
        state, step = optimizer.init(w), take_step(optimizer, "step")
        w, state = step(w, state, of(np.arange(8), np.ones((8, 3), w.dtype)))
        for _ in range(100):
            w, state = step(w, state, of([0], np.ones((1, 3), w.dtype)))
        rows = rows_of(optimizer, w, state, [4, 5])
        w, state = step(w, state, of([4, 5], np.zeros((2, 3), w.dtype)))
        assert_same_bits(w[4:6], rows)


def test_a_loss_reads_current_tables(rng):
    optimizer = exact(0.05, sparse={"table": "exact", "weights": "lazy"})
    dense = adamax.jax.adamax(0.05)
    start = {"table": table(30, 4), "weights": jnp.ones((4,))}
    batches = [jnp.asarray(rng.integers(-1, 30, (3, 2)), jnp.int32) for _ in range(80)]

    def loss(params, ids):
        return jnp.tanh(lookup(params["table"], ids) @ params["weights"] - 0.1).sum()

    @jax.jit
    def step(params, state, ids):
        current = optimizer.current(params, state)
        value, gradients = value_and_sparse_grad(loss)(current, ids)
        assert gradients["table"].current
        return *optimizer.step(params, state, gradients), value

    @jax.jit
    def dense_step(params, state, ids):
        value, gradients = jax.value_and_grad(loss)(params, ids)
        return *dense.step(params, state, gradients), value

    params, state = start, optimizer.init(start)
    other, of_other = start, dense.init(start)
    for ids in batches:
        params, state, value = step(params, state, ids)
        other, of_other, expected = dense_step(other, of_other, ids)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    params, state = flushed(optimizer, params, state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), params, other)


def test_a_table_that_is_not_read_gets_a_gradient_of_no_rows():
    optimizer = exact()
    params = {"a": table(9, 2), "b": table(5, 2)}
    current = optimizer.current(params, optimizer.init(params))
    loss = lambda params: lookup(params["b"], jnp.array([1])).sum()  # noqa: E731
    _, gradients = value_and_sparse_grad(loss)(current)
    assert gradients["a"].values.shape == (0, 2)
    assert gradients["a"].current
    assert gradients["b"].indices.tolist() == [1]


def test_several_lookups_of_one_table(rng):
    optimizer, w = exact(), table(9, 2)
    state = optimizer.init(w)
    ids = jnp.array([3, 4]), jnp.array([[4], [8]])

    def loss(w):
        return (lookup(w, ids[0]).sum() * lookup(w, ids[1])).sum()

    value, gradient = value_and_sparse_grad(loss)(optimizer.current(w, state))
    expected, whole = jax.value_and_grad(loss)(w)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.zeros_like(w) + gradient, whole, rtol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 1,
        lambda w: w @ jnp.ones((2, 1)),
        lambda w: w[3],
        lambda w: jnp.sum(w),
        lambda w: jnp.take(w, jnp.array([1]), axis=0),
        lambda w: np.asarray(w),
        lambda w: 1 / w**2,
        lambda w: -w,
        lambda w: list(w),
    ],
)
def test_reading_a_current_table_in_another_way_is_refused(read):
    optimizer, w = exact(), table(9, 2)
    current = optimizer.current(w, optimizer.init(w))
    with pytest.raises(TypeError, match=r"\(9, 2\) may be stale; read some with"):
        read(current)


def test_a_current_table_is_no_array_and_says_which_it_is():
    optimizer, params = exact(), {"t": table(9, 2)}
    current = optimizer.current(params, optimizer.init(params))["t"]
    with pytest.raises(AttributeError, match=r"no 'T': rows of the table at \['t'\] of"):
        current.T  # noqa: B018
    assert copy.deepcopy(current).shape == (9, 2)


def test_a_current_table_says_what_it_is_of():
    optimizer, w = exact(), table(9, 2)
    current = optimizer.current(w, optimizer.init(w))
    assert (current.shape, current.dtype, current.ndim) == (w.shape, w.dtype, 2)
    assert len(current) == 9


def test_a_lookup_of_some_parameters():
    optimizer = exact(sparse={"a": {"t": "exact"}, "b": "lazy"})
    params = {"a": {"t": table(9, 2)}, "b": table(5, 2)}
    state = optimizer.init(params)
    ids = {"a": {"t": jnp.array([1, -1])}, "b": jnp.array([[0], [4]])}
    rows = optimizer.lookup(params, state, ids)
    assert_same_bits(rows["a"]["t"][0], params["a"]["t"][1])
    assert_same_bits(rows["b"], params["b"][ids["b"]])
    assert list(optimizer.lookup(params, state, {"b": ids["b"]})) == ["b"]
    with pytest.raises(ValueError, match=r"parameters, \['a'\]\['t'\], \['b'\], got 3 at"):
        optimizer.lookup(params, state, {"c": 3})
    with pytest.raises(ValueError, match=r"ids must be arrays at .*\['b'\]\[0\]"):
        optimizer.lookup(params, state, {"b": [1, 2]})
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        optimizer.lookup(params, state, {"b": jnp.ones(3)})


# --- What is refused ----------------------------------------------------------------------

paths = pytest.mark.parametrize("path", ["step", "update"])


@paths
def test_a_gradient_of_rows_that_may_be_behind_is_refused(path):
    optimizer, w = exact(), {"t": table(9, 2)}
    g = {"t": IndexedSlices(jnp.ones((1, 2)), jnp.array([1]))}
    with pytest.raises(ValueError, match=r"\['t'\] is of rows that may have been stale"):
        take_step(optimizer, path)(w, optimizer.init(w), g)
    # Nor does summing repeats, or clipping, make a promise.
    clip = on_rows(optax.clip_by_global_norm(1.0))
    clipped, _ = clip.update(g, clip.init(w), w)
    assert not clipped["t"].current
    kept, _ = clip.update({"t": of([1], np.ones((1, 2)))}, clip.init(w), w)
    assert kept["t"].current


@paths
def test_a_gradient_of_the_whole_table_is_refused(path):
    optimizer, w = exact(), {"t": table(9, 2)}
    with pytest.raises(ValueError, match=r"IndexedSlices, got an array of shape \(9, 2\)"):
        take_step(optimizer, path)(w, optimizer.init(w), w)


@paths
def test_gradients_of_another_shape_are_refused(path):
    optimizer, w = exact(), table(9, 2)
    with pytest.raises(ValueError, match=r"must have the shape \(1, 2\)"):
        take_step(optimizer, path)(w, optimizer.init(w), of([1], np.ones((1, 3))))


def test_transformations_that_look_at_rows_that_may_be_behind_are_refused():
    chain = optax.chain(on_rows(optax.add_decayed_weights(0.1)), exact())
    w = table(9, 2)
    with pytest.raises(TypeError, match=r"in on_rows\(\) that looks at parameters cannot"):
        chain.update(of([1], np.ones((1, 2), np.float32)), chain.init(w), w)


@pytest.mark.parametrize(
    "loss",
    [
        lambda params: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(params)),
        lambda params: lookup(params["t"], jnp.array([1])).sum() + params["t"].mu.sum(),
        lambda params: params["t"].table.sum(),
    ],
)
def test_a_loss_that_takes_a_current_table_apart_is_refused(loss):
    optimizer, params = exact(), {"t": table(9, 2)}
    current = optimizer.current(params, optimizer.init(params))
    with pytest.raises(
        ValueError, match=r"parts of an exact table: rows of the table at \["
    ):
        value_and_sparse_grad(loss)(current)


def test_a_current_table_that_is_no_parameter_is_refused():
    optimizer, w = exact(), table(9, 2)
    current, another = (optimizer.current(w, optimizer.init(w)) for w in (w, 2 * w))
    with pytest.raises(ValueError, match=r"must be one of the parameters .* \(9, 2\)"):
        value_and_sparse_grad(lambda _: lookup(another, jnp.array([1])).sum())(current)


def test_an_update_needs_the_parameters():
    optimizer, w = exact(), table(9, 2)
    with pytest.raises(ValueError, match="parameters must be given"):
        optimizer.update(of([1], np.ones((1, 2))), optimizer.init(w))


@pytest.mark.parametrize("sparse", ["dense", None, True, 0, {"t": "precise"}, {"t": None}])
def test_another_kind_of_sparse_is_refused_at_once(sparse):
    with pytest.raises(ValueError, match="sparse must be 'lazy' or 'exact', got"):
        exact(sparse=sparse)


@pytest.mark.parametrize("kind", ["dense", None, {"t": 1}])
def test_another_kind_of_sparse_from_a_function_is_refused(kind):
    with pytest.raises(ValueError, match="sparse must be"):
        exact(sparse=lambda params: kind).init({"t": table(9, 2)})


def test_sparse_for_other_parameters_is_refused():
    with pytest.raises(ValueError, match="sparse must be a pytree like that of the param"):
        exact(sparse={"t": "exact"}).init({"t": table(9, 2), "b": table(9, 2)})


def test_sparse_may_end_earlier_than_the_parameters():
    optimizer = exact(sparse={"a": "exact", "b": "lazy"})
    params = {"a": [table(9, 2), table(5, 2)], "b": {"w": jnp.ones(3)}}
    deferred = optimizer.init(params)[2]
    assert [len(part.stamps) for part in deferred["a"]] == [9, 5]
    assert deferred["b"]["w"] is None


def users_of_the_state(optimizer, g):
    return [
        lambda w, state: optimizer.step(w, state, g),
        lambda w, state: optimizer.update(g, state, w),
        lambda w, state: optimizer.current(w, state),
        lambda w, state: optimizer.lookup(w, state, jnp.array([1])),
        lambda w, state: optimizer.flush(w, state),
    ]


@pytest.mark.parametrize("user", range(5))
def test_a_state_that_knows_no_rows_that_are_behind_is_refused(user):
    optimizer, w = exact(), table(9, 2)
    use = users_of_the_state(optimizer, of([1], np.ones((1, 2), np.float32)))[user]
    state = optimizer.init(w)
    for of_another in (state[:2], optax.adamax(0.1).init(w)):
        with pytest.raises(ValueError, match=r"must have three parts .* got 2; flush"):
            use(w, of_another)
    for of_another in ((optax.EmptyState(), state), w, {"t": state}, ()):
        with pytest.raises(TypeError, match=r"state must be that of adamax\(\), a tuple"):
            use(w, of_another)
    use(w, state)


@pytest.mark.parametrize("user", range(5))
def test_a_lazy_optimizer_refuses_the_state_of_an_exact_one(user):
    lazy, w = adamax.jax.adamax(0.1), table(9, 2)
    use = users_of_the_state(lazy, of([1], np.ones((1, 2), np.float32)))[user]
    with pytest.raises(ValueError, match=r"must have two parts .* got 3; flush"):
        use(w, exact().init(w))
    use(w, lazy.init(w))


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
def test_arrays_for_what_must_be_known_are_refused(name):
    with pytest.raises(TypeError, match="b1, b2 and eps must be numbers where sparse"):
        exact(**{name: jnp.float32(0.5)})


def test_betas_that_would_need_too_many_terms_are_refused():
    with pytest.raises(ValueError, match=r"needs b1 further from 1 and b2 nearer to 1"):
        exact(b1=0.9, b2=0.9)
    with precision("float64"):
        optimizer = exact(b1=0.99, b2=0.998)
        with pytest.raises(ValueError, match=r"needs b1 further from 1 .* for float64"):
            optimizer.init(table(9, 2, "float64"))


@pytest.mark.parametrize("param", [jnp.float32(1.0), jnp.ones(3, jnp.complex64)])
def test_what_has_no_rows_of_real_numbers_is_refused(param):
    with pytest.raises(TypeError, match=r"rows of real numbers, got .* at \['t'\]"):
        exact().init({"t": param})


# --- State --------------------------------------------------------------------------------


def test_the_state_goes_on_from_a_dense_one_and_back(rng):
    optimizer, dense = exact(0.01), adamax.jax.adamax(0.01)
    w = table(9, 2)
    g = jnp.asarray(values(rng, w.shape, "float32"))
    w, state = take_step(dense, "step")(w, dense.init(w), g)
    state = (*state, *optimizer.init(w)[2:])
    w, state = train(optimizer, w, state, 40)
    w, state = flushed(optimizer, w, state)
    expected = Dense(np.asarray(table(9, 2)), 0.9, 0.999, 0.0, 1e-8)
    expected.step(np.asarray(g), 0.01)
    for number in range(40):
        drawn_by = np.random.default_rng(number)
        ids = drawn_by.integers(9, size=2)
        whole = np.zeros(w.shape)
        np.add.at(whole, ids, drawn_by.normal(size=(2, 2)).astype(np.float32))
        expected.step(whole, 0.01)
    np.testing.assert_allclose(w, expected.w, rtol=1e-5, atol=1e-6)
    back, of_back = take_step(optax.adamax(0.01), "update")(w, state[:2], g)
    assert int(of_back[0].count) == 42
    assert np.isfinite(back).all()


STATES_OF_OTHERS = {
    "fewer rows": (table(5, 3), {}, {}),
    "more rows": (table(5000, 3), {}, {}),
    "another width": (table(9, 8), {}, {}),
    "another window": (table(9, 3), {"b1": 0.5}, {}),
    "decay after none": (table(9, 3), {}, {"weight_decay": 1.0}),
    "no decay after some": (table(9, 3), {"weight_decay": 1.0}, {}),
    "a mask": (table(9, 3), {"weight_decay": 1.0}, {"weight_decay": 1.0, "mask": False}),
}


@pytest.mark.parametrize("user", range(5))
@pytest.mark.parametrize("of_another", STATES_OF_OTHERS)
def test_states_of_other_tables_and_optimizers_are_refused(of_another, user):
    """The kernels would read and write outside of the arrays."""
    other, made_with, used_with = STATES_OF_OTHERS[of_another]
    state = exact(**made_with).init(other)
    optimizer = exact(**used_with)
    use = users_of_the_state(optimizer, of([1], np.ones((1, 3), np.float32)))[user]
    with pytest.raises(
        ValueError, match=r"(in the state must be|the state is of an optimizer with)"
    ):
        use(table(9, 3), state)


@pytest.mark.parametrize("user", range(5))
def test_states_of_another_dtype_are_refused(user):
    with precision("float64"):
        w, optimizer = table(9, 3, "float64"), exact()
        dense = optax.adamax(0.1).init(table(9, 3))
        state = (*dense, *optimizer.init(w)[2:])
        use = users_of_the_state(optimizer, of([1], np.ones((1, 3))))[user]
        with pytest.raises(
            ValueError, match=r"mu in the state must be float64 .* got float32"
        ):
            use(w, state)
        use(w, optimizer.init(w))


def test_a_16_bit_state_of_another_optimizer_goes_on(way):
    w, optimizer = table(9, 3, "float16"), exact()
    moments, *others = optimizer.init(w)
    halves = jax.tree.map(lambda x: x.astype(jnp.float16), (moments.mu, moments.nu))
    state = (moments._replace(mu=halves[0], nu=halves[1]), *others)
    w, state = train(optimizer, w, state, 2, way)
    assert state[0].mu.dtype == jnp.float32


def test_a_mapped_current_table_is_read_as_what_it_is_then():
    optimizer, w = exact(), table(9, 3)
    w, state = train(optimizer, w, optimizer.init(w), 20)
    current = optimizer.current(w, state)
    halves = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, current
    )
    ids = jnp.arange(9)
    np.testing.assert_allclose(
        jax.jit(lookup)(halves, ids).astype(np.float32), lookup(current, ids), atol=0.05
    )


def test_a_gradient_of_none_may_stand_for_a_branch(way):
    optimizer = exact(sparse={"t": "exact", "sub": {"a": "exact", "b": "lazy"}})
    params = {"t": table(9, 2), "sub": {"a": table(5, 2), "b": jnp.ones(3)}}
    state, step = optimizer.init(params), take_step(optimizer, way)
    g = of([1], np.ones((1, 2), np.float32))
    gradients = {"t": g, "sub": {"a": g, "b": jnp.ones(3)}}
    params, state = step(params, state, gradients)
    updates, after = optimizer.update({"t": g, "sub": None}, state, params)
    assert updates["sub"] is None
    stepped, of_stepped = optimizer.step(params, state, {"t": g, "sub": None})
    for new in (after, of_stepped):
        assert jax.tree.structure(new) == jax.tree.structure(state)
        jax.tree.map(assert_same_bits, new[2]["sub"], state[2]["sub"])
    jax.tree.map(assert_same_bits, stepped["sub"], params["sub"])


def test_flushing_changes_nothing_that_is_current(rng):
    optimizer, w = exact(), table(9, 2)
    w, state = train(optimizer, w, optimizer.init(w), 20)
    once = flushed(optimizer, w, state)
    jax.tree.map(assert_same_bits, flushed(optimizer, *once), once)
    assert (once[1][2].stamps == once[1][2].steps).all()


def test_without_exact_tables_everything_is_as_without_the_option():
    optimizer = adamax.jax.adamax(0.1)
    params = {"t": table(9, 2)}
    state = optimizer.init(params)
    assert len(state) == 2
    assert optimizer.current(params, state)["t"] is params["t"]
    assert optimizer.flush(params, state)[0]["t"] is params["t"]


def test_a_function_may_choose_the_tables():
    is_table = lambda leaf: "exact" if leaf.ndim == 2 else "lazy"  # noqa: E731
    optimizer = exact(sparse=lambda params: jax.tree.map(is_table, params))
    state = optimizer.init({"t": table(9, 2), "b": jnp.zeros(3), "none": None})
    assert state[2]["t"] is not None
    assert state[2]["b"] is None
    assert state[2]["none"] is None


@paths
def test_a_mask_leaves_rows_without_decay(path):
    params = {"a": table(9, 2), "b": table(9, 2)}
    optimizer = exact(0.1, weight_decay=0.5, mask={"a": True, "b": False})
    state, step = optimizer.init(params), take_step(optimizer, path)
    g = of([1], np.ones((1, 2), np.float32))
    for _ in range(10):
        params, state = step(params, state, {"a": g, "b": g})
    params, _ = flushed(optimizer, params, state)
    np.testing.assert_allclose(params["a"][5], 0.95**10 * table(9, 2)[5], rtol=1e-6)
    assert_same_bits(params["b"][5], table(9, 2)[5])
    assert state[2]["b"].decay is None


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_checkpoints_of_orbax(tmp_path, weight_decay):
    """Saved, loaded, and gone on with: bit for bit as if nothing had happened."""
    framework("orbax.checkpoint")
    import orbax.checkpoint as ocp

    chosen = {"weight_decay": weight_decay, "sparse": {"t": "exact", "b": "lazy"}}
    optimizer = exact(**chosen)
    params = {"t": table(30, 2), "b": jnp.zeros(3)}
    step = take_step(optimizer, "step")

    def go_on(params, state, steps):
        for number in steps:
            rng = np.random.default_rng(number)
            g = of(rng.integers(30, size=3), rng.normal(size=(3, 2)).astype(np.float32))
            params, state = step(params, state, {"t": g, "b": jnp.ones(3)})
        return params, state

    half = go_on(params, optimizer.init(params), range(30))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", half)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: (params, optimizer.init(params)))
        loaded = checkpointer.restore(tmp_path / "saved", abstract)
    jax.tree.map(assert_same_bits, loaded, half)
    jax.tree.map(
        assert_same_bits, go_on(*loaded, range(30, 60)), go_on(*half, range(30, 60))
    )


# --- In jit -------------------------------------------------------------------------------


def abstract_step(optimizer, shape):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    g = IndexedSlices(
        jax.ShapeDtypeStruct((64, *shape[1:]), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
        current=True,
    )
    return w, jax.eval_shape(optimizer.init, w), g


def test_nothing_of_the_size_of_the_table_is_needed_beside_it(way):
    """By what XLA says of the compiled program, which also looks rows up."""
    optimizer = exact(weight_decay=0.1)
    shape = (100_000, 16)
    step = take_step(optimizer, way)

    def look_and_step(w, state, g):
        rows = optimizer.lookup(w, state, g.indices)
        return step(w, state, IndexedSlices(g.values + rows, g.indices, current=True))

    compiled = jax.jit(look_and_step, donate_argnums=(0, 1))
    compiled = compiled.lower(*abstract_step(optimizer, shape)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 300_000
    assert memory.alias_size_in_bytes >= 3 * 4 * shape[0] * shape[1]


def test_donated_tables_are_changed_where_they_are(way):
    optimizer, w = exact(), table(4000, 16)
    state = optimizer.init(w)
    step = jax.jit(take_step(optimizer, way), donate_argnums=(0, 1))
    where = lambda w, state: [  # noqa: E731
        x.unsafe_buffer_pointer() for x in (w, state[0].mu, state[0].nu, state[2].stamps)
    ]
    before = where(w, state)
    w, state = train(optimizer, w, state, 3, step=step)
    assert where(w, state) == before
    flush = jax.jit(optimizer.flush, donate_argnums=(0, 1))
    if way == "step":
        assert where(*flush(w, state)) == before


def test_no_recompilation_from_step_to_step(way):
    optimizer = exact(optax.linear_schedule(0.1, 0.0, 100), weight_decay=0.1)
    step = take_step(optimizer, way)
    w = table()
    train(optimizer, w, optimizer.init(w), 6, step=step)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("dtype", "known"), [("float32", True), ("float16", True), ("int32", False)]
)
def test_the_verbs_are_used_on_a_cpu_for_the_dtypes_they_know(dtype, known):
    optimizer, w = exact(), table()
    g = of([1], jnp.ones((1, 3), dtype))
    step = jax.jit(optimizer.step)
    text = step.lower(w, optimizer.init(w), g).as_text()
    assert ("adamax_exact_step" in text) == known
    after, _ = step(w, optimizer.init(w), g)
    np.testing.assert_allclose(after[1], w[1] - 0.1, rtol=1e-6)


def test_scan_and_no_jit():
    optimizer, w = exact(), table()
    ids = jnp.asarray(np.random.default_rng(0).integers(50, size=(20, 4)), jnp.int32)

    def step(carry, ids):
        g = IndexedSlices(jnp.ones((4, 3)), ids, current=True)
        return optimizer.step(*carry, g), None

    start = w, optimizer.init(w)
    (scanned, of_scanned), _ = jax.lax.scan(step, start, ids)
    eager = start
    for of_step in ids:
        eager, _ = step(eager, of_step)
    np.testing.assert_allclose(scanned, eager[0], rtol=1e-6, atol=1e-6)
    assert_same_bits(of_scanned[2].stamps, eager[1][2].stamps)


@pytest.mark.parametrize(
    "strict",
    [
        partial(jax.numpy_dtype_promotion, "strict"),
        partial(jax.numpy_rank_promotion, "raise"),
        partial(jax.debug_nans, True),
    ],
)
def test_jax_may_be_strict(way, strict):
    optimizer, w = exact(weight_decay=0.1), table(9, 2)
    with strict():
        w, state = train(optimizer, w, optimizer.init(w), 3, way)
        rows = optimizer.lookup(w, state, jnp.arange(9))
        w, state = optimizer.flush(w, state)
    np.testing.assert_allclose(rows, w, rtol=1e-6, atol=1e-6)


def test_jax_may_be_told_not_to_compile():
    optimizer, w = exact(), table(9, 2)
    state = optimizer.init(w)
    g = of([1], np.ones((1, 2), np.float32))
    with jax.disable_jit():
        ours, _ = optimizer.step(w, state, g)
    assert_same_bits(ours, optimizer.step(w, state, g)[0])


def test_a_state_of_numpy_arrays_needs_no_jit():
    optimizer, w = exact(weight_decay=0.1), table(9, 2)
    g = of([1], np.ones((1, 2), np.float32))
    w, state = jax.device_get((w, optimizer.init(w)))
    updates, of_updates = optimizer.update(g, state, w)
    for after in (
        optimizer.step(w, state, g),
        (apply_updates(w, updates), of_updates),
    ):
        ours, _ = optimizer.flush(*jax.device_get(after))
        expected = 0.99 * np.asarray(w)
        expected[1] -= 0.1
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_vmap_over_models():
    optimizer = exact(0.05)
    tables = jnp.stack([table(20, 2), 2 * table(20, 2)])
    ids = jnp.array([[1, 2], [2, 19]])

    def end(w, ids):
        state = optimizer.init(w)
        for _ in range(3):
            g = IndexedSlices(optimizer.lookup(w, state, ids), ids, current=True)
            w, state = optimizer.step(w, state, g)
        return optimizer.flush(w, state)[0]

    together = jax.jit(jax.vmap(end))(tables, ids)
    for of_one, w, of_ids in zip(together, tables, ids, strict=True):
        np.testing.assert_allclose(of_one, jax.jit(end)(w, of_ids), rtol=1e-5, atol=1e-6)


# --- Libraries ----------------------------------------------------------------------------


def test_a_chain_with_clipping(rng):
    optimizer = exact(0.05)
    chain = optax.chain(on_rows(optax.clip_by_global_norm(0.5)), optimizer)
    w = table(9, 2)
    state = chain.init(w)
    g = of([1, 1, 4], np.ones((3, 2), np.float32))
    updates, state = jax.jit(chain.update)(g, state, w)
    w = apply_updates(w, updates)
    norm = np.sqrt(np.square(state[1][0].mu / 0.1).sum())
    np.testing.assert_allclose(norm, 0.5, rtol=1e-5)
    rows = optimizer.lookup(w, state[1], jnp.array([1]))
    assert_same_bits(rows, w[1:2])


def learns(model_losses):
    return model_losses[-1] < 0.5 * model_losses[0]


def test_equinox(rng):
    framework("equinox")
    import equinox as eqx

    class Words(eqx.Module):
        table: jax.Array
        linear: eqx.nn.Linear

        def __call__(self, ids):
            return jax.vmap(self.linear)(lookup(self.table, ids).mean(axis=1))

    model = Words(0.1 * table(50, 4), eqx.nn.Linear(4, 1, key=jax.random.key(1)))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    kinds = eqx.tree_at(
        lambda model: model.table, jax.tree.map(lambda _: "lazy", params), "exact"
    )
    optimizer = exact(0.05, sparse=lambda params: kinds)  # a module can be called
    state = optimizer.init(params)
    ids = jnp.asarray(rng.integers(40, size=(16, 3)))
    wanted = (ids[:, :1] % 2).astype(jnp.float32)

    @jax.jit
    def train(params, state):
        def loss(params):
            # In this order, as the table is not a leaf.
            return ((eqx.combine(static, params)(ids) - wanted) ** 2).mean()

        value, gradients = value_and_sparse_grad(loss)(optimizer.current(params, state))
        return *optimizer.step(params, state, gradients), value

    losses = []
    for _ in range(60):
        params, state, value = train(params, state)
        losses.append(float(value))
    assert learns(losses)


def test_flax_nnx(rng):
    framework("flax")
    from flax import nnx

    class Words(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (50, 4)))
            self.linear = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, ids):
            return self.linear(lookup(self.table.get_value(), ids).mean(axis=1))

    graph, params = nnx.split(Words(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    optimizer = exact(0.05, sparse={"table": "exact", "linear": "lazy"})
    state = optimizer.init(params)
    ids = jnp.asarray(rng.integers(40, size=(16, 3)))
    wanted = (ids[:, :1] % 2).astype(jnp.float32)

    @jax.jit
    def train(params, state):
        def loss(params):
            return ((nnx.merge(graph, nnx.State(params))(ids) - wanted) ** 2).mean()

        value, gradients = value_and_sparse_grad(loss)(optimizer.current(params, state))
        return *optimizer.step(params, state, gradients), value

    losses = []
    for _ in range(60):
        params, state, value = train(params, state)
        losses.append(float(value))
    assert learns(losses)
