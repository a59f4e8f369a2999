"""The verbs: the native core against the reference, bit for bit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from adamax._core import reference
from adamax._core.kernels import OPERANDS, state_dtype
from adamax._core.rule import Scalar
from adamax._core.threads import get_num_threads
from cases import DTYPES, LARGE_TABLE, PATTERNS, PRECISION, values
from compare import assert_same_bits, assert_step_close, bits
from numpy_cases import LAYOUTS
from verbs import (
    IMPLEMENTATIONS,
    INF,
    NATIVE,
    Arrays,
    Using,
    arrays,
    dense_problem,
    dense_step,
    norm,
    rows_problem,
    rows_step,
    scalars,
)

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core was not built")


@pytest.fixture(params=IMPLEMENTATIONS)
def verbs(request):
    with Using(request.param) as implementation:
        yield implementation


@pytest.fixture(params=NATIVE or [pytest.param("none", marks=needs_native)])
def native(request):
    with Using(request.param) as implementation:
        yield implementation


# --- Drawn cases --------------------------------------------------------------------------

SPECIAL = (
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1.0,
    -1.0,
    1e-45,
    -1e-40,
    65504.0,
    3e38,
)
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
norms = numbers.map(lambda number: abs(number))
# A short pattern, repeated to the length that is asked for: any number of elements is
# drawn quickly, and vector loops as well as what they leave over see all of it.
sizes = st.integers(0, 70)


def patterns(elements):
    return st.lists(elements, min_size=1, max_size=8)


def tiled(pattern, dtype, shape):
    with np.errstate(over="ignore"):
        return np.resize(np.array(pattern).astype(dtype), shape)


@st.composite
def drawn_arrays(draw, shape, values_shape=None):
    dtype = draw(st.sampled_from(DTYPES))
    stored, state = PRECISION[dtype].dtype, PRECISION[dtype].state
    return Arrays(
        w=tiled(draw(patterns(numbers)), stored, shape),
        m=tiled(draw(patterns(numbers)), state, shape),
        u=tiled(draw(patterns(norms)), state, shape),
        g=tiled(draw(patterns(numbers)), stored, values_shape or shape),
    )


unit = st.floats(0, 1, exclude_max=True)
drawn_scalars = st.builds(
    scalars,
    step_size=st.one_of(st.floats(0, 10), st.just(1e39)),
    decay=st.floats(-1, 1),
    scale=st.one_of(st.just(1.0), unit, st.just(math.nan)),
    coupled_decay=st.one_of(st.just(0.0), unit),
    one_minus_beta_1=st.floats(0, 1, exclude_min=True),
    beta_2=unit,
    epsilon=st.one_of(st.just(0.0), st.floats(0, 1.0)),
    clipvalue=st.one_of(st.just(math.inf), st.floats(1e-30, 1e30)),
)
isas = st.sampled_from(NATIVE)


@needs_native
@given(data=st.data(), size=sizes, scalars=drawn_scalars)
def test_native_dense_step_is_the_reference(data, size, scalars):
    actual = data.draw(drawn_arrays((size,)))
    expected = actual.copy()
    with Using(data.draw(isas)) as verbs:
        dense_step(verbs, [actual], scalars)
    dense_step(reference, [expected], scalars)
    actual.assert_same(expected)


@needs_native
@given(
    data=st.data(),
    rows=st.integers(1, 20),
    row_length=st.integers(0, 20),
    index_dtype=st.sampled_from([np.int32, np.int64]),
    scalars=drawn_scalars,
)
def test_native_rows_step_is_the_reference(data, rows, row_length, index_dtype, scalars):
    drawn = data.draw(st.lists(st.integers(0, rows - 1), max_size=30))
    indices = np.array(drawn, index_dtype)
    shapes = (rows, row_length), (indices.size, row_length)
    actual = data.draw(drawn_arrays(*shapes))
    expected = actual.copy()
    with Using(data.draw(isas)) as verbs:
        rows_step(verbs, actual, indices, scalars)
    rows_step(reference, expected, indices, scalars)
    actual.assert_same(expected)


@needs_native
@given(
    data=st.data(), several=st.lists(st.tuples(sizes, st.sampled_from(DTYPES)), max_size=6)
)
def test_many_arrays_in_one_call_are_the_reference(data, several):
    rng = np.random.default_rng(len(several))
    actual = [arrays(rng, dtype, (size,)) for size, dtype in several]
    expected = [one.copy() for one in actual]
    each = np.array([data.draw(drawn_scalars) for _ in several]).reshape(-1, len(Scalar))
    with Using(data.draw(isas)) as verbs:
        dense_step(verbs, actual, each)
    dense_step(reference, expected, each)
    for one, other in zip(actual, expected, strict=True):
        one.assert_same(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_coupled_decay_is_part_of_the_gradient(verbs, rng, dtype, sparse):
    """A step of the oracle's; front ends have the other factors tested."""
    rule = oracle.Rule(learning_rate=0.01, coupled_decay=0.3, clipvalue=2.0)
    one = arrays(rng, dtype, (40, 3))
    before = oracle.State.of(one.w, one.m, one.u)
    step_size = rule.step_size(6)
    chosen = scalars(
        step_size,
        coupled_decay=rule.coupled_decay,
        epsilon=rule.epsilon,
        clipvalue=rule.clipvalue,
    )
    gradient, summed = one.g, one.g
    if sparse:
        indices = np.arange(0, 40, 2)
        one.g = summed = np.ascontiguousarray(one.g[indices])
        gradient = oracle.Rows(one.g, indices)
        rows_step(verbs, one, indices, chosen)
    else:
        dense_step(verbs, [one], chosen)
    [expected] = oracle.step(rule, [before], [gradient], 6)
    # The two terms of the gradient may cancel.
    terms = np.minimum(np.abs(summed.astype(np.float64)), rule.clipvalue).max()
    terms += rule.coupled_decay * np.abs(before.w)
    assert_step_close(
        PRECISION[dtype],
        before,
        oracle.State.of(one.w, one.m, one.u),
        expected,
        step_size,
        rule.epsilon,
        error_of_gradient=4 * PRECISION[dtype].roundoff * terms,
    )


