"""Cases of the JAX front end, ``adamax.jax``: whole steps, and updates that are applied."""

from functools import partial

from .contestants import MemoryLimit
from .contestants_jax import Jax
from .harness import SECONDS_FOR_MEMORY, Case, Contestant, CostsAtMost, Faster
from .oracle import ADAMAX, LAZY_ADAMAX, MOVE, Rule
from .workloads import ROWS, Dense, Sparse

STEP = "adamax.jax (step)"
UPDATE = "adamax.jax (update)"
OPTAX = "optax.adamax"
LIMIT = "memory limit"


_MAKE = {
    STEP: partial(Jax, optimizer="adamax.jax.adamax", method="step"),
    UPDATE: partial(Jax, optimizer="adamax.jax.adamax"),
    OPTAX: partial(Jax, optimizer="optax.adamax", dense=True),
}


def _contestant(way: str, work: Dense | Sparse, rule: Rule, name: str = "") -> Contestant:
    return Contestant(name or way, _MAKE[way], work, rule, ours=way != OPTAX)


def _beside_optax(rows: str) -> Case:
    table = Sparse(ROWS[rows])
    return Case(
        f"jax-sparse-{rows}",
        f"4096 uniform ids into rows of 64, table of {rows} rows",
        (
            _contestant(STEP, table, LAZY_ADAMAX),
            _contestant(UPDATE, table, LAZY_ADAMAX),
            _contestant(OPTAX, table, ADAMAX),
        ),
        (Faster(STEP, (OPTAX,), 20), Faster(UPDATE, (OPTAX,), 20)),
        rounds=11,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
        note="optax has no gradients of rows: it gets the dense gradient, which is made "
        "outside of what is measured, and moves all rows.",
    )


def _flat(way: str, name: str) -> Case:
    names = {size: f"{way}, {size} rows" for size in ROWS}
    return Case(
        name,
        "4096 uniform ids into rows of 64, tables of 1e5 to 1e7 rows",
        tuple(
            _contestant(way, Sparse(rows), LAZY_ADAMAX, names[size])
            for size, rows in ROWS.items()
        ),
        (CostsAtMost(names["1e7"], names["1e5"], 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


_DENSE = Dense(arrays=1, length=32 << 20)

CASES = (
    Case(
        "jax-dense",
        "One array of 32 Mi float32, jitted and donated",
        (
            *(_contestant(way, _DENSE, ADAMAX) for way in (STEP, UPDATE, OPTAX)),
            Contestant(LIMIT, MemoryLimit, _DENSE, MOVE),
        ),
        (
            Faster(STEP, (OPTAX,), 1.0),
            Faster(UPDATE, (OPTAX,), 1.0),
            Faster(STEP, (LIMIT,), 0.75),
        ),
        rounds=15,
        steps=3,
        note="Of the updates of both, XLA makes the same three passes over memory.",
    ),
    _beside_optax("1e6"),
    _flat(STEP, "jax-sparse-flat"),
    _flat(UPDATE, "jax-sparse-flat-update"),
)
