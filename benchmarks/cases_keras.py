"""Cases of the Keras front end, ``adamax.keras.Adamax``."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .bars import COLD, Bar, speed
from .cases import TENSORFLOW, growth
from .contestants_keras import Fit, KerasJax, KerasTorch, TensorFlow
from .harness import SECONDS_FOR_MEMORY, Case, Contestant
from .oracle import ADAMAX, LAZY_ADAMAX
from .workloads import Dense, Epoch, Sparse

OURS = "adamax.keras"
KERAS = "keras Adamax"
LEGACY = "tf_keras legacy Adamax"

_NAMES = {OURS: "adamax.keras.Adamax", KERAS: "keras.optimizers.Adamax"}
_LEGACY = "tf_keras.optimizers.legacy.Adamax"

_ROWS = {"2e4": 20_000, "2e5": 200_000, "2e6": 2_000_000, "2e7": 20_000_000}
_TABLES = {size: Sparse(rows, number=1024, width=32) for size, rows in _ROWS.items()}

# Limits are the lower quartiles that were recorded with the kernels before the native core.
_BESIDE_LEGACY = {"2e4": 0.80, "2e5": 0.84, "2e6": 0.82, "2e7": 0.82}
_BESIDE_KERAS = {"2e6": 46.2}


def _ours(table: Sparse, name: str = OURS) -> Contestant:
    make = partial(TensorFlow, optimizer=_NAMES[OURS])
    return Contestant(name, make, table, LAZY_ADAMAX, ours=True)


def _sparse(size: str) -> Case:
    table = _TABLES[size]
    make = partial(TensorFlow, optimizer=_LEGACY)
    contestants = [_ours(table), Contestant(LEGACY, make, table, LAZY_ADAMAX)]
    bars: list[Bar] = [speed(OURS, (LEGACY,), hot=_BESIDE_LEGACY[size])]
    if size in _BESIDE_KERAS:
        make = partial(TensorFlow, optimizer=_NAMES[KERAS])
        contestants.append(Contestant(KERAS, make, table, ADAMAX))
        bars.append(speed(OURS, (KERAS,), hot=_BESIDE_KERAS[size]))
    return Case(
        f"keras-sparse-{size}",
        f"TensorFlow: 1024 ids into rows of 32, table of {size} rows",
        tuple(contestants),
        tuple(bars),
        rounds=15,
        settle=SECONDS_FOR_MEMORY,
        environment=TENSORFLOW,
    )


def _dense(backend: str, title: str, make: Callable[..., Any], at_least: float) -> Case:
    work = Dense(arrays=1, length=16 << 20)
    return Case(
        f"keras-dense-{backend}",
        f"{title}: one variable of 16 Mi float32",
        tuple(
            Contestant(who, partial(make, optimizer=optimizer), work, ADAMAX, who == OURS)
            for who, optimizer in _NAMES.items()
        ),
        (speed(OURS, (KERAS,), hot=at_least),),
        rounds=15,
        steps=2,
        environment={**TENSORFLOW, "KERAS_BACKEND": backend},
    )


def _fit() -> Case:
    work = Epoch(rows=2_000_000)
    return Case(
        "keras-fit",
        "TensorFlow: an epoch of model.fit with an Embedding of 2e6 rows of 32",
        tuple(
            Contestant(who, partial(Fit, optimizer=optimizer), work, None, who == OURS)
            for who, optimizer in _NAMES.items()
        ),
        rounds=5,
        warm_ups=1,
        steps=1,
        ways=(COLD,),
        environment=TENSORFLOW,
    )


CASES = (
    growth(
        "keras-growth",
        "TensorFlow: 1024 ids into rows of 32",
        lambda table, size: _ours(table, f"{OURS}, {size}"),
        _TABLES,
        environment=TENSORFLOW,
    ),
    *map(_sparse, _TABLES),
    _dense("tensorflow", "TensorFlow", TensorFlow, 2.5),
    _fit(),
    _dense("torch", "PyTorch", KerasTorch, 13.4),
    _dense("jax", "JAX", KerasJax, 0.98),
)
