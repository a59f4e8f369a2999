"""``adamax.jax.adamax`` on whole arrays: the oracle, NumPy, optax's state, and errors."""

import copy
import inspect
import math
import pickle

import ml_dtypes
import numpy as np
import pytest

import adamax
from cases import DTYPES, LARGE, PRECISION, SHAPES, values
from compare import assert_same_bits, trajectory_error
from jax_cases import (
    OPTIONS,
    PATHS,
    contents,
    follow,
    jax,
    jnp,
    optax,
    options,
    precision,
    rule,
    take_step,
)

from adamax.jax import adamax as make  # isort: skip  (not without jax)
from adamax.jax import IndexedSlices, apply_updates, scale_by_adamax  # isort: skip

paths = pytest.mark.parametrize("path", PATHS)


def as_jax(array):
    return jnp.asarray(array)


# --- The oracle ---------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_follow_the_oracle(rng, name, path):
    shapes = [(37,), (5, 9)]
    params = [as_jax(values(rng, shape, "float32")) for shape in shapes]
    steps = [[as_jax(values(rng, s, "float32")) for s in shapes] for _ in range(5)]
    chosen = options(name)
    follow(make(**chosen), path, rule(**chosen), params, steps)


@paths
@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=str)
def test_all_shapes(rng, shape, path):
    w = as_jax(values(rng, shape, "float32"))
    steps = [[as_jax(values(rng, shape, "float32"))] for _ in range(2)]
    follow(make(0.01), path, rule(learning_rate=0.01), [w], steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes(rng, dtype):
    with precision(dtype):
        w = as_jax(values(rng, (301,), dtype))
        steps = [[as_jax(values(rng, (301,), dtype))] for _ in range(5)]
        chosen = {"learning_rate": 0.01, "weight_decay": 0.1}
        [w], state = follow(make(**chosen), "step", rule(**chosen), [w], steps)
        assert w.dtype == dtype
        assert state[0].mu[0].dtype == state[0].nu[0].dtype == PRECISION[dtype].state


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_update_of_a_16_bit_parameter_is_the_float32_one_rounded(rng, dtype):
    w = as_jax(values(rng, (301,), dtype))
    g = as_jax(values(rng, (301,), dtype))
    update, state = jax.jit(scale_by_adamax().update)(g, scale_by_adamax().init(w), w)
    wide, like = jax.jit(scale_by_adamax().update)(
        g.astype(jnp.float32), scale_by_adamax().init(w.astype(jnp.float32))
    )
    assert_same_bits(update, wide.astype(dtype))
    assert_same_bits(state.mu, like.mu)
    assert_same_bits(state.nu, like.nu)


@paths
def test_the_norm_of_a_16_bit_parameter_decays(path):
    step, optimizer = take_step(make(0.01), path), make(0.01)
    w = jnp.ones(3, jnp.bfloat16)
    state = optimizer.init(w)
    w, state = step(w, state, jnp.ones(3, jnp.bfloat16))
    for _ in range(10):
        w, state = step(w, state, jnp.zeros(3, jnp.bfloat16))
    np.testing.assert_allclose(state[0].nu, 0.999**10, rtol=1e-6)


@paths
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_complex_parameters(rng, path, weight_decay):
    """As in optax, whose norm of a complex parameter is complex as well."""
    z = (rng.normal(size=(2, 40)) + 1j * rng.normal(size=(2, 40))).astype(np.complex64)
    optimizer = make(0.1, weight_decay=weight_decay)
    w, state = take_step(optimizer, path)(as_jax(z[0]), optimizer.init(z[0]), z[1])
    assert state[0].mu.dtype == state[0].nu.dtype == w.dtype == np.complex64
    expected = z[0] * (1 - 0.1 * weight_decay) - 0.1 * z[1] / (abs(z[1]) + 1e-8)
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


@paths
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_reaches_everything(path, bad):
    optimizer, step = make(0.1), take_step(make(0.1), path)
    w = jnp.ones(3)
    state = optimizer.init(w)
    w, state = step(w, state, jnp.array([1.0, bad, 0.0]))
    assert np.isnan(w[1])  # inf / inf
    assert not np.isfinite(state[0].mu[1])
    assert not np.isfinite(state[0].nu[1])
    w, state = step(w, state, jnp.ones(3))
    assert not np.isfinite(state[0].nu[1])
    np.testing.assert_array_equal(np.isfinite(w), [True, False, True])


@paths
def test_a_step_is_hardly_longer_than_the_learning_rate(rng, path):
    optimizer, step = make(1.0), take_step(make(1.0), path)
    w = jnp.zeros(200)
    state = optimizer.init(w)
    for number in range(60):
        g = rng.normal(size=200) * 10.0 ** rng.uniform(-6, 6, size=200)
        g[:10] = 0.999**number  # the worst case
        after, state = step(w, state, as_jax(g.astype(np.float32)))
        assert abs(after - w).max() <= 1.0092
        w = after


def test_a_zero_gradient_leaves_parameters_alone():
    optimizer = make(0.1)
    w = jnp.array([1.0, -2.0])
    updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(w), w)
    assert_same_bits(optax.apply_updates(w, updates), w)


