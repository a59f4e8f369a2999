"""Steps of tensors on the CPU, by the native core: one call for all of them."""

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, Protocol

from torch.autograd.graph import increment_version

import numpy as np
import torch
from torch import Tensor

from .._core.kernels import OPERANDS, Float64Array, Problem, kernels, problem_of
from .._core.rule import Scalar
from .._core.stale import raise_problem
from .batch import (
    PLAIN_TENSORS,
    Batch,
    Called,
    Scaling,
    check_counter,
    check_operands,
    check_state,
    described,
)
from .options import Options, check_count, state_dtype
from .sparse import SparseRows, index_error

LOOKUP = "attach(model) with the outermost module, or lookup(weight, ids),"

_COUNTERS = (torch.float32, torch.int64, torch.float64)
_GRADIENTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class ExactTable(Protocol):
    """What knows the stale rows of a table."""

    def part(self, scalars: Float64Array, options: Options) -> tuple[Any, ...]:
        """What the verb ``step`` needs to know of them."""


@dataclass(slots=True)
class _Part:
    """The parameters of one group; with ``rows``, a table with a sparse gradient."""

    batch: Batch
    options: Options
    rows: SparseRows | None = None
    table: ExactTable | None = None


class Call:
    """What a step does on the CPU.

    Args:
        scaling: of the gradients.
        called: what messages call a parameter.
    """

    def __init__(self, scaling: Scaling, called: Called) -> None:
        self._scaling = scaling
        self._called = called
        self._dense: list[_Part] = []
        self._tables: list[_Part] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # which to copy back where

    def add(self, batch: Batch, options: Options) -> None:
        """Parameters with dense gradients."""
        if batch.params:
            self._dense.append(_Part(batch, options))

    def add_rows(
        self,
        one: Batch,
        options: Options,
        rows: SparseRows,
        table: ExactTable | None = None,
    ) -> bool:
        """A parameter with a sparse gradient; in exact mode with what knows its stale rows.

        Returns:
            Whether its rows can be stepped where they lie.
        """
        tensors = one.params[0], one.exp_avgs[0], one.exp_infs[0]
        if any(rows.table(tensor) is None for tensor in tensors):
            return False
        self._tables.append(_Part(one, options, rows, table))
        return True

    def attempt(self) -> Problem | None:
        """Take the step, or change nothing and return why not."""
        batch, count = self._joined(), sum(len(part.batch) for part in self._dense)
        params, grads, exp_avgs, exp_infs, steps = batch.lists()
        counts = kernels().counts(steps)
        if isinstance(counts, tuple):
            return problem_of(counts)
        self._check_counts(counts)
        problem = kernels().step(
            params[:count],
            exp_avgs[:count],
            exp_infs[:count],
            grads[:count],
            self._scalars(counts),
            self._arguments_of_tables(counts[count:]),
            steps,
            math.inf,
            math.inf,
            torch.get_num_threads(),
        )
        if problem is not None:
            return problem_of(problem)
        increment_version(params)
        for target, source in self._copies:
            target.copy_(source)
        return None

    def run(self) -> None:
        """Take the step.

        Raises:
            IndexError: an index of a sparse gradient is out of range.
            RuntimeError: a row with a gradient was stale when it was read.
            ValueError: a tensor that does not fit its parameter.
        """
        if not (self._dense or self._tables):
            return
        problem = self.attempt()
        if problem is not None and problem.kind == "unfit":
            for part in (*self._dense, *self._tables):
                self._fit(part)
            problem = self.attempt()
        if problem is not None:
            self._raise(problem)

    def _joined(self) -> Batch:
        """All parameters, those with sparse gradients last."""
        parts = [part.batch for part in (*self._dense, *self._tables)]
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part.lists() for part in parts), strict=True)
        return Batch(*(list(chain.from_iterable(column)) for column in columns))

    # --- Arguments -----------------------------------------------------------------------

    def _check_counts(self, counts: list[float]) -> None:
        for count in set(counts):
            try:
                check_count(count, "")
            except ValueError:
                param = self._joined().params[counts.index(count)]
                check_count(count, self._called(param))

    def _scalars(self, counts: list[float]) -> Float64Array:
        """Those of dense parameters, ``(n, 8)``, or ``(1, 8)`` where all are alike."""
        rows: list[Float64Array] = []
        for part in self._dense:
            of_part = counts[len(rows) : len(rows) + len(part.batch)]
            scale = self._scaling.number
            made = {count: part.options.scalars(count, scale) for count in set(of_part)}
            if len(made) == len(self._dense) == 1:
                return made[of_part[0]][None]
            rows += [made[count] for count in of_part]
        return np.array(rows) if rows else np.empty((0, len(Scalar)))

    def _arguments_of_tables(self, counts: list[float]) -> list[tuple[Any, ...]]:
        tables = []
        for part, count in zip(self._tables, counts, strict=True):
            rows, table = part.rows, part.table
            assert rows is not None
            (param,), _, (exp_avg,), (exp_inf,), _ = part.batch.lists()
            scalars = part.options.scalars(count, self._scaling.number)
            tables.append(
                (
                    *map(rows.table, (param, exp_avg, exp_inf)),
                    rows.flat(),
                    rows.values,
                    scalars,
                    None if table is None else table.part(scalars, part.options),
                )
            )
        return tables

    # --- What does not fit ---------------------------------------------------------------

    def _fit(self, part: _Part) -> None:
        """Have what the verbs cannot work on copied, where a copy will do."""
        params, grads, exp_avgs, exp_infs, steps = part.batch.lists()
        if part.rows is None:
            check_operands(part.batch, self._called)
            grads = [_plain(g, p) for g, p in zip(grads, params, strict=True)]
        else:
            check_state(params[0], exp_avgs[0], exp_infs[0], self._called)
            values = _plain(part.rows.values, params[0])
            part.rows = SparseRows(part.rows.indices.cpu(), values, part.rows.sizes)
        dtypes = [state_dtype(param.dtype) for param in params]
        exp_avgs, exp_infs = (
            [self._own(m, (dtype,)) for m, dtype in zip(column, dtypes, strict=True)]
            for column in (exp_avgs, exp_infs)
        )
        for param, step in zip(params, steps, strict=True):
            check_counter(step, param, self._called)
        steps = [self._own(step, _COUNTERS) for step in steps]
        part.batch = Batch(params, grads, exp_avgs, exp_infs, steps)

    def _own(self, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """``tensor``, or a copy on the CPU of the last dtype, which is copied back."""
        if _is_plain(tensor) and tensor.dtype in dtypes:
            return tensor
        own = torch.empty(tensor.shape, dtype=dtypes[-1])
        self._copies.append((tensor, own.copy_(tensor)))
        return own

    def _raise(self, problem: Problem) -> NoReturn:
        param = self._joined().params[problem.where]
        if problem.kind == "index":
            table = self._tables[problem.where - sum(len(p.batch) for p in self._dense)]
            assert table.rows is not None
            raise index_error(problem.detail, table.rows.sizes, problem.value)
        name = self._called(param)
        if problem.kind != "unfit":
            raise_problem(problem, name, LOOKUP)
        operand = OPERANDS[problem.detail]
        columns = dict(zip(OPERANDS, _operands(self._joined()), strict=False))
        given = columns[operand][problem.where] if operand in columns else None
        raise ValueError(
            f"{name}: its {operand} must be strided, on the CPU, of a shape and dtype that "
            f"go with the parameter, and share no memory with the parameter or its state, "
            f"got {described(given)}"
        )


def _operands(batch: Batch) -> tuple[list[Tensor], ...]:
    """In the order of ``OPERANDS``."""
    return batch.params, batch.exp_avgs, batch.exp_infs, batch.grads, batch.steps


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.is_cpu
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _plain(gradient: Tensor, param: Tensor) -> Tensor:
    """A gradient that the verbs can read; the same one, if they can."""
    if gradient.is_complex() != param.is_complex():
        gradient = gradient.to(param.dtype)
    if not gradient.is_complex() and gradient.dtype not in _GRADIENTS:
        gradient = gradient.to(state_dtype(param.dtype))
    if _is_plain(gradient):
        return gradient
    return torch.empty(gradient.shape, dtype=gradient.dtype).copy_(gradient)
