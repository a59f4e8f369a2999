"""The same steps as the peers', where they have the same rule."""

import numpy as np
import pytest

import oracle
from adamax import Adamax, IndexedSlices
from cases import PRECISION, ROUNDINGS
from compare import assert_same_bits, trajectory_error

STEPS = 200
SHAPE = (40, 5)


def _gradients(rng, smallest=0.0):
    made = []
    for _ in range(STEPS):
        gradient = rng.normal(size=SHAPE)
        made.append(np.where(np.abs(gradient) < smallest, smallest, gradient))
    return made


def _tolerance(start, learning_rates, dtype="float32"):
    """For two programs, each of which rounds."""
    return 2 * trajectory_error(PRECISION[dtype], start, learning_rates)


# --- tf_keras' legacy Adamax: the class whose documentation this front end follows --------

# The legacy class clips rows before it sums repeats, so the rows of these are distinct.
CLIPPING = {
    "no clipping": {},
    "clipnorm": {"clipnorm": 0.8},
    "clipvalue": {"clipvalue": 0.3},
    "global_clipnorm": {"global_clipnorm": 1.5},
}


def _legacy_steps(tensorflow, tf_keras, start, gradients, learning_rate, **clipping):
    optimizer = tf_keras.optimizers.legacy.Adamax(learning_rate, **clipping)
    variables = [tensorflow.Variable(w) for w in start]
    for of_this_step in gradients:
        optimizer.apply_gradients(zip(of_this_step, variables, strict=True))
    slots = [
        [optimizer.get_slot(variable, part).numpy() for part in ("m", "v")]
        for variable in variables
    ]
    return [variable.numpy() for variable in variables], slots


def _slices(tensorflow, rows, indices):
    return tensorflow.IndexedSlices(tensorflow.constant(rows), indices, SHAPE)


def _our_steps(start, gradients, learning_rate, **clipping):
    parameters = [w.copy() for w in start]
    optimizer = Adamax(learning_rate, **clipping)
    for of_this_step in gradients:
        optimizer.apply_gradients(zip(of_this_step, parameters, strict=True))
    state = optimizer.state_dict()
    slots = [[state[f"{i}.m"], state[f"{i}.u"]] for i in range(len(start))]
    return parameters, slots


def _assert_close(ours, theirs, start, schedule):
    (parameters, slots), (variables, their_slots) = ours, theirs
    rates = [float(schedule(step)) for step in range(STEPS)]
    for i, w in enumerate(start):
        assert (parameters[i] != w).any()
        difference = np.abs(parameters[i] - variables[i])
        assert (difference <= _tolerance(w, rates)).all()
        _assert_close_state(*slots[i], *their_slots[i])


def _assert_close_state(m, u, their_m, their_u):
    roundoff = PRECISION["float32"].roundoff
    # m forgets; u keeps two roundings for each step that it has decayed.
    atol = 2 * ROUNDINGS / (1 - 0.9) * roundoff * np.abs(u).max()
    np.testing.assert_allclose(m, their_m, rtol=0, atol=atol)
    np.testing.assert_allclose(u, their_u, rtol=2 * 2 * STEPS * roundoff)


@pytest.mark.parametrize("clipping", CLIPPING)
def test_dense_steps_are_those_of_tf_keras(rng, tensorflow, tf_keras, clipping):
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.01, 50, 0.7)
    start = [rng.normal(size=shape).astype(np.float32) for shape in (SHAPE, 7)]
    gradients = [
        [rng.normal(size=w.shape).astype(np.float32) for w in start] for _ in range(STEPS)
    ]
    chosen = CLIPPING[clipping]
    theirs = _legacy_steps(tensorflow, tf_keras, start, gradients, schedule, **chosen)
    ours = _our_steps(start, gradients, schedule, **chosen)
    _assert_close(ours, theirs, start, schedule)


@pytest.mark.parametrize("clipping", CLIPPING)
def test_sparse_steps_are_those_of_tf_keras(rng, tensorflow, tf_keras, clipping):
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.01, 50, 0.7)
    start = [rng.normal(size=SHAPE).astype(np.float32)]
    chosen = CLIPPING[clipping]
    theirs_given, ours_given = [], []
    for _ in range(STEPS):
        if chosen:
            indices = rng.permutation(SHAPE[0])[:20]
        else:
            indices = rng.integers(SHAPE[0], size=60)
        rows = rng.normal(size=(indices.size, SHAPE[1])).astype(np.float32)
        theirs_given.append([_slices(tensorflow, rows, indices)])
        ours_given.append([IndexedSlices(rows, indices)])
    theirs = _legacy_steps(tensorflow, tf_keras, start, theirs_given, schedule, **chosen)
    ours = _our_steps(start, ours_given, schedule, **chosen)
    _assert_close(ours, theirs, start, schedule)
    # Theirs is a sparse gradient to us as well.
    again, _ = _our_steps(start, theirs_given, schedule, **chosen)
    assert_same_bits(again[0], ours[0][0])