@paths
def test_without_eps_nothing_moves_before_the_first_gradient(path):
    optimizer, w = make(0.1, eps=0.0), jnp.ones(3)
    state, step = optimizer.init(w), take_step(make(0.1, eps=0.0), path)
    w, state = step(w, state, jnp.zeros(3))
    assert_same_bits(w, np.ones(3, np.float32))
    w, state = step(w, state, jnp.array([0.0, 2.0, math.nan]))
    np.testing.assert_allclose(w, [1, 1 - 0.1 * 0.1 / (1 - 0.9**2), math.nan], rtol=1e-6)
    w, _ = step(w, state, jnp.zeros(3))
    np.testing.assert_array_equal(np.isnan(w), [False, False, True])


@paths
def test_derivatives_without_eps_are_finite(path):
    def after(learning_rate, g):
        optimizer, w = make(learning_rate, eps=0.0), jnp.ones(2)
        return take_step(optimizer, path)(w, optimizer.init(w), g)[0].sum()

    by_rate, by_gradient = jax.grad(after, (0, 1))(jnp.float32(0.1), jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(by_rate, -1, rtol=1e-6)
    assert np.isfinite(by_gradient).all()


@paths
@pytest.mark.parametrize("learning_rate", [1e38, 1e39, 1e300])
def test_a_learning_rate_beyond_float32_moves_nothing_by_a_gradient_of_zero(
    path, learning_rate
):
    optimizer, w = make(learning_rate), jnp.ones(2)
    w, _ = take_step(optimizer, path)(w, optimizer.init(w), jnp.array([0.0, 1.0]))
    assert w[0] == 1
    assert w[1] < -1e37


# --- The step size ------------------------------------------------------------------------


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99, 0.9999, 1 - 2.0**-24])
@pytest.mark.parametrize("traced", [False, True])
def test_the_bias_correction_is_exact_at_every_step(b1, traced):
    """To float32 rounding, where 1 - b1**t itself would have lost most of its digits."""
    given = jnp.float32(b1) if traced else b1
    known = float(np.float32(b1)) if traced else b1
    optimizer = scale_by_adamax(given, 0.0, 2.0**-126)
    for t in [1, 2, 3, 10, 1000, 10**5, 10**7, 2**31 - 2]:
        state = optimizer.init(jnp.zeros(()))._replace(count=jnp.int32(t - 1))
        # mu is what it would be had the gradient been 1, so the update is 1 / correction.
        state = state._replace(mu=jnp.ones(()))
        update, state = optimizer.update(jnp.ones(()), state)
        exact = -math.expm1(t * math.log(known)) if known else 1.0
        assert float(update) == pytest.approx(1 / exact, rel=4e-7), t


