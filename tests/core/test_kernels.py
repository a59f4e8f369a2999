"""The verbs of the kernels: the compiled ones against the reference, bit for bit."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from cases import DTYPES, LARGE_TABLE, PATTERNS, PRECISION, values
from compare import assert_same_bits, assert_step_close, bits
from hypothesis import given
from hypothesis import strategies as st

import numpy as np
import oracle
from adamax._kernels import (
    Factor,
    Storage,
    _cpu,
    _reference,
    get_num_threads,
    kernels,
    state_dtype,
)
from adamax._rule import Coefficients

IMPLEMENTATIONS = {"compiled": _cpu, "reference": _reference}
COEFFICIENTS = Coefficients(
    one_minus_beta_1=0.1, beta_2=0.999, epsilon=1e-7, clipvalue=math.inf
)


def factors_of(step_size=0.01, decay=1.0, scale=1.0, coupled_decay=0.0) -> np.ndarray:
    factors = np.zeros(len(Factor))
    factors[Factor.STEP_SIZE] = step_size
    factors[Factor.DECAY] = decay
    factors[Factor.SCALE] = scale
    factors[Factor.COUPLED_DECAY] = coupled_decay
    return factors


FACTORS = factors_of()


@pytest.fixture(params=IMPLEMENTATIONS)
def verbs(request):
    return IMPLEMENTATIONS[request.param]


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@dataclass
class Arrays:
    """w, m, u and g, each with a margin at both ends that must not be written."""

    w: np.ndarray
    m: np.ndarray
    u: np.ndarray
    g: np.ndarray
    margin: int = 9
    buffers: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in "wmug":
            setattr(self, name, self._framed(getattr(self, name)))

    def _framed(self, array: np.ndarray) -> np.ndarray:
        buffer = np.full(array.size + 2 * self.margin, 7, array.dtype)
        inside = buffer[self.margin : buffer.size - self.margin].reshape(array.shape)
        inside[...] = array
        self.buffers.append(buffer)
        return inside

    def copy(self) -> "Arrays":
        return Arrays(self.w, self.m, self.u, self.g)

    @property
    def addresses(self) -> np.ndarray:
        return np.array([address(a) for a in (self.w, self.m, self.u, self.g)], np.int64)

    def assert_same(self, other: "Arrays", what: str = "") -> None:
        for name in "wmug":
            assert_same_bits(getattr(self, name), getattr(other, name), f"{name} {what}")
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            assert_same_bits(mine, theirs, f"margins {what}")


def arrays(rng: np.random.Generator, dtype: str, shape: Any, values_shape: Any = None):
    state = state_dtype(Storage(dtype))
    return Arrays(
        w=values(rng, shape, dtype),
        m=values(rng, shape, "float32").astype(state),
        u=np.abs(values(rng, shape, "float32")).astype(state),
        g=values(rng, shape if values_shape is None else values_shape, dtype),
    )


def dense_step(
    verbs, dtype, several, factors=FACTORS, coefficients=COEFFICIENTS, threads=1
):
    factors = np.broadcast_to(factors, (len(several), len(Factor))).copy()
    addresses = np.array([a.addresses for a in several], np.int64).reshape(-1, 4)
    lengths = np.array([a.w.size for a in several], np.int64)
    verbs.dense_step(Storage(dtype), addresses, lengths, factors, coefficients, threads)


def rows_step(
    verbs, dtype, table, indices, factors=FACTORS, coefficients=COEFFICIENTS, threads=1
):
    row_length = math.prod(table.w.shape[1:])
    groups = verbs.group_rows(indices, len(table.w))
    verbs.rows_step(
        Storage(dtype), groups, table.addresses, row_length, factors, coefficients, threads
    )


def dense_square_sums(verbs, dtype, gradients, threads=1):
    addresses = np.array([address(g) for g in gradients], np.int64)
    lengths = np.array([g.size for g in gradients], np.int64)
    return verbs.dense_square_sums(Storage(dtype), addresses, lengths, threads)


def rows_square_sum(verbs, dtype, gradient, indices, rows, threads=1):
    row_length = math.prod(gradient.shape[1:])
    groups = verbs.group_rows(indices, rows)
    return verbs.rows_square_sum(
        Storage(dtype), groups, address(gradient), row_length, threads
    )


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
    return dtype, Arrays(
        w=tiled(draw(patterns(numbers)), stored, shape),
        m=tiled(draw(patterns(numbers)), state, shape),
        u=tiled(draw(patterns(norms)), state, shape),
        g=tiled(draw(patterns(numbers)), stored, values_shape or shape),
    )


unit = st.floats(0, 1, exclude_max=True)
coefficients = st.builds(
    Coefficients,
    one_minus_beta_1=st.floats(0, 1, exclude_min=True),
    beta_2=unit,
    epsilon=st.floats(2.0**-126, 1.0),
    clipvalue=st.one_of(st.just(math.inf), st.floats(1e-30, 1e30)),
)
factors = st.builds(
    factors_of,
    step_size=st.floats(0, 10),
    decay=st.floats(-1, 1),
    scale=st.one_of(st.just(1.0), unit, st.just(math.nan)),
    coupled_decay=st.one_of(st.just(0.0), unit),
)


@given(data=st.data(), size=sizes, coefficients=coefficients, factors=factors)
def test_compiled_dense_step_is_the_reference(data, size, coefficients, factors):
    dtype, compiled = data.draw(drawn_arrays((size,)))
    expected = compiled.copy()
    dense_step(_cpu, dtype, [compiled], factors, coefficients)
    dense_step(_reference, dtype, [expected], factors, coefficients)
    compiled.assert_same(expected)


@given(
    data=st.data(),
    rows=st.integers(1, 20),
    row_length=st.integers(0, 20),
    index_dtype=st.sampled_from([np.int32, np.int64]),
    coefficients=coefficients,
    factors=factors,
)
def test_compiled_rows_step_is_the_reference(
    data, rows, row_length, index_dtype, coefficients, factors
):
    drawn = data.draw(st.lists(st.integers(0, rows - 1), max_size=30))
    indices = np.array(drawn, index_dtype)
    shapes = (rows, row_length), (indices.size, row_length)
    dtype, compiled = data.draw(drawn_arrays(*shapes))
    expected = compiled.copy()
    rows_step(_cpu, dtype, compiled, indices, factors, coefficients)
    rows_step(_reference, dtype, expected, indices, factors, coefficients)
    compiled.assert_same(expected)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), several=st.lists(sizes, max_size=6))
def test_compiled_launch_of_many_arrays_is_the_reference(data, dtype, several):
    rng = np.random.default_rng(len(several))
    compiled = [arrays(rng, dtype, (size,)) for size in several]
    expected = [one.copy() for one in compiled]
    each = np.array([data.draw(factors) for _ in several]).reshape(-1, len(Factor))
    dense_step(_cpu, dtype, compiled, each)
    dense_step(_reference, dtype, expected, each)
    for one, other in zip(compiled, expected, strict=True):
        one.assert_same(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_coupled_decay_is_part_of_the_gradient(verbs, rng, dtype, sparse):
    """A step of the oracle's; front ends have the other factors tested."""
    rule = oracle.Rule(learning_rate=0.01, coupled_decay=0.3, clipvalue=2.0)
    one = arrays(rng, dtype, (40, 3))
    before = oracle.State.of(one.w, one.m, one.u)
    step_size = rule.step_size(6)
    factors = factors_of(step_size, coupled_decay=rule.coupled_decay)
    coefficients = Coefficients(1 - rule.beta_1, rule.beta_2, rule.epsilon, rule.clipvalue)
    gradient, summed = one.g, one.g
    if sparse:
        indices = np.arange(0, 40, 2)
        one.g = summed = np.ascontiguousarray(one.g[indices])
        gradient = oracle.Rows(one.g, indices)
        rows_step(verbs, dtype, one, indices, factors, coefficients)
    else:
        dense_step(verbs, dtype, [one], factors, coefficients)
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
    coefficients = Coefficients(0.1, 0.999, 1e-7, clipvalue)
    for size in (1, 5, 64, 67):
        for position in {0, size // 2, size - 1}:
            dense = arrays(rng, dtype, (size,))
            dense.g[position] = math.nan
            expected = np.arange(size) == position
            for _ in range(2):
                dense_step(verbs, dtype, [dense], coefficients=coefficients)
                for array in (dense.w, dense.m, dense.u):
                    np.testing.assert_array_equal(np.isnan(array), expected)
                dense.g[...] = 1  # it stays


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_a_gradient_reaches_all(verbs, rng, dtype):
    dense = arrays(rng, dtype, (67,))
    dense.g[[3, 50]] = math.inf, -math.inf
    dense_step(verbs, dtype, [dense])
    assert_same_bits(dense.m[[3, 50]].astype(np.float64), [math.inf, -math.inf])
    assert_same_bits(dense.u[[3, 50]].astype(np.float64), [math.inf, math.inf])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(dense.w)), [3, 50])
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(dense.m)), [3, 50])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_value_stops_infinity(verbs, rng, dtype):
    dense = arrays(rng, dtype, (67,))
    dense.m[...] = dense.u[...] = 0
    dense.g[[3, 50]] = math.inf, -math.inf
    dense_step(verbs, dtype, [dense], coefficients=Coefficients(1.0, 0.999, 1e-7, 0.5))
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
    rows_step(verbs, dtype, table, indices)
    expected = np.zeros((6, 5), bool)
    expected[4, 1] = True
    for name in "wmu":
        array = getattr(table, name)
        np.testing.assert_array_equal(~np.isfinite(array), expected)
        assert_same_bits(array[[1, 5]], getattr(before, name)[[1, 5]])


