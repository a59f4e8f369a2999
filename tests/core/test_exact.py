"""The mathematics of ``sparse="exact"``, and the verbs that carry it out."""

import functools
import math

import numpy as np
import pytest

from adamax._core.exact import STEPS, Expansion, History, HistoryFull, gaps
from adamax._core.kernels import state_dtype
from cases import DTYPES, PRECISION, values
from compare import assert_same_bits
from exact_cases import EPSILON, FLOAT64
from numpy_cases import LAYOUTS
from verbs import IMPLEMENTATIONS, INF, Using, scalars

BETAS = {
    "float32": [(0.9, 0.999), (0.5, 0.9), (0.9, 0.98), (0.99, 0.999), (0.0, 0.0)],
    "float64": [(0.9, 0.999), (0.8, 0.99), (0.99, 0.9999), (0.0, 0.5)],
}
REFUSED = [
    (0.9, 0.9, "float32"),
    (0.99, 0.9, "float32"),
    (0.9, 0.0, "float32"),
    (0.99, 0.99, "float64"),
    (0.95, 0.99, "float64"),
    (0.9999, 0.99999, "float32"),
]


# --- How many terms -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "betas"), [(d, b) for d, several in BETAS.items() for b in several]
)
def test_the_series_is_as_exact_as_the_dtype(dtype, betas):
    """For any x, and learning rates that are constant, rise or fall within the gap."""
    beta_1, beta_2 = betas
    expansion = Expansion.of(beta_1, beta_2, dtype)
    assert expansion.weights.shape == (expansion.window, expansion.terms)
    if not beta_1:
        return
    j = np.arange(1, 4 * expansion.window)
    x = np.concatenate([np.linspace(0, 1, 101), 1 - np.geomspace(1e-16, 1e-2, 50)])
    for rates in (np.ones(j.size), np.minimum(j / 100, 1), 0.99**j):
        # 1 - q x without cancellation: (1 - x) + x * beta_2**j
        terms = rates * beta_1**j / ((1 - x)[:, None] + x[:, None] * beta_2**j)
        exact = np.array([math.fsum(row) for row in terms])
        sums = rates[: expansion.window] @ expansion.weights
        series = np.polynomial.chebyshev.chebval(2 * x - 1, sums)
        largest = np.max(rates) * beta_1 / (1 - beta_1)
        limit = 16 * PRECISION[dtype].roundoff * np.maximum(exact, largest)
        assert (np.abs(series - exact) <= limit).all()


def test_usual_betas_need_few_terms():
    assert Expansion.of(0.9, 0.999, "float32").terms == 5
    assert Expansion.of(0.9, 0.999, "float64").terms == 9


@pytest.mark.parametrize(("beta_1", "beta_2", "dtype"), REFUSED)
def test_betas_for_which_it_would_take_too_many_are_refused(beta_1, beta_2, dtype):
    expected = rf"^sparse='exact' needs .* got beta_1={beta_1} and .*sparse='lazy'"
    with pytest.raises(ValueError, match=expected):
        Expansion.of(beta_1, beta_2, dtype)


def test_errors_have_the_names_of_the_front_end():
    names = {"beta_1": "betas[0]", "beta_2": "betas[1]"}
    with pytest.raises(ValueError, match=r"got betas\[0\]=0.9 and betas\[1\]=0.5"):
        Expansion.of(0.9, 0.5, "float32", names)


# --- Any gap, any schedule ----------------------------------------------------------------