def test_the_count_saturates():
    optimizer = make(0.1)
    w = jnp.ones(1)
    state = optimizer.init(w)
    state = (state[0]._replace(count=jnp.int32(2**31 - 1)), *state[1:])
    for path in PATHS:
        w_after, after = take_step(optimizer, path)(w, state, jnp.ones(1))
        assert int(after[0].count) == 2**31 - 1
        assert np.isfinite(w_after).all()


# --- NumPy --------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_agrees_with_numpy_over_hundreds_of_steps(rng, path, weight_decay):
    steps, shape = 300, (40, 7)
    start = rng.normal(size=shape).astype(np.float32)
    schedule = optax.cosine_decay_schedule(0.01, steps)
    ours = adamax.Adamax(
        lambda step: float(schedule(step)), epsilon=1e-8, weight_decay=weight_decay
    )
    optimizer = make(schedule, weight_decay=weight_decay)
    dense, table = start.copy(), start.copy()
    params = {"dense": as_jax(start), "table": as_jax(start)}
    state, step = optimizer.init(params), take_step(optimizer, path)
    for _ in range(steps):
        g = rng.normal(size=shape).astype(np.float32)
        ids = rng.integers(40, size=20)
        of_rows = rng.normal(size=(20, 7)).astype(np.float32)
        ours.apply_gradients([(g, dense), (adamax.IndexedSlices(of_rows, ids), table)])
        slices = adamax.jax.IndexedSlices(as_jax(of_rows), as_jax(ids))
        params, state = step(params, state, {"dense": as_jax(g), "table": slices})
    rates = [float(schedule(number)) for number in range(steps)]
    error = 2 * trajectory_error(PRECISION["float32"], start, rates)
    for name, expected in {"dense": dense, "table": table}.items():
        assert (abs(np.asarray(params[name]) - expected) <= error).all(), name


def test_whole_steps_have_the_bits_of_numpy(rng):
    """The kernels are the same, if the learning rate makes all scalars exact."""
    w, g = (rng.normal(size=(601, 503)).astype(np.float32) for _ in range(2))
    ours, optimizer = adamax.Adamax(0.5, 0.5, 0.5, 2.0**-20), make(0.5, 0.5, 0.5, 2.0**-20)
    params, state = as_jax(w.copy()), optimizer.init(w)  # JAX may share w's memory
    for _ in range(2):
        ours.apply_gradients([(g, w)])
        params, state = take_step(optimizer, "step")(params, state, as_jax(g))
    assert_same_bits(params, w)


# --- The state of optax -------------------------------------------------------------------


@paths
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_state_of_optax_goes_on(rng, path, scheduled):
    learning_rate = optax.linear_schedule(0.1, 0.01, 10) if scheduled else 0.1
    theirs, ours = optax.adamax(learning_rate), make(learning_rate)
    w = {"a": as_jax(values(rng, (30,), "float32"))}
    state = theirs.init(w)
    assert jax.tree.structure(ours.init(w)) == jax.tree.structure(state)
    for _ in range(3):
        g = {"a": as_jax(values(rng, (30,), "float32"))}
        updates, state = theirs.update(g, state, w)
        w = optax.apply_updates(w, updates)
    updates, expected = theirs.update(g, state, w)
    after, state = take_step(ours, path)(w, state, g)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    # Nothing but the place of epsilon, 1e-8, is different.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        (after, state),
        (optax.apply_updates(w, updates), expected),
    )
    # and back
    updates, _ = theirs.update(g, state, after)
    assert np.isfinite(updates["a"]).all()


@paths
def test_a_16_bit_state_becomes_float32(rng, path):
    w = jnp.ones(5, jnp.bfloat16)
    state = optax.adamax(0.1).init(w)
    assert state[0].nu.dtype == jnp.bfloat16
    w, state = take_step(make(0.1), path)(w, state, jnp.ones(5, jnp.bfloat16))
    assert w.dtype == jnp.bfloat16
    assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32


