"""The state of exact tables: made of abstract parameters, checked, and at the edges."""

import numpy as np
import pytest

from exact_cases import Dense
from frameworks import framework
from jax_cases import jax, jnp, optax, take_step

import adamax  # isort: skip
from adamax.jax import IndexedSlices  # isort: skip  (not without jax)
from adamax.jax import primitives  # isort: skip


def exact(learning_rate=0.1, sparse="exact", **chosen):
    return adamax.jax.adamax(learning_rate, sparse=sparse, **chosen)


def of(ids, of_rows):
    return IndexedSlices(jnp.asarray(of_rows), jnp.asarray(ids, jnp.int32), current=True)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# --- Abstract parameters ------------------------------------------------------------------

KINDS = {"t": "exact", "w": "lazy"}


def parameters():
    return {"t": jnp.ones((9, 2), jnp.bfloat16), "w": jnp.ones(3)}


@pytest.mark.parametrize("sparse", ["lazy", KINDS])
def test_init_takes_abstract_parameters(sparse):
    optimizer = exact(sparse=sparse, weight_decay=0.1)
    params = parameters()
    expected = optimizer.init(params)
    by_eval_shape = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(by_eval_shape) == jax.tree.structure(expected)
    assert shapes(by_eval_shape) == shapes(expected)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for abstract in (described, jax.tree.map(np.asarray, params)):
        assert shapes(optimizer.init(abstract)) == shapes(expected)
    assert shapes(jax.eval_shape(optimizer.init, described)) == shapes(expected)


def test_init_takes_the_sharding_of_abstract_parameters():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for mesh_of_spec in (mesh, mesh.abstract_mesh):
        where = jax.NamedSharding(mesh_of_spec, jax.P("x", None))
        table = jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=where)
        state = jax.eval_shape(exact().init, table)
        assert state[2].stamps.shape == (8,)
    where = jax.NamedSharding(mesh, jax.P("x", None))
    state = exact().init(jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=where))
    assert state[2].stamps.sharding.spec == jax.P("x")


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("sparse", ["exact", KINDS, lambda params: KINDS])
def test_maps_over_parameters_leave_the_third_part_alone(chained, sparse):
    params = {"t": jnp.ones((9, 2)), "w": jnp.ones((3, 1))}
    optimizer = exact(optax.linear_schedule(0.1, 0.0, 9), sparse=sparse)
    optimizer = optax.chain(optax.identity(), optimizer) if chained else optimizer
    state, specs = optimizer.init(params), {"t": jax.P("x"), "w": jax.P()}
    mapped = optax.tree_map_params(
        optimizer,
        lambda leaf, spec: spec,
        state,
        specs,
        transform_non_params=lambda leaf: jax.P(),
    )
    moments, of_rate, stale = mapped[1] if chained else mapped
    assert (moments.mu, moments.nu, moments.count) == (specs, specs, jax.P())
    assert of_rate.count == jax.P()
    # One for all of the third part: a prefix, as shardings may be.
    assert stale == jax.P()
    unchanged = optax.tree_map_params(optimizer, lambda leaf: leaf, state)
    assert jax.tree.structure(unchanged) == jax.tree.structure(state)


@pytest.mark.parametrize("frozen", ["params", "options"])
def test_frozen_dicts_and_dicts_are_alike(frozen):
    freeze = framework("flax.core").freeze
    params = {"a": {"t": jnp.ones((9, 2))}, "w": jnp.ones((3, 1))}
    sparse = {"a": {"t": "exact"}, "w": "lazy"}
    mask = {"a": False, "w": True}
    if frozen == "params":
        params = freeze(params)
    else:
        sparse, mask = freeze(sparse), freeze(mask)
    optimizer = exact(0.1, weight_decay=0.5, sparse=sparse, mask=mask)
    state = optimizer.init(params)
    assert (state[2]["w"], state[2]["a"]["t"].decay) == (None, None)
    zeros = {"a": {"t": of([1], np.zeros((1, 2), np.float32))}, "w": jnp.zeros((3, 1))}
    zeros = freeze(zeros) if frozen == "params" else zeros
    for path in ("step", "update"):
        after, _ = take_step(optimizer, path)(params, state, zeros)
        np.testing.assert_array_equal(after["a"]["t"], 1)
        np.testing.assert_allclose(after["w"], 0.95, rtol=1e-6)
        assert type(after) is type(params)


