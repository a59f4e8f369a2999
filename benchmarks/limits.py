"""What no step can be faster than: its bytes moved, and nothing computed (C++)."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .harness import THREADS
from .meters import CannotMeasureError
from .oracle import Array
from .workloads import Dense, Rows, Sparse

_SOURCE = Path(__file__).with_name("memory_pass.cpp")
_BUILD = Path(__file__).parents[1] / "build" / "benchmarks"
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    # One pass over four arrays, where GCC would make three copies of it.
    *("-fno-tree-loop-distribute-patterns", "-fno-tree-loop-distribution"),
)


class DensePass:
    """Reads w, m, u and g, and writes w, m and u, of whole arrays.

    ``copy`` puts w and g into the memory that the host framework gives its arrays.
    """

    def __init__(self, work: Dense, copy: Callable[[Array], Array] = np.copy) -> None:
        self._w, self._g = ([copy(array) for array in work.initial()] for _ in range(2))
        self._m, self._u = ([_apart(w, number) for w in self._w] for number in (1, 2))
        arrays = map(_addresses, (self._w, self._m, self._u, self._g))
        counts = map(ctypes.c_int64, (work.arrays, work.length))
        self.step = functools.partial(_library().move_arrays, *arrays, *counts, THREADS)

    def take(self, draw: list[Array]) -> None:
        for g, drawn in zip(self._g, draw, strict=True):
            g[:] = drawn

    def parameters(self) -> list[Array]:
        return self._w


class RowsPass:
    """The same for the rows that have a gradient; sorting and summing are not measured."""

    def __init__(self, work: Sparse) -> None:
        (w,) = work.initial()
        self._tables = [w, _apart(w, 1), _apart(w, 2)]

    def take(self, draw: list[Rows]) -> None:
        ids, place = np.unique(draw[0].ids, return_inverse=True)
        values = np.zeros((len(ids), draw[0].values.shape[1]), np.float32)
        np.add.at(values, place, draw[0].values)
        self._arrays = [*self._tables, values, ids]
        arrays = (ctypes.c_void_p(array.ctypes.data) for array in self._arrays)
        counts = map(ctypes.c_int64, values.shape)
        self.step = functools.partial(_library().move_rows, *arrays, *counts, THREADS)

    def parameters(self) -> list[Array]:
        return self._tables[:1]


def _apart(array: Array, number: int) -> Array:
    """Zeros like ``array`` at another place of 64 KiB, all of their memory touched.

    Large arrays begin at nearly the same place of a page. What is at the same place of
    several arrays competes for the same banks of memory.
    """
    period, step = 64 * 1024, 16 * 1024
    room = np.full(array.nbytes + period, 0, np.uint8)
    start = (array.ctypes.data + number * step - room.ctypes.data) % period
    return room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)


def _addresses(arrays: Sequence[Array]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


@functools.cache
def _library() -> ctypes.CDLL:
    """The passes, compiled for this machine unless this source has been before."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise CannotMeasureError("no C++ compiler was found to compile memory_pass.cpp")
    made_of = _SOURCE.read_bytes() + " ".join(_FLAGS).encode()
    source = hashlib.sha256(made_of).hexdigest()[:12]
    library = _BUILD / f"memory_pass-{source}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")  # another process may compile it too
        subprocess.run([compiler, *_FLAGS, _SOURCE, "-o", own], check=True)
        own.replace(library)
    return ctypes.CDLL(str(library))
