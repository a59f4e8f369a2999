r"""Compact state: the moments of a parameter in 2 or 4 bytes instead of 8.

**Eight bits.** Two properties of Adamax make it possible without blocks or tables.

``m / u`` is bounded: ``u`` is at least ``beta_2**k * |g|`` for the gradient of ``k`` steps
ago, so

.. math:: |m| / u \le (1 - \beta_1) \sum_k (\beta_1 / \beta_2)^k
          = \frac{1 - \beta_1}{1 - \beta_1 / \beta_2}

which is 1.00909 for the usual betas. It is stored as an integer from -127 to 127, in units
of 1.25 / 127, rounded up or down by random bits so that it is right on average.

``u`` is a running maximum that decays. Its code is the integer that is nearest to
``4 * log2(u) + frame + 160``: there are four codes to an octave. ``frame`` is what norms
have decayed by, in the same units: a step adds ``-4 * log2(beta_2)`` to it, so that the
code of a norm which merely decays stays as it is, and is never rounded again. When the
frame reaches 1, all codes become smaller by 1 and the frame by 1. A parameter has one
frame, and a table one for each row, since rows decay only when they are touched.

Codes of ``u`` are from 1, for ``2**-39.75``, to 254, for ``2**23.5``. Smaller norms are
stored as 0, and then ``m`` is too. Larger ones are stored as the largest. The code 255
says that ``m`` or ``u`` is not finite.

**bfloat16.** Both moments are rounded by random bits, without which ``beta_2 * u`` would
round to ``u``.

The random bits are a function of the step, the parameter's position and the element's
number, so that they are the same in each run and for any number of threads.

Codes and bits are written once for each compiler: in NumPy here, in C++
(``_native/compact.hpp``) and Triton (``torch/triton_compact.py``) with the same bits, and
in JAX (``jax/compact.py``), where a code now and then differs by one. ``torch/state.py``
converts the state of checkpoints, on any device.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

STATE_DTYPES = ("float32", "bfloat16", "8bit")

LARGEST_RATIO = 1.25
MOMENT_CODES = np.float32(127 / LARGEST_RATIO)  # for one norm
NOT_FINITE = 255
LARGEST = 254
SMALLEST_POWER = 40

# Mantissas: of 2**(0/4), ..., 2**(3/4), and halfway, of 2**(1/8), ..., 2**(7/8).
QUARTERS = 0, 0x1837F0, 0x3504F3, 0x5744FD
HALFWAY = 0xB95C2, 0x25FED7, 0x45672B, 0x6AC0C7
QUARTER_OCTAVE = float.fromhex("0x1.62e42fefa39efp-3")  # log(2) / 4
GOLDEN = 0x9E3779B97F4A7C15
TO_NEAREST = 1 << 15  # in place of random bits
_WORD = 2**64 - 1


def check_state_dtype(value: object, name: str = "state_dtype") -> str:
    """Return ``value`` if it is one of :data:`STATE_DTYPES`, else raise a ValueError."""
    if not (isinstance(value, str) and value in STATE_DTYPES):
        expected = ", ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value


def check_saved_dtype(value: object) -> None:
    """Raise a ValueError unless ``state_dict`` can give state as this."""
    if value not in (None, "float32"):
        raise ValueError(f"state_dtype must be None or 'float32', got {value!r}")


def check_stochastic_rounding(value: object) -> bool:
    """Return ``value`` if it is True or False, else raise a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"stochastic_rounding must be a bool, got {value!r}")
    return value


def largest_ratio(beta_1: float, beta_2: float) -> float:
    """The bound of ``|m| / u``.

    >>> round(largest_ratio(0.9, 0.999), 5)
    1.00909
    """
    if beta_1 == 0.0:
        return 1.0
    return (1 - beta_1) / (1 - beta_1 / beta_2) if beta_1 < beta_2 else math.inf


def check_betas(beta_1: float, beta_2: float, names: str = "beta_1 and beta_2") -> None:
    """Raise a ValueError where the moments of 8-bit state could saturate."""
    bound = largest_ratio(beta_1, beta_2)
    if bound > LARGEST_RATIO:
        raise ValueError(
            f"state_dtype='8bit' needs (1 - beta_1) / (1 - beta_1 / beta_2) to be at most "
            f"{LARGEST_RATIO}, which bounds m / u; got {bound:.4g} for {names} of "
            f"{beta_1!r} and {beta_2!r}"
        )


# --- Frames ------------------------------------------------------------------------------


def frame_after(frame: Array, decay: Array | float) -> Float32Array:
    """The frame of norms that have been multiplied by ``decay``."""
    with np.errstate(all="ignore"):
        sums = frame.astype(np.float64) - 4 * np.log2(np.asarray(decay, np.float64))
        after = (sums - np.floor(sums)).astype(np.float32)
        return np.where(after < 1, after, np.float32(0)).astype(np.float32)


