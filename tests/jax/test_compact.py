"""Compact state and stochastic rounding in JAX."""

import functools
import pickle

import numpy as np
import pytest

import adamax
from adamax._core import compact as mathematics
from cases import values
from compare import assert_same_bits
from jax_cases import PATHS, jax, jnp, optax, take_step

from adamax.jax import (  # isort: skip  (not without jax)
    CompactState,
    IndexedSlices,
    adamax as make,
    apply_updates,
    convert_state,
)
from adamax.jax import compact  # isort: skip

KINDS = ("bfloat16", "8bit")
paths = pytest.mark.parametrize("path", PATHS)
kinds = pytest.mark.parametrize("kind", KINDS)


def parameters():
    return {"bias": jnp.ones(7), "table": jnp.ones((40, 6)), "weights": jnp.ones((20, 6))}


def gradients(rng, count=12):
    """The table gets rows, now and then all of them."""
    steps = []
    for number in range(count):
        g = IndexedSlices(
            jnp.asarray(values(rng, (9, 6), "float32")),
            jnp.asarray(rng.integers(-2, 43, size=9), jnp.int32),
        )
        dense = {
            name: jnp.asarray(values(rng, param.shape, "float32"))
            for name, param in parameters().items()
        }
        steps.append(dense if number % 5 == 4 else {**dense, "table": g})
    return steps


@functools.cache
def stepper(path, kind, learning_rate=0.01):
    return take_step(make(learning_rate, state_dtype=kind), path)


def train(path, kind, steps, params=None, state=None):
    params = parameters() if params is None else params
    state = make(0.01, state_dtype=kind).init(params) if state is None else state
    for each in steps:
        params, state = stepper(path, kind)(params, state, each)
    return params, state


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same_bits(a, b)


def sizes(tree):
    return {name: array.nbytes for name, array in tree.items()}


# --- Steps --------------------------------------------------------------------------------


@paths
def test_what_is_held_is_two_bytes_a_parameter_and_four_a_row(rng, path):
    _, (moments, _) = train(path, "8bit", gradients(rng, 5))
    assert isinstance(moments, CompactState)
    assert sizes(moments.mu) == {"bias": 7, "table": 240, "weights": 120}
    assert sizes(moments.nu) == sizes(moments.mu)
    assert sizes(moments.frame) == {"bias": 4, "table": 160, "weights": 80}
    assert all(array.dtype == np.int8 for array in moments.mu.values())
    assert all(array.dtype == np.uint8 for array in moments.nu.values())
    _, (moments, _) = train(path, "bfloat16", gradients(rng, 1))
    assert isinstance(moments, optax.ScaleByAdamState)
    assert sizes(moments.mu) == {"bias": 14, "table": 480, "weights": 240}


def test_by_default_the_state_is_that_of_optax():
    state = make(0.01).init(parameters())
    assert jax.tree.structure(state) == jax.tree.structure(
        optax.adamax(0.01).init(parameters())
    )


@paths
@kinds
def test_training_follows_float32(rng, path, kind):
    steps = gradients(rng, 60)
    expected, _ = train(path, "float32", steps)
    actual, _ = train(path, kind, steps)
    for name, array in expected.items():
        moved = np.sqrt(np.mean((array - 1) ** 2))
        assert np.sqrt(np.mean((actual[name] - array) ** 2)) < 0.2 * moved


@kinds
def test_updates_and_steps_are_the_same(rng, kind):
    """But where float32 rounds another way, and a code goes up instead of down."""
    steps = gradients(rng)
    by_step, of_step = train("step", kind, steps)
    by_update, of_update = train("update", kind, steps)
    for a, b in zip(by_step.values(), by_update.values(), strict=True):
        assert np.mean(abs(a - b) > 1e-6) < 0.02
        np.testing.assert_allclose(a, b, atol=2e-3)
    wide, other = (convert_state(state, "float32")[0] for state in (of_step, of_update))
    for name in parameters():
        different = abs(wide.nu[name] - other.nu[name]) > 1e-5 * wide.nu[name]
        assert np.mean(different) < 0.02


