"""Contestants of Keras, whose back end is the one in the environment of the case."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .contestants import TableWork, by_name
from .harness import THREADS
from .oracle import BETA_1, BETA_2, EPSILON, LEARNING_RATE, Array
from .workloads import Dense, Epoch, Gradient, Rows


class TensorFlow:
    """An Adamax by its full name, in a ``tf.function``."""

    def __init__(self, work: TableWork, optimizer: str, *, xla: bool = False) -> None:
        tf = self._tf = _use_tensorflow()
        adamax = _adamax(optimizer)
        self._variables = [_variable(optimizer)(array) for array in work.initial()]
        _build(adamax, self._variables)

        @tf.function(jit_compile=xla)
        def step(gradients: Any) -> Any:
            adamax.apply_gradients(zip(gradients, self._variables, strict=True))
            return tf.convert_to_tensor(adamax.iterations)

        self._step = step

    def take(self, draw: list[Gradient]) -> None:
        variables = zip(draw, self._variables, strict=True)
        self._gradients = [self._tensor(g, variable.shape) for g, variable in variables]

    def _tensor(self, gradient: Gradient, shape: Any) -> Any:
        constant = self._tf.constant
        if isinstance(gradient, Rows):
            return self._tf.IndexedSlices(
                constant(gradient.values), constant(gradient.ids), constant(tuple(shape))
            )
        return constant(gradient)

    def step(self) -> None:
        self._step(self._gradients).numpy()  # waits for the step

    def parameters(self) -> list[Array]:
        return [np.asarray(variable) for variable in self._variables]


class KerasTorch:
    """An Adamax of Keras by its full name, on the PyTorch back end."""

    def __init__(self, work: Dense, optimizer: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self._from_numpy = torch.from_numpy
        self._variables = [_variable(optimizer)(array) for array in work.initial()]
        self._optimizer = _adamax(optimizer)
        self._optimizer.build(self._variables)

    def take(self, draw: list[Array]) -> None:
        self._gradients = [self._from_numpy(gradient.copy()) for gradient in draw]

    def step(self) -> None:
        self._optimizer.apply(self._gradients, self._variables)

    def parameters(self) -> list[Array]:
        return [variable.value.detach().numpy() for variable in self._variables]


class KerasJax:
    """An Adamax of Keras by its full name, jitted as in Keras' train step."""

    def __init__(self, work: Dense, optimizer: str) -> None:
        import jax

        variables = [_variable(optimizer)(array) for array in work.initial()]
        adamax = _adamax(optimizer)
        adamax.build(variables)
        self._put = jax.numpy.array

        # In the order of Keras' trainer, since XLA reuses the memory of arguments for
        # results in the order of both.
        def step(parameters: Any, state: Any, gradients: Any) -> Any:
            return adamax.stateless_apply(state, gradients, parameters)

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._state = [variable.value for variable in adamax.variables]
        self._parameters = [variable.value for variable in variables]

    def take(self, draw: list[Array]) -> None:
        self._gradients = [self._put(gradient) for gradient in draw]

    def step(self) -> None:
        self._parameters, self._state = self._step(
            self._parameters, self._state, self._gradients
        )
        for parameter in self._parameters:
            parameter.block_until_ready()

    def parameters(self) -> list[Array]:
        return [np.asarray(parameter) for parameter in self._parameters]


class Fit:
    """An epoch of ``model.fit`` with an Embedding, on the TensorFlow back end."""

    def __init__(self, work: Epoch, optimizer: str) -> None:
        self._tf = _use_tensorflow()
        import keras

        keras.utils.set_random_seed(1)
        layers = keras.layers
        self._model = keras.Sequential(
            [layers.Embedding(work.rows, work.width), layers.Flatten(), layers.Dense(1)]
        )
        self._model.compile(optimizer=_adamax(optimizer), loss="mse")

    def take(self, draw: tuple[Array, Array, int]) -> None:
        ids, targets, batch = draw
        data = self._tf.data.Dataset.from_tensor_slices((ids, targets))
        self._data = data.batch(batch, drop_remainder=True)

    def step(self) -> None:
        self._model.fit(self._data, verbose=0, shuffle=False)

    def parameters(self) -> list[Array]:
        return []


def _adamax(optimizer: str) -> Any:
    return by_name(optimizer)(LEARNING_RATE, BETA_1, BETA_2, EPSILON)


def _variable(optimizer: str) -> Any:
    """The class of variables that the package of an optimizer works on."""
    package = "tensorflow" if optimizer.startswith("tf_keras") else "keras"
    return importlib.import_module(package).Variable


def _build(optimizer: Any, variables: Sequence[Any]) -> None:
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
    else:  # tf_keras' legacy ones
        optimizer._create_all_weights(variables)


@functools.cache
def _use_tensorflow() -> Any:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    return tf