# --- NaN and infinity ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipvalue", [math.inf, 1.0])
def test_nan_in_a_gradient_reaches_all(verbs, rng, dtype, clipvalue):
    chosen = scalars(clipvalue=clipvalue)
    for size in (1, 5, 64, 67):
        for position in {0, size // 2, size - 1}:
            dense = arrays(rng, dtype, (size,))
            dense.g[position] = math.nan
            expected = np.arange(size) == position
            for _ in range(2):
                dense_step(verbs, [dense], chosen)
                for array in (dense.w, dense.m, dense.u):
                    np.testing.assert_array_equal(np.isnan(array), expected)
                dense.g[...] = 1  # it stays


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_a_gradient_reaches_all(verbs, rng, dtype):
    dense = arrays(rng, dtype, (67,))
    dense.g[[3, 50]] = math.inf, -math.inf
    dense_step(verbs, [dense])
    assert_same_bits(dense.m[[3, 50]].astype(np.float64), [math.inf, -math.inf])
    assert_same_bits(dense.u[[3, 50]].astype(np.float64), [math.inf, math.inf])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(dense.w)), [3, 50])
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(dense.m)), [3, 50])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_value_stops_infinity(verbs, rng, dtype):
    dense = arrays(rng, dtype, (67,))
    dense.m[...] = dense.u[...] = 0
    dense.g[[3, 50]] = math.inf, -math.inf
    dense_step(verbs, [dense], scalars(one_minus_beta_1=1.0, clipvalue=0.5))
    assert np.abs(dense.m).max() == dense.u.max() == 0.5
    np.testing.assert_array_equal(dense.m[[3, 50]], [0.5, -0.5])
    assert np.isfinite(dense.w).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("repeated", [False, True])
def test_what_is_not_finite_reaches_its_row_only(verbs, rng, dtype, bad, repeated):
    indices = np.array([4, 2, 4 if repeated else 3, 0])
    table = arrays(rng, dtype, (6, 5), (4, 5))
    table.g[0, 1] = bad
    before = table.copy()
    rows_step(verbs, table, indices)
    expected = np.zeros((6, 5), bool)
    expected[4, 1] = True
    for name in "wmu":
        array = getattr(table, name)
        np.testing.assert_array_equal(~np.isfinite(array), expected)
        assert_same_bits(array[[1, 5]], getattr(before, name)[[1, 5]])


# --- Threads ------------------------------------------------------------------------------

