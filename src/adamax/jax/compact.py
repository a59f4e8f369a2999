"""Compact state in operations of JAX: codes, frames and random bits.

``_core/compact.py`` has the mathematics. The random bits are the same as there; numbers are
float32 here, so that codes now and then differ by one.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._core.compact import (
    GOLDEN,
    HALFWAY,
    LARGEST,
    MOMENT_CODES,
    NOT_FINITE,
    QUARTER_OCTAVE,
    QUARTERS,
    SMALLEST_POWER,
    TO_NEAREST,
)

Two: TypeAlias = tuple[jax.Array, jax.Array]

_TO_NEAREST = np.uint32(TO_NEAREST)


# --- Random bits -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def random_of_leaves(count: jax.Array, leaves: int, stochastic: bool) -> jax.Array:
    """What rounds leaves in a step: ``random`` of ``_native/xla_compact.hpp``.

    Args:
        count: the 1-based step.
        leaves: how many there are; each gets bits of its own.
        stochastic: whether parameters of bfloat16 are rounded by random bits.

    Returns:
        ``(leaves, 15)``, uint32: the seed's two words, ``stochastic``, and two numbers made
        of the seed for each of the parameter, ``mu`` and ``nu``; then for each of these
        where stale rows catch up before the step.
    """
    wheres = np.arange(leaves, dtype=np.uint64) * np.uint64(GOLDEN)
    step = _Word(jnp.zeros(leaves, jnp.uint32), jnp.full(leaves, count.astype(jnp.uint32)))
    words = (wheres >> np.uint64(32)).astype(np.uint32), wheres.astype(np.uint32)
    seed = step.plus(_Word(*map(jnp.asarray, words)))

    def key(carry: None, number: Two) -> tuple[None, Two]:
        inverted, operand = number
        of_all = _Word(seed.high ^ inverted, seed.low ^ inverted).mixed()
        key = of_all.plus(_Word(jnp.zeros_like(operand), operand)).mixed()
        return carry, (key.low, key.high)

    # A loop, of which XLA does not make a part of what each leaf is computed by.
    inverted = jnp.repeat(jnp.array([0, 2**32 - 1], jnp.uint32), 3)
    operands = jnp.tile(jnp.arange(3, dtype=jnp.uint32), 2)
    _, keys = jax.lax.scan(key, None, (inverted, operands))
    columns = [seed.low, seed.high, jnp.full(leaves, stochastic, jnp.uint32)]
    columns += [part[number] for number in range(6) for part in keys]
    return jnp.stack(columns, axis=1)


def random_of_leaf(of_leaves: jax.Array, leaf: jax.Array) -> jax.Array:
    """What rounds one of them, whose number ``leaf`` has: ``(15,)``."""
    random: jax.Array = jax.lax.dynamic_index_in_dim(of_leaves, leaf[0], keepdims=False)
    return random


def random_bits(random: jax.Array, operand: int, numbers: jax.Array) -> jax.Array:
    """16 bits for each element of an operand: 0 to 2, or 3 to 5 for catching up.

    ``numbers`` are those of the elements as uint32: those that are 2**32 apart get the same
    bits.
    """
    a, b = random[3 + 2 * operand], random[4 + 2 * operand]
    x = (numbers ^ a) * np.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + b) * np.uint32(0x846CA68B)
    return (x ^ (x >> 16)) >> 16


def positions(shape: tuple[int, ...]) -> jax.Array:
    """The numbers of the elements of an array, modulo 2**32."""
    numbers, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        numbers = numbers + along * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return numbers


def positions_of_rows(indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same for some rows of a table of this shape."""
    in_row = positions(shape[1:])
    first = indices.astype(jnp.uint32) * np.uint32(math.prod(shape[1:]) % 2**32)
    return first.reshape(-1, *(1,) * in_row.ndim) + in_row


