"""Learning-rate schedules in a configuration that JSON can hold."""

import sys
from collections.abc import Mapping
from typing import Any

from ._rule import LearningRate, learning_rate_at


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

    Modules are not imported: a configuration may come from anywhere.
    """
    missing = {"module", "class_name", "config"} - config.keys()
    if missing:
        raise ValueError(
            f"learning_rate in config must have {', '.join(sorted(missing))}, "
            f"got {config!r}"
        )
    module, name = config["module"], config["class_name"]
    found: Any = custom_objects.get(name)
    if found is None:
        found = sys.modules.get(module)
        for part in str(name).split("."):
            found = getattr(found, part, None)
    if not (isinstance(found, type) and hasattr(found, "from_config")):
        raise ValueError(
            f"the learning rate schedule {name!r} was not found in {module!r}; import that "
            f"module first, or pass custom_objects={{{name!r}: ...}}"
        )
    schedule: LearningRate = found.from_config(config["config"])
    return schedule