RATES = {
    "constant": lambda t, last: 1e-3,
    "warm-up and cosine": lambda t, last: (
        1e-2 * min(t / (last / 2), 1) * (1 + math.cos(math.pi * t / last))
    ),
    "none": lambda t, last: 0.0,
    "now and then": lambda t, last: 1e-2 * (t % 10 == 0),
    "late": lambda t, last: 1e-2 * (t > last - 5),
    "jumps": lambda t, last: 10.0 ** -(t // 7 % 5),
}
DECAYS = {
    "none": lambda t, last: 1.0,
    "small": lambda t, last: 1 - 1e-4,
    "large": lambda t, last: 0.5,
    "all of it, once": lambda t, last: 0.0 if t == last - 70 else 0.99,
    "negative": lambda t, last: -1.5 if t % 100 == 0 else 0.99,
}


def record(history, *settings, all_current=False):
    history.commit(history.recorded(*settings, all_current=all_current))


def catch_up(verbs, w, m, u, behind, history, threads=2):
    """All rows, in place."""
    stamps = (history.steps - behind).astype(np.uint32)
    given = w, m, u, None, stamps, history.arrays, EPSILON, 0, False
    assert verbs.catch_up_range(given, 0, len(w), threads) == np.count_nonzero(behind)
    assert (stamps == np.uint32(history.steps % 2**32)).all()


def assert_dense_over_gaps(dtype, gaps, betas_at, rate, decay, verbs=IMPLEMENTATIONS[0]):
    """Rows with these gaps, descending, are where the dense rule takes them."""
    gaps = np.asarray(gaps)
    steps = int(gaps[0])
    rng = np.random.default_rng(steps)
    shape = (gaps.size, 5)
    w = (0.05 * rng.normal(size=shape)).astype(dtype)
    m = (rng.normal(size=shape) * 10.0 ** rng.uniform(-9, 3, shape)).astype(dtype)
    u = np.abs(m * rng.uniform(1, 3, shape).astype(dtype))
    u[:, 0] = np.abs(m[:, 0])
    m[:, 1] = 0
    w[:, 2] = 0
    wide = np.longdouble if dtype == "float64" else np.float64
    start = np.abs(m), np.abs(u)
    W, M, U = (array.astype(wide) for array in (w, m, u))  # noqa: N806
    size = np.abs(W)
    history = History(*betas_at(1), dtype, entries=steps + 1)
    for t in range(1, steps + 1):
        behind = slice(0, np.searchsorted(-gaps, -(steps - t), side="left"))
        beta_1, beta_2 = betas_at(t)
        factor, a = decay(t, steps), rate(t, steps)
        record(history, a, factor, beta_1, beta_2)
        M[behind] *= beta_1
        U[behind] *= beta_2
        move = a * M[behind] / (U[behind] + EPSILON)
        W[behind] = factor * W[behind] - move
        size[behind] = np.maximum(abs(factor) * size[behind], abs(W[behind])) + abs(move)
    with Using(verbs) as chosen:
        catch_up(chosen, w, m, u, gaps, history)
    relative = FLOAT64 if dtype == "float64" else 16 * PRECISION[dtype].roundoff
    # What is left out: moves that are this small beside all at the largest learning rate.
    largest = max(rate(t, steps) for t in range(1, steps + 1))
    loss = {"float32": 2.0**-30, "float64": 2.0**-54}[dtype]
    lost = loss * largest * max(1.0, *(1 / (1 - betas_at(t)[0]) for t in (1, steps)))
    tiny = 4 * PRECISION[dtype].smallest
    for name, actual, expected, error in (
        ("m", m, M, relative * np.abs(M) + tiny * np.maximum(1, start[0])),
        ("u", u, U, relative * np.abs(U) + tiny * np.maximum(1, start[1])),
        ("w", w, W, relative * size + lost + tiny),
    ):
        excess = np.abs(actual - expected) - error
        where = np.unravel_index(np.argmax(excess), shape)
        assert (excess <= 0).all(), (name, gaps[where[0]], actual[where], expected[where])


def constant(betas):
    return lambda t: betas


EVERY_GAP = np.arange(400, -1, -1)


@pytest.mark.parametrize("verbs", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_gap_from_0_to_400(dtype, decay, rate, verbs):
    betas = constant((0.9, 0.999))
    assert_dense_over_gaps(dtype, EVERY_GAP, betas, RATES[rate], DECAYS[decay], verbs)


@pytest.mark.parametrize(
    ("dtype", "betas"), [(d, b) for d, several in BETAS.items() for b in several]
)
def test_every_gap_with_other_betas(dtype, betas):
    rate, decay = RATES["warm-up and cosine"], DECAYS["small"]
    assert_dense_over_gaps(dtype, EVERY_GAP, constant(betas), rate, decay)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", ["none", "small", "negative"])
def test_long_gaps(dtype, decay):
    gaps = [100_000, 99_999, 65_537, 10_000, 1000, 1]
    rate = RATES["warm-up and cosine"]
    assert_dense_over_gaps(dtype, gaps, constant((0.9, 0.999)), rate, DECAYS[decay])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_betas_may_change_from_step_to_step(dtype):
    def cycled(t):  # as torch's OneCycleLR does, and b_2 beside it; 0 once
        if t == 300:
            return 0.0, 0.999
        return 0.9 - 0.05 * math.sin(t / 50), 0.999 - 5e-4 * (t % 3 == 0)

    rate, decay = RATES["warm-up and cosine"], DECAYS["small"]
    assert_dense_over_gaps(dtype, np.arange(600, -1, -1), cycled, rate, decay)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("betas", [(0.95, 0.999), (0.9, 0.995), (0.95, 0.995)])
def test_betas_that_need_more_terms_and_a_longer_window_later(dtype, betas):
    """The history grows, with the entries that it has."""
    few, more = ((0.5, 0.999), betas)
    grown, enough = (History(*b, dtype, entries=10) for b in (few, more))
    assert grown.terms < enough.terms or grown.window < enough.window

    def at(t):
        return few if t <= 250 else more

    rate, decay = RATES["warm-up and cosine"], DECAYS["small"]
    assert_dense_over_gaps(dtype, np.arange(600, -1, -1), at, rate, decay)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_of_betas_that_need_too_many_terms_together(dtype):
    """Each pair may be had, but not the largest beta_1 with the smallest beta_2."""
    low, high = (
        ((0.5, 0.9), (0.99, 0.9999))
        if dtype == "float32"
        else ((0.5, 0.97), (0.99, 0.9999))
    )
    history = History(*low, dtype, entries=10)
    history.check_betas(*high)
    record(history, 1e-3, 1.0, *low)
    before = [array.copy() for array in history.arrays]
    with pytest.raises(HistoryFull):
        history.recorded(1e-3, 1.0, *high, all_current=False)
    for array, copy in zip(history.arrays, before, strict=True):
        assert_same_bits(array, copy)
    record(history, 1e-3, 1.0, *high, all_current=True)
    assert history.start == 1
    with pytest.raises(ValueError, match=r"got beta_1=0.9 and beta_2=0.5"):
        history.check_betas(0.9, 0.5)


def test_a_step_that_is_not_committed_has_not_been_taken():
    history = History(0.9, 0.999, "float64", entries=10)
    for _ in range(5):
        record(history, 1e-3, 0.9, 0.9, 0.999)
    steps = np.arange(6)
    before = gaps(*history.arrays, steps)
    for betas in ((0.9, 0.999), (0.8, 0.999), (0.9, 0.99)):
        history.recorded(1e-3, 0.9, *betas, all_current=False)
    assert history.steps == 5
    for one, expected in zip(gaps(*history.arrays, steps), before, strict=True):
        assert_same_bits(one[:, : expected.shape[1]], expected)
    other = History(0.9, 0.999, "float64", entries=10)
    for _ in range(6):
        record(other, 1e-3, 0.9, 0.9, 0.999)
    record(history, 1e-3, 0.9, 0.9, 0.999)
    last = np.arange(7)
    for one, expected in zip(
        gaps(*history.arrays, last), gaps(*other.arrays, last), strict=True
    ):
        np.testing.assert_allclose(one[:, : expected.shape[1]], expected, rtol=1e-12)


def test_products_do_not_leave_the_range_of_numbers():
    """100,000 steps that halve w, which float64 could not hold the product of."""
    history = History(0.9, 0.999, "float64", entries=100_000)
    for _ in range(100_000):
        record(history, 1e-3, 0.5, 0.9, 0.999)
    last = history.steps - np.array([0, 1, 3, 5000])
    _, factors = gaps(*history.arrays, last)
    assert factors[:, 0].tolist() == [1.0, 0.5, 0.125, 0.0]
    np.testing.assert_allclose(factors[:3, 2], [1, 0.999, 0.999**3], rtol=1e-12)


# --- The native verbs are the reference ---------------------------------------------------


def table(rng, dtype, rows, length):
    state = PRECISION[dtype].state
    w = values(rng, (rows, length), dtype)
    m = values(rng, (rows, length), "float32").astype(state)
    u = np.abs(values(rng, (rows, length), "float32")).astype(state)
    for array, special in ((m, np.nan), (u, np.inf), (m, np.inf), (u, np.nan)):
        array[rng.integers(rows, size=3)] = special
    u[:3], m[:3] = 0, 0
    return w, m, u


@functools.cache
def long_history(betas, dtype):
    history = History(*betas, dtype, entries=2000)
    history.clock[STEPS] = 2**33 + 3 - 1900
    history.restart()
    for t in range(1900):
        record(history, 1e-3 * (t % 7), 0.0 if t == 700 else 0.999, *betas)
    return history


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 64, 101, 600])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99), (0.0, 0.3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [EPSILON, 0.0])
def test_native_verbs_are_the_reference(rng, dtype, betas, length, threads, epsilon):
    rows = 997
    history = long_history(betas, state_dtype(PRECISION[dtype].state))
    now = history.steps
    start = table(rng, dtype, rows, length)
    behind = rng.integers(0, 1900, rows)
    behind[:4] = 0, 1, 1900, 0
    before = ((now - behind) % 2**32).astype(np.uint32)
    ids = rng.integers(rows, size=700)
    results = []
    for implementation in IMPLEMENTATIONS:
        w, m, u = (array.copy() for array in start)
        stamps = before.copy()
        given = w, m, u, None, stamps, history.arrays, epsilon, 0, False
        with Using(implementation) as verbs:
            count = verbs.catch_up_rows(given, ids, threads)
            assert count == np.count_nonzero(behind[np.unique(ids)])
            assert (stamps[ids] == now % 2**32).all()
            untouched = np.setdiff1d(np.arange(rows), ids)
            assert (stamps[untouched] == before[untouched]).all()
            for array, other in zip((w, m, u), start, strict=True):
                assert_same_bits(array[untouched], other[untouched])
            assert verbs.catch_up_rows(given, ids, threads) == 0
            verbs.catch_up_range(given, 5, rows - 5, threads)
        assert (stamps[5:-5] == now % 2**32).all()
        beside = np.setdiff1d([0, 1, 2, 3, 4, rows - 1], ids)
        assert (stamps[beside] == before[beside]).all()
        results.append((w, m, u, stamps))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "F", "strided", "misaligned", "negative"])