# --- Threads ------------------------------------------------------------------------------

THREADS = (2, 3, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_step_does_not_depend_on_threads(rng, dtype):
    several = [arrays(rng, dtype, (size,)) for size in (500_003, 0, 7, 100_000, 32_768)]
    expected = [one.copy() for one in several]
    dense_step(_reference, dtype, expected)
    for threads in (1, *THREADS):
        actual = [one.copy() for one in several]
        dense_step(_cpu, dtype, actual, threads=threads)
        for one, other in zip(actual, expected, strict=True):
            one.assert_same(other, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["distinct", "repeated", "all the same", "descending"])
def test_rows_step_does_not_depend_on_threads(rng, dtype, pattern):
    rows, row_length = LARGE_TABLE
    indices = PATTERNS[pattern](rng, rows)
    table = arrays(rng, dtype, (rows, row_length), (indices.size, row_length))
    expected = table.copy()
    rows_step(_reference, dtype, expected, indices)
    for threads in (1, *THREADS):
        actual = table.copy()
        rows_step(_cpu, dtype, actual, indices, threads=threads)
        actual.assert_same(expected, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums_do_not_depend_on_threads(rng, dtype):
    rows, row_length = LARGE_TABLE
    gradients = [values(rng, (size,), dtype) for size in (500_003, 0, 7, 65_536, 65_537)]
    indices = PATTERNS["repeated"](rng, rows)
    sparse = values(rng, (indices.size, row_length), dtype)
    one_thread = dense_square_sums(_cpu, dtype, gradients)
    one_thread_of_rows = rows_square_sum(_cpu, dtype, sparse, indices, rows)
    for threads in THREADS:
        of_dense = dense_square_sums(_cpu, dtype, gradients, threads)
        of_rows = rows_square_sum(_cpu, dtype, sparse, indices, rows, threads)
        assert_same_bits(of_dense, one_thread)
        assert of_rows == one_thread_of_rows


# --- Sums of squares ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_square_sums(verbs, rng, dtype):
    gradients = [values(rng, (size,), dtype) for size in (1, 0, 7, 1000, 65_536, 200_001)]
    copies = [gradient.copy() for gradient in gradients]
    sums = dense_square_sums(verbs, dtype, gradients)
    assert sums.dtype == np.float64
    for gradient, copy, actual in zip(gradients, copies, sums, strict=True):
        # Positive terms: the error is at most one rounding for each.
        assert actual == pytest.approx(
            oracle.square_sum(copy), rel=max(gradient.size, 1) * 2**-53, abs=0
        )
        assert_same_bits(gradient, copy)


def test_square_sums_of_nothing(verbs):
    assert dense_square_sums(verbs, "float32", []).shape == (0,)
    no_rows = np.zeros((0, 3), np.float32)
    assert rows_square_sum(verbs, "float32", no_rows, np.zeros(0, np.int64), 5) == 0.0
    empty_rows = np.zeros((2, 0), np.float32)
    assert rows_square_sum(verbs, "float32", empty_rows, np.array([3, 3]), 5) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("table", [(50, 7), LARGE_TABLE], ids=["small", "large"])
def test_rows_square_sum_is_that_of_the_summed_gradient(verbs, rng, dtype, pattern, table):
    indices = PATTERNS[pattern](rng, table[0])
    # Small multiples of 1/8, whose sums and squares are exact in all that adds them up.
    gradient = rng.integers(-16, 17, size=(indices.size, table[1])) / 8
    gradient = gradient.astype(PRECISION[dtype].dtype)
    copy = gradient.copy()
    actual = rows_square_sum(verbs, dtype, gradient, indices, table[0], threads=2)
    assert actual == oracle.square_sum(oracle.Rows(gradient, indices))
    assert_same_bits(gradient, copy)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_square_sums_of_what_is_not_finite(verbs, bad):
    gradient = np.array([[1.0, bad], [2.0, 3.0]], np.float32)
    expected = bits([bad])
    sums = dense_square_sums(verbs, "float32", [gradient])
    np.testing.assert_array_equal(bits(sums), expected)
    of_rows = rows_square_sum(verbs, "float32", gradient, np.array([1, 1]), 2)
    np.testing.assert_array_equal(bits([of_rows]), expected)


def test_square_sums_are_in_float64(verbs):
    gradient = np.array([1e30, 1e-30, 1.0], np.float32)
    squares = gradient.astype(np.float64) ** 2
    assert dense_square_sums(verbs, "float32", [gradient]) == squares.sum()
    assert dense_square_sums(verbs, "float32", [gradient[1:2]]) == squares[1]


# --- Rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_are_summed_then_stepped(verbs, rng, pattern, index_dtype):
    """Against dense steps of the rows that occur, with the sums as their gradients."""
    rows, row_length = 300, 5
    indices = PATTERNS[pattern](rng, rows).astype(index_dtype)
    table = arrays(rng, "float32", (rows, row_length), (indices.size, row_length))
    before = table.copy()
    rows_step(verbs, "float32", table, indices)
    for row in range(rows):
        at = np.flatnonzero(indices == row)
        if at.size:
            total = table.g[at[0]].copy()
            for position in at[1:]:
                total += table.g[position]
            dense = Arrays(before.w[row], before.m[row], before.u[row], total)
            dense_step(verbs, "float32", [dense])
        else:
            dense = Arrays(before.w[row], before.m[row], before.u[row], before.w[row])
        for name in "wmu":
            expected = getattr(dense, name)
            assert_same_bits(getattr(table, name)[row], expected, f"{name}[{row}]")
    assert_same_bits(table.g, before.g)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("rows", [1, 2, 2048, 2049, 2**22 + 1, 2**23])
def test_rows_of_tables_of_many_sizes(rng, rows, index_dtype):
    """More rows take more passes of sorting; the table's pages are touched where used."""
    indices = rng.integers(rows, size=500)
    indices = np.concatenate([indices, indices[::3], [0, rows - 1]]).astype(index_dtype)
    gradient = values(rng, (indices.size, 1), "float32")
    distinct, place = np.unique(indices, return_inverse=True)
    w, m, u = (np.zeros((rows, 1), np.float32) for _ in range(3))
    small = Arrays(*(np.zeros((distinct.size, 1), np.float32),) * 3, gradient)
    addresses = np.array([address(array) for array in (w, m, u, gradient)])
    groups = _cpu.group_rows(indices, rows)
    _cpu.rows_step(Storage.FLOAT32, groups, addresses, 1, FACTORS, COEFFICIENTS, 1)
    rows_step(_reference, "float32", small, place)
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
def test_rows_outside_the_table_are_refused(
    verbs, indices, rows, position, value, index_dtype
):
    indices = np.array(indices, index_dtype)
    expected = rf"^indices\[{position}\] must be in \[0, {rows}\), got {value}$"
    with pytest.raises(IndexError, match=expected):
        verbs.group_rows(indices, rows)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_indices_of_64_bits_are_not_cut(verbs, value):
    with pytest.raises(IndexError, match=rf"^indices\[1\] must be .*, got {value}$"):
        verbs.group_rows(np.array([0, value], np.int64), 5)


def test_indices_may_be_strided_or_read_only(verbs, rng):
    indices = np.arange(20)[::-2]
    indices.flags.writeable = False
    table = arrays(rng, "float32", (20, 3), (10, 3))
    expected = table.copy()
    rows_step(verbs, "float32", table, indices)
    rows_step(verbs, "float32", expected, indices.copy())
    table.assert_same(expected)


# --- 16-bit numbers -----------------------------------------------------------------------

HALVES = ("float16", "bfloat16")
ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def _step_of(verbs, verb, dtype, w, m, u, g, factors, coefficients):
    """One step by either verb of arrays of one dimension; returns w, m and u."""
    together = Arrays(w, m, u, g)
    if verb == "dense":
        dense_step(verbs, dtype, [together], factors, coefficients)
    else:
        # Two gradients to a row make the kernel sum them first.
        column = (w.size, 1)
        values = np.stack([np.zeros_like(g), g], axis=1).reshape(-1, 1)
        together = Arrays(w.reshape(column), m.reshape(column), u.reshape(column), values)
        indices = np.repeat(np.arange(w.size), 2)
        rows_step(verbs, dtype, together, indices, factors, coefficients)
    return together.w.ravel(), together.m.ravel(), together.u.ravel()


@pytest.mark.parametrize("verb", ["dense", "rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_widened_exactly(verbs, verb, dtype):
    g = ALL_PATTERNS.view(PRECISION[dtype].dtype)
    zero = np.zeros(g.size, np.float32)
    coefficients = Coefficients(1.0, 0.0, 1e-7, math.inf)
    _, m, u = _step_of(verbs, verb, dtype, g, zero, zero, g, FACTORS, coefficients)
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
    stored, _, _ = _step_of(verbs, verb, dtype, w, zero, one, g, FACTORS, COEFFICIENTS)
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
    coefficients = Coefficients(0.0, 1.0, 2.0**-126, math.inf)
    factors = factors_of(step_size=-1.0)
    stored, _, _ = _step_of(
        verbs, verb, dtype, zero, numbers, one, zero, factors, coefficients
    )
    with np.errstate(all="ignore"):
        expected = numbers.astype(PRECISION[dtype].dtype)
    assert np.isinf(expected).any()
    assert (expected[numbers != 0] == 0).any()
    assert_same_bits(stored, np.where(numbers == 0, zero, expected))


# --- The choice ---------------------------------------------------------------------------


def test_storage():
    for dtype in DTYPES:
        storage = Storage.of(PRECISION[dtype].dtype)
        assert storage is Storage(dtype)
        assert storage.itemsize == PRECISION[dtype].dtype.itemsize
        assert state_dtype(storage) == PRECISION[dtype].state
    for other in ("int32", "complex64", "float128", "bool", "object"):
        assert Storage.of(other) is None


def test_compiled_kernels_are_the_choice():
    assert kernels() is _cpu


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
