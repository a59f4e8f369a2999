"""One step on one parameter, for JAX: the rule in operations of JAX, and in one pass.

The pass is a primitive of JAX each for whole arrays and for rows. On a CPU it is lowered to
our own kernels, which XLA calls on its buffers; everywhere else, and where an array is
spread over several devices, to the rule in operations of JAX, which XLA compiles and
partitions.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from ._jax_rows import IndexedSlices, put_rows, sum_repeats, table_rows
from ._kernels import Storage

Three = tuple[jax.Array, jax.Array, jax.Array]


def state_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of ``mu``, ``nu`` and the arithmetic: at least float32."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


def moments(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, one_minus_b1: Any, b2: Any, eps: Any
) -> Three:
    """The rule up to the step size: ``mu / (nu + eps)``, and the new ``mu`` and ``nu``."""
    dtype = state_dtype(mu.dtype)
    gradient, mu = gradient.astype(dtype), mu.astype(dtype)
    mu = mu + one_minus_b1 * (gradient - mu)
    # The maximum of JAX hands on a NaN of either. optax has a complex norm for a complex
    # parameter.
    norm = jnp.maximum(b2 * nu.real.astype(mu.real.dtype), abs(gradient))
    return mu / (norm + eps), mu, norm.astype(dtype)


def stepped(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """The rule in operations of JAX; see :func:`step_array`."""
    step_size, decay, one_minus_b1, b2, eps = (scalars[i] for i in range(5))
    ratio, mu, nu = moments(gradient, mu, nu, one_minus_b1, b2, eps)
    wide = decay * param.astype(ratio.dtype) - step_size * ratio
    return wide.astype(param.dtype), mu, nu


def _stepped_rows(
    param: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    indices: jax.Array,
    values: jax.Array,
    scalars: jax.Array,
) -> Three:
    rows = sum_repeats(IndexedSlices(values, indices), len(param))
    tables = param, mu, nu
    of_rows = [table_rows(table, rows) for table in tables]
    new = stepped(of_rows[0], of_rows[1], of_rows[2], rows.values, scalars)
    param, mu, nu = (
        put_rows(table, rows, values) for table, values in zip(tables, new, strict=True)
    )
    return param, mu, nu


def step_array(
    param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array, scalars: jax.Array
) -> Three:
    """The parameter and its state after a step, of a gradient of its shape.

    ``scalars``: the step size, what the parameter is multiplied by, ``1 - b1``, ``b2`` and
    ``eps``, of the real dtype of the state.
    """
    if _fits(param, mu, nu, gradient):
        return tuple(_array_p.bind(param, mu, nu, gradient, scalars))
    return stepped(param, mu, nu, gradient, scalars)


def step_rows(
    param: jax.Array, mu: jax.Array, nu: jax.Array, rows: IndexedSlices, scalars: jax.Array
) -> Three:
    """The same of a gradient of rows, whose indices are int32."""
    if _fits(param, mu, nu, rows.values):
        return tuple(_rows_p.bind(param, mu, nu, rows.indices, rows.values, scalars))
    return _stepped_rows(param, mu, nu, rows.indices, rows.values, scalars)


def _fits(param: jax.Array, mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> bool:
    """Whether there are kernels for these dtypes."""
    return (
        Storage.of(param.dtype) is not None
        and gradient.dtype == param.dtype
        and mu.dtype == nu.dtype == state_dtype(param.dtype)
    )


# --- The primitives ---------------------------------------------------------------------


def primitive(
    verb: str,
    in_operations: Callable[..., tuple[jax.Array, ...]],
    in_place: int = 3,
    outputs: Callable[..., list[Any]] | None = None,
) -> Any:
    """A primitive that is a verb of ``_kernels/_xla.py``, or operations of JAX.

    Its first ``in_place`` operands are changed and returned; else ``outputs`` tells the
    results by the operands.
    """
    primitive = jax.extend.core.Primitive(f"adamax_{verb}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(outputs or (lambda *avals: list(avals[:in_place])))
    compiled = jax.jit(primitive.bind)

    def impl(*operands: jax.Array) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return in_operations(*operands)
        return compiled(*operands)

    primitive.def_impl(impl)

    by_xla = mlir.lower_fun(in_operations, multiple_results=True)

    def by_kernels(context: Any, *operands: Any) -> Any:
        target = None
        if _is_whole(context.module_context.axis_context):
            target = _target(verb, Storage(str(context.avals_in[0].dtype)))
        if target is None:
            return by_xla(context, *operands)
        aliases = {number: number for number in range(in_place)}
        lowering = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
        return lowering(context, *operands)

    mlir.register_lowering(primitive, by_xla)
    mlir.register_lowering(primitive, by_kernels, platform="cpu")

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jax.jvp(
            in_operations, tuple(primals), tuple(map(ad.instantiate_zeros, tangents))
        )

    def batched(operands: Sequence[Any], axes: Sequence[Any]) -> Any:
        *arrays, of_scalars = axes
        if verb == "dense" and of_scalars is None and None not in arrays:
            # Element by element, so that one more axis is nothing new.
            moved = [jnp.moveaxis(x, i, 0) for x, i in zip(operands, arrays, strict=False)]
            return primitive.bind(*moved, operands[-1]), [0, 0, 0]
        results = jax.vmap(in_operations, in_axes=tuple(axes))(*operands)
        return results, [0] * len(results)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batched
    return primitive


def _is_whole(context: Any) -> bool:
    """Whether what is lowered is for one device, with all of each array."""
    if isinstance(context, mlir.SPMDAxisContext):
        names = set(context.mesh.axis_names)
        return bool(context.mesh.size == 1 or set(context.manual_axes) == names)
    return isinstance(context, mlir.ShardingContext) and context.num_devices == 1


_array_p = primitive("dense", stepped)
_rows_p = primitive("rows", _stepped_rows)


def _target(verb: str, storage: Storage) -> str | None:
    """The name under which XLA knows the kernel, or None without one."""
    with _registering:
        return _registered(verb, storage)


# XLA takes a handler only once under a name.
_registering = threading.Lock()


@functools.cache
def _registered(verb: str, storage: Storage) -> str | None:
    import numba

    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return None
    from ._kernels import _xla

    name = f"adamax_{verb}_{storage.value}"
    # With a backend, XLA looks at the version of a handler when it is registered; without,
    # when there is one, which would then fail.
    jax.local_devices(backend="cpu")
    try:
        capsule = jax.ffi.pycapsule(_xla.handler(verb, storage).ctypes)
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        warnings.warn(
            f"the kernels of adamax cannot be used by jax {jax.__version__} here "
            f"({error}); step() takes the code that XLA makes of the rule instead, which "
            f"is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return name