def test_both_ways_can_be_taken_in_turns(rng):
    w = {"a": as_jax(values(rng, (30,), "float32"))}
    optimizer = make(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1)
    steps = [take_step(optimizer, path) for path in PATHS]
    results = []
    for order in ([0, 0, 0], [1, 1, 1], [0, 1, 0]):
        params, state = w, optimizer.init(w)
        for number, which in enumerate(order):
            g = jax.tree.map(lambda x, n=number: x * (n + 1), w)
            params, state = steps[which](params, state, g)
        results.append((params, state))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            results[0],
            other,
        )


# --- Trees --------------------------------------------------------------------------------


@paths
def test_a_gradient_of_none_leaves_its_parameter_alone(path):
    params = {"a": jnp.ones(2), "b": [jnp.ones(3), None]}
    optimizer = make(0.1, weight_decay=0.1)
    gradients = {"a": None, "b": [jnp.ones(3), None]}
    after, state = take_step(optimizer, path)(params, optimizer.init(params), gradients)
    assert_same_bits(after["a"], params["a"])
    assert_same_bits(state[0].nu["a"], np.zeros(2, np.float32))
    assert after["b"][1] is None
    assert (after["b"][0] < 1).all()


@paths
def test_an_empty_tree(path):
    optimizer = make(0.1)
    params, state = take_step(optimizer, path)({}, optimizer.init({}), {})
    assert params == {}
    assert int(state[0].count) == 1


@paths
def test_numpy_arrays_will_do(path):
    optimizer = make(0.1)
    w = np.ones(2, np.float32)
    step = optimizer.step if path == "step" else take_step(optimizer, path)
    after, _ = step(w, optimizer.init(w), np.ones(2, np.float32))
    np.testing.assert_allclose(after, 0.9, rtol=1e-6)
    assert (w == 1).all()


def test_a_step_needs_no_jit():
    optimizer = make(0.1)
    w = jnp.ones(2)
    after, state = optimizer.step(w, optimizer.init(w), jnp.ones(2))
    jitted, of_jitted = jax.jit(optimizer.step)(w, optimizer.init(w), jnp.ones(2))
    np.testing.assert_allclose(after, jitted, rtol=1e-6)
    assert_same_bits(state[0].nu, of_jitted[0].nu)
    assert (w == 1).all()


@paths
def test_what_is_not_donated_stays_as_it_is(rng, path):
    optimizer = make(0.1)
    w, g = (as_jax(values(rng, (50, 3), "float32")) for _ in range(2))
    slices = adamax.jax.IndexedSlices(g[:3], jnp.array([4, 4, 1]))
    params = {"a": w, "b": w}
    state = optimizer.init(params)
    before = contents(params, state)
    gradients = {"a": g, "b": slices}
    take_step(optimizer, path)(params, state, gradients)
    for name, array in contents(params, state).items():
        assert_same_bits(array, before[name], name)


# --- Arguments ----------------------------------------------------------------------------


