"""Compact state: the codes, their bounds, and the verbs on them, bit for bit."""

import math

import ml_dtypes
import numpy as np
import pytest

from adamax._core import compact
from adamax._core.exact import History
from cases import PRECISION, values
from compare import assert_same_bits
from numpy_cases import LAYOUTS
from verbs import IMPLEMENTATIONS, INF, NATIVE, Using, scalars

KINDS = ("bfloat16", "8bit")
W_DTYPES = ("float32", "float16", "bfloat16")
BETA_2 = 0.999


@pytest.fixture(params=IMPLEMENTATIONS)
def verbs(request):
    with Using(request.param) as implementation:
        yield implementation


def state_dtypes(kind):
    if kind == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.int8), np.dtype(np.uint8)


class State:
    """w, m, u and the frame, which steps write to."""

    def __init__(self, w, kind, frames=1, layout=None):
        make = layout or (lambda shape, dtype: np.zeros(shape, dtype))
        self.w, self.kind = w, kind
        self.m, self.u = (make(w.shape, dtype) for dtype in state_dtypes(kind))
        self.frame = np.zeros(frames, np.float32) if kind == "8bit" else None

    def moments(self):
        if self.kind == "bfloat16":
            return self.m.astype(np.float32), self.u.astype(np.float32)
        frame = self.frame
        if len(frame) > 1:
            frame = frame.reshape(-1, *(1,) * (self.w.ndim - 1))
        return compact.decode(self.m, self.u, frame)

    def arrays(self):
        parts = [self.w, self.m, self.u]
        return parts if self.frame is None else [*parts, self.frame]


def dense(verbs, state, g, seed, threads=1, **chosen):
    row = scalars(seed=seed, **chosen)[None]
    frames = None if state.frame is None else [state.frame]
    columns = [state.w], [state.m], [state.u], [g]
    return verbs.step(*columns, row, frames, (), (), INF, INF, threads)


def rows(verbs, state, ids, g, seed, exact=None, threads=1, **chosen):
    row = scalars(seed=seed, **chosen)
    part = (state.w, state.m, state.u, ids, g, row, state.frame, exact)
    return verbs.step((), (), (), (), row[None], None, [part], (), INF, INF, threads)


# --- Codes --------------------------------------------------------------------------------


def half(shape):
    return np.full(shape, 1 << 15, np.uint32)


def test_norms_are_within_half_a_code(rng):
    u = np.exp2(rng.uniform(-39, 23, 10_000)).astype(np.float32)
    for frame in np.float32([0, 0.25, 0.999]):
        codes = compact.encode(u * 0, u, frame[None], half(u.shape))
        _, decoded = compact.decode(*codes, frame[None])
        ratio = decoded / u
        assert ratio.max() < 2**0.12501
        assert ratio.min() > 2**-0.12501


def test_moments_are_right_on_average_and_within_a_level(rng):
    u = np.full(100_000, 2.0, np.float32)
    m = rng.uniform(-1.01, 1.01, u.shape).astype(np.float32) * u
    random = compact.random_bits(7, 1, np.arange(u.size))
    decoded, _ = compact.decode(
        *compact.encode(m, u, np.float32([0.3]), random), np.float32([0.3])
    )
    level = 2.0 * 1.25 / 127 * 2**0.126
    assert np.abs(decoded - m).max() < level * 1.001
    assert abs((decoded - m).mean()) < 4 * level / math.sqrt(12 * u.size)


def test_a_norm_that_decays_is_never_rounded_again(verbs):
    state = State(np.zeros(400, np.float32), "8bit")
    g = np.exp2(np.linspace(-8, 8, 400)).astype(np.float32)
    assert dense(verbs, state, g, 1) is None
    _, first = state.moments()
    for step in range(3000):
        assert dense(verbs, state, g * 0, step + 2, one_minus_beta_1=0.5) is None
    _, last = state.moments()
    np.testing.assert_allclose(last, first * BETA_2**3000.0, rtol=1e-4)


def test_the_ratio_of_moments_never_saturates(verbs, rng):
    """Gradients that grow as fast as norms decay make the largest ratio."""
    state = State(np.zeros(64, np.float32), "8bit")
    for step in range(300):
        g = np.full(64, BETA_2 ** (300 - step), np.float32) * np.exp2(rng.uniform(0, 0.01))
        assert dense(verbs, state, g, step + 1) is None
    m, u = state.moments()
    assert (m / u).max() < compact.largest_ratio(0.9, BETA_2) * 2**0.126
    assert np.abs(state.m).max() < 127


def test_what_is_not_finite_reaches_parameters_as_with_float32(verbs):
    g = np.float32([math.nan, math.inf, -math.inf, 1.0, 0.0])
    for kind in KINDS:
        state = State(np.zeros(5, np.float32), kind)
        full = [np.zeros(5, np.float32) for _ in range(3)]
        for step, gradient in enumerate(
            (g, np.ones(5, np.float32), np.zeros(5, np.float32))
        ):
            assert dense(verbs, state, gradient, step + 1) is None
            columns = [[x] for x in (*full, gradient)]
            row = scalars()[None]
            assert verbs.step(*columns, row, None, (), (), INF, INF, 1) is None
            np.testing.assert_array_equal(np.isnan(state.w), np.isnan(full[0]))
        assert np.isnan(state.w[:3]).all()
        assert np.isfinite(state.w[3:]).all()


