"""``sparse="exact"`` for the tables of an optimizer: which rows are stale, and whose."""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from .._core import rule
from .._core.exact import Expansion
from .._core.kernels import Float64Array, Problem, kernels, problem_of
from .._core.rule import Hyperparameters, Scalar
from .._core.stale import StaleRows, TableLock, raise_problem, raise_stale
from . import _compat, cuda
from .batch import FLOATS, PLAIN_TENSORS, Batch, by_shape, check_state, described
from .cuda_exact import RowsOnDevice, TableOnDevice, WithState
from .device import triton_serves
from .native import LOOKUP
from .options import NAMES, Options, kind_of, state_dtype, stored_dtype
from .sparse import SparseRows, check_sparse_in_rows, frame_of_rows
from .state import is_compact

_INDICES = 5  # in OPERANDS of the verbs


class Table:
    """What is known of a parameter; nothing here keeps the parameter alive.

    Attributes:
        name: what the model calls it.
        parallel: refers weakly to the DistributedDataParallel that it is in.
        stale: its stale rows, from its first step on.
        on_device: the same where the stamps are on a device.
        kind: of the parameter in the last step.
        state: of the parameter in the last step.
        stochastic: whether a parameter of bfloat16 is rounded by random bits.
        renorms: whether a module may write to the parameter before it reads.
        version: of the parameter when it was last written to here, where anybody else who
            writes replaces it: in ``join()``, at whose end DistributedDataParallel does.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.parallel: Callable[[], Any] = _nothing
        self.stale: StaleRows | None = None
        self.on_device: RowsOnDevice | None = None
        self.kind: tuple[Any, ...] = ()
        self.state: dict[str, Any] = {}
        self.renorms = False
        self.stochastic = False
        self.version: int | None = None

    @property
    def may_be_stale(self) -> bool:
        return self.stale is not None and self.stale.may_be_stale


def _nothing() -> None:
    return None


def part_of_step(
    stale: StaleRows, flush: Callable[[], None], scalars: Float64Array, h: Hyperparameters
) -> tuple[Any, ...]:
    """What the verb ``step`` needs to know of the stale rows of a table."""
    size, decay = float(scalars[Scalar.STEP_SIZE]), float(scalars[Scalar.DECAY])
    recorded = stale.record(size, decay, h.beta_1, h.beta_2, h.epsilon, flush)
    return stale.part(recorded)


class Tables:
    """The parameters of an optimizer that have sparse gradients in exact mode.

    All methods are to be called with ``lock.held``, or take it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.lock = TableLock()
        # A model may outlive its optimizer, and an optimizer is to be freed without help.
        self._optimizer = weakref.ref(optimizer)
        self._tables: Any = WeakIdKeyDictionary()

    def add(self, param: Tensor, name: str, parallel: Any, renorms: bool) -> None:
        """What a model calls a parameter, and the DistributedDataParallel it is in."""
        table = self._tables.setdefault(param, Table())
        table.name = table.name or name
        table.renorms = table.renorms or renorms
        if parallel is not None:
            table.parallel = weakref.ref(parallel)

    def check_known(self, param: Tensor) -> None:
        """Raise unless ``param`` is one of the optimizer's."""
        if param not in self._tables and self._position(param) is None:
            raise ValueError(
                f"weight must be a parameter of this optimizer, got a "
                f"{type(param).__name__} of shape {tuple(param.shape)} that is not"
            )

    def forget(self) -> None:
        """Take all rows for current, as those of a checkpoint are."""
        for table in self._tables.values():
            table.stale = table.on_device = None

    def stale(self) -> Iterator[Tensor]:
        """The tables that may have stale rows."""
        for param, table in list(self._tables.items()):
            if table.may_be_stale:
                yield param

    def check_none_is_stale(self, what_for: str) -> None:
        for param in self.stale():
            raise RuntimeError(
                f"rows of {self.called(param)} are stale: call flush() before {what_for}"
            )

    def called(self, param: Tensor) -> str:
        """The name of a parameter for messages."""
        table = self._tables.get(param)
        if table is not None and table.name is not None:
            return f"parameter {table.name!r}"
        return self._position(param) or by_shape(param)

    def _position(self, param: Tensor) -> str | None:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        for number, group in enumerate(groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    if names := group.get("param_names"):
                        return f"parameter {names[position]!r}"
                    return f"parameter {position} of group {number}"
        return None

    # --- Reading -----------------------------------------------------------------------

    @_compat.disable_dynamo
    def catch_up(self, param: Tensor, ids: Tensor) -> None:
        """Catch up the rows that are read at ``ids``."""
        with self.lock.held:
            table = self._tables.get(param)
            if table is None or not table.may_be_stale:
                return
            tensors, name = self._with_state(param, table), self.called(param)
            if ids.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
            if table.on_device is not None:
                table.on_device.catch_up_ids(_on_device(tensors, table), ids)
            elif self._catch_up_rows(tensors, table.stale, ids, name):
                self._wrote(param, table)

    def _catch_up_rows(
        self, tensors: WithState, stale: StaleRows, ids: Tensor, name: str
    ) -> int:
        result = kernels().catch_up_rows(
            self._of_catching_up(tensors, stale),
            ids.detach().reshape(-1).cpu(),
            torch.get_num_threads(),
        )
        if (problem := problem_of(result)) is not None:
            self._raise(problem, stale, ids, name)
        return int(result)

    def _raise(self, problem: Problem, stale: StaleRows, ids: Tensor, name: str) -> None:
        if problem.kind == "index":
            raise IndexError(
                f"indices[{problem.detail}] must be in [0, {stale.rows}), got "
                f"{problem.value}"
            )
        if problem.kind == "unfit":
            if problem.detail == _INDICES:
                raise RuntimeError(
                    f"rows of {name} are stale, and the ids that are read cannot be seen "
                    f"here (under torch.vmap, for one), got {type(ids).__name__}: call "
                    f"flush() before, or remove() on what attach(model) has returned"
                )
            raise RuntimeError(f"{name} or its state cannot be written to")
        raise_problem(problem, name, LOOKUP)

    @_compat.disable_dynamo
    def flush(self, param: Tensor) -> None:
        """Catch up all rows."""
        with self.lock.held:
            table = self._tables.get(param)
            if table is None or not table.may_be_stale:
                return
            tensors, stale = self._with_state(param, table), table.stale

            def catch_up(start: int, stop: int) -> None:
                if table.on_device is not None:
                    rows = range(start, stop)
                    table.on_device.catch_up(_on_device(tensors, table), rows)
                    return
                result = kernels().catch_up_range(
                    self._of_catching_up(tensors, stale),
                    start,
                    stop,
                    torch.get_num_threads(),
                )
                if problem := problem_of(result):
                    raise_problem(problem, self.called(param), LOOKUP)

            try:
                stale.flush(catch_up, self.called(param))
                table.version = None
            finally:
                self._wrote(param, table)

    def _with_state(self, param: Tensor, table: Table) -> WithState:
        """A parameter with stale rows and its state, if they are what they were."""
        optimizer = self._optimizer()
        state = table.state if optimizer is None else optimizer.state.get(param)
        if state is not table.state or _kind(param) != table.kind:
            raise RuntimeError(
                f"{self.called(param)} or its state was moved, converted, resized or "
                f"replaced while rows of it were stale: call flush() before"
            )
        if table.version not in (None, _compat.version_of(param)):
            raise RuntimeError(
                f"rows of {self.called(param)} were stale at the end of join(), which "
                f"replaces parameters: call flush() at the end of the block"
            )
        return param, state["exp_avg"], state["exp_inf"]

    def _of_catching_up(self, tensors: WithState, stale: StaleRows) -> tuple[Any, ...]:
        """A table as the verbs that catch up rows take it."""
        table = self._tables[tensors[0]]
        frame = table.state.get("frame")
        if frame is not None:
            frame = frame_of_rows(frame, stale.rows)
        seed = float(table.state["step"]) if _is_rounded(table) else 0.0
        of_stale = stale.stamps, stale.history.arrays, stale.epsilon
        return *tensors, frame, *of_stale, seed, table.stochastic

    def _wrote(self, param: Tensor, table: Table) -> None:
        increment_version(param)
        if table.version is not None:
            table.version = _compat.version_of(param)

    def stepped(self) -> None:
        """Take note of what a step has written to."""
        for param, table in self._tables.items():
            if table.version is not None:
                table.version = _compat.version_of(param)

    # --- Steps -------------------------------------------------------------------------

    def check_dense(self, params: Iterable[Tensor]) -> None:
        """Raise if a parameter with a dense gradient has stale rows."""
        for param in params:
            table = self._tables.get(param)
            if table is not None and table.stale is not None:
                table.stale.check_all_current(self.called(param))

    def check_lazy(self, params: Iterable[Tensor]) -> None:
        """Raise if a parameter that is now lazy has stale rows."""
        if len(self._tables):
            for param in params:
                if param in self._tables and self._tables[param].may_be_stale:
                    raise RuntimeError(
                        f"rows of {self.called(param)} are stale: call flush() before its "
                        f"group leaves sparse='exact'"
                    )

    def prepare(self, one: Batch, options: Options) -> tuple[Table, Callable[[], None]]:
        """The table of a parameter with a sparse gradient, and what flushes it.

        Raises:
            RuntimeError: a parameter that the kernels cannot step, or that was replaced
                while rows were stale, or an epsilon that stale rows cannot be brought over.
            ValueError: betas that need too many terms, or a gradient that is sparse in more
                than the rows.
        """
        (param,), (grad,) = one.params, one.grads
        name = self.called(param)
        on_device = triton_serves([param])
        self._check_tensors(one, on_device, name)
        check_sparse_in_rows(param, grad, "sparse='exact'", self.called)
        table = self._tables.setdefault(param, Table())
        if on_device and table.parallel() is not None:
            raise RuntimeError(
                f"sparse='exact' under DistributedDataParallel needs tables on the CPU, "
                f"got {name} on {param.device}"
            )
        if table.may_be_stale:
            self._with_state(param, table)
        elif table.stale is None or table.kind != _kind(param):
            _start(param, table, options.hyperparameters, on_device)
        optimizer = self._optimizer()
        assert optimizer is not None
        table.state, table.stochastic = optimizer.state[param], options.stochastic
        h = options.hyperparameters
        decay = rule.decay_factor(options.rate, options.decay)
        table.stale.check_settings(h.beta_1, h.beta_2, h.epsilon, decay, name)
        return table, functools.partial(self.flush, param)

    def _check_tensors(self, one: Batch, on_device: bool, name: str) -> None:
        """Raise unless the kernels can step a table where it and its state lie."""
        (param,), _, (exp_avg,), (exp_inf,), _ = one.lists()
        check_state(param, exp_avg, exp_inf, self.called)
        plain = all(type(t) in PLAIN_TENSORS for t in (param, exp_avg, exp_inf))
        wanted = [
            stored_dtype(param.dtype, kind_of(exp_avg), of_state)
            for of_state in ("exp_avg", "exp_inf")
        ]
        fits = (
            cuda.in_place(one)
            if on_device
            else plain
            and param.dtype in FLOATS
            and param.is_cpu
            and exp_avg.is_cpu
            and exp_inf.is_cpu
            and [exp_avg.dtype, exp_inf.dtype] == wanted
        )
        if not fits:
            raise RuntimeError(
                f"sparse='exact' needs a table on the CPU or, with Triton installed, a "
                f"contiguous one on an NVIDIA GPU, and state of {wanted[0]} beside it, got "
                f"{name}, a {described(param)}"
            )

    def share(self, param: Tensor, rows: SparseRows, table: Table) -> None:
        """Catch up the rows of a gradient that another process has read.

        A row must have been current in one of the processes, and is then in all. Within
        ``join()`` some processes do not step any more, so that nobody can be asked.
        """
        parallel, stale = table.parallel(), table.stale
        if parallel is None or stale is None:
            return
        rows.check_in_range()
        distinct = torch.unique(rows.indices)
        now = np.uint32(stale.history.steps % 2**32)
        is_stale = stale.stamps[distinct.numpy()] != now
        if _compat.is_in_join(parallel):
            table.version = None if table.renorms else _compat.version_of(param)
        else:
            everywhere = torch.from_numpy(is_stale.astype(np.uint8))
            minimum = torch.distributed.ReduceOp.MIN
            torch.distributed.all_reduce(everywhere, minimum, group=parallel.process_group)
            if everywhere.any():
                row = int(distinct[everywhere.bool()][0])
                raise_stale(row, self.called(param), LOOKUP)
        if is_stale.any():
            tensors = self._with_state(param, table)
            self._catch_up_rows(tensors, stale, rows.flat(), self.called(param))
            self._wrote(param, table)


def _is_rounded(table: Table) -> bool:
    """Whether stale rows are rounded by random bits."""
    return table.stochastic or is_compact(table.state)


def _on_device(tensors: WithState, table: Table) -> TableOnDevice:
    """A table as the kernels that catch up rows take it."""
    state, step = table.state, 0.0
    if _is_rounded(table) and table.on_device is not None:
        step = table.on_device.count(state["step"])
    return TableOnDevice.of(tensors, state.get("frame"), step, 0, table.stochastic)


def _kind(param: Tensor) -> tuple[Any, ...]:
    return param.device, param.dtype, param.shape


def _start(param: Tensor, table: Table, h: Hyperparameters, on_device: bool) -> None:
    """Take all rows for current."""
    rows, length = len(param), math.prod(param.shape[1:]) * (1 + param.is_complex())
    if on_device:
        stamps: Any = torch.zeros(rows, dtype=torch.int32, device=param.device)
    else:
        stamps = np.zeros(rows, np.uint32)
    dtype = _arithmetic(param.dtype)
    table.stale = StaleRows(stamps, length, dtype, h.beta_1, h.beta_2, h.epsilon)
    table.on_device = RowsOnDevice(table.stale, param.dtype) if on_device else None
    table.kind, table.version = _kind(param), None


def _arithmetic(dtype: torch.dtype) -> str:
    return str(state_dtype(dtype).to_real()).removeprefix("torch.")


def check_betas(hyperparameters: Hyperparameters, params: Iterable[Tensor]) -> None:
    """Raise for betas that need too many terms for the dtype of one of ``params``."""
    for dtype in {_arithmetic(p.dtype) for p in params if p.dtype in FLOATS}:
        Expansion.of(hyperparameters.beta_1, hyperparameters.beta_2, dtype, NAMES)
