"""Learning rates and configurations of ``adamax.Adamax``."""

import json
import math
from typing import ClassVar

import numpy as np
import pytest

from adamax import Adamax
from cases import HYPERPARAMETERS
from compare import assert_same_bits


class Halving:
    """A schedule with a configuration, as a user would write it."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5**step

    def get_config(self):
        return {"start": self.start}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    class Slowly:
        """A schedule whose name has a dot."""

        def __init__(self, start, rate=0.9):
            self.start, self.rate = start, rate

        def __call__(self, step):
            return self.start * self.rate**step

        def get_config(self):
            return {"start": self.start, "rate": self.rate}

        @classmethod
        def from_config(cls, config):
            return cls(**config)


def moves(learning_rate, steps=4):
    """How far each step goes when the rule is a sign."""
    optimizer = Adamax(learning_rate, beta_1=0, epsilon=2.0**-126)
    w = np.zeros(1)
    moved = []
    for _ in range(steps):
        before = w.item()
        optimizer.apply_gradients([(np.ones(1), w)])
        moved.append(before - w.item())
    return moved


# --- Learning rates -----------------------------------------------------------------------

CONSTANTS = [0.5, np.float32(0.5), np.array(0.5), np.array(0.5, np.float16)]


@pytest.mark.parametrize("constant", CONSTANTS, ids=repr)
def test_a_learning_rate_may_be_any_number(constant):
    assert moves(constant) == [0.5] * 4


def test_an_integer_is_a_learning_rate():
    assert moves(2) == [2.0] * 4


@pytest.mark.parametrize(
    "returned", [0.5, 2**-1, np.float32(0.5), np.array(0.5), np.float16(0.5)], ids=repr
)
def test_a_schedule_may_return_any_number(returned):
    assert moves(lambda step: returned) == [0.5] * 4


def test_a_schedule_is_called_once_per_step_with_its_0_based_number():
    steps = []

    def schedule(step):
        steps.append(step)
        return 0.5**step

    first, second = np.zeros(1), np.zeros(2, np.float32)
    optimizer = Adamax(schedule, weight_decay=0.1, clipnorm=1.0)
    assert steps == []
    for _ in range(5):
        optimizer.apply_gradients([(np.ones(1), first), (np.ones(2), second)])
    assert steps == [0, 1, 2, 3, 4]
    assert all(type(step) is int for step in steps)


def test_steps_follow_the_schedule():
    np.testing.assert_allclose(moves(lambda step: 1 / (1 + step)), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(moves(Halving(1.0)), [1, 1 / 2, 1 / 4, 1 / 8])


def test_a_0_d_array_may_be_changed_between_steps():
    rate = np.array(1.0)
    optimizer = Adamax(rate, beta_1=0, epsilon=2.0**-126)
    w = np.zeros(1)
    optimizer.apply_gradients([(np.ones(1), w)])
    rate[...] = 0.25
    optimizer.apply_gradients([(np.ones(1), w)])
    assert w == -1.25


def test_a_learning_rate_may_be_assigned():
    optimizer = Adamax(1.0, beta_1=0, epsilon=2.0**-126, weight_decay=0.5, name="mine")
    w = np.zeros(1)
    for learning_rate in (0.5, lambda step: 0.25 * step, np.array(0.125), 2):
        optimizer.learning_rate = learning_rate
        assert optimizer.learning_rate is learning_rate
        w[...] = 0
        optimizer.apply_gradients([(np.ones(1), w)])
    assert w == -2.0
    assert optimizer.iterations == 4
    # All else is as it was.
    assert optimizer.hyperparameters.weight_decay == 0.5
    assert optimizer.hyperparameters.epsilon == 2.0**-126
    assert optimizer.name == "mine"


@pytest.mark.parametrize("name", ["ExponentialDecay", "CosineDecay", "PiecewiseConstant"])
def test_schedules_of_keras(keras, name):
    schedules = keras.optimizers.schedules
    made = {
        "ExponentialDecay": lambda: schedules.ExponentialDecay(0.5, 2, 0.5),
        "CosineDecay": lambda: schedules.CosineDecay(0.5, 10),
        "PiecewiseConstant": lambda: schedules.PiecewiseConstantDecay([1], [0.5, 0.25]),
    }
    schedule = made[name]()
    expected = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(moves(schedule), expected, rtol=1e-15)


@pytest.mark.parametrize("name", ["exponential_decay", "cosine_decay_schedule"])
def test_schedules_of_optax(optax, name):
    made = {
        "exponential_decay": lambda: optax.exponential_decay(0.5, 2, 0.5),
        "cosine_decay_schedule": lambda: optax.cosine_decay_schedule(0.5, 10),
    }
    schedule = made[name]()
    expected = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(moves(schedule), expected, rtol=1e-15)


def test_tensors_of_frameworks_are_learning_rates(torch, tensorflow):
    for constant in (torch.tensor(0.5), tensorflow.constant(0.5), tensorflow.Variable(0.5)):
        assert moves(constant) == [0.5] * 4


# --- Configurations -----------------------------------------------------------------------

DEFAULTS = {
    "name": "Adamax",
    "learning_rate": 0.001,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "weight_decay": 0.0,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "sparse": "lazy",
    "state_dtype": "float32",
    "stochastic_rounding": False,
}


def through_json(config):
    return json.loads(json.dumps(config))


def test_the_defaults():
    assert Adamax().get_config() == DEFAULTS
    assert repr(Adamax()) == (
        "Adamax(name='Adamax', learning_rate=0.001, beta_1=0.9, beta_2=0.999, "
        "epsilon=1e-07, weight_decay=0.0, sparse='lazy', state_dtype='float32', "
        "stochastic_rounding=False)"
    )


def test_the_defaults_are_those_of_keras(keras):
    config = keras.optimizers.Adamax().get_config()
    shared = ["learning_rate", "beta_1", "beta_2", "epsilon"]
    shared += ["clipnorm", "clipvalue", "global_clipnorm"]
    for name in shared:
        expected = config[name]
        assert DEFAULTS[name] == (
            expected if expected is None else pytest.approx(expected, rel=1e-7)
        )


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
def test_configurations_survive_json(hyperparameters):
    chosen = dict(HYPERPARAMETERS[hyperparameters])
    if callable(chosen.get("learning_rate")):
        chosen["learning_rate"] = Halving(0.5)
    config = Adamax(**chosen, name="mine").get_config()
    again = Adamax.from_config(through_json(config), {"Halving": Halving})
    assert again.get_config() == config
    assert again.name == "mine"
    assert again.iterations == 0


def test_a_configuration_holds_plain_numbers():
    given = {"learning_rate": np.array(0.5), "beta_1": np.float32(0.5), "clipnorm": 2}
    config = Adamax(**given).get_config()
    for name in given:
        assert type(config[name]) is float
    assert config == {**DEFAULTS, "learning_rate": 0.5, "beta_1": 0.5, "clipnorm": 2.0}


def test_a_part_of_a_configuration_is_one_too():
    assert Adamax.from_config({}).get_config() == DEFAULTS
    assert Adamax.from_config({"beta_1": 0.5}).get_config() == {**DEFAULTS, "beta_1": 0.5}


def test_from_config_leaves_its_argument_alone():
    config = Adamax(Halving(0.5)).get_config()
    before = through_json(config)
    Adamax.from_config(config, {"Halving": Halving})
    assert config == before


def test_subclasses_make_their_own_kind():
    class Mine(Adamax):
        pass

    assert type(Mine.from_config(Adamax().get_config())) is Mine
    assert repr(Mine()).startswith("Mine(")

    class Demanding(Adamax):
        def __init__(self, learning_rate, **others):
            super().__init__(learning_rate, **others)

    config = Adamax(0.5).get_config()
    assert Demanding.from_config(config).get_config() == config


def test_steps_are_the_same_after_a_round_trip():
    original = Adamax(Halving(0.5), beta_1=0.8, beta_2=0.95, epsilon=1e-3, clipnorm=0.5)
    again = Adamax.from_config(through_json(original.get_config()), {"Halving": Halving})
    first, second = np.ones(5), np.ones(5)
    for step in range(4):
        gradient = np.arange(5.0) - step
        original.apply_gradients([(gradient, first)])
        again.apply_gradients([(gradient, second)])
    assert_same_bits(first, second)


@pytest.mark.parametrize("schedule", [Halving(0.5), Halving.Slowly(0.5, 0.75)])
def test_schedules_are_found_in_custom_objects(schedule):
    config = through_json(Adamax(schedule).get_config())
    name = type(schedule).__qualname__
    assert config["learning_rate"] == {
        "module": __name__,
        "class_name": name,
        "config": schedule.get_config(),
    }
    with pytest.raises(ValueError, match=rf"^'{name}' of .* is not a known learning rate"):
        Adamax.from_config(config)
    found = Adamax.from_config(config, custom_objects={name: type(schedule)}).learning_rate
    assert type(found) is type(schedule)
    assert found.get_config() == schedule.get_config()


def test_custom_objects_come_first(keras):
    config = Adamax(keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)).get_config()
    config["learning_rate"]["config"] = Halving(0.5).get_config()
    found = Adamax.from_config(config, {"ExponentialDecay": Halving}).learning_rate
    assert type(found) is Halving


@pytest.mark.parametrize("custom", [Halving(0.5), len, "Halving", object])
def test_custom_objects_must_be_classes_with_a_configuration(custom):
    config = Adamax(Halving(0.5)).get_config()
    with pytest.raises(ValueError, match=r"^custom_objects\['Halving'\] must be a class"):
        Adamax.from_config(config, {"Halving": custom})


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_schedules_of_users_are_found_if_keras_knows_them(framework, request):
    base = request.getfixturevalue(framework).optimizers.schedules.LearningRateSchedule

    class Own(base):
        def __init__(self, start):
            self.start = start

        def __call__(self, step):
            return self.start / (step + 1)

        def get_config(self):
            return {"start": self.start}

    found = Adamax.from_config(through_json(Adamax(Own(0.5)).get_config())).learning_rate
    assert type(found) is Own
    assert found.start == 0.5


def test_schedules_of_optax_are_found_by_name(optax):
    entry = {
        "module": "optax",
        "class_name": "exponential_decay",
        "config": {"init_value": 0.5, "transition_steps": 1, "decay_rate": 0.5},
    }
    found = Adamax.from_config({"learning_rate": entry}).learning_rate
    assert [float(found(step)) for step in range(3)] == [0.5, 0.25, 0.125]
    for name in ("apply_updates", "adam", "join_schedules", "exponential_decay.__call__"):
        with pytest.raises(ValueError, match="is not a known learning rate schedule"):
            Adamax.from_config({"learning_rate": {**entry, "class_name": name}})


class Spy:
    """A class that a program has loaded, and that is not a schedule."""

    built: ClassVar[list] = []

    @classmethod
    def from_config(cls, config):
        cls.built.append(config)
        return lambda step: 0.1


def test_a_configuration_builds_nothing_but_schedules():
    entry = {"module": __name__, "class_name": "Spy", "config": {}}
    with pytest.raises(ValueError, match=r"'Spy' of .* is not a known learning rate"):
        Adamax.from_config({"learning_rate": entry})
    assert not Spy.built


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_a_configuration_runs_no_bytecode(framework, request, tmp_path):
    """A Lambda layer's configuration holds marshalled code."""
    layers = request.getfixturevalue(framework).layers
    target = tmp_path / "ran"
    lambda_layer = layers.Lambda(lambda x: target.touch())
    entry = {
        "module": type(lambda_layer).__module__,
        "class_name": "Lambda",
        "config": lambda_layer.get_config(),
    }
    with pytest.raises(ValueError, match=r"'Lambda' of .* is not a known learning rate"):
        Adamax.from_config({"learning_rate": entry}).apply_gradients(
            [(np.ones(1), np.ones(1))]
        )
    assert not target.exists()


