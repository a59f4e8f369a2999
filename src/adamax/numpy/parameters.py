"""Parameters and their state: what an optimizer holds for each array."""

import itertools
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .._core.kernels import state_dtype
from .._core.memory import may_overlap_itself
from .._core.rule import Hyperparameters
from .._core.stale import StaleRows
from .checkpoint import Layout, State, zero_state
from .state import Part, dtypes_of

Array: TypeAlias = npt.NDArray[Any]
ArraysOrMapping: TypeAlias = Iterable[Array] | Mapping[str, Array]

DTYPES = ("float32", "float64", "float16", "bfloat16")
_DTYPE = operator.attrgetter("dtype")


class Parameter:
    """An array, and its state: ``m``, ``u``, and of 8-bit state the ``frame``.

    The array is not kept alive, where it can be known that it is gone: state ends with the
    memory that it is the state of. A view may go and come back as another object: its
    memory is then still known, so that the other object is recognised as wrong.
    """

    stale: StaleRows | None = None  # in exact mode

    def __init__(self, array: Array, name: str, state_dtype: str = "float32") -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"parameter {name!r} must be a NumPy array, which is updated in place; "
                f"got {type(array).__name__}"
            )
        if array.dtype.name not in DTYPES:
            raise TypeError(
                f"parameter {name!r} must have one of the dtypes {', '.join(DTYPES)}, "
                f"got {array.dtype}"
            )
        self._dtypes = dtypes_of(state_dtype, array.dtype, name)
        self.name = name
        self.state_dtype = state_dtype
        self.state: State = {}  # none yet
        self.shape = array.shape
        self.dtype = array.dtype
        self._bounds = _bounds(array)
        self._strong: Array | None = array
        self._weak: weakref.ref[Array] | None = None
        self._owner: weakref.ref[Array] | None = None
        self.check(array)
        if not array.flags.forc and may_overlap_itself(array):
            raise ValueError(f"parameter {name!r} has elements that overlap in memory")

    @property
    def array(self) -> Array | None:
        """The array, or None where it is gone."""
        return self._strong if self._weak is None else self._weak()

    @property
    def bounds(self) -> tuple[int, int]:
        """Where its memory begins and ends, or did when the array was last there."""
        array = self.array
        return self._bounds if array is None else _bounds(array)

    def check(self, array: Array) -> None:
        """Raise if the array cannot be written, or is no longer what it was."""
        if not array.flags.writeable:
            raise ValueError(f"parameter {self.name!r} is read-only")
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"parameter {self.name!r} has state for the shape {self.shape} and dtype "
                f"{self.dtype}, but now has {array.shape} and {array.dtype}"
            )

    @property
    def layouts(self) -> dict[Part, Layout]:
        """Shape, dtype and memory order of each part of the state when it is new."""
        assert self.array is not None
        order = _order(self.array)
        return {
            part: ((1,) if part == "frame" else self.shape, dtype, order)
            for part, dtype in self._dtypes.items()
        }

    @property
    def frame(self) -> Array | None:
        return self.state.get("frame")

    def frame_of_rows(self) -> Array | None:
        """A frame for each row; made when rows are first updated by themselves."""
        frame = self.frame
        if frame is not None and len(frame) != self.shape[0]:
            frame = self.state["frame"] = np.repeat(frame, self.shape[0])
        return frame

    @property
    def has_rows(self) -> bool:
        """Whether only the verbs for rows can update it."""
        return self.frame is not None and len(self.frame) != 1

    def let_go(self, gone: Callable[[int, bool], None]) -> None:
        """Do not keep the array alive, where it will be known that it is gone.

        ``gone(key, forever)`` is called when the array is gone, and when its memory is,
        which is ``forever``.
        """
        array = self._strong
        assert array is not None
        key = id(array)
        owner = array if array.base is None else array.base
        if not (isinstance(owner, np.ndarray) and owner.base is None):
            return  # memory of something else, such as a file
        if owner is array:
            self._weak = weakref.ref(array, lambda _: gone(key, True))
        else:
            self._weak = weakref.ref(array, lambda _: gone(key, False))
            self._owner = weakref.ref(owner, lambda _: gone(key, True))
        self._strong = None

    def stale_rows(self, hyperparameters: Hyperparameters) -> StaleRows:
        """What says which rows are stale; made when it is first needed."""
        if self.stale is None:
            self.stale = StaleRows(
                np.zeros(self.shape[0], np.uint32),
                math.prod(self.shape[1:]),
                state_dtype(self.dtype.name),
                hyperparameters.beta_1,
                hyperparameters.beta_2,
                hyperparameters.epsilon,
            )
        return self.stale

    @property
    def may_be_stale(self) -> bool:
        return self.stale is not None and self.stale.may_be_stale

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.array, self.name, self.state, self.state_dtype)


