"""Steps of ``adamax.Adamax``: the oracle, and facts that follow from the rule."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import oracle
from adamax import Adamax, IndexedSlices
from cases import DTYPES, HYPERPARAMETERS, LARGE, PRECISION, ROUNDINGS, SHAPES, values
from compare import (
    assert_same_bits,
    assert_same_contents,
    contents,
    follow,
    trajectory_error,
)

# --- The oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_steps_follow_the_oracle(rng, shape, dtype, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    w = values(rng, SHAPES[shape], dtype)
    gradients = [[values(rng, SHAPES[shape], dtype)] for _ in range(5)]
    follow(Adamax(**chosen), oracle.Rule(**chosen), [w], gradients)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundreds_of_steps_follow_the_oracle(rng, dtype, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    w = values(rng, (23,), dtype)
    gradients = [[values(rng, (23,), dtype)] for _ in range(300)]
    follow(Adamax(**chosen), oracle.Rule(**chosen), [w], gradients)


@pytest.mark.parametrize(
    "hyperparameters", ["defaults", "weight decay", "clipnorm", "clipvalue"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_arrays_follow_the_oracle(rng, use_threads, dtype, hyperparameters):
    use_threads(3)
    chosen = HYPERPARAMETERS[hyperparameters]
    w = values(rng, LARGE, dtype)
    gradients = [[values(rng, LARGE, dtype)] for _ in range(2)]
    follow(Adamax(**chosen), oracle.Rule(**chosen), [w], gradients)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hyperparameters", ["learning rate", "weight decay", "schedule"])
def test_trajectories_stay_close_to_the_oracles(rng, dtype, hyperparameters):
    """Errors add up over the steps, and none grows on its own."""
    chosen = HYPERPARAMETERS[hyperparameters]
    rule = oracle.Rule(**chosen)
    steps, shape = 400, (50,)
    w = values(rng, shape, dtype)
    start = oracle.State.of(w)
    gradients = [[values(rng, shape, dtype)] for _ in range(steps)]
    optimizer = Adamax(**chosen)
    for [gradient] in gradients:
        optimizer.apply_gradients([(gradient, w)])
    [expected] = oracle.trajectory(rule, [start], gradients)
    rates = [rule.learning_rate_at(number) for number in range(steps)]
    error = trajectory_error(PRECISION[dtype], start.w, rates)
    assert (np.abs(w - expected.w) <= error).all()


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
def test_many_parameters_in_one_step_follow_the_oracle(rng, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    kinds = [(shape, dtype) for shape in SHAPES.values() for dtype in DTYPES]
    parameters = [values(rng, *kind) for kind in kinds]
    gradients = []
    for step in range(6):
        gradients.append([values(rng, *kind) for kind in kinds])
        if step > 0:
            gradients[-1][:: step + 1] = [None] * len(kinds[:: step + 1])
    follow(Adamax(**chosen), oracle.Rule(**chosen), parameters, gradients)


@pytest.mark.parametrize("hyperparameters", ["defaults", "clipnorm", "clipvalue"])
def test_steps_together_are_the_steps_of_each_alone(rng, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    kinds = [(shape, dtype) for shape in SHAPES.values() for dtype in DTYPES]
    starts = [values(rng, *kind) for kind in kinds]
    gradients = [[values(rng, *kind) for kind in kinds] for _ in range(4)]
    together = [start.copy() for start in starts]
    optimizer = Adamax(**chosen)
    for of_this_step in gradients:
        optimizer.apply_gradients(zip(of_this_step, together, strict=True))
    for i, start in enumerate(starts):
        alone, w = Adamax(**chosen), start.copy()
        for of_this_step in gradients:
            alone.apply_gradients([(of_this_step[i], w)])
        assert_same_bits(together[i], w)
        for part in ("m", "u"):
            expected = alone.state_dict()[f"0.{part}"]
            assert_same_bits(optimizer.state_dict()[f"{i}.{part}"], expected)


hyperparameters_drawn = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(0, 10),
        "beta_1": st.floats(0, 0.9999),
        "beta_2": st.floats(0, 0.999999),
        "epsilon": st.floats(1e-12, 1),
        "weight_decay": st.floats(0, 0.1),
    },
)
clipping_drawn = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"clipnorm": st.floats(1e-3, 1e3)}),
    st.fixed_dictionaries({"clipvalue": st.floats(1e-3, 1e3)}),
    st.fixed_dictionaries({"global_clipnorm": st.floats(1e-3, 1e3)}),
)
shapes_drawn = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    hyperparameters=hyperparameters_drawn,
    clipping=clipping_drawn,
    shapes=st.lists(shapes_drawn, min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_steps_follow_the_oracle(hyperparameters, clipping, shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    chosen = {**hyperparameters, **clipping}
    parameters = [values(rng, shape, dtype) for shape in shapes]
    gradients = [[values(rng, shape, dtype) for shape in shapes] for _ in range(4)]
    rule = oracle.Rule(**chosen)
    states = [oracle.State.of(w) for w in parameters]
    for number, of_this_step in enumerate(gradients):
        states = oracle.step(rule, states, of_this_step, number)
        # A step by a tiny norm can leave the range of float16.
        largest = max(np.abs(state.w).max(initial=0) for state in states)
        assume(largest < 0.5 * float(ml_dtypes.finfo(PRECISION[dtype].dtype).max))
    follow(Adamax(**chosen), rule, parameters, gradients)


# --- Facts --------------------------------------------------------------------------------


def _step(optimizer, w, *gradients):
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, w)])
    return w


@given(
    dtype=st.sampled_from(["float32", "float64"]),
    exponents=st.lists(st.integers(-20, 20), min_size=1, max_size=60),
    learning_rate=st.floats(1e-6, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_is_bounded_by_the_learning_rate(dtype, exponents, learning_rate, seed):
    """By 1.00909 of it: the largest quotient is that of gradients that fall by beta_2.

    |m| is at most (1 - beta_1) * sum(beta_1**k * |g_k|), and u at least beta_2**k * |g_k|,
    for the gradient of k steps ago.
    """
    bound = (1 - 0.9) / (1 - 0.9 / 0.999)
    roundoff = PRECISION[dtype].roundoff
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(len(exponents), 5))
    optimizer = Adamax(learning_rate)
    w = np.zeros(5, dtype)
    for exponent, sign in zip(exponents, signs, strict=True):
        before = w.copy()
        _step(optimizer, w, (sign * 2.0**exponent).astype(dtype))
        moved = np.abs(w.astype(np.float64) - before)
        # m is 10 roundings of one step away from exact at most, since it forgets.
        slack = 10 * ROUNDINGS * roundoff * learning_rate + roundoff * np.abs(w)
        assert (moved <= bound * learning_rate + slack).all()


def test_the_bound_on_a_step_is_reached():
    w = np.zeros(1)
    optimizer = Adamax(learning_rate=1.0, epsilon=2.0**-126)
    for t in range(200):
        before = w.copy()
        _step(optimizer, w, np.array([0.999**t]))
    assert before - w == pytest.approx((1 - 0.9) / (1 - 0.9 / 0.999), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_is_the_learning_rate_times_the_sign(dtype):
    # Powers of two, so that all of it is exact in any dtype.
    g = np.array([4, -4, 2**-8, -(2**-8), 0, 1]).astype(dtype)
    w = np.ones(6, PRECISION[dtype].dtype)
    optimizer = Adamax(learning_rate=0.25, beta_1=0.5, epsilon=2.0**-126)
    _step(optimizer, w, g)
    np.testing.assert_array_equal(w, [0.75, 1.25, 0.75, 1.25, 1, 0.75])
    np.testing.assert_array_equal(optimizer.state_dict()["0.m"], g.astype(np.float64) / 2)
    np.testing.assert_array_equal(optimizer.state_dict()["0.u"], np.abs(g))


def test_the_rule_by_hand():
    """Two steps in numbers that a reader can follow."""
    w = np.array([1.0])
    optimizer = Adamax(0.5, beta_1=0.5, beta_2=0.75, epsilon=0.25, weight_decay=0.5)
    _step(optimizer, w, np.array([2.0]))
    # m = 0.5 * 2 = 1, u = 2, w = (1 - 0.25) * 1 - 0.5 / (1 - 0.5) * 1 / 2.25
    assert optimizer.state_dict()["0.m"] == 1.0
    assert optimizer.state_dict()["0.u"] == 2.0
    assert w == pytest.approx(0.75 - 1 / 2.25, rel=1e-15)
    before = w.copy()
    _step(optimizer, w, np.array([-1.0]))
    # m = 1 + 0.5 * (-1 - 1) = 0, u = max(0.75 * 2, 1) = 1.5
    assert optimizer.state_dict()["0.m"] == 0.0
    assert optimizer.state_dict()["0.u"] == 1.5
    assert w == pytest.approx(0.75 * before, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_gradients_by_a_power_of_two_changes_nothing(rng, dtype):
    gradients = [rng.normal(size=40).astype(PRECISION[dtype].dtype) for _ in range(20)]
    trajectories = []
    for scale in (1.0, 2.0**-4, 2.0**4):
        w = np.zeros(40, PRECISION[dtype].dtype)
        scaled = [(g.astype(np.float64) * scale).astype(g.dtype) for g in gradients]
        trajectories.append(_step(Adamax(0.01, epsilon=2.0**-126), w, *scaled))
    assert trajectories[0].any()
    assert_same_bits(trajectories[1], trajectories[0])
    assert_same_bits(trajectories[2], trajectories[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_gradients_move_the_opposite_way(rng, dtype):
    gradients = [values(rng, (40,), dtype) for _ in range(20)]
    there = _step(Adamax(0.01), np.ones(40, gradients[0].dtype), *gradients)
    back = _step(Adamax(0.01), -np.ones(40, gradients[0].dtype), *(-g for g in gradients))
    assert (there != 1).any()
    assert_same_bits(there, -back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_do_not_depend_on_their_neighbours(rng, dtype):
    gradients = [values(rng, (67,), dtype) for _ in range(3)]
    start = values(rng, (67,), dtype)
    together = _step(Adamax(0.01), start.copy(), *gradients)
    for part in (slice(0, 1), slice(3, 20), slice(60, 67)):
        alone = _step(Adamax(0.01), start[part].copy(), *(g[part] for g in gradients))
        assert_same_bits(alone, together[part])


def test_a_constant_gradient_moves_by_the_learning_rate():
    w = np.zeros(3)
    gradient = np.array([1e-3, -5.0, 1e8])
    optimizer = Adamax(0.01, epsilon=2.0**-126)
    for t in range(1, 200):
        _step(optimizer, w, gradient)
        np.testing.assert_allclose(w, -0.01 * t * np.sign(gradient), rtol=1e-12)


def test_no_learning_rate_moves_nothing_but_the_state(rng):
    start = values(rng, (30,), "float32")
    w = start.copy()
    optimizer = Adamax(0.0, weight_decay=0.5)
    _step(optimizer, w, *(values(rng, (30,), "float32") for _ in range(3)))
    assert_same_bits(w, start)
    assert optimizer.state_dict()["0.m"].any()
    assert optimizer.state_dict()["0.u"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_gradients_change_nothing(rng, dtype):
    start = values(rng, (30,), dtype)
    w = start.copy()
    optimizer = Adamax(0.1)
    _step(optimizer, w, *[np.zeros_like(w)] * 5)
    assert_same_bits(w, start)
    assert not optimizer.state_dict()["0.m"].any()
    assert not optimizer.state_dict()["0.u"].any()


def test_without_memory_steps_are_signs():
    w = np.zeros(4, np.float32)
    optimizer = Adamax(0.5, beta_1=0, beta_2=0, epsilon=2.0**-126)
    for signs in ([1, -1, 0, 1], [-1, -1, 1, 0]):
        before = w.copy()
        _step(optimizer, w, np.array(signs) * np.float32(3))
        np.testing.assert_array_equal(before - w, np.array(signs) / 2)


def test_weight_decay_is_decoupled():
    w = np.full(3, 8.0, np.float32)
    optimizer = Adamax(0.5, weight_decay=0.5)
    _step(optimizer, w, *[np.zeros(3, np.float32)] * 4)
    np.testing.assert_array_equal(w, 8 * 0.75**4)
    assert not optimizer.state_dict()["0.m"].any()


def test_weight_decay_follows_the_schedule():
    w = np.full(3, 8.0)
    optimizer = Adamax(lambda step: [0.5, 0.0, 1.0][step], weight_decay=0.5)
    for factor in (0.75, 0.75, 0.375):
        _step(optimizer, w, np.zeros(3))
        np.testing.assert_array_equal(w, 8 * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_norm_of_16_bit_parameters_decays(dtype, sparse):
    """In 16 bits 0.999 * u would be rounded back to u."""
    w = np.zeros((1, 2), PRECISION[dtype].dtype)
    optimizer = Adamax(1e-3)
    zeros = np.zeros_like(w)
    first, later = np.ones_like(w), zeros
    if sparse:
        first, later = IndexedSlices(first, [0]), IndexedSlices(zeros, [0])
    _step(optimizer, w, first, *[later] * 1000)
    state = optimizer.state_dict()
    assert state["0.u"].dtype == PRECISION[dtype].state
    np.testing.assert_allclose(state["0.u"], 0.999**1000, rtol=2001 * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_zero_gradients_give_no_nan_at_the_smallest_epsilon(dtype, sparse):
    """In float16 an epsilon of 1e-7 is hardly above zero, and 0 / 0 is NaN."""
    for epsilon in (1e-7, 2.0**-126):
        w = np.ones((2, 3), PRECISION[dtype].dtype)
        zeros = np.zeros_like(w)
        gradient = IndexedSlices(zeros, [0, 1]) if sparse else zeros
        _step(Adamax(0.1, epsilon=epsilon), w, gradient, gradient)
        np.testing.assert_array_equal(w, 1)


def test_nothing_is_added_to_small_gradients():
    """Epsilon is in the denominator, beside u and not within it."""
    optimizer = Adamax(1.0, epsilon=1.0)
    w = np.zeros(1)
    _step(optimizer, w, np.array([1.0]))
    assert optimizer.state_dict()["0.u"] == 1.0
    assert w == pytest.approx(-0.5, rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_the_parameter(rng, dtype, bad):
    w = values(rng, (40,), dtype)
    g = values(rng, (40,), dtype)
    g[7] = bad
    optimizer = Adamax()
    _step(optimizer, w, g)
    for array in (w, *list(optimizer.state_dict().values())[1:]):
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(array)), [7])
    _step(optimizer, w, np.ones_like(w))
    assert np.isnan(w[7])
    assert not np.isfinite(optimizer.state_dict()["0.m"][7])


def test_clipping_by_value_stops_infinity_but_not_nan():
    w = np.zeros(3)
    optimizer = Adamax(0.1, clipvalue=2.0, beta_1=0.5)
    _step(optimizer, w, np.array([math.inf, -math.inf, math.nan]))
    np.testing.assert_array_equal(optimizer.state_dict()["0.m"], [1, -1, math.nan])
    np.testing.assert_array_equal(optimizer.state_dict()["0.u"], [2, 2, math.nan])
    np.testing.assert_array_equal(np.isnan(w), [False, False, True])


# --- Clipping -----------------------------------------------------------------------------


def _clipped(pairs, **clipping) -> list[np.ndarray]:
    """The gradients as the rule saw them: m after a step without memory."""
    optimizer = Adamax(0.0, beta_1=0, **clipping)
    optimizer.apply_gradients(pairs)
    return [entry for name, entry in optimizer.state_dict().items() if name.endswith(".m")]


def test_norms_are_those_of_each_gradient_or_of_all():
    pairs = [
        (np.array([3.0, 4.0]), np.zeros(2)),
        (np.array([0.0, 12.0], np.float32), np.zeros(2, np.float32)),
        (IndexedSlices([[0.0], [84.0]], [5, 3]), np.zeros((9, 1))),
    ]
    of_table = np.zeros((9, 1))
    of_table[3] = 84
    plain = [np.array([3.0, 4.0]), np.array([0.0, 12.0]), of_table]
    cases = [
        ({"clipnorm": 5.0}, [1, 5 / 12, 5 / 84]),
        ({"clipnorm": 1.0}, [1 / 5, 1 / 12, 1 / 84]),
        ({"clipnorm": 84.0}, [1, 1, 1]),
        # 5, 12 and 84 are 85 together.
        ({"global_clipnorm": 17.0}, [1 / 5] * 3),
        ({"global_clipnorm": 85.0}, [1] * 3),
    ]
    for clipping, scales in cases:
        clipped = _clipped(pairs, **clipping)
        for actual, gradient, scale in zip(clipped, plain, scales, strict=True):
            np.testing.assert_allclose(actual, gradient * scale, rtol=2.0**-22)


def test_norms_are_those_of_the_summed_gradient():
    rows = [[3.0, 0.0], [1.0, 1.0], [0.0, 4.0], [-1.0, -1.0]]
    pairs = [(IndexedSlices(rows, [6, 2, 6, 2]), np.zeros((9, 2)))]
    for clipping in ("clipnorm", "global_clipnorm"):
        # Row 6 is [3, 4], row 2 is 0: the norm is 5, not the 29**0.5 of what was given.
        [clipped] = _clipped(pairs, **{clipping: 1.0})
        np.testing.assert_allclose(clipped[6], [0.6, 0.8], rtol=1e-15)
        assert np.count_nonzero(clipped) == 2
        [unclipped] = _clipped(pairs, **{clipping: 5.0})
        np.testing.assert_array_equal(unclipped[6], [3, 4])


def test_values_are_clamped_after_repeats_are_summed():
    rows = [[3.0, -3.0], [-2.5, 2.0]]
    [clipped] = _clipped([(IndexedSlices(rows, [1, 1]), np.zeros((2, 2)))], clipvalue=0.75)
    np.testing.assert_array_equal(clipped, [[0, 0], [0.5, -0.75]])


def test_absent_gradients_are_no_part_of_the_norm():
    pairs = [(np.array([3.0, 4.0]), np.zeros(2)), (None, np.ones(2))]
    [clipped] = _clipped(pairs, global_clipnorm=1.0)
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-15)


@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm"])
def test_a_norm_that_is_not_finite_is_not_hidden(clipping):
    w, other = np.zeros(2), np.zeros(2)
    optimizer = Adamax(**{clipping: 1.0})
    pairs = [(np.array([math.nan, 1.0]), w), (np.ones(2), other)]
    optimizer.apply_gradients(pairs)
    assert np.isnan(w).all()
    assert np.isnan(other).all() == (clipping == "global_clipnorm")


# --- Several parameters -------------------------------------------------------------------


def test_parameters_without_a_gradient_are_left_alone(rng):
    first, second = (values(rng, (9,), "float32") for _ in range(2))
    optimizer = Adamax()
    optimizer.apply_gradients([(np.ones(9, np.float32), first), (first.copy(), second)])
    before = contents(optimizer, [first, second])
    new = np.ones(3)
    optimizer.apply_gradients([(None, first), (np.ones(9), second), (None, new)])
    after = contents(optimizer, [first, second])
    for name in ("w0", "0.m", "0.u"):
        assert_same_bits(after[name], before[name], name)
    assert (after["w1"] != before["w1"]).all()
    assert list(after) == list(before)  # no state for `new`
    assert optimizer.iterations == 2


def test_steps_are_counted_for_all_parameters_together():
    """A parameter that comes late has the bias correction of the optimizer's step."""
    early, late = np.zeros(1), np.zeros(1)
    optimizer = Adamax(1.0, epsilon=2.0**-126)
    for _ in range(9):
        optimizer.apply_gradients([(np.ones(1), early)])
    assert optimizer.apply_gradients([(np.ones(1), late)]) == 10
    assert late == pytest.approx(-0.1 / (1 - 0.9**10), rel=1e-14)


