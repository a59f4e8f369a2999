"""Sparse gradients of ``adamax.Adamax``: rows that are touched, and rows that are not."""

import dataclasses
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from adamax import Adamax, IndexedSlices
from cases import DTYPES, HYPERPARAMETERS, LARGE_TABLE, PATTERNS, PRECISION, TABLES, values
from compare import assert_same_bits, assert_same_contents, contents, follow


def batches(rng, table, dtype, pattern, steps):
    """One list of gradients for each step."""
    made = []
    for _ in range(steps):
        indices = PATTERNS[pattern](rng, table[0])
        shape = (indices.size, *table[1:])
        made.append([IndexedSlices(values(rng, shape, dtype), indices)])
    return made


# --- The oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("table", TABLES)
def test_sparse_steps_follow_the_oracle(rng, table, pattern, dtype):
    w = values(rng, TABLES[table], dtype)
    gradients = batches(rng, TABLES[table], dtype, pattern, 4)
    follow(Adamax(), oracle.Rule(), [w], gradients)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundreds_of_sparse_steps_follow_the_oracle(rng, dtype, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    table = (30, 3)
    w = values(rng, table, dtype)
    gradients = []
    for pattern in ("repeated", "distinct", "none", "one") * 50:
        gradients += batches(rng, table, dtype, pattern, 1)
    follow(Adamax(**chosen), oracle.Rule(**chosen), [w], gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hyperparameters", ["weight decay", "clipnorm"])
def test_large_tables_follow_the_oracle(rng, use_threads, dtype, hyperparameters):
    use_threads(3)
    chosen = HYPERPARAMETERS[hyperparameters]
    w = values(rng, LARGE_TABLE, dtype)
    gradients = batches(rng, LARGE_TABLE, dtype, "repeated", 2)
    follow(Adamax(**chosen), oracle.Rule(**chosen), [w], gradients)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
def test_dense_and_sparse_in_one_step_follow_the_oracle(rng, hyperparameters):
    chosen = HYPERPARAMETERS[hyperparameters]
    parameters, steps = [], []
    for dtype in DTYPES:
        parameters += [values(rng, (30, 3), dtype), values(rng, (17,), dtype)]
    for step in range(8):
        of_this_step = []
        for i, dtype in enumerate(DTYPES):
            pattern = list(PATTERNS)[(step + i) % len(PATTERNS)]
            of_this_step += [
                *batches(rng, (30, 3), dtype, pattern, 1)[0],
                None if step % 5 == i + 1 else values(rng, (17,), dtype),
            ]
        steps.append(of_this_step)
    follow(Adamax(**chosen), oracle.Rule(**chosen), parameters, steps)


def test_a_table_may_have_dense_and_sparse_gradients_in_turn(rng):
    table = (30, 3)
    w = values(rng, table, "float32")
    gradients = []
    for pattern in ("repeated", "distinct", "one"):
        gradients += batches(rng, table, "float32", pattern, 2)
        gradients.append([values(rng, table, "float32")])
    follow(Adamax(clipnorm=0.5), oracle.Rule(clipnorm=0.5), [w], gradients)


@given(
    rows=st.integers(1, 12),
    row_shape=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    drawn=st.lists(st.lists(st.integers(0, 10**6), max_size=30), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    clipping=st.sampled_from([{}, {"clipvalue": 0.5}, {"weight_decay": 0.1}]),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_sparse_steps_follow_the_oracle(
    rows, row_shape, drawn, dtype, clipping, seed
):
    rng = np.random.default_rng(seed)
    w = values(rng, (rows, *row_shape), dtype)
    gradients = []
    for numbers in drawn:
        indices = np.array(numbers, np.int64) % rows
        shape = (indices.size, *row_shape)
        gradients.append([IndexedSlices(values(rng, shape, dtype), indices)])
    follow(Adamax(**clipping), oracle.Rule(**clipping), [w], gradients)


# --- Touched and untouched ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chosen", [{}, {"weight_decay": 0.1}, {"clipnorm": 0.1}], ids=str)
def test_untouched_rows_keep_every_bit(rng, dtype, pattern, chosen):
    table = (50, 6)
    w = values(rng, table, dtype)
    w[::7] = math.nan  # would spread
    optimizer = Adamax(0.1, **chosen)
    optimizer.apply_gradients([(values(rng, table, dtype), w)])
    for gradient in batches(rng, table, dtype, pattern, 3):
        before = contents(optimizer, [w])
        optimizer.apply_gradients([(gradient[0], w)])
        after = contents(optimizer, [w])
        untouched = np.setdiff1d(np.arange(len(w)), gradient[0].indices)
        assert set(after) == {"iterations", "0.m", "0.u", "w0"}
        for name in ("0.m", "0.u", "w0"):
            assert_same_bits(after[name][untouched], before[name][untouched], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_touched_when_its_index_is_present_whatever_the_values(dtype):
    w = np.ones((3, 2), PRECISION[dtype].dtype)
    optimizer = Adamax(0.25, beta_1=0.5, beta_2=0.5)
    optimizer.apply_gradients([(np.ones_like(w), w)])
    before = contents(optimizer, [w])
    optimizer.apply_gradients([(IndexedSlices(np.zeros((1, 2), w.dtype), [1]), w)])
    after = contents(optimizer, [w])
    np.testing.assert_array_equal(after["0.m"][1], before["0.m"][1] / 2)
    np.testing.assert_array_equal(after["0.u"][1], before["0.u"][1] / 2)
    assert (after["w0"][1] < before["w0"][1]).all()
    for name in ("0.m", "0.u", "w0"):
        assert_same_bits(after[name][[0, 2]], before[name][[0, 2]], name)


def test_weight_decay_reaches_touched_rows_only():
    w = np.ones((3, 2))
    gradient = IndexedSlices(np.zeros((2, 2)), [2, 2])
    Adamax(0.5, weight_decay=0.5).apply_gradients([(gradient, w)])
    np.testing.assert_array_equal(w, [[1, 1], [1, 1], [0.75, 0.75]])


def test_bias_correction_counts_the_optimizers_steps_and_not_the_rows():
    w = np.zeros((2, 1))
    optimizer = Adamax(1.0, epsilon=2.0**-126)
    for row in [0] * 9 + [1]:
        optimizer.apply_gradients([(IndexedSlices([[1.0]], [row]), w)])
    assert w[1] == pytest.approx(-0.1 / (1 - 0.9**10), rel=1e-14)


def test_an_empty_gradient_still_counts_as_a_step(rng):
    w = values(rng, (5, 2), "float32")
    before = w.copy()
    optimizer = Adamax(clipnorm=1.0)
    nothing = IndexedSlices(np.zeros((0, 2), np.float32), [])
    assert optimizer.apply_gradients([(nothing, w)]) == 1
    assert_same_bits(w, before)


# --- Sums ---------------------------------------------------------------------------------


def _after(rng_seed, gradients, table=(40, 5), dtype="float32", **chosen):
    w = values(np.random.default_rng(rng_seed), table, dtype)
    optimizer = Adamax(0.01, **chosen)
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, w)])
    return contents(optimizer, [w])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 0.5}], ids=str)
