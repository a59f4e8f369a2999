"""Gradients as the verbs take them, and what is wrong with those that do not fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .._core.kernels import OPERANDS, Problem
from .._core.stale import raise_problem
from .parameters import DTYPES, Array, Parameter


class SparseGradient(Protocol):
    """Anything with ``values`` and ``indices``: ``IndexedSlices``, TensorFlow's too."""

    @property
    def values(self) -> Any: ...
    @property
    def indices(self) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class IndexedSlices:
    """The gradient of some rows of a table, as :class:`tf.IndexedSlices` holds it.

    Row ``indices[i]`` of the table has the gradient ``values[i]``; where an index repeats,
    its values are summed. Rows whose index is absent are not touched.

    Args:
        values: shape ``(n, ...)``, the gradients of the rows.
        indices: shape ``(n,)``, integers in ``[0, rows of the table)``, in any order.
        dense_shape: the shape of the table, if it should be checked.

    >>> import numpy as np
    >>> IndexedSlices(np.ones((2, 3), np.float32), np.array([7, 4])).indices
    array([7, 4])
    """

    values: Any
    indices: Any
    dense_shape: Any = None


Gradient: TypeAlias = npt.ArrayLike | SparseGradient | None


def split_pairs(grads_and_vars: Iterable[Any]) -> tuple[Sequence[Any], Sequence[Array]]:
    """The gradients that are not None, and their parameters."""
    pairs = list(grads_and_vars)
    if not (set(map(type, pairs)) <= {tuple, list} and set(map(len, pairs)) == {2}):
        for position, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"grads_and_vars[{position}] must be a (gradient, parameter) pair, "
                    f"got {type(pair).__name__}"
                )
    if type(None) in {type(gradient) for gradient, _ in pairs}:
        pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        raise ValueError("grads_and_vars must hold at least one gradient that is not None")
    gradients, parameters = zip(*pairs, strict=True)
    return gradients, parameters


def is_sparse(gradient: Any) -> bool:
    """Whether ``gradient`` is a :class:`SparseGradient`."""
    if type(gradient) is np.ndarray or not hasattr(gradient, "indices"):
        return False
    # Dense tensors of torch have methods of these names.
    return not callable(getattr(gradient, "values", callable))


def checked_dense(gradient: Any, parameter: Parameter) -> Array:
    """A dense gradient as a float array of the parameter's shape.

    Raises:
        TypeError: it is no array of real numbers.
        ValueError: it has another shape.
    """
    array = _float_array(gradient, f"the gradient of parameter {parameter.name!r}")
    if array.shape != parameter.shape:
        raise ValueError(
            f"the gradient of parameter {parameter.name!r} must have the shape "
            f"{parameter.shape}, got {array.shape}"
        )
    return array


def checked_rows(gradient: SparseGradient, parameter: Parameter) -> tuple[Array, Array]:
    """The indices and values of a sparse gradient.

    Raises:
        TypeError: indices that are no integers, or values that are no real numbers.
        ValueError: a parameter without rows, or shapes that do not match.
        IndexError: an index outside the table that int64 cannot hold.
    """
    name, shape = parameter.name, parameter.shape
    if not shape:
        raise ValueError(f"parameter {name!r} has no rows, but its gradient is sparse")
    where = f"the gradient of parameter {name!r}"
    indices = checked_indices(gradient.indices, shape[0], f"the indices of {where}", where)
    if indices.ndim != 1:
        raise ValueError(
            f"the indices of {where} must have one dimension, got the shape {indices.shape}"
        )
    values = _float_array(gradient.values, where)
    expected = (indices.size, *shape[1:])
    if values.shape != expected:
        raise ValueError(
            f"the values of {where} must have the shape {expected}, got {values.shape}"
        )
    dense_shape = getattr(gradient, "dense_shape", None)
    if dense_shape is not None:
        given = tuple(np.asarray(dense_shape).tolist())
        if given != shape:
            raise ValueError(f"the dense_shape of {where} must be {shape}, got {given}")
    return indices, values


def checked_indices(indices: Any, rows: int, what: str, where: str) -> Array:
    """``indices`` as int32 or int64; ``what`` and ``where`` are for the errors."""
    array = np.asarray(indices)
    if array.dtype == np.int64 or array.dtype == np.int32:
        return array
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{what} must be integers, got {array.dtype}")
    if array.dtype.kind == "u" and (outside := np.flatnonzero(array >= rows)).size:
        position = int(outside[0])  # int64 might not hold it
        raise IndexError(_outside(where, position, rows, array.ravel()[position]))
    return array.astype(np.int64)


def check_range(indices: Array, parameter: Parameter, where: str | None = None) -> None:
    """Raise an IndexError for an index outside the rows of a parameter."""
    rows = parameter.shape[0]
    outside = np.flatnonzero((indices < 0) | (indices >= rows))
    if outside.size:
        position = int(outside[0])
        where = where or f"the gradient of parameter {parameter.name!r}"
        raise IndexError(_outside(where, position, rows, indices.ravel()[position]))


def raise_for(problem: Problem, parameter: Parameter) -> None:
    """Raise the error for a problem of the verbs with a gradient of ``parameter``."""
    name = f"parameter {parameter.name!r}"
    if problem.kind == "index":
        where, rows = f"the gradient of {name}", parameter.shape[0]
        raise IndexError(_outside(where, problem.detail, rows, problem.value))
    if problem.kind != "unfit":
        raise_problem(problem, name, "lookup(table, ids)")
    raise ValueError(f"{name} and its {OPERANDS[problem.detail]} do not fit together")


def _outside(where: str, position: int, rows: int, value: Any) -> str:
    return f"{where}: indices[{position}] must be in [0, {rows}), got {value}"


def _float_array(given: Any, what: str) -> Array:
    """``given`` as an array of floats that the verbs read; integers become float64."""
    array = given if type(given) is np.ndarray else np.asarray(given)
    if array.dtype.name in DTYPES:
        return array
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"{what} must be an array of real numbers, got {type(given).__name__} of "
            f"dtype {array.dtype}"
        )
    return array.astype(np.float64)