@paths
def test_the_numbers_are_those_of_numpy(rng, path):
    """``step`` has the same codes; of ``update`` XLA may round one another way."""
    steps = [jnp.asarray(values(rng, (40, 5), "float32")) for _ in range(12)]
    optimizer = adamax.Adamax(0.01, epsilon=1e-8, state_dtype="8bit")
    array, param = np.ones((40, 5), np.float32), jnp.ones((40, 5))
    # NumPy's has a frame for each row from the first gradient of rows on.
    none = adamax.IndexedSlices(np.zeros((40, 5), np.float32), np.arange(40))
    optimizer.apply_gradients([(none, array)])
    state = make(0.01, state_dtype="8bit").init(param)
    param, state = stepper(path, "8bit")(param, state, jnp.zeros((40, 5)))
    for g in steps:
        optimizer.apply_gradients([(np.asarray(g), array)])
        param, state = stepper(path, "8bit")(param, state, g)
    ours, theirs = state[0], optimizer.state_dict()
    different = 0 if path == "step" else 0.03
    assert np.mean(np.asarray(ours.mu) != theirs["0.m"]) <= different
    assert np.mean(np.asarray(ours.nu) != theirs["0.u"]) <= different
    np.testing.assert_allclose(ours.frame, theirs["0.frame"], atol=1e-6)
    assert np.mean(abs(np.asarray(param) - array) > 1e-6) <= different
    np.testing.assert_allclose(param, array, atol=2e-3)


@paths
@kinds
def test_runs_are_the_same_and_parameters_do_not_round_alike(rng, path, kind):
    steps = gradients(rng)
    assert_same(train(path, kind, steps), train(path, kind, steps))
    params = {name: jnp.ones((20, 6)) for name in ("one", "two")}
    state = make(0.01, state_dtype=kind).init(params)
    for each in steps[:5]:
        both = dict.fromkeys(params, each["weights"])
        params, state = stepper(path, kind)(params, state, both)
    assert (params["one"] != params["two"]).any()


@paths
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_only_touched_rows_change(rng, path, kind):
    optimizer = make(0.01, state_dtype=kind)
    step = stepper(path, kind)
    table = jnp.asarray(values(rng, (40, 6), "float32"))
    before = table, optimizer.init(table)
    before = step(*before, jnp.ones((40, 6)))
    ids = jnp.array([3, 39, 3, -1, 40], jnp.int32)
    after = step(*before, IndexedSlices(jnp.ones((5, 6)), ids))
    others = np.setdiff1d(np.arange(40), [3, 39])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if old.ndim:
            assert_same_bits(new[others], old[others])
            assert (new != old)[jnp.array([3, 39])].any()


@kinds
def test_large_tables_take_several_threads(rng, kind):
    w = jnp.ones((3000, 65))
    of_rows = IndexedSlices(
        jnp.asarray(values(rng, (4000, 65), "float32")),
        jnp.asarray(rng.integers(3000, size=4000), jnp.int32),
    )
    found = []
    for path in PATHS:
        param, state = w, make(0.01, state_dtype=kind).init(w)
        # The frames of some rows are others then.
        for g in (of_rows, jnp.zeros((3000, 65)) + of_rows):
            param, state = stepper(path, kind)(param, state, g)
        found.append((param, *jax.tree.leaves(state[0])[1:]))
    for ours, theirs in zip(*found, strict=True):
        assert np.mean(abs(ours - theirs.astype(ours.dtype)) > 1e-6) < 0.01


