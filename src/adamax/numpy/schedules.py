"""Learning-rate schedules in a configuration that JSON can hold.

A configuration may come from anywhere, so it only ever selects among known schedules: the
schedule classes of Keras and tf_keras and their subclasses, some functions of optax, and
what the caller passes as ``custom_objects``. Nothing else is looked up, imported or called.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .._core.rule import LearningRate, learning_rate_at

# Those whose arguments are numbers.
_OF_OPTAX = (
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
)


def schedule_to_config(learning_rate: LearningRate) -> float | dict[str, Any]:
    """A number as a float, a schedule object by its class and its own configuration."""
    if not callable(learning_rate):
        return learning_rate_at(learning_rate, 0)
    schedule: Any = learning_rate
    kind = type(schedule)
    if not (hasattr(kind, "get_config") and hasattr(kind, "from_config")):
        raise TypeError(
            f"learning_rate is a callable without get_config() and from_config(), which "
            f"cannot be put into a configuration: {learning_rate!r}"
        )
    return {
        "module": kind.__module__,
        "class_name": kind.__qualname__,
        "config": schedule.get_config(),
    }


def schedule_from_config(
    config: Mapping[str, Any], custom_objects: Mapping[str, type]
) -> LearningRate:
    """The schedule that :func:`schedule_to_config` described.

    Raises:
        ValueError: an incomplete entry, or a schedule that is not a known one.
    """
    missing = {"module", "class_name", "config"} - config.keys()
    if missing:
        raise ValueError(
            f"learning_rate in config must have {', '.join(sorted(missing))}, "
            f"got {config!r}"
        )
    module, name, arguments = config["module"], config["class_name"], config["config"]
    if not (isinstance(name, str) and isinstance(arguments, Mapping)):
        raise ValueError(
            f"learning_rate in config must have a name and a configuration, got {config!r}"
        )
    kind = custom_objects.get(name)
    if kind is not None and not (isinstance(kind, type) and hasattr(kind, "from_config")):
        raise ValueError(
            f"custom_objects[{name!r}] must be a class with from_config(), got {kind!r}"
        )
    for known in _known_classes() if kind is None else ():
        if (known.__module__, known.__qualname__) == (module, name):
            kind = known
    schedule: LearningRate
    if kind is not None:
        schedule = kind.from_config(dict(arguments))
        return schedule
    if module == "optax" and name in _OF_OPTAX and "optax" in sys.modules:
        schedule = getattr(sys.modules["optax"], name)(**arguments)
        return schedule
    raise ValueError(
        f"{name!r} of {module!r} is not a known learning rate schedule; import the module "
        f"that defines a schedule of Keras, or pass custom_objects={{{name!r}: ...}}"
    )


def _known_classes() -> Iterator[Any]:
    """The schedule classes of Keras and tf_keras that this program has imported."""
    for framework in ("keras", "tf_keras"):
        if framework in sys.modules:
            pending = [sys.modules[framework].optimizers.schedules.LearningRateSchedule]
            while pending:
                kind = pending.pop()
                yield kind
                pending += kind.__subclasses__()
