"""Contestants for NumPy and PyTorch, which is imported when a contestant is made."""

import importlib
import os
import subprocess
import sys
from typing import Any

import adamax

from .harness import THREADS
from .oracle import BETA_1, BETA_2, EPSILON, LEARNING_RATE, Array
from .workloads import Dense, Gradient, NewProcess, Rows, Sparse

TableWork = Dense | Sparse


class NumpyAdamax:
    """Ours, for NumPy arrays."""

    def __init__(self, work: TableWork, sparse: str = "lazy") -> None:
        adamax.set_num_threads(THREADS)
        self._arrays = work.initial()
        self._optimizer = adamax.Adamax(
            LEARNING_RATE, BETA_1, BETA_2, EPSILON, sparse=sparse
        )
        self._optimizer.build(self._arrays)
        for state in self._optimizer.state_dict().values():
            state[...] = 0  # touches its memory

    def take(self, draw: list[Gradient]) -> None:
        gradients = [
            adamax.IndexedSlices(g.values.copy(), g.ids.copy())
            if isinstance(g, Rows)
            else g.copy()
            for g in draw
        ]
        self._pairs = list(zip(gradients, self._arrays, strict=True))

    def step(self) -> None:
        self._optimizer.apply_gradients(self._pairs)

    def parameters(self) -> list[Array]:
        return self._arrays


class NumpyExact(NumpyAdamax):
    """Ours in exact mode, with the lookup of the rows that comes before a step."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, sparse="exact")

    def step(self) -> None:
        gradient: Any
        ((gradient, table),) = self._pairs
        self._rows = self._optimizer.lookup(table, gradient.indices)
        self._optimizer.apply_gradients(self._pairs)

    def parameters(self) -> list[Array]:
        self._optimizer.flush()
        return self._arrays


def by_name(name: str) -> Any:
    """What a module has, by its full name; imports the module."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Torch:
    """An optimizer with the protocol of ``torch.optim``, by its full name.

    Parameters and gradients are in memory that torch allocates, as a model's are.
    """

    def __init__(
        self, work: TableWork, optimizer: str, device: str = "cpu", **options: Any
    ) -> None:
        import torch

        torch.set_num_threads(THREADS)
        # The checks of sparse tensors are off by default, but then torch warns of that.
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        self._torch, self._device = torch, device
        self._parameters = [
            torch.nn.Parameter(torch.tensor(array, device=device))
            for array in work.initial()
        ]
        self._optimizer = by_name(optimizer)(
            self._parameters, LEARNING_RATE, (BETA_1, BETA_2), EPSILON, **options
        )
        self._touched = False

    def take(self, draw: list[Gradient]) -> None:
        if self._optimizer.state and not self._touched:  # its memory, as of NumPy's
            for state in self._optimizer.state.values():
                for name in set(state) - {"step"}:
                    state[name].mul_(1)
            self._touched = True
        for parameter, gradient in zip(self._parameters, draw, strict=True):
            parameter.grad = self._tensor(gradient, parameter.shape)

    def _tensor(self, gradient: Gradient, shape: Any) -> Any:
        tensor, device = self._torch.tensor, self._device
        if not isinstance(gradient, Rows):
            return tensor(gradient, device=device)
        ids = tensor(gradient.ids.reshape(1, -1), device=device)
        values = tensor(gradient.values, device=device)
        return self._torch.sparse_coo_tensor(ids, values, shape)

    def step(self) -> None:
        self._optimizer.step()

    def parameters(self) -> list[Array]:
        return [parameter.detach().cpu().numpy() for parameter in self._parameters]


class TorchWithState(Torch):
    """Ours with its state from the start, which would otherwise be made in a first step."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, "adamax.torch.Adamax")
        zeros, checkpoint = self._torch.zeros, self._optimizer.state_dict()
        checkpoint["state"] = {
            number: {
                "step": zeros(()),
                "exp_avg": zeros(parameter.shape),
                "exp_inf": zeros(parameter.shape),
            }
            for number, parameter in enumerate(self._parameters)
        }
        self._optimizer.load_state_dict(checkpoint)


def copy_in_torch(array: Array) -> Array:
    """A copy in memory that torch allocates."""
    import torch

    copy: Array = torch.tensor(array).numpy()
    return copy


class TorchExact(Torch):
    """Ours in exact mode, with what its hooks do before a batch is read."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, "adamax.torch.Adamax", sparse="exact")

    def take(self, draw: list[Any]) -> None:
        super().take(draw)
        (gradient,) = draw
        self._ids = self._torch.tensor(gradient.ids)

    def step(self) -> None:
        (table,) = self._parameters
        self._optimizer.catch_up(table, self._ids)
        self._optimizer.step()

    def parameters(self) -> list[Array]:
        self._optimizer.flush()
        return super().parameters()


class Program:
    """A Python program in a new process, from the start of the interpreter to its end.

    With ``cached=False`` it finds no bytecode of adamax and writes none, as where an
    installation brought none and cannot be written to.
    """

    _NOT_CACHED = """
import sys
from importlib.machinery import SourceFileLoader
get_data = SourceFileLoader.get_data
def without_bytecode(loader, path):
    if path.endswith(".pyc") and loader.name.partition(".")[0] == "adamax":
        raise OSError(path)
    return get_data(loader, path)
SourceFileLoader.get_data = without_bytecode
sys.dont_write_bytecode = True
"""

    def __init__(self, work: NewProcess, program: str, *, cached: bool = True) -> None:
        # It ends at once, since tearing an interpreter down is no part of a step.
        lines = ("" if cached else self._NOT_CACHED, program, "import os; os._exit(0)")
        self._command = [sys.executable, "-c", "\n".join(lines)]

    def take(self, draw: None) -> None:
        pass

    def step(self) -> None:
        # An installation has bytecode, which a source tree gets in the warm-up.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(self._command, env=environment, check=True)

    def parameters(self) -> list[Array]:
        return []
