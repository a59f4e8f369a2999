"""Arrays as they come: any layout, any overlap of gradients, and nothing else written."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamax import Adamax, IndexedSlices
from cases import DTYPES, PATTERNS, PRECISION, values
from compare import assert_same_bits, assert_same_contents, contents
from numpy_cases import LAYOUTS

# --- Layouts ------------------------------------------------------------------------------

SHAPES = {"vector": (23,), "matrix": (6, 7), "3-d": (4, 3, 5)}


def laid_out(layout, array, path):
    """The values of ``array`` in the layout, and the memory around them."""
    memory, inside = LAYOUTS[layout](array.shape, array.dtype, path)
    inside[...] = array
    return memory, inside


def state_of(optimizer):
    """The state, in the C order that the comparison is not about."""
    return {name: np.array(entry) for name, entry in optimizer.state_dict().items()}


def assert_steps_as_if_contiguous(layout, start, gradients, path, **hyperparameters):
    plain, contiguous = Adamax(**hyperparameters), start.copy(order="C")
    memory, w = laid_out(layout, start, path)
    optimizer = Adamax(**hyperparameters)
    for gradient in gradients:
        plain.apply_gradients([(gradient, contiguous)])
        optimizer.apply_gradients([(gradient, w)])
    assert (contiguous != start).any()
    assert_same_contents(state_of(optimizer), state_of(plain))
    # All of the memory, with what lies between the elements.
    expected, _ = laid_out(layout, contiguous, path)
    assert np.array(memory).tobytes() == np.array(expected).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_may_have_any_layout(rng, tmp_path, layout, shape, dtype):
    start = values(rng, SHAPES[shape], dtype)
    dense = [values(rng, SHAPES[shape], dtype) for _ in range(3)]
    rows = SHAPES[shape][0]
    sparse = [
        IndexedSlices(values(rng, (rows, *SHAPES[shape][1:]), dtype), indices)
        for indices in rng.integers(rows, size=(3, rows))
    ]
    mixed = [dense[0], *sparse, dense[1]]
    chosen = {"learning_rate": 0.1, "clipvalue": 0.5, "weight_decay": 0.1}
    assert_steps_as_if_contiguous(layout, start, mixed, tmp_path, **chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_parameters_may_have_any_layout(rng, tmp_path, use_threads, layout):
    use_threads(3)
    shape = (301, 1003)
    start = values(rng, shape, "float32")
    indices = PATTERNS["repeated"](rng, 301)
    gradients = [
        values(rng, shape, "float32"),
        IndexedSlices(values(rng, (indices.size, 1003), "float32"), indices),
    ]
    assert_steps_as_if_contiguous(layout, start, gradients, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
def test_gradients_may_have_any_layout(rng, tmp_path, of_gradient, of_parameter, dtype):
    start = values(rng, (6, 7), dtype)
    plain = values(rng, (6, 7), dtype)
    memory, gradient = laid_out(of_gradient, plain, tmp_path)
    before = np.array(memory).tobytes()
    gradient.flags.writeable = False
    expected, actual = start.copy(), laid_out(of_parameter, start, tmp_path)[1]
    optimizer = Adamax(0.1)
    Adamax(0.1).apply_gradients([(plain, expected)])
    optimizer.apply_gradients([(gradient, actual)])
    assert_same_bits(actual, expected)
    assert np.array(memory).tobytes() == before


@st.composite
def strange_arrays(draw, dtype):
    """Any slice of any permutation of axes, at any offset in bytes, in either order."""
    dtype = PRECISION[dtype].dtype
    dtype = draw(st.sampled_from([dtype, dtype.newbyteorder()]))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    firsts = [draw(st.integers(0, 2)) for _ in shape]
    steps = [draw(st.sampled_from([1, 2, 3])) for _ in shape]
    offset = draw(st.integers(0, 2 * dtype.itemsize))
    room = [f + s * n for f, s, n in zip(firsts, steps, shape, strict=True)]
    memory = np.full(math.prod(room) * dtype.itemsize + offset, 7, np.uint8)
    array = memory[offset:].view(dtype).reshape(room)
    array = array[tuple(slice(f, None, s) for f, s in zip(firsts, steps, strict=True))]
    array = np.flip(array, draw(st.sets(st.integers(0, array.ndim - 1)).map(tuple)))
    return memory, array.transpose(draw(st.permutations(range(array.ndim))))


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    sparse=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_parameters_may_be_any_view_of_any_memory(data, dtype, sparse, seed):
    rng = np.random.default_rng(seed)
    memory, w = data.draw(strange_arrays(dtype))
    start = values(rng, w.shape, dtype)
    w[...] = start
    between = memory.copy()
    gradient, expected = values(rng, w.shape, dtype), start.copy()
    if sparse:
        gradient = IndexedSlices(gradient, rng.integers(len(w), size=len(w)))
    Adamax(0.1).apply_gradients([(gradient, expected)])
    Adamax(0.1).apply_gradients([(gradient, w)])
    assert_same_bits(w, expected)
    w[...] = start
    np.testing.assert_array_equal(memory, between)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_gradients_may_be_any_view_of_any_memory(data, dtype):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    memory, gradient = data.draw(strange_arrays(dtype))
    plain = values(rng, gradient.shape, dtype)
    gradient[...] = plain
    before = memory.copy()
    expected, actual = values(rng, plain.shape, dtype), None
    actual = expected.copy(data.draw(st.sampled_from("CF")))
    Adamax(0.1).apply_gradients([(plain, expected)])
    Adamax(0.1).apply_gradients([(gradient, actual)])
    assert_same_bits(actual, expected)
    np.testing.assert_array_equal(memory, before)


# --- Gradients of other types -------------------------------------------------------------

GRADIENTS = {
    "list": lambda array: array.tolist(),
    "nested tuples": lambda array: tuple(map(tuple, array.tolist())),
    "float64": lambda array: array.astype(np.float64),
    "float32": lambda array: array.astype(np.float32),
    "float16": lambda array: array.astype(np.float16),
    "bfloat16": lambda array: array.astype(PRECISION["bfloat16"].dtype),
    "longdouble": lambda array: array.astype(np.longdouble),
    "int8": lambda array: array.astype(np.int8),
    "uint32": lambda array: np.abs(array).astype(np.uint32),
    "int64": lambda array: array.astype(np.int64),
    "masked": lambda array: np.ma.array(array),
    "array interface": lambda array: memoryview(array.astype(np.float32)),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_other_types_are_converted(rng, dtype, kind):
    exact = np.abs(rng.integers(-9, 10, size=(4, 5))).astype(PRECISION[dtype].dtype)
    given = GRADIENTS[kind](exact)
    expected, actual = values(rng, (4, 5), dtype), None
    actual = expected.copy()
    Adamax(0.1).apply_gradients([(exact, expected)])
    Adamax(0.1).apply_gradients([(given, actual)])
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "gradient", [2, 2.0, np.float32(2), np.int16(2), [], [[]]], ids=repr
)
def test_scalars_and_empty_lists_are_gradients_too(dtype, gradient):
    shape = np.shape(gradient)
    w = np.ones(shape, PRECISION[dtype].dtype)
    Adamax(0.5, epsilon=2.0**-126, beta_1=0).apply_gradients([(gradient, w)])
    np.testing.assert_array_equal(w, np.full(shape, 0.5))


def test_gradients_may_be_tensors_of_torch(torch):
    w = np.ones((2, 3), np.float32)
    Adamax(0.5, beta_1=0).apply_gradients([(torch.full((2, 3), -2.0), w)])
    np.testing.assert_allclose(w, 1.5, rtol=1e-6)


def test_gradients_may_be_tensors_of_tensorflow(tensorflow):
    w = np.ones((2, 3), np.float32)
    Adamax(0.5, beta_1=0).apply_gradients([(tensorflow.fill((2, 3), -2.0), w)])
    np.testing.assert_allclose(w, 1.5, rtol=1e-6)


# --- Overlap ------------------------------------------------------------------------------


def _overlapping_step(w, gradient, **chosen):
    """A step with a gradient somewhere in the memory of w, and what it should give."""
    plain_w = np.array(w, order="C")
    plain_gradient = gradient
    if isinstance(gradient, IndexedSlices):
        plain_gradient = IndexedSlices(gradient.values.copy(), gradient.indices.copy())
    else:
        plain_gradient = gradient.copy()
    Adamax(0.1, **chosen).apply_gradients([(plain_gradient, plain_w)])
    Adamax(0.1, **chosen).apply_gradients([(gradient, w)])
    assert_same_bits(w, plain_w)


SQUARE = (401, 401)

VIEWS_OF_THE_PARAMETER = {
    "itself": lambda w: w,
    "a view": lambda w: w[:],
    "reversed": lambda w: w[::-1],
    "transposed": lambda w: w.T,
    "read-only": lambda w: np.broadcast_to(w, w.shape),
    "one row": lambda w: np.broadcast_to(w[3], w.shape),
    "one element": lambda w: np.broadcast_to(w[3, 3], w.shape),
}


@pytest.mark.parametrize("view", VIEWS_OF_THE_PARAMETER)
@pytest.mark.parametrize("layout", ["C", "F", "strided", "misaligned", "byte-swapped"])
@pytest.mark.parametrize("chosen", [{}, {"clipnorm": 1.0}], ids=str)
def test_a_gradient_may_be_a_view_of_its_parameter(
    rng, tmp_path, use_threads, view, layout, chosen
):
    use_threads(3)
    _, w = laid_out(layout, values(rng, SQUARE, "float32"), tmp_path)
    _overlapping_step(w, VIEWS_OF_THE_PARAMETER[view](w), **chosen)


@pytest.mark.parametrize("shift", [-70_000, -40_000, -1, 1, 40_000, 70_000])
def test_a_gradient_may_overlap_its_parameter_in_part(rng, use_threads, shift):
    use_threads(3)
    memory = values(rng, (300_000 + abs(shift),), "float32")
    w, gradient = memory[abs(shift) :], memory[: memory.size - abs(shift)]
    if shift < 0:
        w, gradient = gradient, w
    _overlapping_step(w, gradient)


def test_rows_of_a_table_may_be_its_gradient(rng):
    w = values(rng, (30, 4), "float32")
    _overlapping_step(w, IndexedSlices(w[5:15], np.arange(10)))
    _overlapping_step(w, IndexedSlices(w, np.arange(30)[::-1]))


def test_the_bytes_of_a_table_may_be_its_indices():
    w = np.zeros((4, 2), np.float64)
    indices = w.view(np.int64)[1]
    expected = w.copy()
    gradient = np.ones((2, 2))
    Adamax(0.1).apply_gradients([(IndexedSlices(gradient, [0, 0]), expected)])
    Adamax(0.1).apply_gradients([(IndexedSlices(gradient, indices), w)])
    assert_same_bits(w, expected)


def test_a_gradient_may_be_another_parameter_of_the_same_step(rng):
    starts = [values(rng, (1000,), "float32") for _ in range(3)]
    results = []
    for copied in (True, False):
        parameters = [start.copy() for start in starts]
        shifted = parameters[1:] + parameters[:1]
        gradients = [w.copy() for w in shifted] if copied else shifted
        optimizer = Adamax(0.1)
        optimizer.apply_gradients(zip(gradients, parameters, strict=True))
        results.append(contents(optimizer, parameters))
    assert_same_contents(results[1], results[0])


@pytest.mark.parametrize("entry", ["0.m", "0.u", "1.m", "1.u"])
def test_a_gradient_may_be_state(rng, entry):
    starts = [values(rng, (1000,), "float32") for _ in range(2)]
    results = []
    for copied in (True, False):
        parameters = [start.copy() for start in starts]
        optimizer = Adamax(0.1)
        optimizer.apply_gradients(zip(starts, parameters, strict=True))
        gradient = optimizer.state_dict()[entry]
        gradient = gradient.copy() if copied else gradient
        optimizer.apply_gradients([(gradient, parameters[0]), (starts[0], parameters[1])])
        results.append(contents(optimizer, parameters))
    assert_same_contents(results[1], results[0])


def test_a_gradient_may_be_in_a_parameter_that_has_empty_ones_in_it(rng):
    """Parts of a parameter's memory that hold no elements share none with it."""
    memory, gradient = (values(rng, (5000,), "float32") for _ in range(2))
    w, expected = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    Adamax(0.1).apply_gradients([(memory[1000:2000].copy(), expected)])
    empty = [memory[start:start] for start in range(0, 60, 10)]
    pairs = [(gradient, memory), *((part, part) for part in empty)]
    Adamax(0.1).apply_gradients([*pairs, (memory[1000:2000], w)])
    assert_same_bits(w, expected)