@kinds
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters_and_wider_gradients(rng, kind, dtype):
    w = jnp.asarray(values(rng, (30, 4), "float32"))
    steps = [jnp.asarray(values(rng, (30, 4), "float32")) for _ in range(5)]
    for path in PATHS:
        wide, narrow = w, w.astype(dtype)
        of_wide, of_narrow = (make(0.01, state_dtype=kind).init(x) for x in (wide, narrow))
        for g in steps:
            wide, of_wide = stepper(path, kind)(wide, of_wide, g)
            narrow, of_narrow = stepper(path, kind)(narrow, of_narrow, g)
        assert narrow.dtype == dtype
        assert_same(of_wide, of_narrow)
        np.testing.assert_allclose(wide, narrow.astype(jnp.float32), rtol=0.03, atol=0.01)


@paths
@kinds
def test_what_is_zero_or_not_finite(path, kind):
    w = jnp.ones((2, 4))
    state = make(0.1, state_dtype=kind).init(w)
    g = jnp.array([[0.0, np.nan, np.inf, -np.inf], [1.0, -1.0, 1e-30, 0.0]])
    after, state = stepper(path, kind, 0.1)(w, state, g)
    finite = [[True, False, False, False], [True] * 4]
    np.testing.assert_array_equal(np.isfinite(after), finite)
    assert after[0, 0] == after[1, 3] == 1.0
    moments = convert_state(state, "float32")[0]
    assert moments.mu[0, 0] == moments.nu[0, 0] == 0.0
    assert not np.isfinite(moments.nu[0, 1:]).any()
    after, state = stepper(path, kind, 0.1)(after, state, jnp.ones((2, 4)))
    np.testing.assert_array_equal(np.isfinite(after), finite)


@pytest.mark.parametrize("rate", [1e-3, optax.constant_schedule(1e-3)])
@pytest.mark.parametrize("of_rows", [False, True])
@paths
def test_bfloat16_parameters_move_with_stochastic_rounding(path, rate, of_rows):
    g = jnp.ones((100, 10))
    if of_rows:
        g = IndexedSlices(g, jnp.arange(100))
    for stochastic in (False, True):
        optimizer = make(rate, stochastic_rounding=stochastic)
        step, w = take_step(optimizer, path), jnp.ones((100, 10), jnp.bfloat16)
        state = optimizer.init(w)
        assert state[0].mu.dtype == jnp.float32
        for _ in range(100):
            w, state = step(w, state, g)
        assert w.dtype == jnp.bfloat16
        moved = 1 - float(w.astype(jnp.float32).mean())
        assert moved == pytest.approx(0.1 if stochastic else 0, rel=0.05)


def test_updates_without_jit_and_in_a_scan(rng):
    optimizer, w = make(0.01, state_dtype="8bit"), jnp.ones((6, 3))
    steps = jnp.asarray(values(rng, (4, 6, 3), "float32"))

    def step(carry, g):
        updates, state = optimizer.update(g, carry[1], carry[0])
        return (apply_updates(carry[0], updates), state), None

    start = w, optimizer.init(w)
    by_hand = functools.reduce(lambda carry, g: step(carry, g)[0], steps, start)
    scanned, _ = jax.lax.scan(step, start, steps)
    np.testing.assert_allclose(by_hand[0], scanned[0], atol=1e-3)


@paths
def test_mapped_steps_are_those_of_each(rng, path):
    optimizer, w = make(0.01, state_dtype="8bit"), jnp.ones((3, 6, 4))
    g = jnp.asarray(values(rng, (3, 6, 4), "float32"))
    state = jax.vmap(optimizer.init)(w)
    ours, of_ours = jax.vmap(stepper(path, "8bit"))(w, state, g)
    for i in range(3):
        theirs, of_theirs = stepper(path, "8bit")(w[i], optimizer.init(w[i]), g[i])
        np.testing.assert_allclose(ours[i], theirs, rtol=1e-6)
        of_one = of_ours[0].mu[i].astype(np.int32)
        assert abs(of_one - of_theirs[0].mu.astype(np.int32)).max() <= 1


