"""Cases of ``sparse="exact"``, beside lazy steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

from . import contestants, contestants_jax
from .harness import SECONDS_FOR_MEMORY, Case, Contestant, CostsAtMost
from .oracle import ADAMAX, LAZY_ADAMAX
from .workloads import ROWS, Sparse

EXACT, LAZY = "exact: lookup and step", "lazy step"
# Lazy steps and exact ones, by front end.
MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "numpy": (contestants.NumpyAdamax, contestants.NumpyExact),
    "torch": (
        partial(contestants.Torch, optimizer="adamax.torch.Adamax"),
        contestants.TorchExact,
    ),
    "jax": (
        partial(contestants_jax.Jax, optimizer="adamax.jax.adamax", method="step"),
        contestants_jax.JaxExact,
    ),
}


def _exact(front_end: str, work: Sparse, name: str = EXACT) -> Contestant:
    return Contestant(name, MAKERS[front_end][1], work, ADAMAX, ours=True)


def _beside_lazy(front_end: str, size: str, zipf: bool) -> Case:
    work = Sparse(ROWS[size], zipf=zipf)
    kind = "Zipf" if zipf else "uniform"
    return Case(
        f"exact-{front_end}-{kind.lower()}-{size}",
        f"{front_end}: 4096 {kind} ids into rows of 64, table of {size} rows",
        (
            _exact(front_end, work),
            Contestant(LAZY, MAKERS[front_end][0], work, LAZY_ADAMAX, ours=True),
        ),
        (CostsAtMost(EXACT, LAZY, 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


def _flat(front_end: str) -> Case:
    names = {size: f"{EXACT}, {size} rows" for size in ("1e5", "1e7")}
    return Case(
        f"exact-{front_end}-flat",
        f"{front_end}: 4096 uniform ids into rows of 64, by size of the table",
        tuple(_exact(front_end, Sparse(ROWS[size]), names[size]) for size in names),
        (CostsAtMost(names["1e7"], names["1e5"], 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


CASES = (
    *(
        _beside_lazy(front_end, size, zipf)
        for front_end in MAKERS
        for size in ROWS
        for zipf in (False, True)
    ),
    *map(_flat, MAKERS),
)
