"""Adamax for PyTorch: dense and sparse gradients in one optimizer, with fused kernels."""

import functools
import math
import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from numbers import Real
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, TypeAlias

from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

import torch
from torch import Tensor

from ._kernels._memory import LARGE, zeros_beside
from ._rule import Hyperparameters
from ._torch_cuda import (
    KnownOnDevice,
    cuda_serves,
    is_on_device,
    prepare_cuda,
    prepare_rows,
    wants_cuda,
)
from ._torch_cuda_exact import DeferredRowsOnDevice, ExactRowsOnDevice
from ._torch_exact import Attachment, Tables, attach, check_betas, check_options
from ._torch_paths import (
    Batch,
    KnownTensors,
    Options,
    RowsLaunch,
    Scaling,
    Work,
    fused_dtypes,
    grouped,
    prepare_for_loop,
    prepare_foreach,
    prepare_fused,
    sparse_rows,
    square_sum,
    state_dtype,
)

__all__ = ["Adamax", "clip_grad_norm_", "clip_grad_value_"]

_NAMES = {
    "learning_rate": "lr",
    "beta_1": "betas[0]",
    "beta_2": "betas[1]",
    "epsilon": "eps",
}
_STATE = ("step", "exp_avg", "exp_inf")
# Of hundreds of parameters, by loops that are not in Python.
_GRAD = attrgetter("grad")


