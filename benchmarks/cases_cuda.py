"""Cases of the PyTorch front end on a GPU: ``adamax.torch.Adamax`` with Triton kernels."""

from dataclasses import dataclass
from functools import partial

from .contestants_cuda import GPU_MEMORY, Copy, TorchOnGpu
from .harness import Bar, Below, Case, Contestant, CostsAtMost, Faster
from .oracle import ADAM, ADAMAX, LAZY_ADAMAX, SPARSE_ADAM
from .torch_peers import FOREACH, FUSED_ADAM, SPARSE
from .workloads import ROWS, Dense, Sparse

OURS = "adamax.torch on the GPU"
COPY = "copy of the same bytes"

_OURS = partial(TorchOnGpu, optimizer="adamax.torch.Adamax", fused=True)
_FOREACH = partial(TorchOnGpu, optimizer="torch.optim.Adamax", foreach=True)
_FUSED_ADAM = partial(TorchOnGpu, optimizer="torch.optim.Adam", fused=True)
_SPARSE_ADAM = partial(TorchOnGpu, optimizer="torch.optim.SparseAdam")


@dataclass(frozen=True)
class CaseOnGpu(Case):
    @property
    def memory(self) -> int:
        """Of the machine itself, which holds the data of one contestant at a time."""
        return max(contestant.work.memory for contestant in self.contestants)


def _dense(
    name: str, title: str, work: Dense, bars: tuple[Bar, ...], **counts: int
) -> Case:
    contestants = (
        Contestant(OURS, _OURS, work, ADAMAX, ours=True),
        Contestant(FOREACH, _FOREACH, work, ADAMAX),
        Contestant(FUSED_ADAM, _FUSED_ADAM, work, ADAM),
        Contestant(COPY, Copy, work, None),
    )
    return CaseOnGpu(name, title, contestants, bars, **counts)


def _table(rows: int, zipf: bool = False) -> Sparse:
    return Sparse(rows, ids=65536, width=128, zipf=zipf)


def _sparse(name: str, title: str, table: Sparse, bars: tuple[Bar, ...]) -> Case:
    contestants = (
        Contestant(OURS, _OURS, table, LAZY_ADAMAX, ours=True),
        Contestant(SPARSE, _SPARSE_ADAM, table, SPARSE_ADAM),
        Contestant(COPY, Copy, table, None),
    )
    return CaseOnGpu(name, title, contestants, bars, rounds=21, steps=4)


def _flat() -> Case:
    names = {size: f"{OURS}, {size} rows" for size in ROWS}
    contestants = [
        Contestant(names[size], _OURS, _table(rows), LAZY_ADAMAX, ours=True)
        for size, rows in ROWS.items()
    ]
    return CaseOnGpu(
        "cuda-sparse-flat",
        "65536 uniform ids into rows of 128, tables of 1e5 to 1e7 rows",
        tuple(contestants),
        (CostsAtMost(names["1e7"], names["1e5"], 2.5),),
        rounds=21,
        steps=4,
    )


def _memory() -> Case:
    table = _table(ROWS["1e7"])
    return CaseOnGpu(
        "cuda-sparse-memory",
        "65536 uniform ids into rows of 128, table of 1e7 rows (15 GB with its state)",
        (
            Contestant(OURS, _OURS, table, LAZY_ADAMAX, ours=True, meter=GPU_MEMORY),
            Contestant(SPARSE, _SPARSE_ADAM, table, SPARSE_ADAM, meter=GPU_MEMORY),
        ),
        (Below(OURS, 16e6, GPU_MEMORY),),
        rounds=5,
    )


CASES = (
    _dense(
        "cuda-dense",
        "One parameter of 256 Mi float32",
        Dense(arrays=1, length=256 << 20),
        (
            Faster(OURS, (FOREACH,), 2.5),
            Faster(OURS, (FUSED_ADAM,), 1.0),
            Faster(OURS, (COPY,), 0.9),
        ),
        rounds=9,
        steps=2,
    ),
    _dense(
        "cuda-many-4096",
        "300 parameters of 4096 float32",
        Dense(arrays=300, length=4096),
        (Faster(OURS, (FUSED_ADAM,), 1.0),),
        rounds=31,
        steps=6,
    ),
    _sparse(
        "cuda-sparse-1e7",
        "65536 uniform ids into rows of 128, table of 1e7 rows",
        _table(ROWS["1e7"]),
        (Faster(OURS, (SPARSE,), 5), Faster(OURS, (COPY,), 0.6)),
    ),
    _sparse(
        "cuda-sparse-zipf-1e7",
        "65536 Zipf ids (some thousands of them one) into rows of 128, table of 1e7 rows",
        _table(ROWS["1e7"], zipf=True),
        (Faster(OURS, (SPARSE,), 5),),
    ),
    _flat(),
    _memory(),
)
