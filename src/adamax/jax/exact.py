"""Exact tables: reading rows of a table some of which are stale, and stepping with them."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp

from .._core.exact import Expansion
from . import history
from .history import History, StaleRows
from .primitives import FLOATS, primitive
from .rows import (
    IndexedSlices,
    NotAnArray,
    check_rows,
    known_rows,
    put_rows,
    sum_repeats,
    table_rows,
)
from .rule import Three, state_dtype, stepped


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("table", "mu", "nu", "stale"),
    meta_fields=("b1", "b2", "eps", "name"),
)
@dataclass(frozen=True, eq=False)
class CurrentTable(NotAnArray):
    """A table some of whose rows are stale, to be read with :func:`adamax.jax.lookup`.

    :meth:`adamax.jax.Adamax.current` makes it. It is a node of a pytree and not an array:
    whoever reads it in another way gets an error instead of stale rows.
    """

    table: jax.Array
    mu: jax.Array
    nu: jax.Array
    stale: StaleRows
    b1: float
    b2: float
    eps: float
    name: str

    def checked(self, decays: bool) -> Self:
        """With state in the dtype of the arithmetic, if all parts are of one table.

        Raises:
            ValueError: they are not, or are of an optimizer unlike this one.
        """
        expansion = Expansion.of(self.b1, self.b2, state_dtype(self.table.dtype))
        history.check_stale_rows(self.stale, self.table, expansion, self.name)
        if (self.stale.decay is not None) != decays:
            other, this = ("without", "with") if decays else ("with", "without")
            raise ValueError(
                f"the state{self.name} is of an optimizer {other} weight decay, and this "
                f"one is {this}: call flush() of the former, and go on with "
                f"init(params)[2:] of this one"
            )
        return self.with_checked_moments()

    def with_checked_moments(self) -> Self:
        """With moments in the dtype of the arithmetic, if they fit the table."""
        expected = state_dtype(self.table.dtype)
        for name, moment in (("mu", self.mu), ("nu", self.nu)):
            is_float = jnp.issubdtype(moment.dtype, jnp.floating)
            fits = is_float and state_dtype(moment.dtype) == expected
            if moment.shape != self.table.shape or not fits:
                raise ValueError(
                    f"{name} in the state{self.name} must be {expected} of shape "
                    f"{self.table.shape}, as its parameter, got {moment.dtype} of shape "
                    f"{moment.shape}"
                )
        return replace(self, mu=self.mu.astype(expected), nu=self.nu.astype(expected))

    # --- Taken for an array ------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    @property
    def ndim(self) -> int:
        return self.table.ndim

    def __len__(self) -> int:
        return len(self.table)

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("_") or attribute in {f.name for f in fields(self)}:
            raise AttributeError(attribute)  # of an object that is being copied, say
        raise AttributeError(f"there is no {attribute!r}: {self.advice()}")

    def advice(self) -> str:
        return (
            f"rows of the table{self.name} of shape {self.shape} may be stale; read some "
            f"with adamax.jax.lookup(table, ids), or all of what flush() returns; for a "
            f"parameter that is not a table of rows, sparse may be a pytree with 'lazy'"
        )

    # --- Reading -----------------------------------------------------------------------

    def rows(self, indices: jax.Array) -> jax.Array:
        """The rows at int32 ``indices`` of any shape, up to date; zeros where of none."""
        bind = _lookup_p.bind if self._has_verbs() else _looked_up
        (rows,) = bind(*self._arrays(), indices.reshape(-1), *self._history())
        return rows.reshape(*indices.shape, *self.shape[1:])

    def flushed(self) -> tuple[jax.Array, jax.Array, jax.Array, StaleRows]:
        """The table, its state and its history, with all rows up to date."""
        bind = _flush_p.bind if self._has_verbs() else _flushed
        table, mu, nu, stamps = bind(*self._arrays(), *self._history())
        return table, mu, nu, self.stale._replace(stamps=stamps)

    # --- Steps -------------------------------------------------------------------------

    def stepped(
        self, gradient: IndexedSlices, scalars: jax.Array, decay_rate: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, StaleRows]:
        """The same after a step, whose decay rate is None without weight decay."""
        has_verbs = self._has_verbs() and gradient.values.dtype in FLOATS
        bind = _step_p.bind if has_verbs else _stepped
        rows = gradient.indices, gradient.values
        table, mu, nu, stamps = bind(*self._arrays(), *rows, scalars, *self._history())
        stale = self.recorded(scalars, decay_rate, table[:1])
        return table, mu, nu, stale._replace(stamps=stamps)

    def updated(
        self, gradient: IndexedSlices, scalars: jax.Array, decay_rate: Any
    ) -> tuple[IndexedSlices, jax.Array, jax.Array, StaleRows]:
        """The same, with what is to be added to the table instead of the table."""
        rows, before, (after, mu_rows, nu_rows) = _stepped_rows(
            *self._arrays(), gradient.indices, gradient.values, scalars, *self._history()
        )
        updates = replace(rows, values=after - before.astype(after.dtype), current=True)
        mu, nu = put_rows(self.mu, rows, mu_rows), put_rows(self.nu, rows, nu_rows)
        stale = self.recorded(scalars, decay_rate, updates.values)
        steps = jnp.broadcast_to(stale.steps, rows.indices.shape)
        stamps = put_rows(stale.stamps, rows, steps)
        return updates, mu, nu, stale._replace(stamps=stamps)

    def recorded(self, scalars: jax.Array, decay_rate: Any, result: Any) -> StaleRows:
        """The history after a step; all else has been read for ``result``."""
        stale = self.stale._replace(steps=once(self.stale.steps, result))
        weights = Expansion.of(self.b1, self.b2, stale.recent.dtype).weights
        return history.recorded(stale, weights, scalars[0], decay_rate)

    def _arrays(self) -> tuple[jax.Array, ...]:
        return self.table, self.mu, self.nu, self.stale.stamps

    def _history(self) -> History:
        return history.operands(self.stale, self.b1, self.b2, self.eps)

    def _has_verbs(self) -> bool:
        """Whether there are verbs for these arrays, also after they have been mapped."""
        of_state = {self.mu.dtype, self.nu.dtype, self.stale.recent.dtype}
        of_state |= {part.dtype for part in self.stale[3:] if part is not None}
        return self.dtype in FLOATS and of_state == {state_dtype(self.dtype)}


def check_current(gradient: Any, table: CurrentTable, name: str) -> None:
    """Raise unless this is a gradient of rows that were up to date."""
    if not isinstance(gradient, IndexedSlices):
        raise ValueError(
            f"the gradient of a parameter with sparse='exact' must be an IndexedSlices, "
            f"got an array of shape {jnp.shape(gradient)}{name}; sparse may be a pytree "
            f"that has 'lazy' for parameters with gradients of other kinds"
        )
    check_rows(gradient, table, f"the gradient{name}")
    if not gradient.current:
        raise ValueError(
            f"the gradient{name} is of rows that may have been stale when they were "
            f"read: compute it with value_and_sparse_grad(loss)(optimizer.current(params, "
            f"state), ...), or from rows of optimizer.lookup(params, state, ids), with "
            f"IndexedSlices(values, ids, current=True)"
        )


def is_current(node: object) -> bool:
    return isinstance(node, CurrentTable)


def once(number: jax.Array, result: jax.Array) -> jax.Array:
    """``number``, known only when ``result`` is, for all that XLA can see.

    Where what is written into an array does not depend on what has been read of it, XLA
    makes a copy to be safe.
    """
    of_all = result.reshape(len(result), math.prod(result.shape[1:]))[:, :1].sum()
    return number + ((of_all != of_all) & (of_all == of_all)).astype(number.dtype)


# --- The verbs in operations of JAX ------------------------------------------------------


def _looked_up(*operands: jax.Array) -> tuple[jax.Array]:
    *tables, indices = operands[:5]
    param = tables[0]
    indices = known_rows(indices, len(param))
    of_rows = [table.at[indices].get(mode="fill", fill_value=0) for table in tables]
    rows = history.caught_up(of_rows, operands[5:])[0].astype(param.dtype)
    known = (indices < len(param)).reshape(-1, *(1,) * (param.ndim - 1))
    return (jnp.where(known, rows, 0),)


def _flushed(*operands: jax.Array) -> tuple[jax.Array, ...]:
    param, _, _, stamps, *of_history = operands
    w, m, u = history.caught_up(operands[:4], of_history)
    return w.astype(param.dtype), m, u, jnp.broadcast_to(of_history[-1], stamps.shape)


def _stepped_rows(*operands: jax.Array) -> tuple[IndexedSlices, jax.Array, Three]:
    """The touched rows and those in turn, as they are and after the step.

    Rows in turn take the step as well, with a gradient of zero.
    """
    (param, *_), (indices, values, scalars) = operands[:4], operands[4:7]
    rows = touched_or_in_turn(len(param), indices, values, operands[7:])
    before = [table_rows(table, rows) for table in operands[:4]]
    w, m, u = history.caught_up(before, operands[7:])
    return rows, before[0], stepped(w, m, u, rows.values, scalars)


def touched_or_in_turn(
    count: int, indices: jax.Array, values: jax.Array, of_history: Sequence[jax.Array]
) -> IndexedSlices:
    """A gradient that also has the rows in turn of a table of ``count`` rows."""
    _, final, *_, (now,) = of_history
    turn = history.rows_in_turn(now, len(final), count)
    values = jnp.pad(values, ((0, len(turn)), *((0, 0),) * (values.ndim - 1)))
    both = IndexedSlices(values, jnp.concatenate([indices, turn]))
    return sum_repeats(both, count)


def _stepped(*operands: jax.Array) -> tuple[jax.Array, ...]:
    rows, _, after = _stepped_rows(*operands)
    now = once(operands[-1][0], after[0]) + 1
    new = *after, jnp.broadcast_to(now, rows.indices.shape)
    return tuple(map(put_rows, operands[:4], [rows] * 4, new))


def _shape_of_rows(param: Any, *operands: Any) -> list[Any]:
    indices = operands[3]
    return [param.update(shape=(*indices.shape, *param.shape[1:]))]


_step_p = primitive("exact_step", _stepped, in_place=4)
_flush_p = primitive("exact_flush", _flushed, in_place=4)
_lookup_p = primitive("exact_lookup", _looked_up, outputs=_shape_of_rows)
