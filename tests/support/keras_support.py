"""What the tests of the Keras front end share; each back end has a process of its own."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

import compare
import oracle
from cases import PATTERNS, PRECISION, values
from frameworks import framework

keras: Any = framework("keras")
Adamax: Any = framework("adamax.keras").Adamax

BACK_END = keras.backend.backend()


def numpy(tensor: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(tensor))


def variable(values: Any, name: str | None = None) -> Any:
    values = np.asarray(values)
    return keras.Variable(values, dtype=values.dtype.name, name=name)


def tensor(values: Any) -> Any:
    values = np.asarray(values)
    return keras.ops.convert_to_tensor(values, dtype=values.dtype.name)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, step: Any) -> Any:
        return keras.ops.cast(self.function(keras.ops.cast(step, "float32")), "float32")


def options(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """As Keras takes them."""
    rate = hyperparameters.get("learning_rate")
    if callable(rate):
        return {**hyperparameters, "learning_rate": Schedule(rate)}
    return hyperparameters


def draw(
    rng: np.random.Generator, table: tuple[int, ...], pattern: str, dtype: str = "float32"
) -> oracle.Rows:
    indices = PATTERNS[pattern](rng, table[0])
    return oracle.Rows(values(rng, (len(indices), *table[1:]), dtype), indices)


def states(optimizer: Any, variables: Sequence[Any]) -> list[oracle.State]:
    """State in Keras' order: what counts, then momentum and norm of each variable."""
    kept = [numpy(v) for v in optimizer.variables if v.path.endswith(("momentum", "norm"))]
    pairs = zip(kept[0::2], kept[1::2], strict=True)
    return [
        oracle.State.of(numpy(w), m, u) for w, (m, u) in zip(variables, pairs, strict=True)
    ]


def follow(
    optimizer: Any,
    rule: oracle.Rule,
    variables: Sequence[Any],
    gradients: Sequence[Sequence[Any]],
    apply: Any = None,
) -> None:
    """Take steps, and hold each to the oracle's step from the same state."""
    if not optimizer.built:
        optimizer.build(variables)
    clips = rule.clipnorm is not None or rule.global_clipnorm is not None
    for number, of_this_step in enumerate(gradients):
        before = states(optimizer, variables)
        before_w = [numpy(w) for w in variables]
        expected = oracle.step(rule, before, of_this_step, number)
        given = [as_gradient(g, v) for g, v in zip(of_this_step, variables, strict=True)]
        (apply or optimizer.apply)(given, variables)
        after = states(optimizer, variables)
        for i, w in enumerate(variables):
            compare.assert_step_close(
                PRECISION[w.dtype],
                before[i],
                after[i],
                expected[i],
                rule.step_size(number),
                rule.epsilon,
                # Norms are computed in the dtype of gradients; |g| is at most the new u.
                compare.error_of_sums(of_this_step[i], before_w[i])
                + clips * 16 * PRECISION[w.dtype].roundoff * expected[i].u,
                what=f"step {number}, variable {i}",
            )


def as_gradient(gradient: Any, of: Any) -> Any:
    """What the back end takes: dense, or rows as IndexedSlices or a sparse COO tensor."""
    if not isinstance(gradient, oracle.Rows):
        return tensor(gradient)
    if BACK_END == "tensorflow":
        import tensorflow as tf

        indices = np.asarray(gradient.indices)
        return tf.IndexedSlices(tensor(gradient.values), tensor(indices), tuple(of.shape))
    import torch

    indices = tensor(np.array(gradient.indices, np.int64))[None]
    shape = tuple(of.shape)
    return torch.sparse_coo_tensor(
        indices, tensor(gradient.values), shape, check_invariants=False
    )


assert os.environ["KERAS_BACKEND"] == BACK_END
