"""Arrays of NumPy as they come."""

import math
import uuid

import numpy as np


class Mine(np.ndarray):
    pass


def _every(steps, memory):
    return memory[tuple(steps for _ in memory.shape)]


def _around(shape, margin):
    return [2 * length + margin for length in shape]


def _misaligned(shape, dtype, path):
    memory = np.full(math.prod(shape) * dtype.itemsize + 1, 7, np.uint8)
    return memory, memory[1:].view(dtype).reshape(shape)


def _field(shape, dtype, path):
    memory = np.zeros(shape, [("before", np.int8), ("values", dtype), ("after", "S3")])
    return memory, memory["values"]


def _whole(memory):
    return memory, memory


# New memory, and an array in it of the given shape and dtype.
LAYOUTS = {
    "C": lambda shape, dtype, path: _whole(np.zeros(shape, dtype)),
    "F": lambda shape, dtype, path: _whole(np.zeros(shape, dtype, order="F")),
    "transposed": lambda shape, dtype, path: (
        memory := np.zeros(shape[::-1], dtype),
        memory.T,
    ),
    "strided": lambda shape, dtype, path: (
        memory := np.full(_around(shape, 0), 7, dtype),
        _every(slice(None, None, 2), memory),
    ),
    "negative": lambda shape, dtype, path: (
        memory := np.zeros(shape, dtype),
        _every(slice(None, None, -1), memory),
    ),
    "inner": lambda shape, dtype, path: (
        memory := np.full(_around(shape, 2), 7, dtype),
        memory[tuple(slice(1, 1 + length) for length in shape)],
    ),
    "misaligned": _misaligned,
    "byte-swapped": lambda shape, dtype, path: _whole(
        np.zeros(shape, dtype.newbyteorder())
    ),
    "byte-swapped F": lambda shape, dtype, path: _whole(
        np.zeros(shape, dtype.newbyteorder(), order="F")
    ),
    "field": _field,
    "memmap": lambda shape, dtype, path: _whole(
        np.memmap(path / uuid.uuid4().hex, dtype, "w+", shape=shape)
    ),
    "subclass": lambda shape, dtype, path: _whole(np.zeros(shape, dtype).view(Mine)),
}
