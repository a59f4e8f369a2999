"""The rule in Triton on rows of tables, and stale rows.

Indices come sorted, with the place that each had. An index out of range, or a row that was
stale when it was read, stops the device with an assertion.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton import (
    COUNTERS,
    WARPS,
    bits,
    float64_of,
    number_of,
    quotient,
    rounded,
    update,
)
from .triton_compact import (
    frame_after,
    load_state,
    mixed,
    rounded_parameter,
    scales_of,
    store_state,
)

_TILE = 16  # repeats that are added at once
_CHUNK = 128  # repeats that are summed beforehand
_WIDEST = 512  # numbers of a row that one program takes
_ASSERTS = {"debug": True, "sanitize_overflow": False}  # or there would be no assertion


def rows_step(
    dtype: torch.dtype,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    indices: tuple[Tensor, Tensor],
    rows: int,
    row_length: int,
    scalars: Tensor,
    found_inf: Tensor | None,
    coupled: bool,
    scales: Tensor | None,
    stochastic: bool,
) -> None:
    """One step of the rule on the rows that a gradient has values for.

    Args:
        dtype: of the table, of real numbers.
        tensors: w, m, u and the values of the gradient.
        indices: sorted, and the place that each had.
        rows: of the table.
        row_length: numbers in a row.
        scalars: of one parameter, as ``advance`` has written them.
        found_inf: not 0 where there is to be no step.
        coupled: whether there is coupled decay.
        scales: of 8-bit state, as :func:`advance_frames` has written them.
        stochastic: whether parameters, of bfloat16, are rounded by random bits.
    """
    w, m, u, values = tensors
    ids, order = indices
    width = _width(row_length)
    columns = triton.cdiv(row_length, width)
    blocks = {"NUMBER": number_of(dtype), "TILE": _TILE, "CHUNK": _CHUNK, "BLOCK": width}
    warps = max(1, width // 128)
    # Room for the sums of those chunks that are all of one index.
    of_sums = torch.float64 if dtype is torch.float64 else torch.float32
    sums = m.new_empty((len(ids) // _CHUNK, row_length), dtype=of_sums)
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
        scalars,
        scales,
        found_inf,
        len(ids),
        rows,
        row_length,
        COUPLED=coupled,
        STOCHASTIC=stochastic,
        **blocks,
        num_warps=warps,
        **_ASSERTS,
    )


def advance_frames(
    frames: Tensor, ids: Tensor, shift: float, found_inf: Tensor | None
) -> Tensor:
    """Advance the frames of the rows in sorted ``ids``, by which 8-bit state has decayed.

    Args:
        frames: one for each row of the table.
        ids: sorted.
        shift: what is added.
        found_inf: not 0 where there is to be no step.

    Returns:
        The scales of the step: three at the first place of each row.
    """
    scales = frames.new_empty((len(ids), 3))
    _advance_frames[(triton.cdiv(len(ids), COUNTERS),)](
        frames,
        ids,
        len(ids),
        len(frames),
        bits(shift),
        found_inf,
        scales,
        BLOCK=COUNTERS,
        num_warps=WARPS,
        **_ASSERTS,
    )
    return scales


def stamp_rows(ids: Tensor, rows: int, stamps: Tensor, step: int) -> None:
    """Stamp the rows in sorted ``ids``, which were up to date with the step before."""
    if len(ids):
        _stamp_rows[(triton.cdiv(len(ids), COUNTERS),)](
            ids,
            len(ids),
            rows,
            stamps,
            step,
            BLOCK=COUNTERS,
            num_warps=WARPS,
            **_ASSERTS,
        )


def catch_up(
    dtype: torch.dtype,
    tensors: tuple[Tensor, ...],
    stamps: Tensor,
    rows: range | Tensor,
    row_length: int,
    history: tuple[Tensor, Tensor, Tensor],
    epsilon: float,
    frames: Tensor | None,
    seed: int,
    stochastic: bool,
) -> None:
    """Bring rows up to date with a history: a range of them, or those in sorted ids.

    Args:
        dtype: of the table, of real numbers.
        tensors: w, m and u.
        stamps: of all rows.
        rows: which.
        row_length: numbers in a row.
        history: the arrays of :class:`adamax._core.exact.History`.
        epsilon: of the rule.
        frames: of 8-bit state, one for each row.
        seed: of random bits, as an int64.
        stochastic: whether parameters, of bfloat16, are rounded by random bits.
    """
    if not (len(rows) and row_length):
        return
    width = _width(row_length)
    _catch_up[(len(rows),)](
        *tensors,
        stamps,
        rows if isinstance(rows, Tensor) else None,
        rows.start if isinstance(rows, range) else 0,
        rows.stop if isinstance(rows, range) else len(stamps),
        row_length,
        *history,
        bits(epsilon),
        frames,
        seed,
        STOCHASTIC=stochastic,
        NUMBER=number_of(dtype),
        ENTRIES=history[0].shape[0],
        TERMS=history[0].shape[1],
        BLOCK=width,
        num_warps=max(1, width // 128),
        **_ASSERTS,
    )


def _width(row_length: int) -> int:
    width: int = min(_WIDEST, max(32, triton.next_power_of_2(row_length)))
    return width


# --- Sums ------------------------------------------------------------------------------
#
# The first program of each run of equal indices updates the row. A run may be as long as
# the batch, so the repeats that fill whole chunks are summed by a program for each chunk
# first. All additions are in an order that only the indices determine.


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


# --- The rule --------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "rows", "shift"])
def _advance_frames(frames, ids, n, rows, shift, found_inf, scales, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + i, mask=i < n, other=-1).to(tl.int64)
    last = tl.load(ids + i - 1, mask=(i > 0) & (i < n), other=-1)
    chosen = (row >= 0) & (row < rows) & (last != row)
    before = tl.load(frames + row, mask=chosen, other=0.0)
    after = frame_after(before, float64_of(shift))
    if found_inf is not None:
        after = tl.where(tl.load(found_inf) == 0, after, before)
    tl.store(frames + row, after, mask=chosen)
    of_old_u, of_u, of_m = scales_of(before, after)
    tl.store(scales + 3 * i, of_old_u.to(tl.float32), mask=chosen)
    tl.store(scales + 3 * i + 1, of_u.to(tl.float32), mask=chosen)
    tl.store(scales + 3 * i + 2, of_m.to(tl.float32), mask=chosen)


@triton.jit(do_not_specialize=["n", "rows"])
def _rows_step(
    w,
    m,
    u,
    values,
    ids,
    order,
    sums,
    scalars,
    scales,
    found_inf,
    n,
    rows,
    row_length,
    NUMBER: tl.constexpr,
    COUPLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
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
        of_block = tl.program_id(1) * BLOCK
        column = of_block + tl.arange(0, BLOCK)
        inside = column < row_length
        if scales is None:
            of_row = scalars  # not used
        else:
            of_row = scales + 3 * start
        place = tl.load(order + start)
        g = tl.load(values + place * row_length + column, mask=inside, other=0.0).to(NUMBER)
        start += 1
        if tl.load(ids + start, mask=start < n, other=-1) == row:
            # The rest of the run: to the next chunk, whole chunks, and what is left.
            bound = tl.minimum((start + CHUNK - 1) // CHUNK * CHUNK, n)
            g, start = _add_rows(
                g, values, ids, order, row, start, bound, column, row_length, NUMBER, TILE
            )
            more = start == bound
            while more:
                lane = start // CHUNK + tl.arange(0, TILE)
                last = (lane + 1) * CHUNK - 1
                whole = tl.load(ids + last, mask=last < n, other=-1) == row
                g += _sum_tile(sums, lane, whole, column, row_length, NUMBER)
                count = tl.sum(whole.to(tl.int64))
                start += count * CHUNK
                more = count == TILE
            g, start = _add_rows(
                g, values, ids, order, row, start, n, column, row_length, NUMBER, TILE
            )
        at = row * row_length + column
        update(
            w + at,
            m + at,
            u + at,
            g,
            inside,
            scalars,
            of_row,
            row * row_length + of_block,
            NUMBER,
            COUPLED,
            STOCHASTIC,
            BLOCK,
        )


# --- Stale rows ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "rows", "step"])
def _stamp_rows(ids, n, rows, stamps, step, BLOCK: tl.constexpr):
    # Stamps are modulo 2**32, here as int32.
    step = step.to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + i, mask=i < n, other=-1).to(tl.int64)
    last = tl.load(ids + i - 1, mask=(i > 0) & (i < n), other=-1)
    chosen = (row >= 0) & (row < rows) & (last != row)
    stamp = tl.load(stamps + row, mask=chosen, other=0)
    tl.device_assert(
        (stamp == (step - 1).to(tl.int32)) | ~chosen,
        "a row has a gradient, but was stale when it was read",
    )
    tl.store(stamps + row, step.to(tl.int32), mask=chosen)


@triton.jit(do_not_specialize=["first", "rows", "epsilon", "seed"])
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
    clock,
    epsilon,
    frames,
    seed,
    STOCHASTIC: tl.constexpr,
    NUMBER: tl.constexpr,
    ENTRIES: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    steps, window, began = tl.load(clock), tl.load(clock + 1), tl.load(clock + 2)
    now = steps.to(tl.int32)
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
        belongs = (gap <= steps - began) & (gap < ENTRIES)
        tl.device_assert(belongs, "stamps do not belong to the history of the table")
        since = steps - gap
        final = tl.minimum(since + window, steps)
        later = _product(products, clock, final, 0, ENTRIES)
        of_w = _product(products, clock, since, 0, ENTRIES).to(NUMBER)
        of_m = _product(products, clock, since, 1, ENTRIES).to(NUMBER)
        of_u = _product(products, clock, since, 2, ENTRIES).to(NUMBER)
        added = rounded(float64_of(epsilon), NUMBER)
        of_bits = mixed(seed.to(tl.int64).to(tl.uint64))
        if frames is None:
            scale, scale_u, scale_m = of_u, of_u, of_u  # not used
        else:
            frame = tl.load(frames + row)
            after = frame_after(frame, tl.log2(of_u.to(tl.float64)) * -4.0)
            scale, scale_u, scale_m = scales_of(frame, after)
        of_row = sums + since % ENTRIES * TERMS
        for start in range(0, row_length, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < row_length
            at = row * row_length + column
            old_w = tl.load(w + at, mask=inside)
            old_m, old_u = load_state(m + at, u + at, inside, scale, NUMBER)
            denominator = old_u + added
            two_t = 4 * quotient(old_u, denominator) - 2
            # Clenshaw's recurrence for a Chebyshev series in t = 2 * x - 1.
            newer = tl.zeros([BLOCK], NUMBER)
            older = tl.zeros([BLOCK], NUMBER)
            for k in range(1, TERMS):
                term = tl.load(of_row + TERMS - k) * later
                following = term.to(NUMBER) + two_t * newer - older
                older = newer
                newer = following
            series = (tl.load(of_row) * later).to(NUMBER) + 0.5 * two_t * newer - older
            new_w = of_w * old_w.to(NUMBER) - quotient(old_m, denominator) * series
            number = row * row_length + start
            stored = rounded_parameter(
                new_w, of_bits, number, old_w.dtype, STOCHASTIC, BLOCK
            )
            tl.store(w + at, stored, mask=inside)
            store_state(
                m + at,
                u + at,
                of_m * old_m,
                of_u * old_u,
                inside,
                scale_u,
                scale_m,
                of_bits,
                number,
                BLOCK,
            )
        # One thread stores what every warp has read for itself, perhaps not yet.
        tl.debug_barrier()
        tl.store(stamps + row, now)
        if frames is not None:
            tl.store(frames + row, after)


@triton.jit
def _product(products, clock, since, COLUMN: tl.constexpr, ENTRIES: tl.constexpr):
    """Of the factors in a column after a step, kept as mantissas and exponents."""
    old = products + since % ENTRIES * 6 + COLUMN
    new = products + tl.load(clock) % ENTRIES * 6 + COLUMN
    product = tl.load(new) / tl.load(old) * tl.exp2(tl.load(new + 3) - tl.load(old + 3))
    return tl.where(since < tl.load(clock + 3 + COLUMN), 0.0, product)
