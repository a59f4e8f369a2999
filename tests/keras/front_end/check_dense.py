"""Dense steps on any back end: the rule, state, options of Keras, and errors."""

import json
import pickle
import re

import numpy as np
import pytest

import oracle
from cases import HYPERPARAMETERS, LARGE, SHAPES, values
from keras_support import (
    BACK_END,
    Adamax,
    follow,
    keras,
    numpy,
    options,
    tensor,
    variable,
)

KERAS_ADAMAX = keras.optimizers.Adamax


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_the_rule_with_all_kinds_of_hyperparameters(name, rng):
    hyperparameters = {"learning_rate": 0.001, **HYPERPARAMETERS[name]}
    shapes = list(SHAPES.values())
    variables = [variable(values(rng, shape, "float32")) for shape in shapes]
    gradients = [[values(rng, s, "float32") for s in shapes] for _ in range(4)]
    rule = oracle.Rule(**hyperparameters)
    follow(Adamax(**options(hyperparameters)), rule, variables, gradients)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [LARGE, (5, 9)], ids=["large", "small"])
def test_dtypes_and_sizes(dtype, shape, rng):
    variables = [variable(values(rng, shape, dtype))]
    gradients = [[values(rng, shape, dtype)] for _ in range(3)]
    optimizer = Adamax(0.01, weight_decay=0.1)
    rule = oracle.Rule(learning_rate=0.01, weight_decay=0.1)
    follow(optimizer, rule, variables, gradients)
    assert [v.dtype for v in optimizer.variables[2:]] == ["float32"] * 2


def test_float64(rng, request):
    if BACK_END == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))
    variables = [variable(values(rng, (5, 9), "float64"))]
    gradients = [[values(rng, (5, 9), "float64")] for _ in range(3)]
    follow(Adamax(0.5), oracle.Rule(learning_rate=0.5), variables, gradients)


@pytest.mark.parametrize("shape", [(3,), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_everything(bad, shape):
    w = variable(np.ones(shape, np.float32))
    optimizer = Adamax(0.1)
    gradient = np.ones(shape, np.float32)
    gradient.flat[1] = bad
    for g in (gradient, np.ones(shape, np.float32)):
        optimizer.apply([tensor(g)], [w])
        m, u = (numpy(v).ravel() for v in optimizer.variables[2:])
        assert np.isfinite(np.delete(m, 1)).all()
        assert not np.isfinite(m[1])
        assert not np.isfinite(u[1])
        assert np.isnan(u[1]) == np.isnan(bad)
        assert np.isnan(numpy(w).ravel()[1])
        assert np.isfinite(np.delete(numpy(w).ravel(), 1)).all()


def test_state_has_the_order_and_names_of_keras():
    def described(optimizer):
        shapes = {"a": (2, 3), "b": ()}
        variables = [keras.Variable(np.ones(s), name=name) for name, s in shapes.items()]
        optimizer.build(variables)
        return [(v.path.lower(), tuple(v.shape), v.dtype) for v in optimizer.variables]

    assert described(Adamax(name="adamax")) == described(KERAS_ADAMAX(name="adamax"))


def test_arguments_are_those_of_tf_keras():
    optimizer = Adamax(0.1, 0.8, 0.9, 1e-3, "mine")
    config = optimizer.get_config()
    assert config["name"] == "mine"
    assert [config[k] for k in ("beta_1", "beta_2", "epsilon")] == [0.8, 0.9, 1e-3]
    assert Adamax().get_config() == {**KERAS_ADAMAX().get_config(), "name": "Adamax"}


def test_hyperparameters_may_be_constant_tensors():
    optimizer = Adamax(tensor(np.float32(0.25)), tensor(np.float32(0.5)), np.float64(0.75))
    assert float(numpy(optimizer.learning_rate)) == 0.25
    assert (optimizer.beta_1, optimizer.beta_2) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"learning_rate": np.nan},
            ValueError,
            "learning_rate must be in [0, inf), got n",
        ),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be in [0, inf), got -1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a real number"),
        ({"beta_1": 1.5}, ValueError, "beta_1 must be in [0, 1), got 1.5"),
        ({"beta_2": -2}, ValueError, "beta_2 must be in [0, 1), got -2.0"),
        ({"epsilon": -1}, ValueError, "epsilon must be in [0, inf), got -1.0"),
        ({"epsilon": None}, TypeError, "epsilon must be a real number, got None"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be in [0, inf)"),
        ({"clipnorm": -1}, ValueError, "clipnorm must be in (0, inf), got -1.0"),
        ({"clipvalue": 0.0}, ValueError, "clipvalue must be in (0, inf), got 0.0"),
        ({"global_clipnorm": np.nan}, ValueError, "global_clipnorm must be in (0, inf)"),
        ({"loss_scale_factor": 0.0}, ValueError, "loss_scale_factor must be in (0, inf)"),
        ({"use_ema": True, "ema_momentum": 2}, ValueError, "ema_momentum must be in [0, 1"),
        ({"gradient_accumulation_steps": 1}, ValueError, "must be an integer >= 2"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "Only one of `clipnorm`"),
        ({"name": 0.01}, TypeError, "name must be a string or None, got 0.01"),
        ({"beta1": 0.9}, TypeError, "unknown argument 'beta1'; did you mean 'beta_1'"),
        ({"decay": 0.1}, TypeError, "unknown argument 'decay'"),
    ],
    ids=str,
)
def test_wrong_hyperparameters_are_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Adamax(**arguments)


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2"])
def test_hyperparameters_are_no_variables(name):
    with pytest.raises(TypeError, match=f"{name} must be a number or a constant tensor"):
        Adamax(**{name: keras.Variable(0.5)})


