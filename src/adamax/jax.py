"""Adamax for JAX: a transformation of optax, for whole arrays and for rows of tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeAlias

import jax.numpy as jnp
import optax

import jax

from ._exact import Expansion
from ._jax_exact import CurrentTable, Deferred, init_deferred, is_current
from ._jax_gradients import lookup, value_and_sparse_grad
from ._jax_rows import (
    IndexedSlices,
    PyTree,
    check_rows,
    is_gradient,
    is_slices,
    known_rows,
    like_given,
    on_rows,
    put_rows,
    sum_repeats,
    table_rows,
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

_NAMES = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps"}


class Adamax(optax.GradientTransformationExtraArgs):
    """What :func:`adamax` returns: a transformation of optax with more methods."""

    _rule: "_Rule"

    def __new__(
        cls, transformation: optax.GradientTransformationExtraArgs, rule: "_Rule"
    ) -> Self:
        self = super().__new__(cls, *transformation)
        self._rule = rule
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What ``__new__`` is given for a copy."""
        return optax.GradientTransformationExtraArgs(*self), self._rule

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
        return self._rule.step(params, state, gradients)

    def current(self, params: PyTree, state: PyTree) -> PyTree:
        """The parameters as a loss should read them.

        Where a table has ``sparse="exact"``, this has a node in its place that
        :func:`lookup` takes. It reads rows as they are after all steps so far, whatever
        steps they have been left out of. All other parameters are as they are.

        This is for :func:`value_and_sparse_grad`, whose gradients go to :meth:`step`
        together with ``params`` themselves, and for evaluation.

        >>> import jax.numpy as jnp
        >>> optimizer = adamax(learning_rate=0.1, sparse="exact")
        >>> params = {"table": jnp.zeros((1000, 1))}
        >>> state = optimizer.init(params)
        >>> def loss(params, ids):
        ...     return lookup(params["table"], ids).sum()
        >>> for id in (7, 3, 3):
        ...     current = optimizer.current(params, state)
        ...     value, gradients = value_and_sparse_grad(loss)(current, jnp.array([id]))
        ...     params, state = optimizer.step(params, state, gradients)
        >>> optimizer.lookup(params, state, {"table": jnp.array([7])})["table"].round(3)
        Array([[-0.177]], dtype=float32)
        """
        return self._rule.current(params, state)

    def lookup(self, params: PyTree, state: PyTree, ids: PyTree) -> PyTree:
        """The rows of some parameters, up to date: :func:`lookup` for several tables.

        For gradients that are not taken with :func:`value_and_sparse_grad`: differentiate
        with respect to these rows, and pass ``IndexedSlices(gradient, ids, current=True)``.

        Args:
            params: the parameters.
            state: the state.
            ids: integers of any shape for some of the parameters: a pytree with the paths
                of these and no others.

        Returns:
            A pytree as ``ids``, of rows.

        Raises:
            ValueError: ``ids`` of something that is not a parameter.

        >>> import jax.numpy as jnp
        >>> optimizer = adamax(learning_rate=0.1, sparse={"table": "exact", "w": "lazy"})
        >>> params = {"table": jnp.arange(6.0).reshape(3, 2), "w": jnp.zeros(4)}
        >>> optimizer.lookup(params, optimizer.init(params), {"table": jnp.array([2])})
        {'table': Array([[4., 5.]], dtype=float32)}
        """
        current = self._rule.current(params, state)
        by_path = dict(jax.tree.leaves_with_path(current, is_leaf=is_current))

        def rows(path: Any, of_table: Any) -> jax.Array:
            if path not in by_path:
                known = ", ".join(jax.tree_util.keystr(path) or "()" for path in by_path)
                raise ValueError(
                    f"ids must be arrays at paths of parameters, {known}, got {of_table!r}"
                    f"{_at(path)}"
                )
            return lookup(by_path[path], of_table)

        return jax.tree.map_with_path(rows, ids)

    def flush(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """Bring all rows of all tables up to date: a pass over those that are exact.

        After it, the parameters and ``state[:2]`` are those of the dense rule, for whoever
        reads a table as a whole, or a checkpoint for another optimizer. To go on from such
        a state: ``(*state, *optimizer.init(params)[2:])``.

        >>> import jax, jax.numpy as jnp
        >>> optimizer = adamax(learning_rate=0.1, sparse="exact")
        >>> params = jnp.zeros((1000, 1))
        >>> state = optimizer.init(params)
        >>> for id in (7, 3, 3):
        ...     gradient = IndexedSlices(jnp.ones((1, 1)), jnp.array([id]), current=True)
        ...     params, state = optimizer.step(params, state, gradient)
        >>> params[7].round(3)
        Array([-0.1], dtype=float32)
        >>> params, state = jax.jit(optimizer.flush, donate_argnums=(0, 1))(params, state)
        >>> params[7].round(3)
        Array([-0.177], dtype=float32)
        """
        return self._rule.flush(params, state)


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    sparse: Any = "lazy",
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
        sparse: what a gradient of rows means. ``"lazy"``: all other rows stay as they are.
            ``"exact"``: they move as under a gradient of zero, which is computed when they
            are needed, at the cost of the rows that are; the result is that of dense
            gradients. Such a table takes gradients of rows only, which must have been read
            with :meth:`Adamax.current` or :meth:`Adamax.lookup`, and the state has a third
            part. A pytree of both words, or a function of the parameters that returns one,
            tells for each parameter.

    Raises:
        TypeError: an argument of the wrong type; with ``sparse="exact"`` also ``b1``,
            ``b2`` or ``eps`` that are arrays of JAX.
        ValueError: a number out of its range, NaN included. Arrays of JAX are not looked
            at, as they may be traced. With ``sparse="exact"`` also betas for which it would
            take too long, and in ``step`` and ``update`` a gradient that is not of rows, or
            of rows that may not have been up to date when they were read.

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
    rule = _Rule(
        optax.scale_by_learning_rate(learning_rate),
        *_checked_moments(b1, b2, eps),
        _checked("weight_decay", weight_decay),
        mask,
        sparse,
    )
    rule.check_sparse()
    transformation = optax.GradientTransformationExtraArgs(rule.init, rule.update)
    return Adamax(transformation, rule)


@dataclass(frozen=True, eq=False)
class _Rule:
    """The functions of an :class:`Adamax`."""

    rate: optax.GradientTransformation
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    mask: Any
    sparse: Any

    @property
    def decays(self) -> bool:
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)

    @property
    def is_lazy(self) -> bool:
        return isinstance(self.sparse, str) and self.sparse == "lazy"

    def check_sparse(self) -> None:
        """Raise for what is wrong whatever the parameters are."""
        if not callable(self.sparse):
            for path, leaf in jax.tree.leaves_with_path(self.sparse, is_leaf=_is_none):
                _is_exact(leaf, _at(path))
        if self.is_lazy:
            return
        for number in (self.b1, self.b2, self.eps):
            if not isinstance(number, float):
                raise TypeError(
                    "b1, b2 and eps must be numbers where sparse is not 'lazy', got an "
                    "array of JAX (optax.inject_hyperparams has static_args for them)"
                )
        Expansion.of(self.b1, self.b2, "float32", _NAMES)

    @cached_property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """What updates all parameters that are not exact."""

        def update_rate(
            updates: PyTree, state: PyTree, params: PyTree = None
        ) -> tuple[PyTree, PyTree]:
            if self.decays:
                decay = optax.add_decayed_weights(self.weight_decay, self.mask)
                updates, _ = decay.update(updates, decay.init(params), params)
            return self.rate.update(updates, state)

        decay_and_rate = on_rows(optax.GradientTransformation(self.rate.init, update_rate))
        return optax.with_extra_args_support(
            optax.chain(scale_by_adamax(self.b1, self.b2, self.eps), decay_and_rate)
        )

    def init(self, params: PyTree) -> PyTree:
        state = self.transformation.init(params)
        if self.is_lazy:
            return state
        each = _Leaves(params)
        decays = self.each_decays(each, params)
        kinds = self.sparse(params) if callable(self.sparse) else self.sparse
        try:
            each.add(_for_each(kinds, params))
        except ValueError as error:
            raise ValueError(
                f"sparse must be a pytree like that of the parameters, or one that ends "
                f"earlier, got {kinds}: {error}"
            ) from error

        def init_leaf(leaf: int, param: Any, sparse: Any) -> tuple[Any]:
            name = each.names[leaf]
            if param is None or not _is_exact(sparse, name):
                return (None,)
            param = jnp.asarray(param)
            if param.ndim == 0 or not jnp.issubdtype(param.dtype, jnp.floating):
                raise TypeError(
                    f"a parameter with sparse='exact' must have rows of real numbers, got "
                    f"{param.dtype} of shape {param.shape}{name}"
                )
            return (init_deferred(param, self.b1, self.b2, decays[leaf], _NAMES),)

        return (*state, *each.map(init_leaf, results=1))

    def each_decays(self, each: "_Leaves", params: PyTree) -> list[bool]:
        if not self.decays:
            return [False] * len(each)
        return [bool(leaf) for leaf in each.flatten(_as_tree(self.mask, params))]

    def check_state(self, state: PyTree) -> None:
        """Raise unless this is a state of this transformation, or one like it of optax."""
        is_tuple = isinstance(state, tuple | list)
        if not (is_tuple and hasattr(next(iter(state), None), "mu")):
            raise TypeError(
                f"state must be that of adamax(), a tuple that begins with an "
                f"optax.ScaleByAdamState; of an optax.chain it is the part of this "
                f"transformation; got {_kinds(state)}"
            )
        if len(state) != (2 if self.is_lazy else 3):
            raise ValueError(
                f"state must have {'two parts' if self.is_lazy else 'three parts'} where "
                f"sparse is {'' if self.is_lazy else 'not '}'lazy', got {len(state)}; "
                f"flush() makes the first two parts those of any other Adamax, and from "
                f"such a state (*state, *optimizer.init(params)[2:]) goes on"
            )

    def tables(self, each: "_Leaves", params: PyTree, state: PyTree) -> list[Any]:
        """For each leaf the table, if it is exact, or else None."""
        self.check_state(state)
        of_moments, _, *deferred = state
        if not deferred:
            return [None] * len(each)
        if params is None:
            raise ValueError("with sparse='exact' the parameters must be given, got None")
        trees = (params, of_moments.mu, of_moments.nu, deferred[0])
        columns = (each.names, self.each_decays(each, params), *map(each.flatten, trees))
        return [
            self.table(*column) if isinstance(column[-1], Deferred) else None
            for column in zip(*columns, strict=True)
        ]

    def table(
        self, name: str, decays: bool, param: Any, mu: Any, nu: Any, deferred: Deferred
    ) -> CurrentTable:
        param, mu, nu, deferred = jax.tree.map(jnp.asarray, (param, mu, nu, deferred))
        table = CurrentTable(param, mu, nu, deferred, self.b1, self.b2, self.eps, name)
        table.check(decays)
        return table

    def scalars(self, state: PyTree) -> tuple["_Scalars", PyTree]:
        """Those of a step, and the state of the learning rate after it."""
        one = jnp.ones((), jnp.result_type(float))
        minus_learning_rate, of_rate = self.rate.update(one, state[1])
        count = optax.safe_increment(state[0].count)
        return _Scalars(self, count, -minus_learning_rate), of_rate

    def step(
        self, params: PyTree, state: PyTree, gradients: PyTree
    ) -> tuple[PyTree, PyTree]:
        self.check_state(state)
        of_moments, _, *deferred = state
        scalars, of_rate = self.scalars(state)
        each = _Leaves(gradients, of_moments.mu, of_moments.nu, params)
        decays = self.each_decays(each, params)
        tables = self.tables(each, params, state)
        before = each.flatten(deferred[0]) if deferred else [None] * len(each)

        def step_leaf(leaf: int, gradient: Any, mu: Any, nu: Any, param: Any) -> Any:
            name, table = each.names[leaf], tables[leaf]
            if gradient is None:
                return param, mu, nu, before[leaf]
            if table is not None:
                return table.stepped(*_for_table(gradient, table, scalars, name))
            stepped = _step_leaf(gradient, mu, nu, param, scalars, decays[leaf], name)
            return (*stepped, None)

        params, mu, nu, of_tables = each.map(step_leaf, results=4)
        state = (optax.ScaleByAdamState(scalars.count, mu, nu), of_rate)
        return params, (*state, of_tables) if deferred else state

    def update(
        self, gradients: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        each = _Leaves(gradients)
        tables = self.tables(each, params, state)

        def without_tables(leaf: int, gradient: Any) -> tuple[Any]:
            return (gradient if tables[leaf] is None else None,)

        others, *_ = each.map(without_tables, results=1)
        updates, (of_moments, of_rate) = self.transformation.update(
            others, state[:2], params, **extra_args
        )
        # lax.cond wants updates to have the structure of the gradients, to the last flag.
        updates = jax.tree.map(like_given, others, updates, is_leaf=is_gradient)
        if len(state) == 2:
            return updates, (of_moments, of_rate)
        scalars, _ = self.scalars(state)
        each = _Leaves(gradients, updates, of_moments.mu, of_moments.nu)
        before = each.flatten(state[2])

        def update_leaf(leaf: int, gradient: Any, *of_others: Any) -> Any:
            table, name = tables[leaf], each.names[leaf]
            if gradient is None or table is None:
                return (*of_others, before[leaf])
            return table.updates(*_for_table(gradient, table, scalars, name))

        updates, mu, nu, of_tables = each.map(update_leaf, results=4)
        of_moments = of_moments._replace(mu=mu, nu=nu)
        return updates, (of_moments, of_rate, of_tables)

    def current(self, params: PyTree, state: PyTree) -> PyTree:
        each = _Leaves(params)
        tables = self.tables(each, params, state)

        def current_leaf(leaf: int, param: Any) -> tuple[Any]:
            return (param if tables[leaf] is None else tables[leaf],)

        return each.map(current_leaf, results=1)[0]

    def flush(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        self.check_state(state)
        of_moments, of_rate, *deferred = state
        each = _Leaves(params, of_moments.mu, of_moments.nu)
        tables = self.tables(each, params, state)

        def flush_leaf(leaf: int, param: Any, mu: Any, nu: Any) -> Any:
            table = tables[leaf]
            return (param, mu, nu, None) if table is None else table.flushed()

        params, mu, nu, of_tables = each.map(flush_leaf, results=4)
        state = (of_moments._replace(mu=mu, nu=nu), of_rate)
        return params, (*state, of_tables) if deferred else state


@dataclass(frozen=True)
class _Scalars:
    """What a step is given beside arrays."""

    rule: _Rule
    count: jax.Array
    learning_rate: jax.Array

    def decay_rate(self, dtype: Any) -> Any:
        """What part of a parameter a step takes away."""
        return self.learning_rate.astype(dtype) * _scalar(self.rule.weight_decay, dtype)

    def stacked(self, dtype: Any, decays: bool) -> jax.Array:
        """As :func:`step_array` takes them."""
        b1, b2, eps = self.rule.b1, self.rule.b2, self.rule.eps
        numbers = (
            self.learning_rate.astype(dtype) / _bias_correction(b1, self.count, dtype),
            1.0 - self.decay_rate(dtype) if decays else 1.0,
            1.0 - _scalar(b1, dtype),
            b2,
            eps,
        )
        return jnp.stack([jnp.asarray(number, dtype) for number in numbers])


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
            ),
            results=3,
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
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_none)
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

    def add(self, tree: PyTree) -> None:
        self._columns.append(self.flatten(tree))

    def flatten(self, tree: PyTree) -> list[Any]:
        return self._structure.flatten_up_to(tree)

    def map(self, function: Callable[..., tuple[Any, ...]], results: int) -> list[PyTree]:
        """Trees of what ``function(number of the leaf, *leaves)`` returns."""
        rows = zip(range(len(self)), *self._columns, strict=True)
        of_leaves = [function(*row) for row in rows]
        return [
            self._structure.unflatten(of_leaf[i] for of_leaf in of_leaves)
            for i in range(results)
        ]


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
    scalars: _Scalars,
    decays: bool,
    name: str,
) -> tuple[Any, Any, Any]:
    """One parameter and its state after the step."""
    param = jnp.asarray(param)
    gradient = _checked_gradient(gradient, param, name)
    if not jnp.shape(mu) == jnp.shape(nu) == param.shape:
        raise ValueError(
            f"the state must have the shape of its parameter, {param.shape}, got mu "
            f"{jnp.shape(mu)} and nu {jnp.shape(nu)}{name}"
        )
    dtype = state_dtype(mu.dtype)
    of_this_dtype = scalars.stacked(jnp.finfo(dtype).dtype, decays)
    mu, nu = mu.astype(dtype), nu.astype(dtype)
    if not is_slices(gradient):
        return step_array(param, mu, nu, gradient, of_this_dtype)
    rows = IndexedSlices(gradient.values, known_rows(gradient.indices, len(param)))
    return step_rows(param, mu, nu, rows, of_this_dtype)


