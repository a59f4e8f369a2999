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

from .exact import START, STEPS, Recorded, commit, gaps
from .kernels import OPERANDS, Float64Array
from .memory import may_overlap_itself
from .rule import Scalar, clip_factor, rounded

Array = npt.NDArray[Any]

_UNFIT = {operand: place for place, operand in enumerate(OPERANDS)}
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_COUNTERS = ("float32", "float64", "int64")


class _Stopped(Exception):  # noqa: N818
    """Carries a problem."""


def step(
    w: Sequence[Any],
    m: Sequence[Any],
    u: Sequence[Any],
    g: Sequence[Any],
    scalars: Float64Array,
    tables: Sequence[tuple[Any, ...]],
    counters: Sequence[Any],
    clipnorm: float,
    global_clipnorm: float,
    threads: int,
) -> tuple[str, int, int, int] | None:
    try:
        parts: list[_DensePart | _RowsPart] = [
            _DensePart(i, *arrays) for i, arrays in enumerate(zip(w, m, u, g, strict=True))
        ]
        parts += [_RowsPart(len(w) + i, table) for i, table in enumerate(tables)]
        steps = [_Operand(counter, "step", i) for i, counter in enumerate(counters)]
    except _Stopped as stopped:
        problem: tuple[str, int, int, int] = stopped.args[0]
        return problem
    of_parts = [*np.broadcast_to(scalars, (len(w), 8)), *(table[5] for table in tables)]
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


def catch_up_rows(
    w: Any,
    m: Any,
    u: Any,
    stamps: npt.NDArray[np.uint32],
    history: tuple[Any, Any, Any],
    epsilon: float,
    indices: Any,
    threads: int,
) -> Any:
    try:
        table = _Table(0, w, m, u)
        rows, _ = _grouped(indices, len(table.w.array), 0)
        return table.catch_up(rows, stamps, history, epsilon)
    except _Stopped as stopped:
        return stopped.args[0]


def catch_up_range(
    w: Any,
    m: Any,
    u: Any,
    stamps: npt.NDArray[np.uint32],
    history: tuple[Any, Any, Any],
    epsilon: float,
    start: int,
    stop: int,
    threads: int,
) -> Any:
    try:
        table = _Table(0, w, m, u)
        rows = np.arange(max(start, 0), min(stop, len(table.w.array)))
        return table.catch_up(rows, stamps, history, epsilon)
    except _Stopped as stopped:
        return stopped.args[0]


# --- Arrays and tensors ------------------------------------------------------------------


class _Operand:
    """An argument as an array of NumPy that shares its memory.

    ``dtype`` is its name; a bfloat16 array is one of uint16.
    """

    def __init__(self, given: Any, operand: str, where: int) -> None:
        array, dtype = _as_array(given)
        fits = _COUNTERS if operand == "step" else _FLOATS
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

    def write(self, numbers: Array, at: Any = ...) -> None:
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
        array = array.view(np.uint16)
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

    def __init__(self, where: int, w: Any, m: Any, u: Any) -> None:
        self.where = where
        named = zip((w, m, u), OPERANDS, strict=False)
        self.w, self.m, self.u = (_Operand(x, name, where) for x, name in named)
        number = np.dtype(self.w.number).name
        for place, operand in enumerate((self.w, self.m, self.u)):
            fits = operand.array.shape == self.w.array.shape and (
                place == 0 or operand.dtype == number
            )
            array = operand.array
            if not (fits and array.flags.writeable) or may_overlap_itself(array):
                raise _Stopped(("unfit", where, place, 0))
        addresses = [x.array.ctypes.data for x in (self.w, self.m, self.u) if x.array.size]
        for place, address in enumerate(addresses):
            if address in addresses[:place]:
                raise _Stopped(("unfit", where, place, 0))

    def stepped(self, g: Array, scalars: Float64Array, at: Any) -> None:
        number = self.w.number
        s = [rounded(scalar, number) for scalar in scalars]
        w, m, u = (operand.read(at) for operand in (self.w, self.m, self.u))
        with np.errstate(all="ignore"):
            g = np.clip(g, -s[Scalar.CLIPVALUE], s[Scalar.CLIPVALUE])
            if s[Scalar.COUPLED_DECAY]:
                g = g + s[Scalar.COUPLED_DECAY] * w
            m = m + s[Scalar.ONE_MINUS_BETA_1] * (g - m)
            u = np.maximum(s[Scalar.BETA_2] * u, np.abs(g))
            move = s[Scalar.STEP_SIZE] * _quotient(m, u + s[Scalar.EPSILON])
            w = s[Scalar.DECAY] * w - move
        for operand, numbers in zip((self.w, self.m, self.u), (w, m, u), strict=True):
            operand.write(numbers, at)

    def catch_up(
        self, rows: Array, stamps: Array, history: tuple[Any, Any, Any], epsilon: float
    ) -> int:
        sums, _, clock = history
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
        w, m, u = (operand.read(rows) for operand in (self.w, self.m, self.u))
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
            self.w.write(of_w * w - _quotient(m, denominator) * series, rows)
            self.m.write(of_m * m, rows)
            self.u.write(of_u * u, rows)
        stamps[rows] = np.uint32(steps % 2**32)
        return len(rows)


def _quotient(m: Array, denominator: Array) -> Array:
    """``m / denominator``, or 0 where the latter is 0; NaN comes through."""
    with np.errstate(all="ignore"):
        return np.where(denominator == 0, 0 * m, m / denominator)


class _DensePart:
    def __init__(self, where: int, w: Any, m: Any, u: Any, g: Any) -> None:
        self.table = _Table(where, w, m, u)
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
        w, m, u, indices, values, _, self.exact = table
        self.table = _Table(where, w, m, u)
        self.values = _Operand(values, "gradient", where)
        shape = self.table.w.array.shape
        if not shape:
            raise _Stopped(("unfit", where, 0, 0))
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
        self.table.catch_up(turn, stamps, history, float(scalars[Scalar.EPSILON]))
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
