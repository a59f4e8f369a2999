"""The verbs on a GPU, in Triton: arithmetic on tensors of one device.

Nothing here waits for the device: learning rate, step counters and what a ``GradScaler``
says may all lie on it. A launch goes to the current stream of the current device.

``advance(counters, factors, options)``, ``advance_one(counter, factors, options)``
    Add 1 to step counters and write the factors (see :class:`Factor`) that follow from
    them, as float64 ``(n, 4)``. Counters keep still if infinities were found.
``dense_step(storage, table, gradients, factors, found_inf, coefficients, programs)``
    One step of the rule on ``n`` tensors, in one launch. ``table`` holds a row of
    :class:`Column` for each of them, then the tensor that each program works on;
    ``gradients`` the address of each gradient.
``rows_step(storage, tensors, indices, rows, factors, found_inf, coefficients)``
    One step of the rule on the rows of a table that ``indices`` name. Repeats are summed
    in a fixed order. An index out of range stops the device with an assertion.
``stamp_rows(ids, stamps, before, now)``
    Set the stamps of the rows in sorted ``ids`` to ``now``. A stamp that was not ``before``
    stops the device with an assertion: the row was not up to date when it was read.
``catch_up(storage, tensors, stamps, ids, rows, row_length, history, epsilon)``
    Bring rows to the end of a history: those in sorted ``ids``, or a range of them.

The order of operations is that of the CPU kernels; compilers may fuse a product with a sum.
"""

import enum
import math
import struct
from dataclasses import dataclass

import triton
import triton.language as tl

import torch
from adamax._rule import Coefficients
from torch import Tensor

from . import Storage

# A program takes a number of blocks of a tensor, one after the other. With 4 warps that is
# 4 numbers for each thread: of float32, a load of 16 bytes from each of 4 arrays.
BLOCK = 512
# Enough to keep all multiprocessors of a GPU busy to the end, few enough for a small table.
PROGRAMS = 8192

_WARPS = 4
_COUNTERS = 128  # that one program advances
_TILE = 16  # repeats that are added at once
_CHUNK = 128  # repeats that are summed beforehand
_WIDEST = 512  # numbers of a row that one program takes


class Column(enum.IntEnum):
    """What a table tells of a tensor, as int64."""

    W = 0  # addresses
    M = 1
    U = 2
    STEP = 3  # of its counter, float32 or float64
    LENGTH = 4
    FIRST = 5  # the first program that works on it


_W = tl.constexpr(int(Column.W))
_M = tl.constexpr(int(Column.M))
_U = tl.constexpr(int(Column.U))
_STEP = tl.constexpr(int(Column.STEP))
_LENGTH = tl.constexpr(int(Column.LENGTH))
_FIRST = tl.constexpr(int(Column.FIRST))
_COLUMNS = tl.constexpr(len(Column))