def test_steps_stamp_commit_and_catch_up_rows_in_their_turn(rng, tmp_path, dtype, layout):
    """A step of each implementation, from the same stale rows."""
    rows, length, betas = 2000, 5, (0.5, 0.99)
    state = PRECISION[dtype].state
    results = []
    for implementation in IMPLEMENTATIONS:
        generator = np.random.default_rng(5)
        history = History(*betas, state, entries=10)  # 256: 16 rows take their turn
        w, m, u = (
            LAYOUTS[layout]((rows, length), np.dtype(d), tmp_path)[1]
            for d in (PRECISION[dtype].dtype, state, state)
        )
        w[...] = values(generator, (rows, length), dtype)
        stamps = np.zeros(rows, np.uint32)
        with Using(implementation) as verbs:
            for step in range(400):
                ids = np.unique(generator.integers(rows, size=20))
                g = values(generator, (len(ids), length), dtype)
                given = w, m, u, None, stamps, history.arrays, EPSILON, 0, False
                verbs.catch_up_rows(given, ids, 2)
                recorded = history.recorded(1e-3, 0.99, *betas, all_current=step == 0)
                part = (
                    w,
                    m,
                    u,
                    ids,
                    g,
                    scalars(1e-3, 0.99),
                    None,
                    (stamps, *history.arrays, *recorded),
                )
                none = scalars()[None]
                assert (
                    verbs.step((), (), (), (), none, None, [part], (), INF, INF, 2) is None
                )
                assert history.steps == step + 1
                assert (stamps[ids] == step + 1).all()
                assert (history.steps - stamps).max() <= history.entries // 2
        results.append([np.array(x) for x in (w, m, u, stamps, *history.arrays)])
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            assert_same_bits(actual, expected)


