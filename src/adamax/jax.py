"""Adamax for JAX: a transformation of optax, for whole arrays and for rows of tables."""

import math
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ._jax_rows import (
    IndexedSlices,
    PyTree,
    check_rows,
    is_gradient,
    is_slices,
    known_rows,
    like_given,
    lookup,
    on_rows,
    put_rows,
    sum_repeats,
    table_rows,
    value_and_sparse_grad,
)
from ._jax_step import moments, state_dtype, step_array, step_rows
from ._rule import check_learning_rate, checked_number

__all__ = [
    "Adamax",
    "IndexedSlices",
    "adamax",
    "apply_updates",
    "lookup",
    "on_rows",
    "scale_by_adamax",
    "sum_repeats",
    "value_and_sparse_grad",
]

Scalar: TypeAlias = jax.typing.ArrayLike
ScalarOrSchedule: TypeAlias = Scalar | Callable[[Any], Any]
Stepping: TypeAlias = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]

_NAMES = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps"}


class Adamax(optax.GradientTransformationExtraArgs):
    """What :func:`adamax` returns: a transformation of optax with one more method."""

    _step: Stepping

    def __new__(
        cls, transformation: optax.GradientTransformationExtraArgs, step: Stepping
    ) -> Self:
        self = super().__new__(cls, *transformation)
        self._step = step
        return self

    def step(
        self, params: PyTree, state: PyTree, gradients: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Take a whole step: the same as ``update`` and ``apply_updates``, in one pass.

        On a CPU this runs the kernels of this package, which read and write each element
        once. On other devices, and for arrays that are spread over several devices, XLA
        compiles the rule, as it does for ``update``. Call it in a jitted function that
        parameters and state are donated to, and that returns them in the order in which it
        takes them: they are then changed in place. (JAX pairs what is donated with what is
        returned by shape and order; in another order, tables are copied.)

        A 16-bit parameter is rounded once, where ``update`` rounds the update as well.

        Args:
            params: the parameters.
            state: as for ``update``; both can be used in turns.
            gradients: as for ``update``.

        Returns:
            The parameters and the state after the step.

        >>> import jax, jax.numpy as jnp
        >>> optimizer = adamax(learning_rate=0.1)
        >>> params = {"table": jnp.zeros((1000, 2))}
        >>> gradients = {"table": IndexedSlices(jnp.ones((2, 2)), jnp.array([7, 7]))}
        >>> step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        >>> params, state = step(params, optimizer.init(params), gradients)
        >>> params["table"][7].round(3)
        Array([-0.1, -0.1], dtype=float32)
        """
        return self._step(params, state, gradients)


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
) -> Adamax:
    r"""Adamax (Adam with the infinity norm), in place of :func:`optax.adamax`.

    For the gradient :math:`g` of a parameter :math:`w` at step :math:`t = 1, 2, \dots`,
    with the state :math:`m` (``mu``), :math:`u` (``nu``) and :math:`t` (``count``):

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        w &\leftarrow (1 - \eta_t \lambda) w
            - \frac{\eta_t}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    It chains, masks, accumulates, shards, vmaps and scans as any transformation of optax.
    Its state has the structure of that of :func:`optax.adamax` and goes on from a
    checkpoint of it. :meth:`Adamax.step` takes the same step in one pass over memory.

    A leaf of the gradients may be an :class:`IndexedSlices`, the gradient of some rows of a
    table. Repeated indices are summed; then only those rows of ``mu`` and ``nu`` are read
    or written, at a cost that does not depend on the size of the table if the state is
    donated, and the leaf of the updates is an :class:`IndexedSlices` too. A gradient of
    None leaves its parameter and its state alone.

    State and arithmetic are float32 for 16-bit parameters; where a checkpoint has a 16-bit
    state, the first step makes it float32. NaN and infinity in a gradient reach state and
    parameters.

    Args:
        learning_rate: a number in [0, inf), or a schedule: a function of the 0-based step.
        b1: the decay of ``mu`` per step, in [0, 1).
        b2: the decay of ``nu`` per step, in [0, 1).
        eps: added to ``nu`` in the denominator, at least the smallest normal float32.
        weight_decay: decoupled decay, multiplied by the learning rate. A gradient of rows
            decays these rows.
        mask: which parameters decay: a pytree of booleans, or a function of the parameters
            that returns one.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range, NaN included. Arrays of JAX are not looked
            at, as they may be traced.

    >>> import jax, jax.numpy as jnp
    >>> params = {"weights": jnp.zeros(3), "table": jnp.zeros((1000, 2))}
    >>> gradients = {
    ...     "weights": jnp.array([1.0, -2.0, 0.0]),
    ...     "table": IndexedSlices(jnp.ones((2, 2)), jnp.array([7, 7])),
    ... }
    >>> optimizer = adamax(learning_rate=0.1)
    >>> state = optimizer.init(params)
    >>> updates, state = jax.jit(optimizer.update)(gradients, state, params)
    >>> params = apply_updates(params, updates)
    >>> params["weights"].round(3)
    Array([-0.1,  0.1,  0. ], dtype=float32)
    >>> jnp.flatnonzero(params["table"].any(axis=1))
    Array([7], dtype=int32)

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1;
    arguments and defaults as :func:`optax.adamax`, which adds epsilon to :math:`|g|`
    instead of to :math:`u`.
    """
    if not isinstance(learning_rate, jax.Array):
        check_learning_rate(learning_rate)  # type: ignore[arg-type]
    weight_decay = _checked("weight_decay", weight_decay)
    decays = not (isinstance(weight_decay, float) and weight_decay == 0.0)
    rate = optax.scale_by_learning_rate(learning_rate)
    b1, b2, eps = _checked_moments(b1, b2, eps)

    def step(params: PyTree, state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
        of_moments, of_rate = state
        count = optax.safe_increment(of_moments.count)
        one = jnp.ones((), jnp.result_type(float))
        minus_learning_rate, of_rate = rate.update(one, of_rate)

        def scalars(dtype: Any, decay: bool) -> jax.Array:
            eta = _scalar(-minus_learning_rate, dtype)
            numbers = (
                eta / _bias_correction(b1, count, dtype),
                1.0 - eta * _scalar(weight_decay, dtype) if decay else 1.0,
                1.0 - _scalar(b1, dtype),
                b2,
                eps,
            )
            return jnp.stack([jnp.asarray(number, dtype) for number in numbers])

        each = _Leaves(gradients, of_moments.mu, of_moments.nu, params)
        decayed = each.flatten(_as_tree(mask, params)) if decays else [False] * len(each)
        new_params, mu, nu = each.map(
            lambda leaf, gradient, mu, nu, param: _step_leaf(
                gradient, mu, nu, param, scalars, decayed[leaf], each.names[leaf]
            )
        )
        return new_params, (optax.ScaleByAdamState(count, mu, nu), of_rate)

    def update_rate(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        if decays:
            decay = optax.add_decayed_weights(weight_decay, mask)
            updates, _ = decay.update(updates, decay.init(params), params)
        return rate.update(updates, state)

    decay_and_rate = on_rows(optax.GradientTransformation(rate.init, update_rate))
    chained = optax.with_extra_args_support(
        optax.chain(scale_by_adamax(b1, b2, eps), decay_and_rate)
    )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        new, state = chained.update(updates, state, params, **extra_args)
        # lax.cond wants updates to have the structure of the gradients, to the last flag.
        return jax.tree.map(like_given, updates, new, is_leaf=is_gradient), state

    return Adamax(optax.GradientTransformationExtraArgs(chained.init, update), step)


def scale_by_adamax(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> optax.GradientTransformation:
    r"""The rule without the learning rate, in place of :func:`optax.scale_by_adamax`.

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        \text{update} &= \frac{1}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    The state is an ``optax.ScaleByAdamState(count, mu, nu)``. An update has the dtype of
    the parameter, or without parameters of the gradient.

    Args:
        b1: the decay of ``mu`` per step, in [0, 1).
        b2: the decay of ``nu`` per step, in [0, 1).
        eps: added to ``nu`` in the denominator, at least the smallest normal float32.

    Raises:
        TypeError: an argument of the wrong type; in ``init`` a parameter that is no array
            of real or complex floating-point numbers.
        ValueError: a number out of its range; in ``update`` a gradient of another shape
            than its parameter.

    >>> import jax.numpy as jnp
    >>> optimizer = scale_by_adamax()
    >>> state = optimizer.init(jnp.zeros(2))
    >>> update, state = optimizer.update(jnp.array([3.0, -0.1]), state)
    >>> update.round(3), state.count
    (Array([ 1., -1.], dtype=float32), Array(1, dtype=int32))
    """
    b1, b2, eps = _checked_moments(b1, b2, eps)

    def init(params: PyTree) -> optax.ScaleByAdamState:
        def zeros(path: Any, param: Any) -> jax.Array:
            dtype = jnp.result_type(param)
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"parameters must be floating-point, got {dtype}{_at(path)}; "
                    f"optax.masked() leaves parameters out"
                )
            return jnp.zeros_like(param, state_dtype(dtype))

        # Two of them, as both may be donated.
        mu, nu = (jax.tree.map_with_path(zeros, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)

        def scalars(dtype: Any) -> tuple[Any, ...]:
            correction = _bias_correction(b1, count, dtype)
            return correction, *(_scalar(number, dtype) for number in (b1, b2, eps))

        each = _Leaves(updates, state.mu, state.nu, updates if params is None else params)
        updates, mu, nu = each.map(
            lambda leaf, gradient, mu, nu, like: _update_leaf(
                gradient, mu, nu, like, scalars, each.names[leaf]
            )
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters with the updates added, those of rows too.

    As :func:`optax.apply_updates`, which does the same for updates of rows; here an update
    of None leaves its parameter alone. To change large tables in place, call it in a jitted
    function that the parameters are donated to.

    Args:
        params: a pytree of arrays.
        updates: a pytree of the same structure, where a leaf may be None or an
            :class:`IndexedSlices`.

    >>> import jax.numpy as jnp
    >>> apply_updates(jnp.zeros(3), IndexedSlices(jnp.ones(2), jnp.array([0, 2])))
    Array([1., 0., 1.], dtype=float32)
    """
    structure: Any
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: leaf is None)
    return structure.unflatten(
        param if param is None or update is None else _added(param, update)
        for param, update in zip(leaves, structure.flatten_up_to(updates), strict=True)
    )