@pytest.mark.parametrize("sparse", [KINDS, "exact", lambda params: "exact"])
def test_parameters_that_are_masked_out_may_have_options(sparse):
    params = {"t": jnp.ones((9, 2)), "w": jnp.ones((3, 1))}
    g = {"t": of([1], np.zeros((1, 2), np.float32)), "w": jnp.ones((3, 1))}
    optimizer = exact(0.1, weight_decay=0.5, sparse=sparse, mask={"t": True, "w": False})
    masked = optax.masked(optimizer, {"t": True, "w": False})
    labels = {"t": "ours", "w": "theirs"}
    parts = optax.partition({"ours": optimizer, "theirs": optax.sgd(0.1)}, labels)
    for whole, change_of_w in ((masked, 1.0), (parts, -0.1)):
        updates, _ = jax.jit(whole.update)(g, whole.init(params), params)
        after = optax.apply_updates(params, updates)
        np.testing.assert_allclose(after["t"][:2], 0.95, rtol=1e-6)
        np.testing.assert_allclose(after["w"], 1 + change_of_w, rtol=1e-6)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"t": "exact"}, r"sparse must be a pytree .*\['t'\].*\['w'\]"),
        ({"t": "exact", "w": "lazy", "b": "lazy"}, "sparse must be a pytree like"),
        ({"t": {"deeper": "exact"}, "w": "lazy"}, "sparse must be a pytree like"),
        (["exact", "lazy"], "sparse must be a pytree like that of the parameters"),
    ],
)
def test_options_for_other_parameters_are_refused(sparse, message):
    with pytest.raises(ValueError, match=message):
        exact(sparse=sparse).init(parameters())
    masks = jax.tree.map(lambda _: True, sparse)
    optimizer = exact(sparse=KINDS, weight_decay=0.1, mask=masks)
    with pytest.raises(ValueError, match="mask must be a pytree like"):
        optimizer.init(parameters())


# --- What is checked ----------------------------------------------------------------------

WRONG_PARTS = {
    "count of steps": ("steps", lambda x: jnp.zeros(1, jnp.int32)),
    "float steps": ("steps", lambda x: x.astype(jnp.float32)),
    "narrow stamps": ("stamps", lambda x: x.astype(jnp.int8)),
    "float stamps": ("stamps", lambda x: x.astype(jnp.float32)),
    "unsigned stamps": ("stamps", lambda x: x.astype(jnp.uint32)),
    "fewer stamps": ("stamps", lambda x: x[:5]),
    "stamps with two axes": ("stamps", lambda x: x[:, None]),
    "narrow recent sums": ("recent", lambda x: x.astype(jnp.bfloat16)),
    "fewer recent sums": ("recent", lambda x: x[:, :-1]),
    "one part of recent sums": ("recent", lambda x: x[:1]),
    "fewer terms": ("recent", lambda x: x[..., :-1]),
    "narrow final sums": ("final", lambda x: x.astype(jnp.float16)),
    "fewer final terms": ("final", lambda x: x[:, :-1]),
    "entries that are no power of 2": ("final", lambda x: x[:-1]),
    "too few entries": ("final", lambda x: x[:256]),
    "one axis of final sums": ("final", lambda x: x[:, 0]),
    "narrow decay": ("decay", lambda x: x.astype(jnp.float16)),
    "fewer entries of decay": ("decay", lambda x: x[:2048]),
    "another width of decay": ("decay", lambda x: x[:, :2]),
    "no decay": ("decay", lambda x: None),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_each_part_of_a_state_is_checked_when_it_is_traced(name, jit):
    part, change = WRONG_PARTS[name]
    optimizer, w = exact(weight_decay=0.1), jnp.ones((9, 2))
    state = optimizer.init(w)
    wrong = state[2]._replace(**{part: change(getattr(state[2], part))})
    g = of([1], np.ones((1, 2), np.float32))
    uses = [
        lambda w, state: optimizer.step(w, state, g),
        lambda w, state: optimizer.update(g, state, w),
        lambda w, state: optimizer.lookup(w, state, jnp.array([1])),
        optimizer.current,
        optimizer.flush,
    ]
    expected = "without weight decay" if name == "no decay" else f"{part} in the state must"
    for use in uses:
        with pytest.raises(ValueError, match=expected):
            (jax.jit(use) if jit else use)(w, (*state[:2], wrong))


@pytest.mark.parametrize("moment", ["mu", "nu"])
@pytest.mark.parametrize(
    "change", [lambda x: x[:5], lambda x: x.astype(jnp.int32), lambda x: x[:, None]]
)
def test_moments_are_checked(moment, change):
    for optimizer, message in (
        (exact(), f"{moment} in the state must be float32 of shape"),
        (exact(sparse="lazy"), "the state must (have the shape|be floating-point)"),
    ):
        w = jnp.ones((9, 2))
        moments, *others = optimizer.init(w)
        moments = moments._replace(**{moment: change(getattr(moments, moment))})
        g = of([1], np.ones((1, 2), np.float32))
        for use in (
            lambda w, state, o=optimizer, g=g: o.step(w, state, g),
            lambda w, state, o=optimizer, g=g: o.update(g, state, w),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                jax.jit(use)(w, (moments, *others))


@pytest.mark.parametrize("count", [jnp.zeros(1, jnp.int32), jnp.float32(3.0)])
def test_counts_are_checked(count):
    optimizer, w = exact(optax.linear_schedule(0.1, 0.0, 9), sparse="lazy"), jnp.ones(3)
    moments, of_rate = optimizer.init(w)
    for state in (
        (moments._replace(count=count), of_rate),
        (moments, of_rate._replace(count=count)),
    ):
        with pytest.raises(ValueError, match="count in the state must be an integer"):
            optimizer.step(w, state, w)


@pytest.mark.parametrize("stamp", [-1, 1, 2**30, -(2**31), 4096])
def test_stamps_that_no_history_can_have_are_an_error(stamp):
    """Their values are known to the program alone; none may reach outside of an array."""
    optimizer, w = exact(weight_decay=0.1), jnp.ones((9, 2))
    state = optimizer.init(w)
    steps = jnp.int32(0 if stamp != 4096 else 8192)
    stamps = jnp.full(9, steps).at[3].set(stamp)
    state = (*state[:2], state[2]._replace(steps=steps, stamps=stamps))
    g = of([3], np.ones((1, 2), np.float32))
    uses = [
        lambda w, state: optimizer.step(w, state, g),
        lambda w, state: optimizer.lookup(w, state, jnp.array([3])),
        optimizer.flush,
    ]
    for use in uses:
        if stamp == -1:  # a step behind
            assert np.isfinite(jax.tree.leaves(jax.jit(use)(w, state))[0]).all()
            continue
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="stamps of a table do not bel"
        ):
            jax.block_until_ready(jax.jit(use)(w, state))


# --- Decay faster than the momentum's -----------------------------------------------------


@pytest.mark.parametrize("mask", [None, {"t": True}, lambda params: {"t": True}])
def test_decay_that_is_faster_than_that_of_the_momentum_is_refused(mask):
    params = {"t": jnp.ones((9, 2))}
    message = (
        r"needs 1 - learning_rate \* weight_decay to be at least b1, got 0\.8.* 0\.9 at"
    )
    fast = exact(0.1, weight_decay=2.0, mask=mask)
    with pytest.raises(ValueError, match=message):
        fast.init(params)
    state = exact(0.1, weight_decay=1.0).init(params)
    gradients = {"t": of([1], np.ones((1, 2), np.float32))}
    with pytest.raises(ValueError, match=message):
        fast.step(params, state, gradients)
    exact(0.1, weight_decay=1.0, mask=mask).init(params)
    exact(0.1, weight_decay=2.0, mask={"t": False}).init(params)
    exact(0.1, weight_decay=2.0, sparse="lazy").init(params)
    # Schedules and arrays are not known; the documentation has what is right.
    exact(lambda step: 0.1, weight_decay=2.0).init(params)
    exact(jnp.float32(0.1), weight_decay=2.0).init(params)


# --- At the edges -------------------------------------------------------------------------


@pytest.fixture(params=["verbs", "operations", "update"])
def way(request, monkeypatch):
    if request.param == "operations":
        monkeypatch.setattr(primitives, "_targets", frozenset())
    return "update" if request.param == "update" else "step"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 9e37, 3e38])
