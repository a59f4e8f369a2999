"""Contestants of PyTorch itself, which both front ends are measured beside."""

from functools import partial

from .contestants import Torch
from .harness import Contestant
from .oracle import ADAM, ADAMAX, SPARSE_ADAM
from .workloads import Dense, Sparse

FOREACH = "torch Adamax (foreach)"
FOR_LOOP = "torch Adamax (for loop)"
FUSED_ADAM = "torch Adam (fused)"
SPARSE = "torch SparseAdam"


def dense(work: Dense) -> tuple[Contestant, ...]:
    adamax = partial(Torch, optimizer="torch.optim.Adamax")
    adam = partial(Torch, optimizer="torch.optim.Adam", fused=True)
    return (
        Contestant(FOREACH, partial(adamax, foreach=True), work, ADAMAX),
        Contestant(FOR_LOOP, partial(adamax, foreach=False), work, ADAMAX),
        Contestant(FUSED_ADAM, adam, work, ADAM),
    )


def sparse(work: Sparse) -> Contestant:
    make = partial(Torch, optimizer="torch.optim.SparseAdam")
    return Contestant(SPARSE, make, work, SPARSE_ADAM)