def test_compact_state_is_refused():
    Adamax(state_dtype="float32")
    message = r"^state_dtype must be 'float32' in Keras, got '8bit': .* adamax\.torch or"
    with pytest.raises(ValueError, match=message):
        Adamax(state_dtype="8bit")


def test_a_name_may_be_left_to_keras():
    assert Adamax(name=None).name != Adamax(name=None).name


def test_gradients_may_be_lists():
    w = variable(np.ones(3, np.float32))
    Adamax(0.5).apply([[1.0, -1.0, 0.0]], [w])
    np.testing.assert_allclose(numpy(w), [0.5, 1.5, 1.0], rtol=1e-6)


def test_a_wrong_learning_rate_is_refused_later_too():
    optimizer = Adamax()
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got nan"):
        optimizer.learning_rate = float("nan")
    assert float(numpy(optimizer.learning_rate)) == pytest.approx(0.001)
    optimizer.learning_rate = np.float32(0.5)
    assert float(numpy(optimizer.learning_rate)) == 0.5


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 3)])
def test_a_gradient_of_the_wrong_shape_is_refused_before_anything_is_written(shape):
    first, second = (variable(np.ones(s, np.float32)) for s in [(3,), (2, 3)])
    optimizer = Adamax()
    optimizer.build([first, second])
    wrong = [tensor(np.ones(s, np.float32)) for s in [(3,), shape]]
    with pytest.raises(ValueError, match=r"gradient of variable .* must have the shape"):
        optimizer.apply(wrong)
    assert (numpy(first) == 1).all()
    assert int(numpy(optimizer.iterations)) == 0


def same_as_keras(rng, steps=12, gradients=None, **arguments):
    """Ours and Keras' own agree to rounding, state included."""
    shapes = [(4, 3), (3,)]
    start = [rng.normal(size=s).astype(np.float32) for s in shapes]
    optimizers = [Adamax(**arguments), KERAS_ADAMAX(**arguments)]
    variables = [[variable(w) for w in start] for _ in optimizers]
    for _ in range(steps):
        given = [rng.normal(size=s).astype(np.float32) for s in shapes]
        for optimizer, own in zip(optimizers, variables, strict=True):
            optimizer.apply([tensor(g) for g in given], own)
    for ours, theirs in zip(*variables, strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), rtol=2e-5, atol=2e-6)
    ours, theirs = (optimizer.variables for optimizer in optimizers)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(numpy(mine), numpy(other), rtol=2e-5, atol=2e-6)


