"""What :class:`adamax.keras.Adamax` does on Keras' TensorFlow back end.

A large variable is updated by a function that XLA compiles, which reads and writes it in
place. TensorFlow's scatter operations write in place too, but from then on every read of
the variable copies it whole, and the forward pass of ``keras.layers.Embedding`` is a read.
"""

import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from ._keras_rule import step_size, stepped
from ._rule import Coefficients, decay_factor

# From this many elements on, a compiled update pays.
_LARGE = 2**16
# Where the number of rows varies from call to call, it is raised to one of these, so that
# only so many functions are compiled.
_ROW_COUNTS = tuple(2**k for k in range(4, 31))


class BackendOptimizer(keras.optimizers.Optimizer):
    """Updates in place, and sparse gradients wherever Keras expects dense ones."""

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        super().apply([_divisible(gradient) for gradient in grads], trainable_variables)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        pairs = list(zip(grads, trainable_variables, strict=True))
        # Before anything is written.
        checks = [check for pair in pairs for check in _checks(*pair)]
        with tf.control_dependencies(checks):
            super()._backend_update_step(grads, trainable_variables, learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a ``tf.Variable`` and its state."""
        m, u = (_on_device_of(variable, state) for state in self._state_of(variable))
        learning_rate = tf.cast(learning_rate, tf.float64)
        size = step_size(learning_rate, self.beta_1, self.iterations + 1, "float64")
        decay = decay_factor(learning_rate, self._weight_decay_of(variable))
        if isinstance(gradient, tf.IndexedSlices):
            step, parts = _rows_step, [gradient.indices, gradient.values]
        else:
            step, parts = _dense_step, [gradient]
        if _xla_serves() and variable.shape.num_elements() >= _LARGE:
            if step is _rows_step:
                parts = _padded(*parts, rows=variable.shape[0])
            step = _compiled(step, _kind(variable, *parts))
        scalars = tf.cast(size, m.dtype), tf.cast(decay, m.dtype)
        step(variable, m, u, *parts, *scalars, self._coefficients())

    def _backend_increment_gradient_accumulators(
        self, grads: Sequence[Any], acc_grads: Sequence[Any]
    ) -> None:
        def add(accumulator: Any, gradient: Any) -> None:
            if isinstance(gradient, tf.IndexedSlices):
                accumulator.scatter_add(gradient)
            else:
                accumulator.assign_add(gradient)

        def add_all(strategy: Any, grads: Sequence[Any], accumulators: Any) -> None:
            for accumulator, gradient in zip(accumulators, grads, strict=True):
                strategy.extended.update(accumulator, add, args=(gradient,), group=False)

        tf.__internal__.distribute.interim.maybe_merge_call(
            add_all, self._distribution_strategy, grads, [v.value for v in acc_grads]
        )


def summed(gradient: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The values of a gradient, with repeated rows summed, and what puts them back.

    All but the first of the values of a row are zero then.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient, lambda values: values
    indices, first, sums = _sums(gradient.indices, gradient.values)
    first = tf.reshape(first, [-1] + [1] * (sums.shape.rank - 1))

    def with_values(values: Any) -> tf.IndexedSlices:
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    return tf.where(first, sums, tf.zeros_like(sums)), with_values


class _DivisibleSlices(tf.IndexedSlices):  # type: ignore[misc]
    """Slices that can be divided by a loss scale."""

    def __truediv__(self, scale: Any) -> tf.IndexedSlices:
        values = self.values / tf.cast(scale, self.values.dtype)
        return tf.IndexedSlices(values, self.indices, self.dense_shape)


def _divisible(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return _DivisibleSlices(gradient.values, gradient.indices, gradient.dense_shape)
    return gradient


def _checks(gradient: Any, variable: Any) -> list[Any]:
    """Operations that fail if the gradient does not fit the variable."""
    expected, given = tf.TensorShape(variable.shape), gradient.shape
    name = variable.name
    if not expected.is_compatible_with(given):
        raise ValueError(
            f"the gradient of variable {name!r} must have the shape {expected}, got {given}"
        )
    if not isinstance(gradient, tf.IndexedSlices):
        return []
    message = f"the indices of the gradient of variable {name!r} must be in [0, {expected[0]})"
    rows = tf.constant(expected[0], gradient.indices.dtype)
    return [
        tf.debugging.assert_non_negative(gradient.indices, message),
        tf.debugging.assert_less(gradient.indices, rows, message),
    ]


def _on_device_of(variable: Any, state: keras.Variable) -> Any:
    """The copy of ``state`` that belongs to this copy of a mirrored variable."""
    copies = tf.distribute.get_strategy().experimental_local_results(state.value)
    return next((c for c in copies if c.device == variable.device), copies[0])


# --- Updates ---------------------------------------------------------------------------


def _dense_step(
    w: Any, m: Any, u: Any, g: Any, size: Any, decay: Any, coefficients: Coefficients
) -> None:
    new = stepped(w, m, u, g, size, decay, coefficients)
    for variable, value in zip((w, m, u), new, strict=True):
        variable.assign(value)


def _rows_step(
    w: Any,
    m: Any,
    u: Any,
    indices: Any,
    values: Any,
    size: Any,
    decay: Any,
    coefficients: Coefficients,
) -> None:
    indices, _, g = _sums(indices, tf.cast(values, m.dtype))
    rows = [tf.gather(variable, indices) for variable in (w, m, u)]
    new = stepped(*rows, g, size, decay, coefficients)
    # A row that is there several times is written several times, the same values.
    for variable, value in zip((w, m, u), new, strict=True):
        variable.scatter_update(tf.IndexedSlices(value, indices))


def _sums(indices: Any, values: Any) -> tuple[Any, Any, Any]:
    """Sorted indices, which of them are the first of their row, and the sums of rows.

    All have as many entries as were given: the sum of a row is there for each of its
    indices. Shapes that depend on the data would not compile well.
    """
    order = tf.argsort(indices, stable=True)
    indices = tf.gather(indices, order)
    first = tf.concat([tf.ones_like(indices[:1], tf.bool), indices[1:] != indices[:-1]], 0)
    segments = tf.cumsum(tf.cast(first, tf.int32)) - 1
    sums = tf.math.unsorted_segment_sum(
        tf.gather(values, order), segments, tf.size(indices)
    )
    return indices, first, tf.gather(sums, segments)


@functools.cache
def _xla_serves() -> bool:
    return not (platform.system() == "Darwin" and platform.machine() == "arm64")


def _kind(variable: Any, *parts: Any) -> tuple[Any, ...]:
    tensors = [variable, *parts]
    return tuple((tuple(t.shape.as_list()), t.dtype, t.device) for t in tensors)


@functools.lru_cache(maxsize=1024)
def _compiled(step: Callable[..., None], kind: Any) -> Callable[..., None]:
    """A function of its own for each kind of arguments: one is enough for few traces."""
    del kind
    return tf.function(step, jit_compile=True, autograph=False)  # type: ignore[no-any-return]


def _padded(indices: Any, values: Any, rows: int) -> list[Any]:
    """The same rows with others added that are out of range, which XLA does not write."""
    count = indices.shape[0]
    if count is None:
        sizes = tf.constant(_ROW_COUNTS)
        count = tf.size(indices)
        wanted = tf.gather(sizes, tf.searchsorted(sizes, count[None])[0])
    elif tf.executing_eagerly():
        wanted = next(size for size in _ROW_COUNTS if size >= count)
    else:
        return [indices, values]  # always as many: compiled once
    padding = wanted - count
    paddings = [[0, padding]] + [[0, 0]] * (values.shape.rank - 1)
    return [
        tf.pad(indices, paddings[:1], constant_values=rows),
        tf.pad(values, paddings),
    ]
