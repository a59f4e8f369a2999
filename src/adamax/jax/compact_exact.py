"""Exact tables whose state is compact, or that are rounded by random bits.

As ``exact.py``. Rows that catch up are rounded when they are stored, before they take a
step. A row that is only read is rounded by the same bits as when it is stored.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from . import history
from .compact import frame_after, positions, positions_of_rows, random_of_leaf
from .compact_rule import Random, rounded_step, stored, wide_moments
from .exact import CurrentTable, once, touched_or_in_turn
from .history import StaleRows
from .primitives import FLOATS, primitive
from .rows import IndexedSlices, known_rows, put_rows, table_rows
from .state import check_frame_of_rows, checked


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("table", "mu", "nu", "stale", "frame", "random"),
    meta_fields=("b1", "b2", "eps", "name", "kind"),
)
@dataclass(frozen=True, eq=False)
class CompactTable(CurrentTable):
    """A table some of whose rows are stale; ``random`` is that of the coming step."""

    frame: jax.Array | None  # of 8-bit state
    random: Random
    kind: str

    def with_checked_moments(self) -> Self:
        if self.kind == "float32":
            return super().with_checked_moments()
        state = checked(self.kind, self.shape, self._state(), self.name)
        if self.frame is not None:
            check_frame_of_rows(self.table, state[2], self.name)
        return self

    def rows(self, indices: jax.Array) -> jax.Array:
        operands = *self._tables(), indices.reshape(-1), *self.random, *self._history()
        (rows,) = self._run(_LOOKUP, operands)
        return rows.reshape(*indices.shape, *self.shape[1:])

    def flushed(self) -> tuple[Any, ...]:
        operands = *self._tables(), *self.random, *self._history()
        return self._results(self._run(_FLUSH, operands), self.stale)

    def stepped(
        self, gradient: IndexedSlices, scalars: jax.Array, decay_rate: Any
    ) -> tuple[Any, ...]:
        rows = gradient.indices, gradient.values
        operands = *self._tables(), *rows, scalars, *self.random, *self._history()
        tables = self._run(_STEP, operands, gradient.values.dtype)
        stale = self.recorded(scalars, decay_rate, tables[0][:1])
        return self._results(tables, stale)

    def updated(
        self, gradient: IndexedSlices, scalars: jax.Array, decay_rate: Any
    ) -> tuple[Any, ...]:
        rows, before, after = _stepped_rows(
            *self._tables(), gradient.indices, gradient.values, scalars, *self.random,
            *self._history(),
        )  # fmt: skip
        # So wide that the sum is what has been rounded.
        change = after[0].astype(jnp.float32) - before.astype(jnp.float32)
        updates = replace(rows, values=change, current=True)
        stale = self.recorded(scalars, decay_rate, updates.values)
        steps = jnp.broadcast_to(stale.steps, rows.indices.shape)
        old, new = self._tables()[1:], (*after[1:3], steps, *after[3:])
        tables = [put_rows(*pair) for pair in zip(old, [rows] * len(old), new, strict=True)]
        return self._results([updates, *tables], stale)

    def _state(self) -> list[jax.Array]:
        return [self.mu, self.nu] + ([] if self.frame is None else [self.frame])

    def _tables(self) -> tuple[jax.Array, ...]:
        frames = () if self.frame is None else (self.frame,)
        return self.table, self.mu, self.nu, self.stale.stamps, *frames

    def _results(self, tables: Sequence[Any], stale: StaleRows) -> tuple[Any, ...]:
        """As an optimizer has them, of what is as :meth:`_tables`."""
        table, mu, nu, stamps, *frames = tables
        return table, mu, nu, *frames, stale._replace(stamps=stamps)

    def _run(self, verb: "_Verb", operands: Sequence[Any], dtype: Any = None) -> Any:
        """By a primitive, if there is one for these arrays, also after they are mapped."""
        dtypes = {self.dtype, self.dtype if dtype is None else dtype}
        of_history = {part.dtype for part in self.stale[2:] if part is not None}
        if dtypes <= FLOATS and of_history == {jnp.dtype(jnp.float32)}:
            return verb.by_kind[self.frame is not None].bind(*operands)
        return verb.operations(*operands)


# --- The verbs in operations of JAX ------------------------------------------------------


def _split(operands: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """The table with its state, stamps and frames, and the other operands."""
    count = 5 if operands[1].dtype == jnp.int8 else 4
    return list(operands[:count]), list(operands[count:])


def _caught_up(
    tables: Sequence[jax.Array],
    random: jax.Array,
    of_history: Sequence[jax.Array],
    places: jax.Array,
) -> list[jax.Array]:
    """Rows of the parameter and its state, up to date, as they are stored."""
    w, mu, nu, stamps, *frames = tables
    wide = w.astype(jnp.float32), *wide_moments([mu, nu, *frames]), stamps
    numbers = history.caught_up(wide, of_history)
    frame = None
    if frames:
        frame = frame_after(frames[0], history.decay_of_norms(stamps, of_history))
    new = stored(numbers, (w.dtype, mu.dtype), frame, random, places, first=3)
    is_stale = of_history[-1][0] != stamps
    return [
        jnp.where(is_stale.reshape(-1, *(1,) * (part.ndim - 1)), part, old)
        for part, old in zip(new, (w, mu, nu, *frames), strict=True)
    ]


def _looked_up(*operands: jax.Array) -> tuple[jax.Array]:
    tables, (indices, of_leaves, leaf, *of_history) = _split(operands)
    random = random_of_leaf(of_leaves, leaf)
    shape = tables[0].shape
    indices = known_rows(indices, shape[0])
    of_rows = [table.at[indices].get(mode="fill", fill_value=0) for table in tables]
    places = positions_of_rows(indices, shape)
    rows = _caught_up(of_rows, random, of_history, places)[0]
    known = (indices < shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return (jnp.where(known, rows, 0),)


def _flushed(*operands: jax.Array) -> tuple[jax.Array, ...]:
    tables, (of_leaves, leaf, *of_history) = _split(operands)
    random = random_of_leaf(of_leaves, leaf)
    places = positions(tables[0].shape)
    w, mu, nu, *frames = _caught_up(tables, random, of_history, places)
    return w, mu, nu, jnp.broadcast_to(of_history[-1], tables[3].shape), *frames


def _stepped_rows(
    *operands: jax.Array,
) -> tuple[IndexedSlices, jax.Array, tuple[jax.Array, ...]]:
    """The touched rows and those in turn, as they are and after the step."""
    tables, (indices, values, scalars, *others) = _split(operands)
    of_leaves, leaf, *of_history = others
    random = random_of_leaf(of_leaves, leaf)
    shape = tables[0].shape
    rows = touched_or_in_turn(shape[0], indices, values, of_history)
    before = [table_rows(table, rows) for table in tables]
    places = positions_of_rows(rows.indices, shape)
    param, *state = _caught_up(before, random, of_history, places)
    after = rounded_step(param, state, rows.values, scalars, random, places)
    return rows, before[0], after


def _stepped(*operands: jax.Array) -> tuple[jax.Array, ...]:
    rows, _, (w, mu, nu, *frames) = _stepped_rows(*operands)
    now = once(operands[-1][0], w) + 1
    new = w, mu, nu, jnp.broadcast_to(now, rows.indices.shape), *frames
    tables = _split(operands)[0]
    return tuple(map(put_rows, tables, [rows] * len(tables), new))


def _shape_of_rows(param: Any, *operands: Any) -> list[Any]:
    indices = _split((param, *operands))[1][0]
    return [param.update(shape=(*indices.shape, *param.shape[1:]))]


class _Verb:
    """A verb in operations, and its primitives for 8-bit state and for other state."""

    def __init__(self, name: str, operations: Any, outputs: Any = None) -> None:
        self.operations = operations
        self.by_kind = {
            is_8bit: primitive(
                f"exact_{'8bit' if is_8bit else 'rounded'}_{name}",
                operations,
                in_place=0 if outputs else 4 + is_8bit,
                outputs=outputs,
            )
            for is_8bit in (False, True)
        }


_STEP = _Verb("step", _stepped)
_FLUSH = _Verb("flush", _flushed)
_LOOKUP = _Verb("lookup", _looked_up, _shape_of_rows)
