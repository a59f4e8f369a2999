"""Compact state and stochastic rounding with ``sparse="exact"`` in JAX."""

import functools
import pickle

import numpy as np
import pytest

from compare import assert_same_bits
from jax_cases import jax, jnp, take_step

from adamax.jax import primitives  # isort: skip  (not without jax)
from adamax.jax import (  # isort: skip
    IndexedSlices,
    adamax,
    apply_updates,
    convert_state,
    lookup,
    value_and_sparse_grad,
)

KINDS = ("bfloat16", "8bit")
WAYS = ("kernels", "operations", "update")
ROWS, WIDTH, IDS = 40, 6, 5
kinds = pytest.mark.parametrize("kind", KINDS)
ways = pytest.mark.parametrize("way", WAYS)


@functools.cache
def optimizer_of(kind, sparse="exact", stochastic=False):
    chosen = {"state_dtype": kind, "stochastic_rounding": stochastic}
    return adamax(0.01, weight_decay=0.1, sparse=sparse, **chosen)


@functools.cache
def compiled(kind, way, stochastic=False):
    """Functions of a table, its state, and a gradient or ids: a step, a lookup, a flush.

    They are compiled here, while the handlers are taken away if they are to be.
    """
    optimizer = optimizer_of(kind, stochastic=stochastic)
    w = jnp.ones((ROWS, WIDTH), jnp.bfloat16 if stochastic else jnp.float32)
    state, ids = optimizer.init(w), jnp.zeros(IDS, jnp.int32)
    g = IndexedSlices(jnp.ones((IDS, WIDTH)), ids, current=True)
    with pytest.MonkeyPatch.context() as patch:
        if way == "operations":
            patch.setattr(primitives, "_targets", frozenset())
        step = take_step(optimizer, "update" if way == "update" else "step")
        texts = step.lower(w, state, g).as_text()
        programs = (
            step.lower(w, state, g).compile(),
            jax.jit(lambda *given: optimizer.lookup(*given)).lower(w, state, ids).compile(),
            jax.jit(lambda *given: optimizer.flush(*given)).lower(w, state).compile(),
        )
    assert ("adamax_exact" in texts) == (way == "kernels")
    return programs