class _Word(NamedTuple):
    """Numbers of 64 bits, which JAX lacks by default."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, number: int) -> "_Word":
        high, low = divmod(number, 2**32)
        return cls(jnp.uint32(high), jnp.uint32(low))

    def plus(self, other: "_Word") -> "_Word":
        low = self.low + other.low
        carry = (low < other.low).astype(jnp.uint32)
        return _Word(self.high + other.high + carry, low)

    def times(self, number: int) -> "_Word":
        high, low = divmod(number, 2**32)
        # The upper word of the product of the lower ones, by halves.
        x0, x1 = self.low & 0xFFFF, self.low >> 16
        y0, y1 = np.uint32(low & 0xFFFF), np.uint32(low >> 16)
        middle = x1 * y0 + ((x0 * y0) >> 16)
        other = x0 * y1 + (middle & 0xFFFF)
        upper = x1 * y1 + (middle >> 16) + (other >> 16)
        upper = upper + self.high * np.uint32(low) + self.low * np.uint32(high)
        return _Word(upper, self.low * np.uint32(low))

    def shifted(self, bits: int) -> "_Word":
        """Exclusive or with itself, shifted to the right by less than 32 bits."""
        low = (self.low >> bits) | (self.high << (32 - bits))
        return _Word(self.high ^ (self.high >> bits), self.low ^ low)

    def mixed(self) -> "_Word":
        """The finaliser of splitmix64."""
        word = self.plus(_Word.of(GOLDEN))
        word = word.shifted(30).times(0xBF58476D1CE4E5B9)
        return word.shifted(27).times(0x94D049BB133111EB).shifted(31)


# --- Frames ------------------------------------------------------------------------------


def frame_after(frame: jax.Array, decay: Any, rest: Any = 0.0) -> jax.Array:
    """The frame of norms that have been multiplied by ``decay + rest``."""
    shift = -jnp.log1p((decay - 1) + rest) / np.float32(QUARTER_OCTAVE)
    whole = jnp.floor(frame + shift)
    # The difference is exact where the frame is close to 1.
    after = (frame - whole) + shift
    return jnp.where((after >= 0) & (after < 1), after, 0)


def _factor(frame: jax.Array) -> jax.Array:
    """``2**(frame / 4)``, by a series that is the same everywhere."""
    exponent = frame * np.float32(QUARTER_OCTAVE)
    series = jnp.ones_like(exponent)
    for i in range(9, 0, -1):
        series = 1 + exponent * np.float32(1 / i) * series
    return series


def _for_elements(frame: jax.Array, ndim: int) -> jax.Array:
    """A frame, or one for each row, in a shape that can be broadcast."""
    return frame.reshape(-1, *(1,) * (ndim - 1)) if ndim else frame.reshape(())


# --- Codes -------------------------------------------------------------------------------


def decode(mu: jax.Array, nu: jax.Array, frame: jax.Array) -> Two:
    """The moments that codes stand for, ``frame`` being the one before the step."""
    codes = nu.astype(jnp.int32)
    norm = _power(codes) * (1 / _factor(_for_elements(frame, nu.ndim)))
    norm = jnp.where(codes == 0, 0, jnp.where(codes == NOT_FINITE, jnp.nan, norm))
    return mu.astype(jnp.float32) * (np.float32(1) / MOMENT_CODES) * norm, norm


def encode(m: jax.Array, u: jax.Array, frame: jax.Array, random: Any = _TO_NEAREST) -> Two:
    """The codes of moments; ``random`` has 16 bits for each, or rounds to nearest."""
    factor = _factor(_for_elements(frame, u.ndim))
    bits = jax.lax.bitcast_convert_type(u * factor, jnp.int32)
    codes = ((bits >> 23) - (127 - SMALLEST_POWER)) * 4
    for halfway in HALFWAY:
        codes = codes + ((bits & 0x7FFFFF) >= halfway)
    codes = jnp.clip(codes, 0, LARGEST)
    level = m * _power(8 * SMALLEST_POWER - codes) * (MOMENT_CODES * factor)
    # Also of NaN.
    level = jnp.where(level > -127, level, np.float32(-127))
    level = jnp.where(level < 127, level, np.float32(127))
    shifted = level + random.astype(jnp.float32) * np.float32(2**-16) + 128
    m_codes = jnp.minimum(shifted.astype(jnp.int32) - 128, 127)
    m_codes = jnp.where(codes == 0, 0, m_codes)
    codes = jnp.where(jnp.isfinite(m) & jnp.isfinite(u), codes, NOT_FINITE)
    return m_codes.astype(jnp.int8), codes.astype(jnp.uint8)


def round_bfloat16(numbers: jax.Array, random: jax.Array) -> jax.Array:
    """float32 numbers as bfloat16, rounded up or down; finite ones stay finite."""
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    size = bits & 0x7FFFFFFF
    rounded = jnp.minimum((size + random) >> 16, 0x7F7F)
    special = (size >> 16) | jnp.where(size > 0x7F800000, np.uint32(0x40), np.uint32(0))
    words = jnp.where(size >= 0x7F800000, special, rounded) | ((bits >> 16) & 0x8000)
    return jax.lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.bfloat16)


def _power(codes: jax.Array) -> jax.Array:
    """``2**(code / 4 - 40)``."""
    quarter = codes & 3
    mantissa = jnp.zeros_like(codes)
    for number, bits in enumerate(QUARTERS[1:], start=1):
        mantissa = jnp.where(quarter == number, bits, mantissa)
    exponent = (codes >> 2) + (127 - SMALLEST_POWER)
    return jax.lax.bitcast_convert_type((exponent << 23) | mantissa, jnp.float32)
