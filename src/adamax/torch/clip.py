"""Clipping of gradients, sparse ones too."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._core.kernels import kernels
from . import _compat
from .batch import FLOATS, by_shape
from .sparse import sparse_rows

Parameters: TypeAlias = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
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
    dense, sparse = _by_layout(parameters)
    norms = [_sparse_norm(param, float(norm_type)) for param in sparse]
    grads = [param.grad for param in dense if param.grad is not None]
    # The norm of norms is the norm of all.
    total = torch.nn.utils.get_total_norm(
        [*grads, *norms], norm_type, error_if_nonfinite, foreach
    )
    torch.nn.utils.clip_grads_with_norm_(dense, max_norm, total, foreach)
    if sparse:
        whole: Any = total
        whole = whole.full_tensor() if hasattr(total, "full_tensor") else total
        scale = torch.clamp(float(max_norm) / (whole + 1e-6), max=1.0)
        for param in sparse:
            values = _values(param)
            values.mul_(scale.to(values.device))
    return total


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
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
    dense, sparse = _by_layout(parameters)
    if dense:
        torch.nn.utils.clip_grad_value_(dense, clip_value, foreach)
    for param in sparse:
        assert param.grad is not None
        param.grad = param.grad.coalesce()
        _values(param).clamp_(-float(clip_value), float(clip_value))


def _by_layout(parameters: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters with dense gradients, and those with sparse ones."""
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for param in parameters:
        if param.grad is not None:
            kinds[param.grad.is_sparse].append(param)
    return kinds


def _values(param: Tensor) -> Tensor:
    assert param.grad is not None
    return _compat.sparse_parts(param.grad)[1]


def _sparse_norm(param: Tensor, norm_type: float) -> Tensor:
    """The norm of the summed gradient, as a tensor of its dtype."""
    grad = param.grad
    assert grad is not None
    dtype = grad.dtype.to_real()
    if norm_type == 2.0 and grad.is_cpu and grad.dtype in FLOATS:
        rows = sparse_rows(param, grad, by_shape)
        values = rows.values.resolve_conj().resolve_neg()
        norm = kernels().norm(rows.flat(), values, rows.count, torch.get_num_threads())
        if isinstance(norm, float):
            return torch.tensor(norm, dtype=dtype)
    values = grad.coalesce().values()
    if not values.numel():  # has no largest element, for the norm of order inf
        return values.new_zeros((), dtype=dtype)
    of_values: Tensor = torch.linalg.vector_norm(values, norm_type)
    return of_values
