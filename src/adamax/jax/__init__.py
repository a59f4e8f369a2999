"""Adamax for JAX: a transformation of optax, for whole arrays and for rows of tables.

>>> import jax.numpy as jnp
>>> from adamax.jax import adamax
>>> optimizer = adamax(learning_rate=0.1)
>>> params = jnp.ones(2)
>>> params, state = optimizer.step(params, optimizer.init(params), jnp.array([1.0, 0.0]))
>>> params
Array([0.9, 1. ], dtype=float32)
"""

import importlib
from typing import TYPE_CHECKING, Any

from .gradients import lookup, value_and_sparse_grad
from .rows import IndexedSlices, sum_repeats

if TYPE_CHECKING:
    from .optimizer import Adamax, adamax, scale_by_adamax
    from .state import CompactState, convert_state
    from .transform import apply_updates, global_norm, on_rows, psum

__all__ = [
    "Adamax",
    "CompactState",
    "IndexedSlices",
    "adamax",
    "apply_updates",
    "convert_state",
    "global_norm",
    "lookup",
    "on_rows",
    "psum",
    "scale_by_adamax",
    "sum_repeats",
    "value_and_sparse_grad",
]

# These need optax, which Keras, on the rest, does without.
_NEEDING_OPTAX = {
    "Adamax": "optimizer",
    "CompactState": "state",
    "adamax": "optimizer",
    "apply_updates": "transform",
    "convert_state": "state",
    "global_norm": "transform",
    "on_rows": "transform",
    "psum": "transform",
    "scale_by_adamax": "optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDING_OPTAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_NEEDING_OPTAX[name]}", __name__)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