def test_it_works_in_transformations_of_optax(rng):
    params = {"w": jnp.ones((6, 4)), "fixed": jnp.ones(3)}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(make(0.01, state_dtype="8bit"), {"w": True, "fixed": False}),
    )
    state = optimizer.init(params)
    g = {"w": jnp.ones((6, 4)), "fixed": jnp.zeros(3)}
    updates, state = jax.jit(optimizer.update)(g, state, params)
    np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)
    wide = convert_state(state, "float32")
    np.testing.assert_allclose(wide[1].inner_state[0].mu["w"], 0.1 / 24**0.5, rtol=0.15)
    again = convert_state(wide, "8bit")
    assert_same(again[1].inner_state[0].nu, state[1].inner_state[0].nu)

    single = make(0.01, state_dtype="8bit")
    doubled = optax.tree_map_params(single, lambda x: x + 1, single.init(params))
    assert (doubled[0].mu["w"] == 1).all()
    assert (doubled[0].frame["w"] == 0).all()


def test_injected_hyperparameters(rng):
    inject = optax.inject_hyperparams(make, static_args=("state_dtype",))
    optimizer, w = inject(learning_rate=0.01, state_dtype="8bit"), jnp.ones((6, 4))
    state = optimizer.init(w)
    for g in gradients(rng, 3):
        updates, state = jax.jit(optimizer.update)(g["weights"][:6, :4], state, w)
    assert state.inner_state[0].mu.dtype == np.int8
    assert abs(updates).max() < 0.0102


@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_steps_are_taken_in_place(kind):
    optimizer = make(0.01, state_dtype=kind, stochastic_rounding=True)
    params = {"b": jnp.ones(5, jnp.bfloat16), "t": jnp.ones((30, 4), jnp.bfloat16)}
    state = optimizer.init(params)
    g = {"b": jnp.ones(5), "t": IndexedSlices(jnp.ones((2, 4)), jnp.array([1, 5]))}
    step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.ndim]
    params, state = step(params, state, g)
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.ndim]
    assert before == after


# --- Checkpoints --------------------------------------------------------------------------


@paths
@kinds
def test_going_on_from_a_checkpoint_is_not_having_stopped(rng, path, kind):
    steps = gradients(rng, 8)
    expected = train(path, kind, steps)
    halfway = train(path, kind, steps[:5])
    saved = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, halfway)))
    assert_same(train(path, kind, steps[5:], *saved), expected)


@pytest.mark.parametrize("source", ["float32", *KINDS])
@pytest.mark.parametrize("target", ["float32", *KINDS])
def test_state_of_one_kind_becomes_one_of_another(rng, source, target):
    params, state = train("step", source, gradients(rng, 6))
    changed = convert_state(state, target)
    fresh = make(0.01, state_dtype=target).init(params)
    assert jax.tree.structure(changed) == jax.tree.structure(fresh)
    if source == target:
        assert_same(changed, state)
    expected, actual = (convert_state(x, "float32")[0] for x in (state, changed))
    of_norm = 2**0.1251 - 1 if target == "8bit" else 0.005
    of_moment = 1.1 * 1.25 / 127 if target == "8bit" else 0.0
    for name in params:
        m, u = expected.mu[name], expected.nu[name]
        np.testing.assert_allclose(actual.nu[name], u, rtol=of_norm)
        assert (abs(actual.mu[name] - m) <= of_moment * u + 0.005 * abs(m)).all()
    train("step", target, gradients(rng, 1), params, changed)


def test_a_state_of_optax_goes_on_in_8_bits(rng):
    params = parameters()
    stock = optax.adamax(0.01)
    g = gradients(rng, 5)[4]
    _, state = stock.update(g, stock.init(params), params)
    after, (moments, _) = train("step", "8bit", [g], params, convert_state(state, "8bit"))
    assert int(moments.count) == 2
    for name, array in after.items():
        np.testing.assert_allclose(abs(array - 1)[abs(g[name]) > 1e-6], 0.01, rtol=0.15)