def test_the_ends_of_the_range(verbs):
    g = np.float32([1e-45, 1e-13, 1e9, -3e38, 0.0])
    state = State(np.zeros(5, np.float32), "8bit")
    assert dense(verbs, state, g, 1, epsilon=0.0) is None
    # The first step does not read the state: all move alike.
    np.testing.assert_allclose(state.w[[1, 2, 3]], [-1e-3, -1e-3, 1e-3], rtol=1e-3)
    m, u = state.moments()
    assert u.tolist()[:2] == [0, 0]  # too small: stored as 0, and m too
    assert m.tolist()[:2] == [0, 0]
    assert u[2] == u[3] == pytest.approx(2**23.5, rel=0.01)  # too large: the largest
    for step in range(20):
        assert dense(verbs, state, g, step + 2, epsilon=0.0) is None
    assert np.isfinite(state.w).all()
    assert (np.sign(state.w) == -np.sign(g))[1:].all()
    assert state.w[4] == 0


def test_zero_gradients_change_nothing(verbs):
    for kind in KINDS:
        state = State(np.ones(300, np.float32), kind)
        for step in range(5):
            assert dense(verbs, state, np.zeros(300, np.float32), step + 1) is None
        assert (state.w == 1).all()
        assert not np.any(np.asarray(state.m, np.float32))
        assert not np.any(np.asarray(state.u, np.float32))


def test_betas_whose_ratio_is_not_bounded_raise():
    compact.check_betas(0.9, 0.99)
    compact.check_betas(0.0, 0.0)
    for betas in ((0.9, 0.9), (0.99, 0.9), (0.9, 0.95)):
        with pytest.raises(ValueError, match=r"^state_dtype='8bit' needs .* at most 1\.25"):
            compact.check_betas(*betas)


# --- The verbs ----------------------------------------------------------------------------