def test_every_row_once_is_the_dense_step(rng, dtype, clipping):
    dense = [values(rng, (40, 5), dtype) for _ in range(5)]
    sparse = []
    for gradient in dense:
        indices = rng.permutation(40)
        sparse.append(IndexedSlices(gradient[indices], indices))
    expected = _after(1, dense, dtype=dtype, **clipping)
    assert_same_contents(_after(1, sparse, dtype=dtype, **clipping), expected)


@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 2.0}, {"clipnorm": 3.0}], ids=str)
def test_repeats_are_the_same_as_their_sum(rng, clipping):
    repeated, summed = [], []
    for _ in range(5):
        indices = rng.integers(40, size=100)
        exact = rng.integers(-8, 9, size=(100, 5)).astype(np.float32) / 4
        distinct, place = np.unique(indices, return_inverse=True)
        total = np.zeros((distinct.size, 5), np.float32)
        np.add.at(total, place, exact)
        repeated.append(IndexedSlices(exact, indices))
        summed.append(IndexedSlices(total, distinct))
    expected = _after(1, summed, **clipping)
    assert_same_contents(_after(1, repeated, **clipping), expected)


def test_repeats_that_cancel_are_a_zero_gradient():
    """U takes |sum of g| and not the sum of |g|."""
    cancelling = IndexedSlices(np.array([[3.0] * 5, [-3.0] * 5], np.float32), [4, 4])
    zero = IndexedSlices(np.zeros((1, 5), np.float32), [4])
    assert_same_contents(_after(1, [cancelling]), _after(1, [zero]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_repeats_of_16_bit_values_are_summed_in_float32(dtype):
    w = np.zeros((1, 1), PRECISION[dtype].dtype)
    optimizer = Adamax()
    # In either 16-bit dtype, 256 + 0.1 is 256.
    addends = np.array([256] + [0.125] * 64).astype(w.dtype).reshape(-1, 1)
    optimizer.apply_gradients([(IndexedSlices(addends, [0] * 65), w)])
    assert optimizer.state_dict()["0.u"] == 264


def test_the_order_of_distinct_rows_does_not_matter(rng):
    gradient = values(rng, (20, 5), "float32")
    indices = rng.permutation(40)[:20]
    order = rng.permutation(20)
    expected = _after(1, [IndexedSlices(gradient, indices)])
    shuffled = [IndexedSlices(gradient[order], indices[order])]
    assert_same_contents(_after(1, shuffled), expected)


# --- What a sparse gradient may look like -------------------------------------------------

INDEX_TYPES = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "big-endian int32": ">i4",
    "big-endian int64": ">i8",
}


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("pattern", ["none", "repeated", "descending"])
def test_indices_may_be_of_any_integer_type(rng, index_type, pattern):
    indices = PATTERNS[pattern](rng, 40)
    gradient = values(rng, (indices.size, 5), "float32")
    expected = _after(1, [IndexedSlices(gradient, indices)])
    converted = indices.astype(INDEX_TYPES[index_type])
    assert_same_contents(_after(1, [IndexedSlices(gradient, converted)]), expected)


def _misaligned(array):
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    "list": lambda array: array.tolist(),
    "F": np.asfortranarray,
    "strided": lambda array: np.repeat(array, 2, axis=0)[::2],
    "negative": lambda array: array[::-1].copy()[::-1],
    "misaligned": _misaligned,
    "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "read-only": _read_only,
    "wider": lambda array: array.astype(np.float64 if array.dtype.kind == "f" else "i8"),
}


