"""Steps of tensors on the CPU, by the native core: one call for all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._core.kernels import OPERANDS, Float64Array, Problem, kernels, problem_of
from .._core.rule import Hyperparameters, Scalar
from .._core.stale import raise_problem
from .batch import (
    FLOATS,
    PLAIN_TENSORS,
    Batch,
    Called,
    Scaling,
    check_counter,
    check_operands,
    check_state,
    described,
)
from .options import Options, check_count, kind_of, state_dtype, stored_dtype
from .sparse import SparseRows, frame_of_rows, index_error

LOOKUP = "attach(model) with the outermost module, or lookup(weight, ids),"


# Of a table in exact mode: makes what the verb needs to know of stale rows.
Exact: TypeAlias = Callable[[Float64Array, Hyperparameters], tuple[Any, ...]]


@dataclass(slots=True)
class _Part:
    """The parameters of one group; with ``rows``, a table with a sparse gradient."""

    batch: Batch
    options: Options
    rows: SparseRows | None = None
    exact: Exact | None = None


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
        self, one: Batch, options: Options, rows: SparseRows, exact: Exact | None = None
    ) -> bool:
        """A parameter with a sparse gradient, if its rows can be stepped where they lie."""
        tensors = one.params[0], one.exp_avgs[0], one.exp_infs[0]
        if any(rows.table(tensor) is None for tensor in tensors):
            return False
        self._tables.append(_Part(one, options, rows, exact))
        return True

    def attempt(self) -> Problem | None:
        """Take the step, or change nothing and return why not."""
        batch, count = self._joined(), sum(len(part.batch.params) for part in self._dense)
        params, grads, exp_avgs, exp_infs, steps = batch.lists()
        counts = kernels().counts(steps)
        if isinstance(counts, tuple):
            return problem_of(counts)
        for each in set(counts):
            check_count(each, params[counts.index(each)], self._called)
        problem = kernels().step(
            params[:count],
            exp_avgs[:count],
            exp_infs[:count],
            grads[:count],
            self._scalars(counts),
            None if batch.frames is None else batch.frames[:count],
            [
                self._table(part, each)
                for part, each in zip(self._tables, counts[count:], strict=True)
            ],
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
        if self._dense or self._tables:
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
        joined = Batch(*(list(chain.from_iterable(column)) for column in columns))
        if any(part.frames is not None for part in parts):
            frames = (part.frames or [None] * len(part.params) for part in parts)
            joined.frames = list(chain.from_iterable(frames))
        return joined

    def _scalars(self, counts: list[float]) -> Float64Array:
        """Those of dense parameters, ``(n, 10)``, or ``(1, 10)`` where all are alike."""
        rows: list[Float64Array] = []
        for part in self._dense:
            of_part = counts[len(rows) : len(rows) + len(part.batch.params)]
            scale = self._scaling.number
            made = {count: part.options.scalars(count, scale) for count in set(of_part)}
            if len(made) == len(self._dense) == 1:
                return made[of_part[0]][None]
            rows += [made[count] for count in of_part]
        return np.array(rows) if rows else np.empty((0, len(Scalar)))

    def _table(self, part: _Part, count: float) -> tuple[Any, ...]:
        rows, h = part.rows, part.options.hyperparameters
        assert rows is not None
        (param,), _, (exp_avg,), (exp_inf,), _ = part.batch.lists()
        scalars = part.options.scalars(count, self._scaling.number)
        exact = None if part.exact is None else part.exact(scalars, h)
        tensors = map(rows.table, (param, exp_avg, exp_inf))
        frame = None
        if part.batch.frames is not None and part.batch.frames[0] is not None:
            frame = frame_of_rows(part.batch.frames[0], rows.count)
        return (*tensors, rows.flat(), rows.values, scalars, frame, exact)

    # --- What does not fit ---------------------------------------------------------------

    def _fit(self, part: _Part) -> None:
        """Have what the verbs cannot work on copied, where a copy will do."""
        params, grads, exp_avgs, exp_infs, steps = part.batch.lists()
        for param, step in zip(params, steps, strict=True):
            check_counter(step, param, self._called)
        if part.rows is None:
            check_operands(part.batch, self._called)
            grads = [_gradient(g, p) for g, p in zip(grads, params, strict=True)]
        else:
            check_state(params[0], exp_avgs[0], exp_infs[0], self._called)
            values = _gradient(part.rows.values, params[0])
            part.rows = SparseRows(part.rows.indices.cpu(), values, part.rows.sizes)
        exp_avgs, exp_infs = (
            [
                self._own(state, (stored_dtype(param.dtype, kind_of(exp_avg), name),))
                for state, param, exp_avg in zip(states, params, exp_avgs, strict=True)
            ]
            for name, states in (("exp_avg", exp_avgs), ("exp_inf", exp_infs))
        )
        of_counters = torch.float64, torch.float32, torch.int64
        steps = [self._own(step, of_counters) for step in steps]
        part.batch = Batch(params, grads, exp_avgs, exp_infs, steps, part.batch.frames)

    def _own(self, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """``tensor``, or a copy of the first dtype, which is copied back."""
        own = _plain(tensor, tensor.dtype if tensor.dtype in dtypes else dtypes[0])
        if own is not tensor:
            self._copies.append((tensor, own))
        return own

    def _raise(self, problem: Problem) -> NoReturn:
        batch = self._joined()
        param = batch.params[problem.where]
        if problem.kind == "index":
            table = self._tables[problem.where - len(batch.params)]
            assert table.rows is not None
            raise index_error(problem.detail, table.rows.sizes, problem.value)
        if problem.kind != "unfit":
            raise_problem(problem, self._called(param), LOOKUP)
        order = batch.params, batch.exp_avgs, batch.exp_infs, batch.grads, batch.steps
        operands = dict(zip(OPERANDS, order, strict=False))
        operand = OPERANDS[problem.detail]
        given = described(operands[operand][problem.where]) if operand in operands else ""
        raise ValueError(
            f"{self._called(param)}: its {operand} must be strided, on the CPU, of a shape "
            f"and dtype that go with the parameter, and share no memory with the parameter "
            f"or its state, got {given}"
        )


def _gradient(gradient: Tensor, param: Tensor) -> Tensor:
    """A gradient that the verbs can read; the same one, if they can."""
    if gradient.is_complex() != param.is_complex():
        gradient = gradient.to(param.dtype)
    readable = gradient.dtype in FLOATS
    return _plain(gradient, gradient.dtype if readable else state_dtype(param.dtype))


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, or a copy on the CPU where verbs cannot read it or need another dtype."""
    if (
        type(tensor) in PLAIN_TENSORS
        and tensor.is_cpu
        and tensor.dtype is dtype
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        return tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
