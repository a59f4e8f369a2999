"""What this front end uses of JAX and optax that is private or may change.

Seen in jax and jaxlib 0.10.2 and optax 0.2.8. Where something private is missing, the
function here says what happens without it.
"""

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.extend.core
import jax.extend.random
import jax.ffi
import jax.numpy as jnp
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

Primitive = jax.extend.core.Primitive


def trace_state() -> Any:
    """Which transformations of JAX this is called in, to be compared."""
    state: Any = jax.extend.core.get_opaque_trace_state
    return state(convention="flax")


def is_for_one_device(axis_context: Any) -> bool:
    """Whether what is lowered runs on one device, with all of each array."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        mesh = axis_context.mesh
        return bool(mesh.size == 1 or set(axis_context.manual_axes) == set(mesh.axis_names))
    return isinstance(axis_context, mlir.ShardingContext) and axis_context.num_devices == 1


def is_varying(array: Any, axis_name: Any) -> bool:
    """Whether ``jax.shard_map`` keeps track of ``array`` differing along a mesh axis."""
    aval = jax.typeof(array)
    axes = getattr(getattr(aval, "mat", aval), "varying", getattr(aval, "vma", ()))
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return not set(names).isdisjoint(axes)


def is_placeholder(params: Any) -> bool:
    """Whether ``optax.tree_map_params`` asks which parts of a state are like parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"


def register_ffi_target(name: str, handler: Any) -> None:
    """``jax.ffi.register_ffi_target`` for CPUs, which needs no backend and fails at once.

    The public function keeps a handler until there is a backend, which does not start where
    XLA then refuses the handler. It is used where the private one is missing.
    """
    client = importlib.import_module("jaxlib.xla_client")
    try:
        register = client._xla.register_custom_call_target
        traits = client.CustomCallTargetTraits.DEFAULT
    except AttributeError:
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    else:
        register(name, handler, "cpu", 1, traits)


def allow_in_exports(targets: Iterable[str]) -> None:
    """Let ``jax.export`` save programs with these custom calls, and with row ids.

    Where that is not possible, it asks for a ``DisabledSafetyCheck.custom_call`` of each.
    """
    with contextlib.suppress(ImportError, AttributeError):
        export = importlib.import_module("jax._src.export._export")
        export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE.update(targets)
    with contextlib.suppress(ImportError, AttributeError):
        serialization = importlib.import_module("jax._src.export.serialization")
        dtype = jax.eval_shape(row_ids, jax.ShapeDtypeStruct((0,), jnp.int32)).dtype
        serialization.register_dtype_kind(dtype, _KIND_OF_ROW_IDS)


# --- Row ids -----------------------------------------------------------------------------

# JAX refuses arithmetic on keys of random numbers. Row ids are keys of a generator of their
# own, whose tag is a part of what JAX then says.
_TAG = "row ids of an IndexedSlices: use its operators, adamax.jax.on_rows or psum"
_KIND_OF_ROW_IDS = 120  # in files of jax.export, where JAX counts from 0


def _no_random_numbers(*args: Any) -> Any:
    raise TypeError("row ids are not keys of random numbers")


_GENERATOR = jax.extend.random.define_prng_impl(
    key_shape=(1,),
    **dict.fromkeys(("seed", "split", "random_bits", "fold_in"), _no_random_numbers),
    name="adamax_row_ids",
    tag=_TAG,
)


def row_ids(numbers: jax.Array) -> jax.Array:
    """int32 numbers of rows as row ids; those made of zeros are -1, which is no row."""
    words = jax.lax.bitcast_convert_type(numbers, jnp.uint32) + jnp.uint32(1)
    return jax.random.wrap_key_data(words[..., None], impl=_GENERATOR)


def numbers_of(ids: jax.Array) -> jax.Array:
    """The other way round."""
    words = jax.random.key_data(ids)[..., 0] - jnp.uint32(1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def is_row_ids(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