def test_two_parameters_may_have_one_gradient(rng):
    gradient = values(rng, (100,), "float32")
    before = gradient.copy()
    first, second = np.zeros(100, np.float32), np.zeros(100, np.float32)
    Adamax(0.1).apply_gradients([(gradient, first), (gradient, second)])
    assert_same_bits(first, second)
    assert_same_bits(gradient, before)
    assert first.any()


def test_parameters_may_interleave_without_overlap(rng):
    """Views of the same memory that share no element."""
    start, gradient = (values(rng, (10, 12), "float32") for _ in range(2))
    cuts = [
        (slice(None), slice(0, 4)),
        (slice(0, None, 2), slice(4, 12)),
        (slice(1, None, 2), slice(4, None, 2)),
        (slice(1, None, 2), slice(5, None, 2)),
    ]
    whole, parts = start.copy(), start.copy()
    Adamax(0.1).apply_gradients([(gradient, whole)])
    Adamax(0.1).apply_gradients([(gradient[cut], parts[cut]) for cut in cuts])
    assert_same_bits(parts, whole)


# --- State --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_state_has_the_shape_of_the_parameter_and_at_least_32_bits(dtype, shape):
    w = np.ones(shape, PRECISION[dtype].dtype)
    optimizer = Adamax()
    optimizer.apply_gradients([(np.ones(shape), w)])
    state = optimizer.state_dict()
    assert list(state) == ["iterations", "0.m", "0.u"]
    for part in ("0.m", "0.u"):
        assert state[part].shape == shape
        assert state[part].dtype == PRECISION[dtype].state


