"""The verbs in NumPy, unfused and obvious: what the fused kernels are compared with.

The order of operations is that of the fused kernels, so results are equal bit for bit.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

import numpy as np
from adamax._exact import History
from adamax._rule import Coefficients

from . import Factor, Float64Array, Int64Array, Storage, state_dtype

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowGroups:
    rows: Int64Array  # distinct, ascending
    group: Int64Array  # which of them each index is


def dense_step(
    storage: Storage,
    addresses: Int64Array,
    lengths: Int64Array,
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    dtype = state_dtype(storage)
    for row, length, factor in zip(addresses, lengths, factors, strict=True):
        w = _view(row[0], length, _word(storage))
        m, u = (_view(address, length, dtype) for address in row[1:3])
        g = _widened(storage, _view(row[3], length, _word(storage)))
        w[:], m[:], u[:] = _stepped(storage, w, m, u, g, factor, coefficients)


def dense_square_sums(
    storage: Storage, addresses: Int64Array, lengths: Int64Array, threads: int
) -> Float64Array:
    gradients = (
        _widened(storage, _view(address, length, _word(storage)))
        for address, length in zip(addresses, lengths, strict=True)
    )
    return np.array([_square_sum(g) for g in gradients])


def group_rows(indices: npt.NDArray[np.int32] | Int64Array, rows: int) -> RowGroups:
    outside = np.flatnonzero((indices < 0) | (indices >= rows))
    if outside.size:
        position = int(outside[0])
        raise IndexError(
            f"indices[{position}] must be in [0, {rows}), got {indices[position]}"
        )
    distinct, group = np.unique(indices, return_inverse=True)
    return RowGroups(distinct.astype(np.int64), group)


def rows_step(
    storage: Storage,
    groups: RowGroups,
    addresses: Int64Array,
    row_length: int,
    factors: Float64Array,
    coefficients: Coefficients,
    threads: int,
) -> None:
    if groups.rows.size == 0:
        return
    shape = (int(groups.rows[-1]) + 1, row_length)
    dtype = state_dtype(storage)
    w = _view(addresses[0], shape[0] * row_length, _word(storage)).reshape(shape)
    m = _view(addresses[1], shape[0] * row_length, dtype).reshape(shape)
    u = _view(addresses[2], shape[0] * row_length, dtype).reshape(shape)
    g = _summed(storage, groups, int(addresses[3]), row_length)
    at = groups.rows
    w[at], m[at], u[at] = _stepped(storage, w[at], m[at], u[at], g, factors, coefficients)


def rows_square_sum(
    storage: Storage, groups: RowGroups, address: int, row_length: int, threads: int
) -> float:
    return _square_sum(_summed(storage, groups, address, row_length))


def catch_up_rows(
    storage: Storage,
    groups: RowGroups,
    addresses: Int64Array,
    row_length: int,
    history: History,
    now: int,
    epsilon: float,
    threads: int,
) -> int:
    if groups.rows.size == 0:
        return 0
    count = int(groups.rows[-1]) + 1
    w = _view(addresses[0], count * row_length, _word(storage)).reshape(count, row_length)
    behind = _catch_up(
        storage, groups.rows, count, addresses, row_length, history, now, epsilon
    )
    if addresses[4]:
        size = groups.group.size
        copy = _view(addresses[4], size * row_length, _word(storage))
        copy[:] = w[groups.rows[groups.group]].ravel()
    return behind


def catch_up_table(
    storage: Storage,
    rows: tuple[int, int],
    addresses: Int64Array,
    row_length: int,
    history: History,
    now: int,
    epsilon: float,
    threads: int,
) -> int:
    return _catch_up(
        storage, np.arange(*rows), rows[1], addresses, row_length, history, now, epsilon
    )


def find_behind(groups: RowGroups, stamps: int, now: int) -> int:
    if groups.rows.size == 0:
        return -1
    stamped = _view(stamps, groups.rows[-1] + 1, np.uint32)[groups.rows]
    behind = groups.rows[stamped != _modulo(now)]
    return int(behind[0]) if behind.size else -1


def stamp_rows(groups: RowGroups, stamps: int, now: int) -> None:
    if groups.rows.size:
        _view(stamps, groups.rows[-1] + 1, np.uint32)[groups.rows] = _modulo(now)


def advance(storage: Storage, addresses: Int64Array) -> Float64Array:
    counters = [_view(address, 1, storage.value) for address in addresses]
    for counter in counters:
        counter += 1
    return np.array([counter[0] for counter in counters], np.float64)


def array_address(array: Array) -> int:
    return array.ctypes.data


@dataclass(frozen=True, slots=True)
class ArrayLayouts:
    layouts: list[tuple[Any, ...]]


def array_layouts(arrays: Sequence[Array]) -> ArrayLayouts:
    return ArrayLayouts([_layout(array) for array in arrays])


def find_arrays(
    like: ArrayLayouts, arrays: Sequence[Array], *, writeable: bool
) -> Int64Array | None:
    for layout, array in zip(like.layouts, arrays, strict=True):
        if type(array) is not np.ndarray or _layout(array) != layout:
            return None
        if not array.flags.aligned or (writeable and not array.flags.writeable):
            return None
    return np.array([array_address(array) for array in arrays], np.int64)


def _layout(array: Array) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.strides


def _stepped(
    storage: Storage,
    w: Array,
    m: Array,
    u: Array,
    g: Array,
    factors: Float64Array,
    coefficients: Coefficients,
) -> tuple[Array, Array, Array]:
    number: Any = state_dtype(storage).type
    step_size = number(factors[Factor.STEP_SIZE])
    decay = number(factors[Factor.DECAY])
    scale = number(factors[Factor.SCALE])
    coupled_decay = number(factors[Factor.COUPLED_DECAY])
    clipvalue = number(coefficients.clipvalue)
    w = _widened(storage, w)
    with np.errstate(all="ignore"):
        g = np.clip(scale * g, -clipvalue, clipvalue)
        if coupled_decay:
            g = g + coupled_decay * w
        m = m + number(coefficients.one_minus_beta_1) * (g - m)
        u = np.maximum(number(coefficients.beta_2) * u, np.abs(g))
        w = decay * w - step_size * (m / (u + number(coefficients.epsilon)))
    return _narrowed(storage, w), m, u


def _catch_up(
    storage: Storage,
    rows: Int64Array,
    count: int,
    addresses: Int64Array,
    row_length: int,
    history: History,
    now: int,
    epsilon: float,
) -> int:
    stamps = _view(addresses[3], count, np.uint32)
    gaps = (_modulo(now) - stamps[rows]).astype(np.int64)
    rows, gaps = rows[gaps > 0], gaps[gaps > 0]
    tables = [
        _view(address, count * row_length, dtype).reshape(count, row_length)
        for address, dtype in zip(
            addresses[:3],
            (_word(storage), state_dtype(storage), state_dtype(storage)),
            strict=True,
        )
    ]
    w = _widened(storage, tables[0][rows])
    m, u = (table[rows] for table in tables[1:])
    missed = history.missed(history.steps - gaps)
    with np.errstate(all="ignore"):
        sums, factors = (numbers.astype(state_dtype(storage)) for numbers in missed)
        of_w, of_m, of_u = factors.T[:, :, None]
        inverse = 1 / (u + u.dtype.type(epsilon))
        two_t = 4 * (u * inverse) - 2  # t = 2 * x - 1
        # Clenshaw's recurrence for a Chebyshev series in t.
        first = second = np.zeros_like(w)
        for n in range(history.expansion.terms - 1, 0, -1):
            first, second = sums[:, n, None] + two_t * first - second, first
        series = sums[:, 0, None] + w.dtype.type(0.5) * two_t * first - second
        tables[0][rows] = _narrowed(storage, of_w * w - m * inverse * series)
        tables[1][rows], tables[2][rows] = of_m * m, of_u * u
    stamps[rows] = _modulo(now)
    return len(rows)


def _modulo(now: int) -> np.uint32:
    return np.uint32(now % 2**32)


def _summed(storage: Storage, groups: RowGroups, address: int, row_length: int) -> Array:
    count = groups.group.size
    words = _view(address, count * row_length, _word(storage)).reshape(count, row_length)
    summed = np.zeros((groups.rows.size, row_length), state_dtype(storage))
    with np.errstate(all="ignore"):
        np.add.at(summed, groups.group, _widened(storage, words))
    return summed


def _square_sum(g: Array) -> float:
    with np.errstate(all="ignore"):
        return float(np.sum(np.square(g.astype(np.float64))))


def _view(address: int, length: int, dtype: npt.DTypeLike) -> Array:
    dtype = np.dtype(dtype)
    memory = (ctypes.c_byte * (int(length) * dtype.itemsize)).from_address(int(address))
    array: Array = np.frombuffer(memory, dtype)  # type: ignore[call-overload]
    return array


def _word(storage: Storage) -> npt.DTypeLike:
    return np.uint16 if storage is Storage.BFLOAT16 else storage.value


def _widened(storage: Storage, words: Array) -> Array:
    if storage is Storage.BFLOAT16:
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(state_dtype(storage))


def _narrowed(storage: Storage, numbers: Array) -> Array:
    if storage is not Storage.BFLOAT16:
        with np.errstate(all="ignore"):
            return numbers.astype(storage.value)
    bits = numbers.view(np.uint32)
    to_nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(numbers), quiet_nan, to_nearest_even).astype(np.uint16)
