"""Gradients of rows in arithmetic: on slices it works, on row ids it is an error."""

import copy
import dataclasses
import operator
import pickle

import numpy as np
import pytest

from cases import values
from compare import assert_same_bits
from jax_cases import PATHS, contents, jax, jnp, optax, rows, take_step

from adamax.jax import (  # isort: skip  (not without jax)
    IndexedSlices,
    adamax,
    apply_updates,
    global_norm,
    on_rows,
    psum,
    sum_repeats,
)

paths = pytest.mark.parametrize("path", PATHS)


def is_slices(node):
    return isinstance(node, IndexedSlices)


def add_trees(one, two):
    return jax.tree.map(operator.add, one, two, is_leaf=is_slices)


def batch(seed, number=6, table=(20, 3)):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, table[0] + 2, size=number)
    return rows(rng, ids, np.zeros(table))


def dense(slices, shape=(20, 3)):
    """The gradient that it stands for, in float64."""
    whole = np.zeros(shape)
    indices, of_rows = np.asarray(slices.indices), np.asarray(slices.values, np.float64)
    known = (indices >= 0) & (indices < shape[0])
    np.add.at(whole, indices[known], of_rows[known])
    return whole


# --- On leaves ----------------------------------------------------------------------------

# What is written for gradients of arrays. With numbers for row ids, it moved other rows.
ON_LEAVES = {
    "jnp.add": lambda g: jax.tree.map(jnp.add, g, g),
    "operator.add": lambda g: jax.tree.map(operator.add, g, g),
    "a sum": lambda g: jax.tree.map(lambda *parts: sum(parts), g, g),
    "a factor": lambda g: jax.tree.map(lambda x: 2 * x, g),
    "a factor of NumPy": lambda g: jax.tree.map(lambda x: np.float32(0.5) * x, g),
    "a divisor": lambda g: jax.tree.map(lambda x: x / 2, g),
    "a mean": lambda g: jax.tree.map(lambda *parts: jnp.mean(jnp.stack(parts), 0), g, g),
    "jnp.negative": lambda g: jax.tree.map(jnp.negative, g),
    "jnp.clip": lambda g: jax.tree.map(lambda x: jnp.clip(x, -1, 1), g),
    "jnp.square": lambda g: jax.tree.map(jnp.square, g),
    "jnp.abs": lambda g: jax.tree.map(jnp.abs, g),
    "jnp.sum": lambda g: jax.tree.map(jnp.sum, g),
    "jnp.maximum": lambda g: jax.tree.map(jnp.maximum, g, g),
    "astype": lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g),
    "np.asarray": lambda g: jax.tree.map(np.asarray, g),
    "optax.tree.add": lambda g: optax.tree.add(g, g),
    "optax.tree.scale": lambda g: optax.tree.scale(0.5, g),
    "optax.tree.norm": lambda g: optax.tree.norm(g),
    "optax.global_norm": lambda g: optax.global_norm(g),
    "lax.psum": lambda g: jax.vmap(
        lambda g: jax.lax.psum(g, "i"), axis_name="i", axis_size=2, in_axes=None
    )(g),
    "lax.pmean": lambda g: jax.vmap(
        lambda g: jax.lax.pmean(g, "i"), axis_name="i", axis_size=2, in_axes=None
    )(g),
}

TRANSFORMATIONS = {
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "scale": optax.scale(0.5),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.1),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.1),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "trace": optax.trace(0.9),
    "ema": optax.ema(0.9),
    "adam": optax.adam(0.1),
    "MultiSteps": optax.MultiSteps(adamax(0.1), 2),
}

REFUSED = (TypeError, NotImplementedError, ValueError)


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ON_LEAVES)
def test_arithmetic_on_row_ids_is_an_error(name, jit):
    calculate = jax.jit(ON_LEAVES[name]) if jit else ON_LEAVES[name]
    with pytest.raises(REFUSED, match=r"row ids of|abstract method|PRNGKey dtype|Tracer"):
        calculate({"t": batch(0), "w": jnp.ones(3)})


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_that_know_no_rows_are_an_error(name):
    transformation, params = TRANSFORMATIONS[name], jnp.ones((20, 3))
    with pytest.raises(REFUSED, match=r"row ids of|abstract method|IndexedSlices"):
        transformation.update(batch(0), transformation.init(params), params)