def test_state_belongs_to_the_object_and_not_to_its_value_or_address():
    """An array that is gone must not hand its state to one that takes its place."""
    optimizer = Adamax(beta_1=0.5)
    for number in range(50):
        w = np.zeros(1000)
        optimizer.apply_gradients([(np.ones(1000), w)])
        assert (optimizer.state_dict()[f"{number}.m"] == 0.5).all()


def test_two_optimizers_may_share_a_parameter():
    w = np.zeros(3)
    first, second = Adamax(0.5, beta_1=0), Adamax(0.25, beta_1=0)
    first.apply_gradients([(np.ones(3), w)])
    second.apply_gradients([(np.ones(3), w)])
    np.testing.assert_allclose(w, -0.75, rtol=1e-6)
    assert first.iterations == second.iterations == 1


# --- Memory that changes between steps ----------------------------------------------------


def held(optimizer, array):
    """A copy of both, in which the optimizer keeps the array alive."""
    return copy.deepcopy((optimizer, array))


def test_a_table_that_moved_in_memory_is_written_where_it_is(rng):
    expected, other = np.ones((50, 4), np.float32), Adamax(0.1)
    gradient = IndexedSlices(np.ones((2, 4), np.float32), [3, 40])
    other.apply_gradients([(gradient, expected)])
    optimizer, table = held(other, expected)
    table.resize((500_000, 4), refcheck=False)
    others = [np.zeros((50, 4), np.float32) for _ in range(100)]
    table.resize((50, 4), refcheck=False)
    for each, array in ((optimizer, table), (other, expected)):
        each.apply_gradients([(gradient, array)])
    assert_same_bits(table, expected)
    assert not any(array.any() for array in others)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_that_has_another_size_is_refused(sparse):
    table, optimizer = np.ones((50, 4), np.float32), Adamax(0.1)
    gradient = IndexedSlices(np.ones((1, 4), np.float32), [3])
    optimizer.apply_gradients([(gradient, table)])
    optimizer, table = held(optimizer, table)
    table.resize((60, 4), refcheck=False)
    before = contents(optimizer, [table])
    gradient = gradient if sparse else np.ones((60, 4), np.float32)
    with pytest.raises(
        ValueError, match=r"^parameter '0' has state for the shape \(50, 4\)"
    ):
        optimizer.apply_gradients([(gradient, table)])
    assert_same_contents(contents(optimizer, [table]), before)


