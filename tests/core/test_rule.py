"""Hyperparameters, their validation, and the scalars of one step."""

import dataclasses
import decimal
import math
from fractions import Fraction

import numpy as np
import pytest

from adamax._core import rule
from adamax._core.rule import Hyperparameters, Scalar, rounded, scalars_of

NUMBERS = (
    "learning_rate",
    "beta_1",
    "beta_2",
    "epsilon",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
)
CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")

# For each hyperparameter: the interval of the message, values in it and out of it.
INTERVALS = {
    "learning_rate": (r"\[0, inf\)", (0, 1e-300, 0.1, 1e300), (-1e-300, -1)),
    "beta_1": (r"\[0, 1\)", (0, 5e-324, 0.9, 1 - 2**-53), (-0.1, 1, 1.5)),
    "beta_2": (r"\[0, 1\)", (0, 5e-324, 0.999, 1 - 2**-53), (-0.1, 1, 1.5)),
    "epsilon": (r"\[0, inf\)", (0, 5e-324, 1e-7, 10), (-1e-300, -1e-7)),
    "weight_decay": (r"\[0, inf\)", (0, 0.01, 3), (-0.01,)),
    "clipnorm": (r"\(0, inf\)", (5e-324, 1, 1e300), (0, -1)),
    "clipvalue": (r"\(0, inf\)", (5e-324, 1, 1e300), (0, -1)),
    "global_clipnorm": (r"\(0, inf\)", (5e-324, 1, 1e300), (0, -1)),
}

NO_NUMBERS = {
    "str": "0.5",
    "bool": True,
    "NumPy bool": np.True_,
    "complex": 0.5 + 0j,
    "NumPy complex": np.complex64(0.5),
    "list": [0.5],
    "array of one": np.array([0.5]),
    "0-d array of bool": np.array(True),
    "0-d array of str": np.array("0.5"),
    "0-d array of object": np.array(object()),
    "structured scalar": np.zeros((), [("point", np.float32)]),
    "object": object(),
}

NUMBERS_OF_MANY_TYPES = (
    0.5,
    Fraction(1, 2),
    np.float16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    np.longdouble(0.5),
    np.array(0.5, np.float32),
    np.array(0.5),
)


@pytest.mark.parametrize("name", NUMBERS)
def test_values_in_the_interval_are_taken(name):
    for value in INTERVALS[name][1]:
        taken = getattr(Hyperparameters(**{name: value}), name)
        assert taken == value
        if name != "learning_rate":
            assert type(taken) is float


@pytest.mark.parametrize("name", NUMBERS)
def test_values_outside_the_interval_are_refused(name):
    interval, _, outside = INTERVALS[name]
    for value in outside:
        expected = rf"^{name} must be in {interval}, got {float(value)!r}$"
        with pytest.raises(ValueError, match=expected):
            Hyperparameters(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32(math.nan)])
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be in .*, got {float(value)}$"):
        Hyperparameters(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_too_large_for_a_float_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} must be in "):
        Hyperparameters(**{name: 10**400})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_real_number_is_refused(name, kind):
    with pytest.raises(TypeError, match=rf"^{name} must be a real number, got "):
        Hyperparameters(**{name: NO_NUMBERS[kind]})


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in CLIPPING])
def test_none_is_refused_but_for_clipping(name):
    with pytest.raises(TypeError, match=rf"^{name} must be a real number, got None$"):
        Hyperparameters(**{name: None})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", NUMBERS_OF_MANY_TYPES, ids=lambda value: repr(value))
def test_real_numbers_of_any_type_are_taken(name, value):
    taken = Hyperparameters(**{name: value})
    assert float(getattr(taken, name)) == 0.5


def test_a_callable_is_a_learning_rate():
    schedule = math.sqrt
    assert Hyperparameters(learning_rate=schedule).learning_rate is schedule
    with pytest.raises(TypeError, match=r"^beta_1 must be a real number, got "):
        Hyperparameters(beta_1=schedule)