def test_the_signature_is_that_of_optax():
    theirs = inspect.signature(optax.adamax).parameters
    ours = inspect.signature(make).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {n: p.default for n, p in theirs.items()} == {n: ours[n].default for n in theirs}
    assert list(ours)[len(theirs) :] == [
        "weight_decay", "mask", "sparse", "state_dtype", "stochastic_rounding",
    ]  # fmt: skip
    assert ours["sparse"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1.0"),
        ({"learning_rate": math.nan}, r"learning_rate must be in \[0, inf\), got nan"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"b2": np.float32(1.5)}, r"b2 must be in \[0, 1\), got 1.5"),
        ({"eps": -1e-8}, r"eps must be in \[0, inf\), got -1e-08"),
        ({"weight_decay": -1}, r"weight_decay must be in \[0, inf\), got -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, **chosen})


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [None, "0.5", True, [0.5]])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a real number"):
        make(**{"learning_rate": 0.1, name: value})


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "weight_decay"])
def test_several_numbers_for_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be a number, got an array of \(2,"):
        make(0.1, **{name: jnp.array([0.5, 0.6])})


def test_a_schedule_of_the_decay_is_refused():
    with pytest.raises(TypeError, match="weight_decay must be a real number"):
        make(0.1, weight_decay=optax.constant_schedule(0.1))


def test_hyperparameters_may_be_traced(rng):
    w, g = (as_jax(values(rng, (30,), "float32")) for _ in range(2))

    @jax.jit
    def once(learning_rate, b1, b2, eps, weight_decay):
        optimizer = make(learning_rate, b1, b2, eps, weight_decay)
        return optimizer.step(w, optimizer.init(w), g)

    chosen = 0.1, 0.8, 0.99, 1e-3, 0.1
    after, state = once(*chosen)
    optimizer = make(*chosen)
    expected, of_expected = optimizer.step(w, optimizer.init(w), g)
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    np.testing.assert_allclose(state[0].mu, of_expected[0].mu, rtol=1e-5)


@paths
def test_wide_hyperparameters_do_not_widen_the_state(path):
    with jax.enable_x64(True):
        optimizer = make(*map(jnp.float64, (0.1, 0.9, 0.999, 1e-8, 0.1)))
        w = jnp.ones(3, jnp.float32)
        w, state = take_step(optimizer, path)(
            w, optimizer.init(w), jnp.ones(3, jnp.float32)
        )
        assert w.dtype == state[0].mu.dtype == state[0].nu.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_a_parameter_that_is_not_floating_is_refused(dtype):
    with pytest.raises(TypeError, match=r"must be floating-point, got \w+ at \['a'\]"):
        make(0.1).init({"a": np.zeros(3, dtype)})


@paths
def test_a_gradient_of_another_shape_is_refused(path):
    optimizer = make(0.1)
    w = {"a": jnp.ones((3, 2))}
    state = optimizer.init(w)
    with pytest.raises(
        ValueError, match=r"shape of its parameter, \(3, 2\), got \(2,\) at"
    ):
        take_step(optimizer, path)(w, state, {"a": jnp.ones(2)})


@pytest.mark.parametrize("of_rows", [False, True])
def test_a_state_of_another_shape_is_refused(of_rows):
    """The kernels would read and write outside of it."""
    optimizer, w = make(0.1), jnp.ones((9, 8))
    g = IndexedSlices(w[:1], jnp.array([8])) if of_rows else w
    for other in (jnp.ones((5, 8)), jnp.ones((9, 4))):
        with pytest.raises(ValueError, match=r"the shape of its parameter, \(9, 8\), got"):
            optimizer.step(w, optimizer.init(other), g)


def test_a_step_without_jit_at_all():
    optimizer, w = make(0.1), jnp.ones(3)
    with jax.disable_jit():
        w, _ = optimizer.step(w, optimizer.init(w), w)
    np.testing.assert_allclose(w, 0.9, rtol=1e-6)


def test_an_optimizer_can_be_copied():
    optimizer = make(0.1)
    pickled = pickle.loads(pickle.dumps(optimizer))
    for copied in (copy.copy(optimizer), copy.deepcopy(optimizer), pickled):
        w = jnp.ones(3)
        w, _ = copied.step(w, copied.init(w), w)
        np.testing.assert_allclose(w, 0.9, rtol=1e-6)


def test_updates_of_none_are_no_updates():
    params = [jnp.ones(2), None]
    after = apply_updates(params, [None, None])
    assert after[0] is params[0]
    assert after[1] is None


def test_dtypes_of_ml_dtypes_are_those_of_jax():
    assert jnp.bfloat16 == ml_dtypes.bfloat16