def gradients(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        # Three of all rows are touched rarely, and others not at all.
        ids = rng.choice([*range(ROWS // 2), *[30] * (rng.random() < 0.05)], IDS)
        yield IndexedSlices(
            jnp.asarray(rng.normal(size=(IDS, WIDTH)), jnp.float32),
            jnp.asarray(ids, jnp.int32),
            current=True,
        )


def train(kind, way, steps, table=None, state=None, stochastic=False):
    step, look_up, _ = compiled(kind, way, stochastic)
    if table is None:
        table = jnp.ones((ROWS, WIDTH), jnp.bfloat16 if stochastic else jnp.float32)
        state = optimizer_of(kind, stochastic=stochastic).init(table)
    for g in steps:
        look_up(table, state, g.indices)
        table, state = step(table, state, g)
    return table, state


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same_bits(a, b)


def test_what_is_held_is_two_bytes_a_parameter_and_four_a_row():
    _, (moments, *_) = train("8bit", "kernels", gradients(3))
    sizes = [x.nbytes for x in (moments.mu, moments.nu, moments.frame)]
    assert sizes == [ROWS * WIDTH, ROWS * WIDTH, 4 * ROWS]


@ways
@kinds
def test_it_is_the_dense_trajectory(kind, way):
    table, state = train(kind, way, gradients(150))
    table, state = compiled(kind, way)[2](table, state)
    dense = jnp.ones((ROWS, WIDTH))
    optimizer = optimizer_of("float32", "lazy")
    of_dense, step = optimizer.init(dense), take_step(optimizer, "step")
    for g in gradients(150):
        dense, of_dense = step(dense, of_dense, jnp.zeros((ROWS, WIDTH)) + g)
    moved = np.sqrt(np.mean((dense - 1) ** 2))
    assert np.sqrt(np.mean((table - dense) ** 2)) < 0.15 * moved
    norms = convert_state(state, "float32")[0].nu, of_dense[0].nu
    np.testing.assert_allclose(*norms, rtol=0.1)
    assert (state[2].stamps == state[2].steps).all()


def nearly_all_same(ours, theirs, at=...):
    """But where a number is rounded another way and a code goes up instead of down."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if a.ndim:
            a, b = a[at], b[at]
            assert np.mean(abs(a - b) > 1e-5 * abs(b) + 1e-6) < 0.03


@pytest.mark.parametrize(
    ("kind", "stochastic"), [*((k, False) for k in KINDS), ("8bit", True)]
)
def test_all_ways_do_the_same_with_a_state(kind, stochastic):
    before = train(kind, "kernels", gradients(30), stochastic=stochastic)
    (g,) = gradients(1, seed=9)
    steps, _, flushes = zip(*(compiled(kind, way, stochastic) for way in WAYS), strict=True)
    ours, flushed = steps[0](*before, g), flushes[0](*before)
    # The operations let rows in turn take the step, too: only these are rounded once more.
    touched = np.asarray(g.indices)
    for step, flush in zip(steps[1:], flushes[1:], strict=True):
        theirs = step(*before, g)
        nearly_all_same((ours[0], ours[1][0]), (theirs[0], theirs[1][0]), touched)
        assert_same_bits(ours[1][2].stamps[touched], theirs[1][2].stamps[touched])
        theirs = flush(*before)
        nearly_all_same((flushed[0], flushed[1][0]), (theirs[0], theirs[1][0]))


@kinds
def test_ways_can_be_taken_in_turns(kind):
    expected, _ = compiled(kind, "kernels")[2](*train(kind, "kernels", gradients(40)))
    found = None, None
    for number, g in enumerate(gradients(40)):
        found = train(kind, WAYS[number % 3], [g], *found)
    found, _ = compiled(kind, "operations")[2](*found)
    moved = np.sqrt(np.mean((expected - 1) ** 2))
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * moved


@ways
@pytest.mark.parametrize(
    ("kind", "stochastic"), [*((k, False) for k in KINDS), ("8bit", True)]
)
def test_rows_are_read_as_they_are_stored(kind, way, stochastic):
    table, state = train(kind, way, gradients(30), stochastic=stochastic)
    _, look_up, flush = compiled(kind, way, stochastic)
    after, of_after = flush(table, state)
    assert (after != table).any()
    for first in range(0, ROWS, IDS):
        ids = jnp.arange(first, first + IDS, dtype=jnp.int32)
        assert_same_bits(look_up(table, state, ids), after[first : first + IDS])
    none = look_up(table, state, jnp.array([-1, 0, ROWS, 3, ROWS + 7], jnp.int32))
    np.testing.assert_array_equal((none == 0).all(axis=1), [True, False] * 2 + [True])
    assert_same(flush(after, of_after), (after, of_after))


@ways
def test_rows_in_bfloat16_move_with_stochastic_rounding(way):
    wide, of_wide = train("float32", "kernels", gradients(60))
    wide, _ = compiled("float32", "kernels")[2](wide, of_wide)
    errors = []
    for kind in ("float32", "8bit"):
        table, state = train(kind, way, gradients(60), stochastic=True)
        table, state = compiled(kind, way, True)[2](table, state)
        assert table.dtype == jnp.bfloat16
        errors.append(
            np.abs(table.astype(jnp.float32).mean(axis=1) - wide.mean(axis=1)).max()
        )
    assert max(errors) < 0.02, errors


@ways
@kinds
def test_going_on_from_a_checkpoint_is_not_having_stopped(kind, way):
    steps = list(gradients(8))
    expected = train(kind, way, steps)
    halfway = train(kind, way, steps[:5])
    saved = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, halfway)))
    restored = jax.tree.map(jnp.asarray, saved)
    assert_same(train(kind, way, steps[5:], *restored), expected)


@kinds
def test_a_stale_state_becomes_one_of_another_kind(kind):
    table, state = train("float32", "kernels", gradients(20))
    others = train(kind, "kernels", gradients(3, seed=1), table, convert_state(state, kind))
    back = convert_state(others[1], "float32")
    ours, _ = train("float32", "kernels", gradients(3, seed=2), others[0], back)
    seen = [*gradients(3, seed=1), *gradients(3, seed=2)]
    expected, _ = train("float32", "kernels", seen, table, state)
    np.testing.assert_allclose(ours, expected, atol=5e-3)


@kinds
def test_donated_tables_are_changed_where_they_are(kind):
    optimizer, w = optimizer_of(kind), jnp.ones((ROWS, WIDTH))
    step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    state = optimizer.init(w)
    moments = lambda state: jax.tree.leaves((state[0], state[2].stamps))[1:]  # noqa: E731
    before = [x.unsafe_buffer_pointer() for x in (w, *moments(state))]
    w, state = step(w, state, next(gradients(1)))
    assert [x.unsafe_buffer_pointer() for x in (w, *moments(state))] == before


def test_a_loss_reads_current_tables():
    params = {"t": jnp.ones((ROWS, WIDTH)), "w": jnp.ones(WIDTH)}
    kinds = {"t": "exact", "w": "lazy"}
    optimizer = adamax(0.01, sparse=kinds, state_dtype="8bit")
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, ids):
        def loss(params):
            return ((lookup(params["t"], ids) @ params["w"]) ** 2).mean()

        current = optimizer.current(params, state)
        value, g = value_and_sparse_grad(loss)(current)
        return *optimizer.step(params, state, g), value

    losses = []
    for number in range(60):
        ids = jnp.arange(number, number + 4) % 8
        params, state, value = step(params, state, ids)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    params, state = jax.jit(optimizer.flush)(params, state)
    assert np.isfinite(params["t"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@kinds
def test_tables_of_16_bits(kind, dtype):
    optimizer, w = optimizer_of(kind), jnp.ones((ROWS, WIDTH), dtype)
    for path in ("step", "update"):
        step, table, state = take_step(optimizer, path), w, optimizer.init(w)
        for g in gradients(5):
            table, state = step(table, state, g)
        assert table.dtype == dtype
        assert abs(table.astype(jnp.float32) - 1).max() <= 0.08


@kinds
def test_what_is_not_finite_reaches_its_row_alone(kind):
    for way in WAYS:
        step, _, flush = compiled(kind, way)
        w = jnp.ones((ROWS, WIDTH))
        state = optimizer_of(kind).init(w)
        values = jnp.ones((IDS, WIDTH)).at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
        g = IndexedSlices(values, jnp.arange(IDS), current=True)
        w, state = step(w, state, g)
        for each in gradients(3):
            w, state = step(w, state, each)
        w, state = flush(w, state)
        bad = np.argwhere(~np.isfinite(np.asarray(w))).tolist()
        assert bad == [[1, 2], [2, 3]]


def test_init_takes_abstract_parameters():
    optimizer, w = optimizer_of("8bit"), jnp.ones((ROWS, WIDTH))
    abstract = jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert abstract[0].frame.shape == (ROWS,)
    assert jax.tree.structure(abstract) == jax.tree.structure(optimizer.init(w))


def test_a_table_with_one_axis_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5,\) has 1 at \['t'\]; init\(\)"):
        optimizer_of("8bit").init({"t": jnp.ones(5)})
    optimizer_of("bfloat16").init({"t": jnp.ones(5)})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"mu": jnp.zeros((ROWS, WIDTH))},
            r"^mu in the state must be int8 .*convert_state",
        ),
        (
            {"frame": jnp.zeros(3)},
            r"^frame in the state must be float32 of shape \(1,\) or",
        ),
        ({"frame": jnp.zeros(1)}, r"^a gradient of rows needs .* has 1; .* convert_state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(parts, message):
    optimizer, w = optimizer_of("8bit"), jnp.ones((ROWS, WIDTH))
    moments, *others = optimizer.init(w)
    state = (moments._replace(**parts), *others)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.flush, w, state)
    with pytest.raises(ValueError, match=message):
        optimizer.lookup(w, state, jnp.arange(3))


def test_updates_of_optax_can_be_applied():
    optimizer, w = optimizer_of("8bit"), jnp.ones((ROWS, WIDTH))
    g = next(gradients(1))
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    assert isinstance(updates, IndexedSlices)
    after = apply_updates(w, updates)
    changed = np.unique(np.asarray(g.indices))
    assert (np.flatnonzero((after != w).any(axis=1)) == changed).all()
