"""Cases of the PyTorch front end on a GPU: ``adamax.torch.Adamax`` with Triton kernels."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .bars import COLD, Bar, most_memory, speed
from .cases import (
    FOREACH,
    FUSED_ADAM,
    ROWS,
    SPARSE_ADAM_OF_TORCH,
    FrontEnd,
    dense_peers,
    growth,
    sparse_peer,
)
from .contestants_cuda import GPU_MEMORY, Copy, TorchOnGpu
from .harness import Case, Contestant
from .workloads import Dense, Sparse

_MAKE = partial(TorchOnGpu, optimizer="adamax.torch.Adamax", fused=True)
OURS = FrontEnd("adamax.torch on the GPU", _MAKE, exact=_MAKE)
COPY = "copy of the same bytes"

_TABLES = {size: Sparse(rows, number=65536, width=128) for size, rows in ROWS.items()}
_TITLE = "65536 uniform ids into rows of 128"


@dataclass(frozen=True)
class CaseOnGpu(Case):
    @property
    def memory(self) -> int:
        """Of the machine itself, which holds the data of one contestant at a time."""
        return max(contestant.work.memory for contestant in self.contestants)


def _beside_peers(
    name: str, title: str, work: Dense | Sparse, *bars: Bar, **counts: Any
) -> Case:
    peers = (
        dense_peers(work, TorchOnGpu)
        if isinstance(work, Dense)
        else (sparse_peer(work, TorchOnGpu),)
    )
    copy = Contestant(COPY, Copy, work, None)
    return CaseOnGpu(name, title, (OURS.contestant(work), *peers, copy), bars, **counts)


def _memory() -> Case:
    table = _TABLES["1e7"]
    return CaseOnGpu(
        "cuda-memory",
        f"{_TITLE}, table of 1e7 rows (15 GB with its state)",
        (
            OURS.contestant(table, meter=GPU_MEMORY),
            replace(sparse_peer(table, TorchOnGpu), meter=GPU_MEMORY),
        ),
        (most_memory(OURS.name, cold=16e6),),
        rounds=5,
        steps=1,
        ways=(COLD,),
    )


CASES = (
    _beside_peers(
        "cuda-dense",
        "One parameter of 256 Mi float32",
        Dense(arrays=1, length=256 << 20),
        speed(OURS.name, (FOREACH,), hot=2.5),
        speed(OURS.name, (FUSED_ADAM,), hot=1.0),
        speed(OURS.name, (COPY,), hot=0.9),
        rounds=9,
        steps=1,
    ),
    _beside_peers(
        "cuda-many-4096",
        "300 parameters of 4096 float32",
        Dense(arrays=300, length=4096),
        speed(OURS.name, (FUSED_ADAM,), hot=1.0),
        rounds=31,
    ),
    _beside_peers(
        "cuda-sparse-1e7",
        f"{_TITLE}, table of 1e7 rows",
        _TABLES["1e7"],
        speed(OURS.name, (SPARSE_ADAM_OF_TORCH,), hot=5),
        speed(OURS.name, (COPY,), hot=0.6),
        steps=3,
    ),
    _beside_peers(
        "cuda-sparse-zipf-1e7",
        "65536 Zipf ids (some thousands of them one) into rows of 128, table of 1e7 rows",
        replace(_TABLES["1e7"], ids="zipf"),
        speed(OURS.name, (SPARSE_ADAM_OF_TORCH,), hot=5),
        steps=3,
    ),
    growth(
        "cuda-growth",
        _TITLE,
        lambda table, size: OURS.contestant(table, f"{OURS.name}, {size}"),
        _TABLES,
        kind=CaseOnGpu,
        steps=3,
    ),
    _memory(),
)
