"""What torch asserts of each of its optimizers, with its own inputs for Adamax.

Its inputs are read where it keeps them, in a process of their own, as importing
``torch.testing._internal`` changes settings of torch and hypothesis.
"""

import copy
import pickle

import pytest

from torch_cases import (
    assert_same_contents,
    assert_same_tensor,
    contents,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

# torch's inputs for the CPU, by its descriptions.
CONFIGS = {
    "default": {},
    "non-default lr": {"lr": 0.1},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, weight_decay": {"weight_decay": 0.1, "maximize": True},
}
# Those for accelerators.
CAPTURABLE_CONFIGS = {
    "capturable": {},
    "capturable, maximize, weight_decay": {"weight_decay": 0.9, "maximize": True},
    "capturable, maximize": {"weight_decay": 0, "maximize": True},
    "capturable, weight_decay": {"weight_decay": 0.9, "maximize": False},
    "capturable, weight_decay, tensor LR": {
        "lr": torch.tensor(0.001),
        "weight_decay": 0.9,
        "maximize": False,
    },
}

# What we raise where torch does. Its error, and a message of our own where we have one:
# ours names the argument, the value and what was expected.
ERRORS = {
    "invalid param type": (TypeError, None),
    "a param group cannot have duplicate parameters": (UserWarning, None),
    "duplicate parameters should not occur across param groups either": (ValueError, None),
    "all optimizer params should be with/without names": (ValueError, None),
    "all optimizer param groups should be with/without names.": (ValueError, None),
    "Tensor lr must be 1-element": (
        ValueError,
        r"lr must have one element, got the shape \(2,\)",
    ),
    "beta2 should be between 0 and 1": (
        ValueError,
        r"betas\[1\] must be in \[0, 1\), got 1.0",
    ),
}

PATHS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}
configs = pytest.mark.parametrize("config", CONFIGS)
paths = pytest.mark.parametrize("path", PATHS)

READ_INPUTS = """
    import pickle, sys, types, unittest
    try:
        import expecttest
    except ImportError:  # needed for its base class of test cases
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    import torch
    from torch.testing._internal import common_optimizers as theirs

    [info] = [info for info in theirs.optim_db if info.name == "Adamax"]
    inputs = {
        device: {each.desc: each.kwargs for each in info.optim_inputs_func(device)}
        for device in ("cpu", "cuda")
    }
    errors = [
        (e.optimizer_error_input, e.error_on.name, e.error_type, e.error_regex)
        for e in info.optim_error_inputs_func("cpu", torch.float32)
    ]
    errors = [(i.desc, i.params, i.kwargs, *rest) for i, *rest in errors]
    flags = info.supported_impls, info.not_og_supported_flags
    with open(sys.argv[1], "wb") as file:
        pickle.dump((inputs, errors, flags), file)
"""


def test_the_inputs_are_torchs_and_its_errors_are_ours(run_python, tmp_path):
    """One test, as reading them takes seconds."""
    file = tmp_path / "inputs"
    run_python(READ_INPUTS, file, PYTHONWARNINGS="ignore")
    inputs, errors, (implementations, newer) = pickle.loads(file.read_bytes())
    assert inputs["cpu"] == CONFIGS
    on_accelerators = {
        name: {**chosen, "capturable": True} for name, chosen in CAPTURABLE_CONFIGS.items()
    }
    assert inputs["cuda"] == {**CONFIGS, **on_accelerators}
    assert set(implementations) == {"foreach", "differentiable"}
    assert set(newer) == {"foreach", "differentiable", "maximize", "capturable"}

    assert {desc for desc, *_ in errors} == ERRORS.keys()
    for desc, params, kwargs, raised_on, error, message in errors:
        assert raised_on == "CONSTRUCTION_ERROR"
        our_error, our_message = ERRORS[desc]
        assert our_error is error, desc
        params = [torch.nn.Parameter(torch.ones(1))] if params is None else params
        expects = pytest.warns if issubclass(error, Warning) else pytest.raises
        with expects(error, match=our_message or message):
            Adamax(params, **kwargs)


@paths
def test_an_epsilon_of_zero_moves_nothing_that_has_no_gradient(path):
    """Where torch divides 0 by 0."""
    w = torch.nn.Parameter(torch.ones(2))
    take_steps(Adamax([w], eps=0, lr=0.25, **PATHS[path]), [[torch.tensor([0.0, 3.0])]])
    assert w.tolist() == [1.0, 0.75]
    theirs = torch.optim.Adamax([w], eps=0)
    take_steps(theirs, [[torch.zeros(2)]])
    assert w.isnan().all()