def test_the_error_says_what_to_use():
    with pytest.raises(TypeError, match=r"row ids of an IndexedSlices: use its operators"):
        jax.tree.map(jnp.add, batch(0), batch(1))


# --- On slices ----------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("calculate", "expected"),
    [
        (lambda g, h: g + h, lambda g, h: g + h),
        (lambda g, h: g - h, lambda g, h: g - h),
        (lambda g, h: sum([g, h, g]), lambda g, h: 2 * g + h),
        (lambda g, h: (g + h) / 2, lambda g, h: (g + h) / 2),
        (lambda g, h: -g, lambda g, h: -g),
        (lambda g, h: 3 * g, lambda g, h: 3 * g),
        (lambda g, h: g * np.float32(0.5), lambda g, h: g / 2),
        (lambda g, h: jnp.float32(0.5) * g, lambda g, h: g / 2),
        (lambda g, h: g / jnp.float32(4), lambda g, h: g / 4),
        (lambda g, h: sum_repeats(g, 20) + 2 * sum_repeats(h, 20), lambda g, h: g + 2 * h),
    ],
)
def test_operators_are_those_of_the_dense_gradient(calculate, expected, jit):
    g, h = batch(0), batch(1)
    ours = (jax.jit(calculate) if jit else calculate)(g, h)
    theirs = expected(dense(g), dense(h))
    np.testing.assert_allclose(dense(ours), theirs, rtol=1e-6, atol=1e-6)


def test_promises_survive_where_they_hold():
    g = IndexedSlices(jnp.ones((2, 1)), jnp.array([1, 4]), distinct=True, current=True)
    for same in (2 * g, -g, g / 2):
        assert (same.distinct, same.current) == (True, True)
    both = g + g
    assert (both.distinct, both.current) == (False, True)
    assert not (g + dataclasses.replace(g, current=False)).current


@pytest.mark.parametrize("table", [jnp.ones((20, 3)), np.ones((20, 3), np.float32)])
def test_slices_and_arrays_can_be_added_both_ways(table):
    g = batch(0)
    for after in (table + g, g + table, table - -g, -(-g - table)):
        np.testing.assert_allclose(after, 1 + dense(g), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "calculate",
    [
        lambda g: g * g,
        lambda g: jnp.ones((6, 3)) * g,
        lambda g: g / jnp.ones(3),
        lambda g: g * "2",
        lambda g: g + 1.0,
        lambda g: g + "1",
        lambda g: g**2,
    ],
)
def test_other_operators_are_refused(calculate):
    with pytest.raises(
        TypeError, match=r"unsupported operand|can't multiply|IndexedSlices"
    ):
        calculate(batch(0))


@paths
def test_accumulated_gradients_give_the_step_of_their_sum(path):
    optimizer = adamax(0.1, weight_decay=0.1)
    params = {"t": jnp.ones((20, 3)), "w": jnp.ones(4)}
    parts = [{"t": batch(seed), "w": jnp.full(4, seed + 1.0)} for seed in range(3)]
    total = jax.tree.map(lambda g: g / 3, add_trees(add_trees(*parts[:2]), parts[2]),
                         is_leaf=is_slices)  # fmt: skip
    one = {
        "t": IndexedSlices(
            jnp.concatenate([part["t"].values for part in parts]) / 3,
            jnp.concatenate([part["t"].indices for part in parts]),
        ),
        "w": jnp.full(4, 2.0),
    }
    step = take_step(optimizer, path)
    ours = contents(*step(params, optimizer.init(params), total))
    for name, expected in contents(*step(params, optimizer.init(params), one)).items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6, atol=1e-7)