@pytest.mark.skipif(not NATIVE, reason="the native core was not built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", W_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_steps_have_the_same_bits_everywhere(rng, tmp_path, kind, dtype, layout):
    make = lambda shape, d: LAYOUTS[layout](shape, d, tmp_path)[1]  # noqa: E731
    results = []
    start = values(rng, (7, 300), dtype)
    gradients = [values(rng, (7, 300), "float32") for _ in range(6)]
    for implementation in IMPLEMENTATIONS:
        w = make(start.shape, PRECISION[dtype].dtype)
        w[...] = start
        state = State(w, kind, layout=make)
        with Using(implementation) as verbs:
            for step, g in enumerate(gradients):
                chosen = {"seed": step + 1, "beta_2": 0.9 if step == 3 else 0.999}
                assert dense(verbs, state, g, stochastic=step % 2, **chosen) is None
        results.append([np.array(x) for x in state.arrays()])
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.skipif(not NATIVE, reason="the native core was not built")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_scalars_have_the_same_bits_everywhere(kind):
    results = []
    for implementation in IMPLEMENTATIONS:
        state = State(np.ones((), np.dtype(ml_dtypes.bfloat16)), kind)
        with Using(implementation) as verbs:
            for step in range(4):
                g = np.array(0.3 - step, np.float32)
                assert dense(verbs, state, g, step + 1, stochastic=1.0) is None
        results.append([np.array(x) for x in state.arrays()])
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.skipif(not NATIVE, reason="the native core was not built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", W_DTYPES)
def test_exact_steps_of_rows_have_the_same_bits_everywhere(kind, dtype):
    results = []
    for implementation in IMPLEMENTATIONS:
        generator = np.random.default_rng(3)
        history = History(0.9, BETA_2, "float32", entries=10)
        state = State(values(generator, (500, 5), dtype), kind, frames=500)
        stamps = np.zeros(500, np.uint32)
        of_table = state.w, state.m, state.u, state.frame, stamps, history.arrays
        with Using(implementation) as verbs:
            for step in range(150):
                ids = generator.integers(500, size=30)
                g = values(generator, (30, 5), "float32")
                verbs.catch_up_rows((*of_table, 1e-7, step, True), ids, 2)
                recorded = history.recorded(1e-3, 0.99, 0.9, BETA_2, all_current=step == 0)
                exact = stamps, *history.arrays, *recorded
                chosen = {"step_size": 1e-3, "decay": 0.99, "stochastic": 1.0}
                assert rows(verbs, state, ids, g, step + 1, exact, 2, **chosen) is None
            verbs.catch_up_range((*of_table, 1e-7, 150, True), 0, 500, 2)
        results.append([*map(np.array, state.arrays()), stamps.copy()])
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_threads(verbs, rng, kind):
    w, g = values(rng, (400_000,), "float32"), values(rng, (400_000,), "float32")
    table, ids = values(rng, (5000, 64), "float32"), rng.integers(5000, size=8000)
    of_rows = values(rng, (8000, 64), "float32")
    results = []
    for threads in (1, 2, 5):
        state, rows_state = State(w.copy(), kind), State(table.copy(), kind, frames=5000)
        for step in range(2):
            assert dense(verbs, state, g, step + 1, threads) is None
            assert rows(verbs, rows_state, ids, of_rows, step + 1, None, threads) is None
        results.append([*state.arrays(), *rows_state.arrays()])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_rows_keep_every_bit(verbs, rng, kind):
    state = State(values(rng, (50, 3), "float32"), kind, frames=50)
    for step in range(4):
        before = [x.copy() for x in state.arrays()]
        ids = rng.integers(50, size=6)
        g = values(rng, (6, 3), "float32")
        assert rows(verbs, state, ids, g, step + 1) is None
        untouched = np.setdiff1d(np.arange(50), ids)
        for actual, expected in zip(state.arrays(), before, strict=True):
            assert_same_bits(actual[untouched], expected[untouched])
            assert (actual[ids] != expected[ids]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_compact_state_stays_near_float32(verbs, rng, kind):
    """A single step from the same moments differs by their rounding alone."""
    state = State(np.zeros((64, 64), np.float32), kind)
    full = [np.zeros((64, 64), np.float32) for _ in range(3)]
    scale = np.exp2(rng.uniform(-8, 4, (64, 64)))
    for step in range(200):
        g = (rng.normal(size=(64, 64)) * scale).astype(np.float32)
        size = 1e-3 / (1 - 0.9 ** (step + 1))
        assert dense(verbs, state, g, step + 1, step_size=size) is None
        columns, row = [[x] for x in (*full, g)], scalars(step_size=size)[None]
        assert verbs.step(*columns, row, None, (), (), INF, INF, 1) is None
    moved = np.sqrt(np.mean(full[0] ** 2))
    error = np.sqrt(np.mean((state.w - full[0]) ** 2))
    assert error < 0.2 * moved
    assert abs((state.w - full[0]).mean()) < 0.01 * moved


def test_parameters_in_bfloat16_move_by_less_than_half_a_unit_on_average(verbs):
    moved = {}
    for stochastic in (0.0, 1.0):
        state = State(np.ones(4000, np.dtype(ml_dtypes.bfloat16)), "8bit")
        for step in range(100):
            size = 1e-3 / (1 - 0.9 ** (step + 1))
            g = np.ones(4000, np.float32)
            chosen = {"step_size": size, "stochastic": stochastic}
            assert dense(verbs, state, g, step + 1, **chosen) is None
        moved[stochastic] = 1 - float(state.w.astype(np.float32).mean())
    assert moved[0.0] == 0
    assert moved[1.0] == pytest.approx(0.1, rel=0.02)


# --- What does not fit --------------------------------------------------------------------

FRAME = 6


def unfit_state(what):
    state = State(np.ones((4, 3), np.float32), "8bit", frames=4 if "rows" in what else 1)
    if what == "no frame":
        state.frame = None
    elif "length" in what:
        state.frame = np.zeros(3, np.float32)
    elif what == "float64 frame":
        state.frame = np.zeros(1)
    elif what == "read-only frame":
        state.frame.flags.writeable = False
    elif what == "m and u of two kinds":
        state.u = np.zeros((4, 3), np.float32)
    elif what == "float64 parameter":
        state.w = np.ones((4, 3))
    elif what == "signed norms":
        state.u = np.zeros((4, 3), np.int8)
    return state


@pytest.mark.parametrize(
    ("what", "operand"),
    [
        ("no frame", FRAME),
        ("a frame of another length", FRAME),
        ("float64 frame", FRAME),
        ("read-only frame", FRAME),
        ("m and u of two kinds", 2),
        ("float64 parameter", 1),
        ("signed norms", 2),
    ],
)
def test_state_that_does_not_fit_is_a_problem_and_changes_nothing(verbs, what, operand):
    state = unfit_state(what)
    before = [np.array(x) for x in state.arrays()]
    assert dense(verbs, state, np.ones((4, 3), np.float32), 1) == ("unfit", 0, operand, 0)
    for actual, expected in zip(state.arrays(), before, strict=True):
        assert_same_bits(actual, expected)


def test_rows_need_a_frame_each(verbs):
    state = unfit_state("rows of another length")
    ids, g = np.array([1]), np.ones((1, 3), np.float32)
    assert rows(verbs, state, ids, g, 1) == ("unfit", 0, FRAME, 0)
    full = np.ones((3, 4, 3), np.float32)
    problem = verbs.step(
        *([x] for x in (*full, full[0] * 2)),
        scalars()[None],
        [np.zeros(1, np.float32)],
        (),
        (),
        INF,
        INF,
        1,
    )
    assert problem == ("unfit", 0, FRAME, 0)  # a frame where there is no 8-bit state


def test_the_reference_agrees_with_closed_forms():
    frame = compact.frame_after(np.float32([0.9]), 0.5)
    assert frame == np.float32(0.9)  # a whole octave
    np.testing.assert_allclose(
        compact.frame_factor(np.float32([0, 0.3, 0.99])),
        np.exp2(np.array([0, np.float32(0.3), np.float32(0.99)]) / 4),
        rtol=1e-14,
    )
