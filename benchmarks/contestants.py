"""Factories of contestants. A framework is imported when its contestant is made."""

import importlib
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np

import adamax

from .harness import THREADS
from .oracle import BETA_1, BETA_2, EPSILON, LEARNING_RATE
from .workloads import Array, Dense, Gradient, Rows, Sparse, Startup

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
    """The same in exact mode, with the lookup of the rows that it needs before."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, sparse="exact")

    def step(self) -> None:
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
    """An optimizer with the protocol of ``torch.optim``, by its full name."""

    def __init__(
        self, work: TableWork, optimizer: str, device: str = "cpu", **options: Any
    ) -> None:
        import torch

        torch.set_num_threads(THREADS)
        # Its checks of sparse tensors are off by default too, but then with a warning.
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._torch, self._device = torch, device
        self._parameters = [
            torch.nn.Parameter(torch.from_numpy(array).to(device))
            for array in work.initial()
        ]
        self._optimizer = by_name(optimizer)(
            self._parameters, LEARNING_RATE, (BETA_1, BETA_2), EPSILON, **options
        )

    def take(self, draw: list[Gradient]) -> None:
        for parameter, gradient in zip(self._parameters, draw, strict=True):
            parameter.grad = self._tensor(gradient, parameter.shape).to(self._device)

    def _tensor(self, gradient: Gradient, shape: Any) -> Any:
        from_numpy = self._torch.from_numpy
        if isinstance(gradient, Rows):
            ids = from_numpy(gradient.ids.reshape(1, -1).copy())
            values = from_numpy(gradient.values.copy())
            return self._torch.sparse_coo_tensor(ids, values, shape)
        return from_numpy(gradient.copy())

    def step(self) -> None:
        self._optimizer.step()

    def parameters(self) -> list[Array]:
        return [parameter.detach().cpu().numpy() for parameter in self._parameters]


class TorchExact(Torch):
    """Ours in exact mode, with what its hooks do before a batch is read."""

    def __init__(self, work: TableWork) -> None:
        super().__init__(work, "adamax.torch.Adamax", sparse="exact")

    def take(self, draw: list[Gradient]) -> None:
        super().take(draw)
        (gradient,) = draw
        self._ids = self._torch.from_numpy(gradient.ids.copy())

    def step(self) -> None:
        (table,) = self._parameters
        self._optimizer.catch_up(table, self._ids)
        self._optimizer.step()

    def parameters(self) -> list[Array]:
        self._optimizer.flush()
        return super().parameters()


class MemoryLimit:
    """Moves the bytes of a dense step (reads w, m, u, g, writes w, m, u), no more.

    Nothing that touches the same memory once can be faster than this.
    """

    _PIECE = 1 << 20

    def __init__(self, work: Dense) -> None:
        self._w = work.initial()
        # Large arrays of NumPy begin at the same offset of a page, and then elements of
        # the same index may evict each other from the first-level cache. Not here.
        m, u, self._g = (
            [_apart(w, distance) for w in self._w] for distance in (256, 512, 768)
        )
        self._pieces = [
            tuple(array[start : start + self._PIECE] for array in arrays)
            for arrays in zip(self._w, m, u, self._g, strict=True)
            for start in range(0, arrays[0].size, self._PIECE)
        ]
        self._pool = ThreadPoolExecutor(THREADS)

    def take(self, draw: list[Array]) -> None:
        for g, drawn in zip(self._g, draw, strict=True):
            g[:] = drawn

    def step(self) -> None:
        numbers = itertools.count()  # its next() is atomic
        for _ in self._pool.map(self._work, [numbers] * THREADS):
            pass

    def _work(self, numbers: Any) -> None:
        while (number := next(numbers)) < len(self._pieces):
            _move(*self._pieces[number])

    def parameters(self) -> list[Array]:
        return self._w


def _apart(array: Array, distance: int) -> Array:
    """Zeros like ``array`` that begin ``distance`` elements further into a page."""
    page = 4096 // array.itemsize
    room = np.full(array.size + page, 0, array.dtype)
    start = (array.ctypes.data - room.ctypes.data) // array.itemsize + distance
    return room[start % page :][: array.size]


@numba.njit(nogil=True)
def _move(w: Array, m: Array, u: Array, g: Array) -> None:
    # From 0: Numba does not vectorise a loop from a start that might be negative.
    for i in range(w.size):
        u[i] = m[i]
        m[i] = w[i]
        w[i] = g[i]


class FirstStep:
    """Ours in a new process, from the start of the interpreter to its end."""

    _SCRIPT = """
import sys
if not {scipy}:
    sys.modules["scipy"] = None  # as if it were not installed

import numpy as np
from adamax import Adamax, IndexedSlices

dense, table = np.zeros(1000, np.float32), np.zeros((100, 8), np.float32)
rows = IndexedSlices(np.ones((3, 8), np.float32), np.array([7, 5, 7]))
Adamax(learning_rate=0.5, **{options}).apply_gradients(
    [(np.ones_like(dense), dense), (rows, table)]
)
np.testing.assert_allclose(dense, -0.5, rtol=1e-5)
np.testing.assert_allclose(table[[5, 7]], -0.5, rtol=1e-5)
assert not np.delete(table, [5, 7], axis=0).any()
"""

    def __init__(
        self, work: Startup, options: dict[str, float], scipy: bool, directory: str
    ) -> None:
        script = self._SCRIPT.format(options=options, scipy=scipy)
        self._command = [sys.executable, "-c", script]
        self._directory = directory

    def take(self, draw: Path) -> None:
        self._environment = {
            **os.environ,
            "NUMBA_CACHE_DIR": str(draw / self._directory),
            "PYTHONDONTWRITEBYTECODE": "",  # an installation has bytecode
        }

    def step(self) -> None:
        subprocess.run(self._command, env=self._environment, check=True)

    def parameters(self) -> list[Array]:
        return []
