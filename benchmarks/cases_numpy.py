"""Cases of the NumPy front end, ``adamax.Adamax``."""

from functools import partial
from typing import Any

from . import contestants, torch_peers
from .contestants_keras import TensorFlow
from .harness import SECONDS_FOR_MEMORY, Below, Case, Contestant, CostsAtMost, Faster
from .meters import GROWTH_OF_PEAK, SECONDS, TRACED_PEAK, Meter
from .oracle import ADAMAX, LAZY_ADAMAX, MOVE
from .workloads import ROWS, Dense, Sparse, Startup

OURS = "adamax"
LIMIT = "memory limit"
TF_KERAS = "tf_keras Adamax"
KERAS = "keras Adamax"


def _dense(work: Dense) -> tuple[Contestant, ...]:
    return (
        Contestant(OURS, contestants.NumpyAdamax, work, ADAMAX, ours=True),
        *torch_peers.dense(work),
        Contestant(LIMIT, contestants.MemoryLimit, work, MOVE),
    )


def _ours(work: Sparse, name: str = OURS, meter: Meter = SECONDS) -> Contestant:
    return Contestant(name, contestants.NumpyAdamax, work, LAZY_ADAMAX, True, meter)


def _keras(work: Sparse) -> tuple[Contestant, ...]:
    """Keras' rule for a sparse gradient moves all rows of the table."""
    keras_peers = {
        TF_KERAS: "tf_keras.optimizers.Adamax",
        KERAS: "keras.optimizers.Adamax",
    }
    return tuple(
        Contestant(
            f"{name} (XLA)" if xla else name,
            partial(TensorFlow, optimizer=optimizer, xla=xla),
            work,
            ADAMAX,
        )
        for xla in (False, True)
        for name, optimizer in keras_peers.items()
    )


def _sparse(zipf: bool) -> tuple[Case, ...]:
    kind = "Zipf" if zipf else "uniform"
    name = f"sparse-{kind.lower()}"
    title = f"4096 {kind} ids into rows of 64"
    tables = {size: Sparse(rows, zipf=zipf) for size, rows in ROWS.items()}
    ours = {size: f"{OURS}, {size} rows" for size in tables}
    beside_torch = tuple(
        Case(
            f"{name}-{size}",
            f"{title}, table of {size} rows",
            (_ours(table), torch_peers.sparse(table)),
            (Faster(OURS, (torch_peers.SPARSE,), 5),) if size == "1e6" else (),
            rounds=21,
            settle=SECONDS_FOR_MEMORY,
            steps=6,
        )
        for size, table in tables.items()
    )
    return (
        Case(
            name,
            f"{title}, by size of the table",
            tuple(_ours(table, ours[size]) for size, table in tables.items()),
            (CostsAtMost(ours["1e7"], ours["1e5"], 2.5),),
            rounds=21,
            settle=SECONDS_FOR_MEMORY,
            steps=6,
        ),
        *beside_torch,
        Case(
            f"{name}-keras",
            f"{title}, table of 1e6 rows, Keras",
            (_ours(tables["1e6"]), *_keras(tables["1e6"])),
            (Faster(OURS, (TF_KERAS,), 300), Faster(OURS, (KERAS,), 300)),
            rounds=7,
            settle=SECONDS_FOR_MEMORY,
            steps=5,
            note="The error of keras is real: where ids repeat, its norm takes the sum of "
            "|g|, not |the sum of g|.",
        ),
    )


def _memory() -> Case:
    table = Sparse(ROWS["1e7"])
    resident, allocated = f"{OURS}, resident", f"{OURS}, allocated"
    limit = 0.01 * table.table_bytes
    return Case(
        "sparse-memory",
        f"Memory for sparse steps, table of 1e7 rows ({table.table_bytes / 1e6:,.0f} MB)",
        (_ours(table, resident, GROWTH_OF_PEAK), _ours(table, allocated, TRACED_PEAK)),
        (
            Below(resident, limit, GROWTH_OF_PEAK, worst=True),
            Below(allocated, limit, TRACED_PEAK, worst=True),
        ),
        rounds=100,
        warm_ups=0,  # the first step counts
        steps=1,
    )


def _startup() -> Case:
    work = Startup()
    clipped = {"global_clipnorm": 1e9}
    ways: dict[str, dict[str, Any]] = {
        "plain": {"options": {}, "scipy": False},
        "clipped": {"options": clipped, "scipy": False},
        "plain, beside SciPy": {"options": {}, "scipy": True},
    }
    first, later = "first after installation", "later"
    limits = {first: 10.0, later: 1.0}
    return Case(
        "startup",
        "First step of a process: interpreter, import, a dense and a sparse step",
        tuple(
            Contestant(
                f"{when}, {what}",
                partial(contestants.FirstStep, **arguments, directory=what),
                work,
                rule=None,
                ours=True,
            )
            for what, arguments in ways.items()
            for when in limits
        ),
        tuple(
            Below(f"{when}, {what}", limits[when])
            for what, arguments in ways.items()
            for when in limits
            if not arguments["scipy"]
        ),
        rounds=5,
        warm_ups=1,
        note="Where SciPy is installed Numba imports it, which adamax does not need.",
    )


CASES = (
    Case(
        "dense",
        "One array of 32 Mi float32",
        _dense(Dense(arrays=1, length=32 << 20)),
        (
            Faster(OURS, (torch_peers.FOREACH, torch_peers.FOR_LOOP), 3.3),
            Faster(OURS, (torch_peers.FUSED_ADAM,), 0.95),
            Faster(OURS, (LIMIT,), 0.9),
        ),
        rounds=15,
        steps=3,
    ),
    Case(
        "dense-many",
        "300 arrays of 4096 float32 in one call",
        _dense(Dense(arrays=300, length=4096)),
        (Faster(OURS, (torch_peers.FOREACH,), 5),),
        rounds=21,
        steps=6,
    ),
    *_sparse(zipf=False),
    *_sparse(zipf=True),
    _memory(),
    _startup(),
)
