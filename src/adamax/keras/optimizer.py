"""Adamax for Keras 3, on its TensorFlow, JAX and PyTorch back ends."""

import importlib
import inspect
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from .._core.rule import Hyperparameters, checked_number, reject_unknown

if TYPE_CHECKING:
    from .tensorflow import BackendOptimizer, summed
elif keras.backend.backend() in ("tensorflow", "jax", "torch"):
    _back_end = importlib.import_module(f".{keras.backend.backend()}", __package__)
    BackendOptimizer, summed = _back_end.BackendOptimizer, _back_end.summed
else:
    raise ImportError(
        "adamax.keras needs tensorflow, jax or torch as the back end of Keras, got "
        f"{keras.backend.backend()!r}"
    )


# Keras keeps the learning rate in float32, and infinity would make NaN of a zero gradient.
_LARGEST = float(np.finfo(np.float32).max)


@keras.saving.register_keras_serializable(package="adamax")
class Adamax(BackendOptimizer):
    r"""Adamax (Adam with the infinity norm), a drop-in for ``keras.optimizers.Adamax``.

    For the gradient :math:`g` of a variable :math:`w` at step :math:`t = 1, 2, \dots`:

    .. math::
        m &\leftarrow m + (1 - \beta_1) (g - m) \\
        u &\leftarrow \max(\beta_2 u, |g|) \\
        w &\leftarrow (1 - \alpha \lambda) w
            - \frac{\alpha}{1 - \beta_1^t} \cdot \frac{m}{u + \epsilon}

    with the learning rate :math:`\alpha` and the weight decay :math:`\lambda`.

    On the TensorFlow back end the gradient of an embedding, or of anything that comes from
    ``tf.gather``, is a ``tf.IndexedSlices``. As ``tf.keras`` documents, and Keras 3 no
    longer does, it updates the rows whose index is present, of the variable and of its
    state, at a cost that does not depend on the size of the table; other rows stay as they
    are. Indices that repeat are summed first. Clipping sees the summed gradient, and weight
    decay reaches the rows that are updated. On the PyTorch back end sparse COO tensors mean
    the same. On the JAX back end all gradients are dense.

    Some options work on whole variables by their nature, and make a sparse update cost as
    much as a dense one: ``use_ema``, constraints, and ``gradient_accumulation_steps``,
    which applies dense gradients.

    Args:
        learning_rate: a float, a tensor of one number, in [0, inf), a
            ``keras.optimizers.schedules.LearningRateSchedule``, or a function of no
            arguments that returns the learning rate.
        beta_1: float or constant tensor, the decay of :math:`m` per step, in [0, 1).
        beta_2: float or constant tensor, the decay of :math:`u` per step, in [0, 1).
        epsilon: added to :math:`u` in the denominator, in [0, inf). With 0, the paper's own
            rule, an element that has only seen gradients of zero does not move.
        weight_decay: decoupled weight decay, in [0, inf); None for none.
        clipnorm: largest norm of the gradient of each variable.
        clipvalue: largest magnitude of each element of a gradient.
        global_clipnorm: largest norm of all gradients together. At most one of the three
            may be given, in (0, inf).
        use_ema: whether to keep a moving average of the variables.
        ema_momentum: decay of that average per step, in [0, 1].
        ema_overwrite_frequency: after how many steps variables are set to their average;
            None for only at the end of training.
        loss_scale_factor: what the loss is multiplied by, and gradients are divided by;
            None for 1.
        gradient_accumulation_steps: how many gradients are averaged before each update;
            None for 1.
        state_dtype: ``"float32"``. Compact state, which other front ends have, is not
            available in Keras.
        name: name of the optimizer; None for one that is made up.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, NaN included, an unknown one, or more than
            one kind of clipping.

    >>> import keras
    >>> import numpy as np
    >>> from adamax.keras import Adamax
    >>> model = keras.Sequential([keras.layers.Embedding(100, 8), keras.layers.Dense(1)])
    >>> model.compile(optimizer=Adamax(learning_rate=0.01), loss="mse")
    >>> history = model.fit(np.array([[1], [7]]), np.array([[[0.0]], [[1.0]]]), verbose=0)
    >>> int(model.optimizer.iterations.numpy())
    1

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1;
    arguments as ``keras.optimizers.Adamax``, sparse gradients as
    ``tf.keras.optimizers.legacy.Adamax``.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float = 1e-7,
        name: str | None = "Adamax",
        *,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        state_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        if kwargs:
            reject_unknown(kwargs, inspect.signature(Adamax).parameters, "argument")
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"name must be a string or None, got {name!r}")
        if state_dtype != "float32":
            raise ValueError(
                f"state_dtype must be 'float32' in Keras, got {state_dtype!r}: compact "
                f"state needs adamax.torch or adamax.jax"
            )
        if not callable(learning_rate):
            learning_rate = min(_constant("learning_rate", learning_rate), _LARGEST)
        if use_ema and not 0 <= ema_momentum <= 1:
            raise ValueError(f"ema_momentum must be in [0, 1], got {ema_momentum!r}")
        if loss_scale_factor is not None:
            checked_number("loss_scale_factor", loss_scale_factor)
        super().__init__(
            learning_rate=learning_rate,
            name=name,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        self.beta_1 = _constant("beta_1", beta_1)
        self.beta_2 = _constant("beta_2", beta_2)
        self.epsilon = checked_number("epsilon", epsilon)
        self._hyperparameters()

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the next step; a number or a schedule can be assigned."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, numbers.Real | np.ndarray | np.generic):
            value = min(checked_number("learning_rate", value), _LARGEST)
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Take a step, see ``keras.optimizers.Optimizer``.

        Args:
            grads: a gradient or None for each variable.
            trainable_variables: the variables; those the optimizer was built with if None.

        Raises:
            ValueError: a gradient of another shape than its variable. Nothing has changed
                then.
            IndexError: on the PyTorch back end, an index that is out of range, likewise.
            tf.errors.InvalidArgumentError: on the TensorFlow back end, an index that is out
                of range or a shape that turns out to be another one, likewise.
        """
        known = [
            g if g is None or hasattr(g, "shape") else keras.ops.convert_to_tensor(g)
            for g in grads
        ]
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or self._trainable_variables
        for gradient, variable in zip(known, variables, strict=False):
            if gradient is not None:
                _check_shape(gradient, variable)
        super().apply(known, trainable_variables)

    def build(self, variables: Sequence[Any]) -> None:
        """Make the state of ``variables``: ``momentum`` and ``norm`` of each, in turn."""
        if self.built:
            return
        super().build(variables)
        self._m, self._u = self.add_optimizer_variables(variables, ["momentum", "norm"])

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **options: Any
    ) -> keras.Variable:
        """Make a variable, see ``keras.optimizers.Optimizer``.

        The momentum and the norm of a 16-bit variable are float32: in 16 bits the norm
        could not decay.
        """
        is_state = str(options.get("name")).endswith(("_momentum", "_norm"))
        if is_state and dtype in ("float16", "bfloat16"):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, **options)

    def _state_of(self, variable: Any) -> tuple[keras.Variable, keras.Variable]:
        index = self._get_variable_index(variable)
        return self._m[index], self._u[index]

    def _hyperparameters(self) -> Hyperparameters:
        """What all variables share, validated: attributes may have been assigned."""
        return Hyperparameters(
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay or 0.0,
            clipnorm=self.clipnorm,
            clipvalue=self.clipvalue,
            global_clipnorm=self.global_clipnorm,
        )

    def _weight_decay_of(self, variable: Any) -> float:
        return (self._use_weight_decay(variable) and self.weight_decay) or 0.0

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Nothing: it is a part of the update, so that it reaches the same rows."""

    def _clip_gradients(self, grads: Sequence[Any]) -> list[Any]:
        if self.clipnorm is self.clipvalue is self.global_clipnorm is None:
            return list(grads)
        values, put_back = zip(*map(summed, grads), strict=True)
        clipped = super()._clip_gradients(values)
        return [put(value) for put, value in zip(put_back, clipped, strict=True)]

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` makes the same optimizer of, without its state."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Adamax":
        """An optimizer with the configuration that :meth:`get_config` returned.

        A configuration may come from anywhere: where it describes a learning rate, only a
        ``keras.optimizers.schedules.LearningRateSchedule`` is built.

        Args:
            config: from :meth:`get_config`.
            custom_objects: classes of learning-rate schedules by name, beside those that
                are registered with Keras.

        Raises:
            ValueError: a learning rate that is described as anything but a schedule.
        """
        config = dict(config)
        if isinstance(config.get("learning_rate"), dict):
            config["learning_rate"] = _schedule(config["learning_rate"], custom_objects)
        new: Adamax = super().from_config(config, custom_objects)
        return new

    @classmethod
    def from_keras(cls, optimizer: keras.optimizers.Adamax) -> "Adamax":
        """An optimizer that goes on where a ``keras.optimizers.Adamax`` stopped.

        It has the configuration of ``optimizer`` and, if that has been built, a copy of its
        state, for the same variables. The two differ only in what sparse gradients mean.

        Args:
            optimizer: for instance that of a model that ``keras.models.load_model`` read.

        Raises:
            TypeError: ``optimizer`` is something else.

        >>> import keras
        >>> from adamax.keras import Adamax
        >>> variable = keras.Variable([1.0, 2.0])
        >>> old = keras.optimizers.Adamax(learning_rate=0.5)
        >>> old.apply([keras.ops.ones(2)], [variable])
        >>> new = Adamax.from_keras(old)
        >>> new.apply([keras.ops.ones(2)], [variable])
        >>> variable.numpy().round(4).tolist()
        [0.0, 1.0]
        """
        if not isinstance(optimizer, keras.optimizers.Adamax):
            hint = ""
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                hint = "; pass its inner_optimizer"
            raise TypeError(
                f"optimizer must be a keras.optimizers.Adamax, got {optimizer!r}{hint}"
            )
        new: Adamax = cls.from_config(optimizer.get_config())
        if optimizer.built:
            new.build(optimizer._trainable_variables)
            for target, source in zip(new.variables, optimizer.variables, strict=True):
                target.assign(source)
        return new


def _schedule(config: dict[str, Any], custom_objects: Any) -> Any:
    """The learning-rate schedule with this configuration."""
    name, module = config.get("class_name"), config.get("module")
    registered = config.get("registered_name") or name
    schedules = keras.optimizers.schedules
    kind = keras.saving.get_registered_object(registered, custom_objects)
    if kind is None and module == "keras.optimizers.schedules":
        kind = vars(schedules).get(name)
    if not (isinstance(kind, type) and issubclass(kind, schedules.LearningRateSchedule)):
        raise ValueError(
            f"learning_rate in config must be a number or a schedule of Keras, of one "
            f"registered with it or of one in custom_objects, got {name!r} of {module!r}"
        )
    known: Any = kind
    return known.from_config(dict(config.get("config") or {}))


def _constant(hyperparameter: str, value: Any) -> float:
    """A number that does not change: what a variable holds later would not be seen."""
    if hasattr(value, "assign"):
        raise TypeError(
            f"{hyperparameter} must be a number or a constant tensor, got a variable; "
            f"assign to optimizer.{hyperparameter} to change it"
        )
    return checked_number(hyperparameter, value)


def _check_shape(gradient: Any, variable: Any) -> None:
    expected, given, what = tuple(variable.shape), gradient, "gradient"
    if hasattr(gradient, "dense_shape"):  # tf.IndexedSlices
        given, what = gradient.values, "values of the gradient"
        indices = gradient.indices
        count = indices.shape[0] if hasattr(indices, "shape") else len(indices)
        expected = (count, *expected[1:])
    if getattr(given.shape, "rank", 0) is None:  # known when the graph runs
        return
    shape = tuple(given.shape)
    pairs = zip(shape, expected, strict=False)
    # Dimensions that are None are not known yet.
    if len(shape) != len(expected) or any(None not in (a, b) and a != b for a, b in pairs):
        raise ValueError(
            f"the {what} of variable {variable.name!r} must have the shape {expected}, "
            f"got {shape}"
        )
