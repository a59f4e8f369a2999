"""Hooks by which the modules of a model catch up the rows that they read."""

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import _compat
from .exact import Tables

_REFUSED = (
    "an embedding that an optimizer is attached to is not for {}: call remove() on what "
    "attach(model) has returned before"
)


class Attachment:
    """What :meth:`Adamax.attach` returns: names the weights, and takes the hooks off.

    As a context manager, it takes them off at the end of the block.
    """

    def __init__(self, names: tuple[str, ...], remove: Callable[[], None]) -> None:
        self.names = names
        self._remove = remove

    def remove(self) -> None:
        """Catch up the tables, and take the hooks off the modules again."""
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
    parallel = _in_parallel(model)
    handles: list[Any] = []
    readers: list[_Reader] = []
    names: list[str] = []
    with tables.lock.held:
        for name, module in found:
            weight = module.weight
            if weight not in sparse:
                continue
            reader = _Reader(tables, weight)
            handles += [
                module.register_forward_pre_hook(reader, with_kwargs=True),
                module.register_state_dict_pre_hook(reader.flush),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(reader.flush),  # type: ignore[no-untyped-call]
            ]
            readers.append(reader)
            names.append(name)
            renorms = module.max_norm is not None
            tables.add(weight, name, parallel.get(weight), renorms)

    def remove() -> None:
        for reader in readers:
            reader.flush()
        for handle in handles:
            handle.remove()

    return Attachment(tuple(names), remove)


def _in_parallel(model: nn.Module) -> dict[Tensor, nn.Module]:
    """The parameters whose gradients DistributedDataParallel sums over processes."""
    if "torch.distributed" not in sys.modules or not torch.distributed.is_available():
        return {}
    return {
        param: module
        for module in model.modules()
        if isinstance(module, nn.parallel.DistributedDataParallel)
        for param in module.parameters()
    }


class _Reader:
    """The hooks of one module; called, the one before ``forward``.

    A copy of the module is not attached, as no optimizer knows its weight. Its weight was
    copied before this, so this catches it up.
    """

    def __init__(self, tables: Tables | None, weight: Tensor | None) -> None:
        self._tables = tables
        self._weight = _nothing if weight is None else weakref.ref(weight)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._tables is None:
            return
        if _compat.is_exporting() and torch.compiler.is_dynamo_compiling():
            raise RuntimeError(_REFUSED.format("torch.export with strict=True"))
        if _compat.is_tracing() or _compat.is_exporting():
            self.flush()
            return
        # What the module reads, which may have been replaced for this call.
        ids = args[0] if args else kwargs["input"]
        self._tables.catch_up(module.weight, ids)  # type: ignore[arg-type]

    @property
    def __name__(self) -> NoReturn:
        # torch.jit.script asks every hook for its name.
        raise AttributeError(_REFUSED.format("torch.jit.script"))

    def flush(self, *_: Any) -> None:
        weight = self._weight()
        if self._tables is not None and weight is not None:
            self._tables.flush(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Reader":
        self.flush()
        weight = self._weight()
        copy = None if weight is None else memo.get(id(weight))
        if weight is not None and copy is not None:
            with torch.no_grad():
                copy.copy_(weight)
        return _Reader(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        self.flush()  # torch.save() writes tensors in the end
        return _Reader, (None, None)


def _nothing() -> None:
    return None
