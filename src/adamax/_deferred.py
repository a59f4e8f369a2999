"""``sparse="exact"``: which rows of a table are behind, and bringing them up to date.

The mathematics is in ``_exact.py`` and the arithmetic in ``_kernels``. This is what front
ends have in common beside them.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy.typing as npt

import numpy as np

from ._exact import Expansion, History
from ._kernels import Int64Array, Storage, kernels, state_dtype

# After how many steps all rows are brought up to date, so that the history can begin anew:
# seldom enough to cost nothing beside the steps. It is longer for large tables, for which
# both the work and the memory are in proportion.
_FEWEST_STEPS = 1 << 16
_MOST_STEPS = 1 << 30
_ELEMENTS_FOR_A_STEP = 4096

_ELEMENTS_AT_ONCE = 1 << 24
_ELEMENTS_WORTH_A_BAR = 1 << 26
_SECONDS_BEFORE_BAR = 2.0


class DeferredRows:
    """The rows of one table, some of which are behind.

    A row that is behind has missed the last steps, in which its gradient was zero. Its
    stamp says how many. All rows are up to date at first.

    Args:
        storage: of the parameter.
        rows: of the table.
        row_length: elements in a row.
        beta_1: of the next step.
        beta_2: likewise.
        epsilon: likewise.

    Raises:
        ValueError: betas for which sums would be too long.
    """

    def __init__(
        self,
        storage: Storage,
        rows: int,
        row_length: int,
        beta_1: float,
        beta_2: float,
        epsilon: float,
    ) -> None:
        self.storage = storage
        self.rows = rows
        self.row_length = row_length
        self.epsilon = epsilon
        self._now = 0
        self._history = self._new_history(beta_1, beta_2)
        self._stamps = np.zeros(rows, np.uint32)

    def _new_history(self, beta_1: float, beta_2: float) -> History:
        limit = self.rows * self.row_length // _ELEMENTS_FOR_A_STEP
        limit = min(max(limit, _FEWEST_STEPS), _MOST_STEPS)
        return History(beta_1, beta_2, state_dtype(self.storage), limit)

    @property
    def may_be_behind(self) -> bool:
        """Whether there have been steps since all rows were up to date."""
        return self._history.steps > 0

    def must_flush(self, beta_1: float, beta_2: float) -> bool:
        """Whether all rows must be brought up to date before a step with these betas."""
        return self._history.is_full or (
            self.may_be_behind and not self._history.takes(beta_1, beta_2)
        )

    @property
    def stamps(self) -> int:
        """The address of the stamps."""
        return kernels().array_address(self._stamps)

    # --- Steps -------------------------------------------------------------------------

    def check_settings(
        self, beta_1: float, beta_2: float, epsilon: float, name: str, flush: str
    ) -> None:
        """Raise unless a step with these can be recorded, if need be after a flush.

        ``name`` is that of the table, ``flush`` what brings its rows up to date.
        """
        if (beta_1, beta_2) != self._history.betas:
            Expansion.of(beta_1, beta_2, self._history.dtype)
        if epsilon != self.epsilon:
            if self.may_be_behind:
                raise RuntimeError(
                    f"rows of {name} are behind, with steps under an epsilon of "
                    f"{self.epsilon}, and cannot be brought up to date over a step under "
                    f"one of {epsilon}: call {flush} first"
                )
            self.epsilon = epsilon

    def check_current(self, groups: object, name: str, lookup: str, flush: str) -> None:
        """Raise if one of the rows in ``groups``, which have a gradient, is behind.

        ``lookup`` is what should have been called before the rows were read.
        """
        row = kernels().find_behind(groups, self.stamps, self._now)
        if row >= 0:
            self.refuse(row, name, lookup, flush)

    def refuse(self, row: int, name: str, lookup: str, flush: str) -> NoReturn:
        """Raise the error of :meth:`check_current`."""
        raise RuntimeError(
            f"row {row} of {name} has a gradient, but was not up to date when it was "
            f"read: call {lookup} for the rows of a batch before they are read, or "
            f"{flush} to bring all rows up to date"
        )

    def are_behind(self, rows: Int64Array) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` are behind."""
        behind: npt.NDArray[np.bool_] = self._stamps[rows] != np.uint32(self._now % 2**32)
        return behind

    def check_all_current(self, name: str, flush: str) -> None:
        """Raise if a row may be behind, where the gradient is dense."""
        if self.may_be_behind:
            raise RuntimeError(
                f"{name} has a dense gradient, but rows of it were not up to date when it "
                f"was read: call {flush} before"
            )

    def record(self, step_size: float, decay: float, beta_1: float, beta_2: float) -> None:
        """Take note of a step: all rows are then behind, or further behind.

        :meth:`must_flush` has said that it can be.
        """
        if not self.may_be_behind and self._history.betas != (beta_1, beta_2):
            self._history = self._new_history(beta_1, beta_2)
        self._history.record(step_size, decay, beta_1, beta_2)
        self._now += 1

    def stamp(self, groups: object) -> None:
        """Take note that the rows in ``groups`` have made the step."""
        kernels().stamp_rows(groups, self.stamps, self._now)

    # --- Bringing rows up to date ------------------------------------------------------

    def catch_up(
        self, groups: object, addresses: tuple[int, int, int], copy: int, threads: int
    ) -> int:
        """Bring the rows in ``groups`` up to date; returns how many were behind.

        Args:
            groups: of the kernels.
            addresses: of ``w``, ``m`` and ``u``.
            copy: where to put a copy of the rows of ``w``, or 0.
            threads: how many may be used.
        """
        return kernels().catch_up_rows(
            self.storage,
            groups,
            np.array([*addresses, self.stamps, copy], np.int64),
            self.row_length,
            self._history,
            self._now,
            self.epsilon,
            threads,
        )

    def catch_up_range(
        self, start: int, stop: int, addresses: tuple[int, int, int], threads: int
    ) -> int:
        """The same for the rows from ``start`` to before ``stop``."""
        return self._catch_up_table(
            start, stop, np.array([*addresses, self.stamps], np.int64), threads
        )

    def catch_up_copies(
        self,
        rows: "Int64Array | slice",
        addresses: tuple[int, int, int],
        threads: int,
    ) -> int:
        """The same for copies of distinct rows at ``addresses``, one after the other."""
        stamps = self._stamps[rows].copy()
        address = kernels().array_address(stamps)
        return self._catch_up_table(
            0, stamps.size, np.array([*addresses, address], np.int64), threads
        )

    def _catch_up_table(
        self, start: int, stop: int, addresses: Int64Array, threads: int
    ) -> int:
        return kernels().catch_up_table(
            self.storage,
            (start, stop),
            addresses,
            self.row_length,
            self._history,
            self._now,
            self.epsilon,
            threads,
        )

    def set_current(self, rows: "Int64Array | slice") -> None:
        """Take note that copies of these rows have been put back."""
        self._stamps[rows] = self._now % 2**32

    def flush(self, catch_up: Callable[[int, int], object], name: str) -> None:
        """Bring all rows up to date, by calls of ``catch_up(start, stop)``.

        An interrupt leaves some rows up to date and others behind, all of them right.
        """
        for start, stop in self._pieces(name):
            catch_up(start, stop)
        self._history = self._new_history(*self._history.betas)

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
            desc=f"bringing {name} up to date",
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