def test_a_schedule_of_keras_survives_json(keras):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.25)
    config = through_json(Adamax(schedule).get_config())
    found = Adamax.from_config(config).learning_rate
    assert type(found) is type(schedule)
    assert found.get_config() == schedule.get_config()


@pytest.mark.parametrize(
    "schedule", [lambda step: 0.1, math.exp], ids=["lambda", "builtin"]
)
def test_a_callable_without_a_configuration_is_refused(schedule):
    with pytest.raises(TypeError, match=r"^learning_rate is a callable without get_config"):
        Adamax(schedule).get_config()


def test_an_unknown_entry_is_refused():
    with pytest.raises(
        TypeError, match=r"^unknown entry of config 'beta1'; did you mean 'beta_1'\?"
    ):
        Adamax.from_config({**DEFAULTS, "beta1": 0.9})
    # Those of tf.keras that have another meaning or none here are not let through.
    with pytest.raises(TypeError, match=r"^unknown entry of config 'decay'"):
        Adamax.from_config({"decay": 0.0})


@pytest.mark.parametrize(
    ("entry", "error", "match"),
    [
        ({"beta_1": 2}, ValueError, r"^beta_1 must be in \[0, 1\), got 2\.0$"),
        ({"learning_rate": None}, TypeError, r"^learning_rate must be a real number"),
        ({"name": None}, TypeError, r"^name must be a str, got None$"),
    ],
)
def test_a_wrong_entry_is_refused(entry, error, match):
    with pytest.raises(error, match=match):
        Adamax.from_config({**DEFAULTS, **entry})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"class_name": "Missing"}, r"^'Missing' of .* is not a known learning rate"),
        ({"module": "no.such.module"}, r"of 'no\.such\.module' is not a known"),
        ({"module": "json", "class_name": "dumps"}, r"^'dumps' of 'json' is not a known"),
        ({"class_name": "Halving.start"}, r"^'Halving\.start' of "),
        ({"class_name": ["Halving"]}, r"^learning_rate in config must have a name"),
        ({"config": "Halving"}, r"^learning_rate in config must have a name"),
    ],
)
def test_a_schedule_that_is_not_found_is_refused(changed, match):
    config = Adamax(Halving(0.5)).get_config()
    config["learning_rate"].update(changed)
    with pytest.raises(ValueError, match=match):
        Adamax.from_config(config)


