"""The verbs in NumPy, unfused and obvious: what the native core is compared with.

The operations on an element and their order are those of the native core, so that results
are equal bit for bit. Only sums of squares are added up in another order.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .compact import (
    decode,
    encode,
    frame_after,
    random_bits,
    round_bfloat16,
    seed_of,
)
from .exact import START, STEPS, Recorded, commit, gaps
from .kernels import OPERANDS, Float64Array
from .memory import may_overlap_itself
from .rule import Scalar, clip_factor, rounded

Array = npt.NDArray[Any]

_UNFIT = {operand: place for place, operand in enumerate(OPERANDS)}
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_FITS = {
    "exp_avg": (*_FLOATS, "int8"),
    "exp_inf": (*_FLOATS, "uint8"),
    "step": ("float32", "float64", "int64"),
    "frame": ("float32",),
}


class _Stopped(Exception):  # noqa: N818
    """Carries a problem."""


def step(
    w: Sequence[Any],
    m: Sequence[Any],
    u: Sequence[Any],
    g: Sequence[Any],
    scalars: Float64Array,
    frames: Sequence[Any] | None,
    tables: Sequence[tuple[Any, ...]],
    counters: Sequence[Any],
    clipnorm: float,
    global_clipnorm: float,
    threads: int,
) -> tuple[str, int, int, int] | None:
    try:
        parts: list[_DensePart | _RowsPart] = [
            _DensePart(i, *arrays)
            for i, arrays in enumerate(
                zip(w, m, u, g, frames or [None] * len(w), strict=True)
            )
        ]
        parts += [_RowsPart(len(w) + i, table) for i, table in enumerate(tables)]
        steps = [_Operand(counter, "step", i) for i, counter in enumerate(counters)]
    except _Stopped as stopped:
        problem: tuple[str, int, int, int] = stopped.args[0]
        return problem
    of_parts = [
        *np.broadcast_to(scalars, (len(w), len(Scalar))),
        *(table[5] for table in tables),
    ]
    limit = min(clipnorm, global_clipnorm)
    factors = [1.0] * len(parts)
    if limit < math.inf:
        norms = [part.norm() for part in parts]
        if global_clipnorm < math.inf:
            norms = [_norm(np.array(norms))] * len(parts)
        factors = [clip_factor(norm, limit) for norm in norms]
    for part, part_scalars, factor in zip(parts, of_parts, factors, strict=True):
        chosen = part_scalars.copy()
        chosen[Scalar.SCALE] *= factor
        part.update(chosen)
    for counter in steps:
        counter.array[...] += 1
    return None


def counts(counters: Sequence[Any]) -> Any:
    try:
        operands = [_Operand(counter, "step", i) for i, counter in enumerate(counters)]
    except _Stopped as stopped:
        return stopped.args[0]
    return [float(operand.array.item()) for operand in operands]


def norm(indices: Any, values: Any, rows: int, threads: int) -> Any:
    try:
        of_values = _Operand(values, "gradient", 0)
        distinct, group = _grouped(indices, rows, 0)
        if len(of_values.array) != len(group):
            raise _Stopped(("unfit", 0, _UNFIT["gradient"], 0))
    except _Stopped as stopped:
        return stopped.args[0]
    return _norm(_summed(of_values, group, len(distinct)))


def catch_up_rows(table: tuple[Any, ...], indices: Any, threads: int) -> Any:
    try:
        of_table, settings = _Table(0, *table[:4]), table[4:]
        rows, _ = _grouped(indices, len(of_table.w.array), 0)
        return of_table.catch_up(rows, *settings)
    except _Stopped as stopped:
        return stopped.args[0]


def catch_up_range(table: tuple[Any, ...], start: int, stop: int, threads: int) -> Any:
    try:
        of_table, settings = _Table(0, *table[:4]), table[4:]
        rows = np.arange(max(start, 0), min(stop, len(of_table.w.array)))
        return of_table.catch_up(rows, *settings)
    except _Stopped as stopped:
        return stopped.args[0]


# --- Arrays and tensors ------------------------------------------------------------------


class _Operand:
    """An argument as an array of NumPy that shares its memory.

    ``dtype`` is its name; a bfloat16 array is one of uint16.
    """

    def __init__(self, given: Any, operand: str, where: int) -> None:
        array, dtype = _as_array(given)
        fits = _FITS.get(operand, _FLOATS)
        if dtype not in fits or (operand == "step" and array.size != 1):
            raise _Stopped(("unfit", where, _UNFIT[operand], 0))
        self.array, self.dtype = array, dtype

    @property
    def number(self) -> type[Any]:
        """The dtype of the arithmetic."""
        return np.float64 if self.dtype == "float64" else np.float32

    def read(self, at: Any = ...) -> Array:
        words = self.array[at]
        if self.dtype == "bfloat16":
            words = (words.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # of a NaN that signals
            return np.asarray(words.astype(self.number))

    def write(self, numbers: Array, at: Any = ..., random: Array | None = None) -> None:
        if random is not None:
            self.array[at] = round_bfloat16(numbers, random)
            return
        if self.dtype == "bfloat16":
            bits = np.asarray(numbers).view(np.uint32)
            to_nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            quiet_nan = (bits >> 16) | 0x40
            numbers = np.where(np.isnan(numbers), quiet_nan, to_nearest_even)
        with np.errstate(all="ignore"):
            self.array[at] = numbers.astype(self.array.dtype)


def _as_array(given: Any) -> tuple[Array, str]:
    if isinstance(given, np.ndarray):
        array, dtype = given, given.dtype.name
    else:
        if not getattr(given, "is_cpu", False) or str(given.layout) != "torch.strided":
            return np.zeros(0), "unknown"
        if given.is_conj() or given.is_neg():
            return np.zeros(0), "unknown"
        dtype = str(given.dtype).removeprefix("torch.")
        array = _tensor_memory(given, dtype)
    if dtype == "bfloat16":
        words = np.dtype(np.uint16)
        array = array.view(words if array.dtype.isnative else words.newbyteorder())
    if dtype in ("complex64", "complex128"):
        array = array[..., None].view(array.real.dtype)
        dtype = array.dtype.name
    return array, dtype


def _tensor_memory(tensor: Any, dtype: str) -> Array:
    """A tensor's memory; ``Tensor.numpy`` knows no bfloat16."""
    stored = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    shape, strides = tuple(tensor.shape), [s * stored.itemsize for s in tensor.stride()]
    reach = stored.itemsize + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    if 0 in shape:
        return np.zeros(shape, stored)
    memory = (ctypes.c_byte * reach).from_address(tensor.data_ptr())
    array: Array = np.ndarray(shape, stored, memory, strides=strides)
    return array