THREADS = (2, 3, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_step_does_not_depend_on_threads(native, rng, dtype):
    several = [arrays(rng, dtype, (size,)) for size in (500_003, 0, 7, 100_000, 32_768)]
    expected = [one.copy() for one in several]
    dense_step(reference, expected)
    for threads in (1, *THREADS):
        actual = [one.copy() for one in several]
        dense_step(native, actual, threads=threads)
        for one, other in zip(actual, expected, strict=True):
            one.assert_same(other, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["distinct", "repeated", "all the same", "descending"])
def test_rows_step_does_not_depend_on_threads(native, rng, dtype, pattern):
    rows, row_length = LARGE_TABLE
    indices = PATTERNS[pattern](rng, rows)
    table = arrays(rng, dtype, (rows, row_length), (indices.size, row_length))
    expected = table.copy()
    rows_step(reference, expected, indices)
    for threads in (1, *THREADS):
        actual = table.copy()
        rows_step(native, actual, indices, threads=threads)
        actual.assert_same(expected, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_depend_neither_on_threads_nor_on_instruction_sets(native, rng, dtype):
    rows, row_length = LARGE_TABLE
    gradients = [values(rng, (size,), dtype) for size in (500_003, 0, 7, 65_536, 65_537)]
    indices = PATTERNS["repeated"](rng, rows)
    sparse = values(rng, (indices.size, row_length), dtype)
    with Using("base") as base:
        expected = [norm(base, gradient) for gradient in gradients]
        expected_of_rows = base.norm(indices, sparse, rows, 1)
    for threads in (1, *THREADS):
        assert [norm(native, gradient, threads) for gradient in gradients] == expected
        assert native.norm(indices, sparse, rows, threads) == expected_of_rows


# --- Norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_dense_gradients(verbs, rng, dtype):
    for size in (1, 0, 7, 1000, 65_536, 200_001):
        gradient = values(rng, (size,), dtype)
        copy = gradient.copy()
        # Positive terms: the error is at most one rounding for each.
        assert norm(verbs, gradient) == pytest.approx(
            math.sqrt(oracle.square_sum(copy)), rel=max(size, 2) * 2**-53, abs=0
        )
        assert_same_bits(gradient, copy)


def test_norms_of_nothing(verbs):
    no_rows = np.zeros((0, 3), np.float32)
    assert verbs.norm(np.zeros(0, np.int64), no_rows, 5, 1) == 0.0
    empty_rows = np.zeros((2, 0), np.float32)
    assert verbs.norm(np.array([3, 3]), empty_rows, 5, 1) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("table", [(50, 7), LARGE_TABLE], ids=["small", "large"])
def test_the_norm_of_rows_is_that_of_the_summed_gradient(verbs, rng, dtype, pattern, table):
    indices = PATTERNS[pattern](rng, table[0])
    # Small multiples of 1/8, whose sums and squares are exact in all that adds them up.
    gradient = rng.integers(-16, 17, size=(indices.size, table[1])) / 8
    gradient = gradient.astype(PRECISION[dtype].dtype)
    copy = gradient.copy()
    actual = verbs.norm(indices, gradient, table[0], 2)
    expected = math.sqrt(oracle.square_sum(oracle.Rows(gradient, indices)))
    assert actual == pytest.approx(expected, rel=2**-51, abs=0)
    assert_same_bits(gradient, copy)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_of_what_is_not_finite(verbs, bad, dtype):
    gradient = np.array([[1.0, bad], [2.0, 3.0]], dtype)
    expected = bits([bad])
    np.testing.assert_array_equal(bits([norm(verbs, gradient)]), expected)
    of_rows = verbs.norm(np.array([1, 1]), gradient, 2, 1)
    np.testing.assert_array_equal(bits([of_rows]), expected)


@pytest.mark.parametrize("scale", [1e300, 1e200, 1e-30, 1e-200, 1e-310, 5e-324])
def test_squares_may_leave_the_range_of_float64(verbs, scale):
    gradient = np.array([3.0, 4.0, 0.0] * 500) * scale
    expected = 5.0 * math.sqrt(500) * scale
    assert norm(verbs, gradient) == pytest.approx(expected, rel=1e-13, abs=5e-324)
    gradient = np.array([3.0 * scale, 4.0, 0.0])
    expected = math.hypot(3.0 * scale, 4.0)
    assert norm(verbs, gradient) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(70_000,), (10, 70_000, 0, 513)])