def test_epsilon_is_added_in_the_denominator():
    """Where torch adds it to |g|, which makes no difference if gradients are large."""
    gradient = [[torch.tensor([1e-8])]]
    ours, theirs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    our_state = take_steps(Adamax([ours], eps=1e-8), gradient).state[ours]
    their_state = take_steps(torch.optim.Adamax([theirs], eps=1e-8), gradient).state[theirs]
    assert our_state["exp_inf"].item() == pytest.approx(1e-8)
    assert their_state["exp_inf"].item() == pytest.approx(2e-8)
    assert ours.item() == pytest.approx(theirs.item())


# --- The update goes the right way --------------------------------------------------------


def problem(contiguous=True, **options):
    """Optimizers of a weight and a bias, in one group and in two, and a closure."""
    torch.manual_seed(0)
    holes = (slice(None),) if contiguous else (..., 0)
    weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
    if contiguous:
        weight, bias = weight[..., 0].contiguous(), bias[..., 0].contiguous()
    weight, bias = (torch.nn.Parameter(tensor[holes]) for tensor in (weight, bias))
    x = torch.randn(5)

    def loss():
        weight.grad = bias.grad = None
        value = (weight.mv(x) + bias).square().sum()
        value.backward()
        return value

    return weight, bias, loss


SCHEDULES = {
    "none": lambda optimizer: [],
    "steps and plateaus": lambda optimizer: [
        torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
}


@configs
@paths
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_loss_goes_the_right_way(groups, schedule, contiguous, path, config):
    weight, bias, loss = problem(contiguous)
    params = [weight, bias]
    if groups == 2:
        params = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
    chosen = {**CONFIGS[config], **PATHS[path]}
    optimizer = Adamax(params, **chosen)
    schedulers = SCHEDULES[schedule](optimizer)
    start = loss().item()
    for _ in range(20):
        value = optimizer.step(loss)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([value.detach()] if plateau else []))
    end = loss().item()
    assert end > start if chosen.get("maximize") else end < start


@configs
@paths
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_is_its_number(shape, path, config):
    chosen = {**CONFIGS[config], **PATHS[path]}
    lr = torch.full((), chosen.pop("lr", 2e-3), dtype=torch.float64)
    results = []
    for given in (lr.item(), lr.reshape(shape)):
        weight, bias, loss = problem()
        optimizer = Adamax([weight, bias], lr=given, **chosen)
        for _ in range(5):
            optimizer.step(loss)
        results.append(contents(optimizer))
    assert_same_contents(*results)


def rosenbrock(xy):
    x, y = xy
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@configs
@paths
def test_coordinate_descent_with_sparse_gradients(path, config):
    """On a banana, with an index that repeats; half of it touched at a time."""
    start = torch.tensor([1.5, 1.5])
    w = torch.nn.Parameter(start.clone())
    optimizer = Adamax([w], **CONFIGS[config], **PATHS[path])
    for i in range(120):
        w.grad = None
        rosenbrock(w).backward()
        part = w.grad[i % 2]
        values = torch.stack([part / 4, part - part / 4])
        w.grad = torch.sparse_coo_tensor(
            torch.full((1, 2), i % 2), values, (2,), check_invariants=True
        )
        optimizer.step()
    if CONFIGS[config].get("maximize"):
        assert rosenbrock(w.detach()) >= rosenbrock(start)
    else:
        assert rosenbrock(w.detach()) <= rosenbrock(start)


@configs
@paths
def test_a_complex_parameter_is_two_real_ones(path, config):
    torch.manual_seed(0)
    start = torch.randn(2, dtype=torch.complex64)
    w = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in (start.real, start.imag)]
    chosen = {**CONFIGS[config], **PATHS[path]}
    one, two = Adamax([w], **chosen), Adamax(parts, **chosen)
    for _ in range(10):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(w).abs().backward()
        rosenbrock(torch.complex(*parts)).abs().backward()
        one.step()
        two.step()
        assert_same_tensor(w.real, parts[0])
        assert_same_tensor(w.imag, parts[1])


@pytest.mark.parametrize("config", CAPTURABLE_CONFIGS)
@pytest.mark.parametrize("path", ["foreach", "loop"])
def test_capturable_steps_are_the_others(path, config):
    """To the precision of a step count, and what follows from it, in float32."""
    results = []
    for capturable in (False, True):
        weight, bias, loss = problem()
        chosen = {**CAPTURABLE_CONFIGS[config], **PATHS[path]}
        optimizer = Adamax([weight, bias], capturable=capturable, **chosen)
        for _ in range(20):
            optimizer.step(loss)
        results.append((weight, bias))
    torch.testing.assert_close(*results)