@pytest.mark.parametrize("first", CLIPPING)
@pytest.mark.parametrize("second", CLIPPING)
def test_one_way_of_clipping_at_most(first, second):
    if first == second:
        assert getattr(Hyperparameters(**{first: 2}), first) == 2.0
        return
    expected = (
        r"^at most one of clipnorm, clipvalue, global_clipnorm may be given, got "
        r"(?=.*\b{}=2\.0)(?=.*\b{}=3\.0)"
    )
    with pytest.raises(ValueError, match=expected.format(first, second)):
        Hyperparameters(**{first: 2, second: 3})


@pytest.mark.parametrize(
    "mode", ["dense", "", None, 1, True, ["lazy"], np.array(["lazy", "lazy"])], ids=repr
)
def test_unknown_sparse_modes_are_refused(mode):
    with pytest.raises(ValueError, match=r"^sparse must be .*'lazy'.*, got "):
        Hyperparameters(sparse=mode)


def test_messages_use_the_names_of_the_front_end():
    names = {"learning_rate": "lr", "beta_1": "betas[0]", "clipnorm": "max_norm"}
    with pytest.raises(ValueError, match=r"^lr must be in \[0, inf\), got -1\.0$"):
        Hyperparameters(learning_rate=-1, names=names)
    with pytest.raises(TypeError, match=r"^betas\[0\] must be a real number, got 'x'$"):
        Hyperparameters(beta_1="x", names=names)
    with pytest.raises(ValueError, match=r"max_norm=1\.0, clipvalue=1\.0$"):
        Hyperparameters(clipnorm=1, clipvalue=1, names=names)


def test_unknown_and_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="beta1"):
        Hyperparameters(beta1=0.9)
    with pytest.raises(TypeError, match="positional"):
        Hyperparameters(0.1)


def test_hyperparameters_are_frozen():
    hyperparameters = Hyperparameters()
    for field in dataclasses.fields(hyperparameters):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(hyperparameters, field.name, getattr(hyperparameters, field.name))


def test_settings_are_all_fields():
    given = {"learning_rate": 0.5, "beta_1": 0.25, "clipvalue": 2.0}
    settings = rule.settings(Hyperparameters(**given))
    assert settings.items() >= given.items()
    assert Hyperparameters(**settings) == Hyperparameters(**given)


def test_unknown_entries_are_named_with_a_hint():
    rule.reject_unknown([], ["beta_1"], "argument")
    rule.reject_unknown(["beta_1"], ["beta_1"], "argument")
    with pytest.raises(
        TypeError, match=r"^unknown argument 'beta1'; did you mean 'beta_1'\? \(known: "
    ):
        rule.reject_unknown(["beta_1", "beta1"], ["beta_1", "beta_2"], "argument")
    with pytest.raises(
        TypeError, match=r"^unknown argument 'zzz' \(known: beta_1, beta_2\)$"
    ):
        rule.reject_unknown(["zzz"], ["beta_1", "beta_2"], "argument")


# --- The learning rate of a step ----------------------------------------------------------


def test_schedules_get_the_step():
    steps = []
    for step in (0, 7):
        assert rule.learning_rate_at(lambda s: steps.append(s) or 0.5, step) == 0.5
    assert steps == [0, 7]
    assert all(type(step) is int for step in steps)
    assert rule.learning_rate_at(0.25, 3) == 0.25
    assert rule.learning_rate_at(np.array(0.25), 3) == 0.25