def test_numpy_does_not_resize_an_array_with_state():
    table, optimizer = np.ones((50, 4), np.float32), Adamax(0.1)
    optimizer.build([table])
    with pytest.raises(ValueError, match="cannot resize an array that"):
        table.resize((60, 4), refcheck=False)
    optimizer.forget(table)
    table.resize((60, 4), refcheck=False)
    optimizer.apply_gradients([(np.ones((60, 4), np.float32), table)])


# --- Memory that is let go ----------------------------------------------------------------


def names(optimizer):
    return [name for name in optimizer.state_dict() if name != "iterations"]


def test_the_state_of_an_array_ends_with_the_array():
    optimizer, kept = Adamax(), np.ones(3)
    for _ in range(2000):
        w = np.ones((5, 5))
        optimizer.apply_gradients([(np.ones((5, 5)), w), (np.ones(3), kept)])
    del w
    assert len(names(optimizer)) == 2
    assert optimizer.iterations == 2000


def test_the_state_of_a_view_ends_with_the_memory():
    optimizer, room = Adamax(), np.ones((4, 5))
    view = room[1:3]
    optimizer.apply_gradients([(np.ones((2, 5)), view)])
    del view
    assert names(optimizer) == ["0.m", "0.u"]
    # Another view of the same memory is no new parameter.
    with pytest.raises(ValueError, match=r"pass the same array in every step, not a new v"):
        optimizer.apply_gradients([(np.ones((2, 5)), room[1:3])])
    rest = room[3:]
    optimizer.apply_gradients([(np.ones((1, 5)), rest)])
    assert len(names(optimizer)) == 4
    del room, rest
    assert names(optimizer) == []


