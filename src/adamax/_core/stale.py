"""Which rows of a table are stale in exact mode, and the protocol of a step.

A row is stale from a step that did not touch it until it is caught up. The mathematics is
in ``exact.py`` and the arithmetic in the verbs. A front end holds a :class:`StaleRows` for
each table and does, under its lock::

    stale.check_settings(...)                  # before anything is written
    part = stale.record(...)                   # what the step adds to the history
    kernels().step(..., tables=[(..., part)])  # update, stamp and commit, in one call

The step has happened when the verb returns, and has not before: an interrupt cannot come
between.
"""

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy.typing as npt

from .exact import History, HistoryFull, Recorded
from .kernels import Problem

# A history goes back this many elements of the table for each of its entries, but no less
# than the first and no more than the second many entries: little memory beside the table's,
# and little work for the rows that take their turn in a step.
_ELEMENTS_OF_AN_ENTRY = 64
_USUAL_ENTRIES = 1 << 16
_ELEMENTS_OF_AN_ENTRY_IN_LARGE_TABLES = 8192

_ELEMENTS_AT_ONCE = 1 << 24
_ELEMENTS_WORTH_A_BAR = 1 << 26
_SECONDS_BEFORE_BAR = 2.0


class TableLock:
    """A lock of all tables of an optimizer, that copies and forked children have anew.

    ``with lock.held: ...`` cannot be interrupted between taking the lock and the block.
    """

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return TableLock, ()


_locks: "weakref.WeakSet[TableLock]" = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    # The thread that holds a lock does not exist in a forked child.
    os.register_at_fork(after_in_child=_renew_locks)


class StaleRows:
    """The rows of one table, some of which are stale.

    All rows are current at first. The stamp of a row is the number of the step that it is
    up to date with, modulo ``2**32``.

    Args:
        stamps: zeros, one for each row: a uint32 array, or what another device has.
        row_length: numbers in a row.
        dtype: of the arithmetic.
        beta_1: of the next step.
        beta_2: of the next step.
        epsilon: of the next step.

    Raises:
        ValueError: betas that would need too many terms.
    """

    def __init__(
        self,
        stamps: Any,
        row_length: int,
        dtype: npt.DTypeLike,
        beta_1: float,
        beta_2: float,
        epsilon: float,
    ) -> None:
        self.stamps = stamps
        self.row_length = row_length
        self.epsilon = epsilon
        self.history = History(beta_1, beta_2, dtype, entries_of(len(stamps), row_length))

    @property
    def rows(self) -> int:
        return len(self.stamps)

    @property
    def may_be_stale(self) -> bool:
        """Whether there have been steps since all rows were up to date."""
        return self.history.steps > self.history.start

    # --- Steps -------------------------------------------------------------------------

    def check_settings(
        self, beta_1: float, beta_2: float, epsilon: float, decay: float, name: str
    ) -> None:
        """Raise unless a step with these settings can be taken, if need be after a flush.

        Raises:
            ValueError: betas that would need too many terms, or weight decay that is faster
                than the decay of the momentum.
            RuntimeError: an epsilon that is another than that of the steps which rows have
                yet to take.
        """
        self.history.check_betas(beta_1, beta_2)
        if decay < beta_1:
            raise ValueError(
                f"sparse='exact' needs 1 - learning rate * weight decay to be at least "
                f"beta_1, got {decay!r} and {beta_1!r} for {name}"
            )
        if epsilon != self.epsilon and self.may_be_stale:
            raise RuntimeError(
                f"epsilon of {name} changed from {self.epsilon!r} to {epsilon!r} while "
                f"rows were stale: call flush() before changing it"
            )

    def record(
        self,
        step_size: float,
        decay: float,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        flush: Callable[[], None],
    ) -> Recorded:
        """What a step adds to the history; :meth:`check_settings` has passed.

        ``flush`` is called where a history cannot hold steps of such different betas.
        """
        if not self.may_be_stale:
            self.epsilon = epsilon
        settings = step_size, decay, beta_1, beta_2
        try:
            return self.history.recorded(*settings, all_current=not self.may_be_stale)
        except HistoryFull:
            flush()
            return self.history.recorded(*settings, all_current=True)

    def part(self, recorded: Recorded) -> tuple[Any, ...]:
        """The last part of a table as the verb ``step`` takes it."""
        return (self.stamps, *self.history.arrays, *recorded)

    def check_all_current(self, name: str) -> None:
        """Raise a RuntimeError if a row may be stale, where the gradient is dense."""
        if self.may_be_stale:
            raise RuntimeError(
                f"{name} has a dense gradient, but some of its rows were stale when it was "
                f"read: call flush() before reading it as a whole"
            )

    # --- Catching up -------------------------------------------------------------------

    def flush(self, catch_up: Callable[[int, int], object], name: str) -> None:
        """Catch up all rows, by calls of ``catch_up(start, stop)``.

        After an interrupt some rows are current and others stale, and all are right.
        """
        for start, stop in self._pieces(name):
            catch_up(start, stop)
        self.history.restart()

    def _pieces(self, name: str) -> Iterator[tuple[int, int]]:
        size = max(1, _ELEMENTS_AT_ONCE // max(self.row_length, 1))
        pieces = [
            (start, min(start + size, self.rows)) for start in range(0, self.rows, size)
        ]
        if self.rows * self.row_length < _ELEMENTS_WORTH_A_BAR:
            yield from pieces
            return
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:  # a bar is not worth a dependency
            yield from pieces
            return
        with tqdm(
            total=self.rows,
            desc=f"flushing {name}",
            unit="row",
            unit_scale=True,
            delay=_SECONDS_BEFORE_BAR,
            leave=False,
            file=sys.stderr,
            disable=None,  # where nobody would see it
        ) as bar:
            for start, stop in pieces:
                yield start, stop
                bar.update(stop - start)


def raise_stale(row: int, name: str, lookup: str) -> NoReturn:
    """Raise the error for a gradient of a stale row.

    ``lookup`` is what should have been called before the row was read.
    """
    raise RuntimeError(
        f"row {row} of {name} has a gradient, but was stale when it was read: call "
        f"{lookup} before rows are read, or flush() to catch up all rows"
    )


def raise_problem(problem: Problem, name: str, lookup: str) -> NoReturn:
    """Raise the error for a problem that a verb has with the rows of a table."""
    if problem.kind == "stale":
        raise_stale(problem.detail, name, lookup)
    if problem.kind == "history":
        raise RuntimeError(
            f"the stamps of {name} do not belong to its history (row {problem.detail}): "
            f"the table was replaced, or its state was changed, while rows were stale"
        )
    raise AssertionError(problem)


def entries_of(rows: int, row_length: int) -> int:
    """How many steps the history of a table of this size goes back.

    >>> entries_of(10**7, 64)
    78125
    """
    elements = rows * row_length
    return max(
        min(elements // _ELEMENTS_OF_AN_ENTRY, _USUAL_ENTRIES),
        elements // _ELEMENTS_OF_AN_ENTRY_IN_LARGE_TABLES,
    )