def test_gradients_may_be_accumulated_in_an_array_by_scan():
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(batch, range(4)))

    @jax.jit
    def total(parts):
        zeros = {"t": jnp.zeros((20, 3))}
        accumulate = lambda sums, g: (add_trees(sums, {"t": g}), None)  # noqa: E731
        return jax.lax.scan(accumulate, zeros, parts)[0]["t"]

    expected = sum(dense(batch(seed)) for seed in range(4))
    np.testing.assert_allclose(total(parts), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(parts.flattened()), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_gradients_is_refused_with_advice():
    parts = jax.vmap(lambda ids: IndexedSlices(jnp.ones((2, 3)), ids))(
        jnp.ones((4, 2), int)
    )
    optimizer, w = adamax(0.1), jnp.ones((20, 3))
    with pytest.raises(ValueError, match=r"one axis, got \(4, 2\); .*flattened\(\) makes"):
        optimizer.step(w, optimizer.init(w), parts)
    after, _ = optimizer.step(w, optimizer.init(w), parts.flattened())
    assert ((np.asarray(after) != 1).any(axis=1) == (np.arange(20) == 1)).all()


def test_the_norm_is_that_of_the_summed_gradients():
    g = {"t": batch(0) + batch(0), "w": jnp.arange(3.0)}
    whole = {"t": jnp.asarray(dense(g["t"], (30, 3))), "w": g["w"]}
    # Without the table, rows behind its end count as well.
    known = g["t"].indices < 20
    of_rows = jnp.where(known[:, None], g["t"].values, 0)
    known = {**g, "t": dataclasses.replace(g["t"], values=of_rows)}
    whole["t"] = whole["t"].at[20:].set(0)
    np.testing.assert_allclose(global_norm(known), optax.tree.norm(whole), rtol=1e-6)
    clip, params = on_rows(optax.clip_by_global_norm(1.0)), {"t": jnp.zeros((20, 3))}
    clipped, _ = clip.update({"t": g["t"]}, clip.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(dense(clipped["t"])), 1, rtol=1e-6)


def test_the_sum_over_devices_that_vmap_makes():
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(batch, range(4)))
    w = jnp.arange(4.0)
    summed, of_w = jax.vmap(lambda g, w: psum((g, w), "i"), axis_name="i")(parts, w)
    np.testing.assert_array_equal(of_w, [6, 6, 6, 6])
    expected = sum(dense(batch(seed)) for seed in range(4))
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], summed)
        np.testing.assert_allclose(dense(one), expected, rtol=1e-5, atol=1e-6)


# --- Zeros, and libraries that make them --------------------------------------------------


@paths
@pytest.mark.parametrize(
    "zeros", [optax.tree.zeros_like, lambda g: optax.set_to_zero().update(g, ())[0]]
)
def test_zeros_like_a_gradient_touch_no_row(path, zeros):
    optimizer, w = adamax(0.1, weight_decay=0.5), jnp.ones((20, 3))
    nothing = zeros(batch(0))
    assert (nothing.indices == -1).all()
    after, _ = take_step(optimizer, path)(w, optimizer.init(w), nothing)
    assert_same_bits(after, w)


def test_updates_that_are_not_finite_are_rejected_for_all_rows():
    optimizer = optax.apply_if_finite(adamax(0.1), 5)
    w = jnp.ones((20, 3))
    g = batch(0)
    bad = dataclasses.replace(g, values=g.values.at[0].set(jnp.nan))
    update, state = jax.jit(optimizer.update), optimizer.init(w)
    updates, state = update(bad, state, w)
    assert_same_bits(apply_updates(w, updates), w)
    assert not state.inner_state[0].nu.any()
    updates, _ = update(g, state, w)
    assert (apply_updates(w, updates) != w).any()


# --- The node -----------------------------------------------------------------------------


