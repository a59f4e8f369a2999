"""Memory: where state is put, and gradients that overlap what a step writes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamax._core.memory import LARGE, may_overlap_itself, zeros_beside
from compare import assert_same_bits
from verbs import INF, NATIVE, Using, scalars


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (LARGE // 4,), (601, 1003)], ids=str)
def test_zeros_are_what_numpy_gives(shape, dtype, order):
    actual = zeros_beside(10**15 + 3, 1, shape, dtype, order)
    expected = np.zeros(shape, dtype, order)
    assert actual.shape == expected.shape
    assert actual.strides == expected.strides
    assert actual.dtype == expected.dtype
    assert actual.flags.aligned
    assert actual.flags.writeable
    assert not actual.any()


@pytest.mark.parametrize("size", [LARGE // 4, LARGE // 4 + 1, 2_000_000])
def test_large_arrays_of_one_pass_begin_at_different_places(size):
    parameters = [np.ones(size, np.float32) for _ in range(3)]
    for parameter in parameters:
        start = parameter.ctypes.data
        places = [
            zeros_beside(start, number, (size,), np.float32, "C").ctypes.data - start
            for number in (1, 2)
        ]
        assert [place % 65536 for place in places] == [16384, 32768]


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((3, 4), (16, 4), False),
        ((3, 4), (4, 12), False),
        ((3, 4), (-16, 4), False),
        ((3, 4), (0, 4), True),
        ((3, 4), (8, 4), True),
        ((1, 4), (0, 4), False),
        ((2, 2, 2), (4, 8, 16), False),
        ((2, 2, 2), (4, 4, 16), True),
        ((), (), False),
    ],
)
def test_arrays_that_may_overlap_themselves(shape, strides, overlaps):
    room = np.zeros(100, np.float32)[40:]
    array = np.lib.stride_tricks.as_strided(room, shape, strides)
    assert may_overlap_itself(array) == overlaps


# --- Overlaps -----------------------------------------------------------------------------

slices = st.tuples(st.integers(0, 60), st.integers(0, 9), st.sampled_from([1, 2, -1]))


def taken(room, start, size, step):
    view = room[start : start + size * abs(step) : abs(step)]
    return view if step > 0 else view[::-1]


@pytest.mark.skipif(not NATIVE, reason="the native core was not built")
@given(pieces=st.lists(st.tuples(slices, slices), min_size=1, max_size=6))
def test_gradients_are_read_first_and_parameters_updated_one_after_the_other(pieces):
    """Parameters and gradients are all views of one array."""
    rooms = np.random.default_rng(len(pieces)).normal(size=100).astype(np.float32)
    rooms = [rooms.copy(), rooms.copy()]
    columns = []
    for room in rooms:
        w = [taken(room, start, size, step) for (start, size, step), _ in pieces]
        g = [
            taken(room, start, len(x), step)
            for x, (_, (start, _, step)) in zip(w, pieces, strict=True)
        ]
        state = [np.zeros(len(x), np.float32) for x in (*w, *w)]
        columns.append([w, state[: len(w)], state[len(w) :], g])
    with Using(NATIVE[0]) as verbs:
        assert verbs.step(*columns[0], scalars()[None], None, (), (), INF, INF, 2) is None
        w, m, u, g = columns[1]
        g = [gradient.copy() for gradient in g]
        for one in zip(w, m, u, g, strict=True):
            each = [[array] for array in one]
            assert verbs.step(*each, scalars()[None], None, (), (), INF, INF, 1) is None
    assert_same_bits(*rooms)
