"""The rule in Triton, on whole parameters: launches on the current stream of a device.

Nothing here waits for the device: learning rate, step counters and what a ``GradScaler``
says may all lie on it. The order of operations is that of the native core; compilers may
fuse a product with a sum.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_compact import (
    frame_after,
    load_state,
    rounded_parameter,
    scales_of,
    seed_of,
    store_state,
)

# A program takes a number of blocks of a tensor, one after the other. With 4 warps that is
# 4 numbers for each thread: of float32, a load of 16 bytes from each of 4 arrays.
BLOCK = 512
# Enough to keep all multiprocessors of a GPU busy to the end, few enough for a small table.
PROGRAMS = 8192
WARPS = 4
COUNTERS = 128  # that one program advances

# What a table tells of a parameter, as int64: the addresses of w, m, u, step counter and g,
# the length, and the first program that works on it.
COLUMNS = ("W", "M", "U", "STEP", "G", "LENGTH", "FIRST")
_W, _M, _U, _STEP, _G, _LENGTH, _FIRST = map(tl.constexpr, range(7))
# The columns of scalars, in the order of adamax._core.rule.Scalar. Then, for compact state,
# the seed of random bits, an integer of 64 bits, and three scales: what norms that are read
# are multiplied by, and norms and moments that are written.
SCALARS = 12  # columns, of which the last is empty
_WIDTH = tl.constexpr(SCALARS)
_STEP_SIZE, _DECAY, _SCALE, _COUPLED, _RATE, _BETA_2, _EPSILON = map(tl.constexpr, range(7))
_SEED, _SCALES = map(tl.constexpr, (7, 8))
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))

_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def advance(
    table: Tensor | None,
    counters: Tensor | torch.dtype,
    scalars: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    places: Tensor | int | None = None,
    shift: float | None = None,
) -> None:
    """Add 1 to step counters, unless infinities were found, and write what follows.

    Args:
        table: a row of ``COLUMNS`` for each parameter; None for a single one.
        counters: their dtype, or the single counter.
        scalars: ``(n, SCALARS)``, float64.
        tensors: learning rate, what gradients are divided by, and what is not 0 where there
            is to be no step; None where it does not apply.
        numbers: learning rate if there is no tensor, logarithm of beta_1, decoupled decay,
            sign of the gradient, coupled decay, 1 - beta_1, beta_2 and epsilon.
        places: where random bits are needed, the position of each parameter in the call
            and the address of its frame, ``(n, 2)``; of a single one the position.
        shift: what is added to the frames of 8-bit state.
    """
    one = isinstance(counters, Tensor)
    _advance[(triton.cdiv(len(scalars), COUNTERS),)](
        table,
        counters if one else None,
        len(scalars),
        scalars,
        *tensors,
        *map(bits, numbers),
        places if isinstance(places, Tensor) else None,
        None if isinstance(places, Tensor) else places,
        None if shift is None else bits(shift),
        COUNTER=_DTYPES[counters.dtype if isinstance(counters, Tensor) else counters],
        BLOCK=1 if one else COUNTERS,
        num_warps=1 if one else WARPS,
    )


def chunk_of(total: int) -> int:
    """How many elements one program takes, if all parameters have ``total``."""
    return BLOCK * max(1, math.ceil(total / (PROGRAMS * BLOCK)))


def dense_step(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    table: Tensor,
    owners: Tensor,
    scalars: Tensor,
    found_inf: Tensor | None,
    coupled: bool,
    chunk: int,
    programs: range,
    stochastic: bool,
) -> None:
    """One step of the rule on the parameters of a table, in one launch.

    Args:
        dtypes: of the parameters, moments, norms and gradients, of real numbers.
        table: a row of ``COLUMNS`` for each parameter.
        owners: the parameter that each program works on.
        scalars: what :func:`advance` has written.
        found_inf: not 0 where there is to be no step.
        coupled: whether there is coupled decay.
        chunk: elements of a program.
        programs: those to launch.
        stochastic: whether parameters, of bfloat16, are rounded by random bits.
    """
    _dense_step[(len(programs),)](
        table,
        owners,
        scalars,
        found_inf,
        programs.start,
        chunk,
        STORED=_DTYPES[dtypes[0]],
        MOMENT=_DTYPES[dtypes[1]],
        NORM=_DTYPES[dtypes[2]],
        GRADIENT=_DTYPES[dtypes[3]],
        NUMBER=number_of(dtypes[0]),
        COUPLED=coupled,
        STOCHASTIC=stochastic,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def number_of(dtype: torch.dtype) -> Any:
    """The type of the arithmetic on parameters of a dtype."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def bits(number: float) -> int:
    """A float64 as an integer: Triton would hand a Python float over as float32."""
    as_integer: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return as_integer


