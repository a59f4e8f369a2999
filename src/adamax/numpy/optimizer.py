"""The class that tf.keras documents, for arrays that are updated in place."""

import contextlib
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .._core import compact, rule
from .._core.kernels import Problem, kernels, problem_of
from .._core.rule import Hyperparameters, LearningRate, Scalar
from .._core.stale import StaleRows, TableLock, raise_problem
from .._core.threads import get_num_threads
from .checkpoint import (
    checked_state,
    in_float32,
    load_state,
    read_tensors,
    write_tensors,
)
from .gradients import (
    Gradient,
    check_range,
    checked_dense,
    checked_indices,
    checked_rows,
    is_sparse,
    raise_for,
    split_pairs,
)
from .parameters import Array, ArraysOrMapping, Parameter, Parameters
from .schedules import schedule_from_config, schedule_to_config
from .state import bfloat16


class _Hyperparameter:
    """An attribute of the optimizer that is validated when it is assigned."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: "Adamax | None", owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        return getattr(optimizer.hyperparameters, self._name)

    def __set__(self, optimizer: "Adamax", value: Any) -> None:
        optimizer._change(**{self._name: value})


class Adamax:
    r"""Adamax (Adam with the infinity norm) for NumPy arrays, which it updates in place.

    For the gradient :math:`g` of a parameter :math:`w` at step :math:`t = 1, 2, \dots`:

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        w &\leftarrow (1 - \eta_t \lambda) w
            - \frac{\eta_t}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    Parameters are float32, float64, float16 or ``ml_dtypes.bfloat16`` arrays of any shape,
    ``np.memmap`` included. ``m`` and ``u`` are float32, or float64 for float64. A gradient
    is an array of the parameter's shape, or the gradient of some rows
    (:class:`IndexedSlices` or anything else with ``values`` and ``indices``). Then only
    those rows of ``w``, ``m`` and ``u`` are read or written, at a cost that does not depend
    on the size of the table.

    State belongs to the array object: pass the same object in every step, not a new view of
    it. It is freed when the array's memory is. The state of an array whose memory belongs
    to something else, such as a ``np.memmap``, is kept until :meth:`forget`.

    One optimizer is for one Python thread at a time; two may step in two threads. Lookups
    and steps with ``sparse="exact"`` wait for each other.

    A non-finite gradient is not filtered: it reaches the parameters, and ``m`` stays
    non-finite. To guard against it, check before the step
    (``if np.isfinite(gradient).all(): ...``) or bound the gradients with ``clipvalue``,
    which stops infinity but not NaN.

    All hyperparameters are attributes that may be assigned between steps.

    Args:
        learning_rate: a number in [0, inf), or a callable that returns one for the 0-based
            step; it is called once per step.
        beta_1: the decay of ``m`` per step, in [0, 1).
        beta_2: the decay of ``u`` per step, in [0, 1).
        epsilon: added to ``u`` in the denominator, in [0, inf). With 0, the paper's own
            rule, an element that has only seen gradients of zero does not move.
        name: of the optimizer, for the user's own use.
        clipnorm: scale each gradient down to at most this L2 norm.
        clipvalue: clamp each element of a gradient to ``[-clipvalue, clipvalue]``.
        weight_decay: decoupled decay, multiplied by the learning rate. A sparse gradient
            decays the rows that it touches.
        global_clipnorm: scale all gradients of a step down by one factor, so that their
            joint L2 norm is at most this.
        sparse: what a sparse gradient means for the rows it does not touch. ``"lazy"``
            leaves them as they are. ``"exact"`` gives them a gradient of zero, as the dense
            rule does, at the cost of the touched rows: read rows with :meth:`lookup`, and
            call :meth:`flush` before anything reads a whole table.
        state_dir: a directory to keep ``m`` and ``u`` in, as memory-mapped ``.npy`` files,
            for tables larger than memory. Files of an earlier run are not overwritten.
        state_dtype: how ``m`` and ``u`` are stored. ``"float32"`` takes 8 bytes for each
            parameter. ``"8bit"`` takes 2, and 4 more for each row of a table with sparse
            gradients; ``u`` is stored in quarters of an octave from 1e-12 to 1e7, smaller
            ones as 0. ``"bfloat16"`` takes 4. See docs/compact.md. Float64 arrays need
            ``"float32"``, which is float64 for them.
        stochastic_rounding: round bfloat16 parameters up or down by random bits, so that
            moves of less than half a unit in the last place count on average. The bits are
            the same in each run.

    Norms for clipping are those of the gradient after repeated indices have been summed. At
    most one of ``clipnorm``, ``clipvalue`` and ``global_clipnorm`` may be given.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, NaN included, or betas that
            ``sparse="exact"`` or ``state_dtype="8bit"`` does not support (see docs/exact.md
            and docs/compact.md).
        ModuleNotFoundError: ``state_dtype="bfloat16"`` without ml_dtypes.

    >>> import numpy as np
    >>> from adamax import Adamax, IndexedSlices
    >>> weights = np.zeros(3, np.float32)
    >>> table = np.zeros((1000, 2), np.float32)
    >>> optimizer = Adamax(learning_rate=0.1)
    >>> optimizer.apply_gradients([
    ...     (np.array([1, -2, 0], np.float32), weights),
    ...     (IndexedSlices(np.ones((2, 2), np.float32), [7, 7]), table),
    ... ])
    1
    >>> weights.round(3)
    array([-0.1,  0.1,  0. ], dtype=float32)
    >>> np.flatnonzero(table.any(axis=1))
    array([7])

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1;
    arguments and defaults as ``tf.keras.optimizers.Adamax``, whose default learning rate is
    0.001 where the paper has 0.002.
    """

    # An unknown attribute raises an AttributeError.
    __slots__ = (
        "_hyperparameters",
        "_iterations",
        "_lock",
        "_parameters",
        "_stochastic_rounding",
        "name",
    )

    learning_rate = _Hyperparameter()
    beta_1 = _Hyperparameter()
    beta_2 = _Hyperparameter()
    epsilon = _Hyperparameter()
    weight_decay = _Hyperparameter()
    clipnorm = _Hyperparameter()
    clipvalue = _Hyperparameter()
    global_clipnorm = _Hyperparameter()
    sparse = _Hyperparameter()

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "Adamax",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        weight_decay: float = 0.0,
        global_clipnorm: float | None = None,
        sparse: str = "lazy",
        state_dir: str | os.PathLike[str] | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        if not (state_dir is None or isinstance(state_dir, str | os.PathLike)):
            raise TypeError(f"state_dir must be a path, got {state_dir!r}")
        self._stochastic_rounding = compact.check_stochastic_rounding(stochastic_rounding)
        if compact.check_state_dtype(state_dtype) == "bfloat16":
            bfloat16()  # which may not be installed
        self._hyperparameters = Hyperparameters(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            sparse=sparse,
        )
        if state_dtype == "8bit":
            compact.check_betas(self.beta_1, self.beta_2)
        self.name = name
        self._iterations = np.zeros((), np.int64)
        self._lock = TableLock()
        self._parameters = Parameters(
            None if state_dir is None else Path(state_dir), state_dtype
        )

    # --- Stepping ----------------------------------------------------------------------

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Gradient, Array]]) -> int:
        """Take one step, with ``(gradient, parameter)`` pairs, and return the step count.

        A gradient of None leaves its parameter alone. Parameters not seen before get zero
        state. Gradients are never written to. Arrays may have any layout and byte order;
        contiguous ones are fast. An interrupt finds the step done or not begun.

        Args:
            grads_and_vars: pairs; each parameter a writable array that occurs once.

        Raises:
            TypeError: a parameter or gradient of a type that cannot be used.
            ValueError: no gradient at all, shapes that do not match, a parameter that is
                read-only, occurs twice or shares memory with another, or a learning rate
                out of range; an array that a copied optimizer does not know.
            IndexError: a row index outside its table.
            RuntimeError: with ``sparse="exact"``, a gradient of a row that was stale when
                it was read; with ``state_dir``, a step in a forked process.

            After an error no parameter and no state has changed.

        >>> import numpy as np
        >>> weights = np.array([1.0, 1.0])
        >>> Adamax(0.5).apply_gradients([(np.array([3.0, -0.001]), weights)])
        1
        >>> weights.round(3)
        array([0.5, 1.5])
        """
        with self._lock.held if self.sparse == "exact" else contextlib.nullcontext():
            return self._step(grads_and_vars)

    def _step(self, grads_and_vars: Iterable[tuple[Gradient, Array]]) -> int:
        h, t = self._hyperparameters, self.iterations + 1
        learning_rate = rule.learning_rate_at(h.learning_rate, t - 1)
        scalars = rule.scalars_of(
            h,
            rule.step_size(learning_rate, h.beta_1, t),
            rule.decay_factor(learning_rate, h.weight_decay),
            seed=t,
            stochastic=self._stochastic_rounding,
        )
        gradients, arrays = split_pairs(grads_and_vars)
        parameters, all_known = self._parameters.of(arrays)
        rows: dict[int, tuple[Array, Array]] = {}
        if set(map(type, gradients)) != {np.ndarray}:
            rows = {
                i: checked_rows(gradient, parameters[i])
                for i, gradient in enumerate(gradients)
                if is_sparse(gradient)
            }
        is_8bit = self.state_dtype == "8bit"
        if is_8bit:
            rows |= {
                i: (np.arange(p.shape[0]), checked_dense(gradients[i], p))
                for i, p in enumerate(parameters)
                if p.has_rows and i not in rows
            }
        dense = [i for i in range(len(arrays)) if i not in rows]
        if h.sparse == "exact":
            self._check_exact(parameters, rows, float(scalars[Scalar.DECAY]))
        if not all_known:  # there are no arrays for the state until all else is right
            for i, (indices, _) in rows.items():
                check_range(indices, parameters[i])
            for i in dense:
                checked_dense(gradients[i], parameters[i])
            self._parameters.adopt(parameters)
        tables = [
            self._table(arrays[i], parameters[i], *of_table, scalars)
            for i, of_table in rows.items()
        ]
        of_dense = parameters if not rows else [parameters[i] for i in dense]

        def take(of_gradients: Sequence[Any]) -> Problem | None:
            result = kernels().step(
                arrays if not rows else [arrays[i] for i in dense],
                [parameter.state["m"] for parameter in of_dense],
                [parameter.state["u"] for parameter in of_dense],
                of_gradients,
                scalars[None],
                [parameter.frame for parameter in of_dense] if is_8bit else None,
                tables,
                [self._iterations],
                h.clipnorm or math.inf,
                h.global_clipnorm or math.inf,
                get_num_threads(),
            )
            return problem_of(result)

        problem = take(gradients if not rows else [gradients[i] for i in dense])
        if problem is not None and problem.kind == "unfit":
            for array, parameter in zip(arrays, parameters, strict=True):
                parameter.check(array)
            # Lists, integers and the like are converted, and what is wrong raises.
            problem = take([checked_dense(gradients[i], parameters[i]) for i in dense])
        if problem is not None:
            raise_for(problem, parameters[[*dense, *rows][problem.where]])
        return self.iterations

    def _check_exact(
        self, parameters: Sequence[Parameter], rows: Container[int], decay: float
    ) -> None:
        """Raise for settings or gradients that stale rows do not allow."""
        h = self._hyperparameters
        for i, parameter in enumerate(parameters):
            name = f"parameter {parameter.name!r}"
            if i in rows:
                settings = h.beta_1, h.beta_2, h.epsilon, decay
                parameter.stale_rows(h).check_settings(*settings, name)
            elif parameter.stale is not None:
                parameter.stale.check_all_current(name)

    def _table(
        self,
        array: Array,
        parameter: Parameter,
        indices: Array,
        values: Array,
        scalars: npt.NDArray[np.float64],
    ) -> tuple[Any, ...]:
        """A table as the verb ``step`` takes it."""
        h, exact = self._hyperparameters, None
        if h.sparse == "exact":
            stale = parameter.stale_rows(h)
            step_size, decay = map(float, scalars[[Scalar.STEP_SIZE, Scalar.DECAY]])
            settings = step_size, decay, h.beta_1, h.beta_2, h.epsilon
            exact = stale.part(stale.record(*settings, partial(self._flush, parameter)))
        m, u, frame = parameter.state["m"], parameter.state["u"], parameter.frame_of_rows()
        return array, m, u, indices, values, scalars, frame, exact

    # --- Stale rows --------------------------------------------------------------------

    def lookup(self, table: Array, ids: npt.ArrayLike) -> Array:
        """A copy of the rows ``table[ids]``, with ``sparse="exact"`` up to date.

        In exact mode a row that a step does not touch becomes stale, and moves only when it
        is needed: read rows through this method, before their gradient is computed. A row
        without a gradient in the next step has a gradient of zero in it, read or not. In
        lazy mode rows are never stale, and this is the same as ``table[ids]``.

        Args:
            table: a parameter; its stale rows at ``ids`` are caught up.
            ids: integers in ``[0, rows of the table)``, of any shape.

        Returns:
            An array of the shape ``(*ids.shape, *table.shape[1:])``.

        Raises:
            IndexError: an id outside the table.
            TypeError: ids that are no integers, or what :meth:`build` raises.
            ValueError: a table without rows, or what :meth:`build` raises.

        >>> import numpy as np
        >>> from adamax import IndexedSlices
        >>> table = np.zeros((1000, 2), np.float32)
        >>> optimizer = Adamax(learning_rate=0.1, sparse="exact")
        >>> for id in (7, 3, 7):
        ...     rows = optimizer.lookup(table, [id])
        ...     gradient = IndexedSlices(2 * (rows - 1), [id])
        ...     step = optimizer.apply_gradients([(gradient, table)])
        >>> table[3].round(3)  # has yet to take the last step
        array([0.053, 0.053], dtype=float32)
        >>> optimizer.lookup(table, 3).round(3)
        array([0.086, 0.086], dtype=float32)
        """
        (parameter,) = self._parameter_of(table)
        if not parameter.shape:
            raise ValueError(f"parameter {parameter.name!r} has no rows to look up")
        what = f"ids for parameter {parameter.name!r}"
        indices = checked_indices(ids, parameter.shape[0], what, what)
        check_range(indices, parameter, what)
        with self._lock.held:
            stale = parameter.stale
            if stale is not None and stale.may_be_stale:
                result = kernels().catch_up_rows(
                    self._of_catching_up(table, parameter, stale),
                    indices.ravel(),
                    get_num_threads(),
                )
                self._check(result, parameter)
            return np.asarray(table[indices])

    def flush(self, table: Array | None = None) -> None:
        """Catch up all stale rows of a table, or of all tables.

        Call it before anything reads tables other than by :meth:`lookup`: an evaluation on
        all rows, or saving the parameters. :meth:`state_dict` and :meth:`save` call it. It
        takes a pass over the table and its state, and shows a progress bar when that is
        long and tqdm is installed. In lazy mode it does nothing.

        Args:
            table: a parameter, or None for all.

        Raises:
            TypeError, ValueError: what :meth:`build` raises.

        >>> import numpy as np
        >>> from adamax import IndexedSlices
        >>> table = np.zeros((3, 1))
        >>> optimizer = Adamax(learning_rate=0.1, sparse="exact")
        >>> for ids in ([0, 1], [2]):
        ...     rows = optimizer.lookup(table, ids)
        ...     gradient = IndexedSlices(np.ones_like(rows), ids)
        ...     step = optimizer.apply_gradients([(gradient, table)])
        >>> table.ravel().round(3)
        array([-0.1  , -0.1  , -0.053])
        >>> optimizer.flush()
        >>> table.ravel().round(3)
        array([-0.147, -0.147, -0.053])
        """
        tables = self._parameters if table is None else self._parameter_of(table)
        with self._lock.held:
            for parameter in tables:
                self._flush(parameter)

    def _parameter_of(self, array: Array) -> list[Parameter]:
        """The parameter of one array, adopted if it is new."""
        parameters, _ = self._parameters.of([array])
        parameters[0].check(array)
        self._parameters.adopt(parameters)
        return parameters

    def _flush(self, parameter: Parameter) -> None:
        stale, array = parameter.stale, parameter.array
        if stale is None or not stale.may_be_stale or array is None:
            return
        parameter.check(array)
        of_table = self._of_catching_up(array, parameter, stale)

        def catch_up(start: int, stop: int) -> None:
            result = kernels().catch_up_range(of_table, start, stop, get_num_threads())
            self._check(result, parameter)

        stale.flush(catch_up, f"parameter {parameter.name!r}")

    def _of_catching_up(
        self, array: Array, parameter: Parameter, stale: StaleRows
    ) -> tuple[Any, ...]:
        """A table as the verbs that catch up rows take it."""
        m, u, frame = parameter.state["m"], parameter.state["u"], parameter.frame_of_rows()
        of_stale = stale.stamps, stale.history.arrays, stale.epsilon
        return array, m, u, frame, *of_stale, self.iterations, self._stochastic_rounding

    def _check(self, result: Any, parameter: Parameter) -> None:
        problem = problem_of(result)
        if problem is not None:
            raise_problem(problem, f"parameter {parameter.name!r}", "lookup(table, ids)")

    def minimize(
        self,
        loss_and_gradients: Callable[[], tuple[Any, Sequence[Gradient]]],
        parameters: Sequence[Array],
    ) -> Any:
        """Take one step with the gradients that ``loss_and_gradients`` returns.

        Args:
            loss_and_gradients: called without arguments; returns the loss and one gradient
                for each of ``parameters``.
            parameters: the arrays to update.

        Returns:
            The loss, as ``loss_and_gradients`` returned it.

        Raises:
            ValueError: another number of gradients than of parameters, and whatever
                :meth:`apply_gradients` raises.

        >>> import numpy as np
        >>> x = np.array([3.0])
        >>> optimizer = Adamax(learning_rate=0.1)
        >>> for _ in range(100):
        ...     loss = optimizer.minimize(lambda: (float(x @ x), [2 * x]), [x])
        >>> bool(abs(x) < 0.05)
        True
        """
        loss, gradients = loss_and_gradients()
        if len(gradients) != len(parameters):
            raise ValueError(
                f"loss_and_gradients must return one gradient for each of "
                f"{len(parameters)} parameters, got {len(gradients)}"
            )
        self.apply_gradients(zip(gradients, parameters, strict=True))
        return loss

    # --- Parameters --------------------------------------------------------------------

    def build(self, parameters: ArraysOrMapping) -> None:
        """Create zero state for ``parameters`` now, in their order.

        Needed before a checkpoint can be loaded into a new optimizer. A mapping gives the
        parameters names, which checkpoints then use; otherwise they are numbered in the
        order in which they are first seen. Parameters that have state keep it.

        Raises:
            TypeError: a parameter that is no array, or of a dtype that cannot be used.
            ValueError: a parameter that is read-only, occurs twice, shares memory with
                another or has a name that is taken.
            OSError: with ``state_dir``, no room for the state.

        >>> import numpy as np
        >>> optimizer, weights = Adamax(), np.zeros(3)
        >>> optimizer.build({"weights": weights})
        >>> list(optimizer.state_dict())
        ['iterations', 'weights.m', 'weights.u']
        """
        self._parameters.adopt(self._parameters.named(parameters))

    def forget(self, parameter: Array) -> None:
        """Free the state of ``parameter``. In a later step it would begin anew.

        Raises:
            ValueError: the optimizer has no state for this array.

        >>> import numpy as np
        >>> weights, optimizer = np.zeros(3), Adamax()
        >>> optimizer.build([weights])
        >>> optimizer.forget(weights)
        >>> list(optimizer.state_dict())
        ['iterations']
        """
        known = self._parameters.find(parameter)
        if known is None:
            raise ValueError("parameter must be an array that this optimizer has state for")
        with self._lock.held:
            self._flush(known)
            self._parameters.forget(known)

    # --- Configuration -----------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """The number of steps taken."""
        return int(self._iterations)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """All hyperparameters, validated and frozen."""
        return self._hyperparameters

    @property
    def state_dtype(self) -> str:
        """How the state is stored."""
        return self._parameters.state_dtype

    @property
    def stochastic_rounding(self) -> bool:
        """Whether bfloat16 parameters are rounded by random bits."""
        return self._stochastic_rounding

    def _change(self, **changed: Any) -> None:
        if "sparse" in changed and changed["sparse"] != "exact":
            self._check_none_is_stale("sparse is changed")
        changed_to = replace(self._hyperparameters, **changed)
        if self.state_dtype == "8bit":
            compact.check_betas(changed_to.beta_1, changed_to.beta_2)
        self._hyperparameters = changed_to

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, without ``state_dir``, as JSON can hold them.

        Raises:
            TypeError: ``learning_rate`` is a callable that has no ``get_config`` itself.

        >>> Adamax(clipnorm=1).get_config()["clipnorm"]
        1.0
        """
        return {
            **self._arguments(),
            "learning_rate": schedule_to_config(self.learning_rate),
        }

    def _arguments(self) -> dict[str, Any]:
        """Those of the constructor, but for ``state_dir``."""
        return {
            "name": self.name,
            **rule.settings(self._hyperparameters),
            "state_dtype": self.state_dtype,
            "stochastic_rounding": self.stochastic_rounding,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        custom_objects: Mapping[str, type] | None = None,
    ) -> Self:
        """An optimizer with the hyperparameters that :meth:`get_config` returned.

        A configuration may come from anywhere. It selects among the schedule classes of
        Keras and tf_keras and their subclasses, some schedule functions of optax, and
        ``custom_objects``; nothing else is looked up, imported or called.

        Args:
            config: from :meth:`get_config`, perhaps by way of JSON.
            custom_objects: further classes of learning-rate schedules by name.

        Raises:
            TypeError: an unknown entry, or one of the wrong type.
            ValueError: a value out of range, or a schedule that is not a known one.

        >>> Adamax.from_config(Adamax(beta_1=0.8).get_config()).hyperparameters.beta_1
        0.8
        """
        rule.reject_unknown(config, Adamax()._arguments(), "entry of config")
        arguments = dict(config)
        if isinstance(arguments.get("learning_rate"), Mapping):
            arguments["learning_rate"] = schedule_from_config(
                arguments["learning_rate"], custom_objects or {}
            )
        return cls(**arguments)

    def __repr__(self) -> str:
        given = self._arguments().items()
        arguments = ", ".join(f"{k}={v!r}" for k, v in given if v is not None)
        return f"{type(self).__name__}({arguments})"

    # --- Checkpoints -------------------------------------------------------------------

    def state_dict(self, state_dtype: str | None = None) -> dict[str, Array]:
        """The step count and the state: ``iterations``, and ``<name>.m``, ``<name>.u``.

        Eight-bit state also has a ``<name>.frame``. The arrays are the optimizer's own, not
        copies: the next step changes them. With ``sparse="exact"`` all rows are caught up
        first, the parameters' too: take a copy of the parameters after this, not before.

        Args:
            state_dtype: ``"float32"`` for copies of the moments as float32, which any
                optimizer can load; None for the state as it is stored.

        Raises:
            ValueError: another ``state_dtype``.

        >>> import numpy as np
        >>> optimizer, weights = Adamax(), np.array([1.0])
        >>> optimizer.apply_gradients([(np.array([2.0]), weights)])
        1
        >>> optimizer.state_dict()
        {'iterations': array(1), '0.m': array([0.2]), '0.u': array([2.])}
        """
        compact.check_saved_dtype(state_dtype)
        self.flush()
        state: dict[str, Array] = {"iterations": np.array(self.iterations, np.int64)}
        for parameter in self._parameters:
            parts = parameter.state if state_dtype is None else in_float32(parameter)
            state |= {f"{parameter.name}.{part}": array for part, array in parts.items()}
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], parameters: ArraysOrMapping | None = None
    ) -> None:
        """Copy a :meth:`state_dict` into this optimizer.

        Args:
            state_dict: of an optimizer with parameters of the same names and shapes.
            parameters: passed to :meth:`build` first; needed if this optimizer is new. In a
                copy of an optimizer they take the place of the arrays it was copied with.

        Raises:
            TypeError: an entry of a dtype that state cannot have.
            ValueError: entries missing or left over, shapes that differ, a step count out
                of range, and whatever :meth:`build` raises. No state has changed then.
            RuntimeError: with ``sparse="exact"``, stale rows: the steps that they have yet
                to take belong to the state that would be replaced.

        >>> import numpy as np
        >>> weights = np.array([1.0])
        >>> first, second = Adamax(), Adamax()
        >>> first.apply_gradients([(np.array([2.0]), weights)])
        1
        >>> second.load_state_dict(first.state_dict(), [weights])
        >>> second.iterations
        1
        """
        self._check_none_is_stale("parameters and state are loaded")
        target = self._parameters
        if parameters is not None and target.is_copy:
            target = target.begun_anew()
        fresh = [] if parameters is None else target.named(parameters)
        iterations, state = checked_state(state_dict, dict.fromkeys([*target, *fresh]))
        target.adopt(fresh)
        load_state(state)
        self._parameters = target
        self._iterations[...] = iterations

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically.

        A crash leaves the old file or the new one, never a part. Parameters and
        hyperparameters are not in it: save the former yourself, see :meth:`get_config` for
        the latter. Needs the extra ``adamax[numpy]``. With ``sparse="exact"`` all rows are
        caught up first, so save the parameters after this or after :meth:`flush`. Where
        ``path`` is a symbolic link, the file that it points to is replaced.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: the file cannot be written; the old one is still there.

        >>> import numpy as np, tempfile
        >>> weights = np.array([1.0])
        >>> optimizer = Adamax()
        >>> optimizer.build([weights])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     optimizer.save(f"{directory}/optimizer.safetensors")
        ...     Adamax().load(f"{directory}/optimizer.safetensors", [weights])
        """
        write_tensors(Path(path), self.state_dict())

    def load(
        self, path: str | os.PathLike[str], parameters: ArraysOrMapping | None = None
    ) -> None:
        """Read the state from a file that :meth:`save` wrote, in pieces.

        Args:
            path: the file.
            parameters: passed to :meth:`build` first; needed if this optimizer is new.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            FileNotFoundError: there is no such file.
            TypeError: an entry of a dtype that state cannot have.
            ValueError: the file is damaged or not from :meth:`save`, or its state does not
                fit (see :meth:`load_state_dict`).
        """
        with read_tensors(Path(path)) as tensors:
            self.load_state_dict(tensors, parameters)

    def _check_none_is_stale(self, when: str) -> None:
        for parameter in self._parameters:
            if parameter.may_be_stale:
                raise RuntimeError(
                    f"rows of parameter {parameter.name!r} are stale: call flush() before "
                    f"{when}"
                )

    def __getstate__(self) -> Any:
        self.flush()  # a copy does not know which steps rows have yet to take
        return super().__getstate__()