# --- The mathematics ----------------------------------------------------------------------


def test_random_bits_are_those_of_the_core():
    for count in (1, 12345, 2**31 - 1):
        random = compact.random_of_leaves(jnp.int32(count), 5, True)
        assert random.shape == (5, 15)
        for leaf in range(5):
            seed = mathematics.seed_of(count, leaf)
            words = [seed % 2**32, seed >> 32, 1]
            assert np.asarray(random[leaf, :3]).tolist() == words
            for operand in range(6):
                ours = compact.random_bits(random[leaf], operand, compact.positions((7, 5)))
                numbers, of_gap = np.arange(35).reshape(7, 5), operand >= 3
                core = (seed ^ 2**64 - 1, operand - 3) if of_gap else (seed, operand)
                assert_same_bits(ours, mathematics.random_bits(*core, numbers))


def test_codes_are_those_of_the_core(rng):
    u = (2.0 ** rng.uniform(-45, 30, (50, 40))).astype(np.float32)
    u[0, :4] = 0.0, np.inf, np.nan, 1e38
    m = (u * rng.uniform(-1.2, 1.2, u.shape)).astype(np.float32)
    m[1, :3] = np.nan, np.inf, -np.inf
    frame = rng.uniform(size=50).astype(np.float32)
    random = rng.integers(2**16, size=u.shape).astype(np.uint32)
    ours = jax.jit(compact.encode)(m, u, frame, random)
    theirs = mathematics.encode(m, u, frame[:, None], random)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert np.mean(np.asarray(a) != b) < 0.002
        assert abs(np.asarray(a, np.int32) - b).max() <= 1
    decoded = jax.jit(compact.decode)(*theirs, frame)
    for a, b in zip(decoded, mathematics.decode(*theirs, frame[:, None]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_every_norm_that_decays_keeps_its_code():
    codes = jnp.arange(1, 255, dtype=jnp.uint8)
    decay, frame = jnp.float32(0.999), jnp.zeros(1)
    rest = 0.999 - float(decay)

    @jax.jit
    def step(codes, frame):
        m, u = compact.decode(jnp.zeros(254, jnp.int8), codes, frame)
        frame = compact.frame_after(frame, decay, rest)
        return compact.encode(m, decay * u, frame)[1], frame

    now, expected = codes, np.zeros(1, np.float32)
    for _ in range(500):
        now, frame = step(now, frame)
        expected = mathematics.frame_after(expected, 0.999)
        np.testing.assert_allclose(frame, expected, atol=2e-6)
    assert_same_bits(now[2:], codes[2:] - 2)


def test_frames_of_other_decays():
    frames = np.linspace(0, 0.999, 50, dtype=np.float32)
    for decay in (0.0, 0.1, 0.5, 0.9, 0.99999):
        ours = compact.frame_after(frames, jnp.float32(decay))
        theirs = mathematics.frame_after(frames, np.float32(decay))
        apart = np.asarray(ours) - theirs if decay else ours
        assert (abs(apart - np.round(apart)) < 2e-6).all()
        assert ((ours >= 0) & (ours < 1)).all()


def test_bfloat16_is_rounded_as_in_the_core(rng):
    numbers = rng.normal(size=1000).astype(np.float32)
    numbers[:4] = np.nan, np.inf, -np.inf, np.finfo(np.float32).max
    random = rng.integers(2**16, size=1000).astype(np.uint32)
    ours = jax.jit(compact.round_bfloat16)(numbers, random)
    assert_same_bits(
        np.asarray(ours).view(np.uint16), mathematics.round_bfloat16(numbers, random)
    )


# --- Errors -------------------------------------------------------------------------------


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"^state_dtype must be one of .*, got 'int8'$"):
        make(0.1, state_dtype="int8")
    with pytest.raises(TypeError, match=r"^stochastic_rounding must be a bool, got 1$"):
        make(0.1, stochastic_rounding=1)
    with pytest.raises(ValueError, match=r"needs .* for b1 and b2 of 0\.9 and 0\.5$"):
        make(0.1, b2=0.5, state_dtype="8bit")
    make(0.1, b2=jnp.float32(0.5), state_dtype="8bit")  # may be traced
    optimizer = make(0.1, state_dtype="8bit")
    with pytest.raises(ValueError, match=r"of at most 32 bits, got complex64 at \['z'\]$"):
        optimizer.init({"z": jnp.ones(3, np.complex64)})
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"of at most 32 bits, got float64$"),
    ):
        make(0.1, state_dtype="bfloat16").init(jnp.ones(3, np.float64))
    w = jnp.ones(3, jnp.bfloat16)
    optimizer = make(0.1, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"^with stochastic_rounding the parameters must"):
        optimizer.update(w, optimizer.init(w))