@pytest.mark.parametrize(
    ("returned", "error", "expected"),
    [
        (math.nan, ValueError, r"^learning_rate\(4\) must be in \[0, inf\), got nan$"),
        (-0.1, ValueError, r"^learning_rate\(4\) must be in \[0, inf\), got -0\.1$"),
        (math.inf, ValueError, r"^learning_rate\(4\) must be in \[0, inf\), got inf$"),
        (None, TypeError, r"^learning_rate\(4\) must be a real number, got None$"),
        ("0.1", TypeError, r"^learning_rate\(4\) must be a real number, got '0\.1'$"),
        (True, TypeError, r"^learning_rate\(4\) must be a real number, got True$"),
    ],
)
def test_what_a_schedule_returns_is_checked(returned, error, expected):
    with pytest.raises(error, match=expected):
        rule.learning_rate_at(lambda step: returned, 4)


# --- Scalars, against exact arithmetic ----------------------------------------------------

BETAS = (0.0, 5e-324, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-9, 1 - 2**-53)


def _exact_step_size(learning_rate: float, beta_1: float, t: int) -> Fraction:
    if t <= 100:
        return Fraction(learning_rate) / (1 - Fraction(beta_1) ** t)
    with decimal.localcontext(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        power = decimal.Decimal(beta_1) ** t if beta_1 else decimal.Decimal(0)
        return Fraction(learning_rate) / Fraction(1 - power)


@pytest.mark.parametrize("beta_1", BETAS)
@pytest.mark.parametrize("t", [1, 2, 3, 10, 100, 1000, 10**6, 10**12, 2**62])
def test_step_size_is_exact_to_a_few_roundings(beta_1, t):
    # The logarithm, its product with t, expm1 and the quotient: each rounds once, and an
    # error of the exponent x reaches expm1(x) at most unamplified.
    exact = _exact_step_size(0.002, beta_1, t)
    error = abs(Fraction(rule.step_size(0.002, beta_1, t)) - exact) / exact
    assert error <= 5 * 2**-53


def test_step_size_ends_at_the_learning_rate():
    assert rule.step_size(0.3, 0.9, 1000) == 0.3
    assert rule.step_size(0.0, 0.9, 1) == 0.0


def test_decay_factor():
    assert rule.decay_factor(0.25, 0.5) == 0.875
    assert rule.decay_factor(0.25, 0.0) == 1.0


@pytest.mark.parametrize(
    ("norm", "limit", "expected"),
    [
        (0.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (4.0, 1.0, 0.25),
        (math.inf, 1.0, 0.0),
        (1e-300, 1e-300, 1.0),
    ],
)
def test_clip_factor(norm, limit, expected):
    assert rule.clip_factor(norm, limit) == expected


def test_clip_factor_does_not_hide_nan():
    assert math.isnan(rule.clip_factor(math.nan, 1.0))


def test_scalars_are_in_their_columns():
    hyperparameters = Hyperparameters(beta_1=0.75, beta_2=0.5, epsilon=0.25)
    scalars = scalars_of(hyperparameters, 0.125, 0.875, 3.0, 4.0, 7, True)
    expected = {
        Scalar.STEP_SIZE: 0.125,
        Scalar.DECAY: 0.875,
        Scalar.SCALE: 3.0,
        Scalar.COUPLED_DECAY: 4.0,
        Scalar.ONE_MINUS_BETA_1: 0.25,
        Scalar.BETA_2: 0.5,
        Scalar.EPSILON: 0.25,
        Scalar.CLIPVALUE: math.inf,
        Scalar.SEED: 7.0,
        Scalar.STOCHASTIC: 1.0,
    }
    assert dict(zip(Scalar, scalars.tolist(), strict=True)) == expected
    clipped = dataclasses.replace(hyperparameters, clipvalue=2)
    assert scalars_of(clipped, 0.0, 1.0)[Scalar.CLIPVALUE] == 2.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_numbers_stay_finite_when_they_are_rounded(dtype):
    largest = float(np.finfo(dtype).max)
    for number in (0.0, 0.1, -1e39, 1e300, -1e300, largest):
        assert rounded(number, dtype) == np.clip(number, -largest, largest).astype(dtype)
        assert np.isfinite(rounded(number, dtype))
    assert rounded(math.inf, dtype) == math.inf
    assert math.isnan(rounded(math.nan, dtype))