_STORED = {
    Storage.FLOAT32: tl.float32,
    Storage.FLOAT64: tl.float64,
    Storage.FLOAT16: tl.float16,
    Storage.BFLOAT16: tl.bfloat16,
}
_COUNTED = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What the factors of a step follow from, besides its number."""

    lr: float | Tensor  # a tensor on the device is not read before the launch
    beta_1: float
    decay: float
    sign: float  # of the gradient
    coupled_decay: float
    grad_scale: Tensor | None
    found_inf: Tensor | None


# --- Verbs -----------------------------------------------------------------------------


def advance(
    table: Tensor, count: int, counter: torch.dtype, factors: Tensor, options: StepOptions
) -> None:
    _advance[(triton.cdiv(count, _COUNTERS),)](
        table,
        count,
        factors,
        *_scalars(options),
        COUNTER=_COUNTED[counter],
        BLOCK=_COUNTERS,
        num_warps=_WARPS,
    )


def advance_one(counter: Tensor, factors: Tensor, options: StepOptions) -> None:
    _advance_one[(1,)](counter, factors, *_scalars(options), num_warps=1)


def chunk_of(total: int) -> int:
    """How many elements one program takes, if all tensors have ``total``."""
    return BLOCK * max(1, math.ceil(total / (PROGRAMS * BLOCK)))


def dense_step(
    storage: Storage,
    table: Tensor,
    owners: Tensor,
    gradients: Tensor,
    factors: Tensor,
    found_inf: Tensor | None,
    coefficients: Coefficients,
    coupled: bool,
    chunk: int,
    programs: range,
) -> None:
    _dense_step[(len(programs),)](
        table,
        owners,
        gradients,
        factors,
        found_inf,
        programs.start,
        chunk,
        *_coefficients(coefficients),
        STORED=_STORED[storage],
        NUMBER=_number(storage),
        COUPLED=coupled,
        BLOCK=BLOCK,
        num_warps=_WARPS,
    )


def rows_step(
    storage: Storage,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    indices: tuple[Tensor, Tensor],
    sums: Tensor,
    rows: int,
    row_length: int,
    factors: Tensor,
    found_inf: Tensor | None,
    coefficients: Coefficients,
    coupled: bool,
) -> None:
    w, m, u, values = tensors
    ids, order = indices
    width = min(_WIDEST, max(32, triton.next_power_of_2(row_length)))
    columns = triton.cdiv(row_length, width)
    blocks = {"NUMBER": _number(storage), "TILE": _TILE, "CHUNK": _CHUNK, "BLOCK": width}
    warps = max(1, width // 128)
    if len(sums):
        _sum_chunks[(len(sums), columns)](
            values, ids, order, sums, row_length, **blocks, num_warps=warps
        )
    _rows_step[(len(ids), columns)](
        w,
        m,
        u,
        values,
        ids,
        order,
        sums,
        factors,
        found_inf,
        len(ids),
        rows,
        row_length,
        *_coefficients(coefficients),
        STORED=_STORED[storage],
        COUPLED=coupled,
        **blocks,
        num_warps=warps,
        debug=True,  # or there would be no assertion
        sanitize_overflow=False,
    )


@dataclass(frozen=True, slots=True)
class DeviceHistory:
    """What rows of a table have missed, see :class:`adamax._exact.History`."""

    sums: Tensor
    products: Tensor
    zeros: tuple[int, int, int]
    steps: int
    window: int
    now: int  # the stamp of a row that is up to date, as int32


def stamp_rows(ids: Tensor, rows: int, stamps: Tensor, before: int, now: int) -> None:
    if len(ids):
        _stamp_rows[(triton.cdiv(len(ids), _COUNTERS),)](
            ids,
            len(ids),
            rows,
            stamps,
            before,
            now,
            BLOCK=_COUNTERS,
            num_warps=_WARPS,
            debug=True,
            sanitize_overflow=False,
        )


def catch_up(
    storage: Storage,
    tensors: tuple[Tensor, Tensor, Tensor],
    stamps: Tensor,
    ids: Tensor | None,
    rows: range,
    row_length: int,
    history: DeviceHistory,
    epsilon: float,
) -> None:
    count = len(rows) if ids is None else len(ids)
    if not (count and row_length):
        return
    width = min(_WIDEST, max(32, triton.next_power_of_2(row_length)))
    _catch_up[(count,)](
        *tensors,
        stamps,
        ids,
        rows.start,
        rows.stop,
        row_length,
        history.sums,
        history.products,
        *history.zeros,
        history.steps,
        history.window,
        history.now,
        _bits(epsilon),
        STORED=_STORED[storage],
        NUMBER=_number(storage),
        TERMS=history.sums.shape[1],
        BLOCK=width,
        num_warps=max(1, width // 128),
        debug=True,
        sanitize_overflow=False,
    )


def sums_of(values: Tensor, row_length: int, dtype: torch.dtype) -> Tensor:
    """Room for the sums of those chunks of sorted rows that are all of one index."""
    return values.new_empty((len(values) // _CHUNK, row_length), dtype=dtype)


def _number(storage: Storage) -> tl.dtype:
    return tl.float64 if storage is Storage.FLOAT64 else tl.float32


def _scalars(options: StepOptions) -> tuple[object, ...]:
    on_device = isinstance(options.lr, Tensor)
    logarithm = math.log(options.beta_1) if options.beta_1 else -math.inf
    return (
        options.lr if on_device else None,
        _bits(0.0 if on_device else float(options.lr)),
        _bits(logarithm),
        _bits(options.decay),
        _bits(options.sign),
        _bits(options.coupled_decay),
        options.grad_scale,
        options.found_inf,
    )


def _coefficients(coefficients: Coefficients) -> tuple[int, int, int]:
    return (
        _bits(coefficients.one_minus_beta_1),
        _bits(coefficients.beta_2),
        _bits(coefficients.epsilon),
    )


def _bits(number: float) -> int:
    """A float64 as an integer: Triton would hand a Python float over as float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


