"""Cases of the PyTorch front end, ``adamax.torch.Adamax``."""

from functools import partial

from . import contestants
from .harness import SECONDS_FOR_MEMORY, Case, Contestant, CostsAtMost, Faster
from .oracle import ADAM, ADAMAX, LAZY_ADAMAX, SPARSE_ADAM
from .workloads import Dense, Sparse

OURS = "adamax.torch"
FOREACH = "torch Adamax (foreach)"
FOR_LOOP = "torch Adamax (for loop)"
FUSED_ADAM = "torch Adam (fused)"
SPARSE_ADAM_OF_TORCH = "torch SparseAdam"

_ROWS = {"1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000}


def _dense(work: Dense) -> tuple[Contestant, ...]:
    foreach = partial(contestants.torch_adamax, foreach=True)
    for_loop = partial(contestants.torch_adamax, foreach=False)
    return (
        Contestant(OURS, contestants.adamax_torch, work, ADAMAX, ours=True),
        Contestant(FOREACH, foreach, work, ADAMAX),
        Contestant(FOR_LOOP, for_loop, work, ADAMAX),
        Contestant(FUSED_ADAM, contestants.torch_fused_adam, work, ADAM),
    )


def _many(length: int, at_least: float) -> Case:
    return Case(
        f"torch-many-{length}",
        f"300 parameters of {length} float32",
        _dense(Dense(arrays=300, length=length)),
        (Faster(OURS, (FOREACH,), at_least), Faster(OURS, (FUSED_ADAM,), 1.0)),
        rounds=21,
        steps=6 if length < 65536 else 3,
    )


def _sparse(size: str) -> Case:
    table = Sparse(_ROWS[size])
    return Case(
        f"torch-sparse-{size}",
        f"4096 uniform ids into rows of 64, table of {size} rows",
        (
            Contestant(OURS, contestants.adamax_torch, table, LAZY_ADAMAX, ours=True),
            Contestant(
                SPARSE_ADAM_OF_TORCH, contestants.torch_sparse_adam, table, SPARSE_ADAM
            ),
        ),
        (Faster(OURS, (SPARSE_ADAM_OF_TORCH,), 5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


def _flat() -> Case:
    names = {size: f"{OURS}, {size} rows" for size in _ROWS}
    return Case(
        "torch-sparse-flat",
        "4096 uniform ids into rows of 64, tables of 1e5 to 1e7 rows",
        tuple(
            Contestant(
                names[size], contestants.adamax_torch, Sparse(rows), LAZY_ADAMAX, ours=True
            )
            for size, rows in _ROWS.items()
        ),
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
        (Faster(OURS, (FOREACH, FOR_LOOP), 3.3), Faster(OURS, (FUSED_ADAM,), 0.95)),
        rounds=15,
        steps=3,
    ),
    _many(64, at_least=5),
    _many(4096, at_least=5),
    _many(65536, at_least=1.8),
    *(_sparse(size) for size in _ROWS),
    _flat(),
)
