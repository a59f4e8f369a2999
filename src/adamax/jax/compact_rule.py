"""The rule on one parameter whose state is compact, or that is rounded by random bits.

As ``rule.py``, with more operands: the frame of 8-bit state, what rounds all leaves, see
:func:`.compact.random_of_leaves`, and which leaf the parameter is. The scalars are float32,
and one more says what rounding has left out of ``beta_2``.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .compact import (
    Two,
    decode,
    encode,
    frame_after,
    positions,
    positions_of_rows,
    random_bits,
    random_of_leaf,
    round_bfloat16,
)
from .primitives import FLOATS, primitive
from .rows import IndexedSlices, put_rows, sum_repeats, table_rows
from .rule import StepScalars, Three, stepped

State: TypeAlias = Sequence[jax.Array]  # mu, nu, and the frame of 8-bit state
Random: TypeAlias = Two  # that of all leaves, and the number of the leaf

_WIDE = jnp.float32  # what arithmetic is done in


def scalars_of(step: StepScalars, decays: bool, as_update: bool) -> jax.Array:
    """The scalars of a step, as the functions below take them."""
    rest = 0.0
    if isinstance(step.b2, float):
        rest = step.b2 - float(np.float32(step.b2))
    scalars = step.array(jnp.float32, decays, as_update)
    return jnp.concatenate([scalars, jnp.full(1, rest, jnp.float32)])


def wide_moments(state: State) -> Two:
    """The moments that are stored, as float32."""
    m, u, *frames = state
    return decode(m, u, *frames) if frames else (m.astype(_WIDE), u.astype(_WIDE))


def stored(
    numbers: Three,
    like: tuple[Any, ...],
    frame: jax.Array | None,
    random: jax.Array,
    places: jax.Array,
    first: int = 0,
) -> tuple[jax.Array, ...]:
    """The parameter, ``mu`` and ``nu`` as they are stored, and their frame.

    Args:
        numbers: the three as float32.
        like: the dtypes of the parameter and of ``mu``.
        frame: after the step, of 8-bit state.
        random: see :func:`.compact.random_of_leaves`.
        places: the numbers of the elements.
        first: the operand that the parameter is, of those that have random bits.
    """
    (w, m, u), (of_param, of_state) = numbers, like
    if of_param == jnp.bfloat16:
        by_random_bits = round_bfloat16(w, random_bits(random, first, places))
        w = jnp.where(random[2] != 0, by_random_bits, w.astype(jnp.bfloat16))
    w = w.astype(of_param)
    if frame is not None:
        bits = random_bits(random, first + 1, places)
        return w, *encode(m, u, frame, bits), frame
    if of_state == jnp.bfloat16:
        m = round_bfloat16(m, random_bits(random, first + 1, places))
        u = round_bfloat16(u, random_bits(random, first + 2, places))
    return w, m, u


def rounded_step(
    param: jax.Array,
    state: State,
    gradient: jax.Array,
    scalars: jax.Array,
    random: jax.Array,
    places: jax.Array,
) -> tuple[jax.Array, ...]:
    """The parameter and its state after a step; ``places`` are the elements' numbers."""
    numbers = stepped(param.astype(_WIDE), *wide_moments(state), gradient, scalars)
    frame = frame_after(state[2], scalars[3], scalars[5]) if len(state) == 3 else None
    return stored(numbers, (param.dtype, state[0].dtype), frame, random, places)


def _updated_rows(
    param: jax.Array,
    state: State,
    slices: IndexedSlices,
    scalars: jax.Array,
    random: jax.Array,
) -> tuple[IndexedSlices, IndexedSlices, tuple[jax.Array, ...]]:
    """The touched rows of a parameter before and after a step, and its state after it.

    A ``param`` without axes stands for all of its rows.
    """
    of_table = state[0].shape
    rows = sum_repeats(slices, of_table[0])
    before = table_rows(param, rows) if param.ndim else param
    of_rows = [table_rows(array, rows) for array in state]
    places = positions_of_rows(rows.indices, of_table)
    after, *new = rounded_step(before, of_rows, rows.values, scalars, random, places)
    put = (put_rows(old, rows, part) for old, part in zip(state, new, strict=True))
    return replace(rows, values=before), replace(rows, values=after), tuple(put)


def _dense(param: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
    *state, gradient, scalars, of_leaves, leaf = operands
    places = positions(state[0].shape)
    random = random_of_leaf(of_leaves, leaf)
    return rounded_step(param, state, gradient, scalars, random, places)


def _rows(param: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
    *state, indices, values, scalars, of_leaves, leaf = operands
    random = random_of_leaf(of_leaves, leaf)
    slices = IndexedSlices(values, indices)
    _, rows, new = _updated_rows(param, state, slices, scalars, random)
    return put_rows(param, rows, rows.values), *new


_verbs = {
    (_dense, False): primitive("rounded_dense", _dense, in_place=3),
    (_dense, True): primitive("8bit_dense", _dense, in_place=4),
    (_rows, False): primitive("rounded_rows", _rows, in_place=3),
    (_rows, True): primitive("8bit_rows", _rows, in_place=4),
}


def take_step(
    param: jax.Array, state: State, gradient: Any, scalars: jax.Array, random: Random
) -> tuple[jax.Array, ...]:
    """The parameter and its state after a step, in one pass if possible."""
    rule, of_gradient = _dense, [gradient]
    if isinstance(gradient, IndexedSlices):
        rule, of_gradient = _rows, [gradient.indices, jnp.asarray(gradient.values)]
    has_verb = {param.dtype, of_gradient[-1].dtype} <= FLOATS
    has_verb = has_verb and param.dtype != jnp.float64
    run = _verbs[rule, len(state) == 3].bind if has_verb else rule
    return tuple(run(param, *state, *of_gradient, scalars, *random))


@functools.partial(jax.jit, static_argnames="is_difference", inline=True)
def take_update(
    param: jax.Array,
    state: State,
    gradient: Any,
    scalars: jax.Array,
    random: Random,
    *,
    is_difference: bool,
) -> tuple[Any, ...]:
    """What is to be added to a parameter, and its state after a step.

    Where it ``is_difference``, scalars are those of a step, and the sum is what random bits
    have made of the parameter; else they are those of an update.
    """
    if isinstance(gradient, IndexedSlices):
        bits = random_of_leaf(*random)
        before, after, moments = _updated_rows(param, state, gradient, scalars, bits)
        if is_difference:
            after = replace(after, values=after.values - before.values)
        # lax.cond wants updates to have the structure of the gradients, to the last flag.
        flags = {"distinct": gradient.distinct, "current": gradient.current}
        return replace(after, **flags), *moments
    w, *new = _dense(param, *state, gradient, scalars, *random)
    return w - param if is_difference else w, *new