@pytest.mark.parametrize("limits", [(0.1, INF), (INF, 0.1), (1e9, INF), (INF, 1e9)])
def test_gradients_are_clipped_by_their_norms(verbs, rng, dtype, sizes, limits):
    several = [arrays(rng, dtype, (size,)) for size in sizes]
    table, indices = arrays(rng, dtype, (50, 5), (60, 5)), rng.integers(50, size=60)
    several_expected, table_expected = [a.copy() for a in several], table.copy()
    columns = [[getattr(a, name) for a in several] for name in "wmug"]
    part = (table.w, table.m, table.u, indices, table.g, scalars(), None, None)
    assert verbs.step(*columns, scalars()[None], None, [part], (), *limits, 2) is None

    norms = [norm(reference, a.g) for a in several_expected]
    norms.append(reference.norm(indices, table_expected.g, 50, 1))
    if limits[1] < INF:
        norms = [math.hypot(*norms)] * len(norms)
    factors = [min(1.0, min(limits) / n) if n else 1.0 for n in norms]
    for a, factor in zip(several_expected, factors, strict=False):
        dense_step(verbs, [a], scalars(scale=factor))
    rows_step(verbs, table_expected, indices, scalars(scale=factors[-1]))
    for actual, expected in zip(
        [*several, table], [*several_expected, table_expected], strict=True
    ):
        for name in "mu":
            one, other = getattr(actual, name), getattr(expected, name)
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-30)


# --- Rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_are_summed_then_stepped(verbs, rng, pattern, index_dtype):
    """Against dense steps of the rows that occur, with the sums as their gradients."""
    rows, row_length = 300, 5
    indices = PATTERNS[pattern](rng, rows).astype(index_dtype)
    table = arrays(rng, "float32", (rows, row_length), (indices.size, row_length))
    before = table.copy()
    rows_step(verbs, table, indices)
    for row in range(rows):
        at = np.flatnonzero(indices == row)
        if at.size:
            total = np.zeros(row_length)  # in float64
            for position in at:
                total += table.g[position]
            total = total.astype(np.float32)
            dense = Arrays(before.w[row], before.m[row], before.u[row], total)
            dense_step(verbs, [dense])
        else:
            dense = Arrays(before.w[row], before.m[row], before.u[row], before.w[row])
        for name in "wmu":
            expected = getattr(dense, name)
            assert_same_bits(getattr(table, name)[row], expected, f"{name}[{row}]")
    assert_same_bits(table.g, before.g)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("rows", [1, 2, 2048, 2049, 2**22 + 1, 2**23])
def test_rows_of_tables_of_many_sizes(native, rng, rows, index_dtype):
    """More rows take more passes of sorting; the table's pages are touched where used."""
    indices = rng.integers(rows, size=500)
    indices = np.concatenate([indices, indices[::3], [0, rows - 1]]).astype(index_dtype)
    gradient = values(rng, (indices.size, 1), "float32")
    distinct, place = np.unique(indices, return_inverse=True)
    w, m, u = (np.zeros((rows, 1), np.float32) for _ in range(3))
    small = Arrays(*(np.zeros((distinct.size, 1), np.float32),) * 3, gradient)
    part = (w, m, u, indices, gradient, scalars(), None, None)
    none = scalars()[None]
    assert native.step((), (), (), (), none, None, [part], (), INF, INF, 1) is None
    rows_step(reference, small, place)
    for array, expected in ((w, small.w), (m, small.m), (u, small.u)):
        assert_same_bits(array[distinct], expected)
        assert np.count_nonzero(array) == np.count_nonzero(expected)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("indices", "rows", "position", "value"),
    [
        ([-1], 5, 0, -1),
        ([5], 5, 0, 5),
        ([0], 0, 0, 0),
        ([0, 4, 5, 1], 5, 2, 5),
        ([4, 3, -2, 9], 5, 2, -2),
        ([0] * 100 + [2**31 - 1], 5, 100, 2**31 - 1),
        ([0] * 100 + [-(2**31)], 5, 100, -(2**31)),
    ],
)
def test_rows_outside_the_table_are_a_problem(
    verbs, rng, indices, rows, position, value, index_dtype
):
    indices = np.array(indices, index_dtype)
    table = arrays(rng, "float32", (rows, 2), (len(indices), 2))
    before = table.copy()
    problem = rows_problem(verbs, table, indices, scalars(), 1)
    assert problem == ("index", 0, position, value)
    table.assert_same(before)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_indices_of_64_bits_are_not_cut(verbs, rng, value):
    table = arrays(rng, "float32", (5, 2), (2, 2))
    indices = np.array([0, value], np.int64)
    assert rows_problem(verbs, table, indices, scalars(), 1) == ("index", 0, 1, value)


def test_indices_may_be_strided_or_read_only(verbs, rng):
    indices = np.arange(20)[::-2]
    indices.flags.writeable = False
    table = arrays(rng, "float32", (20, 3), (10, 3))
    expected = table.copy()
    rows_step(verbs, table, indices)
    rows_step(verbs, expected, indices.copy())
    table.assert_same(expected)