def _for_table(
    gradient: Any, table: CurrentTable, scalars: _Scalars, name: str
) -> tuple[IndexedSlices, jax.Array, Any]:
    """What an exact table is given for a step."""
    dtype, decays = state_dtype(table.mu.dtype), table.decays
    decay_rate = scalars.decay_rate(dtype) if decays else None
    gradient = _checked_current(gradient, table, name)
    return gradient, scalars.stacked(dtype, decays), decay_rate


def _checked_current(gradient: Any, table: CurrentTable, name: str) -> IndexedSlices:
    """The gradient of an exact table, with int32 indices."""
    if not is_slices(gradient):
        raise ValueError(
            f"the gradient of a parameter with sparse='exact' must be an IndexedSlices, "
            f"got an array of shape {jnp.shape(gradient)}{name}; sparse may be a pytree "
            f"that has 'lazy' for parameters with gradients of other kinds"
        )
    check_rows(gradient, table, f"the gradient{name}")
    if not gradient.current:
        raise ValueError(
            f"the gradient{name} is of rows that may have been behind when they were "
            f"read: compute it with value_and_sparse_grad(loss)(optimizer.current(params, "
            f"state), ...), or from rows of optimizer.lookup(params, state, ids), with "
            f"IndexedSlices(values, ids, current=True)"
        )
    return replace(gradient, indices=known_rows(gradient.indices, len(table)))


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
    return _for_each(True if mask is None else mask, params)


def _for_each(tree: PyTree, params: PyTree) -> PyTree:
    """``tree`` with a leaf for each parameter, where it may end earlier."""
    return jax.tree.map(lambda leaf, part: jax.tree.map(lambda _: leaf, part), tree, params)


def _is_none(node: object) -> bool:
    return node is None


def _kinds(state: PyTree) -> str:
    parts = state if isinstance(state, tuple | list) else ()
    return f"{type(state).__name__}({', '.join(type(part).__name__ for part in parts)})"


def _is_exact(sparse: Any, name: str = "") -> bool:
    if not (isinstance(sparse, str) and sparse in ("lazy", "exact")):
        raise ValueError(f"sparse must be 'lazy' or 'exact', got {sparse!r}{name}")
    return sparse == "exact"


def _checked(hyperparameter: str, value: Any) -> Any:
    """A number as a float if it may be one; an array as it is, since it may be traced."""
    if isinstance(value, jax.Array):
        if value.shape:
            name = _NAMES.get(hyperparameter, hyperparameter)
            raise ValueError(f"{name} must be a number, got an array of {value.shape}")
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