@triton.jit
def float64_of(bits):
    # Small integers arrive as int32.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def rounded(x, NUMBER: tl.constexpr):
    """A float64 in the type of the arithmetic; a finite one stays finite."""
    if NUMBER.primitive_bitwidth == 32:
        inside = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
        x = tl.where(tl.abs(x) < float("inf"), inside, x)
    return x.to(NUMBER)


# --- Scalars ---------------------------------------------------------------------------

_NUMBERS = ["lr", "logarithm", "decay", "sign", "coupled", "rate", "beta_2", "epsilon"]
_NUMBERS += ["where", "shift"]


@triton.jit(do_not_specialize=["count", *_NUMBERS])
def _advance(
    table,
    counters,
    count,
    scalars,
    lr_on_device,
    grad_scale,
    found_inf,
    lr,
    logarithm,
    decay,
    sign,
    coupled,
    rate,
    beta_2,
    epsilon,
    places,
    where,
    shift,
    COUNTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    if counters is None:
        address = tl.load(table + 7 * i + _STEP, mask=mask, other=0)
        counter = address.to(tl.pointer_type(COUNTER))
    else:
        counter = counters + i
    t = tl.load(counter, mask=mask, other=0.0)
    if found_inf is None:
        t += 1
    else:
        skips = tl.load(found_inf) != 0
        t = tl.where(skips, t, t + 1)
    tl.store(counter, t, mask=mask)

    if lr_on_device is None:
        learning_rate = float64_of(lr)
    else:
        learning_rate = tl.load(lr_on_device).to(tl.float64)
    scale = float64_of(sign)
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    step_size = learning_rate / -_expm1(t.to(tl.float64) * float64_of(logarithm))
    to = scalars + i * _WIDTH
    tl.store(to + _STEP_SIZE, step_size, mask=mask)
    tl.store(to + _DECAY, 1.0 - learning_rate * float64_of(decay), mask=mask)
    tl.store(to + _SCALE, scale, mask=mask)
    tl.store(to + _COUPLED, float64_of(coupled), mask=mask)
    tl.store(to + _RATE, float64_of(rate), mask=mask)
    tl.store(to + _BETA_2, float64_of(beta_2), mask=mask)
    tl.store(to + _EPSILON, float64_of(epsilon), mask=mask)

    if places is not None:
        position = tl.load(places + 2 * i, mask=mask, other=0)
        seed = seed_of(t.to(tl.int64), position)
        tl.store(to + _SEED, seed.to(tl.float64, bitcast=True), mask=mask)
    elif where is not None:
        seed = seed_of(t.to(tl.int64), where.to(tl.int64))
        tl.store(to + _SEED, seed.to(tl.float64, bitcast=True), mask=mask)
    if shift is not None:
        address = tl.load(places + 2 * i + 1, mask=mask, other=0)
        frame = address.to(tl.pointer_type(tl.float32))
        before = tl.load(frame, mask=mask, other=0.0)
        after = frame_after(before, float64_of(shift))
        if found_inf is not None:
            after = tl.where(skips, before, after)
        tl.store(frame, after, mask=mask)
        of_old_u, of_u, of_m = scales_of(before, after)
        tl.store(to + _SCALES, of_old_u, mask=mask)
        tl.store(to + _SCALES + 1, of_u, mask=mask)
        tl.store(to + _SCALES + 2, of_m, mask=mask)


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
def update(
    w,
    m,
    u,
    g,
    mask,
    scalars,
    scales,
    first,
    NUMBER: tl.constexpr,
    COUPLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rule on the elements at pointers, with gradients ``g``.

    ``first`` is the number of the first element, and ``scales`` are those of 8-bit state.
    """
    scale = tl.load(scalars + _SCALE)
    if g.dtype == tl.float64:  # it is scaled before it is rounded
        g = (scale * g).to(NUMBER)
    else:
        g = rounded(scale, NUMBER) * g.to(NUMBER)
    old_w = tl.load(w, mask=mask)
    old_m, old_u = load_state(m, u, mask, tl.load(scales), NUMBER)
    if COUPLED:
        g = g + rounded(tl.load(scalars + _COUPLED), NUMBER) * old_w.to(NUMBER)
    new_m = old_m + tl.load(scalars + _RATE).to(NUMBER) * (g - old_m)
    decayed = tl.load(scalars + _BETA_2).to(NUMBER) * old_u
    new_u = tl.maximum(decayed, tl.abs(g), propagate_nan=tl.PropagateNan.ALL)
    move = quotient(new_m, new_u + rounded(tl.load(scalars + _EPSILON), NUMBER))
    move = rounded(tl.load(scalars + _STEP_SIZE), NUMBER) * move
    new_w = rounded(tl.load(scalars + _DECAY), NUMBER) * old_w.to(NUMBER) - move
    seed = tl.load(scalars + _SEED).to(tl.uint64, bitcast=True)
    stored = rounded_parameter(new_w, seed, first, old_w.dtype, STOCHASTIC, BLOCK)
    tl.store(w, stored, mask=mask)
    of_u, of_m = tl.load(scales + 1), tl.load(scales + 2)
    store_state(m, u, new_m, new_u, mask, of_u, of_m, seed, first, BLOCK)


@triton.jit
def quotient(a, b):
    """The quotient, or 0 where b is 0; NaN comes through."""
    divisor = tl.where(b == 0, 1.0, b)
    # Of float32, the plain one is approximate and 0 for large b.
    if a.dtype == tl.float64:
        result = a / divisor
    else:
        result = tl.div_rn(a, divisor)
    return tl.where(b == 0, 0 * a, result)


@triton.jit(do_not_specialize=["start"])
def _dense_step(
    table,
    owners,
    scalars,
    found_inf,
    start,
    chunk,
    STORED: tl.constexpr,
    MOMENT: tl.constexpr,
    NORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    NUMBER: tl.constexpr,
    COUPLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) + start
    i = tl.load(owners + program)
    row = table + 7 * i
    scalars += i * _WIDTH
    scales = scalars + _SCALES
    w = tl.load(row + _W)
    m = tl.load(row + _M)
    u = tl.load(row + _U)
    g = tl.load(row + _G)
    first = (program - tl.load(row + _FIRST)) * chunk
    end = tl.minimum(first + chunk, tl.load(row + _LENGTH))
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, end, first)

    # Whole blocks of tensors that begin at a multiple of 16 bytes: without a mask, and
    # with addresses known to be such, loads and stores are of 16 bytes. Rounding down
    # changes nothing where this loop runs.
    are_aligned = (w | m | u | g) % 16 == 0
    middle = tl.where(are_aligned, first + (end - first) // BLOCK * BLOCK, first)
    w_16 = tl.multiple_of((w // 16 * 16).to(tl.pointer_type(STORED)), 16)
    m_16 = tl.multiple_of((m // 16 * 16).to(tl.pointer_type(MOMENT)), 16)
    u_16 = tl.multiple_of((u // 16 * 16).to(tl.pointer_type(NORM)), 16)
    g_16 = tl.multiple_of((g // 16 * 16).to(tl.pointer_type(GRADIENT)), 16)
    for block in range(first, middle, BLOCK):
        at = tl.multiple_of(block, BLOCK) + tl.arange(0, BLOCK)
        new = tl.load(g_16 + at)
        update(
            w_16 + at,
            m_16 + at,
            u_16 + at,
            new,
            None,
            scalars,
            scales,
            block,
            NUMBER,
            COUPLED,
            STOCHASTIC,
            BLOCK,
        )

    w_any = w.to(tl.pointer_type(STORED))
    m_any = m.to(tl.pointer_type(MOMENT))
    u_any = u.to(tl.pointer_type(NORM))
    g_any = g.to(tl.pointer_type(GRADIENT))
    for block in range(middle, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        new = tl.load(g_any + at, mask=at < end)
        update(
            w_any + at,
            m_any + at,
            u_any + at,
            new,
            at < end,
            scalars,
            scales,
            block,
            NUMBER,
            COUPLED,
            STOCHASTIC,
            BLOCK,
        )
