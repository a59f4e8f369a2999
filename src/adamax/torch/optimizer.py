"""The class :class:`adamax.torch.Adamax`: state, and the protocol of torch's optimizers."""

import operator
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .._core.compact import check_saved_dtype
from . import _compat
from .attach import Attachment, attach
from .batch import Batch, Scaling
from .compile import compiled_step
from .cuda import Uploads
from .device import triton_serves
from .dispatch import take_step
from .exact import Tables, check_betas
from .options import DEFAULTS, Options, stored_dtype
from .state import (
    check_checkpoint,
    check_parameter,
    converted,
    counts_on,
    in_float32,
    new_step,
    pairs_of,
    state_of,
)

# Of hundreds of parameters, by loops that are not in Python.
_GRAD = attrgetter("grad")
_EXP_AVG, _EXP_INF, _STEP = map(itemgetter, ("exp_avg", "exp_inf", "step"))


def _is_opaque(group: dict[str, Any]) -> bool:
    """Whether graphs of ``torch.compile`` have no operator for its step."""
    compact = group["state_dtype"] != "float32" or group["stochastic_rounding"]
    return bool(group["sparse"] == "exact" or compact)


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

    It differs from :class:`torch.optim.Adamax` in four ways. Gradients may be sparse COO
    tensors. Tensors on the CPU and on NVIDIA GPUs are updated in one pass over memory. The
    state of 16-bit parameters is float32, without which :math:`u` could not decay.
    :math:`\epsilon` is added in the denominator rather than to :math:`|g|`, which matters
    only for gradients as small as :math:`\epsilon`. Checkpoints go both ways.

    A sparse gradient touches the rows whose index is present. Only those rows of the
    parameter and of its state are read and written, at a cost that does not depend on the
    size of the table. Repeated indices are summed first. Steps are counted for each
    parameter, not for each row.

    Args:
        params: parameters or named parameters, or dicts that define parameter groups.
        lr: learning rate, in [0, inf); a float or a tensor of one element.
        betas: the decay of :math:`m` and of :math:`u` per step, both in [0, 1).
        eps: added to :math:`u` in the denominator, in [0, inf). With 0, the paper's own
            rule, an element that has only seen gradients of zero does not move.
        weight_decay: L2 penalty, or decoupled decay if ``decoupled_weight_decay``. With a
            sparse gradient it reaches the touched rows.
        foreach: True takes torch's operations on lists of tensors, False those on one
            tensor at a time.
        maximize: ascend rather than descend.
        differentiable: let autograd record the step.
        capturable: keep the step count on the device, for CUDA graphs; where the Triton
            kernels serve it is there anyway. Not for the CPU.
        fused: True takes compiled kernels (C++ on the CPU, Triton on an NVIDIA GPU) or
            raises, False never takes them.
        decoupled_weight_decay: multiply parameters by ``1 - lr * weight_decay`` instead of
            adding an L2 penalty to the gradient.
        sparse: what a sparse gradient means for the rows it does not touch. ``"lazy"``
            leaves them as they are. ``"exact"`` gives them a gradient of zero, as the dense
            rule does, at the cost of the touched rows, for tables on the CPU or an NVIDIA
            GPU: call :meth:`attach` with the model, and :meth:`flush` before anything else
            reads a whole table. It excludes ``foreach``, ``fused=False``,
            ``differentiable``, ``capturable`` and L2 penalties.
        state_dtype: how ``exp_avg`` and ``exp_inf`` are stored, for parameters of at most
            32 bits that the compiled kernels serve, on the CPU and, where Triton is
            installed, on NVIDIA GPUs. ``"float32"`` takes 8 bytes for each parameter.
            ``"8bit"`` takes 2, and 4 more for each row of a table with sparse gradients:
            ``exp_inf`` is stored in quarters of an octave from 1e-12 to 1e7, smaller ones
            as 0. ``"bfloat16"`` takes 4. See docs/compact.md.
        stochastic_rounding: round bfloat16 parameters up or down by random bits, so that
            moves of less than half a unit in the last place count on average. The bits are
            the same in each run. Like compact state it excludes ``foreach``,
            ``fused=False``, ``differentiable`` and ``capturable``.

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
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in DEFAULTS}
        Options.from_group(defaults, reads_lr=True)
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        """What neither copies nor checkpoints have."""
        self._tables = Tables(self)
        self._uploads = Uploads()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, see :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: an option out of its range, or a parameter no step could write to.
        """
        if isinstance(param_group, dict):
            Options.from_group({**self.defaults, **param_group}, reads_lr=True)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for param in group["params"]:
                check_parameter(param)
                for name in ("exp_avg", "exp_inf"):
                    stored_dtype(param.dtype, group["state_dtype"], name)
            options = Options.from_group(group)
            if options.exact:
                check_betas(options.hyperparameters, group["params"])
        except ValueError:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # a copy does not know which rows are stale
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_tables" not in self.__dict__:  # unpickled, not loaded
            self._start()
        for group in self.param_groups:
            # What checkpoints of torch.optim.Adamax lack.
            sparse = self.defaults.get("sparse", "lazy")
            for name, value in {**DEFAULTS, "sparse": sparse}.items():
                group.setdefault(name, value)
            for param in group["params"]:
                param_state = self.state.get(param)
                if param_state and not isinstance(param_state["step"], Tensor):
                    count = float(param_state["step"])
                    param_state["step"] = new_step(param, group) + count

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``GradScaler`` leaves the scale and the verdict on infinities to step().

        As for torch's fused optimizers that is so with ``fused=True``, which saves a pass
        over the gradients. Lightning does not clip them then. ``GradScaler`` refuses to
        unscale gradients of float16 itself.
        """
        groups = self.param_groups
        if groups and all(group["fused"] for group in groups):
            return True
        params = chain.from_iterable(group["params"] for group in groups)
        return any(param.dtype is torch.float16 for param in params)

    # --- Steps ---------------------------------------------------------------------------

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
                    state.update(state_of(param, group))  # at once, for an interrupt
        exp_avgs += map(_EXP_AVG, states)
        exp_infs += map(_EXP_INF, states)
        steps += map(_STEP, states)

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        # Usually the state is in the order of the parameters, which is quickly seen: the
        # hash of a tensor is a function in Python.
        if len(self.state) == len(params) and all(map(operator.is_, self.state, params)):
            return list(self.state.values())
        return list(map(self.state.__getitem__, params))

    @_compat.records_if_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in ``.grad``; parameters without one stay.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            IndexError: an index of a sparse gradient is out of range.
            ValueError: a learning rate or other option out of range, a gradient of a layout
                other than strided and COO, or state or a gradient that does not fit its
                parameter.
            RuntimeError: ``fused``, ``capturable`` or ``sparse="exact"`` where a parameter
                does not allow it, or a gradient for a row that was stale when it was read.

            No parameter and no state has changed then. On an NVIDIA GPU nothing is read
            back, so an index out of range is found by the device, which stops with an
            assertion, and a learning rate that is a tensor there is taken as it is.
        """
        _compat.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._eager_step()
        elif (
            self.defaults["differentiable"]
            or hasattr(self, "found_inf")
            or any(map(_is_opaque, self.param_groups))
        ):
            self._step_outside_graphs()
        else:
            compiled_step(self)
        return loss

    def _eager_step(self) -> None:
        scaling = Scaling(
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        groups = [(group, Options.from_group(group)) for group in self.param_groups]
        waits = scaling.found_inf is not None and not self._is_on_device(groups)
        if waits and scaling.skips:
            return
        is_exact = any(options.exact for _, options in groups)
        had_state = len(self.state)
        with self._tables.lock.held if is_exact else nullcontext():
            batches = []
            try:
                for group, options in groups:
                    batch = Batch([], [], [], [], [])
                    self._init_group(group, *batch.lists())
                    if options.state_dtype == "8bit":
                        states = self._states_of(batch.params)
                        batch.frames = [state.get("frame") for state in states]
                    if batch.params:
                        batches.append((batch, options))
                take_step(batches, scaling, self._tables, self._uploads)
                if is_exact:
                    self._tables.stepped()
            except Exception:
                for param in list(self.state)[had_state:]:
                    del self.state[param]
                raise

    def _is_on_device(self, groups: list[tuple[dict[str, Any], Options]]) -> bool:
        """Whether kernels on a device will look themselves whether to skip the step."""
        return all(
            options.path == "compiled"
            and not options.exact  # else the host takes note of steps
            and triton_serves(group["params"])
            for group, options in groups
        )

    # What the operator cannot do: let autograd record the step, skip it, sparse gradients.
    _step_outside_graphs = _compat.disable_dynamo(_eager_step)

    # --- Stale rows, with sparse="exact" -------------------------------------------------

    def attach(self, model: torch.nn.Module) -> Attachment:
        """Have the embeddings of ``model`` catch up rows before they read them.

        With ``sparse="exact"`` a row that a step does not touch becomes stale: it moves
        only when it is needed. This finds the :class:`torch.nn.Embedding` and
        :class:`torch.nn.EmbeddingBag` modules with ``sparse=True`` whose weight is in this
        optimizer, and those that share such a weight. They then catch up the rows of each
        batch, in training and in evaluation, and whole tables before
        ``model.state_dict()``, ``model.load_state_dict()``, ``copy.deepcopy(model)``,
        ``torch.save(model)``, ``torch.jit.trace`` and ``torch.export``. Copies of the model
        are not attached.

        Call :meth:`lookup`, :meth:`catch_up` or :meth:`flush` before anything else reads a
        weight, since that cannot be seen: ``weight[ids]``, clones of
        ``model.named_parameters()``, averages of weights, ``torch.func.functional_call``
        within ``torch.func.grad``, and traced or exported programs that are used after more
        steps, since they share the weights. In ``join()`` of DistributedDataParallel call
        :meth:`flush` at the end of the block, in every process.

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
        """Catch up the rows ``ids`` of ``weight``, for functions that read them.

        Args:
            weight: a parameter of this optimizer.
            ids: int32 or int64, of any shape.

        Raises:
            IndexError: an id outside the table.
            TypeError: ids of another dtype.
            RuntimeError: ``weight`` was moved, converted, resized or replaced while rows
                were stale.
            ValueError: ``weight`` is not a parameter of this optimizer.
        """
        self._tables.check_known(weight)
        self._tables.catch_up(weight, ids)

    def lookup(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The rows ``weight[ids]``, caught up, with a sparse gradient.

        :func:`torch.nn.functional.embedding` after :meth:`catch_up`, which raises the same
        errors.

        Args:
            weight: a parameter of this optimizer.
            ids: int32 or int64, of any shape.

        Returns:
            A tensor of the shape ``(*ids.shape, *weight.shape[1:])``.

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
        """Catch up all rows of a table, or of all tables, where they are stale.

        To be called before anything reads a whole table that :meth:`attach` does not see.
        :meth:`state_dict` calls it. It takes a pass over the table and its state, and shows
        a progress bar when that is long and tqdm is installed.

        Args:
            weight: a parameter, or None for all.

        Raises:
            RuntimeError: ``weight`` was moved, converted, resized or replaced while rows
                were stale.
            ValueError: ``weight`` is not a parameter of this optimizer.
        """
        if weight is not None:
            self._tables.check_known(weight)
        for param in list(self._tables.stale()) if weight is None else [weight]:
            self._tables.flush(param)

    # --- Checkpoints ---------------------------------------------------------------------

    def state_dict(self, state_dtype: str | None = None) -> dict[str, Any]:
        """See :meth:`torch.optim.Optimizer.state_dict`.

        State is as it is stored. With ``state_dtype="float32"`` compact state is converted
        to what any Adamax can load.

        With ``sparse="exact"`` all rows are caught up first, the parameters' too, so that
        it is the checkpoint of a dense optimizer: save a model that is not attached after
        this, not before.
        """
        check_saved_dtype(state_dtype)
        with self._tables.lock.held:
            self.flush()
            saved = super().state_dict()
        if state_dtype is not None:
            saved["state"] = {i: in_float32(state) for i, state in saved["state"].items()}
            for group in saved["param_groups"]:
                group["state_dtype"] = state_dtype
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of :class:`torch.optim.Adamax`.

        The state of 16-bit parameters is cast to float32, not to their dtype. State is
        stored as this optimizer's ``state_dtype`` says, however it was saved.

        Raises:
            TypeError: an option of the wrong type.
            ValueError: groups, options, state or shapes that do not fit.
            RuntimeError: with ``sparse="exact"``, stale rows: what they have missed belongs
                to the state that would be replaced.

            Nothing has changed then.
        """
        self._tables.check_none_is_stale("you load weights and state")
        loaded: dict[str, Any] = {}
        kinds = [group["state_dtype"] for group in self.param_groups]

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            # Runs last of the hooks before loading, so sees what will be loaded.
            loaded.update(state_dict)
            check_checkpoint(self, state_dict)

        def restore(_: Optimizer) -> None:
            for group, kind in zip(self.param_groups, kinds, strict=True):
                group["state_dtype"] = kind
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            for param, given in pairs_of(self, loaded):
                state = self.state[param]
                state.pop("frame", None)
                # On the device and in the memory order of the parameter.
                state.update(converted(param, given, group_of[param]["state_dtype"]))
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
