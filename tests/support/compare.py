"""Comparisons: bit for bit, and with the oracle within the roundings of one step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import oracle
from cases import PRECISION, ROUNDINGS, Precision

# --- Bits ---------------------------------------------------------------------------------


def bits(array: Any) -> np.ndarray:
    """The elements as unsigned integers: -0.0 is not 0.0, and all NaNs are alike."""
    array = np.array(array, order="C")
    array = array.astype(array.dtype.newbyteorder("="))
    with np.errstate(invalid="ignore"):
        not_a_number = array != array
    if not_a_number.any():
        array[not_a_number] = np.nan
    return array.view(f"u{array.dtype.itemsize}")


def assert_same_bits(actual: Any, expected: Any, what: object = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    assert actual.dtype.name == expected.dtype.name, what
    different = np.flatnonzero(bits(actual).ravel() != bits(expected).ravel())
    if different.size:
        first = different[:5]
        raise AssertionError(
            f"{what}: {different.size} of {actual.size} elements differ, at {first}: "
            f"{actual.ravel()[first]} where {expected.ravel()[first]} was expected"
        )


def contents(optimizer: Any, parameters: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """A copy of all that a step may change."""
    state = {name: np.array(entry) for name, entry in optimizer.state_dict().items()}
    return {**state, **{f"w{i}": np.array(w) for i, w in enumerate(parameters)}}


def assert_same_contents(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: str = ""
) -> None:
    assert list(actual) == list(expected), what
    for name in expected:
        assert_same_bits(actual[name], expected[name], f"{what} {name}")


# --- The oracle ---------------------------------------------------------------------------


def states(optimizer: Any, parameters: Sequence[np.ndarray]) -> list[oracle.State]:
    """What the optimizer holds for ``parameters``, which are all that it has, in order."""
    kept = optimizer.state_dict()
    return [
        oracle.State.of(w, kept.get(f"{i}.m"), kept.get(f"{i}.u"))
        for i, w in enumerate(parameters)
    ]


def follow(
    optimizer: Any,
    rule: oracle.Rule,
    parameters: Sequence[np.ndarray],
    gradients: Iterable[Sequence[Any]],
) -> None:
    """Take steps, and hold each to the oracle's step from the same state.

    Since no error is carried from one step to the next, the tolerance is the same few
    roundings for any number of steps, and for 16-bit parameters too.
    """
    for number, of_this_step in enumerate(gradients, start=optimizer.iterations):
        before = states(optimizer, parameters)
        for_oracle = [rows(gradient) for gradient in of_this_step]
        expected = oracle.step(rule, before, for_oracle, number)
        pairs = zip(of_this_step, parameters, strict=True)
        assert optimizer.apply_gradients(pairs) == number + 1
        after = states(optimizer, parameters)
        sums = [error_of_sums(g, w) for g, w in zip(for_oracle, parameters, strict=True)]
        norms = _errors_of_norms(rule, for_oracle, sums)
        for i, w in enumerate(parameters):
            assert_step_close(
                PRECISION[w.dtype.name],
                before[i],
                after[i],
                expected[i],
                rule.step_size(number),
                rule.epsilon,
                sums[i] + norms[i] * expected[i].u,  # |g| is at most the new u
                what=f"step {number}, parameter {i}",
            )


def rows(gradient: Any) -> Any:
    """A gradient as the oracle takes it."""
    if hasattr(gradient, "indices"):
        return oracle.Rows(gradient.values, gradient.indices)
    return gradient


def assert_step_close(
    precision: Precision,
    before: oracle.State,
    after: oracle.State,
    expected: oracle.State,
    step_size: float,
    epsilon: float,
    error_of_gradient: Any = 0.0,
    what: str = "",
) -> None:
    rounding = ROUNDINGS * precision.roundoff
    # |g| is at most the new u.
    size = np.maximum(np.abs(before.m), expected.u)
    error = rounding * size + error_of_gradient
    denominator = expected.u + epsilon
    denominator = np.where(denominator == 0, 1, denominator)  # does not move
    quotient = np.abs(expected.m) / denominator
    error_of_w = (
        rounding * np.maximum(np.abs(before.w), np.abs(expected.w))
        + step_size * (1 + quotient) * error / denominator
    )
    subnormal = 4 * precision.smallest
    state, dtype = precision.state, precision.dtype
    assert_within(after.m, expected.m, error + subnormal, state, f"m, {what}")
    assert_within(after.u, expected.u, error + subnormal, state, f"u, {what}")
    assert_within(after.w, expected.w, error_of_w + subnormal, dtype, f"w, {what}")


def trajectory_error(
    precision: Precision, start: np.ndarray, learning_rates: Sequence[float]
) -> np.ndarray:
    """How far w may be from exact after steps with the default betas.

    In each step w itself is rounded at most 3 times, and what is added to it has an error
    of the roundings of the step, of 16 that m carries over (1.6 a step, and it forgets a
    tenth of them), and of 2 for every step that u has decayed.
    """
    rates = 1.01 * np.array(learning_rates)
    of_updates = (ROUNDINGS + 16 + 2 * np.arange(rates.size)) @ rates
    largest = np.abs(start.astype(np.float64)) + rates.sum()
    return precision.roundoff * (3 * rates.size * largest + of_updates)


def assert_within(
    actual: np.ndarray, expected: np.ndarray, error: Any, dtype: np.dtype, what: str
) -> None:
    """``actual`` is what a number within ``error`` of ``expected`` is rounded to."""
    assert np.isfinite(expected).all(), f"{what}: the oracle is for finite numbers"
    with np.errstate(over="ignore"):
        low = (expected - error).astype(dtype).astype(np.float64)
        high = (expected + error).astype(dtype).astype(np.float64)
    wrong = np.flatnonzero(~((low <= actual) & (actual <= high)).ravel())
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{what}: {wrong.size} of {actual.size} elements are wrong; element {i} is "
            f"{actual.flat[i]!r}, not in [{low.flat[i]!r}, {high.flat[i]!r}]"
        )


def error_of_sums(gradient: Any, w: np.ndarray) -> np.ndarray:
    """The error of summing repeated rows: a rounding of the largest sum for each repeat."""
    sizes, counts = np.zeros(w.shape), np.zeros(w.shape)
    if isinstance(gradient, oracle.Rows):
        at = np.array(gradient.indices, np.int64)
        np.add.at(sizes, at, np.abs(np.array(gradient.values).astype(np.float64)))
        np.add.at(counts, at, 1.0)
    return PRECISION[w.dtype.name].roundoff * np.where(counts > 1, counts, 0) * sizes


def _errors_of_norms(
    rule: oracle.Rule, gradients: Sequence[Any], errors: Sequence[np.ndarray]
) -> list[float]:
    """The relative error of each gradient's norm for clipping, that sums bring about."""
    of_gradients = [oracle.square_sum(gradient) for gradient in gradients]
    of_errors = [float(np.square(error).sum()) for error in errors]
    if rule.global_clipnorm is not None:
        of_gradients = [math.fsum(of_gradients)] * len(gradients)
        of_errors = [math.fsum(of_errors)] * len(gradients)
    elif rule.clipnorm is None:
        return [0.0] * len(gradients)
    pairs = zip(of_errors, of_gradients, strict=True)
    return [math.sqrt(error / square) if square else 0.0 for error, square in pairs]
