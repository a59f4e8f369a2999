"""The mathematics of ``sparse="exact"``, and the verbs that carry it out."""

import math

import pytest
from cases import DTYPES, PRECISION, values
from compare import assert_same_bits
from exact_cases import EPSILON, FLOAT64

import numpy as np
from adamax._exact import Expansion, History
from adamax._kernels import Storage, _cpu, _reference, state_dtype

IMPLEMENTATIONS = {"compiled": _cpu, "reference": _reference}

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


def catch_up(verbs, dtype, w, m, u, gaps, history, now=2**32 + 7, threads=2):
    """All rows, in place; returns the stamps."""
    stamps = ((now - gaps) % 2**32).astype(np.uint32)
    addresses = np.array([a.ctypes.data for a in (w, m, u, stamps)], np.int64)
    behind = verbs.catch_up_table(
        Storage(dtype),
        (0, len(w)),
        addresses,
        math.prod(w.shape[1:]),
        history,
        now,
        EPSILON,
        threads,
    )
    assert behind == np.count_nonzero(gaps)
    assert (stamps == now % 2**32).all()


def assert_dense_over_gaps(dtype, gaps, betas_at, rate, decay, verbs=_cpu):
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
    history = History(*betas_at(1), dtype, steps)
    for t in range(1, steps + 1):
        behind = slice(0, np.searchsorted(-gaps, -(steps - t), side="left"))
        beta_1, beta_2 = betas_at(t)
        factor, a = decay(t, steps), rate(t, steps)
        history.record(a, factor, beta_1, beta_2)
        M[behind] *= beta_1
        U[behind] *= beta_2
        move = a * M[behind] / (U[behind] + EPSILON)
        W[behind] = factor * W[behind] - move
        size[behind] = np.maximum(abs(factor) * size[behind], abs(W[behind])) + abs(move)
    catch_up(verbs, dtype, w, m, u, gaps, history)
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
    chosen = IMPLEMENTATIONS[verbs]
    assert_dense_over_gaps(dtype, EVERY_GAP, betas, RATES[rate], DECAYS[decay], chosen)


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
    assert History(0.95, 0.998, dtype, 1).takes(0.9, 0.999)
    assert not History(0.5, 0.999, dtype, 1).takes(0.9, 0.999)

    def at(t):
        return (0.95, 0.998) if t == 1 else cycled(t)

    assert_dense_over_gaps(dtype, np.arange(600, -1, -1), at, rate, decay)


def test_products_do_not_leave_the_range_of_numbers():
    """100,000 steps that halve w, which float64 could not hold the product of."""
    history = History(0.9, 0.999, "float64", 100_000)
    for _ in range(history.sums.shape[0] - 1):
        history.record(1e-3, 0.5, 0.9, 0.999)
    assert history.is_full
    last = history.steps - np.array([0, 1, 3, 5000])
    _, factors = history.missed(last)
    assert factors[:, 0].tolist() == [1.0, 0.5, 0.125, 0.0]
    np.testing.assert_allclose(factors[:3, 2], [1, 0.999, 0.999**3], rtol=1e-12)


# --- The compiled verbs are the reference -------------------------------------------------


def table(rng, dtype, rows, length):
    state = state_dtype(Storage(dtype))
    w = values(rng, (rows, length), dtype)
    m = values(rng, (rows, length), "float32").astype(state)
    u = np.abs(values(rng, (rows, length), "float32")).astype(state)
    for array, special in ((m, np.nan), (u, np.inf), (m, np.inf), (u, np.nan)):
        array[rng.integers(rows, size=3)] = special
    u[:3], m[:3] = 0, 0
    return w, m, u


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 64, 101])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99), (0.0, 0.3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_verbs_are_the_reference(rng, dtype, betas, length, threads):
    rows, now, storage = 997, 2**33 + 3, Storage(dtype)
    history = History(*betas, state_dtype(storage), 2000)
    for t in range(1900):
        history.record(1e-3 * (t % 7), 0.0 if t == 700 else 0.999, *betas)
    start = table(rng, dtype, rows, length)
    gaps = rng.integers(0, 1900, rows)
    gaps[:4] = 0, 1, 1900, 0
    before = ((now - gaps) % 2**32).astype(np.uint32)
    ids = rng.integers(rows, size=700)
    results = []
    for verbs in IMPLEMENTATIONS.values():
        w, m, u = (array.copy() for array in start)
        stamps = before.copy()
        copy = np.full((ids.size, length), 7, w.dtype)
        addresses = np.array([a.ctypes.data for a in (w, m, u, stamps, copy)], np.int64)
        groups = verbs.group_rows(ids, rows)
        place = stamps.ctypes.data
        first = verbs.find_behind(groups, place, now)
        assert first == min(row for row in ids if gaps[row])
        given = storage, groups, addresses, length, history, now, EPSILON, threads
        count = verbs.catch_up_rows(*given)
        assert count == np.count_nonzero(gaps[np.unique(ids)])
        assert_same_bits(copy, w[ids])
        assert verbs.find_behind(groups, place, now) == -1
        untouched = np.setdiff1d(np.arange(rows), ids)
        for array, other in zip((w, m, u), start, strict=True):
            assert_same_bits(array[untouched], other[untouched])
        assert verbs.catch_up_rows(*given) == 0
        some = 5, rows - 5
        rest = (addresses[:4].copy(), length, history, now, EPSILON, threads)
        verbs.catch_up_table(storage, some, *rest)
        verbs.stamp_rows(groups, place, now + 1)
        assert (stamps[ids] == (now + 1) % 2**32).all()
        beside = np.setdiff1d([0, 1, 2, 3, 4, rows - 1], ids)
        assert (stamps[beside] == before[beside]).all()
        results.append((w, m, u, stamps))
    for compiled, reference in zip(*results, strict=True):
        assert_same_bits(compiled, reference)


@pytest.mark.parametrize("verbs", IMPLEMENTATIONS)
def test_no_rows_are_no_work(verbs):
    verbs = IMPLEMENTATIONS[verbs]
    history = History(0.9, 0.999, "float32", 3)
    w = np.ones((4, 2), np.float32)
    stamps = np.zeros(4, np.uint32)
    groups = verbs.group_rows(np.zeros(0, np.int64), 4)
    addresses = np.array([*[w.ctypes.data] * 3, stamps.ctypes.data, 0], np.int64)
    given = Storage.FLOAT32, groups, addresses, 2, history, 1, EPSILON, 2
    assert verbs.catch_up_rows(*given) == 0
    assert verbs.find_behind(groups, stamps.ctypes.data, 1) == -1
    verbs.stamp_rows(groups, stamps.ctypes.data, 1)
    assert not stamps.any()
