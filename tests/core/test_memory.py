"""What is known of memory: overlaps, places of state, arrays that have not changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import numpy as np
from adamax._kernels import _cpu, _reference
from adamax._kernels._memory import LARGE, Ranges, zeros_beside

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


def _apart(pieces):
    """Pieces with a distance to the one before and a size, as ranges that lie apart."""
    end, made = 0, []
    for distance, size in pieces:
        made.append((end + distance, size))
        end += distance + size
    return np.array(made, np.int64).reshape(-1, 2)


@given(pieces=ranges, others=ranges, seed=st.integers(0, 9))
def test_overlaps_are_those_of_sets_of_bytes(pieces, others, seed):
    written = np.random.default_rng(seed).permutation(_apart(pieces))
    memory = Ranges(*written.T)
    assert memory.lie_apart
    touched = {byte for start, size in written for byte in range(start, start + size)}
    others = [(start, size) for start, size in others if size]
    overlaps = [not touched.isdisjoint(range(s, s + n)) for s, n in others]
    assert [memory.overlap_one(start, size) for start, size in others] == overlaps
    starts, sizes = np.array(others, np.int64).reshape(-1, 2).T
    assert memory.overlap(starts, sizes) == any(overlaps)


@given(pieces=ranges)
def test_ranges_lie_apart_unless_two_have_a_byte_in_common(pieces):
    starts, sizes = np.array(pieces, np.int64).reshape(-1, 2).T
    bytes_of_all = [byte for s, n in pieces for byte in range(s, s + n)]
    apart = len(bytes_of_all) == len(set(bytes_of_all))
    assert Ranges(starts, sizes).lie_apart == apart


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


# --- Arrays that have not changed ---------------------------------------------------------


class Subclass(np.ndarray):
    pass


def _read_only(array):
    array.flags.writeable = False
    return array


def _misaligned(array):
    room = np.zeros(array.nbytes + 1, np.uint8)
    made = room[1:].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


ARRAYS = {
    "plain": (lambda a: a.copy(), True, True),
    "read-only": (_read_only, True, False),
    "of another shape": (lambda a: a.T.copy(), False, False),
    "of another rank": (lambda a: a[0].copy(), False, False),
    "of other strides": (lambda a: np.asfortranarray(a), False, False),
    "of another dtype": (lambda a: a.astype(np.float64), False, False),
    "of another byte order": (lambda a: a.astype(">f4"), False, False),
    "misaligned": (_misaligned, False, False),
    "of a subclass": (lambda a: a.view(Subclass), False, False),
    "no array": (lambda a: a.tolist(), False, False),
}


@pytest.mark.parametrize("verbs", [_cpu, _reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("other", ARRAYS)
def test_arrays_are_found_only_as_they_were(rng, verbs, other):
    change, readable, writeable = ARRAYS[other]
    shapes = [(3, 4), (), (5, 2, 3), (0, 7)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    like = verbs.array_layouts(arrays)
    for position in (0, 2):
        given = list(arrays)
        given[position] = change(given[position].copy())
        for wanted, expected in ((False, readable), (True, writeable)):
            addresses = verbs.find_arrays(like, given, writeable=wanted)
            if expected:
                assert addresses.tolist() == [array.ctypes.data for array in given]
            else:
                assert addresses is None


@pytest.mark.parametrize("verbs", [_cpu, _reference], ids=["cpu", "reference"])
def test_no_arrays_are_found_where_none_are_wanted(verbs):
    assert verbs.find_arrays(verbs.array_layouts([]), [], writeable=True).shape == (0,)


def test_the_address_of_an_array_is_that_of_its_first_element(rng):
    array = rng.normal(size=(4, 6))
    for view in (array, array[1:, ::2], array[::-1], array[:0], array.T, array[2, 3:4]):
        assert _cpu.array_address(view) == view.ctypes.data


def test_an_unknown_layout_of_arrays_is_refused(monkeypatch):
    """As of a NumPy that is not known yet; nothing is read from a wrong place."""
    monkeypatch.setattr(_cpu, "_DATA", _cpu._DATA + 8)
    with pytest.raises(ImportError, match=r"^NumPy .* NUMBA_DISABLE_JIT=1 makes"):
        _cpu._check_fields()