def test_large_and_small_gradients_are_caught_up(way, scale):
    """1 / u is subnormal for the largest, which XLA takes for 0."""
    optimizer, w = exact(0.1, eps=0.0), jnp.zeros((6, 2))
    state, step = optimizer.init(w), take_step(optimizer, way)
    expected = Dense(np.zeros((6, 2)), 0.9, 0.999, 0.0, 0.0)
    g = np.zeros((6, 2))
    g[:4] = 1.0, -0.5
    with np.errstate(invalid="ignore"):
        expected.u += 1e-300  # where 0 / 0 is 0
        expected.step(g, 0.1)
        w, state = step(w, state, of(np.arange(4), (scale * g[:4]).astype(np.float32)))
        for _ in range(30):
            w, state = step(w, state, of([5], np.zeros((1, 2), np.float32)))
            expected.step(0 * g, 0.1)
    w, state = jax.jit(optimizer.flush)(w, state)
    np.testing.assert_allclose(w, expected.w, rtol=2e-6)
    np.testing.assert_allclose(state[0].nu[:4], scale * expected.u[:4], rtol=1e-5)


def test_without_epsilon_rows_of_zeros_stay_where_they_are(way):
    optimizer, w = exact(0.1, eps=0.0), jnp.ones((6, 2))
    state, step = optimizer.init(w), take_step(optimizer, way)
    zeros = of([1, 2], np.zeros((2, 2), np.float32))
    for _ in range(5):
        w, state = step(w, state, zeros)
    w, state = step(w, state, of([2, 3], np.array([[0, np.nan], [1, 0]], np.float32)))
    w, _ = jax.jit(optimizer.flush)(w, state)
    expected = np.ones((6, 2))
    expected[3, 0] = 1 - 0.1 * 0.1 / (1 - 0.9**6)
    expected[2, 1] = np.nan
    np.testing.assert_allclose(w, expected, rtol=1e-6)
