"""Cases of the Keras front end, ``adamax.keras.Adamax``."""

from functools import partial

from .contestants_keras import Fit, KerasJax, KerasTorch, TensorFlow
from .harness import SECONDS_FOR_MEMORY, Case, Contestant, CostsAtMost, Entry, Faster
from .oracle import ADAMAX, LAZY_ADAMAX
from .workloads import Dense, Epoch, Sparse

OURS = "adamax.keras"
KERAS = "keras Adamax"
LEGACY = "tf_keras legacy Adamax"

_OURS = "adamax.keras.Adamax"
_KERAS = "keras.optimizers.Adamax"
_LEGACY = "tf_keras.optimizers.legacy.Adamax"

_ROWS = {"2e4": 20_000, "2e5": 200_000, "2e6": 2_000_000, "2e7": 20_000_000}
_TABLES = {size: Sparse(rows, ids=1024, width=32) for size, rows in _ROWS.items()}


def _ours(table: Sparse, name: str = OURS) -> Contestant:
    return Contestant(name, partial(TensorFlow, optimizer=_OURS), table, LAZY_ADAMAX, True)


def _flat() -> Case:
    names = {size: f"{OURS}, {size} rows" for size in _TABLES}
    return Case(
        "keras-sparse",
        "TensorFlow: 1024 ids into rows of 32, by size of the table",
        tuple(_ours(table, names[size]) for size, table in _TABLES.items()),
        (CostsAtMost(names["2e7"], names["2e4"], 2.5),),
        rounds=21,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


def _beside_peers(size: str) -> Case:
    table = _TABLES[size]
    make = partial(TensorFlow, optimizer=_LEGACY)
    contestants = [_ours(table), Contestant(LEGACY, make, table, LAZY_ADAMAX)]
    bars = [Faster(OURS, (LEGACY,), 1 / 1.3)]
    if size == "2e6":
        make = partial(TensorFlow, optimizer=_KERAS)
        contestants.append(Contestant(KERAS, make, table, ADAMAX))
        bars.append(Faster(OURS, (KERAS,), 100))
    return Case(
        f"keras-sparse-{size}",
        f"TensorFlow: 1024 ids into rows of 32, table of {size} rows",
        tuple(contestants),
        tuple(bars),
        rounds=15,
        settle=SECONDS_FOR_MEMORY,
        steps=6,
    )


def _dense(name: str, title: str, make: type[Entry], at_least: float) -> Case:
    work = Dense(arrays=1, length=16 << 20)
    contestants = tuple(
        Contestant(who, partial(make, optimizer=optimizer), work, ADAMAX, who == OURS)
        for who, optimizer in {OURS: _OURS, KERAS: _KERAS}.items()
    )
    return Case(
        f"keras-dense-{name}",
        f"{title}: one variable of 16 Mi float32",
        contestants,
        (Faster(OURS, (KERAS,), at_least),),
        rounds=15,
        steps=3,
    )


def _fit() -> Case:
    work = Epoch(rows=2_000_000)
    return Case(
        "keras-fit",
        "TensorFlow: an epoch of model.fit with an Embedding of 2e6 rows of 32",
        tuple(
            Contestant(who, partial(Fit, optimizer=optimizer), work, None, who == OURS)
            for who, optimizer in {OURS: _OURS, KERAS: _KERAS}.items()
        ),
        rounds=5,
        warm_ups=1,
        steps=1,
    )


CASES = (
    _flat(),
    *map(_beside_peers, _TABLES),
    _dense("tensorflow", "TensorFlow", TensorFlow, 2.5),
    _dense("torch", "PyTorch", KerasTorch, 3),
    _dense("jax", "JAX", KerasJax, 1),
    _fit(),
)