def test_the_order_of_pairs_does_not_matter(rng):
    starts = [values(rng, shape, "float32") for shape in ((7,), (3, 3), (50,))]
    gradients = [values(rng, start.shape, "float32") for start in starts]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        parameters = [start.copy() for start in starts]
        optimizer = Adamax(clipnorm=1.0)
        optimizer.build(parameters)
        for _ in range(3):
            optimizer.apply_gradients([(gradients[i], parameters[i]) for i in order])
        results.append(contents(optimizer, parameters))
    assert_same_contents(results[1], results[0])


def test_pairs_may_be_lists_and_come_from_a_generator():
    w = np.zeros(1)
    assert Adamax().apply_gradients([np.ones(1), v] for v in [w]) == 1
    assert w != 0


def test_minimize_returns_the_loss_and_takes_a_step():
    w, other, loss = np.array([1.0]), np.array([1.0]), object()
    optimizer = Adamax(0.5)
    called = []

    def loss_and_gradients():
        called.append(True)
        return loss, [2 * w, None]

    assert optimizer.minimize(loss_and_gradients, [w, other]) is loss
    assert len(called) == 1
    assert optimizer.iterations == 1
    assert w == pytest.approx(0.5, rel=1e-6)
    assert other == 1.0


def test_minimize_finds_a_minimum():
    x = np.array([3.0, -2.0], np.float32)
    target = np.array([1.0, 1.0], np.float32)
    optimizer = Adamax(lambda step: 0.1 / (1 + step / 50))
    for _ in range(1000):
        loss = optimizer.minimize(
            lambda: (float(np.sum((x - target) ** 2)), [2 * (x - target)]), [x]
        )
    assert loss < 1e-5


