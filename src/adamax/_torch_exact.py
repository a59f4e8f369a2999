"""``sparse="exact"`` for PyTorch: tables with rows that are behind, and who reads them."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

import torch
from torch import Tensor, nn

from ._deferred import DeferredRows
from ._exact import Expansion
from ._kernels import Storage, kernels
from ._rule import Hyperparameters
from ._torch_cuda import cuda_serves
from ._torch_cuda_exact import DeferredRowsOnDevice
from ._torch_paths import STORAGE, Batch, SparseRows, fused_dtypes, in_place

_LOOKUP = "attach(model) with the outermost module, or lookup(weight, ids)"
_FLUSH = "flush()"


def check_options(options: Mapping[str, Any]) -> None:
    """Raise for options of a group that exact updates exclude.

    Raises:
        RuntimeError: they would take other paths than the compiled kernels.
        ValueError: L2 regularisation, under which no row has a gradient of zero.
    """
    if options["foreach"] or options["fused"] is False:
        raise RuntimeError(
            f"sparse='exact' needs the compiled kernels, got foreach={options['foreach']} "
            f"and fused={options['fused']}"
        )
    for name in ("differentiable", "capturable"):
        if options[name]:
            raise RuntimeError(f"sparse='exact' excludes {name}=True")
    if options["weight_decay"] and not options["decoupled_weight_decay"]:
        raise ValueError(
            f"sparse='exact' needs decoupled_weight_decay=True for weight_decay="
            f"{options['weight_decay']!r}: an L2 penalty gives every row of a table a "
            f"gradient in every step"
        )


class Tables:
    """The parameters of an optimizer that have had sparse gradients in exact mode."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._deferred: dict[Tensor, DeferredRows] = {}
        self._names: dict[Tensor, str] = {}
        self._groups: dict[Tensor, Any] = {}  # of processes

    def name(self, param: Tensor, name: str) -> None:
        """What to call a parameter in error messages."""
        self._names[param] = name

    def share(self, param: Tensor, process_group: Any) -> None:
        """Gradients of ``param`` are for rows that any of these processes has read."""
        self._groups[param] = process_group

    def check_known(self, param: Tensor) -> None:
        """Raise unless ``param`` is one of the optimizer's."""
        if param not in self._deferred:
            groups = self._optimizer.param_groups
            if not any(param is other for group in groups for other in group["params"]):
                raise ValueError(
                    f"weight must be a parameter of this optimizer, got a "
                    f"{type(param).__name__} of shape {tuple(param.shape)} that is not"
                )

    def forget(self) -> None:
        """Take all rows for up to date, as those of a checkpoint are."""
        self._deferred.clear()

    def behind(self) -> Iterator[Tensor]:
        """The tables that may have rows that are behind."""
        for param, deferred in self._deferred.items():
            if deferred.may_be_behind:
                yield param

    def check_none_is_behind(self, what_for: str) -> None:
        for param in self.behind():
            raise RuntimeError(
                f"rows of {self._called(param)} are behind: call {_FLUSH} before {what_for}"
            )

    # --- Reading -----------------------------------------------------------------------

    @_disable_dynamo
    def catch_up(self, param: Tensor, ids: Tensor) -> None:
        """Bring the rows that are read at ``ids`` up to date."""
        deferred = self._deferred.get(param)
        if deferred is None or not deferred.may_be_behind:
            return
        tables = self._with_state(param, deferred)
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        if isinstance(deferred, DeferredRowsOnDevice):
            deferred.bring_ids_up_to_date(tables, ids)
            return
        flat = ids.detach().reshape(-1).cpu().numpy()
        groups = kernels().group_rows(flat, deferred.rows)
        if deferred.catch_up(groups, _addresses(tables), 0, torch.get_num_threads()):
            increment_version(param)

    @_disable_dynamo
    def flush(self, param: Tensor) -> None:
        """Bring all rows up to date."""
        deferred = self._deferred.get(param)
        if deferred is None or not deferred.may_be_behind:
            return
        tables = self._with_state(param, deferred)
        threads = torch.get_num_threads()

        def catch_up(start: int, stop: int) -> None:
            if isinstance(deferred, DeferredRowsOnDevice):
                deferred.bring_up_to_date(tables, None, range(start, stop))
            else:
                deferred.catch_up_range(start, stop, _addresses(tables), threads)

        try:
            deferred.flush(catch_up, self._called(param))
        finally:
            increment_version(param)

    def _with_state(
        self, param: Tensor, deferred: DeferredRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A parameter and its state, if they are still where and what they were."""
        state = self._optimizer.state[param]
        exp_avg, exp_inf = state["exp_avg"], state["exp_inf"]
        cpu = torch.device("cpu")
        on = deferred.device if isinstance(deferred, DeferredRowsOnDevice) else cpu
        same = (
            param.device == on
            and STORAGE.get(param.dtype) is deferred.storage
            and len(param) == deferred.rows
            and in_place(param, exp_avg, exp_inf)
        )
        if not same:
            raise RuntimeError(
                f"{self._called(param)} has been moved or converted while rows of it were "
                f"behind: call {_FLUSH} before"
            )
        return param, exp_avg, exp_inf

    # --- Steps -------------------------------------------------------------------------

    def check_dense(self, params: Iterable[Tensor]) -> None:
        """Raise if a parameter with a dense gradient has rows that are behind."""
        for param in params:
            deferred = self._deferred.get(param)
            if deferred is not None:
                deferred.check_all_current(self._called(param), _FLUSH)

    def check_lazy(self, params: Iterable[Tensor]) -> None:
        """Raise if a parameter that is now lazy has rows that are behind."""
        for param in params:
            deferred = self._deferred.get(param)
            if deferred is not None and deferred.may_be_behind:
                raise RuntimeError(
                    f"rows of {self._called(param)} are behind: call {_FLUSH} before its "
                    f"group leaves sparse='exact'"
                )

    def prepare(self, batch: Batch, hyperparameters: Hyperparameters) -> DeferredRows:
        """What knows which rows of a parameter with a sparse gradient are behind.

        Raises:
            RuntimeError: a parameter that is not for the CPU kernels, or betas or an
                epsilon that rows which are behind cannot be brought over.
            ValueError: betas that need too many terms, or a gradient that is sparse in more
                than the rows.
        """
        (param,), (grad,), (exp_avg,), (exp_inf,), _ = batch.lists()
        on_device = cuda_serves([param])
        serves = on_device or fused_dtypes([param]) is not None
        if not (serves and in_place(param, exp_avg, exp_inf)):
            raise RuntimeError(
                f"sparse='exact' needs a contiguous table on the CPU or, with Triton "
                f"installed, on an NVIDIA GPU, got {self._called(param)} on {param.device}"
            )
        if on_device and param in self._groups:
            raise RuntimeError(
                f"sparse='exact' under DistributedDataParallel needs tables on the CPU, "
                f"got {self._called(param)} on {param.device}"
            )
        if grad.sparse_dim() != 1:
            raise ValueError(
                f"sparse='exact' needs gradients that are sparse in the rows alone, got "
                f"one of {self._called(param)} with {grad.sparse_dim()} sparse dimensions"
            )
        h = hyperparameters
        settings = h.beta_1, h.beta_2, h.epsilon
        deferred = self._deferred.get(param)
        if deferred is None:
            length = math.prod(param.shape[1:]) * (2 if param.is_complex() else 1)
            size = STORAGE[param.dtype], len(param), length
            if on_device:
                deferred = DeferredRowsOnDevice(*size, *settings, param.device)
            else:
                deferred = DeferredRows(*size, *settings)
            self._deferred[param] = deferred
        deferred.check_settings(*settings, self._called(param), _FLUSH)
        return deferred

    def check_rows(
        self, param: Tensor, rows: SparseRows, groups: Any, deferred: DeferredRows
    ) -> None:
        """Raise if a row with a gradient was behind when it was read."""
        if param in self._groups:
            self._check_shared_rows(param, rows, groups, deferred)
        else:
            deferred.check_current(groups, self._called(param), _LOOKUP, _FLUSH)

    def _check_shared_rows(
        self, param: Tensor, rows: SparseRows, groups: Any, deferred: DeferredRows
    ) -> None:
        """A row must have been up to date in one of the processes, and is then in all."""
        import torch.distributed as dist

        distinct = torch.unique(rows.indices)
        behind = deferred.are_behind(distinct.numpy())
        everywhere = torch.from_numpy(behind.astype("uint8"))
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=self._groups[param])
        if everywhere.any():
            row = int(distinct[everywhere.bool()][0])
            deferred.refuse(row, self._called(param), _LOOKUP, _FLUSH)
        if behind.any():
            addresses = _addresses(self._with_state(param, deferred))
            deferred.catch_up(groups, addresses, 0, torch.get_num_threads())
            increment_version(param)

    def _called(self, param: Tensor) -> str:
        if param in self._names:
            return f"parameter {self._names[param]!r}"
        for number, group in enumerate(self._optimizer.param_groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    name = names[position] if names else f"{position} of group {number}"
                    return f"parameter {name!r}" if names else f"parameter {name}"
        return f"a parameter of shape {tuple(param.shape)}"


def _addresses(tables: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    w, m, u = tables
    return w.data_ptr(), m.data_ptr(), u.data_ptr()


# --- Modules ---------------------------------------------------------------------------


class Attachment:
    """What :meth:`Adamax.attach` returns: tells the modules, and lets go of them.

    As a context manager, it lets go of them at the end of the block.
    """

    def __init__(self, names: tuple[str, ...], remove: Callable[[], None]) -> None:
        self.names = names
        self._remove = remove

    def remove(self) -> None:
        """Bring the tables up to date, and take the hooks off the modules again."""
        self._remove()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({', '.join(self.names)})"


def attach(tables: Tables, model: nn.Module, exact: Iterable[Tensor]) -> Attachment:
    """Put hooks on the modules of ``model`` that read one of the ``exact`` parameters."""
    found = [
        (f"{name}.weight".lstrip("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    exact = set(exact)
    sparse = {module.weight for _, module in found if module.sparse} & exact
    if not sparse:
        raise ValueError(
            f"the model must have an nn.Embedding or nn.EmbeddingBag with sparse=True "
            f"whose weight is in a group of this optimizer with sparse='exact'; of "
            f"{len(found)} such modules none has"
        )
    process_groups = _process_groups(model)
    handles: list[Any] = []
    attached: dict[Tensor, str] = {}  # with the first of its names
    names: list[str] = []
    for name, module in found:
        weight = module.weight
        if weight not in sparse:
            continue
        hook = _Reader(tables, weight)
        handles += [
            module.register_forward_pre_hook(hook.before_forward, with_kwargs=True),
            module.register_state_dict_pre_hook(hook.flush),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(hook.flush),  # type: ignore[no-untyped-call]
        ]
        names.append(name)
        tables.name(weight, attached.setdefault(weight, name))
        if weight in process_groups:
            tables.share(weight, process_groups[weight])

    def remove() -> None:
        for weight in attached:
            tables.flush(weight)
        for handle in handles:
            handle.remove()

    return Attachment(tuple(names), remove)


def _process_groups(model: nn.Module) -> dict[Tensor, Any]:
    """The parameters whose gradients DistributedDataParallel sums over processes."""
    if "torch.distributed" not in sys.modules or not torch.distributed.is_available():
        return {}
    parallel = torch.nn.parallel.DistributedDataParallel
    return {
        param: module.process_group
        for module in model.modules()
        if isinstance(module, parallel)
        for param in module.parameters()
    }


class _Reader:
    """The hooks of one module.

    A copy of the module is not attached, as no optimizer knows its weight. Its weight was
    copied before this, so this brings it up to date.
    """

    def __init__(self, tables: Tables | None, weight: Tensor | None) -> None:
        self._tables = tables
        self._weight = weight

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._tables is not None:
            # What the module reads, which may have been replaced for this call.
            ids = args[0] if args else kwargs["input"]
            self._tables.catch_up(module.weight, ids)  # type: ignore[arg-type]

    def flush(self, module: nn.Module, *_: Any) -> None:
        if self._tables is not None:
            self._tables.flush(module.weight)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Reader":
        if self._tables is not None and self._weight is not None:
            self._tables.flush(self._weight)
            copy = memo.get(id(self._weight))
            if copy is not None:
                with torch.no_grad():
                    copy.copy_(self._weight)
        return _Reader(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._tables is not None and self._weight is not None:
            self._tables.flush(self._weight)  # torch.save() writes tensors in the end
        return _Reader, (None, None)


def check_betas(
    hyperparameters: Hyperparameters, params: Iterable[Tensor], names: Any
) -> None:
    """Raise for betas that need too many terms for the dtype of one of ``params``."""
    for storage in {STORAGE[p.dtype] for p in params if p.dtype in STORAGE}:
        dtype = "float64" if storage is Storage.FLOAT64 else "float32"
        Expansion.of(hyperparameters.beta_1, hyperparameters.beta_2, dtype, names)
