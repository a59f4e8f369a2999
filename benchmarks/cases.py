"""Cases of the NumPy and PyTorch front ends, and what the cases of all parts share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from .bars import COLD, most_memory, relative_time, seconds, seconds_more, speed
from .contestants import (
    NumpyAdamax,
    NumpyExact,
    Program,
    Torch,
    TorchExact,
    TorchWithState,
    copy_in_torch,
)
from .contestants_jax import Jax, JaxExact
from .contestants_keras import TensorFlow
from .harness import SECONDS_FOR_MEMORY, THREADS, Case, Contestant
from .limits import DensePass, RowsPass
from .meters import GROWTH_OF_PEAK, SECONDS, Meter
from .oracle import ADAM, ADAMAX, LAZY_ADAMAX, MOVE, MOVE_ROWS, SPARSE_ADAM, Array
from .workloads import Dense, NewProcess, Sparse, Work

FOREACH = "torch Adamax (foreach)"
FOR_LOOP = "torch Adamax (for loop)"
FUSED_ADAM = "torch Adam (fused)"
SPARSE_ADAM_OF_TORCH = "torch SparseAdam"
LIMIT = "speed of memory"

ROWS = {"1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000}  # of tables
IDS = ("uniform", "zipf")
TENSORFLOW = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass(frozen=True)
class FrontEnd:
    """What results call a front end, and how its contestants are made."""

    name: str
    make: Callable[..., Any]
    exact: Callable[..., Any]
    copy: Callable[[Array], Array] = np.copy  # of an array, in the framework's memory
    environment: Mapping[str, str] = field(default_factory=dict)

    def contestant(self, work: Work, name: str = "", meter: Meter = SECONDS) -> Contestant:
        rule = LAZY_ADAMAX if isinstance(work, Sparse) else ADAMAX
        return Contestant(name or self.name, self.make, work, rule, ours=True, meter=meter)


FRONT_ENDS = {
    "numpy": FrontEnd("adamax", NumpyAdamax, NumpyExact),
    "torch": FrontEnd(
        "adamax.torch",
        partial(Torch, optimizer="adamax.torch.Adamax"),
        TorchExact,
        copy_in_torch,
    ),
    "jax": FrontEnd(
        "adamax.jax (step)",
        partial(Jax, optimizer="adamax.jax.adamax", method="step"),
        JaxExact,
        environment={"NPROC": str(THREADS)},  # of XLA's thread pool
    ),
}


def dense_peers(work: Dense, torch: Callable[..., Any] = Torch) -> tuple[Contestant, ...]:
    adamax = partial(torch, optimizer="torch.optim.Adamax", foreach=True)
    adam = partial(torch, optimizer="torch.optim.Adam", fused=True)
    return Contestant(FOREACH, adamax, work, ADAMAX), Contestant(
        FUSED_ADAM, adam, work, ADAM
    )


def sparse_peer(work: Sparse, torch: Callable[..., Any] = Torch) -> Contestant:
    make = partial(torch, optimizer="torch.optim.SparseAdam")
    return Contestant(SPARSE_ADAM_OF_TORCH, make, work, SPARSE_ADAM)


def table_title(ids: str, size: str = "") -> str:
    title = f"4096 {ids.replace('zipf', 'Zipf')} ids into rows of 64"
    return f"{title}, table of {size} rows" if size else title


def growth(
    name: str,
    title: str,
    contestant: Callable[[Sparse, str], Contestant],
    tables: Mapping[str, Sparse],
    *,
    judged: bool = True,
    huge_pages: bool | None = None,
    kind: type[Case] = Case,
    **more: Any,
) -> Case:
    """How the time of a step grows with the table, and what memory has to do with it.

    ``contestant`` is given a table and its size in words.
    """
    on_cpu = kind is Case
    of = {size: contestant(table, f"{size} rows") for size, table in tables.items()}
    first, *_, last = of
    limits = (
        Contestant(f"{LIMIT}, {size} rows", RowsPass, tables[size], MOVE_ROWS)
        for size in (first, last)
        if on_cpu
    )
    bar = relative_time(of[last].name, (of[first].name,), hot=2.5, cold=2.5)
    pages = {None: "", True: ", huge pages on", False: ", huge pages off"}[huge_pages]
    return kind(
        name + {None: "", True: "-huge-pages", False: "-small-pages"}[huge_pages],
        f"{title}, by size of the table{pages}",
        (*of.values(), *limits),
        (bar,) if judged else (),
        settle=SECONDS_FOR_MEMORY,
        huge_pages=huge_pages,
        count_pages=on_cpu,
        note=f"*{LIMIT}* moves the same rows and computes nothing." if on_cpu else "",
        **more,
    )


def _dense(part: str) -> Case:
    ours, work = FRONT_ENDS[part], Dense(arrays=1, length=32 << 20)
    loop = partial(Torch, optimizer="torch.optim.Adamax", foreach=False)
    return Case(
        f"{part}-dense",
        "One parameter of 32 Mi float32",
        (
            ours.contestant(work),
            *dense_peers(work),
            Contestant(FOR_LOOP, loop, work, ADAMAX),
            Contestant(LIMIT, partial(DensePass, copy=ours.copy), work, MOVE),
        ),
        (
            speed(ours.name, (FOREACH, FOR_LOOP), hot=4.5, cold=4.5),
            speed(ours.name, (FUSED_ADAM,), hot=1.25, cold=1.25),
            speed(ours.name, (LIMIT,), hot=0.95, cold=0.95),
        ),
        rounds=15,
        steps=2,
    )


# Of many parameters, by their length: the speed relative to FOREACH, hot and cold, and that
# relative to FUSED_ADAM.
_MANY = {
    64: ((20, 9), (10, 4)),
    4096: ((7, 6), (2.3, 2.5)),
    65536: ((4, 3.5), (1.2, 1.1)),
}


def _many(part: str, length: int) -> Case:
    ours, work = FRONT_ENDS[part], Dense(arrays=300, length=length)
    foreach, fused = _MANY[length]
    return Case(
        f"{part}-many-{length}",
        f"300 parameters of {length} float32",
        (ours.contestant(work), *dense_peers(work)),
        (speed(ours.name, (FOREACH,), *foreach), speed(ours.name, (FUSED_ADAM,), *fused)),
        steps=5 if length < 65536 else 2,
    )


def _sparse(part: str, ids: str, size: str) -> Case:
    ours, work = FRONT_ENDS[part], Sparse(ROWS[size], ids)
    return Case(
        f"{part}-sparse-{ids}-{size}",
        table_title(ids, size),
        (ours.contestant(work), sparse_peer(work)),
        (speed(ours.name, (SPARSE_ADAM_OF_TORCH,), hot=8, cold=4),),
        settle=SECONDS_FOR_MEMORY,
    )


def _growth(part: str, ids: str, huge_pages: bool | None = None) -> Case:
    ours = FRONT_ENDS[part]
    return growth(
        f"{part}-growth-{ids}",
        table_title(ids),
        lambda table, size: ours.contestant(table, f"{ours.name}, {size}"),
        {size: Sparse(rows, ids) for size, rows in ROWS.items()},
        judged=huge_pages is None,
        huge_pages=huge_pages,
    )


def _memory(part: str) -> Case:
    ours, table = FRONT_ENDS[part], Sparse(ROWS["1e7"])
    contestant = ours.contestant(table, meter=GROWTH_OF_PEAK)
    if part == "torch":
        contestant = replace(contestant, make=TorchWithState)
    return Case(
        f"{part}-memory",
        f"Growth of peak memory, a table of 1e7 rows ({table.table_bytes / 1e6:,.0f} MB)",
        (contestant,),
        (most_memory(ours.name, cold=0.01 * table.table_bytes),),
        rounds=100,
        warm_ups=0,  # the first step counts
        steps=1,
        ways=(COLD,),
    )


def _beside_keras(ids: str) -> Case:
    """Keras' rule for a sparse gradient moves all rows of the table."""
    table, ours = Sparse(ROWS["1e6"], ids), FRONT_ENDS["numpy"]
    peers = {
        f"{package} Adamax{' (XLA)' if xla else ''}": partial(
            TensorFlow, optimizer=f"{package}.optimizers.Adamax", xla=xla
        )
        for xla in (False, True)
        for package in ("tf_keras", "keras")
    }
    return Case(
        f"numpy-keras-{ids}",
        f"{table_title(ids, '1e6')}, beside Keras",
        (
            ours.contestant(table),
            *(Contestant(name, make, table, ADAMAX) for name, make in peers.items()),
        ),
        tuple(speed(ours.name, (name,), hot=300) for name in list(peers)[:2]),
        rounds=7,
        steps=2,
        settle=SECONDS_FOR_MEMORY,
        environment=TENSORFLOW,
        note="The error of keras is real: where ids repeat, its norm takes the sum of "
        "|g|, not |the sum of g|.",
    )


