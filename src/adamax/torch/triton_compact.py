"""Compact state in Triton, on elements: the codes and random bits of ``_core/compact.py``.

State is in eight bits where it lies in int8 and uint8, and in bfloat16 where it lies there.
Whoever launches decides that by the dtypes of memory.
"""

import triton
import triton.language as tl

from .._core import compact

_GOLDEN = tl.constexpr(compact.GOLDEN)
_LARGEST = tl.constexpr(compact.LARGEST)
_NOT_FINITE = tl.constexpr(compact.NOT_FINITE)
_SMALLEST_POWER = tl.constexpr(compact.SMALLEST_POWER)
_MOMENT_CODES = tl.constexpr(float(compact.MOMENT_CODES))
_OF_ONE_CODE = tl.constexpr(float(1 / compact.MOMENT_CODES))
_QUARTER_OCTAVE = tl.constexpr(compact.QUARTER_OCTAVE)
_QUARTER_1, _QUARTER_2, _QUARTER_3 = map(tl.constexpr, compact.QUARTERS[1:])
_HALF_1, _HALF_3, _HALF_5, _HALF_7 = map(tl.constexpr, compact.HALFWAY)


# --- Random bits -----------------------------------------------------------------------


@triton.jit
def seed_of(step, where):
    """The seed of the bits of a parameter in a step, mixed; both are of int64."""
    return mixed(step.to(tl.uint64) + where.to(tl.uint64) * _GOLDEN)


@triton.jit
def mixed(word):
    """The finaliser of splitmix64."""
    word = word + _GOLDEN
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def random_bits(seed, first, OPERAND: tl.constexpr, BLOCK: tl.constexpr):
    """16 bits for each element of a block, whose first one has the number ``first``."""
    first = tl.cast(first, tl.int64)
    key = mixed(seed + (first >> 32).to(tl.uint64) * 4 + OPERAND)
    number = first.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    x = (number ^ key.to(tl.uint32)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + (key >> 32).to(tl.uint32)) * 0x846CA68B
    return (x ^ (x >> 16)) >> 16


# --- Frames ----------------------------------------------------------------------------


@triton.jit
def frame_after(before, shift):
    """The frame of norms that have been multiplied by a decay.

    Args:
        before: float32.
        shift: ``-4 * log2(decay)``, float64; infinite for a decay of 0.
    """
    moved = before.to(tl.float64) + shift
    after = (moved - tl.floor(moved)).to(tl.float32)
    return tl.where(after < 1, after, 0.0)  # not where it is NaN


@triton.jit
def scales_of(before, after):
    """What norms of codes, norms and moments are multiplied by, in float64."""
    factor = _frame_factor(after)
    return 1.0 / _frame_factor(before), factor, factor * _MOMENT_CODES


@triton.jit
def _frame_factor(frame):
    """``2**(frame / 4)``, by its series."""
    exponent = frame.to(tl.float64) * _QUARTER_OCTAVE
    series = exponent * 0 + 1.0
    for i in tl.static_range(9):
        series = 1.0 + exponent * (1.0 / (9 - i)) * series
    return series


# --- State in memory -------------------------------------------------------------------


@triton.jit
def load_state(m, u, mask, scale, NUMBER: tl.constexpr):
    """Moments and norms at pointers; ``scale`` is the first of the scales."""
    old_m = tl.load(m, mask=mask)
    old_u = tl.load(u, mask=mask)
    if old_m.dtype == tl.int8:
        moment, norm = _decode(old_m, old_u, scale)
    else:
        moment, norm = old_m.to(NUMBER), old_u.to(NUMBER)
    return moment, norm


@triton.jit
def store_state(m, u, moment, norm, mask, of_u, of_m, seed, first, BLOCK: tl.constexpr):
    """The other way round; ``of_u`` and ``of_m`` are the other scales."""
    if m.dtype.element_ty == tl.int8:
        random = random_bits(seed, first, 1, BLOCK)
        new_m, new_u = _encode(moment, norm, of_u, of_m, random)
    elif m.dtype.element_ty == tl.bfloat16:
        new_m = _round_bfloat16(moment, random_bits(seed, first, 1, BLOCK))
        new_u = _round_bfloat16(norm, random_bits(seed, first, 2, BLOCK))
    else:
        new_m, new_u = moment, norm
    tl.store(m, new_m, mask=mask)
    tl.store(u, new_u, mask=mask)


@triton.jit
def rounded_parameter(
    new_w,
    seed,
    first,
    STORED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parameters as they are stored."""
    if STOCHASTIC:
        stored = _round_bfloat16(new_w, random_bits(seed, first, 0, BLOCK))
    else:
        stored = new_w.to(STORED)
    return stored


@triton.jit
def _round_bfloat16(numbers, random):
    """Rounded up or down; finite numbers stay finite."""
    bits = numbers.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    finite = (size + random) >> 16
    finite = tl.where(finite < 0x7F7F, finite, 0x7F7F)
    special = size >> 16
    special = tl.where(size > 0x7F800000, special | 0x40, special)
    result = tl.where(size >= 0x7F800000, special, finite) | ((bits >> 16) & 0x8000)
    return result.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decode(m_codes, u_codes, scale):
    code = u_codes.to(tl.int32)
    norm = _power_of(code) * scale.to(tl.float32)
    norm = tl.where(code == 0, 0.0, norm)
    norm = tl.where(code == _NOT_FINITE, float("nan"), norm)
    return m_codes.to(tl.float32) * _OF_ONE_CODE * norm, norm


@triton.jit
def _encode(m, u, of_u, of_m, random):
    bits = (u * of_u.to(tl.float32)).to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    code = ((bits >> 23) - (127 - _SMALLEST_POWER)) * 4
    code += (mantissa >= _HALF_1).to(tl.int32) + (mantissa >= _HALF_3).to(tl.int32)
    code += (mantissa >= _HALF_5).to(tl.int32) + (mantissa >= _HALF_7).to(tl.int32)
    code = tl.where(code > 0, code, 0)
    code = tl.where(code < _LARGEST, code, _LARGEST)
    level = m * _power_of(-(code - 8 * _SMALLEST_POWER)) * of_m.to(tl.float32)
    level = tl.where(level > -127.0, level, -127.0)  # NaN too
    level = tl.where(level < 127.0, level, 127.0)
    # What is truncated is positive, so this rounds down.
    shifted = level + random.to(tl.int32).to(tl.float32) * 0.0000152587890625 + 128.0
    rounded = shifted.to(tl.int32) - 128
    rounded = tl.where(rounded < 127, rounded, 127)
    rounded = tl.where(code == 0, 0, rounded)
    finite = (tl.abs(m) < float("inf")) & (tl.abs(u) < float("inf"))
    return rounded.to(tl.int8), tl.where(finite, code, _NOT_FINITE).to(tl.uint8)


@triton.jit
def _power_of(code):
    """``2**(code / 4 - 40)``."""
    is_odd, is_high = (code & 1) != 0, (code & 2) != 0
    low = tl.where(is_odd, _QUARTER_1, 0)
    high = tl.where(is_odd, _QUARTER_3, _QUARTER_2)
    exponent = (code >> 2) + (127 - _SMALLEST_POWER)
    bits = (exponent << 23) | tl.where(is_high, high, low)
    return bits.to(tl.float32, bitcast=True)