# --- Nothing happens ----------------------------------------------------------------------


@configs
@paths
def test_a_step_without_gradients_is_none(path, config):
    weight, bias, _ = problem()
    optimizer = Adamax([weight, bias], **CONFIGS[config], **PATHS[path])
    before = [weight.clone(), bias.clone()]
    optimizer.step()
    assert not optimizer.state
    assert_same_tensor(weight, before[0])
    assert_same_tensor(bias, before[1])


@configs
@paths
def test_a_step_with_zero_gradients_is_none_but_for_decay(path, config):
    weight, bias, _ = problem()
    chosen = {**CONFIGS[config], **PATHS[path]}
    optimizer = Adamax([weight, bias], **chosen)
    before = weight.clone()
    take_steps(optimizer, [[torch.zeros_like(weight), torch.zeros_like(bias)]])
    assert bool((weight != before).any()) == ("weight_decay" in chosen)


@configs
@paths
def test_empty_gradients_do_no_harm(path, config):
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in ((5, 0, 3), (0,))]
    weight, bias, loss = problem()
    optimizer = Adamax([*params, weight, bias], **CONFIGS[config], **PATHS[path])
    expected_weight, expected_bias, expected_loss = problem()
    expected = Adamax([expected_weight, expected_bias], **CONFIGS[config], **PATHS[path])
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step(loss)
        expected.step(expected_loss)
    assert_same_tensor(weight, expected_weight)
    assert_same_tensor(bias, expected_bias)


# --- Groups -------------------------------------------------------------------------------


@configs
@paths
def test_an_lr_of_a_group_overrides_the_default(path, config):
    weight, bias, loss = problem()
    groups = [{"params": [weight], "lr": 0.0}, {"params": [bias]}]
    optimizer = Adamax(groups, **CONFIGS[config], **PATHS[path])
    before = weight.clone(), bias.clone()
    for _ in range(5):
        optimizer.step(loss)
    assert_same_tensor(weight, before[0])
    assert (bias != before[1]).any()


@paths
def test_a_weight_decay_of_a_group(path):
    weight, bias, loss = problem()
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = Adamax(groups, weight_decay=0.9, **PATHS[path])
    plain_weight, plain_bias, plain_loss = problem()
    plain = Adamax([plain_weight, plain_bias], **PATHS[path])
    optimizer.step(loss)
    plain.step(plain_loss)
    assert (weight != plain_weight).any()
    assert_same_tensor(bias, plain_bias)


# --- State --------------------------------------------------------------------------------


@configs
@paths
def test_state_dicts_are_deterministic(path, config):
    """Equal but not identical parameters, one optimizer loaded from the other."""
    weight, bias, loss = problem()
    chosen = {**CONFIGS[config], **PATHS[path]}
    optimizer = Adamax([weight, bias], **chosen)
    for _ in range(3):
        optimizer.step(loss)
    other_weight, other_bias, other_loss = problem()
    with torch.no_grad():
        other_weight.copy_(weight)
        other_bias.copy_(bias)
    other = Adamax([other_weight, other_bias], **chosen)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    other.load_state_dict(copy.deepcopy(state_dict))
    for _ in range(3):
        optimizer.step(loss)
        other.step(other_loss)
        assert_same_contents(optimizer, other)
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] == kept["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    for i in range(2):
        assert kept["state"][i]["step"] == 3.0
        assert theirs["state"][i]["step"] == 6.0


@configs
@paths
def test_every_parameter_has_state_after_a_step(path, config):
    weight, bias, loss = problem()
    optimizer = Adamax([weight, bias], **CONFIGS[config], **PATHS[path])
    optimizer.step(loss)
    for param in (weight, bias):
        state = optimizer.state[param]
        assert list(state) == ["step", "exp_avg", "exp_inf"]
        assert all(value.any() for value in state.values())


def test_an_optimizer_of_named_parameters_is_the_same():
    results = []
    for named in (False, True):
        weight, bias, loss = problem()
        params = [("weight", weight), ("bias", bias)] if named else [weight, bias]
        optimizer = Adamax(params)
        for _ in range(3):
            optimizer.step(loss)
        results.append(optimizer)
    assert_same_contents(*results)
    assert results[1].param_groups[0]["param_names"] == ["weight", "bias"]