def _grouped(indices: Any, rows: int, where: int) -> tuple[Array, Array]:
    """The distinct rows, ascending, and which of them each index is."""
    array, dtype = _as_array(indices)
    if dtype not in ("int32", "int64") or array.ndim != 1:
        raise _Stopped(("unfit", where, _UNFIT["indices"], 0))
    outside = np.flatnonzero((array < 0) | (array >= rows))
    if outside.size:
        position = int(outside[0])
        raise _Stopped(("index", where, position, int(array[position])))
    distinct, group = np.unique(array, return_inverse=True)
    return distinct.astype(np.int64), group


# --- The rule ----------------------------------------------------------------------------


class _Table:
    """A parameter and its state."""

    def __init__(self, where: int, w: Any, m: Any, u: Any, frames: Any) -> None:
        self.where = where
        named = zip((w, m, u), OPERANDS, strict=False)
        self.w, self.m, self.u = (_Operand(x, name, where) for x, name in named)
        number = np.dtype(self.w.number).name
        kinds = [(number, number)]
        if number == "float32":
            kinds += [("bfloat16", "bfloat16"), ("int8", "uint8")]
        kind = next((kind for kind in kinds if kind[0] == self.m.dtype), None)
        dtypes = self.w.dtype, *(kind or (None, None))
        for place, operand in enumerate((self.w, self.m, self.u)):
            array = operand.array
            fits = array.shape == self.w.array.shape and operand.dtype == dtypes[place]
            if not (fits and array.flags.writeable) or may_overlap_itself(array):
                raise _Stopped(("unfit", where, place, 0))
        addresses = [x.array.ctypes.data for x in (self.w, self.m, self.u) if x.array.size]
        for place, address in enumerate(addresses):
            if address in addresses[:place]:
                raise _Stopped(("unfit", where, place, 0))
        self.is_8bit = self.m.dtype == "int8"
        self.frames: Any = None
        if self.is_8bit or frames is not None:
            self.frames = _Operand(frames, "frame", where).array

    def check_frames(self, count: int) -> None:
        fits = (self.frames is not None) == self.is_8bit
        if self.frames is not None:
            writeable = self.frames.flags.writeable and self.frames.flags.c_contiguous
            fits = fits and writeable and self.frames.shape == (count,)
        if not fits:
            raise _Stopped(("unfit", self.where, _UNFIT["frame"], 0))

    def stepped(self, g: Array, scalars: Float64Array, at: Any) -> None:
        number = self.w.number
        s = [rounded(scalar, number) for scalar in scalars]
        w, m, u = self._read(at)
        with np.errstate(all="ignore"):
            g = np.clip(g, -s[Scalar.CLIPVALUE], s[Scalar.CLIPVALUE])
            if s[Scalar.COUPLED_DECAY]:
                g = g + s[Scalar.COUPLED_DECAY] * w
            m = m + s[Scalar.ONE_MINUS_BETA_1] * (g - m)
            u = np.maximum(s[Scalar.BETA_2] * u, np.abs(g))
            move = s[Scalar.STEP_SIZE] * _quotient(m, u + s[Scalar.EPSILON])
            w = s[Scalar.DECAY] * w - move
        seed = seed_of(float(scalars[Scalar.SEED]), self.where)
        stochastic = bool(scalars[Scalar.STOCHASTIC])
        self._write(at, (w, m, u), scalars[Scalar.BETA_2], seed, stochastic)

    def _read(self, at: Any) -> tuple[Array, Array, Array]:
        w = self.w.read(at)
        if self.is_8bit:
            frame = self._frame(at)
            return w, *decode(self.m.array[at], self.u.array[at], frame)
        return w, self.m.read(at), self.u.read(at)

    def _write(
        self,
        at: Any,
        numbers: tuple[Array, Array, Array],
        decay: Array | float,
        seed: int,
        stochastic: bool,
    ) -> None:
        """Write elements, whose norms have been multiplied by ``decay``."""

        def random(place: int) -> Array:
            return random_bits(seed, place, _positions(self.w.array, at))

        operands = self.w, self.m, self.u
        for place in (0,) if self.is_8bit else (0, 1, 2):
            operand = operands[place]
            rounds = operand.dtype == "bfloat16" and (place > 0 or stochastic)
            operand.write(numbers[place], at, random(place) if rounds else None)
        if self.is_8bit:
            self.frames[at] = frame_after(self.frames[at], decay)
            codes = encode(*numbers[1:], self._frame(at), random(1))
            self.m.array[at], self.u.array[at] = codes

    def _frame(self, at: Any) -> Array:
        """Of rows, in a shape that can be broadcast."""
        if at is ...:
            return np.asarray(self.frames)
        columns = (slice(None), *(None,) * (self.w.array.ndim - 1))
        return np.asarray(self.frames[at][columns])

    def catch_up(
        self,
        rows: Array,
        stamps: Array,
        history: tuple[Any, Any, Any],
        epsilon: float,
        seed: float,
        stochastic: bool,
    ) -> int:
        sums, _, clock = history
        self.check_frames(len(self.w.array))
        if len(stamps) != len(self.w.array):
            raise _Stopped(("history", self.where, -1, 0))
        steps = int(clock[STEPS])
        behind = (np.uint32(steps % 2**32) - stamps[rows]).astype(np.int64)
        wrong = rows[behind > min(steps - int(clock[START]), len(sums) - 1)]
        if wrong.size:
            raise _Stopped(("history", self.where, int(wrong[0]), 0))
        rows, behind = rows[behind > 0], behind[behind > 0]
        number: Any = self.w.number
        terms, factors = (x.astype(number) for x in gaps(*history, steps - behind))
        w, m, u = self._read(rows)
        columns = (slice(None), *(None,) * (w.ndim - 1))
        with np.errstate(all="ignore"):
            of_w, of_m, of_u = (factor[columns] for factor in factors.T)
            denominator = u + rounded(epsilon, number)
            two_t = 4 * _quotient(u, denominator) - 2  # t = 2 * x - 1
            # Clenshaw's recurrence for a Chebyshev series in t.
            first = second = np.zeros_like(w)
            for n in range(terms.shape[1] - 1, 0, -1):
                first, second = terms[:, n][columns] + two_t * first - second, first
            series = terms[:, 0][columns] + number(0.5) * two_t * first - second
            w = of_w * w - _quotient(m, denominator) * series
            numbers = w, of_m * m, of_u * u
        bits = seed_of(seed, self.where) ^ (2**64 - 1)  # not those of the step itself
        self._write(rows, numbers, factors[:, 2], bits, stochastic)
        stamps[rows] = np.uint32(steps % 2**32)
        return len(rows)


