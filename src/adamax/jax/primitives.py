"""Primitives of JAX that are verbs of the native core on a CPU.

Each stands for some operations of JAX. For one CPU device it is lowered to a handler of
``_native/xla.cpp``. For other devices, for arrays that are spread over several, and without
the native core, it is lowered to the operations, which XLA compiles and partitions.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp

from .._core.kernels import kernels
from . import _compat
from ._compat import ad, batching, mlir

# What the verbs take for parameters, gradients and values of rows.
FLOATS = frozenset(map(jnp.dtype, ("float32", "float64", "float16", "bfloat16")))


def _register() -> frozenset[str]:
    """Make the handlers known to XLA, all of them at once.

    A program that was compiled or saved elsewhere may call any of them here.
    """
    try:
        verbs = importlib.import_module("adamax._native.verbs")
    except ModuleNotFoundError:  # kernels() warns of it where one would be used
        return frozenset()
    handlers = verbs.xla_handlers()
    try:
        for name, handler in handlers.items():
            _compat.register_ffi_target(name, handler)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        warnings.warn(
            f"jax {jax.__version__} cannot use the native core of adamax here ({error}): "
            f"XLA compiles the same operations instead, which are slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return frozenset()
    _compat.allow_in_exports(handlers)
    return frozenset(handlers)


_targets = _register()


def primitive(
    verb: str,
    operations: Callable[..., tuple[jax.Array, ...]],
    in_place: int = 0,
    outputs: Callable[..., list[Any]] | None = None,
) -> Any:
    """A primitive that is a verb of ``_native/xla.cpp``, or operations of JAX.

    Its first ``in_place`` operands are changed and returned; else ``outputs`` makes the
    abstract results of the abstract operands.
    """
    target = f"adamax_{verb}"
    primitive = _compat.Primitive(target)
    primitive.multiple_results = True
    primitive.def_abstract_eval(outputs or (lambda *avals: list(avals[:in_place])))
    compiled = jax.jit(primitive.bind)

    def impl(*operands: jax.Array) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return operations(*operands)
        return compiled(*operands)

    primitive.def_impl(impl)

    by_operations = mlir.lower_fun(operations, multiple_results=True)

    def by_verb(context: Any, *operands: Any) -> Any:
        one_device = _compat.is_for_one_device(context.module_context.axis_context)
        # Which kernels are in use is asked first, for its warning.
        if not (one_device and hasattr(kernels(), "xla_handlers") and target in _targets):
            return by_operations(context, *operands)
        aliases = {number: number for number in range(in_place)}
        lowering = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
        return lowering(context, *operands)

    mlir.register_lowering(primitive, by_operations)
    mlir.register_lowering(primitive, by_verb, platform="cpu")

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        whole = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(operations, tuple(primals), whole)

    def batched(operands: Sequence[Any], axes: Sequence[Any]) -> Any:
        *arrays, of_scalars = axes
        if verb == "dense" and of_scalars is None and None not in arrays:
            # Elements are independent, so one more axis makes no difference.
            moved = [jnp.moveaxis(x, i, 0) for x, i in zip(operands, arrays, strict=False)]
            return primitive.bind(*moved, operands[-1]), [0, 0, 0]
        results = jax.vmap(operations, in_axes=tuple(axes))(*operands)
        return results, [0] * len(results)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batched
    return primitive
