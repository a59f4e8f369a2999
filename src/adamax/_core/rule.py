"""The rule, its hyperparameters and the scalars of one step.

State per parameter: the first moment ``m`` and the exponentially weighted infinity norm
``u``, both zero at the start. At step ``t`` (1-based) with gradient ``g`` and learning
rate ``lr_t``::

    m <- m + (1 - beta_1) * (g - m)
    u <- max(beta_2 * u, |g|)
    w <- (1 - lr_t * weight_decay) * w - lr_t / (1 - beta_1**t) * (m / (u + epsilon))

Where ``u + epsilon`` is 0, the quotient is 0: with ``epsilon=0``, the paper's own rule, an
element that has only seen gradients of zero does not move. A gradient may be scaled
(clipping by norm) or clamped (clipping by value) on its way into the rule. NaN and infinity
are not filtered: they reach ``m``, ``u`` and ``w``.

A sparse gradient is a set of rows. Repeated indices are summed first, then the rule runs
once per distinct row. With ``sparse="lazy"`` rows whose index is absent keep ``w``, ``m``
and ``u`` bit for bit. With ``sparse="exact"`` they take the step with a gradient of zero,
later, when they are needed: see ``exact.py``.

Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1, with
Keras' epsilon in the denominator and decoupled weight decay.

The formula is written once for each compiler: in NumPy (``_core/reference.py``), C++
(``_native/rule.hpp``), operations of PyTorch (``torch/operations.py``), Triton
(``torch/triton.py``), JAX (``jax/rule.py``) and TensorFlow (``keras/tensorflow.py``).
"""

import difflib
import enum
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, fields
from types import MappingProxyType
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
import numpy.typing as npt

from .exact import Expansion

LearningRate: TypeAlias = SupportsFloat | Callable[[int], SupportsFloat]

SPARSE_MODES = ("lazy", "exact")
CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")

_REAL_DTYPE = re.compile(r"(torch\.|<dtype: ')?(b?float|u?int)[0-9]+'?>?")


@dataclass(frozen=True, slots=True)
class _Interval:
    low: float
    high: float = math.inf
    includes_low: bool = True

    def __contains__(self, number: float) -> bool:
        above = number >= self.low if self.includes_low else number > self.low
        return above and number < self.high

    def __str__(self) -> str:
        return f"{'[' if self.includes_low else '('}{self.low:.4g}, {self.high:.4g})"


_INTERVALS: Mapping[str, _Interval] = MappingProxyType(
    {
        "learning_rate": _Interval(0.0),
        "beta_1": _Interval(0.0, 1.0),
        "beta_2": _Interval(0.0, 1.0),
        "epsilon": _Interval(0.0),
        "weight_decay": _Interval(0.0),
        "loss_scale_factor": _Interval(0.0, includes_low=False),
        **{name: _Interval(0.0, includes_low=False) for name in CLIPPING},
    }
)


def checked_number(hyperparameter: str, value: object, name: str | None = None) -> float:
    """Return ``value`` as a float if ``hyperparameter`` may take it.

    ``name`` is what the front end calls the argument, where that differs.

    Raises:
        TypeError: ``value`` is not a real number or an array of one.
        ValueError: it is outside the interval the hyperparameter is defined on, or NaN.
    """
    name = name or hyperparameter
    number = value if type(value) is float else _real_number(value)
    if number is None:
        raise TypeError(f"{name} must be a real number, got {value!r}")
    interval = _INTERVALS[hyperparameter]
    if number not in interval:
        raise ValueError(f"{name} must be in {interval}, got {number!r}")
    return number


