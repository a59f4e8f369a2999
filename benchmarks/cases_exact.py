"""Cases of ``sparse="exact"``, beside lazy steps."""

from .bars import relative_time
from .cases import FRONT_ENDS, IDS, ROWS, growth, table_title
from .harness import SECONDS_FOR_MEMORY, Case, Contestant
from .oracle import ADAMAX
from .workloads import Sparse

EXACT, LAZY = "exact: lookup and step", "lazy step"

# The time relative to a lazy step: the upper quartile that was recorded with the kernels
# before the native core.
_RECORDED = {
    "numpy": {"uniform": (2.32, 2.09, 1.94), "zipf": (2.47, 1.46, 1.61)},
    "torch": {"uniform": (1.74, 2.08, 0.99), "zipf": (2.06, 1.40, 1.58)},
    "jax": {"uniform": (1.90, 2.09, 2.12), "zipf": (2.43, 1.92, 1.89)},
}


def _exact(part: str, work: Sparse, name: str = EXACT) -> Contestant:
    return Contestant(name, FRONT_ENDS[part].exact, work, ADAMAX, ours=True)


def _beside_lazy(part: str, ids: str, size: str, recorded: float) -> Case:
    work = Sparse(ROWS[size], ids)
    return Case(
        f"exact-{part}-{ids}-{size}",
        f"{part}: {table_title(ids, size)}",
        (_exact(part, work), FRONT_ENDS[part].contestant(work, LAZY)),
        (relative_time(EXACT, (LAZY,), hot=recorded),),
        settle=SECONDS_FOR_MEMORY,
        environment=FRONT_ENDS[part].environment,
    )


def _growth(part: str) -> Case:
    return growth(
        f"exact-{part}-growth",
        f"{part}: {table_title('uniform')}",
        lambda work, size: _exact(part, work, f"{EXACT}, {size}"),
        {size: Sparse(ROWS[size]) for size in ("1e5", "1e7")},
        environment=FRONT_ENDS[part].environment,
    )


CASES = (
    *(
        _beside_lazy(part, ids, size, recorded)
        for part in FRONT_ENDS
        for ids in IDS
        for size, recorded in zip(ROWS, _RECORDED[part][ids], strict=True)
    ),
    *map(_growth, FRONT_ENDS),
)