def test_state_can_be_forgotten(tmp_path):
    table = np.memmap(tmp_path / "table", np.float32, "w+", shape=(5, 2))
    optimizer, unknown = Adamax(), np.ones(2)
    optimizer.apply_gradients([(np.ones((5, 2)), table)])
    with pytest.raises(
        ValueError, match=r"^parameter must be an array that this optimizer"
    ):
        optimizer.forget(unknown)
    optimizer.forget(table)
    assert names(optimizer) == []
    optimizer.apply_gradients([(np.ones((5, 2)), table)])
    assert names(optimizer) == ["1.m", "1.u"]


def test_forgetting_catches_up_stale_rows():
    table, expected = np.zeros((5, 1)), np.zeros((5, 1))
    table[...] = expected[...] = 1.0
    for array, flush in ((table, False), (expected, True)):
        optimizer = Adamax(0.1, weight_decay=0.1, sparse="exact")
        for _ in range(3):
            optimizer.apply_gradients([(IndexedSlices(np.ones((1, 1)), [1]), array)])
        optimizer.flush() if flush else optimizer.forget(array)
    assert_same_bits(table, expected)


def test_an_optimizer_is_freed_without_the_cycle_collector():
    gc.disable()
    try:
        w, table = np.ones(3), np.ones((4, 2))
        optimizer = Adamax(0.1, sparse="exact")
        optimizer.apply_gradients(
            [(np.ones(3), w), (IndexedSlices(np.ones((1, 2)), [0]), table)]
        )
        state = weakref.ref(optimizer.state_dict()["0.m"])
        del optimizer
        assert state() is None
    finally:
        gc.enable()
