"""Cases of the JAX front end: whole steps, and updates that are applied."""

from functools import partial

from .bars import speed
from .cases import FRONT_ENDS, LIMIT, ROWS, FrontEnd, growth, table_title
from .contestants_jax import Jax, JaxExact
from .harness import SECONDS_FOR_MEMORY, Case, Contestant
from .limits import DensePass
from .oracle import ADAMAX, MOVE
from .workloads import Dense, Sparse, Work

STEP = FRONT_ENDS["jax"]
UPDATE = FrontEnd(
    "adamax.jax (update)",
    partial(Jax, optimizer="adamax.jax.adamax"),
    JaxExact,
    environment=STEP.environment,
)
OPTAX = "optax.adamax"


def _optax(work: Work) -> Contestant:
    return Contestant(OPTAX, partial(Jax, optimizer=OPTAX, dense=True), work, ADAMAX)


# Limits are the lower quartiles that were recorded with the kernels before the native core,
# where the goal was not higher.
def _dense() -> Case:
    work = Dense(arrays=1, length=32 << 20)
    return Case(
        "jax-dense",
        "One array of 32 Mi float32, jitted and donated",
        (
            STEP.contestant(work),
            UPDATE.contestant(work),
            _optax(work),
            Contestant(LIMIT, DensePass, work, MOVE),
        ),
        (
            speed(STEP.name, (OPTAX,), hot=1.07),
            speed(UPDATE.name, (OPTAX,), hot=0.84),
            speed(STEP.name, (LIMIT,), hot=0.75),
        ),
        rounds=15,
        steps=2,
        environment=STEP.environment,
        note="Of the updates of both, XLA makes the same three passes over memory.",
    )


def _sparse(size: str) -> Case:
    table = Sparse(ROWS[size])
    return Case(
        f"jax-sparse-{size}",
        table_title("uniform", size),
        (STEP.contestant(table), UPDATE.contestant(table), _optax(table)),
        (
            speed(STEP.name, (OPTAX,), hot=38.2),
            speed(UPDATE.name, (OPTAX,), hot=22.0),
        ),
        rounds=11,
        settle=SECONDS_FOR_MEMORY,
        environment=STEP.environment,
        note="optax has no gradients of rows: it gets the dense gradient, which is made "
        "outside of what is measured, and moves all rows.",
    )


def _growth(way: str, of: FrontEnd, *, huge_pages: bool) -> Case:
    return growth(
        f"jax-growth-{way}",
        table_title("uniform"),
        lambda table, size: of.contestant(table, f"{of.name}, {size}"),
        {size: Sparse(rows) for size, rows in ROWS.items()},
        judged=huge_pages,  # JAX does not ask for huge pages: GLIBC_TUNABLES does
        huge_pages=huge_pages,
        environment=STEP.environment,
    )


CASES = (
    _dense(),
    _sparse("1e6"),
    _growth("step", STEP, huge_pages=True),
    _growth("update", UPDATE, huge_pages=True),
    _growth("step", STEP, huge_pages=False),
)