@triton.jit
def _float64(bits):
    # Small integers arrive as int32.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


# --- Factors ---------------------------------------------------------------------------

_SCALARS = ["lr", "logarithm", "decay", "sign", "coupled_decay"]


@triton.jit(do_not_specialize=["count", *_SCALARS])
def _advance(
    table,
    count,
    factors,
    lr_on_device,
    lr,
    logarithm,
    decay,
    sign,
    coupled_decay,
    grad_scale,
    found_inf,
    COUNTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    address = tl.load(table + _COLUMNS * i + _STEP, mask=mask, other=0)
    counter = address.to(tl.pointer_type(COUNTER))
    t = _advanced(tl.load(counter, mask=mask, other=0.0), found_inf)
    tl.store(counter, t, mask=mask)
    step_size, decay, scale, coupled = _factors(
        t, lr_on_device, lr, logarithm, decay, sign, coupled_decay, grad_scale
    )
    row = factors + 4 * i
    tl.store(row, step_size, mask=mask)
    tl.store(row + 1, tl.full([BLOCK], 1.0, tl.float64) * decay, mask=mask)
    tl.store(row + 2, tl.full([BLOCK], 1.0, tl.float64) * scale, mask=mask)
    tl.store(row + 3, tl.full([BLOCK], 1.0, tl.float64) * coupled, mask=mask)


@triton.jit(do_not_specialize=_SCALARS)
def _advance_one(
    counter,
    factors,
    lr_on_device,
    lr,
    logarithm,
    decay,
    sign,
    coupled_decay,
    grad_scale,
    found_inf,
):
    t = _advanced(tl.load(counter), found_inf)
    tl.store(counter, t)
    step_size, decay, scale, coupled = _factors(
        t, lr_on_device, lr, logarithm, decay, sign, coupled_decay, grad_scale
    )
    tl.store(factors, step_size)
    tl.store(factors + 1, decay)
    tl.store(factors + 2, scale)
    tl.store(factors + 3, coupled)


@triton.jit
def _advanced(t, found_inf):
    following = t + 1
    if found_inf is not None:
        following = tl.where(tl.load(found_inf) == 0, following, t)
    return following


@triton.jit
def _factors(t, lr_on_device, lr, logarithm, decay, sign, coupled_decay, grad_scale):
    """In the order of Factor, in float64."""
    if lr_on_device is None:
        rate = _float64(lr)
    else:
        rate = tl.load(lr_on_device).to(tl.float64)
    scale = _float64(sign)
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    step_size = rate / -_expm1(t.to(tl.float64) * _float64(logarithm))
    return step_size, 1.0 - rate * _float64(decay), scale, _float64(coupled_decay)


@triton.jit
def _expm1(x):
    """exp(x) - 1 to full precision, for x <= 0.

    Where exp(x) is close to 1, what it was rounded to is close to exp(log(exp(x))), so
    (y - 1) / log(y) is close to (exp(x) - 1) / x (Kahan; Higham, Accuracy and Stability of
    Numerical Algorithms, section 1.14.1).
    """
    y = tl.exp(x)
    near = (y > 0.5) & (y < 1.0)
    ratio = (y - 1.0) / tl.log(tl.where(near, y, 0.75))
    # At 1, exp(x) - 1 is x.
    return tl.where(near, ratio * x, tl.where(y < 1.0, y - 1.0, x))


# --- The rule --------------------------------------------------------------------------


@triton.jit
def _stepped(
    w, m, u, g, step_size, decay, scale, coupled_decay, rate, beta_2, epsilon, COUPLED
):
    g = scale * g
    if COUPLED:
        g = g + coupled_decay * w
    m = m + rate * (g - m)
    u = tl.maximum(beta_2 * u, tl.abs(g), propagate_nan=tl.PropagateNan.ALL)
    return decay * w - step_size * _quotient(m, u + epsilon), m, u


@triton.jit
def _quotient(a, b):
    # Of float32, the plain one is approximate and 0 for large b.
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


# --- Dense -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "rate", "beta_2", "epsilon"])
def _dense_step(
    table,
    owners,
    gradients,
    factors,
    found_inf,
    start,
    chunk,
    rate,
    beta_2,
    epsilon,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) + start
    i = tl.load(owners + program)
    row = table + _COLUMNS * i
    w = tl.load(row + _W)
    m = tl.load(row + _M)
    u = tl.load(row + _U)
    g = tl.load(gradients + i)
    first = (program - tl.load(row + _FIRST)) * chunk
    end = tl.minimum(first + chunk, tl.load(row + _LENGTH))
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, end, first)

    step_size = tl.load(factors + 4 * i).to(NUMBER)
    decay = tl.load(factors + 4 * i + 1).to(NUMBER)
    scale = tl.load(factors + 4 * i + 2).to(NUMBER)
    coupled_decay = tl.load(factors + 4 * i + 3).to(NUMBER)
    rate = _float64(rate).to(NUMBER)
    beta_2 = _float64(beta_2).to(NUMBER)
    epsilon = _float64(epsilon).to(NUMBER)

    # Whole blocks of tensors that begin at a multiple of 16 bytes: without a mask, and
    # with addresses known to be such, loads and stores are of 16 bytes. Rounding down
    # changes nothing where this loop runs.
    middle = tl.where(
        (w | m | u | g) % 16 == 0, first + (end - first) // BLOCK * BLOCK, first
    )
    w_16 = tl.multiple_of((w // 16 * 16).to(tl.pointer_type(STORED)), 16)
    m_16 = tl.multiple_of((m // 16 * 16).to(tl.pointer_type(NUMBER)), 16)
    u_16 = tl.multiple_of((u // 16 * 16).to(tl.pointer_type(NUMBER)), 16)
    g_16 = tl.multiple_of((g // 16 * 16).to(tl.pointer_type(STORED)), 16)
    for block in range(first, middle, BLOCK):
        at = tl.multiple_of(block, BLOCK) + tl.arange(0, BLOCK)
        new_w, new_m, new_u = _stepped(
            tl.load(w_16 + at).to(NUMBER),
            tl.load(m_16 + at),
            tl.load(u_16 + at),
            tl.load(g_16 + at).to(NUMBER),
            step_size,
            decay,
            scale,
            coupled_decay,
            rate,
            beta_2,
            epsilon,
            COUPLED,
        )
        tl.store(w_16 + at, new_w.to(STORED))
        tl.store(m_16 + at, new_m)
        tl.store(u_16 + at, new_u)

    w_any = w.to(tl.pointer_type(STORED))
    m_any = m.to(tl.pointer_type(NUMBER))
    u_any = u.to(tl.pointer_type(NUMBER))
    g_any = g.to(tl.pointer_type(STORED))
    for block in range(middle, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        mask = at < end
        new_w, new_m, new_u = _stepped(
            tl.load(w_any + at, mask=mask, other=0.0).to(NUMBER),
            tl.load(m_any + at, mask=mask, other=0.0),
            tl.load(u_any + at, mask=mask, other=0.0),
            tl.load(g_any + at, mask=mask, other=0.0).to(NUMBER),
            step_size,
            decay,
            scale,
            coupled_decay,
            rate,
            beta_2,
            epsilon,
            COUPLED,
        )
        tl.store(w_any + at, new_w.to(STORED), mask=mask)
        tl.store(m_any + at, new_m, mask=mask)
        tl.store(u_any + at, new_u, mask=mask)


# --- Rows ------------------------------------------------------------------------------
#
# Indices come sorted, with the place that each had. The first program of each run of equal
# ones updates the row. A run may be as long as the batch, so those that fill whole chunks
# are summed in two stages: a program for each chunk first, then the row's program adds what
# those found. All additions are in an order that only the indices determine.


@triton.jit
def _sum_chunks(
    values,
    ids,
    order,
    sums,
    row_length,
    NUMBER: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    if tl.load(ids + first) == tl.load(ids + first + CHUNK - 1):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], NUMBER)
        for start in range(0, CHUNK, TILE):
            place = tl.load(order + first + start + tl.arange(0, TILE))
            total += _sum_tile(values, place, place >= 0, column, row_length, NUMBER)
        tl.store(sums + chunk * row_length + column, total, mask=column < row_length)


@triton.jit
def _sum_tile(rows, place, chosen, column, row_length, NUMBER: tl.constexpr):
    at = place[:, None] * row_length + column[None, :]
    mask = chosen[:, None] & (column < row_length)[None, :]
    return tl.sum(tl.load(rows + at, mask=mask, other=0.0).to(NUMBER), axis=0)


@triton.jit(do_not_specialize=["n", "rows", "rate", "beta_2", "epsilon"])
def _rows_step(
    w,
    m,
    u,
    values,
    ids,
    order,
    sums,
    factors,
    found_inf,
    n,
    rows,
    row_length,
    rate,
    beta_2,
    epsilon,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    COUPLED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + start)
    in_range = (row >= 0) & (row < rows)
    tl.device_assert(in_range, "an index of a sparse gradient is out of range")
    before = tl.load(ids + start - 1, mask=start > 0, other=-1)
    updates = in_range & ((start == 0) | (before != row))
    if found_inf is not None:
        updates = updates & (tl.load(found_inf) == 0)
    if updates:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < row_length
        place = tl.load(order + start)
        g = tl.load(values + place * row_length + column, mask=inside, other=0.0).to(NUMBER)
        if _is_at(ids, start + 1, n, row):
            g = _add_run(
                g,
                values,
                ids,
                order,
                sums,
                row,
                start + 1,
                n,
                column,
                row_length,
                NUMBER,
                TILE,
                CHUNK,
            )
        at = row * row_length + column
        new_w, new_m, new_u = _stepped(
            tl.load(w + at, mask=inside, other=0.0).to(NUMBER),
            tl.load(m + at, mask=inside, other=0.0),
            tl.load(u + at, mask=inside, other=0.0),
            g,
            tl.load(factors).to(NUMBER),
            tl.load(factors + 1).to(NUMBER),
            tl.load(factors + 2).to(NUMBER),
            tl.load(factors + 3).to(NUMBER),
            _float64(rate).to(NUMBER),
            _float64(beta_2).to(NUMBER),
            _float64(epsilon).to(NUMBER),
            COUPLED,
        )
        tl.store(w + at, new_w.to(STORED), mask=inside)
        tl.store(m + at, new_m, mask=inside)
        tl.store(u + at, new_u, mask=inside)


@triton.jit
def _is_at(ids, position, n, row):
    return tl.load(ids + position, mask=position < n, other=-1) == row


@triton.jit
def _add_run(
    g,
    values,
    ids,
    order,
    sums,
    row,
    start,
    n,
    column,
    row_length,
    NUMBER: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the rest of a run, which begins at ``start``."""
    boundary = tl.minimum((start + CHUNK - 1) // CHUNK * CHUNK, n)
    g, start = _add_rows(
        g, values, ids, order, row, start, boundary, column, row_length, NUMBER, TILE
    )
    lane = tl.arange(0, TILE)
    more = (start == boundary) & _is_at(ids, start, n, row)
    while more:
        last = start + (lane + 1) * CHUNK - 1
        whole = tl.load(ids + last, mask=last < n, other=-1) == row
        g += _sum_tile(sums, start // CHUNK + lane, whole, column, row_length, NUMBER)
        count = tl.sum(whole.to(tl.int64))
        start += count * CHUNK
        more = count == TILE
    g, start = _add_rows(
        g, values, ids, order, row, start, n, column, row_length, NUMBER, TILE
    )
    return g


@triton.jit
def _add_rows(
    g,
    values,
    ids,
    order,
    row,
    start,
    end,
    column,
    row_length,
    NUMBER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the rows of a run from ``start`` to ``end``, or to its own end."""
    more = start < end
    while more:
        position = start + tl.arange(0, TILE)
        own = tl.load(ids + position, mask=position < end, other=-1) == row
        place = tl.load(order + position, mask=own, other=0)
        g += _sum_tile(values, place, own, column, row_length, NUMBER)
        count = tl.sum(own.to(tl.int64))
        start += count
        more = (count == TILE) & (start < end)
    return g, start


# --- Rows that are behind --------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "rows", "before", "now"])
def _stamp_rows(ids, n, rows, stamps, before, now, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + i, mask=i < n, other=-1).to(tl.int64)
    last = tl.load(ids + i - 1, mask=(i > 0) & (i < n), other=-1)
    chosen = (row >= 0) & (row < rows) & (last != row)
    stamp = tl.load(stamps + row, mask=chosen, other=0)
    tl.device_assert(
        (stamp == before) | ~chosen,
        "a row has a gradient, but was not up to date when it was read",
    )
    tl.store(stamps + row, tl.zeros([BLOCK], tl.int32) + now, mask=chosen)


_OLDEST = [f"last_zero_{of}" for of in ("decay", "beta_1", "beta_2")]


@triton.jit(
    do_not_specialize=["first", "rows", *_OLDEST, "steps", "window", "now", "epsilon"]
)
def _catch_up(
    w,
    m,
    u,
    stamps,
    ids,
    first,
    rows,
    row_length,
    sums,
    products,
    last_zero_decay,
    last_zero_beta_1,
    last_zero_beta_2,
    steps,
    window,
    now,
    epsilon,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    if ids is None:
        row = place + first
        chosen = row < rows
    else:
        row = tl.load(ids + place).to(tl.int64)
        last = tl.load(ids + place - 1, mask=place > 0, other=-1)
        in_range = (row >= 0) & (row < rows)
        tl.device_assert(in_range, "an id is out of the range of the table")
        chosen = in_range & (last != row)
    stamp = tl.load(stamps + row, mask=chosen, other=now)
    if stamp != now:
        # Stamps are modulo 2**32.
        gap = (now.to(tl.int64) - stamp.to(tl.int64)) & 0xFFFFFFFF
        entry = steps - gap
        of_w = _product(products, entry, steps, last_zero_decay, 0)
        of_m = _product(products, entry, steps, last_zero_beta_1, 1).to(NUMBER)
        of_u = _product(products, entry, steps, last_zero_beta_2, 2).to(NUMBER)
        final = tl.minimum(entry + window, steps)
        later = _product(products, final, steps, last_zero_decay, 0)
        of_w = of_w.to(NUMBER)
        added = _float64(epsilon).to(NUMBER)
        for start in range(0, row_length, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < row_length
            at = row * row_length + column
            old_w = tl.load(w + at, mask=inside, other=0.0).to(NUMBER)
            old_m = tl.load(m + at, mask=inside, other=0.0)
            old_u = tl.load(u + at, mask=inside, other=0.0)
            inverse = _quotient(tl.full([BLOCK], 1.0, NUMBER), old_u + added)
            two_t = 4 * (old_u * inverse) - 2
            # Clenshaw's recurrence for a Chebyshev series in t = 2 * x - 1.
            newer = tl.zeros([BLOCK], NUMBER)
            older = tl.zeros([BLOCK], NUMBER)
            for k in range(1, TERMS):
                term = tl.load(sums + entry * TERMS + TERMS - k) * later
                following = term.to(NUMBER) + two_t * newer - older
                older = newer
                newer = following
            term = tl.load(sums + entry * TERMS) * later
            series = term.to(NUMBER) + 0.5 * two_t * newer - older
            new_w = of_w * old_w - old_m * inverse * series
            tl.store(w + at, new_w.to(STORED), mask=inside)
            tl.store(m + at, of_m * old_m, mask=inside)
            tl.store(u + at, of_u * old_u, mask=inside)
        tl.store(stamps + row, now)


@triton.jit
def _product(products, entry, steps, last_zero, COLUMN: tl.constexpr):
    """Of the factors in a column after ``entry``, kept as mantissas and exponents."""
    old = products + entry * 6 + COLUMN
    new = products + steps.to(tl.int64) * 6 + COLUMN
    exponent = tl.load(new + 3) - tl.load(old + 3)
    product = tl.load(new) / tl.load(old) * tl.exp2(exponent)
    return tl.where(entry < last_zero, 0.0, product)