def test_rows_that_tf_keras_does_not_touch_are_not_touched(rng, tensorflow, tf_keras):
    start = [rng.normal(size=SHAPE).astype(np.float32)]
    rows = rng.normal(size=(3, SHAPE[1])).astype(np.float32)
    indices = np.array([4, 9, 4])
    slices = _slices(tensorflow, rows, indices)
    theirs, _ = _legacy_steps(tensorflow, tf_keras, start, [[slices]] * 5, 0.01)
    ours, _ = _our_steps(start, [[IndexedSlices(rows, indices)]] * 5, 0.01)
    touched = (theirs[0] != start[0]).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(touched), [4, 9])
    np.testing.assert_array_equal((ours[0] != start[0]).any(axis=1), touched)


# --- torch.optim.Adamax -------------------------------------------------------------------


def test_steps_are_those_of_torch_but_for_epsilon(rng, torch):
    """Torch has ``max(beta_2 * u, |g| + eps)`` for ``max(beta_2 * u, |g|) + eps``.

    So its denominator is between u and u + eps, and its quotient differs from ours by at
    most eps / u of it, where u is not below the size of the gradient.
    """
    epsilon, smallest, rates = 1e-8, 0.05, [0.01] * STEPS
    start = rng.normal(size=SHAPE)
    ours, theirs = start.copy(), torch.nn.Parameter(torch.tensor(start))
    optimizer = Adamax(rates[0], epsilon=epsilon)
    peer = torch.optim.Adamax([theirs], lr=rates[0], eps=epsilon)
    for gradient in _gradients(rng, smallest):
        optimizer.apply_gradients([(gradient, ours)])
        theirs.grad = torch.tensor(gradient)
        peer.step()
    bound = epsilon / smallest * sum(1.01 * rate for rate in rates)
    difference = np.abs(ours - theirs.detach().numpy())
    assert (difference <= bound + _tolerance(start, rates, "float64")).all()


def test_state_is_that_of_torch(rng, torch):
    start = rng.normal(size=SHAPE).astype(np.float32)
    ours, theirs = start.copy(), torch.nn.Parameter(torch.tensor(start))
    optimizer = Adamax(0.01, epsilon=2.0**-126)
    peer = torch.optim.Adamax([theirs], lr=0.01, eps=2.0**-126)
    for gradient in _gradients(rng):
        gradient = gradient.astype(np.float32)
        optimizer.apply_gradients([(gradient, ours)])
        theirs.grad = torch.tensor(gradient)
        peer.step()
    state, [their_state] = optimizer.state_dict(), peer.state.values()
    _assert_close_state(
        state["0.m"],
        state["0.u"],
        their_state["exp_avg"].numpy(),
        their_state["exp_inf"].numpy(),
    )
    difference = np.abs(ours - theirs.detach().numpy())
    assert (difference <= _tolerance(start, [0.01] * STEPS)).all()


# --- Keras 3 ------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", CLIPPING)
def test_dense_steps_are_those_of_keras(rng, tensorflow, keras, clipping):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("this hands variables of TensorFlow to Keras")
    start = [rng.normal(size=SHAPE).astype(np.float32)]
    gradients = [[rng.normal(size=SHAPE).astype(np.float32)] for _ in range(STEPS)]
    optimizer = keras.optimizers.Adamax(0.01, **CLIPPING[clipping])
    variable = keras.Variable(start[0])
    optimizer.build([variable])
    for [gradient] in gradients:
        optimizer.apply([tensorflow.constant(gradient)])
    [ours], _ = _our_steps(start, gradients, 0.01, **CLIPPING[clipping])
    difference = np.abs(ours - variable.value.numpy())
    assert (difference <= _tolerance(start[0], [0.01] * STEPS)).all()


# --- The oracle itself --------------------------------------------------------------------


def test_the_oracle_is_what_tf_keras_does(rng, tensorflow, tf_keras):
    """In float64, so that this is about the rule and not about rounding."""
    # TensorFlow keeps these in float32, where they are exact.
    chosen = {"beta_1": 0.875, "beta_2": 0.9990234375, "epsilon": 2.0**-20}
    start = rng.normal(size=SHAPE)
    given, summed = [], []
    for _ in range(STEPS):
        indices = rng.integers(SHAPE[0], size=60)
        rows = rng.normal(size=(60, SHAPE[1]))
        given.append([_slices(tensorflow, rows, indices)])
        summed.append([oracle.Rows(rows, indices)])
    [theirs], _ = _legacy_steps(tensorflow, tf_keras, [start], given, 2.0**-7, **chosen)
    rule = oracle.Rule(learning_rate=2.0**-7, **chosen)
    [expected] = oracle.trajectory(rule, [oracle.State.of(start)], summed)
    np.testing.assert_allclose(theirs, expected.w, rtol=0, atol=1e-12)