def _positions(w: Array, at: Any) -> npt.NDArray[np.int64]:
    """The numbers of elements, in the order in which they lie in memory."""
    if at is not ...:
        of_row = _positions(w[0], ...) if w.size else np.zeros(w.shape[1:], np.int64)
        rows = at.reshape(-1, *(1,) * (w.ndim - 1))
        return np.asarray(rows * of_row.size + of_row)
    order = sorted(range(w.ndim), key=lambda axis: -abs(w.strides[axis]))
    numbers = np.arange(w.size, dtype=np.int64).reshape([w.shape[axis] for axis in order])
    numbers = numbers.transpose(np.argsort(order).astype(int))
    flipped = [slice(None, None, -1 if s < 0 else 1) for s in w.strides]
    return numbers[tuple(flipped)]


def _quotient(m: Array, denominator: Array) -> Array:
    """``m / denominator``, or 0 where the latter is 0; NaN comes through."""
    with np.errstate(all="ignore"):
        return np.where(denominator == 0, 0 * m, m / denominator)


class _DensePart:
    def __init__(self, where: int, w: Any, m: Any, u: Any, g: Any, frame: Any) -> None:
        self.table = _Table(where, w, m, u, frame)
        self.table.check_frames(1)
        self.g = _Operand(g, "gradient", where)
        if self.g.array.shape != self.table.w.array.shape:
            raise _Stopped(("unfit", where, _UNFIT["gradient"], 0))

    def norm(self) -> float:
        return _norm(self.g.read())

    def update(self, scalars: Float64Array) -> None:
        g, scale = self.g.read(), scalars[Scalar.SCALE]
        g = _scaled(g, scale, self.table.w.number, g.dtype == np.float64)
        self.table.stepped(g, scalars, ...)