def _added(param: Any, update: Any) -> jax.Array:
    param = jnp.asarray(param)
    return (param + update).astype(param.dtype)


class _Leaves:
    """The leaves of a tree of gradients, and what belongs to each in other trees."""

    def __init__(self, gradients: PyTree, *trees: PyTree) -> None:
        self._structure: Any
        paths, self._structure = jax.tree.flatten_with_path(gradients, is_leaf=is_gradient)
        self.names = [_at(path) for path, _ in paths]
        self._columns = [[leaf for _, leaf in paths], *map(self.flatten, trees)]

    def __len__(self) -> int:
        return len(self.names)

    def flatten(self, tree: PyTree) -> list[Any]:
        return self._structure.flatten_up_to(tree)

    def map(self, function: Callable[..., tuple[Any, Any, Any]]) -> Any:
        """Three trees, of what ``function(number of the leaf, *leaves)`` returns."""
        rows = zip(range(len(self)), *self._columns, strict=True)
        results = [function(*row) for row in rows]
        return (self._structure.unflatten(r[i] for r in results) for i in range(3))


def _update_leaf(
    gradient: Any, mu: Any, nu: Any, like: Any, scalars: Callable[..., Any], name: str
) -> tuple[Any, Any, Any]:
    """The update of one parameter, and its state after the step."""
    if gradient is None:
        return None, mu, nu
    like = jnp.result_type(like.values if is_slices(like) else like)
    dtype = state_dtype(mu.dtype)
    correction, b1, b2, eps = scalars(jnp.finfo(dtype).dtype)

    def moved(gradient: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
        ratio, mu, nu = moments(gradient, mu, nu, 1 - b1, b2, eps)
        return (ratio * (1 / correction)).astype(like), mu, nu

    gradient = _checked_gradient(gradient, mu, name)
    if not is_slices(gradient):
        return moved(gradient, mu, nu)
    rows = sum_repeats(gradient, len(mu))
    update, mu_rows, nu_rows = moved(
        rows.values, table_rows(mu, rows), table_rows(nu, rows)
    )
    mu = put_rows(mu.astype(dtype), rows, mu_rows)
    nu = put_rows(nu.astype(dtype), rows, nu_rows)
    return IndexedSlices(update, rows.indices, distinct=True), mu, nu


def _step_leaf(
    gradient: Any,
    mu: Any,
    nu: Any,
    param: Any,
    scalars: Callable[..., Any],
    decays: bool,
    name: str,
) -> tuple[Any, Any, Any]:
    """One parameter and its state after the step."""
    if gradient is None:
        return param, mu, nu
    param = jnp.asarray(param)
    gradient = _checked_gradient(gradient, param, name)
    dtype = state_dtype(mu.dtype)
    of_this_dtype = scalars(jnp.finfo(dtype).dtype, decays)
    mu, nu = mu.astype(dtype), nu.astype(dtype)
    if not is_slices(gradient):
        return step_array(param, mu, nu, gradient, of_this_dtype)
    rows = IndexedSlices(gradient.values, known_rows(gradient.indices, len(param)))
    return step_rows(param, mu, nu, rows, of_this_dtype)


def _checked_gradient(gradient: Any, param: Any, name: str) -> Any:
    """``gradient`` as arrays of JAX, if it can be one of ``param``."""
    if is_slices(gradient):
        check_rows(gradient, param, f"the gradient{name}")
        return gradient
    gradient = jnp.asarray(gradient)
    if gradient.shape != param.shape:
        raise ValueError(
            f"a gradient must have the shape of its parameter, {param.shape}, "
            f"got {gradient.shape}{name}"
        )
    return gradient


def _as_tree(mask: Any, params: PyTree) -> PyTree:
    """A mask with a leaf for each parameter."""
    if callable(mask):
        mask = mask(params)
    if mask is None:
        mask = True
    return jax.tree.map(lambda leaf, part: jax.tree.map(lambda _: leaf, part), mask, params)


def _checked(hyperparameter: str, value: Any) -> Any:
    """A number as a float if it may be one; an array as it is, since it may be traced."""
    if isinstance(value, jax.Array):
        return value
    return checked_number(hyperparameter, value, _NAMES.get(hyperparameter))


def _checked_moments(b1: Any, b2: Any, eps: Any) -> tuple[Any, Any, Any]:
    return _checked("beta_1", b1), _checked("beta_2", b2), _checked("epsilon", eps)


def _at(path: Any) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def _bias_correction(b1: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 - b1**count``, exact also where ``b1**count`` is close to 1."""
    if isinstance(b1, float):
        logarithm: Any = math.log(b1) if b1 else -math.inf
    else:
        logarithm = jnp.log1p(b1.astype(dtype) - 1)  # the difference is exact
    return -jnp.expm1(count.astype(dtype) * logarithm)


def _scalar(number: Any, dtype: Any) -> Any:
    """A number that does not change the dtype of what it is combined with."""
    return number if isinstance(number, float) else number.astype(dtype)
