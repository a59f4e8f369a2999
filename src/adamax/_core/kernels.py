"""The verbs: the arithmetic of Adamax, what every implementation offers, and the choice.

There are two implementations: the native core (``adamax._native``, C++), and its executable
specification in NumPy (``reference.py``), which serves where the native core was not built.

Verbs take NumPy arrays and PyTorch tensors on the CPU, and read where they lie in the call
that uses them. Arrays may have any layout, alignment and byte order; contiguous ones are
fast. ``w``, ``m`` and ``u`` have one shape and are written in place. ``w`` is float32,
float64, float16 or bfloat16 (or complex of the first two, as pairs of numbers); ``m`` and
``u`` are float64 where ``w`` is and float32 elsewhere, and so is the arithmetic. Compact
state, where they would be float32, is bfloat16, or int8 and uint8 with a float32 frame: see
``compact.py``. A gradient is a float of any of these widths. It is never written; where it
overlaps what is written, it is copied first.

A verb checks everything before it writes anything. Where it cannot do the work, it writes
nothing and returns a :class:`Problem`. No interrupt arrives during a verb of the native
core, and other Python threads run meanwhile.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

# Operands by which a problem with an argument is named.
OPERANDS = ("parameter", "exp_avg", "exp_inf", "gradient", "step", "indices", "frame")


class Problem(NamedTuple):
    """Why a verb did nothing.

    Attributes:
        kind: ``"unfit"``, an argument has a type, dtype or shape that does not fit; the
            detail is its place in :data:`OPERANDS`. ``"index"``, an index is outside the
            table; the detail is its position, the value the index. ``"stale"``, a row has a
            gradient and is not up to date; the detail is the row. ``"history"``, stamps do
            not belong to the history; the detail is the row, or -1 for all.
        where: which parameter; behind all parameters, which table.
        detail: see ``kind``.
        value: see ``kind``.
    """

    kind: str
    where: int
    detail: int
    value: int


class Verbs(Protocol):
    """What an implementation offers. All arguments are positional."""

    def step(
        self,
        w: Sequence[Any],
        m: Sequence[Any],
        u: Sequence[Any],
        g: Sequence[Any],
        scalars: Float64Array,
        frames: Sequence[Any] | None,
        tables: Sequence[tuple[Any, ...]],
        counters: Sequence[Any],
        clipnorm: float,
        global_clipnorm: float,
        threads: int,
        /,
    ) -> tuple[str, int, int, int] | None:
        """One step of the rule on whole parameters and on rows of tables.

        Args:
            w: the parameters.
            m: their first moments.
            u: their norms.
            g: their gradients.
            scalars: ``(n, 10)``, in the order of :class:`~.rule.Scalar`, or ``(1, 10)`` for
                all parameters.
            frames: of 8-bit state, ``(1,)`` each, and None for other parameters; None if
                there is no 8-bit state.
            tables: ``(w, m, u, indices, values, scalars, frames, exact)`` for each table
                with a sparse gradient. ``values`` has one row for each of the int32 or
                int64 ``indices``; ``scalars`` is ``(10,)``; ``frames`` of 8-bit state is
                ``(rows,)``, else None. ``exact`` is None, or what
                :meth:`StaleRows.part <adamax._core.stale.StaleRows.part>` returns: then
                the rows at ``indices`` must be up to date; they are stamped, some stale
                rows are caught up in their turn, and the history is committed.
            counters: 0-d float32, float64 or int64 arrays, each of which is advanced by 1
                when all else is done.
            clipnorm: the largest L2 norm of each gradient, or infinity. Norms are those of
                the gradient after repeated indices have been summed.
            global_clipnorm: the largest L2 norm of all gradients together, or infinity.
            threads: how many may be used.
        """

    def counts(self, counters: Sequence[Any], /) -> Any:
        """The values of step counters, as a list of floats, or a problem."""

    def norm(self, indices: Any, values: Any, rows: int, threads: int, /) -> Any:
        """The L2 norm of a sparse gradient, its repeated indices summed, or a problem."""

    def catch_up_rows(self, table: tuple[Any, ...], indices: Any, threads: int, /) -> Any:
        """Bring the rows at ``indices`` up to date with the history of their table.

        Args:
            table: ``(w, m, u, frames, stamps, history, epsilon, seed, stochastic)``.
                ``frames`` of 8-bit state is ``(rows,)``, else None. ``stamps``, ``(rows,)``
                and uint32, has the step that each row is up to date with, modulo 2**32.
                ``history`` has the arrays of :class:`~.exact.History`, and ``epsilon`` is
                that of its steps. ``seed`` is of the random bits that round compact state:
                the last step. ``stochastic`` says whether they round ``w`` of bfloat16.
            indices: 1-D, int32 or int64.
            threads: how many may be used.

        Returns:
            How many rows were stale, or a problem.
        """

    def catch_up_range(
        self, table: tuple[Any, ...], start: int, stop: int, threads: int, /
    ) -> Any:
        """The same for the rows from ``start`` to before ``stop``."""


def problem_of(result: Any) -> Problem | None:
    """The problem that a verb returned, if it did."""
    return Problem(*result) if isinstance(result, tuple) else None


def state_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype of the state of a parameter, and of the arithmetic: at least float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


@functools.cache
def kernels() -> Verbs:
    """The implementation in use.

    That is the native core, or the reference where the native core was not built, with one
    warning. The environment variable ``ADAMAX_KERNELS`` may ask for ``native`` or
    ``reference``.

    Raises:
        ImportError: ``ADAMAX_KERNELS=native`` where the native core was not built.
        ValueError: another value of ``ADAMAX_KERNELS``.
    """
    asked_for = os.environ.get("ADAMAX_KERNELS", "")
    if asked_for not in ("", "native", "reference"):
        raise ValueError(
            f"ADAMAX_KERNELS must be 'native' or 'reference', got {asked_for!r}"
        )
    if asked_for != "reference":
        if _native is not None:
            return _native
        message = (
            "the native core of adamax was not built, since there was no C++ compiler when "
            "it was installed"
        )
        remedy = "install a C++17 compiler and reinstall adamax"
        if asked_for:
            raise ImportError(f"{message}: {remedy}")
        warnings.warn(
            f"{message}: it computes in NumPy, many times slower; {remedy}, or set "
            f"ADAMAX_KERNELS=reference to hide this warning",
            RuntimeWarning,
            stacklevel=3,
        )
    reference: Any = importlib.import_module("adamax._core.reference")
    verbs: Verbs = reference
    return verbs


def _load_native() -> Verbs | None:
    try:
        native: Any = importlib.import_module("adamax._native.verbs")
    except ModuleNotFoundError as error:
        if error.name != "adamax._native.verbs":
            raise
        return None
    verbs: Verbs = native
    return verbs


# Not in the first step: another thread might fork the process while a module is imported,
# and the child would wait for that import for ever.
_native = None if os.environ.get("ADAMAX_KERNELS") == "reference" else _load_native()
