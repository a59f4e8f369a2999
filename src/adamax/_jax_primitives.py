"""Primitives of JAX that are our kernels on a CPU.

Each means some operations of JAX. On a CPU it is lowered to one of our kernels, which XLA
calls on its buffers; everywhere else, and where an array is spread over several devices, to
the operations, which XLA compiles and partitions.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core
import jax.ffi
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

import jax

from ._kernels import Storage


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
        target, storage = None, Storage.of(context.avals_in[0].dtype)
        if storage and _is_whole(context.module_context.axis_context):
            target = _target(verb, storage)
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
            f"({error}); what XLA makes of the same operations is used instead, which is "
            f"slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return name