OPTIONS = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1, "learning_rate": 0.01},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 4},
    "loss scale": {"loss_scale_factor": 8.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation and all": {
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "clipnorm": 0.5,
        "use_ema": True,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_to_keras(name, rng):
    same_as_keras(rng, **OPTIONS[name])


@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_variables_can_be_excluded_from_weight_decay(how):
    kernel, bias = (variable(np.ones(2, np.float32), name) for name in ("kernel", "bias"))
    optimizer = Adamax(1.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(
        **({"var_list": [bias]} if how == "var_list" else {"var_names": ["bias"]})
    )
    optimizer.apply([tensor(np.zeros(2, np.float32))] * 2, [kernel, bias])
    assert numpy(kernel).tolist() == [0.5, 0.5]
    assert numpy(bias).tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_variable_without_a_gradient_stays():
    first, second = variable(np.ones(2, np.float32)), variable(np.ones(2, np.float32))
    Adamax(0.5).apply([None, tensor(np.ones(2, np.float32))], [first, second])
    assert numpy(first).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(numpy(second), 0.5, rtol=1e-6)


def model(optimizer=None):
    keras.utils.set_random_seed(7)
    layers = keras.layers
    made = keras.Sequential(
        [
            layers.Input((4,), dtype="int32"),
            layers.Embedding(30, 5),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    if optimizer is not None:
        made.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    return made


def data(rng):
    return rng.integers(0, 30, (48, 4)).astype("int32"), rng.integers(0, 3, 48)


def weights(of):
    return [numpy(v) for v in of.trainable_variables]


def test_a_saved_model_goes_on_as_if_it_had_not_stopped(rng, tmp_path):
    x, y = data(rng)
    straight = model(Adamax(0.01))
    straight.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    stopped = model(Adamax(0.01))
    stopped.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    stopped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is Adamax
    assert int(numpy(loaded.optimizer.iterations)) == 3
    loaded.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    for one, other in zip(weights(straight), weights(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_state_of_keras_own_adamax_is_carried_over(rng, tmp_path):
    x, y = data(rng)
    theirs = model(KERAS_ADAMAX(0.01, weight_decay=0.1))
    theirs.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    theirs.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ours = Adamax.from_keras(loaded.optimizer)
    assert ours.get_config() == loaded.optimizer.get_config()
    for mine, other in zip(ours.variables, theirs.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(mine), numpy(other))
    loaded.compile(optimizer=ours, loss=loaded.loss)
    loaded.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    assert int(numpy(ours.iterations)) == 6


@pytest.mark.parametrize("wrong", [None, "adamax", "Adam"])
def test_from_keras_takes_an_adamax(wrong):
    given = keras.optimizers.Adam() if wrong == "Adam" else wrong
    with pytest.raises(TypeError, match=r"must be a keras.optimizers.Adamax, got"):
        Adamax.from_keras(given)


def test_from_keras_says_where_a_loss_scale_optimizer_has_it():
    outer = keras.optimizers.LossScaleOptimizer(KERAS_ADAMAX(0.25))
    with pytest.raises(TypeError, match="pass its inner_optimizer"):
        Adamax.from_keras(outer)
    ours = Adamax.from_keras(outer.inner_optimizer)
    assert float(numpy(ours.learning_rate)) == 0.25


def test_pickling_keeps_the_configuration():
    again = pickle.loads(pickle.dumps(Adamax(0.1, beta_2=0.99, clipnorm=2.0)))
    assert again.get_config()["beta_2"] == 0.99
    assert again.get_config()["clipnorm"] == 2.0


def test_a_schedule_survives_a_configuration():
    @keras.saving.register_keras_serializable(package="mine")
    class Own(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5 / (keras.ops.cast(step, "float32") + 1)

        def get_config(self):
            return {}

    class Unregistered(Own):
        pass

    for schedule in (keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5), Own()):
        config = json.loads(json.dumps(Adamax(schedule).get_config()))
        again = Adamax.from_config(config)
        assert type(again._learning_rate) is type(schedule)
        assert again.get_config() == config
    config = Adamax(Unregistered()).get_config()
    with pytest.raises(ValueError, match=r"^learning_rate in config must be a number or"):
        Adamax.from_config(config)
    name = config["learning_rate"]["registered_name"]
    again = Adamax.from_config(config, {name: Unregistered})
    assert type(again._learning_rate) is Unregistered


@pytest.mark.parametrize(
    "entry",
    [
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}},
        {"module": "keras.optimizers", "class_name": "Adam", "config": {}},
        {"module": "keras.optimizers.schedules", "class_name": "math", "config": {}},
        {"module": "builtins", "class_name": "function", "config": "relu"},
        {"module": "json", "class_name": "JSONDecoder", "config": {}},
    ],
    ids=lambda entry: entry["class_name"],
)
def test_a_configuration_builds_nothing_but_schedules(entry):
    with pytest.raises(ValueError, match=r"^learning_rate in config must be a number or"):
        Adamax.from_config({"learning_rate": {**entry, "registered_name": None}})


def test_a_wide_gradient_of_a_narrow_variable_is_not_cast_down():
    w = variable(np.zeros(2, np.float16))
    optimizer = Adamax()
    optimizer.apply([tensor(np.array([1e-8, 1e5], np.float32))], [w])
    norm = next(v for v in optimizer.variables if v.path.endswith("norm"))
    np.testing.assert_array_equal(numpy(norm), np.array([1e-8, 1e5], np.float32))
    assert np.isfinite(numpy(w)).all()


def test_a_learning_rate_beyond_float32_makes_no_nan_of_a_zero_gradient():
    w = variable(np.ones(2, np.float32))
    Adamax(1e39).apply([tensor(np.array([0.0, 1.0], np.float32))], [w])
    assert numpy(w)[0] == 1
    assert not np.isnan(numpy(w)).any()


def test_training_with_callbacks_and_a_schedule(rng):
    x, y = data(rng)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=0, min_delta=10, cooldown=0
    )
    trained = model(Adamax(0.02))
    losses = trained.fit(x, y, epochs=3, verbose=0, callbacks=[plateau]).history["loss"]
    assert losses[-1] < losses[0]
    assert float(numpy(trained.optimizer.learning_rate)) == pytest.approx(0.005)
    decay = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.5)
    scheduled = model(Adamax(decay))
    scheduled.fit(x, y, batch_size=16, verbose=0)
    assert float(numpy(scheduled.optimizer.learning_rate)) == pytest.approx(0.02 * 0.5**1.5)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}], ids=str)
def test_mixed_precision(rng, eager, clip):
    x, y = data(rng)
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        trained = model()
        trained.compile(
            optimizer=Adamax(0.02, **clip),
            loss="sparse_categorical_crossentropy",
            run_eagerly=eager,
        )
        start = weights(trained)
        losses = trained.fit(x, y, epochs=3, verbose=0).history["loss"]
    finally:
        keras.mixed_precision.set_global_policy(before)
    assert type(trained.optimizer) is keras.optimizers.LossScaleOptimizer
    assert int(numpy(trained.optimizer.inner_optimizer.iterations)) > 0
    assert losses[-1] < losses[0]
    moved = [np.abs(a - b).max() for a, b in zip(start, weights(trained), strict=True)]
    assert all(0 < distance <= 0.0202 * 6 for distance in moved)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_training_with_jit_compile_given(rng):
    x, y = data(rng)
    results = []
    for jit in (False, True):
        trained = model()
        trained.compile(
            optimizer=Adamax(0.02), loss="sparse_categorical_crossentropy", jit_compile=jit
        )
        trained.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        results.append(weights(trained))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