# --- The ends of the range ----------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "clipping", [{}, {"clipnorm": 1e6}, {"global_clipnorm": 1e6}], ids=str
)
def test_a_wide_gradient_of_a_narrow_parameter_is_not_cast_down(sparse, clipping):
    w = np.zeros((2, 1), np.float16)
    g = np.array([[1e-8], [1e5]], np.float32)
    gradient = IndexedSlices(g, [0, 1]) if sparse else g
    optimizer = Adamax(**clipping)
    optimizer.apply_gradients([(gradient, w)])
    assert_same_bits(optimizer.state_dict()["0.u"], g)
    assert np.isfinite(w).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_norms_do_not_overflow(sparse, clipping, dtype, scale):
    w = np.zeros((2, 1), dtype)
    g = np.array([[3.0], [4.0]]) * scale
    optimizer = Adamax(**{clipping: 1e-30 if scale < 1 else 1.0})
    optimizer.apply_gradients([(IndexedSlices(g, [0, 1]) if sparse else g, w)])
    expected = [[0.6], [0.8]] if scale > 1 else g
    np.testing.assert_allclose(
        optimizer.state_dict()["0.u"], np.asarray(expected, dtype), rtol=1e-6
    )


def test_a_learning_rate_beyond_float32_makes_no_nan_of_a_zero_gradient():
    w = np.ones(3, np.float32)
    Adamax(1e39).apply_gradients([(np.array([0, 1, -1], np.float32), w)])
    assert w[0] == 1
    assert not np.isnan(w).any()


def test_a_step_of_one_row_a_million_times():
    count = 1_000_000
    table = np.zeros((2, 1), np.float32)
    optimizer = Adamax(beta_1=0.0)
    gradient = IndexedSlices(np.full((count, 1), 0.1, np.float32), np.zeros(count, int))
    optimizer.apply_gradients([(gradient, table)])
    expected = np.float32(count * float(np.float32(0.1)))
    assert optimizer.state_dict()["0.m"][0, 0] == expected