def _real_number(value: object) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    # 0-d arrays and tensors of all frameworks have a shape and a dtype with a telling name.
    dtype = str(getattr(value, "dtype", ""))
    scalar = getattr(value, "shape", None) == () and _REAL_DTYPE.fullmatch(dtype)
    if not (scalar or isinstance(value, numbers.Real)):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except TypeError:  # a tensor of a graph that has no value yet
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What a user chooses, validated once; every front end holds one of these.

    ``names`` maps a field to what the front end calls it, for the error messages.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its interval, more than one of ``clipnorm``,
            ``clipvalue`` and ``global_clipnorm``, or betas that ``sparse="exact"`` does
            not support.
    """

    learning_rate: LearningRate = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    weight_decay: float = 0.0
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    sparse: str = "lazy"
    names: InitVar[Mapping[str, str]] = MappingProxyType({})

    def __post_init__(self, names: Mapping[str, str]) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            name = names.get(field.name, field.name)
            if field.name == "sparse":
                if not (isinstance(value, str) and value in SPARSE_MODES):
                    expected = " or ".join(repr(mode) for mode in SPARSE_MODES)
                    raise ValueError(f"{name} must be {expected}, got {value!r}")
            elif field.name == "learning_rate":
                check_learning_rate(value, name)
            elif value is not None or field.name not in CLIPPING:
                number = checked_number(field.name, value, name)
                object.__setattr__(self, field.name, number)
        if self.sparse == "exact":
            # A float64 table needs more terms, and is checked when it is first used.
            Expansion.of(self.beta_1, self.beta_2, "float32", names)
        chosen = {name: getattr(self, name) for name in CLIPPING}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if len(chosen) > 1:
            given = ", ".join(f"{names.get(n, n)}={v!r}" for n, v in chosen.items())
            raise ValueError(
                f"at most one of {', '.join(names.get(n, n) for n in CLIPPING)} "
                f"may be given, got {given}"
            )


def check_learning_rate(value: LearningRate, name: str = "learning_rate") -> None:
    """Raise unless ``value`` is a learning rate or could be a schedule of one."""
    if not callable(value):
        checked_number("learning_rate", value, name)


def learning_rate_at(
    learning_rate: LearningRate, step: int, name: str = "learning_rate"
) -> float:
    """The learning rate of 0-based ``step``, validated."""
    if callable(learning_rate):
        value = learning_rate(step)
        return checked_number("learning_rate", value, f"{name}({step})")
    return checked_number("learning_rate", learning_rate, name)


def step_size(learning_rate: float, beta_1: float, t: int) -> float:
    """``learning_rate / (1 - beta_1**t)`` for the 1-based step ``t``, in float64.

    ``expm1`` keeps full precision where ``beta_1**t`` is close to 1.

    >>> round(step_size(0.1, 0.9, 1), 12)
    1.0
    """
    if beta_1 == 0.0:
        return learning_rate
    return learning_rate / -math.expm1(t * math.log(beta_1))


def decay_factor(learning_rate: float, weight_decay: float) -> float:
    """``1 - learning_rate * weight_decay``, what decoupled decay multiplies ``w`` by."""
    return 1.0 - learning_rate * weight_decay


def clip_factor(norm: float, limit: float) -> float:
    """What a gradient of this norm is multiplied by so that its norm is at most ``limit``.

    A NaN norm gives NaN, so that a broken gradient is not hidden.

    >>> clip_factor(norm=4.0, limit=1.0), clip_factor(norm=0.5, limit=1.0)
    (0.25, 1.0)
    """
    return 1.0 if norm <= limit else limit / norm


class Scalar(enum.IntEnum):
    """The columns of ``scalars``: what the rule takes besides memory, in float64."""

    STEP_SIZE = 0  # lr_t / (1 - beta_1**t)
    DECAY = 1  # what w is multiplied by
    SCALE = 2  # what g is multiplied by, before it is clamped
    COUPLED_DECAY = 3  # what part of w is then added to g (L2 regularisation)
    ONE_MINUS_BETA_1 = 4
    BETA_2 = 5
    EPSILON = 6
    CLIPVALUE = 7  # what g is clamped to
    SEED = 8  # of the random bits that round compact state: a whole number, the step
    STOCHASTIC = 9  # 1 if parameters of bfloat16 are rounded by random bits, too, else 0


def scalars_of(
    hyperparameters: Hyperparameters,
    step_size: float,
    decay: float,
    scale: float = 1.0,
    coupled_decay: float = 0.0,
    seed: float = 0.0,
    stochastic: bool = False,
) -> npt.NDArray[np.float64]:
    """The scalars of one step of a parameter, in the order of :class:`Scalar`."""
    clipvalue = hyperparameters.clipvalue
    return np.array(
        [
            step_size,
            decay,
            scale,
            coupled_decay,
            1.0 - hyperparameters.beta_1,
            hyperparameters.beta_2,
            hyperparameters.epsilon,
            math.inf if clipvalue is None else clipvalue,
            seed,
            float(stochastic),
        ]
    )


def rounded(number: float, dtype: npt.DTypeLike) -> Any:
    """``number`` in ``dtype``; a finite one stays finite, so that it makes no NaN of 0.

    >>> float(rounded(1e39, "float32"))
    3.4028234663852886e+38
    """
    kind: Any = np.dtype(dtype).type
    limit = float(np.finfo(kind).max)
    if math.isfinite(number):
        number = min(max(number, -limit), limit)
    return kind(number)


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a ``TypeError`` that names the first unknown entry."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")


def settings(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The fields of ``hyperparameters`` as a dict, in the order of their definition."""
    return {f.name: getattr(hyperparameters, f.name) for f in fields(hyperparameters)}
