"""What :class:`adamax.keras.Adamax` does on Keras' TensorFlow back end.

A large variable is updated by a function that XLA compiles, which reads and writes it in
place. TensorFlow's scatter operations write in place too, but from then on every read of
the variable copies it whole, and the forward pass of ``keras.layers.Embedding`` is a read.
"""

import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from .rule import step_scalars, stepped

# From this many elements on, a compiled update pays.
_LARGE = 2**16
# Where the number of indices varies from call to call, it is raised to one of these, so
# that only so many functions are compiled.
_COUNTS = tuple(2**k for k in range(4, 31))


class BackendOptimizer(keras.optimizers.Optimizer):
    """Updates in place, and sparse gradients wherever Keras expects dense ones."""

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        if trainable_variables and not self.built:
            self.build(trainable_variables)  # not under the conditions below
        grads = [_divisible(gradient) for gradient in grads]
        known = trainable_variables or self._trainable_variables
        # Lengths that differ are for Keras to refuse.
        pairs = [pair for pair in zip(grads, known, strict=False) if pair[0] is not None]
        # Before anything is written, and steps are counted.
        with tf.control_dependencies([check for pair in pairs for check in _checks(*pair)]):
            super().apply(grads, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a ``tf.Variable`` and its state."""
        m, u = (_on_device_of(variable, state) for state in self._state_of(variable))
        scalars = step_scalars(
            self._hyperparameters(),
            learning_rate,
            self._weight_decay_of(variable),
            self.iterations + 1,
            "float64",
        )
        large = _xla_serves() and variable.shape.num_elements() >= _LARGE
        step: Any
        given: list[Any]
        if isinstance(gradient, tf.IndexedSlices):
            indices, values = gradient.indices, tf.cast(gradient.values, m.dtype)
            if large:
                indices, values = _in_fixed_number(indices, values, variable.shape[0])
            step, given = _rows_step, [indices, _row_sums(indices, values)]
        else:
            step, given = _dense_step, [tf.ensure_shape(gradient, variable.shape)]
        variables = [_Handle(v.handle, v.dtype) for v in (variable, m, u)]
        with tf.device(variable.device):  # where its handle can be used
            given += [_rounded(scalar, m.dtype) for scalar in scalars]
            if large:
                _compiled(step, variables, *given)([v.handle for v in variables], *given)
            else:
                step(variables, *given)

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

    The first of the values of a row is their sum then, and the others are zero.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient, lambda values: values
    values, indices = gradient.values, gradient.indices
    _, place = tf.unique(indices)
    positions = tf.range(tf.size(indices))
    firsts = tf.math.unsorted_segment_min(positions, place, tf.size(indices))
    first = tf.gather(firsts, place) == positions
    first = tf.reshape(first, [-1] + [1] * (values.shape.rank - 1))
    sums = tf.where(first, _row_sums(indices, values), tf.zeros_like(values))
    return sums, lambda values: tf.IndexedSlices(values, indices, gradient.dense_shape)


class _DivisibleSlices(tf.IndexedSlices):
    """Slices that can be divided by a loss scale."""

    def __truediv__(self, scale: Any) -> tf.IndexedSlices:
        values = self.values / tf.cast(scale, self.values.dtype)
        return tf.IndexedSlices(values, self.indices, self.dense_shape)


def _divisible(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        parts = [gradient.values, gradient.indices]
        if gradient.dense_shape is not None:
            parts.append(gradient.dense_shape)
        return _DivisibleSlices(*map(tf.convert_to_tensor, parts))
    return gradient


def _checks(gradient: Any, variable: Any) -> list[Any]:
    """Operations that fail if the gradient does not fit the variable.

    XLA leaves out the check of indices.
    """
    shape = variable.shape
    if not isinstance(gradient, tf.IndexedSlices):
        return [tf.ensure_shape(gradient, shape)]
    indices, rows = gradient.indices, shape[0]
    message = f"the indices of the gradient of {variable.name} must be in [0, {rows}), got"
    limit = tf.constant(rows, indices.dtype)
    in_range = tf.reduce_all((indices >= 0) & (indices < limit))
    return [
        tf.ensure_shape(gradient.values, [indices.shape[0], *shape[1:]]),
        # tf.debugging.Assert would put this into a conditional, which takes longer.
        tf.raw_ops.Assert(condition=in_range, data=[message, indices]),
    ]


def _rounded(number: Any, dtype: Any) -> Any:
    """A scalar in ``dtype``, no larger than its largest number."""
    wide = tf.convert_to_tensor(number, tf.float64)
    largest = tf.constant(dtype.max, tf.float64)
    return tf.cast(tf.clip_by_value(wide, -largest, largest), dtype)


def _on_device_of(variable: Any, state: keras.Variable) -> Any:
    """The copy of ``state`` that belongs to this copy of a mirrored variable."""
    copies = tf.distribute.get_strategy().experimental_local_results(state.value)
    return next((c for c in copies if c.device == variable.device), copies[0])


# --- Updates ---------------------------------------------------------------------------


class _Handle(NamedTuple):
    """A variable by its handle: a compiled function must not keep variables alive."""

    handle: Any
    dtype: Any

    def read(self) -> Any:
        return tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype)

    def assign(self, value: Any) -> None:
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=value)

    def gather(self, indices: Any) -> Any:
        return tf.raw_ops.ResourceGather(
            resource=self.handle, indices=indices, dtype=self.dtype
        )

    def scatter(self, indices: Any, values: Any) -> None:
        tf.raw_ops.ResourceScatterUpdate(
            resource=self.handle, indices=indices, updates=values
        )


def _dense_step(variables: Sequence[_Handle], g: Any, *scalars: Any) -> None:
    w, m, u = (variable.read() for variable in variables)
    new = stepped(w, m, u, g, *scalars)
    for variable, value in zip(variables, new, strict=True):
        variable.assign(value)


def _rows_step(
    variables: Sequence[_Handle], indices: Any, values: Any, *scalars: Any
) -> None:
    """A step of some rows; those that repeat are written repeatedly, with equal values.

    Shapes do not depend on what is in tensors, or XLA would not compile this well.
    """
    w, m, u = (variable.gather(indices) for variable in variables)
    new = stepped(w, m, u, values, *scalars)
    for variable, rows in zip(variables, new, strict=True):
        variable.scatter(indices, rows)


def _row_sums(indices: Any, values: Any) -> Any:
    """For each index, the sum of the values of its row."""
    _, place = tf.unique(indices)
    sums = tf.math.unsorted_segment_sum(values, place, tf.size(indices))
    return tf.gather(sums, place)


def _in_fixed_number(indices: Any, values: Any, rows: int) -> list[Any]:
    """A gradient with rows added that are out of range, which XLA does not write."""
    count = indices.shape[0]
    if count is None:
        count, sizes = tf.size(indices), tf.constant(_COUNTS)
        wanted = tf.reduce_min(tf.where(sizes >= count, sizes, _COUNTS[-1]))
    elif tf.executing_eagerly():
        wanted = next(size for size in _COUNTS if size >= count)
    else:
        return [indices, values]  # always as many
    paddings = [[0, wanted - count]] + [[0, 0]] * (values.shape.rank - 1)
    padded = tf.pad(indices, paddings[:1], constant_values=rows)
    return [padded, tf.pad(values, paddings)]


@functools.cache
def _xla_serves() -> bool:
    return not (platform.system() == "Darwin" and platform.machine() == "arm64")


# Compiled functions, by the kinds of their arguments; the oldest make room for new ones.
_COMPILED: dict[Any, Any] = {}
_MOST_COMPILED = 512


def _compiled(step: Any, variables: Sequence[_Handle], *arguments: Any) -> Any:
    """A function of the handles of ``variables`` and of ``arguments``."""
    dtypes = tuple(variable.dtype for variable in variables)
    devices = tuple(variable.handle.device for variable in variables)
    kinds = tuple((tuple(a.shape.as_list()), a.dtype) for a in arguments)
    key = (step, dtypes, devices, kinds)
    if key not in _COMPILED:

        def run(handles: Sequence[Any], *arguments: Any) -> None:
            pairs = zip(handles, dtypes, strict=True)
            step([_Handle(*pair) for pair in pairs], *arguments)

        function = tf.function(run, jit_compile=True, autograph=False)
        handles = [variable.handle for variable in variables]
        if len(_COMPILED) >= _MOST_COMPILED:
            del _COMPILED[next(iter(_COMPILED))]
        # Called as it is, the function would be traced for each kind of arguments, of
        # which TensorFlow warns.
        _COMPILED[key] = function.get_concrete_function(handles, *arguments)
    return _COMPILED[key]