class _RowsPart:
    def __init__(self, where: int, table: tuple[Any, ...]) -> None:
        w, m, u, indices, values, _, frames, self.exact = table
        self.table = _Table(where, w, m, u, frames)
        self.values = _Operand(values, "gradient", where)
        shape = self.table.w.array.shape
        if not shape:
            raise _Stopped(("unfit", where, 0, 0))
        self.table.check_frames(shape[0])
        self.rows, self.group = _grouped(indices, shape[0], where)
        if self.values.array.shape != (len(self.group), *shape[1:]):
            raise _Stopped(("unfit", where, _UNFIT["gradient"], 0))
        if self.exact is not None:
            stamps, _, _, clock, *_ = self.exact
            if len(stamps) != shape[0]:
                raise _Stopped(("history", where, -1, 0))
            stale = self.rows[stamps[self.rows] != np.uint32(int(clock[STEPS]) % 2**32)]
            if stale.size:
                raise _Stopped(("stale", where, int(stale[0]), 0))

    def norm(self) -> float:
        return _norm(_summed(self.values, self.group, len(self.rows)))

    def update(self, scalars: Float64Array) -> None:
        sums = _summed(self.values, self.group, len(self.rows))
        wide = self.values.dtype == "float64"
        g = _scaled(sums, scalars[Scalar.SCALE], self.table.w.number, wide)
        self.table.stepped(g, scalars, self.rows)
        if self.exact is not None:
            self._take_note(scalars)

    def _take_note(self, scalars: Float64Array) -> None:
        assert self.exact is not None
        stamps, sums, products, clock, *recorded = self.exact
        steps, cycle = int(clock[STEPS]), len(sums) // 2
        stamps[self.rows] = np.uint32((steps + 1) % 2**32)
        # Rows in their turn, so that none is ever more stale than the history goes back.
        number = -(-len(stamps) // cycle)
        start = (steps - int(clock[START])) % cycle * number
        turn = np.arange(start, min(start + number, len(stamps)))
        turn = turn[(np.uint32(steps % 2**32) - stamps[turn]).view(np.int32) > 0]
        history = sums, products, clock
        epsilon, seed = float(scalars[Scalar.EPSILON]), float(scalars[Scalar.SEED])
        stochastic = bool(scalars[Scalar.STOCHASTIC])
        self.table.catch_up(turn, stamps, history, epsilon, seed, stochastic)
        commit(*history, Recorded(*recorded))


def _summed(values: _Operand, group: Array, rows: int) -> Array:
    """The values of each distinct row, added up in float64."""
    summed = np.zeros((rows, *values.array.shape[1:]))
    with np.errstate(all="ignore"):
        np.add.at(summed, group, values.read().astype(np.float64))
    return summed


def _scaled(g: Array, scale: float, number: Any, wide: bool) -> Array:
    """``g`` in the dtype of the arithmetic; if wide, it is scaled before it is rounded."""
    with np.errstate(all="ignore"):
        if wide:
            return np.asarray((np.float64(scale) * g).astype(number))
        return np.asarray(rounded(scale, number) * g.astype(number))


def _norm(g: Array) -> float:
    """The L2 norm, whose squares may leave the range of float64."""
    with np.errstate(all="ignore"):
        g = g.astype(np.float64)
        largest = float(np.max(np.abs(g), initial=0.0))
        if not 0.0 < largest < math.inf:
            return largest
        return float(largest * np.sqrt(np.sum(np.square(g / largest))))