def _copied(array: Array, name: str, state: State, state_dtype: str) -> Parameter:
    parameter = Parameter(array, name, state_dtype)
    # A copy of a strided array may be contiguous, in either order.
    order = _order(array)
    parameter.state = {part: np.asarray(x, order=order) for part, x in state.items()}
    return parameter


class Parameters:
    """All parameters of an optimizer, by name and by their arrays.

    Args:
        state_dir: where to keep the state in files, or None for memory.
        state_dtype: of new state.
    """

    def __init__(self, state_dir: Path | None, state_dtype: str = "float32") -> None:
        self._state_dir = state_dir
        self.state_dtype = state_dtype
        self._process = os.getpid()
        # By names and by the ids of arrays, in one dict: an interrupt may come between two.
        self._known: dict[str | int, Parameter] = {}
        self._next_number = 0
        self.is_copy = False

    def __iter__(self) -> Iterator[Parameter]:
        known = list(self._known.items())
        return iter([parameter for key, parameter in known if isinstance(key, str)])

    def find(self, array: Array) -> Parameter | None:
        return self._known.get(id(array))

    def of(self, arrays: Sequence[Array]) -> tuple[list[Parameter], bool]:
        """The parameter of each array, and whether all were known; no new one is adopted.

        Raises:
            TypeError, ValueError: an array that cannot be a parameter, or occurs twice.
            RuntimeError: in a forked process, which shares files with its parent.
        """
        if self._state_dir is not None and os.getpid() != self._process:
            raise RuntimeError(
                "this is a forked process, which shares the files in state_dir with its "
                "parent: create an optimizer of its own with another state_dir"
            )
        found = list(map(self._known.get, map(id, arrays)))
        known = [parameter for parameter in found if parameter is not None]
        if len(known) < len(arrays) or len(set(known)) < len(arrays):
            parameters = self.checked(arrays)
            if self.is_copy:
                unknown = parameters[found.index(None)]
                raise ValueError(
                    f"this optimizer is a copy, and its state belongs to the arrays that "
                    f"were copied with it; got another array, of shape {unknown.shape}: "
                    f"call load_state_dict(optimizer.state_dict(), parameters) to use the "
                    f"state for other arrays, or build() to add new ones"
                )
            return parameters, False
        if not all(map(operator.is_, map(_DTYPE, arrays), map(_DTYPE, known))):
            for parameter, array in zip(known, arrays, strict=True):
                parameter.check(array)
        return known, True

    def named(self, parameters: ArraysOrMapping) -> list[Parameter]:
        """As :meth:`checked`, with the names that a mapping gives."""
        if isinstance(parameters, Mapping):
            return self.checked(
                list(parameters.values()), [str(name) for name in parameters]
            )
        if isinstance(parameters, np.ndarray):
            raise TypeError(
                "parameters must be an iterable or a mapping of arrays, got one array"
            )
        return self.checked(list(parameters))

    def checked(
        self, arrays: Sequence[Array], names: list[str] | None = None
    ) -> list[Parameter]:
        """The parameter of each array, the new ones not yet adopted."""
        parameters: list[Parameter] = []
        fresh: list[Parameter] = []
        seen: dict[int, Parameter] = {}
        numbers = (str(n) for n in itertools.count(self._next_number))
        free = (number for number in numbers if number not in self._known)
        for position, array in enumerate(arrays):
            if id(array) in seen:
                name = seen[id(array)].name
                raise ValueError(f"parameter {name!r} occurs more than once")
            parameter = self._known.get(id(array))
            if parameter is None:
                name = names[position] if names else next(free)
                parameter = Parameter(array, name, self.state_dtype)
                fresh.append(parameter)
            seen[id(array)] = parameter
            parameters.append(parameter)
        if fresh:
            _check_disjoint(self, fresh)
            taken = {parameter.name for parameter in self}
            for parameter in fresh:
                if parameter.name in taken:
                    raise ValueError(
                        f"the name {parameter.name!r} belongs to another parameter"
                    )
                taken.add(parameter.name)
        return parameters

    def adopt(self, parameters: Iterable[Parameter]) -> None:
        """Allocate state for the new ones among ``parameters``: for all of them or none."""
        fresh = [p for p in parameters if self._known.get(p.name) is not p]
        if not fresh:
            return
        state = zero_state(fresh, self._state_dir, self._next_number)
        for parameter, of_parameter in zip(fresh, state, strict=True):
            parameter.state = of_parameter
        self._add(fresh)
        self._next_number += len(fresh)
        for parameter in fresh:
            parameter.let_go(self._forgets(parameter.name))

    def _add(self, parameters: Sequence[Parameter]) -> None:
        """Add all or none, whenever an interrupt comes."""
        added: dict[str | int, Parameter] = {p.name: p for p in parameters}
        added.update((id(p.array), p) for p in parameters)
        self._known.update(added)

    def _forgets(self, name: str) -> Callable[[int, bool], None]:
        """What frees state when an array is gone; does not keep this alive."""
        reference = weakref.ref(self)

        def gone(key: int, forever: bool) -> None:
            parameters = reference()
            if parameters is not None:
                parameters._known.pop(key, None)
                if forever:
                    parameters._known.pop(name, None)

        return gone

    def forget(self, parameter: Parameter) -> None:
        del self._known[parameter.name], self._known[id(parameter.array)]

    def begun_anew(self) -> "Parameters":
        """Without parameters."""
        return Parameters(self._state_dir, self.state_dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Parameters are found by the identity of their array, which a copy changes.
        parameters = [p for p in self if p.array is not None]
        return {
            "state_dir": self._state_dir,
            "state_dtype": self.state_dtype,
            "next_number": self._next_number,
            "parameters": parameters,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["state_dir"], state["state_dtype"])  # type: ignore[misc]
        self._next_number = state["next_number"]
        self.is_copy = True
        self._add(state["parameters"])  # which keep their arrays: nothing else may do so


def _check_disjoint(known: Iterable[Parameter], fresh: Sequence[Parameter]) -> None:
    """Raise if a new parameter shares memory with another, old or new."""
    spans = [(*parameter.bounds, parameter) for parameter in (*known, *fresh)]
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, Parameter]] = []
    for start, end, parameter in spans:
        open_spans = [span for span in open_spans if span[1] > start]
        for _, _, other in open_spans:
            if _share_memory(parameter.array, other.array):
                new, old = (parameter, other) if parameter in fresh else (other, parameter)
                raise ValueError(
                    f"parameter {new.name!r} shares memory with {old.name!r}; "
                    f"pass the same array in every step, not a new view of it"
                )
        open_spans.append((start, end, parameter))


def _order(array: Array) -> Literal["C", "F"]:
    return "F" if array.flags.fnc else "C"


def _bounds(array: Array) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)


def _share_memory(a: Array | None, b: Array | None) -> bool:
    """Whether arrays whose bounds overlap share memory; None is for a view that is gone."""
    if a is None or b is None:
        return True
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