class Adamax(Optimizer):
    r"""Adamax (Adam with the infinity norm), a drop-in for :class:`torch.optim.Adamax`.

    For the gradient :math:`g` of a parameter :math:`\theta` at step
    :math:`t = 1, 2, \dots`:

    .. math::
        g &\leftarrow g + \lambda \theta \quad \text{(unless decoupled)} \\
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        \theta &\leftarrow (1 - \gamma \lambda) \theta \quad \text{(if decoupled)} \\
        \theta &\leftarrow \theta
            - \frac{\gamma}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    What differs from :class:`torch.optim.Adamax`: gradients may be sparse COO tensors;
    tensors on the CPU and on NVIDIA GPUs are updated in one pass over memory; the state of
    16-bit parameters is float32, without which :math:`u` could not decay; and
    :math:`\epsilon` is added in the denominator rather than to :math:`|g|`, which matters
    only for gradients as small as :math:`\epsilon`. Checkpoints go both ways.

    A sparse gradient touches the rows whose index is present: those of the parameter and of
    its state are read and written, at a cost that does not depend on the size of the table.
    Indices that repeat are summed first. The step count is the parameter's, not the row's.

    Args:
        params: parameters or named parameters, or dicts that define parameter groups.
        lr: learning rate, in [0, inf); a float or a tensor of one element.
        betas: the decay of :math:`m` and of :math:`u` per step, both in [0, 1).
        eps: added to :math:`u` in the denominator, at least the smallest normal float32.
        weight_decay: L2 penalty, or decoupled decay if ``decoupled_weight_decay``. With a
            sparse gradient it reaches the touched rows.
        foreach: True takes torch's operations on lists of tensors, False those on one
            tensor at a time.
        maximize: ascend rather than descend.
        differentiable: let autograd record the step.
        capturable: keep the step count on the device, for CUDA graphs; where the Triton
            kernels serve it is there anyway. Not for the CPU.
        fused: True takes compiled kernels (Numba's on the CPU, Triton's on an NVIDIA GPU)
            or raises, False never takes them.
        decoupled_weight_decay: multiply parameters by ``1 - lr * weight_decay`` instead of
            adding an L2 penalty to the gradient.
        sparse: what a sparse gradient means for the rows it does not touch. ``"lazy"``
            leaves them as they are. ``"exact"`` gives them a gradient of zero, as the dense
            rule does, at the cost of the touched rows, for tables on the CPU or an NVIDIA
            GPU: call :meth:`attach` with the model, and :meth:`flush` before anything else
            reads a whole table. It excludes ``foreach``, ``fused=False``,
            ``differentiable``,
            ``capturable`` and L2 penalties.

    If neither ``foreach`` nor ``fused`` is given, each parameter takes the fastest path
    that serves it: compiled kernels on the CPU and, where Triton is installed, on NVIDIA
    GPUs; torch's operations on lists elsewhere.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, NaN included, or a sparse parameter.
        RuntimeError: arguments that exclude each other.

    >>> import torch
    >>> from adamax.torch import Adamax
    >>> embedding = torch.nn.Embedding(1000, 8, sparse=True)
    >>> linear = torch.nn.Linear(8, 1)
    >>> optimizer = Adamax([*embedding.parameters(), *linear.parameters()], lr=0.01)
    >>> loss = linear(embedding(torch.tensor([7, 7, 4]))).square().sum()
    >>> loss.backward()
    >>> optimizer.step()
    >>> optimizer.state[embedding.weight]["exp_inf"].any(dim=1).nonzero().flatten()
    tensor([4, 7])

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1;
    arguments and state as :class:`torch.optim.Adamax` and :class:`torch.optim.Adam`.
    """

    # GradScaler leaves the scale and the verdict on infinities to step(), as for torch's
    # fused optimizers, so that gradients are not unscaled in a pass of their own.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        sparse: str = "lazy",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "sparse": sparse,
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        self._forget_tensors()
        self._tables = Tables(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, see :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: an option out of its range, or a parameter no step could write to.
        """
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for param in group["params"]:
                _check_parameter(param)
            if group["sparse"] == "exact":
                check_betas(_hyperparameters(group), group["params"], _NAMES)
        except ValueError:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # a copy does not know what rows have missed
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_tensors()
        if "_tables" not in self.__dict__:  # unpickled, not loaded
            self._tables = Tables(self)
        for group in self.param_groups:
            # What checkpoints of torch.optim.Adamax lack.
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
            group.setdefault("capturable", False)
            group.setdefault("fused", None)
            group.setdefault("decoupled_weight_decay", False)
            group.setdefault("sparse", self.defaults.get("sparse", "lazy"))
            for param in group["params"]:
                param_state = self.state.get(param)
                if param_state and not isinstance(param_state["step"], Tensor):
                    count = float(param_state["step"])
                    param_state["step"] = _new_step(param, group) + count

    def _forget_tensors(self) -> None:
        """Examine all tensors in the next step."""
        self._known: defaultdict[int, Known] = defaultdict(Known)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_infs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        # torch.compile runs this method, of this name, instead of tracing it.
        given = list(map(_GRAD, group["params"]))
        if NoneType in set(map(type, given)):
            pairs = zip(group["params"], given, strict=True)
            params += [param for param, grad in pairs if grad is not None]
            grads += [grad for grad in given if grad is not None]
        else:
            params += group["params"]
            grads += given
        states = self._states_of(params)
        if not all(states):
            for param, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = _new_step(param, group)
                    state["exp_avg"] = _new_state(param, "exp_avg")
                    state["exp_inf"] = _new_state(param, "exp_inf")
        exp_avgs += map(itemgetter("exp_avg"), states)
        exp_infs += map(itemgetter("exp_inf"), states)
        steps += map(itemgetter("step"), states)

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        # Usually the state is in the order of the parameters, which is quickly seen:
        # the hash of a tensor is a function in Python.
        if len(self.state) == len(params) and all(map(operator.is_, self.state, params)):
            return list(self.state.values())
        return list(map(self.state.__getitem__, params))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in ``.grad``; parameters without one stay.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            IndexError: an index of a sparse gradient is out of range.
            ValueError: a learning rate or other option out of range, or a gradient of a
                layout other than strided and COO.
            RuntimeError: ``fused``, ``capturable`` or ``sparse="exact"`` where a parameter
                does not allow it, or a gradient for a row that was not up to date.

            No parameter and no state has changed then. On an NVIDIA GPU nothing is read
            back, so an index out of range is found by the device, which stops with an
            assertion, and a learning rate that is a tensor there is taken as it is.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._eager_step()
        elif (
            self.defaults["differentiable"]
            or hasattr(self, "found_inf")
            or any(group["sparse"] == "exact" for group in self.param_groups)
        ):
            self._step_outside_graphs()
        else:
            self._compiled_step()
        return loss

    def _eager_step(self) -> None:
        scaling = Scaling(
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        if scaling.found_inf is not None and not self._is_on_cuda() and scaling.skips:
            return
        work: list[Work] = []
        had_state = len(self.state)
        try:
            for position, group in enumerate(self.param_groups):
                batch = Batch([], [], [], [], [])
                self._init_group(group, *batch.lists())
                if batch.params:
                    known = self._known[position]
                    work += _prepare(batch, group, scaling, known, self._tables)
        except BaseException:
            for param in list(self.state)[had_state:]:
                del self.state[param]
            raise
        for part in work:
            part()

    def _is_on_cuda(self) -> bool:
        """Whether kernels on the device will look themselves whether to skip the step."""
        return all(
            wants_cuda(group)
            and cuda_serves(group["params"])
            and group["sparse"] == "lazy"  # else the host takes note of steps
            for group in self.param_groups
        )

    # What the operator cannot do: let autograd record the step, skip it, sparse gradients.
    _step_outside_graphs = _disable_dynamo(_eager_step)

    def _compiled_step(self) -> None:
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_infs: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, params, grads, exp_avgs, exp_infs, steps)
            if params:
                lr = group["lr"]
                torch.ops.adamax.step_(
                    params,
                    grads,
                    exp_avgs,
                    exp_infs,
                    steps,
                    lr if isinstance(lr, Tensor) else None,
                    math.nan if isinstance(lr, Tensor) else lr,
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    group["decoupled_weight_decay"],
                    group["maximize"],
                )

    # --- Rows that are behind, with sparse="exact" ----------------------------------------

    def attach(self, model: torch.nn.Module) -> Attachment:
        """Have the embeddings of ``model`` bring rows up to date before they read them.

        With ``sparse="exact"`` a row that is not touched is left behind, and moves only
        when it is needed. This finds the :class:`torch.nn.Embedding` and
        :class:`torch.nn.EmbeddingBag` modules with ``sparse=True`` whose weight is in this
        optimizer, and those that share such a weight. They then bring the rows of each
        batch up to date, in training and in evaluation, and whole tables before
        ``model.state_dict()``, ``model.load_state_dict()``, ``copy.deepcopy(model)`` and
        ``torch.save(model)``. What reads a weight in other ways needs :meth:`lookup` or
        :meth:`flush`. Copies of the model are not attached.

        Args:
            model: attach the outermost module, :class:`DistributedDataParallel` included,
                since its processes have gradients for rows that others have read.

        Returns:
            A handle with ``remove()``, and with the ``names`` of the weights.

        Raises:
            ValueError: there is no such module.

        >>> import torch
        >>> model = torch.nn.EmbeddingBag(1000, 8, sparse=True)
        >>> optimizer = Adamax(model.parameters(), lr=0.01, sparse="exact")
        >>> optimizer.attach(model)
        Attachment(weight)
        >>> for ids in ([[1, 2]], [[3, 2]], [[1, 3]]):
        ...     optimizer.zero_grad()
        ...     model(torch.tensor(ids)).square().sum().backward()
        ...     optimizer.step()
        """
        exact = (
            param
            for group in self.param_groups
            if group["sparse"] == "exact"
            for param in group["params"]
        )
        return attach(self._tables, model, exact)

    def catch_up(self, weight: Tensor, ids: Tensor) -> None:
        """Bring the rows ``ids`` of ``weight`` up to date, for functions that read them.

        Args:
            weight: a parameter of this optimizer.
            ids: integers of any shape.

        Raises:
            IndexError: an id outside the table.
            RuntimeError: ``weight`` was moved or converted while rows were behind.
            ValueError: ``weight`` is not a parameter of this optimizer.
        """
        self._tables.check_known(weight)
        self._tables.catch_up(weight, ids)

    def lookup(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The rows ``weight[ids]``, up to date, with a sparse gradient.

        :func:`torch.nn.functional.embedding` after :meth:`catch_up`.

        Args:
            weight: a parameter of this optimizer.
            ids: integers of any shape.

        Returns:
            A tensor of the shape ``(*ids.shape, *weight.shape[1:])``.

        Raises:
            IndexError: an id outside the table.
            RuntimeError: ``weight`` was moved or converted while rows were behind.
            ValueError: ``weight`` is not a parameter of this optimizer.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1000, 2))
        >>> optimizer = Adamax([weight], lr=0.1, sparse="exact")
        >>> for id in (7, 3, 7):
        ...     optimizer.zero_grad()
        ...     (optimizer.lookup(weight, torch.tensor([id])) - 1).square().sum().backward()
        ...     optimizer.step()
        >>> weight[3].detach()  # without what it has missed in the last step
        tensor([0.0526, 0.0526])
        >>> optimizer.lookup(weight, torch.tensor(3)).detach()
        tensor([0.0859, 0.0859])
        """
        self.catch_up(weight, ids)
        return torch.nn.functional.embedding(ids, weight, sparse=True)

    def flush(self, weight: Tensor | None = None) -> None:
        """Bring all rows of a table, or of all tables, up to date, where they are behind.

        To be called before anything reads a whole table that :meth:`attach` does not see.
        :meth:`state_dict` calls it. It takes a pass over the table and its state, and shows
        a progress bar when that is long and tqdm is installed.

        Args:
            weight: a parameter, or None for all.

        Raises:
            RuntimeError: ``weight`` was moved or converted while rows were behind.
            ValueError: ``weight`` is not a parameter of this optimizer.
        """
        if weight is not None:
            self._tables.check_known(weight)
        for param in list(self._tables.behind()) if weight is None else [weight]:
            self._tables.flush(param)

    # --- Checkpoints ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`torch.optim.Optimizer.state_dict`.

        With ``sparse="exact"`` all rows are brought up to date first, the parameters' too,
        so that it is the checkpoint of a dense optimizer: save a model that is not attached
        after this, not before.
        """
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of :class:`torch.optim.Adamax`.

        The state of 16-bit parameters is cast to float32, not to their dtype.

        Raises:
            ValueError: groups, state or shapes that do not fit. Nothing has changed then.
            RuntimeError: with ``sparse="exact"``, rows that are behind: what they have
                missed belongs to the state that would be replaced.
        """
        self._tables.check_none_is_behind("you load weights and state")
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            # Runs last of the hooks before loading, so sees what will be loaded.
            loaded.update(state_dict)
            for group in state_dict["param_groups"]:
                _check_group(group)
            for param, state in _pairs_of(self, state_dict):
                _check_state(param, state)

        def restore(_: Optimizer) -> None:
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            for param, given in _pairs_of(self, loaded):
                state = self.state[param]
                for name in ("exp_avg", "exp_inf"):
                    # On the device and in the memory order of the parameter.
                    state[name] = _new_state(param, name).copy_(given[name])
                # Else it is the checkpoint's, or where that optimizer counted.
                device = counts_on(param, group_of[param])
                state["step"] = state["step"].to(device, copy=True)
            self._tables.forget()

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def _check_options(options: Mapping[str, Any]) -> None:
    _hyperparameters(options)
    if options["fused"] and options["foreach"]:
        raise RuntimeError("fused and foreach cannot both be True")
    if options["differentiable"] and (options["fused"] or options["foreach"]):
        raise RuntimeError("differentiable excludes fused and foreach")
    if options["sparse"] == "exact":
        check_options(options)


def _hyperparameters(options: Mapping[str, Any], reads_lr: bool = True) -> Hyperparameters:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must have one element, got the shape {tuple(lr.shape)}")
        # Not to be read while a graph is captured, or by a step that waits for nothing.
        captured = options["capturable"] and not lr.is_cpu
        unread = captured or (not reads_lr and is_on_device(lr))
        lr = 0.0 if unread and not lr.is_complex() else lr.item()
    elif callable(lr):
        raise TypeError(f"lr must be a real number, got {lr!r}")
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    # The cache must not see a tensor: it would not notice that its value changes.
    beta_1, beta_2 = (b.item() if isinstance(b, Tensor) else b for b in betas)
    eps, weight_decay, sparse = (options[k] for k in ("eps", "weight_decay", "sparse"))
    try:
        return _validated(lr, beta_1, beta_2, eps, weight_decay, sparse)
    except TypeError:  # perhaps only because something cannot be hashed
        return _validated.__wrapped__(lr, beta_1, beta_2, eps, weight_decay, sparse)


@functools.lru_cache(maxsize=256, typed=True)
def _validated(
    lr: float, beta_1: float, beta_2: float, eps: float, weight_decay: float, sparse: str
) -> Hyperparameters:
    return Hyperparameters(
        learning_rate=lr,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=eps,
        weight_decay=weight_decay,
        sparse=sparse,
        names=_NAMES,
    )


class Known:
    """What is known of the tensors of a group from its last step."""

    def __init__(self) -> None:
        self.on_cpu = KnownTensors()
        self.on_cuda = KnownOnDevice()


def _prepare(
    batch: Batch,
    group: Mapping[str, Any],
    scaling: Scaling,
    known: Known,
    tables: Tables | None = None,
) -> list[Work]:
    """All that can fail in the step of a group; returns what remains to be done."""
    on_cuda = wants_cuda(group) and cuda_serves(batch.params)
    options = Options(
        hyperparameters=_hyperparameters(
            group, reads_lr=not on_cuda or group["sparse"] == "exact"
        ),
        lr=group["lr"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
    )
    work: list[Work] = []
    if group["sparse"] == "exact" and tables is not None:
        check_options(group)
        batch, sparse = batch.by_layout()
        tables.check_dense(batch.params)
        work += [_exact_launch(one, options, scaling, tables) for one in sparse.singles()]
        if not batch.params:
            return work
    elif tables is not None:
        tables.check_lazy(batch.params)
    if on_cuda:
        return work + prepare_cuda(_local(batch), options, scaling, known.on_cuda)
    return work + _prepare_group(batch, group, options, scaling, known)


def _exact_launch(batch: Batch, options: Options, scaling: Scaling, tables: Tables) -> Work:
    (param,), (grad,) = batch.params, batch.grads
    deferred = tables.prepare(batch, options.hyperparameters)
    flush = functools.partial(tables.flush, param)
    if isinstance(deferred, DeferredRowsOnDevice):
        launch = prepare_rows(batch, options, scaling)
        return ExactRowsOnDevice.prepare(launch, deferred, flush)
    rows = sparse_rows(param, grad)
    groups = grouped(rows)
    tables.check_rows(param, rows, groups, deferred)
    return RowsLaunch(batch, options, scaling.number, rows, groups, deferred, flush)


def _prepare_group(
    batch: Batch,
    group: Mapping[str, Any],
    options: Options,
    scaling: Scaling,
    known: Known,
) -> list[Work]:
    batch = _local(batch)
    recorded = options.differentiable and torch.is_grad_enabled()
    if recorded and any(p.is_leaf and p.requires_grad for p in batch.params):
        raise RuntimeError(
            "differentiable=True needs parameters that are computed from others, got a "
            "leaf that requires a gradient"
        )
    scale = scaling.number
    fused, foreach = group["fused"], group["foreach"]
    if options.differentiable or fused is False or (foreach is False and not fused):
        return prepare_for_loop(batch, options, scale)
    if foreach:
        return prepare_foreach(batch, options, scale)
    if not options.capturable and (launch := known.on_cpu.launch(batch, options, scale)):
        return [launch]
    if dtypes := fused_dtypes(batch.params):
        if options.capturable:
            raise RuntimeError("capturable=True needs parameters on an accelerator")
        return prepare_fused(batch, options, scale, dtypes, known.on_cpu)
    ways = list(map(_way, batch.params))
    if fused and None in ways:
        unfit = batch.params[ways.index(None)]
        raise RuntimeError(
            f"fused=True needs float or complex parameters on the CPU or, with Triton "
            f"installed, on an NVIDIA GPU, got {type(unfit).__name__} of {unfit.dtype} on "
            f"{unfit.device}"
        )
    work: list[Work] = []
    devices = _get_foreach_kernels_supported_devices()
    for part, way in zip(batch.split(ways), dict.fromkeys(ways), strict=True):
        if way == "cpu":
            part_dtypes = fused_dtypes(part.params) or set()
            work += prepare_fused(part, options, scale, part_dtypes, known.on_cpu)
        elif way == "cuda":
            work += prepare_cuda(part, options, scaling, known.on_cuda)
        elif all(param.device.type in devices for param in part.params):
            work += prepare_foreach(part, options, scale)
        else:
            work += prepare_for_loop(part, options, scale)
    return work


def _way(param: Tensor) -> str | None:
    """Which compiled kernels serve a parameter."""
    if cuda_serves([param]):
        return "cuda"
    return "cpu" if fused_dtypes([param]) else None


def _local(batch: Batch) -> Batch:
    """This process' part of DTensors, which the rule can be applied to by itself."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is None or distributed.DTensor not in set(map(type, batch.params)):
        return batch
    placements = [getattr(param, "placements", None) for param in batch.params]

    def part(tensor: Any, placements: Any) -> Tensor:
        if isinstance(tensor, distributed.DTensor):
            if tensor.placements != placements:
                tensor = tensor.redistribute(placements=placements)
            tensor = tensor.to_local()
        local: Tensor = tensor
        return local

    columns = [
        [part(tensor, place) for tensor, place in zip(column, placements, strict=True)]
        for column in batch.lists()[:4]
    ]
    params, grads, exp_avgs, exp_infs = columns
    return Batch(params, grads, exp_avgs, exp_infs, batch.steps)


def _new_state(param: Tensor, name: str) -> Tensor:
    dtype = state_dtype(param.dtype)
    if fused_dtypes([param]) is None or param.nbytes < LARGE:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    layout = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    zeros = zeros_beside(
        param.data_ptr(),
        _STATE.index(name),
        (param.numel(),),
        str(dtype).removeprefix("torch."),
        "C",
    )
    return torch.from_numpy(zeros).as_strided(layout.shape, layout.stride())


def _new_step(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    dtype = _get_scalar_dtype()  # type: ignore[no-untyped-call]
    return torch.zeros((), dtype=dtype, device=counts_on(param, options))


def counts_on(param: Tensor, options: Mapping[str, Any]) -> torch.device:
    """Where the steps of a parameter are counted."""
    on_device = options["capturable"] or (wants_cuda(options) and cuda_serves([param]))
    return param.device if on_device else torch.device("cpu")


def _pairs_of(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> Iterable[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters and what a checkpoint has for them, as torch pairs them."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    state = state_dict["state"]
    return [(p, state[i]) for i, p in zip(saved, params, strict=False) if i in state]


def _check_parameter(param: Tensor) -> None:
    if torch.nn.parameter.is_lazy(param):
        return
    if param.layout is not torch.strided:
        raise ValueError("parameters must be strided tensors, got a sparse one")
    if param.is_conj() or param.is_neg():
        raise ValueError("parameters must not be conjugate views, got one; clone it")
    strides = param.stride() if param.numel() else ()
    if any(stride == 0 and param.shape[i] > 1 for i, stride in enumerate(strides)):
        raise ValueError("parameters must not be expanded tensors, got one; clone it")


def _check_group(group: Mapping[str, Any]) -> None:
    needed = ("lr", "betas", "eps", "weight_decay")
    if any(name not in group for name in needed):
        raise ValueError(
            f"a parameter group must have {', '.join(needed)}, got {', '.join(group)}"
        )


def _check_state(param: Tensor, state: Mapping[str, Any]) -> None:
    missing = [name for name in _STATE if name not in state]
    if missing:
        raise ValueError(
            f"the state of a parameter must have {', '.join(_STATE)}, "
            f"got {', '.join(map(str, state)) or 'nothing'}"
        )
    for name in ("exp_avg", "exp_inf"):
        value = state[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {value!r}")
        if value.shape != param.shape or value.is_complex() != param.is_complex():
            raise ValueError(
                f"{name} must be like its parameter, of {param.dtype} and shape "
                f"{tuple(param.shape)}, got {value.dtype} and {tuple(value.shape)}"
            )
    step = state["step"]
    if not (step.numel() == 1 if isinstance(step, Tensor) else isinstance(step, Real)):
        raise ValueError(f"step must be a number, got {step!r}")


# --- torch.compile ---------------------------------------------------------------------


@torch.library.custom_op(
    "adamax::step_", mutates_args=("params", "exp_avgs", "exp_infs", "steps")
)
def _step_operator(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_infs: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """One step of a group, opaque to the compiler; ``lr`` unless there is a tensor."""
    group = {
        "lr": lr if lr_tensor is None else lr_tensor,
        "betas": (beta_1, beta_2),
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "maximize": maximize,
        "capturable": not steps[0].is_cpu,
        "differentiable": False,
        "fused": None,
        "foreach": None,
        "sparse": "lazy",
    }
    batch = Batch(params, grads, exp_avgs, exp_infs, steps)
    for work in _prepare(batch, group, Scaling(), Known()):
        work()


@_step_operator.register_fake
def _(*args: Any) -> None:
    return None


# --- Clipping --------------------------------------------------------------------------

_ParametersT: TypeAlias = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: _ParametersT,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients, sparse ones too, so that their joint norm is at most ``max_norm``.

    As :func:`torch.nn.utils.clip_grad_norm_`, which refuses sparse gradients. Values of a
    sparse gradient whose index repeats are summed before the norm is taken.

    Args:
        parameters: one tensor or several; their ``.grad`` is scaled in place.
        max_norm: what the norm may be at most.
        norm_type: the p of the p-norm, ``inf`` for the largest element.
        error_if_nonfinite: raise if the norm is NaN or infinite.
        foreach: as in torch, for the dense gradients.

    Returns:
        The norm before clipping, of all gradients as one vector.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    >>> import torch
    >>> table = torch.nn.Embedding(10, 1, sparse=True)
    >>> (table(torch.tensor([3, 3])) * torch.tensor([[3.0], [1.0]])).sum().backward()
    >>> clip_grad_norm_(table.parameters(), max_norm=1.0)
    tensor(4.)
    >>> table.weight.grad.to_dense()[3]
    tensor([1.0000])
    """
    dense, sparse = _dense_and_sparse(parameters)
    norms = [_sparse_norm(param, float(norm_type)) for param in sparse]
    grads = [param.grad for param in dense if param.grad is not None]
    # The norm of norms is the norm of all.
    total = torch.nn.utils.get_total_norm(
        [*grads, *norms], norm_type, error_if_nonfinite, foreach
    )
    torch.nn.utils.clip_grads_with_norm_(dense, max_norm, total, foreach)
    if sparse:
        scale = torch.clamp(float(max_norm) / (_whole(total) + 1e-6), max=1.0)
        for param in sparse:
            values = _values(param)
            values.mul_(scale.to(values.device))
    return total


@torch.no_grad()
def clip_grad_value_(
    parameters: _ParametersT, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp gradients, sparse ones too, to ``[-clip_value, clip_value]``.

    As :func:`torch.nn.utils.clip_grad_value_`, which refuses sparse gradients. Values of a
    sparse gradient whose index repeats are summed first, which replaces ``.grad`` by a
    coalesced tensor.

    Args:
        parameters: one tensor or several.
        clip_value: what the absolute value of an element may be at most.
        foreach: as in torch, for the dense gradients.

    >>> import torch
    >>> table = torch.nn.Embedding(10, 1, sparse=True)
    >>> (table(torch.tensor([3, 3])) * torch.tensor([[3.0], [-2.0]])).sum().backward()
    >>> clip_grad_value_(table.parameters(), 0.5)
    >>> table.weight.grad.to_dense()[3]
    tensor([0.5000])
    """
    dense, sparse = _dense_and_sparse(parameters)
    if dense:
        torch.nn.utils.clip_grad_value_(dense, clip_value, foreach)
    for param in sparse:
        assert param.grad is not None
        param.grad = param.grad.coalesce()
        _values(param).clamp_(-float(clip_value), float(clip_value))


def _dense_and_sparse(parameters: _ParametersT) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    with_grad = [param for param in parameters if param.grad is not None]
    sparse = [p for p in with_grad if p.grad is not None and p.grad.is_sparse]
    dense = [p for p in with_grad if p.grad is not None and not p.grad.is_sparse]
    return dense, sparse


def _whole(tensor: Any) -> Tensor:
    """All of a DTensor; another tensor as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _values(param: Tensor) -> Tensor:
    assert param.grad is not None
    values: Tensor = param.grad._values()
    return values


def _sparse_norm(param: Tensor, norm_type: float) -> Tensor:
    """The norm of the summed gradient, as a tensor of its dtype."""
    grad = param.grad
    assert grad is not None
    if norm_type != 2.0 or fused_dtypes([param]) is None:
        values = grad.coalesce()._values()
        if not values.numel():  # has no largest element, for the norm of order inf
            return values.new_zeros((), dtype=values.dtype.to_real())
        norm: Tensor = torch.linalg.vector_norm(values, norm_type)
        return norm
    rows = sparse_rows(param, grad)
    return torch.tensor(math.sqrt(square_sum(param, rows)), dtype=param.dtype.to_real())
