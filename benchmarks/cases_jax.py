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


# The C library then asks for huge pages for all that it allocates, and so for XLA's arrays.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _flat(way: str, name: str, *, huge_pages: bool) -> Case:
    names = {size: f"{way}, {size} rows" for size in ROWS}
    bar = CostsAtMost(names["1e7"], names["1e5"], 2.5)
    pages = "huge pages" if huge_pages else "pages of 4 KiB"
    return Case(
        name,
        f"4096 uniform ids into rows of 64, tables of 1e5 to 1e7 rows in {pages}",
        tuple(
            _contestant(way, Sparse(rows), LAZY_ADAMAX, names[size])
            for size, rows in ROWS.items()
        ),
        (bar,) if huge_pages else (),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
        environment=_HUGE_PAGES if huge_pages else {},
        note="In huge pages by GLIBC_TUNABLES=glibc.malloc.hugetlb=1."
        if huge_pages
        else "As memory is where nobody asks for huge pages; not judged.",
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
    _flat(STEP, "jax-sparse-flat", huge_pages=True),
    _flat(UPDATE, "jax-sparse-flat-update", huge_pages=True),
    _flat(STEP, "jax-sparse-flat-small-pages", huge_pages=False),
)