@pytest.mark.parametrize("missing", ["module", "class_name", "config"])
def test_an_incomplete_schedule_is_refused(missing):
    config = Adamax(Halving(0.5)).get_config()
    del config["learning_rate"][missing]
    with pytest.raises(
        ValueError, match=rf"^learning_rate in config must have {missing}, "
    ):
        Adamax.from_config(config)


def test_modules_of_a_configuration_are_not_imported(run_python):
    """A configuration may come from anywhere."""
    run_python(
        """
        import sys, adamax
        entry = {"module": "this", "class_name": "Zen", "config": {}}
        try:
            adamax.Adamax.from_config({"learning_rate": entry})
        except ValueError as error:
            assert "import the module" in str(error)
        assert "this" not in sys.modules
        """
    )


# --- Attributes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("learning_rate", 0.5, -1),
        ("beta_1", 0.5, 1.0),
        ("beta_2", 0.5, math.nan),
        ("epsilon", 0.0, -1e-9),
        ("weight_decay", 0.1, -0.1),
        ("clipnorm", 1.0, 0),
        ("clipvalue", 1.0, -1),
        ("global_clipnorm", 1.0, "1"),
        ("sparse", "exact", "dense"),
    ],
)
def test_hyperparameters_are_attributes_that_are_validated(name, good, bad):
    optimizer = Adamax()
    before = getattr(optimizer, name)
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be "):
        setattr(optimizer, name, bad)
    assert getattr(optimizer, name) == before
    setattr(optimizer, name, good)
    assert getattr(optimizer, name) == optimizer.get_config()[name] == good


def test_an_assigned_hyperparameter_is_used():
    assigned, given = Adamax(0.1), Adamax(0.1, beta_1=0.5, weight_decay=0.5, clipnorm=0.1)
    assigned.beta_1, assigned.weight_decay, assigned.clipnorm = 0.5, 0.5, 0.1
    first, second = np.ones(5), np.ones(5)
    assigned.apply_gradients([(np.arange(5.0), first)])
    given.apply_gradients([(np.arange(5.0), second)])
    assert_same_bits(first, second)


def test_one_kind_of_clipping_excludes_another_when_it_is_assigned():
    optimizer = Adamax(clipnorm=1.0)
    with pytest.raises(ValueError, match=r"^at most one of "):
        optimizer.clipvalue = 1.0
    optimizer.clipnorm = None
    optimizer.clipvalue = 1.0


@pytest.mark.parametrize("name", ["beta1", "lr", "amsgrad", "iterations", "decay"])
def test_unknown_attributes_are_refused(name):
    with pytest.raises(AttributeError, match=name):
        setattr(Adamax(), name, 0.5)