# --- 16-bit numbers -----------------------------------------------------------------------

HALVES = ("float16", "bfloat16")
ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def _step_of(verbs, verb, w, m, u, g, chosen):
    """One step by either verb of arrays of one dimension; returns w, m and u."""
    together = Arrays(w, m, u, g)
    if verb == "dense":
        dense_step(verbs, [together], chosen)
    else:
        # Two gradients to a row make the kernel sum them first.
        column = (w.size, 1)
        values = np.stack([np.zeros_like(g), g], axis=1).reshape(-1, 1)
        together = Arrays(w.reshape(column), m.reshape(column), u.reshape(column), values)
        indices = np.repeat(np.arange(w.size), 2)
        rows_step(verbs, together, indices, chosen)
    return together.w.ravel(), together.m.ravel(), together.u.ravel()


@pytest.mark.parametrize("verb", ["dense", "rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_widened_exactly(verbs, verb, dtype):
    g = ALL_PATTERNS.view(PRECISION[dtype].dtype)
    zero = np.zeros(g.size, np.float32)
    chosen = scalars(one_minus_beta_1=1.0, beta_2=0.0)
    _, m, u = _step_of(verbs, verb, g, zero, zero, g, chosen)
    exact = g.astype(np.float32)
    # 0 + (-0.0 - 0) is 0.0.
    assert_same_bits(m, np.where(exact == 0, np.float32(0), exact))
    assert_same_bits(u, np.abs(exact))


@pytest.mark.parametrize("verb", ["dense", "rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_stored_as_it_was_loaded(verbs, verb, dtype):
    w = ALL_PATTERNS.view(PRECISION[dtype].dtype)
    zero, one = np.zeros(w.size, np.float32), np.ones(w.size, np.float32)
    g = np.zeros_like(w)
    stored, _, _ = _step_of(verbs, verb, w, zero, one, g, scalars())
    assert_same_bits(stored, w)


def _boundaries(dtype: str) -> np.ndarray:
    """All finite 16-bit numbers, the ties between them, and both sides of each tie."""
    stored = PRECISION[dtype].dtype
    positive = ALL_PATTERNS[: 1 << 15].view(stored)
    with np.errstate(invalid="ignore"):  # some NaNs are signalling ones
        positive = positive[np.isfinite(positive)].astype(np.float64)
    # The last tie is the one with the number that would be next if there were more.
    last = 2 * positive[-1] - positive[-2]
    ties = (positive + np.append(positive[1:], last)) / 2
    assert (ties == ties.astype(np.float32)).all()
    ties = ties.astype(np.float32)
    below, above = (np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf))
    together = np.concatenate([positive.astype(np.float32), below, ties, above])
    return np.concatenate([together, -together])


@pytest.mark.parametrize("verb", ["dense", "rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_are_rounded_to_16_bits_to_nearest_even(verbs, rng, verb, dtype):
    random = rng.integers(1 << 32, size=100_000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([_boundaries(dtype), random])
    assert np.isnan(numbers).any()
    numbers = numbers[~np.isinf(numbers)]  # 0 * inf in the rule is NaN
    # m stays as it is, the denominator is 1 and the step size -1: w becomes m.
    one = np.ones(numbers.size, np.float32)
    zero = np.zeros(numbers.size, PRECISION[dtype].dtype)
    chosen = scalars(step_size=-1.0, one_minus_beta_1=0.0, beta_2=1.0, epsilon=0.0)
    stored, _, _ = _step_of(verbs, verb, zero, numbers, one, zero, chosen)
    with np.errstate(all="ignore"):
        expected = numbers.astype(PRECISION[dtype].dtype)
    assert np.isinf(expected).any()
    assert (expected[numbers != 0] == 0).any()
    assert_same_bits(stored, np.where(numbers == 0, zero, expected))


# --- Zero and the ends of the range -------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_epsilon_zero_gradients_move_nothing(verbs, rng, dtype):
    dense = arrays(rng, dtype, (70,))
    dense.m[...] = dense.u[...] = 0
    dense.g[:50] = 0
    dense.g[60] = math.nan
    before = dense.copy()
    for _ in range(3):
        dense_step(verbs, [dense], scalars(epsilon=0.0))
    assert_same_bits(dense.w[:50], before.w[:50])
    assert (dense.w[50:60] != before.w[50:60]).any()
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(dense.w)), [60])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_size_beyond_the_dtype_makes_no_nan_of_zero(verbs, rng, dtype):
    dense = arrays(rng, dtype, (9,))
    dense.m[...] = dense.g[...] = 0
    before = dense.copy()
    dense_step(verbs, [dense], scalars(step_size=1e300))
    assert_same_bits(dense.w, before.w)


def test_a_repeated_index_is_summed_in_float64(verbs):
    """A million times 0.1 in float32 would be off by 1 in 100."""
    count = 1_000_000
    table = Arrays(*np.zeros((3, 2, 1), np.float32), np.full((count, 1), 0.1, np.float32))
    rows_step(verbs, table, np.zeros(count, np.int32), scalars(one_minus_beta_1=1.0))
    assert table.m[0, 0] == np.float32(count * float(np.float32(0.1)))


# --- Gradients of another width -----------------------------------------------------------


@pytest.mark.parametrize("of_g", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_any_width_are_the_reference(native, rng, dtype, of_g, sparse):
    actual = arrays(rng, dtype, (40, 17), (60, 17) if sparse else None)
    shape = actual.g.shape
    actual = Arrays(actual.w, actual.m, actual.u, values(rng, shape, of_g))
    expected = actual.copy()
    chosen = scalars(scale=0.3, clipvalue=10.0)
    for verbs, each in ((native, actual), (reference, expected)):
        if sparse:
            rows_step(verbs, each, np.random.default_rng(3).integers(40, size=60), chosen)
        else:
            dense_step(verbs, [each], chosen)
    actual.assert_same(expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_is_cast_up_and_never_down(verbs, sparse):
    for dtype, of_g, numbers in (
        ("float16", "float32", [1e-8, 1e5]),
        ("bfloat16", "float32", [1e-8, 1.001]),
        ("float32", "float64", [1e-60, 1e60]),
    ):
        g = np.array(numbers, of_g).reshape(-1, 1)
        state = PRECISION[dtype].state
        zeros = np.zeros(g.shape, PRECISION[dtype].dtype)
        arrays_ = Arrays(zeros, zeros.astype(state), zeros.astype(state), g)
        # Scaled so that even float32 holds it: before it is rounded, not after.
        scale = 1e-30 if of_g == "float64" else 1.0
        chosen = scalars(scale=scale, one_minus_beta_1=1.0)
        if sparse:
            rows_step(verbs, arrays_, np.arange(2), chosen)
        else:
            dense_step(verbs, [arrays_], chosen)
        expected = (scale * g.astype(np.float64)).astype(state)
        assert_same_bits(arrays_.m, expected)


# --- Memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("sparse", [False, True])
def test_any_operand_may_have_any_layout(native, rng, tmp_path, layout, dtype, sparse):
    shape, indices = (37, 5, 3), rng.integers(37, size=50)
    contiguous = arrays(rng, dtype, shape, (50, 5, 3) if sparse else None)
    expected = contiguous.copy()
    for odd in "wmug":
        actual = contiguous.copy()
        _, inside = LAYOUTS[layout](
            getattr(actual, odd).shape, getattr(actual, odd).dtype, tmp_path
        )
        inside[...] = getattr(actual, odd)
        setattr(actual, odd, inside)
        expected = contiguous.copy()
        for verbs, each in ((native, actual), (reference, expected)):
            if sparse:
                rows_step(verbs, each, indices, threads=2)
            else:
                dense_step(verbs, [each], threads=2)
        for name in "wmug":
            plain = getattr(expected, name)
            assert_same_bits(np.array(getattr(actual, name), plain.dtype), plain, name)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["w", "m", "u"])
@pytest.mark.parametrize("shift", [0, 1, 600])
def test_a_gradient_may_overlap_what_is_written(native, rng, sparse, name, shift):
    """It is read as it was before the step."""
    memory = values(rng, (5000,), "float32")
    overlapping = {}
    for kind in ("overlapping", "apart"):
        room = memory.copy()
        own = (
            np.abs(room[:4000]).reshape(40, 100)
            if name == "u"
            else room[:4000].reshape(40, 100)
        )
        if name == "u":
            room[:4000] = own.ravel()
            own = room[:4000].reshape(40, 100)
        g = room[shift : shift + 4000].reshape(40, 100)
        if kind == "apart":
            g = g.copy()
        others = {n: np.zeros((40, 100), np.float32) for n in "wmu"}
        others[name] = own
        one = [others["w"], others["m"], others["u"]]
        if sparse:
            part = (*one, np.arange(40)[::-1].copy(), g, scalars(), None, None)
            none = scalars()[None]
            assert native.step((), (), (), (), none, None, [part], (), INF, INF, 2) is None
        else:
            columns = [[x] for x in (*one, g)]
            assert native.step(*columns, scalars()[None], None, (), (), INF, INF, 2) is None
        overlapping[kind] = [np.array(x) for x in one]
    for one, other in zip(overlapping["overlapping"], overlapping["apart"], strict=True):
        assert_same_bits(one, other)


def test_parameters_that_share_memory_are_updated_one_after_the_other(native, rng):
    room = values(rng, (300_000,), "float32")
    expected = room.copy()
    state = [np.zeros(200_000, np.float32) for _ in range(8)]
    g = values(rng, (200_000,), "float32")
    views = [room[:200_000], room[100_000:]]
    columns = [views, state[:2], state[2:4], [g, g]]
    assert native.step(*columns, scalars()[None], None, (), (), INF, INF, 2) is None
    for i, view in enumerate((expected[:200_000], expected[100_000:])):
        one = [[view], [state[4 + i]], [state[6 + i]], [g]]
        assert native.step(*one, scalars()[None], None, (), (), INF, INF, 1) is None
    assert_same_bits(room, expected)


# --- What does not fit --------------------------------------------------------------------


def _unfit(dense: Arrays) -> dict:
    strided = np.lib.stride_tricks.as_strided
    read_only = dense.w.copy()
    read_only.flags.writeable = False
    return {
        "a list": ("w", dense.w.tolist()),
        "integers": ("w", dense.w.astype(np.int32)),
        "read-only": ("w", read_only),
        "expanded": ("w", strided(dense.w, (6, 4), (0, 4))),
        "other shape": ("m", np.zeros((4, 6), np.float32)),
        "other dtype": ("m", np.zeros((6, 4), np.float64)),
        "the parameter itself": ("m", dense.w),
        "the same state": ("u", dense.m),
        "None": ("g", None),
        "a gradient of integers": ("g", np.zeros((6, 4), np.int64)),
        "a complex gradient": ("g", np.zeros((6, 4), np.complex64)),
        "a gradient of another shape": ("g", np.zeros((6, 5), np.float32)),
        "a flat gradient": ("g", np.zeros(24, np.float32)),
    }


@pytest.mark.parametrize(
    "kind", _unfit(arrays(np.random.default_rng(1), "float32", (6, 4)))
)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_does_not_fit_is_a_problem_and_changes_nothing(verbs, rng, kind, sparse):
    good, bad = arrays(rng, "float32", (6, 4)), arrays(rng, "float32", (6, 4))
    before = good.copy()
    name, value = _unfit(bad)[kind]
    setattr(bad, name, value)
    if sparse:
        parts = [
            (a.w, a.m, a.u, np.arange(6), a.g, scalars(), None, None) for a in (good, bad)
        ]
        none = scalars()[None]
        problem = verbs.step((), (), (), (), none, None, parts, (), INF, INF, 1)
    else:
        problem = dense_problem(verbs, [good, bad], scalars())
    assert problem == ("unfit", 1, "wmug".index(name), 0)
    good.assert_same(before)


@pytest.mark.parametrize(
    ("values_", "indices", "operand"),
    [
        (np.zeros((3, 4)), [0, 1], "gradient"),
        (np.zeros((2, 5)), [0, 1], "gradient"),
        (np.zeros((2, 4)), [[0, 1]], "indices"),
        (np.zeros((2, 4)), [0.0, 1.0], "indices"),
        (np.zeros(8), [0, 1], "gradient"),
    ],
)
def test_rows_that_do_not_fit_are_a_problem(verbs, rng, values_, indices, operand):
    table = arrays(rng, "float32", (6, 4))
    before = table.copy()
    part = (table.w, table.m, table.u, np.array(indices), values_, scalars(), None, None)
    none = scalars()[None]
    problem = verbs.step((), (), (), (), none, None, [part], (), INF, INF, 1)
    assert problem == ("unfit", 0, OPERANDS.index(operand), 0)
    table.assert_same(before)


def test_a_scalar_parameter_has_no_rows(verbs):
    w, m, u = np.zeros((3, 1), np.float32)
    part = (
        w[0, ...],
        m[0, ...],
        u[0, ...],
        np.array([0]),
        np.zeros(1),
        scalars(),
        None,
        None,
    )
    none = scalars()[None]
    problem = verbs.step((), (), (), (), none, None, [part], (), INF, INF, 1)
    assert problem[:3] == ("unfit", 0, 0)


# --- Counters -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_counters_are_read_and_advanced(verbs, dtype):
    counters = [np.array(3, dtype), np.array([7], dtype)]
    assert verbs.counts(counters) == [3.0, 7.0]
    none = scalars()[None]
    assert verbs.step((), (), (), (), none, None, (), counters, INF, INF, 1) is None
    assert verbs.counts(counters) == [4.0, 8.0]


@pytest.mark.parametrize("bad", [np.zeros(2), np.zeros((), np.int8), "1"])
def test_counters_that_do_not_fit_are_a_problem(verbs, rng, bad):
    dense, counter = arrays(rng, "float32", (6,)), np.zeros(())
    before = dense.copy()
    columns = [[getattr(dense, name)] for name in "wmug"]
    problem = verbs.step(*columns, scalars()[None], None, (), [counter, bad], INF, INF, 1)
    assert problem == ("unfit", 1, OPERANDS.index("step"), 0)
    assert verbs.counts([bad])[0] == "unfit"
    dense.assert_same(before)
    assert counter == 0


# --- The choice ---------------------------------------------------------------------------


def test_state_is_at_least_float32():
    for dtype in DTYPES:
        assert state_dtype(PRECISION[dtype].dtype) == PRECISION[dtype].state


@needs_native
def test_the_native_core_is_the_choice(run_python):
    program = """
        import sys, adamax._core.kernels
        print(adamax._core.kernels.kernels().__name__)
    """
    assert run_python(program) == "adamax._native.verbs"
    chosen = {"ADAMAX_KERNELS": "reference"}
    assert run_python(program, **chosen) == "adamax._core.reference"
    assert run_python(program, ADAMAX_KERNELS="native") == "adamax._native.verbs"


def test_another_choice_is_refused(run_python):
    program = """
        from adamax._core.kernels import kernels
        try:
            kernels()
        except ValueError as error:
            print(error)
    """
    expected = "ADAMAX_KERNELS must be 'native' or 'reference', got 'fast'"
    assert run_python(program, ADAMAX_KERNELS="fast") == expected


WITHOUT = """
    import sys, warnings
    sys.modules["adamax._native.verbs"] = None

    class Finder:
        def find_spec(name, *_):
            if name == "adamax._native.verbs":
                raise ModuleNotFoundError(name, name=name)

    del sys.modules["adamax._native.verbs"]
    sys.meta_path.insert(0, Finder)
    import numpy as np, adamax
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            w = np.ones(2)
            adamax.Adamax().apply_gradients([(np.ones(2), w)])
    print(len(caught), *(str(warning.message) for warning in caught))
"""


def test_without_the_native_core_there_is_one_warning_with_the_remedy(run_python):
    text = run_python(WITHOUT)
    assert text.startswith("1 the native core of adamax was not built")
    assert "install a C++17 compiler and reinstall adamax" in text
    assert run_python(WITHOUT, ADAMAX_KERNELS="reference") == "0"


def test_the_native_core_can_be_demanded(run_python):
    with pytest.raises(AssertionError, match="ImportError: the native core of adamax was"):
        run_python(WITHOUT, ADAMAX_KERNELS="native")


@needs_native
def test_an_instruction_set_can_be_demanded(run_python):
    program = "from adamax._native import verbs; print(verbs.use_isa(None))"
    for isa in NATIVE:
        assert run_python(program, ADAMAX_ISA=isa) == isa
    with pytest.raises(AssertionError, match="ImportError: ADAMAX_ISA=vax: this processor"):
        run_python(program, ADAMAX_ISA="vax")


def test_threads_can_be_set(use_threads):
    for threads in (1, 3, 256):
        use_threads(threads)
        assert get_num_threads() == threads


@pytest.mark.parametrize("threads", [0, -1, 257, 10**30])
def test_numbers_of_threads_out_of_range_are_refused(use_threads, threads):
    use_threads(5)
    expected = rf"^num_threads must be in \[1, 256\], got {threads}$"
    with pytest.raises(ValueError, match=expected):
        use_threads(threads)
    assert get_num_threads() == 5


@pytest.mark.parametrize("threads", [2.0, "2", None, True])
def test_numbers_of_threads_of_another_type_are_refused(use_threads, threads):
    use_threads(5)
    with pytest.raises(TypeError, match=r"^num_threads must be an int, got "):
        use_threads(threads)
    assert get_num_threads() == 5