def test_indices_come_back_as_int32():
    for given in ([3, -1, 7], np.array([3, -1, 7]), jnp.array([3, -1, 7], jnp.int8)):
        g = IndexedSlices(jnp.ones((3, 1)), given)
        assert g.indices.dtype == jnp.int32
        np.testing.assert_array_equal(g.indices, [3, -1, 7])
        through = jax.jit(lambda g: g)(g)
        np.testing.assert_array_equal(through.indices, [3, -1, 7])


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda g: pickle.loads(pickle.dumps(g)),
        lambda g: jax.tree.map(lambda x: x, g),
        lambda g: jax.device_put(g, jax.devices()[0]),
        lambda g: jax.block_until_ready(g),
        lambda g: jax.tree.unflatten(*reversed(jax.tree.flatten(g))),
        lambda g: jax.lax.cond(True, lambda g: g, lambda g: 2 * g, g),
        lambda g: jax.lax.scan(lambda c, _: (c, None), g, None, length=2)[0],
        lambda g: jax.vmap(lambda g: g)(jax.tree.map(lambda x: x[None], g)).flattened(),
        lambda g: jax.checkpoint(lambda g: g)(g),
    ],
)
def test_slices_pass_through(copied):
    g = batch(3)
    same = copied(g)
    np.testing.assert_array_equal(same.indices, g.indices)
    assert_same_bits(same.values, g.values)


def test_slices_may_be_donated():
    g = batch(3)
    expected = dense(g)
    doubled = jax.jit(lambda g: 2 * g, donate_argnums=0)(g)
    np.testing.assert_allclose(dense(doubled), 2 * expected, rtol=1e-6)
    assert g.values.is_deleted()


def test_slices_may_be_abstract_and_describe_others():
    g = IndexedSlices(
        jax.ShapeDtypeStruct((6, 3), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.int32)
    )
    assert (g.indices.shape, g.indices.dtype) == ((6,), jnp.int32)
    assert jax.tree.structure(g) == jax.tree.structure(batch(0))
    by_eval_shape = jax.eval_shape(lambda: batch(0))
    for ours, theirs in zip(*map(jax.tree.leaves, (g, by_eval_shape)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    lowered = jax.jit(lambda g: jnp.zeros((20, 3)) + g).lower(g)
    np.testing.assert_allclose(lowered.compile()(batch(0)), dense(batch(0)), rtol=1e-6)
    axes = IndexedSlices(0, None)
    both = jax.vmap(lambda g: jnp.zeros((20, 3)) + g, in_axes=(axes,))
    many = dataclasses.replace(batch(0), values=jnp.ones((2, 6, 3)))
    assert both(many).shape == (2, 20, 3)


def test_the_name_of_an_attribute_that_is_missing_is_told():
    with pytest.raises(AttributeError, match=r"IndexedSlices.* has no attribute 'dense'"):
        batch(0).dense  # noqa: B018


# --- Gradients wider than their parameters ------------------------------------------------


@paths
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("of_rows", [False, True])
def test_a_wide_gradient_is_not_narrowed_first(path, dtype, of_rows):
    """In float16, 1e-8 would be 0 and 1e5 infinite."""
    optimizer, w = adamax(0.25, eps=0.0), jnp.zeros((2, 2), dtype)
    wide = jnp.array([[1e-8, 1e5], [-1e-8, -1e5]], jnp.float32)
    g = IndexedSlices(wide, jnp.arange(2)) if of_rows else wide
    w, state = take_step(optimizer, path)(w, optimizer.init(w), g)
    np.testing.assert_array_equal(w.astype(np.float32), [[-0.25, -0.25], [0.25, 0.25]])
    assert_same_bits(state[0].nu, abs(wide))


@paths
@pytest.mark.parametrize("of_rows", [False, True])
def test_float64_gradients_of_float32_parameters(path, of_rows):
    with jax.enable_x64(True):
        optimizer, w = adamax(0.25, eps=0.0), jnp.zeros((1, 2), jnp.float32)
        wide = jnp.array([[1e-30, 3e38]], jnp.float64)
        g = IndexedSlices(wide, jnp.arange(1)) if of_rows else wide
        w, state = take_step(optimizer, path)(w, optimizer.init(w), g)
        np.testing.assert_allclose(w, [[-0.25, -0.25]], rtol=1e-6)
        assert state[0].nu.dtype == jnp.float32


def test_adding_wide_rows_to_a_narrow_array_rounds_once(rng):
    table = jnp.asarray(values(rng, (20, 3), "float16"))
    g = batch(5)
    exact = np.asarray(table, np.float64) + dense(g)
    roundings = 1.01 * float(jnp.finfo(jnp.float16).eps) / 2
    assert (abs(np.asarray(table + g, np.float64) - exact) <= roundings * abs(exact)).all()