# --- Problems -----------------------------------------------------------------------------


def stale_table(rows=6):
    history = History(0.9, 0.999, "float32", entries=10)
    for _ in range(3):
        record(history, 1e-3, 1.0, 0.9, 0.999)
    tables = np.ones((3, rows, 2), np.float32)
    return tables, np.full(rows, 3, np.uint32), history


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_of_a_stale_row_is_a_problem_and_changes_nothing(implementation):
    tables, stamps, history = stale_table()
    stamps[4] = 2
    dense = np.ones((4, 2), np.float32)
    before = [x.copy() for x in (*tables, stamps, *history.arrays, dense)]
    recorded = history.recorded(1e-3, 1.0, 0.9, 0.999, all_current=False)
    ids, g = np.array([1, 4, 5]), np.ones((3, 2), np.float32)
    part = (*tables, ids, g, scalars(), None, (stamps, *history.arrays, *recorded))
    with Using(implementation) as verbs:
        columns = [[array] for array in dense]
        given = *columns, scalars()[None], None, [part], (), INF, INF, 1
        assert verbs.step(*given) == ("stale", 1, 4, 0)
        stamps[4] = 4  # ahead of the history
        kind = verbs.step(*given)[0]
        assert kind in ("stale", "history")
        stamps[4] = 2
        for array, copy in zip(
            (*tables, stamps, *history.arrays, dense), before, strict=True
        ):
            assert_same_bits(array, copy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", [4, 3 + 2**31, 3 - 2**20])
def test_a_stamp_that_the_history_does_not_have_is_a_problem(implementation, wrong):
    tables, stamps, history = stale_table()
    stamps[2] = np.uint32(wrong % 2**32)
    before = tables.copy()
    with Using(implementation) as verbs:
        given = *tables, None, stamps, history.arrays, EPSILON, 0, False
        assert verbs.catch_up_rows(given, np.array([1, 2]), 1) == ("history", 0, 2, 0)
        assert verbs.catch_up_range(given, 0, 6, 1) == ("history", 0, 2, 0)
        assert_same_bits(tables[:, 2], before[:, 2])
        too_short = *tables, None, stamps[:5].copy(), history.arrays, EPSILON, 0, False
        assert verbs.catch_up_rows(too_short, np.array([1]), 1) == ("history", 0, -1, 0)
        assert verbs.catch_up_range(too_short, 0, 6, 1) == ("history", 0, -1, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_are_no_work(implementation):
    tables, stamps, history = stale_table()
    stamps[:] = 0
    none = np.zeros(0, np.int64)
    with Using(implementation) as verbs:
        given = *tables, None, stamps, history.arrays, EPSILON, 0, False
        assert verbs.catch_up_rows(given, none, 2) == 0
        assert verbs.catch_up_range(given, 3, 3, 2) == 0
    assert not stamps.any()
