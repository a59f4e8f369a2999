"""Cases of the PyTorch front end, ``adamax.torch.Adamax``."""

from functools import partial

from . import torch_peers
from .contestants import Torch
from .harness import SECONDS_FOR_MEMORY, Case, Contestant, CostsAtMost, Faster
from .oracle import ADAMAX, LAZY_ADAMAX
from .workloads import ROWS, Dense, Sparse

OURS = "adamax.torch"

_ADAMAX = partial(Torch, optimizer="adamax.torch.Adamax")


def _dense(work: Dense) -> tuple[Contestant, ...]:
    ours = Contestant(OURS, _ADAMAX, work, ADAMAX, ours=True)
    return ours, *torch_peers.dense(work)


def _ours(work: Sparse, name: str = OURS) -> Contestant:
    return Contestant(name, _ADAMAX, work, LAZY_ADAMAX, ours=True)


def _many(length: int, at_least: float) -> Case:
    return Case(
        f"torch-many-{length}",
        f"300 parameters of {length} float32",
        _dense(Dense(arrays=300, length=length)),
        (
            Faster(OURS, (torch_peers.FOREACH,), at_least),
            Faster(OURS, (torch_peers.FUSED_ADAM,), 1.0),
        ),
        rounds=21,
        steps=6 if length < 65536 else 3,
    )


def _sparse(size: str) -> Case:
    table = Sparse(ROWS[size])
    return Case(
        f"torch-sparse-{size}",
        f"4096 uniform ids into rows of 64, table of {size} rows",
        (_ours(table), torch_peers.sparse(table)),
        (Faster(OURS, (torch_peers.SPARSE,), 5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


def _flat() -> Case:
    names = {size: f"{OURS}, {size} rows" for size in ROWS}
    return Case(
        "torch-sparse-flat",
        "4096 uniform ids into rows of 64, tables of 1e5 to 1e7 rows",
        tuple(_ours(Sparse(rows), names[size]) for size, rows in ROWS.items()),
        (CostsAtMost(names["1e7"], names["1e5"], 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


CASES = (
    Case(
        "torch-dense",
        "One parameter of 32 Mi float32",
        _dense(Dense(arrays=1, length=32 << 20)),
        (
            Faster(OURS, (torch_peers.FOREACH, torch_peers.FOR_LOOP), 3.3),
            Faster(OURS, (torch_peers.FUSED_ADAM,), 0.95),
        ),
        rounds=15,
        steps=3,
    ),
    _many(64, at_least=5),
    _many(4096, at_least=5),
    _many(65536, at_least=1.8),
    *(_sparse(size) for size in ROWS),
    _flat(),
)