@pytest.mark.parametrize("of_values", LAYOUTS)
@pytest.mark.parametrize("of_indices", LAYOUTS)
def test_values_and_indices_may_have_any_layout(rng, of_values, of_indices):
    indices = PATTERNS["repeated"](rng, 40)
    gradient = values(rng, (indices.size, 5), "float32")
    expected = _after(1, [IndexedSlices(gradient, indices)])
    laid_out = LAYOUTS[of_values](gradient), LAYOUTS[of_indices](indices)
    copies = [np.array(array) for array in laid_out]
    assert_same_contents(_after(1, [IndexedSlices(*laid_out)]), expected)
    for array, copy in zip(laid_out, copies, strict=True):
        assert_same_bits(np.array(array), copy)


@pytest.mark.parametrize("gradient_dtype", [*DTYPES, "longdouble", "int32", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_another_dtype_are_converted(rng, dtype, gradient_dtype):
    indices = PATTERNS["repeated"](rng, 40)
    exact = rng.integers(0, 100, size=(indices.size, 5))
    wanted = PRECISION.get(gradient_dtype)
    given = exact.astype(wanted.dtype if wanted else gradient_dtype)
    expected = IndexedSlices(exact.astype(PRECISION[dtype].dtype), indices)
    actual = _after(1, [IndexedSlices(given, indices)], dtype=dtype)
    assert_same_contents(actual, _after(1, [expected], dtype=dtype))


@pytest.mark.parametrize(
    "dense_shape", [(40, 5), [40, 5], np.array([40, 5]), None], ids=repr
)
def test_the_dense_shape_may_be_given(rng, dense_shape):
    gradient = values(rng, (2, 5), "float32")
    expected = _after(1, [IndexedSlices(gradient, [3, 1])])
    given = IndexedSlices(gradient, [3, 1], dense_shape)
    assert_same_contents(_after(1, [given]), expected)


def test_anything_with_values_and_indices_is_a_sparse_gradient(rng):
    gradient = values(rng, (2, 5), "float32")
    expected = _after(1, [IndexedSlices(gradient, [3, 1])])
    other = SimpleNamespace(values=gradient, indices=[3, 1])
    assert_same_contents(_after(1, [other]), expected)
    assert_same_contents(_after(1, [oracle.Rows(gradient, [3, 1])]), expected)


def test_indexed_slices_are_frozen():
    slices = IndexedSlices(np.ones((1, 2)), [0])
    assert slices.dense_shape is None
    with pytest.raises(dataclasses.FrozenInstanceError, match="values"):
        slices.values = None


@pytest.mark.parametrize("pattern", ["none", "repeated", "every"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_indexed_slices_of_tensorflow(rng, tensorflow, pattern, dtype, index_dtype):
    indices = PATTERNS[pattern](rng, 40).astype(index_dtype)
    gradient = values(rng, (indices.size, 5), dtype)
    expected = _after(1, [IndexedSlices(gradient, indices)], dtype=dtype)
    for dense_shape in (None, (40, 5)):
        given = tensorflow.IndexedSlices(
            tensorflow.constant(gradient), tensorflow.constant(indices), dense_shape
        )
        assert_same_contents(_after(1, [given], dtype=dtype), expected)


def test_gradients_of_a_tensorflow_lookup(tensorflow):
    start = np.arange(12, dtype=np.float32).reshape(6, 2)
    table = tensorflow.Variable(start)
    with tensorflow.GradientTape() as tape:
        rows = tensorflow.nn.embedding_lookup(table, [4, 1, 4])
        loss = tensorflow.reduce_sum(rows * rows)
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tensorflow.IndexedSlices)
    w = start.copy()
    Adamax(0.1).apply_gradients([(gradient, w)])
    np.testing.assert_array_equal(np.flatnonzero((w != start).any(axis=1)), [1, 4])
    np.testing.assert_allclose(w[[1, 4]], start[[1, 4]] - 0.1, rtol=1e-6)


# --- Cost ---------------------------------------------------------------------------------


def test_a_step_allocates_nothing_of_the_size_of_the_table():
    w = np.zeros((4_000_000, 8), np.float32)
    optimizer = Adamax(clipnorm=1.0)
    optimizer.build([w])
    gradient = IndexedSlices(np.ones((100, 8), np.float32), np.arange(0, 4_000_000, 40_000))
    optimizer.apply_gradients([(gradient, w)])
    tracemalloc.start()
    try:
        optimizer.apply_gradients([(gradient, w)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert np.count_nonzero(w[::40_000]) == 800


# --- Dense and sparse in one step ---------------------------------------------------------


def _mixed_model(rng, dtype):
    return [values(rng, shape, dtype) for shape in ((5,), (20, 3), (7, 2), (30, 4))]


def _mixed_gradients(rng, dtype, sparse):
    gradients = []
    for position, shape in enumerate([(5,), (20, 3), (7, 2), (30, 4)]):
        if position in sparse:
            indices = rng.integers(shape[0], size=6)
            rows = values(rng, (6, *shape[1:]), dtype)
            gradients.append(IndexedSlices(rows, indices))
        else:
            gradients.append(values(rng, shape, dtype))
    return gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chosen", [{}, {"global_clipnorm": 1.0}, {"clipnorm": 0.5}], ids=str
)
def test_dense_and_sparse_gradients_may_be_mixed_and_change_places(rng, dtype, chosen):
    """The same arrays in several steps, and others: a step knows those of the last."""
    sparse = [{1, 3}, {1, 3}, {3, 1}, {1}, {1}, {0, 1}, set(), set(), {1, 3}, {0, 1, 2, 3}]
    gradients = [_mixed_gradients(rng, dtype, places) for places in sparse]
    model = _mixed_model(rng, dtype)
    follow(Adamax(**chosen), oracle.Rule(**chosen), model, gradients)


def test_a_parameter_may_not_be_both_dense_and_sparse_in_one_step(rng):
    model, optimizer = _mixed_model(rng, "float32"), Adamax()
    for _ in range(2):
        gradients = _mixed_gradients(rng, "float32", {1, 3})
        optimizer.apply_gradients(zip(gradients, model, strict=True))
    before = contents(optimizer, [w.copy() for w in model])
    gradients = _mixed_gradients(rng, "float32", {1, 3})
    twice = IndexedSlices(values(rng, (1, 2), "float32"), [4]), model[2]
    with pytest.raises(ValueError, match=r"^parameter '2' occurs more than once$"):
        optimizer.apply_gradients([*zip(gradients, model, strict=True), twice])
    assert_same_contents(contents(optimizer, model), before)


def test_a_sparse_gradient_may_be_a_view_of_any_parameter(rng):
    """Read as it was before the step, whichever comes first."""
    model = [values(rng, (6, 4), "float32") for _ in range(2)]
    expected = [w.copy() for w in model]
    optimizer, reference = Adamax(0.1), Adamax(0.1)
    for _ in range(3):
        indices = np.array([4, 0, 4])
        reference.apply_gradients(
            [
                (expected[1].copy(), expected[0]),
                (IndexedSlices(expected[0][:3].copy(), indices), expected[1]),
            ]
        )
        optimizer.apply_gradients(
            [(model[1], model[0]), (IndexedSlices(model[0][:3], indices), model[1])]
        )
    assert_same_contents(contents(optimizer, model), contents(reference, expected))