def _of_part(part: str) -> tuple[Case, ...]:
    return (
        _dense(part),
        *(_many(part, length) for length in _MANY),
        *(_sparse(part, ids, size) for ids in IDS for size in ROWS),
        *(_growth(part, "uniform", huge_pages) for huge_pages in (None, True, False)),
        _growth(part, "zipf"),
        _memory(part),
    )


NUMPY = (*_of_part("numpy"), *map(_beside_keras, IDS))
TORCH = _of_part("torch")

_NUMPY_STEP = """
import numpy as np
from adamax import Adamax, IndexedSlices
dense, table = np.zeros(1000, np.float32), np.zeros((100, 8), np.float32)
rows = IndexedSlices(np.ones((3, 8), np.float32), np.array([7, 5, 7]))
Adamax(learning_rate=0.5).apply_gradients([(np.ones_like(dense), dense), (rows, table)])
assert np.allclose(dense, -0.5) and np.allclose(table[[5, 7]], -0.5)
"""
_TORCH_STEP = """
import torch
from {} import Adamax
dense = torch.zeros(1000, requires_grad=True)
dense.grad = torch.ones(1000)
Adamax([dense], lr=0.5).step()
assert dense.isclose(torch.tensor(-0.5)).all()
"""
_PROGRAMS = {
    "import numpy": "import numpy",
    "import adamax": "import adamax",
    "NumPy": _NUMPY_STEP,
    "import torch": "import torch",
    "PyTorch": _TORCH_STEP.format("adamax.torch"),
    "torch.optim.Adamax": _TORCH_STEP.format("torch.optim"),
}


def _startup() -> Case:
    programs = {name: partial(Program, program=text) for name, text in _PROGRAMS.items()}
    for name in ("import adamax", "NumPy", "PyTorch"):
        programs[f"{name}, nothing cached"] = partial(programs[name], cached=False)
    return Case(
        "startup",
        "A new process, from the start of the interpreter to the end of the first step",
        tuple(
            Contestant(name, make, NewProcess(), rule=None)
            for name, make in programs.items()
        ),
        (
            seconds("NumPy, nothing cached", cold=0.4),
            seconds_more("import adamax", ("import numpy",), cold=0.06),
        ),
        rounds=9,
        warm_ups=1,
        steps=1,
        ways=(COLD,),
        note="*Nothing cached*: there is no bytecode of adamax. In NumPy the step is of a "
        "parameter and of rows. Of torch, a first step imports more than `import torch`.",
    )


STARTUP = (_startup(),)
