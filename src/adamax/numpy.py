"""Adamax for NumPy arrays: the class that tf.keras documents, updating in place."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Self, TypeAlias

import numpy.typing as npt

import numpy as np

from . import _rule
from ._arrays import (
    Array,
    DenseUpdate,
    KnownBatch,
    Launch,
    RowsUpdate,
    Scalars,
    SparseGradient,
    Update,
    Variable,
    check_disjoint,
    clip_factors,
    is_sparse,
    prepared,
    written_by_steps,
)
from ._checkpoint import StateFiles, copy_in_pieces, read_tensors, write_tensors
from ._kernels import get_num_threads
from ._rule import Coefficients, Hyperparameters, LearningRate
from ._schedules import schedule_from_config, schedule_to_config

__all__ = ["Adamax", "IndexedSlices"]


@dataclass(frozen=True, slots=True, eq=False)
class IndexedSlices:
    """The gradient of some rows of a table, as :class:`tf.IndexedSlices` holds it.

    Row ``indices[i]`` of the table has the gradient ``values[i]``; where an index repeats,
    its values are summed. Rows whose index is absent are not touched.

    Args:
        values: shape ``(n, ...)``, the gradients of the rows.
        indices: shape ``(n,)``, integers in ``[0, rows of the table)``, in any order.
        dense_shape: the shape of the table, if it should be checked.

    >>> import numpy as np
    >>> IndexedSlices(np.ones((2, 3), np.float32), np.array([7, 4])).indices
    array([7, 4])
    """

    values: Any
    indices: Any
    dense_shape: Any = None


Gradient: TypeAlias = npt.ArrayLike | SparseGradient | None
Parameters: TypeAlias = Iterable[Array] | Mapping[str, Array]


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

    State belongs to the array object: pass the same object in every step, not a new view.
    One optimizer is for one Python thread at a time; two may step in two threads.

    A non-finite gradient is not filtered: it reaches the parameters, and ``m`` stays
    non-finite. To guard against it, check before the step
    (``if np.isfinite(gradient).all(): ...``) or bound the gradients with ``clipvalue``,
    which stops infinity but not NaN.

    Args:
        learning_rate: a number in [0, inf), or a callable that returns one for the 0-based
            step; it is called once per step.
        beta_1: the decay of ``m`` per step, in [0, 1).
        beta_2: the decay of ``u`` per step, in [0, 1).
        epsilon: added to ``u`` in the denominator, at least the smallest normal float32.
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

    Norms for clipping are those of the gradient after repeated indices have been summed. At
    most one of ``clipnorm``, ``clipvalue`` and ``global_clipnorm`` may be given.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, NaN included, or betas that
            ``sparse="exact"`` cannot have (see docs/exact.md).

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
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        if not (state_dir is None or isinstance(state_dir, str | os.PathLike)):
            raise TypeError(f"state_dir must be a path, got {state_dir!r}")
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
        self.name = name
        self._iterations = 0
        self._state_dir = None if state_dir is None else Path(state_dir)
        self._variables: dict[int, Variable] = {}  # by id of the array, in order
        self._written = written_by_steps(())
        self._known = KnownBatch()

    # --- Stepping ----------------------------------------------------------------------

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Gradient, Array]]) -> int:
        """Take one step, with ``(gradient, parameter)`` pairs, and return the step count.

        A gradient of None leaves its parameter alone. Parameters not seen before get zero
        state. Gradients are never written to. A gradient of another real dtype or another
        memory order than its parameter is converted first, at the cost of a copy; so is a
        parameter that is not contiguous, aligned and of the native byte order.

        Args:
            grads_and_vars: pairs; each parameter a writable array that occurs once.

        Raises:
            TypeError: a parameter or gradient of a type that cannot be used.
            ValueError: no gradient at all, shapes that do not match, a parameter that is
                read-only, occurs twice or shares memory with another, or a learning rate
                out of range.
            IndexError: a row index outside its table.
            RuntimeError: with ``sparse="exact"``, a gradient for a row that was not up to
                date.

            After an error no parameter and no state has changed.

        >>> import numpy as np
        >>> weights = np.array([1.0, 1.0])
        >>> Adamax(0.5).apply_gradients([(np.array([3.0, -0.001]), weights)])
        1
        >>> weights.round(3)
        array([0.5, 1.5])
        """
        hyperparameters = self._hyperparameters
        learning_rate = _rule.learning_rate_at(
            hyperparameters.learning_rate, self._iterations
        )
        gradients, parameters = _split(grads_and_vars)
        threads = get_num_threads()
        launches, updates = self._prepared(gradients, parameters)
        step = Scalars(
            _rule.step_size(learning_rate, hyperparameters.beta_1, self._iterations + 1),
            _rule.decay_factor(learning_rate, hyperparameters.weight_decay),
            (hyperparameters.beta_1, hyperparameters.beta_2),
            clip_factors(launches, len(parameters), hyperparameters, threads),
            Coefficients.of(hyperparameters),
            threads,
        )
        for part in launches:
            part.launch(step)
        for update in updates:
            update.finish()
        self._iterations += 1
        return self._iterations

    def _prepared(
        self, gradients: Sequence[Any], parameters: Sequence[Array]
    ) -> tuple[Sequence[Launch], Sequence[Update]]:
        """The launches of a step, and the updates to finish when they are done.

        All that can fail, fails here.
        """
        everything = range(len(parameters))
        plain = set(map(type, gradients)) == {np.ndarray}  # hundreds are quickly seen
        sparse: set[int] = (
            set() if plain else {i for i in everything if is_sparse(gradients[i])}
        )
        if sparse:
            dense = [i for i in everything if i not in sparse]
            known = self._known.launch(
                [gradients[i] for i in dense],
                [parameters[i] for i in dense],
                dense,
                self._written,
            )
        else:
            known = self._known.launch(gradients, parameters, slice(None), self._written)
        examined: Sequence[int] = sorted(sparse)
        if known is None or self._known.holds(parameters[i] for i in examined):
            known, examined = None, everything
        variables = self._checked_variables([parameters[i] for i in examined])
        updates = [
            (RowsUpdate if i in sparse else DenseUpdate)(gradients[i], variable, i)
            for i, variable in zip(examined, variables, strict=True)
        ]
        self._adopt(variables)
        if self._hyperparameters.sparse == "exact":
            self._check_rows_are_current(parameters, sparse, updates)
        launches = prepared(updates, self._written)
        if known is not None:
            return [known, *launches], updates
        if len(sparse) < len(parameters):
            self._known = KnownBatch(updates)
        return launches, updates

    def _check_rows_are_current(
        self, parameters: Sequence[Array], sparse: set[int], updates: Sequence[Update]
    ) -> None:
        """Raise if a row that has a gradient was behind when it was read."""
        for update in updates:
            if isinstance(update, RowsUpdate):
                table = f"parameter {update.variable.name!r}"
                update.variable.defer(self._hyperparameters).check_current(
                    update.table_groups, table, "lookup(table, ids)", "flush(table)"
                )
        if any(variable.deferred for variable in self._variables.values()):
            for i, parameter in enumerate(parameters):
                variable = self._variables[id(parameter)]
                if i not in sparse and variable.deferred is not None:
                    table = f"parameter {variable.name!r}"
                    variable.deferred.check_all_current(table, "flush(table)")

    # --- Rows that are behind ----------------------------------------------------------

    def lookup(self, table: Array, ids: npt.ArrayLike) -> Array:
        """A copy of the rows ``table[ids]``, with ``sparse="exact"`` up to date.

        In exact mode a row that is not touched is left behind, and moves only when it is
        needed: read rows through this method, before their gradient is computed. A row
        without a gradient in the next step has a gradient of zero in it, read or not. In
        lazy mode rows are never behind, and this is the same as ``table[ids]``.

        Args:
            table: a parameter; rows that are behind are written to.
            ids: integers in ``[0, rows of the table)``, of any shape.

        Returns:
            An array of the shape ``(*ids.shape, *table.shape[1:])``.

        Raises:
            IndexError: an id outside the table.
            TypeError: ids that are no integers, or what :meth:`build` raises.
            ValueError: a table without rows, or what :meth:`build` raises.

        >>> import numpy as np
        >>> table = np.zeros((1000, 2), np.float32)
        >>> optimizer = Adamax(learning_rate=0.1, sparse="exact")
        >>> for id in (7, 3, 7):
        ...     rows = optimizer.lookup(table, [id])
        ...     gradient = IndexedSlices(2 * (rows - 1), [id])
        ...     step = optimizer.apply_gradients([(gradient, table)])
        >>> table[3].round(3)  # not paid out yet what it missed in the last step
        array([0.053, 0.053], dtype=float32)
        >>> optimizer.lookup(table, 3).round(3)
        array([0.086, 0.086], dtype=float32)
        """
        (variable,) = self._checked_variables([table])
        if not variable.shape:
            raise ValueError(f"parameter {variable.name!r} has no rows to look up")
        self._adopt([variable])
        return variable.lookup(ids, get_num_threads())

    def flush(self, table: Array | None = None) -> None:
        """Bring all rows of a table, or of all tables, up to date, where they are behind.

        To be called before anything reads tables other than by :meth:`lookup`: an
        evaluation on all rows, or saving the parameters. :meth:`state_dict` and
        :meth:`save` call it. It takes a pass over the table and its state, and shows a
        progress bar when that is long and tqdm is installed. In lazy mode it does nothing.

        Args:
            table: a parameter, or None for all.

        Raises:
            TypeError, ValueError: what :meth:`build` raises.

        >>> import numpy as np
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
        if table is None:
            variables = list(self._variables.values())
        else:
            variables = self._checked_variables([table])
        for variable in variables:
            variable.flush(get_num_threads())

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

    def build(self, parameters: Parameters) -> None:
        """Create zero state for ``parameters`` now, in their order.

        Needed before a checkpoint can be loaded into a new optimizer. A mapping gives the
        parameters names, which checkpoints then use; otherwise they are numbered in the
        order in which they are first seen. Parameters that have state keep it.

        Raises:
            TypeError: a parameter that is no array, or of a dtype that cannot be used.
            ValueError: a parameter that is read-only, occurs twice, shares memory with
                another or has a name that is taken.

        >>> import numpy as np
        >>> optimizer = Adamax()
        >>> optimizer.build({"weights": np.zeros(3)})
        >>> list(optimizer.state_dict())
        ['iterations', 'weights.m', 'weights.u']
        """
        self._adopt(self._named_variables(parameters))

    def _named_variables(self, parameters: Parameters) -> list[Variable]:
        """As :meth:`_checked_variables`, with the names that a mapping gives."""
        if isinstance(parameters, Mapping):
            names = [str(name) for name in parameters]
            return self._checked_variables(list(parameters.values()), names)
        if isinstance(parameters, np.ndarray):
            raise TypeError(
                "parameters must be an iterable or a mapping of arrays, got one array"
            )
        return self._checked_variables(list(parameters))

    def _checked_variables(
        self, parameters: Sequence[Array], names: list[str] | None = None
    ) -> list[Variable]:
        """The variable of each parameter, the new ones not yet adopted."""
        variables: list[Variable] = []
        seen: set[int] = set()
        fresh: list[Variable] = []
        for position, parameter in enumerate(parameters):
            key = id(parameter)
            if key in seen:
                name = variables[[id(v.parameter) for v in variables].index(key)].name
                raise ValueError(f"parameter {name!r} occurs more than once")
            seen.add(key)
            variable = self._variables.get(key)
            if variable is None:
                number = str(len(self._variables) + len(fresh))
                variable = Variable(parameter, names[position] if names else number)
                fresh.append(variable)
            else:
                variable.check_unchanged()
            variables.append(variable)
        if fresh:
            check_disjoint(self._variables.values(), fresh)
            taken = {variable.name for variable in self._variables.values()}
            for variable in fresh:
                if variable.name in taken:
                    raise ValueError(
                        f"the name {variable.name!r} belongs to another parameter"
                    )
                taken.add(variable.name)
        return variables

    def _adopt(self, variables: Iterable[Variable]) -> None:
        """Allocate state for the new ones among ``variables``: for all of them or none."""
        fresh = [v for v in variables if id(v.parameter) not in self._variables]
        if not fresh:
            return
        with StateFiles(self._state_dir) as files:
            state = [
                [
                    files.zeros(
                        f"{number}.{part}.npy", *v.state_layout, beside=v.address, number=k
                    )
                    for k, part in enumerate(("m", "u"), start=1)
                ]
                for number, v in enumerate(fresh, start=len(self._variables))
            ]
        for variable, (m, u) in zip(fresh, state, strict=True):
            variable.hold(m, u)
        self._variables.update((id(v.parameter), v) for v in fresh)
        self._written = written_by_steps(self._variables.values())

    # --- Configuration -----------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """The number of steps taken."""
        return self._iterations

    @property
    def hyperparameters(self) -> Hyperparameters:
        """All hyperparameters, validated and frozen."""
        return self._hyperparameters

    @property
    def learning_rate(self) -> LearningRate:
        """The number or callable that was given; may be assigned at any time.

        >>> optimizer = Adamax(learning_rate=0.1)
        >>> optimizer.learning_rate = lambda step: 0.1 / (1 + step)
        """
        return self._hyperparameters.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: LearningRate) -> None:
        self._hyperparameters = replace(self._hyperparameters, learning_rate=value)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, without ``state_dir``, as JSON can hold them.

        Raises:
            TypeError: ``learning_rate`` is a callable that has no ``get_config`` itself.

        >>> Adamax(clipnorm=1).get_config()["clipnorm"]
        1.0
        """
        config = {"name": self.name, **_rule.settings(self._hyperparameters)}
        config["learning_rate"] = schedule_to_config(self.learning_rate)
        return config

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        custom_objects: Mapping[str, type] | None = None,
    ) -> Self:
        """An optimizer with the hyperparameters that :meth:`get_config` returned.

        Args:
            config: from :meth:`get_config`, perhaps by way of JSON.
            custom_objects: classes of learning-rate schedules by name. Without it a
                schedule's class is looked up in the module it came from, which the program
                must have imported.

        Raises:
            TypeError: an unknown entry, or one of the wrong type.
            ValueError: a value out of range, or a schedule whose class is not found.

        >>> Adamax.from_config(Adamax(beta_1=0.8).get_config()).hyperparameters.beta_1
        0.8
        """
        known = ["name", *_rule.settings(Hyperparameters())]
        _rule.reject_unknown(config, known, "entry of config")
        arguments = dict(config)
        if isinstance(arguments.get("learning_rate"), Mapping):
            arguments["learning_rate"] = schedule_from_config(
                arguments["learning_rate"], custom_objects or {}
            )
        return cls(**arguments)

    def __repr__(self) -> str:
        given = {"name": self.name, **_rule.settings(self._hyperparameters)}
        arguments = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
        return f"{type(self).__name__}({arguments})"

    # --- Checkpoints -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """The step count and the state: ``iterations``, and ``<name>.m``, ``<name>.u``.

        The arrays are the optimizer's own, not copies: the next step changes them. With
        ``sparse="exact"`` all rows are brought up to date first, the parameters' too: take
        a copy of the parameters after this, not before.

        >>> import numpy as np
        >>> optimizer = Adamax()
        >>> optimizer.apply_gradients([(np.array([2.0]), np.array([1.0]))])
        1
        >>> optimizer.state_dict()
        {'iterations': array(1), '0.m': array([0.2]), '0.u': array([2.])}
        """
        self.flush()
        return self._state()

    def _state(self) -> dict[str, Array]:
        state: dict[str, Array] = {"iterations": np.array(self._iterations, np.int64)}
        for variable in self._variables.values():
            state[f"{variable.name}.m"] = variable.m
            state[f"{variable.name}.u"] = variable.u
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], parameters: Parameters | None = None
    ) -> None:
        """Copy a :meth:`state_dict` into this optimizer.

        Args:
            state_dict: of an optimizer with parameters of the same names and shapes.
            parameters: passed to :meth:`build` first; needed if this optimizer is new.

        Raises:
            TypeError: an entry of a dtype that state cannot have.
            ValueError: entries missing or left over, shapes that differ, a negative step
                count, and whatever :meth:`build` raises. No state has changed then.
            RuntimeError: with ``sparse="exact"``, rows that are behind: what they have
                missed belongs to the state that would be replaced.

        >>> import numpy as np
        >>> weights = np.array([1.0])
        >>> first, second = Adamax(), Adamax()
        >>> first.apply_gradients([(np.array([2.0]), weights)])
        1
        >>> second.load_state_dict(first.state_dict(), [weights])
        >>> second.iterations
        1
        """
        for variable in self._variables.values():
            if variable.deferred is not None and variable.deferred.may_be_behind:
                raise RuntimeError(
                    f"rows of parameter {variable.name!r} are behind: call flush() before "
                    f"you load parameters and state"
                )
        variables = dict.fromkeys(self._variables.values())
        if parameters is not None:
            variables |= dict.fromkeys(self._named_variables(parameters))
        expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        expected["iterations"] = (), np.dtype(np.int64)
        for variable in variables:
            shape, dtype, _ = variable.state_layout
            expected |= {f"{variable.name}.{part}": (shape, dtype) for part in ("m", "u")}
        if missing := sorted(expected.keys() - state_dict.keys()):
            raise ValueError(f"state_dict lacks {', '.join(missing)}")
        if unexpected := sorted(state_dict.keys() - expected.keys()):
            raise ValueError(
                f"state_dict has entries that belong to no parameter of this optimizer: "
                f"{', '.join(unexpected)} (build() it with all parameters first)"
            )
        given = {
            name: entry if hasattr(entry, "dtype") else np.asarray(entry)
            for name, entry in state_dict.items()
        }
        for name, (shape, dtype) in expected.items():
            entry, kinds = given[name], "iu" if name == "iterations" else "f"
            if entry.shape != shape:
                raise ValueError(
                    f"state_dict[{name!r}] must have the shape {shape}, got {entry.shape}"
                )
            if entry.dtype.kind not in kinds:
                raise TypeError(
                    f"state_dict[{name!r}] must have the dtype {dtype}, got {entry.dtype}"
                )
        iterations = int(given["iterations"][()])
        if iterations < 0:
            raise ValueError(
                f"state_dict['iterations'] must not be negative, got {iterations}"
            )
        self._adopt(variables)
        for name, array in self._state().items():
            if name != "iterations":
                copy_in_pieces(array, given[name])
        self._iterations = iterations

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically.

        A crash leaves the old file or the new one, never a part. Parameters and
        hyperparameters are not in it: save the former yourself, see :meth:`get_config` for
        the latter. Needs the extra ``adamax[numpy]``. With ``sparse="exact"`` all rows are
        brought up to date first, so save the parameters after this or after :meth:`flush`.

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
        self, path: str | os.PathLike[str], parameters: Parameters | None = None
    ) -> None:
        """Read the state from a file that :meth:`save` wrote, in pieces.

        Args:
            path: the file.
            parameters: passed to :meth:`build` first; needed if this optimizer is new.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or not from :meth:`save`, or its state does not
                fit (see :meth:`load_state_dict`).
        """
        with read_tensors(Path(path)) as tensors:
            self.load_state_dict(tensors, parameters)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # a copy does not know what rows have missed
        # Variables are found by the identity of their array, which a copy changes.
        state = self.__dict__.copy()
        state["_variables"] = list(self._variables.values())
        del state["_known"], state["_written"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        variables = state.pop("_variables")
        self.__dict__.update(state)
        self._variables = {id(v.parameter): v for v in variables}
        self._written = written_by_steps(variables)
        self._known = KnownBatch()


def _split(grads_and_vars: Iterable[Any]) -> tuple[Sequence[Any], Sequence[Array]]:
    """The gradients that are not None, and their parameters."""
    pairs = list(grads_and_vars)
    if not (set(map(type, pairs)) <= {tuple, list} and set(map(len, pairs)) == {2}):
        for position, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"grads_and_vars[{position}] must be a (gradient, parameter) pair, "
                    f"got {type(pair).__name__}"
                )
    if NoneType in {type(gradient) for gradient, _ in pairs}:
        pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        raise ValueError("grads_and_vars must hold at least one gradient that is not None")
    gradients, parameters = zip(*pairs, strict=True)
    return gradients, parameters