def frame_factor(frame: Array) -> npt.NDArray[np.float64]:
    """``2**(frame / 4)``, by a series whose bits are the same everywhere."""
    exponent = frame.astype(np.float64) * QUARTER_OCTAVE
    series = np.ones_like(exponent)
    for i in range(9, 1, -1):
        series = 1 + exponent * (1.0 / i) * series
    return np.asarray(1 + exponent * series)


# --- Random bits -------------------------------------------------------------------------


def seed_of(step: float, where: int) -> int:
    """The seed of the bits for a parameter in a step."""
    step = step if 0 <= step < 2**53 else 0
    return (int(step) + where * GOLDEN) & _WORD


def random_bits(seed: int, operand: int, numbers: Array) -> npt.NDArray[np.uint32]:
    """16 bits for each element of an operand, by the elements' numbers."""
    key = np.zeros(numbers.shape, np.uint64)
    high = np.asarray(numbers >> 32)
    for each in np.unique(high):
        key[high == each] = _mixed((_mixed(seed) + int(each) * 4 + operand) & _WORD)
    a, b = key.astype(np.uint32), (key >> np.uint64(32)).astype(np.uint32)
    with np.errstate(over="ignore"):  # which NumPy tells of scalars
        x: Array = (numbers.astype(np.uint32) ^ a) * np.uint32(0x7FEB352D)
        x = ((x ^ (x >> 15)) + b) * np.uint32(0x846CA68B)
    return np.asarray((x ^ (x >> 16)) >> 16)


def _mixed(word: int) -> int:
    """The finaliser of splitmix64."""
    word = (word + GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


# --- Codes -------------------------------------------------------------------------------


def round_bfloat16(
    numbers: Float32Array, random: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint16]:
    """The words of bfloat16 numbers, rounded up or down; finite ones stay finite."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    rounded = np.minimum((size + random) >> 16, 0x7F7F)
    special = (size >> 16) | np.where(size > 0x7F800000, 0x40, 0)
    result = np.where(size >= 0x7F800000, special, rounded) | ((bits >> 16) & 0x8000)
    return np.asarray(result).astype(np.uint16)


def decode(
    m_codes: npt.NDArray[np.int8], u_codes: npt.NDArray[np.uint8], frame: Array
) -> tuple[Float32Array, Float32Array]:
    """The moments that codes stand for.

    Args:
        m_codes: of the first moments.
        u_codes: of the norms.
        frame: before the step; of a shape that can be broadcast.

    >>> m, u = decode(np.int8([100]), np.uint8([160]), np.float32([0]))
    >>> round(float(m[0]), 4), float(u[0])
    (0.9843, 1.0)
    """
    codes = u_codes.astype(np.int32)
    with np.errstate(all="ignore"):
        u = _power(codes) * (1 / frame_factor(frame)).astype(np.float32)
        u = np.where(codes == 0, np.float32(0), u)
        u = np.where(codes == NOT_FINITE, np.float32(np.nan), u)
        m = m_codes.astype(np.float32) * (np.float32(1) / MOMENT_CODES) * u
    return m, u


def encode(
    m: Float32Array, u: Float32Array, frame: Array, random: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]]:
    """The codes of moments; ``random`` has 16 bits for each.

    >>> half = np.uint32([1 << 15])
    >>> encode(np.float32([0.9843]), np.float32([1]), np.float32([0]), half)
    (array([100], dtype=int8), array([160], dtype=uint8))
    """
    factor = frame_factor(frame)
    with np.errstate(all="ignore"):
        bits = np.asarray(u * factor.astype(np.float32), np.float32).view(np.int32)
        codes = ((bits >> 23) - (127 - SMALLEST_POWER)) * 4
        codes += np.sum(
            (bits & 0x7FFFFF)[..., None] >= np.array(HALFWAY, np.int32),
            axis=-1,
            dtype=np.int32,
        )
        codes = np.clip(codes, 0, LARGEST)
        of_m = (float(MOMENT_CODES) * factor).astype(np.float32)
        level = m * _power(8 * SMALLEST_POWER - codes) * of_m
        level = np.where(level > -127, level, np.float32(-127))
        level = np.where(level < 127, level, np.float32(127))
        shifted = level + random.astype(np.float32) * np.float32(2**-16) + np.float32(128)
        m_codes = np.minimum(shifted.astype(np.int32) - 128, 127)
        m_codes = np.where(codes == 0, 0, m_codes)
    finite = np.isfinite(m) & np.isfinite(u)
    return m_codes.astype(np.int8), np.where(finite, codes, NOT_FINITE).astype(np.uint8)


def _power(codes: npt.NDArray[np.int32]) -> Float32Array:
    """``2**(code / 4 - 40)``."""
    exponent = (codes >> 2) + (127 - SMALLEST_POWER)
    bits = (exponent << 23) | np.array(QUARTERS, np.int32)[codes & 3]
    return np.asarray(bits.astype(np.int32)).view(np.float32)
