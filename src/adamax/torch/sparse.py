"""Sparse gradients as rows of tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _compat
from .batch import Batch, Called


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A sparse COO gradient.

    Attributes:
        indices: ``(d, n)``, of the ``d`` leading dimensions; they may repeat.
        values: ``(n, ...)``.
        sizes: of the ``d`` dimensions.
    """

    indices: Tensor
    values: Tensor
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """The rows of the table that the leading dimensions make."""
        return math.prod(self.sizes)

    @property
    def row_length(self) -> int:
        """Numbers in a row."""
        parts = 2 if self.values.is_complex() else 1
        return math.prod(self.values.shape[1:]) * parts

    def flat(self, *, wait: bool = True) -> Tensor:
        """The indices of rows of that table, ``(n,)``.

        Several dimensions are checked, which waits for the device; without ``wait`` an
        index out of range becomes -1.
        """
        if len(self.sizes) == 1:
            return self.indices[0]
        if wait:
            self.check_in_range()
        flat = self.indices.new_zeros(self.indices.shape[1:])
        for index, size in zip(self.indices, self.sizes, strict=True):
            flat = flat * size + index
        return flat if wait else flat.masked_fill_(self._outside(), -1)

    def table(self, tensor: Tensor) -> Tensor | None:
        """``tensor`` as that table, if that takes no copy."""
        if len(self.sizes) == 1:
            return tensor
        try:
            return tensor.view(self.count, *tensor.shape[len(self.sizes) :])
        except RuntimeError:  # its strides do not allow it
            return None

    def check_in_range(self) -> None:
        """Raise an IndexError if an index is outside of its dimension."""
        outside = self._outside().nonzero()
        if len(outside):
            position = int(outside[0])
            raise index_error(
                f":, {position}", self.sizes, tuple(self.indices[:, position].tolist())
            )

    def _outside(self) -> Tensor:
        outside = self.indices.new_zeros(self.indices.shape[1:], dtype=torch.bool)
        for index, size in zip(self.indices, self.sizes, strict=True):
            outside |= (index < 0) | (index >= size)
        return outside


def index_error(position: object, sizes: Sequence[int], index: object) -> IndexError:
    inside = f"[0, {sizes[0]})" if len(sizes) == 1 else f"the shape {tuple(sizes)}"
    return IndexError(f"indices[{position}] must be in {inside}, got {index}")


def every_row(gradient: Tensor) -> SparseRows:
    """A dense gradient as one of all rows."""
    rows = torch.arange(len(gradient), device=gradient.device)
    return SparseRows(rows[None], gradient, (len(gradient),))


def by_frames(dense: Batch) -> tuple[Batch, list[Batch]]:
    """Parameters with dense gradients: those with one frame or none, and the others.

    Where 8-bit state has a frame for each row, only the kernels for rows can update it, one
    parameter after the other.
    """
    if dense.frames is None or not any(map(has_rows, dense.frames)):
        return dense, []
    parts = dense.split(list(map(has_rows, dense.frames)))
    return parts.get(False, Batch([], [], [], [], [])), parts[True].singles()


def has_rows(frame: Tensor | None) -> bool:
    """Whether 8-bit state is of rows."""
    return frame is not None and frame.numel() != 1


def check_sparse_in_rows(
    param: Tensor, gradient: Tensor, what: str, called: Called
) -> None:
    """Raise a ValueError for a gradient that is sparse in more dimensions than the rows."""
    if gradient.layout is not torch.strided and gradient.sparse_dim() != 1:
        raise ValueError(
            f"{what} needs gradients that are sparse in the rows alone, got one of "
            f"{called(param)} with {gradient.sparse_dim()} sparse dimensions"
        )


def frame_of_rows(frame: Tensor, rows: int) -> Tensor:
    """The frame of 8-bit state, which gets one number for each row."""
    if frame.numel() == 1 != rows:  # another number does not fit, which verbs find
        frame.data = frame.detach().expand(rows).clone()
    return frame


def sparse_rows(param: Tensor, gradient: Tensor, called: Called) -> SparseRows:
    """The rows of a gradient.

    Raises:
        ValueError: it is not a COO tensor of the shape of ``param``.
    """
    if gradient.layout is not torch.sparse_coo:
        raise ValueError(
            f"a sparse gradient must have the layout torch.sparse_coo, got "
            f"{gradient.layout} for {called(param)}"
        )
    indices, values = _compat.sparse_parts(gradient)
    dims = len(indices)
    # Without checks of invariants values may have any shape.
    fits = (
        gradient.shape == param.shape and values.shape[1:] == param.shape[dims:]
    ) and values.is_complex() == param.is_complex()
    if not fits:
        raise ValueError(
            f"the sparse gradient of {called(param)} must have its dtype and shape, "
            f"{param.dtype} and {tuple(param.shape)}, got {gradient.dtype} and "
            f"{tuple(gradient.shape)}, with rows of shape {tuple(values.shape[1:])}"
        )
    return SparseRows(indices, values, tuple(param.shape[:dims]))