def changed(**parts):
    w = jnp.ones((4, 3))
    moments, of_rate = make(0.1, state_dtype="8bit").init(w)
    return w, (moments._replace(**parts), of_rate)


@paths
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mu": jnp.zeros((4, 3))}, r"^mu in the state must be int8 .*convert_state"),
        ({"nu": jnp.zeros((4, 3), jnp.int8)}, r"^nu in the state must be uint8 of shape"),
        ({"mu": jnp.zeros((4, 2), jnp.int8)}, r"of shape \(4, .*int8 of shape \(4, "),
        ({"frame": jnp.zeros(3)}, r"shape \(1,\) or \(4,\), .* float32 of shape \(3,\)"),
        ({"frame": jnp.zeros(4, jnp.int32)}, r"^frame in the state must be float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(path, parts, message):
    w, state = changed(**parts)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(take_step(make(0.1, state_dtype="8bit"), path), w, state, w)


@paths
def test_a_state_of_another_kind_is_refused(path):
    w = jnp.ones((4, 3))
    for source in ("float32", *KINDS):
        state = make(0.1, state_dtype=source).init(w)
        for target in ("float32", *KINDS):
            if source == target or (source, target) == ("bfloat16", "float32"):
                continue  # 16-bit state becomes float32, as that of any optimizer
            step = take_step(make(0.1, state_dtype=target), path)
            with pytest.raises(ValueError, match=rf"convert_state\(state, '{target}'\)"):
                jax.eval_shape(step, w, state, w)
            step(w, convert_state(state, target), w)


@paths
def test_rows_of_a_parameter_with_one_frame_are_refused(path):
    optimizer, w = make(0.1, state_dtype="8bit"), jnp.ones(5)
    g = IndexedSlices(jnp.ones(2), jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"shape \(5,\) has 1; .* such as \(5, 1\)"):
        jax.eval_shape(take_step(optimizer, path), w, optimizer.init(w), g)
    w, state = changed(frame=jnp.zeros(1))
    g = IndexedSlices(jnp.ones((1, 3)), jnp.array([1]))
    with pytest.raises(ValueError, match=r"shape \(4, 3\) has 1; .* convert_state"):
        jax.eval_shape(take_step(optimizer, path), w, state, g)
    step = take_step(optimizer, path)
    step(w, state, w)  # a gradient of the whole is fine
    step(w, convert_state(convert_state(state, "float32"), "8bit"), g)


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match=r"^state_dtype must be one of .*, got 'int8'$"):
        convert_state(make(0.1).init(jnp.ones(3)), "int8")
    with pytest.raises(TypeError, match=r"^state must have an .*, got EmptyState$"):
        convert_state(optax.EmptyState(), "8bit")
    z = make(0.1).init({"z": jnp.ones(3, np.complex64)})
    with pytest.raises(ValueError, match=r"got complex64 and complex64 at \['z'\]$"):
        convert_state(z, "8bit")
