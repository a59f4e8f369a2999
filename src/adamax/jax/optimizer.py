"""Adamax, a transformation of optax that also takes whole steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .._core.compact import (
    check_betas,
    check_state_dtype,
    check_stochastic_rounding,
)
from .._core.exact import Expansion
from .._core.rule import check_learning_rate, checked_number, decay_factor
from ._compat import is_placeholder
from .compact import random_of_leaves
from .compact_exact import CompactTable
from .compact_rule import scalars_of, take_step, take_update
from .exact import CurrentTable, check_current, is_current
from .gradients import lookup
from .history import StaleRows, init_stale_rows
from .rows import PyTree, check_rows, is_gradient, is_slices
from .rule import StepScalars, step_array, step_rows, stepped, updated_rows
from .rule import state_dtype as arithmetic_dtype
from .state import (
    check_frame_of_rows,
    check_kind,
    check_parameter,
    checked,
    moments_of,
    new_frame,
    trees_of,
    zero_moments,
)
from .trees import Leaves, at, for_each_parameter

Scalar: TypeAlias = jax.typing.ArrayLike
ScalarOrSchedule: TypeAlias = Scalar | Callable[[Any], Any]

_NAMES = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps"}


class Adamax(optax.GradientTransformationExtraArgs):
    """What :func:`adamax` returns: a transformation of optax with more methods."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        def init(params: PyTree) -> PyTree:
            return self._init(params)

        def update(
            updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
        ) -> tuple[PyTree, PyTree]:
            return self._stepped(params, state, updates, as_update=True)

        self: Self = super().__new__(cls, init, update)
        return self

    def __init__(
        self,
        learning_rate: Any,
        b1: Any = 0.9,
        b2: Any = 0.999,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        mask: Any = None,
        sparse: Any = "lazy",
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        is_number = not (isinstance(learning_rate, jax.Array) or callable(learning_rate))
        self._learning_rate = float(learning_rate) if is_number else learning_rate
        self._b1, self._b2 = _checked("beta_1", b1), _checked("beta_2", b2)
        self._eps = _checked("epsilon", eps)
        self._weight_decay = _checked("weight_decay", weight_decay)
        self._kind = check_state_dtype(state_dtype)
        self._stochastic = check_stochastic_rounding(stochastic_rounding)
        numbers = isinstance(self._b1, float) and isinstance(self._b2, float)
        if self._kind == "8bit" and numbers:
            check_betas(self._b1, self._b2, "b1 and b2")
        self._mask, self._sparse = mask, sparse
        self._is_lazy = isinstance(sparse, str) and sparse == "lazy"
        self._has_decay = not (isinstance(weight_decay, int | float) and weight_decay == 0)
        if not callable(sparse):
            for path, leaf in jax.tree.leaves_with_path(sparse, is_leaf=is_gradient):
                _is_exact(leaf, at(path))
        if not self._is_lazy:
            self._expansion("float32")

    def __getnewargs__(self) -> tuple[()]:
        return ()  # copies get the attributes of the original

    def step(
        self, params: PyTree, state: PyTree, gradients: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Take a whole step: the same as ``update`` and ``apply_updates``, in one pass.

        On a CPU this runs the native core, which reads and writes each element once.
        Elsewhere, and for arrays that are spread over several devices, XLA compiles the
        rule, as it does for ``update``. A 16-bit parameter is rounded once, where
        ``update`` rounds the update as well.

        Call it in a jitted function that parameters and state are donated to, and that
        returns them in the order in which it takes them: they are then changed in place.
        (JAX pairs what is donated with what is returned by shape and order; in another
        order, tables are copied.)

        Args:
            params: the parameters.
            state: as for ``update``; both can be used in turns.
            gradients: as for ``update``.

        Returns:
            The parameters and the state after the step.

        >>> import jax, jax.numpy as jnp
        >>> from adamax.jax import IndexedSlices
        >>> optimizer = adamax(learning_rate=0.1)
        >>> params = {"table": jnp.zeros((1000, 2))}
        >>> gradients = {"table": IndexedSlices(jnp.ones((2, 2)), jnp.array([7, 7]))}
        >>> step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        >>> params, state = step(params, optimizer.init(params), gradients)
        >>> params["table"][7].round(3)
        Array([-0.1, -0.1], dtype=float32)
        """
        return self._stepped(params, state, gradients, as_update=False)

    def current(self, params: PyTree, state: PyTree) -> PyTree:
        """The parameters as a loss should read them, in training and in evaluation.

        Where a table has ``sparse="exact"``, this has a node in its place that
        :func:`lookup` takes. It reads rows as they are after all steps so far, whether or
        not they have taken them. The gradients that :func:`value_and_sparse_grad` computes
        from it go to :meth:`step` together with ``params`` themselves.

        >>> import jax.numpy as jnp
        >>> from adamax.jax import value_and_sparse_grad
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
        each = Leaves(params)
        tables = self._tables(each, params, state)

        def current_leaf(leaf: int, param: Any) -> tuple[Any]:
            return (param if tables[leaf] is None else tables[leaf],)

        return each.map(current_leaf, results=1)[0]

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
        current = self.current(params, state)
        by_path = dict(jax.tree.leaves_with_path(current, is_leaf=is_current))

        def rows(path: Any, of_table: Any) -> jax.Array:
            if path not in by_path:
                known = ", ".join(jax.tree_util.keystr(path) or "()" for path in by_path)
                raise ValueError(
                    f"ids must be arrays at paths of parameters, {known}, got {of_table!r}"
                    f"{at(path)}"
                )
            return lookup(by_path[path], of_table)

        return jax.tree.map_with_path(rows, ids)

    def flush(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """Catch up all rows of all tables: a pass over those that are exact.

        After it, the parameters and ``state[:2]`` are those of the dense rule, for whoever
        reads a table as a whole, or a checkpoint for another optimizer. To go on from such
        a state: ``(*state, *optimizer.init(params)[2:])``.

        >>> import jax, jax.numpy as jnp
        >>> from adamax.jax import IndexedSlices
        >>> optimizer = adamax(learning_rate=0.1, sparse="exact")
        >>> params = jnp.zeros((1000, 1))
        >>> state = optimizer.init(params)
        >>> for id in (7, 3, 3):
        ...     gradient = IndexedSlices(jnp.ones((1, 1)), jnp.array([id]), current=True)
        ...     params, state = optimizer.step(params, state, gradient)
        >>> params, state = jax.jit(optimizer.flush, donate_argnums=(0, 1))(params, state)
        >>> params[7].round(3)
        Array([-0.177], dtype=float32)
        """
        self._check_state(state)
        of_moments, of_rate, *stale = state
        each = Leaves(params, *trees_of(of_moments))
        tables = self._tables(each, params, state)

        def flush_leaf(leaf: int, *arrays: Any) -> Any:
            table = tables[leaf]
            return (*arrays, None) if table is None else table.flushed()

        results = len(trees_of(of_moments)) + 2
        params, *moments, of_tables = each.map(flush_leaf, results)
        state = (moments_of(of_moments.count, moments), of_rate)
        return params, (*state, of_tables) if stale else state

    # --- State -------------------------------------------------------------------------

    def _init(self, params: PyTree) -> PyTree:
        moments, of_rate = zero_moments(params, self._kind), jnp.zeros([], jnp.int32)
        is_schedule = callable(self._learning_rate)
        state = (
            moments,
            optax.ScaleByScheduleState(of_rate) if is_schedule else optax.EmptyState(),
        )
        if self._is_lazy:
            return state
        if is_placeholder(params):  # nothing in the third part is like parameters
            return (*state, jnp.zeros(()))
        kinds = self._sparse(params) if callable(self._sparse) else self._sparse
        each = Leaves(params, for_each_parameter(kinds, params, "sparse"))
        decays = self._decays(each, params)

        def init_leaf(leaf: int, param: Any, sparse: Any) -> tuple[Any]:
            name = each.names[leaf]
            if param is None or not _is_exact(sparse, name):
                return (None,)
            shape, dtype = jnp.shape(param), jnp.result_type(param)
            if not shape or not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"a parameter with sparse='exact' must have rows of real numbers, got "
                    f"{dtype} of shape {shape}{name}"
                )
            if self._kind == "8bit":
                check_frame_of_rows(param, new_frame(param), name)
            self._check_decay(decays[leaf], name)
            expansion = self._expansion(arithmetic_dtype(dtype))
            return (init_stale_rows(param, expansion, decays[leaf]),)

        return (*state, *each.map(init_leaf, results=1))

    def _check_state(self, state: PyTree) -> None:
        """Raise unless this is a state of this transformation, or one like it of optax."""
        parts = state if isinstance(state, tuple | list) else ()
        if not (parts and hasattr(parts[0], "mu")):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"state must be that of adamax(), a tuple that begins with an "
                f"optax.ScaleByAdamState; of an optax.chain it is the part of this "
                f"transformation; got {type(state).__name__}({kinds})"
            )
        check_kind(parts[0], self._kind)
        if len(state) != (2 if self._is_lazy else 3):
            raise ValueError(
                f"state must have {'two parts' if self._is_lazy else 'three parts'} where "
                f"sparse is {'' if self._is_lazy else 'not '}'lazy', got {len(state)}; "
                f"flush() makes the first two parts those of any other Adamax, and from "
                f"such a state (*state, *optimizer.init(params)[2:]) goes on"
            )
        parts = state[:2] if callable(self._learning_rate) else state[:1]
        for count in (part.count for part in parts):
            dtype, shape = jnp.result_type(count), jnp.shape(count)
            if shape or not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(
                    f"count in the state must be an integer, got {dtype} of shape {shape}"
                )

    def _tables(self, each: Leaves, params: PyTree, state: PyTree) -> list[Any]:
        """For each leaf the table, if it is exact, or else None."""
        self._check_state(state)
        of_moments, _, *stale = state
        if not stale:
            return [None] * len(each)
        if params is None:
            raise ValueError("with sparse='exact' the parameters must be given, got None")

        def table(name: str, random: Any, decays: bool, *parts: Any) -> Any:
            if not isinstance(parts[-1], StaleRows):
                return None
            self._check_decay(decays, name)
            param, mu, nu, *frames, rows = jax.tree.map(jnp.asarray, parts)
            made: dict[str, Any] = {"table": param, "mu": mu, "nu": nu, "stale": rows}
            made |= {"b1": self._b1, "b2": self._b2, "eps": self._eps, "name": name}
            if random is None:
                return CurrentTable(**made).checked(decays)
            made |= {"frame": frames[0] if frames else None, "kind": self._kind}
            return CompactTable(**made, random=random).checked(decays)

        random = self._random(optax.safe_increment(of_moments.count), each)
        trees = (params, *trees_of(of_moments), stale[0])
        columns = random, self._decays(each, params), *map(each.flatten, trees)
        return [table(*row) for row in zip(each.names, *columns, strict=True)]

    def _random(self, count: Any, each: Leaves) -> Any:
        """For each leaf what rounds it in a step, or None."""
        if self._kind == "float32" and not self._stochastic:
            return [None] * len(each)
        of_all = random_of_leaves(jnp.asarray(count), len(each), self._stochastic)
        return [(of_all, jnp.full(1, leaf, jnp.int32)) for leaf in range(len(each))]

    # --- Steps -------------------------------------------------------------------------

    def _stepped(
        self, params: PyTree, state: PyTree, gradients: PyTree, *, as_update: bool
    ) -> tuple[PyTree, PyTree]:
        """The parameters, or what is to be added to them, and the state after a step."""
        self._check_state(state)
        of_moments, _, *stale = state
        if params is None and self._has_decay:
            raise ValueError("with weight_decay the parameters must be given, got None")
        if params is None and self._stochastic:
            raise ValueError(
                "with stochastic_rounding the parameters must be given, got None"
            )
        scalars, of_rate = self._scalars(state)
        likes = gradients if params is None else params
        each = Leaves(gradients, likes, *trees_of(of_moments))
        decays = self._decays(each, likes)
        tables = self._tables(each, params, state)
        before = each.flatten(stale[0]) if stale else [None] * len(each)
        random = self._random(scalars.count, each)

        def step_leaf(leaf: int, gradient: Any, *arrays: Any) -> Any:
            name, table = each.names[leaf], tables[leaf]
            if gradient is None:
                return None if as_update else arrays[0], *arrays[1:], before[leaf]
            if table is None:
                rounding = self._kind, self._stochastic, random[leaf]
                options = decays[leaf], as_update, name
                return *_step_leaf(gradient, arrays, scalars, rounding, *options), None
            check_current(gradient, table, name)
            dtype = table.stale.recent.dtype
            if isinstance(table, CompactTable):
                of_step = scalars_of(scalars, decays[leaf], as_update=False)
            else:
                of_step = scalars.array(dtype, decays[leaf])
            rate = scalars.decay_rate(dtype) if decays[leaf] else None
            return (table.updated if as_update else table.stepped)(gradient, of_step, rate)

        results = len(trees_of(of_moments)) + 2
        params, *moments, of_tables = each.map(step_leaf, results)
        state = (moments_of(scalars.count, moments), of_rate)
        return params, (*state, of_tables) if stale else state

    def _scalars(self, state: PyTree) -> tuple[StepScalars, PyTree]:
        """Those of a step, and the state of the learning rate after it."""
        rate, of_rate = self._learning_rate, state[1]
        if callable(rate):
            rate = jnp.asarray(rate(of_rate.count), jnp.result_type(float))
            of_rate = optax.ScaleByScheduleState(optax.safe_increment(of_rate.count))
        count = optax.safe_increment(state[0].count)
        numbers = self._b1, self._b2, self._eps, self._weight_decay
        return StepScalars(rate, *numbers, count), of_rate

    def _decays(self, each: Leaves, params: PyTree) -> list[bool]:
        """Whether each parameter has weight decay."""
        if not self._has_decay or self._mask is None:
            return [self._has_decay] * len(each)
        mask = self._mask(params) if callable(self._mask) else self._mask
        return list(map(bool, each.flatten(for_each_parameter(mask, params, "mask"))))

    def _check_decay(self, decays: bool, name: str) -> None:
        """Raise where decay is faster than that of the momentum, if numbers tell it."""
        rate, decay = self._learning_rate, self._weight_decay
        if not (decays and isinstance(rate, float) and isinstance(decay, float)):
            return
        factor = decay_factor(rate, decay)
        if factor < self._b1:
            raise ValueError(
                f"sparse='exact' needs 1 - learning_rate * weight_decay to be at least b1, "
                f"got {factor!r} and {self._b1!r}{name}"
            )

    def _expansion(self, dtype: Any) -> Expansion:
        for number in (self._b1, self._b2, self._eps):
            if not isinstance(number, float):
                raise TypeError(
                    "b1, b2 and eps must be numbers where sparse is not 'lazy', got an "
                    "array of JAX (optax.inject_hyperparams has static_args for them)"
                )
        return Expansion.of(self._b1, self._b2, dtype, _NAMES)


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    sparse: Any = "lazy",
    state_dtype: str = "float32",
    stochastic_rounding: bool = False,
) -> Adamax:
    r"""Adamax (Adam with the infinity norm), in place of :func:`optax.adamax`.

    For the gradient :math:`g` of a parameter :math:`w` at step :math:`t = 1, 2, \dots`,
    with the state :math:`m` (``mu``), :math:`u` (``nu``) and :math:`t` (``count``):

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        w &\leftarrow (1 - \eta_t \lambda) w
            - \frac{\eta_t}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    Where :math:`u + \epsilon` is 0, the quotient is 0: with ``eps=0``, the rule of the
    paper, an element that has only seen gradients of zero does not move.

    It chains, masks, accumulates, shards, vmaps and scans as any transformation of optax.
    Its state has the structure of that of :func:`optax.adamax` and goes on from a
    checkpoint of it. :meth:`Adamax.step` takes the same step in one pass over memory.

    A leaf of the gradients may be an :class:`IndexedSlices`, the gradient of some rows of a
    table. Repeated indices are summed; then only those rows of ``mu`` and ``nu`` are read
    or written, at a cost that does not depend on the size of the table if the state is
    donated, and the leaf of the updates is an :class:`IndexedSlices` too. A gradient of
    None leaves its parameter and its state alone.

    State and arithmetic are float32 for 16-bit parameters, whose gradients may be wider;
    where a checkpoint has a 16-bit state, the first step makes it float32. NaN and infinity
    in a gradient reach state and parameters.

    Args:
        learning_rate: a number in [0, inf), or a schedule: a function of the 0-based step.
        b1: the decay of ``mu`` per step, in [0, 1).
        b2: the decay of ``nu`` per step, in [0, 1).
        eps: added to ``nu`` in the denominator, in [0, inf).
        weight_decay: decoupled decay, multiplied by the learning rate. A gradient of rows
            decays these rows.
        mask: which parameters decay: a pytree of booleans, or a function of the parameters
            that returns one.
        sparse: what a gradient of rows means, for all parameters, or in a pytree, or as a
            function of the parameters that returns one. ``"lazy"``: all other rows stay as
            they are. ``"exact"``: they move as under a gradient of zero, which is computed
            when they are needed, at the cost of the rows that are; the result is that of
            dense gradients. Such a table takes gradients of rows only, read with
            :meth:`Adamax.current` or :meth:`Adamax.lookup`, and the state has a third part.
            ``1 - learning_rate * weight_decay`` must be at least ``b1``: this is checked
            where both are numbers, and else rows that catch up are wrong where it is not.
        state_dtype: ``"float32"``, ``"bfloat16"`` or ``"8bit"``: what ``mu`` and ``nu`` are
            kept in, 8, 4 or 2 bytes for an element of both. With ``"8bit"`` they are codes,
            and the state begins with a :class:`CompactState`, which also has 4 bytes for
            each row of parameters with two or more axes. Only those then take gradients of
            rows. :func:`convert_state` converts the state of a checkpoint.
        stochastic_rounding: whether parameters in bfloat16 are rounded up or down at
            random, so that moves too small for them are right on average. In ``update`` it
            is the sum of parameter and update that is, so that nothing should come after
            it in a chain.

    Raises:
        TypeError: an argument of the wrong type; with ``sparse="exact"`` also ``b1``,
            ``b2`` or ``eps`` that are arrays of JAX.
        ValueError: a number out of its range, NaN included. Arrays of JAX are not looked
            at, as they may be traced. With ``sparse="exact"`` also betas for which it would
            take too long, and in ``step`` and ``update`` a gradient that is not of rows, or
            of rows that may have been stale when they were read. With compact state also
            betas for which ``mu / nu`` could be more than 1.25, in ``init`` parameters in
            float64 or complex numbers, and in ``step`` and ``update`` a state of another
            ``state_dtype``.

    >>> import jax, jax.numpy as jnp
    >>> from adamax.jax import IndexedSlices, apply_updates
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
    options = weight_decay, mask, sparse, state_dtype, stochastic_rounding
    return Adamax(learning_rate, b1, b2, eps, *options)


def scale_by_adamax(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> optax.GradientTransformation:
    r"""The rule without the learning rate, in place of :func:`optax.scale_by_adamax`.

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        \text{update} &= \frac{1}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    The state is an ``optax.ScaleByAdamState(count, mu, nu)``. An update has the dtype of
    the parameter, or without parameters of the gradient. Arguments and errors are those of
    :func:`adamax`.

    >>> import jax.numpy as jnp
    >>> optimizer = scale_by_adamax()
    >>> state = optimizer.init(jnp.zeros(2))
    >>> update, state = optimizer.update(jnp.array([3.0, -0.1]), state)
    >>> update.round(3), state.count
    (Array([ 1., -1.], dtype=float32), Array(1, dtype=int32))
    """
    whole = Adamax(-1.0, b1, b2, eps)

    def init(params: PyTree) -> optax.ScaleByAdamState:
        return whole.init(params)[0]

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        updates, (state, _) = whole.update(updates, (state, optax.EmptyState()), params)
        return updates, state

    return optax.GradientTransformation(init, update)


def _step_leaf(
    gradient: Any,
    arrays: Any,
    scalars: StepScalars,
    rounding: tuple[str, bool, Any],
    decays: bool,
    as_update: bool,
    name: str,
) -> tuple[Any, ...]:
    """One parameter, or what is to be added to it, and its state after a step.

    ``arrays`` are the parameter, or without one the gradient, and its state.
    """
    (kind, stochastic, random), (param, *of_state) = rounding, arrays
    dtype = jnp.result_type(param.values if is_slices(param) else param)
    stochastic = stochastic and dtype == jnp.bfloat16
    is_difference = as_update and stochastic
    if as_update and not (decays or is_difference):  # then it has no part in the update
        param = jnp.zeros((), dtype)
    else:
        param = jnp.asarray(param)
    if kind == "float32":
        state = _checked_moments(param.shape, of_state, name)
    else:
        check_parameter(dtype, kind, name)
        state = checked(kind, param.shape or jnp.shape(of_state[0]), of_state, name)
    table = state[0]
    if is_slices(gradient):
        check_rows(gradient, table, f"the gradient{name}")
        if kind == "8bit":
            check_frame_of_rows(table, state[2], name)
    else:
        gradient = jnp.asarray(gradient)
        if gradient.shape != table.shape:
            raise ValueError(
                f"a gradient must have the shape of its parameter, {table.shape}, "
                f"got {gradient.shape}{name}"
            )
    if kind != "float32" or stochastic:
        of_step = scalars_of(scalars, decays, as_update and not is_difference)
        operands = param, state, gradient, of_step, random
        if as_update:
            return take_update(*operands, is_difference=is_difference)
        return take_step(*operands)
    of_step, (mu, nu) = scalars.array(table.dtype, decays, as_update), state
    if not is_slices(gradient):
        # XLA makes one pass of an update and what comes after it.
        return (stepped if as_update else step_array)(param, mu, nu, gradient, of_step)
    if not as_update:
        return step_rows(param, mu, nu, gradient, of_step)
    update, mu, nu = updated_rows(param, mu, nu, gradient, of_step)
    # lax.cond wants updates to have the structure of the gradients, to the last flag.
    return replace(update, distinct=gradient.distinct, current=gradient.current), mu, nu


def _checked_moments(
    shape: tuple[int, ...], of_state: Sequence[Any], name: str
) -> list[jax.Array]:
    """``mu`` and ``nu`` as arrays in the dtype of the arithmetic; shape () is any."""
    dtypes = {jnp.result_type(moment) for moment in of_state}
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        raise TypeError(f"the state must be floating-point, got {dtypes}{name}")
    mu, nu = map(jnp.asarray, of_state)
    mu, nu = (moment.astype(arithmetic_dtype(mu.dtype)) for moment in (mu, nu))
    if not mu.shape == nu.shape == (shape or mu.shape):
        raise ValueError(
            f"the state must have the shape of its parameter, {shape}, got mu "
            f"{mu.shape} and nu {nu.shape}{name}"
        )
    return [mu, nu]


def _checked(hyperparameter: str, value: Any) -> Any:
    """A number as a float if it may be one; an array as it is, since it may be traced."""
    if not isinstance(value, jax.Array):
        return checked_number(hyperparameter, value, _NAMES.get(hyperparameter))
    if value.shape:
        name = _NAMES.get(hyperparameter, hyperparameter)
        raise ValueError(f"{name} must be a number, got an array of {value.shape}")
    return value


def _is_exact(sparse: Any, name: str = "") -> bool:
    if not (isinstance(sparse, str) and sparse in ("lazy", "exact")):
        raise ValueError(f"sparse must be 'lazy' or 'exact', got {sparse!r}{name}")
    return sparse == "exact"
