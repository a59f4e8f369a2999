"""Arguments, groups, schedulers, closures and hooks of ``adamax.torch.Adamax``."""

import inspect
import math
import re

import numpy as np
import pytest

from torch_cases import (
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    check_step,
    contents,
    draw,
    follow,
    parameter,
    set_gradients,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)

# --- Arguments ----------------------------------------------------------------------------


def test_the_signature_is_torchs_and_more():
    ours = inspect.signature(Adamax).parameters
    theirs = inspect.signature(torch.optim.Adamax).parameters
    for name, argument in theirs.items():
        assert (ours[name].default, ours[name].kind) == (argument.default, argument.kind)
    assert list(ours)[: len(theirs)] == list(theirs)
    more = {name: ours[name].default for name in ours if name not in theirs}
    assert more == {
        "fused": None,
        "decoupled_weight_decay": False,
        "sparse": "lazy",
        "state_dtype": "float32",
        "stochastic_rounding": False,
    }
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in more)


def test_groups_hold_the_arguments(rng):
    [group] = Adamax([parameter(rng, (2,))]).param_groups
    del group["params"]
    assert group == {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "foreach": None,
        "maximize": False,
        "differentiable": False,
        "capturable": False,
        "fused": None,
        "decoupled_weight_decay": False,
        "sparse": "lazy",
        "state_dtype": "float32",
        "stochastic_rounding": False,
    }


def test_arguments_show_in_the_representation(rng):
    shown = repr(Adamax([parameter(rng, (2,))], lr=0.125, betas=(0.5, 0.75)))
    assert shown.startswith("Adamax (\nParameter Group 0\n")
    assert "lr: 0.125" in shown
    assert "betas: (0.5, 0.75)" in shown


REFUSED = {
    "lr": {
        ValueError: [-1e-9, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan)],
        TypeError: ["fast", None, True, 1j, [0.1], math.sqrt, torch.tensor(1j)],
    },
    "eps": {
        ValueError: [-1e-8, math.nan, math.inf],
        TypeError: ["tiny", None, [1e-8], 1j],
    },
    "weight_decay": {
        ValueError: [-0.1, math.nan, math.inf],
        TypeError: ["some", None, True, {}],
    },
}
REFUSED_CASES = [
    (name, value, error)
    for name, cases in REFUSED.items()
    for error, values in cases.items()
    for value in values
]


def how_to_set(optimizer, name, value):
    """The ways in which an option gets into an optimizer that is there already."""
    other = torch.nn.Parameter(torch.ones(2))
    yield lambda: optimizer.add_param_group({"params": [other], name: value})

    def in_place():
        optimizer.param_groups[-1][name] = value
        optimizer.step()

    yield in_place


@pytest.mark.parametrize(("name", "value", "error"), REFUSED_CASES, ids=str)
def test_wrong_numbers_are_refused(rng, name, value, error):
    kind = "in .*inf" if error is ValueError else "a real number"
    match = rf"^{name} must be {kind}.*, got"
    with pytest.raises(error, match=match):
        Adamax([parameter(rng, (2,))], **{name: value})
    optimizer = Adamax([{"params": [parameter(rng, (2,))]} for _ in range(2)])
    set_gradients(optimizer, [draw(rng, (2,)), draw(rng, (2,))])
    optimizer.step()
    before = contents(optimizer)
    for change in how_to_set(optimizer, name, value):
        with pytest.raises(error, match=match):
            change()
        assert_same_contents(optimizer, before)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, "0.9", None, [0.9]], ids=str)
def test_wrong_betas_are_refused(rng, value, position):
    error = ValueError if isinstance(value, float) else TypeError
    betas = [0.5, 0.5]
    betas[position] = value
    with pytest.raises(error, match=rf"^betas\[{position}\] must be .*, got"):
        Adamax([parameter(rng, (2,))], betas=betas)


@pytest.mark.parametrize(
    "value", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {}], ids=str
)
def test_betas_must_be_a_pair(rng, value):
    with pytest.raises(ValueError, match=r"^betas must be a pair of numbers, got"):
        Adamax([parameter(rng, (2,))], betas=value)


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2)])
def test_lr_must_have_one_element(rng, shape):
    with pytest.raises(ValueError, match=r"^lr must have one element, got the shape \("):
        Adamax([parameter(rng, (2,))], lr=torch.ones(shape))


EXCLUSIVE = {
    "fused and foreach cannot both be True": {"fused": True, "foreach": True},
    "differentiable excludes fused": {"differentiable": True, "fused": True},
    "differentiable excludes.*foreach": {"differentiable": True, "foreach": True},
}


@pytest.mark.parametrize("message", EXCLUSIVE)
def test_options_that_exclude_each_other_are_refused(rng, message):
    options = EXCLUSIVE[message]
    with pytest.raises(RuntimeError, match=message):
        Adamax([parameter(rng, (2,))], **options)
    optimizer = Adamax([parameter(rng, (2,))])
    with pytest.raises(RuntimeError, match=message):
        optimizer.add_param_group({"params": [parameter(rng, (2,))], **options})
    assert len(optimizer.param_groups) == 1


def test_unknown_arguments_are_refused(rng):
    with pytest.raises(TypeError, match="unexpected keyword argument 'amsgrad'"):
        Adamax([parameter(rng, (2,))], amsgrad=True)
    with pytest.raises(TypeError, match="positional arguments"):
        Adamax([parameter(rng, (2,))], 0.1, (0.9, 0.99), 1e-8, 0.0, None, True)


def unfit_parameters():
    complex_view = torch.ones(3, dtype=torch.complex64).conj()
    return {
        "sparse": (torch.eye(3).to_sparse(), "strided tensors, got a sparse one"),
        "conjugate": (complex_view, "must not be conjugate views"),
        "negated": (complex_view.imag, "must not be conjugate views"),
        "expanded": (torch.ones(1).expand(3), "must not be expanded"),
    }


@pytest.mark.parametrize("case", unfit_parameters())
def test_parameters_that_no_step_can_write_to_are_refused(rng, case):
    unfit, match = unfit_parameters()[case]
    unfit = unfit.detach().requires_grad_()
    with pytest.raises(ValueError, match=match):
        Adamax([unfit])
    optimizer = Adamax([parameter(rng, (2,))])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [parameter(rng, (2,)), unfit]})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_lazy_modules_are_accepted():
    layer = torch.nn.LazyLinear(3)
    optimizer = Adamax(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 4)).square().sum().backward()
    check_step(optimizer)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("path", PATHS)
def test_dtypes_that_cannot_be_computed_with_are_refused(rng, path, dtype):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    params[1].data = params[1].data.to(getattr(torch, dtype))
    optimizer = Adamax(params, **PATHS[path])
    error = RuntimeError if path == "fused" else TypeError
    with pytest.raises(error, match=f"float or complex.*{dtype}"):
        take_steps(optimizer, [[torch.ones_like(param) for param in params]])
    assert not optimizer.state
    assert params[0].tolist() == [1.0] * 3


def test_parameters_without_a_gradient_may_be_of_any_kind(rng):
    counter = torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    optimizer = Adamax([counter, parameter(rng, (3,))])
    set_gradients(optimizer, [None, draw(rng, (3,))])
    optimizer.step()
    assert counter.tolist() == [1, 2]
    assert len(optimizer.state) == 1


# --- Devices and paths --------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor whose memory the kernels must not assume to know."""


def unknown_to_the_kernels(kind):
    if kind == "meta":
        return torch.nn.Parameter(torch.ones(3, device="meta"))
    return torch.ones(3).as_subclass(Subclass).requires_grad_()


@pytest.mark.parametrize("kind", ["meta", "subclass"])
def test_fused_refuses_what_it_cannot_serve(rng, kind):
    w, other = torch.nn.Parameter(torch.ones(3)), unknown_to_the_kernels(kind)
    optimizer = Adamax([w, other], fused=True)
    name = {"meta": "Parameter of torch.float32 on meta", "subclass": "Subclass of"}[kind]
    with pytest.raises(
        RuntimeError, match=rf"fused=True needs .* on the CPU or, .*, got {name}"
    ):
        take_steps(optimizer, [[torch.ones(3), torch.ones_like(other)]])
    assert not optimizer.state
    assert w.tolist() == [1.0] * 3


def test_one_group_may_take_several_paths(rng):
    """Each parameter the one that serves it."""
    plain, meta = parameter(rng, (3,)), unknown_to_the_kernels("meta")
    subclass = unknown_to_the_kernels("subclass")
    optimizer = Adamax([plain, meta, subclass], lr=0.5)
    expected = torch.nn.Parameter(plain.detach().clone())
    gradient = draw(rng, (3,))
    for _ in range(3):
        set_gradients(optimizer, [gradient, torch.ones_like(meta), torch.ones(3)])
        optimizer.step()
    take_steps(Adamax([expected], lr=0.5), [[gradient]] * 3)
    assert_same_tensor(plain, expected)
    assert subclass.tolist() == pytest.approx([-0.5] * 3)
    assert type(subclass) is Subclass
    assert optimizer.state[meta]["exp_avg"].is_meta
    assert optimizer.state[meta]["step"] == 3.0


@pytest.mark.parametrize("chosen", [{}, {"fused": True}], ids=str)
def test_capturable_is_not_for_the_cpu(rng, chosen):
    optimizer = Adamax([parameter(rng, (3,))], capturable=True, **chosen)
    with pytest.raises(RuntimeError, match="capturable=True needs parameters on an acc"):
        take_steps(optimizer, [[draw(rng, (3,))]])
    assert not optimizer.state


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])], ids=str)
@pytest.mark.parametrize("decay", [{}, {"decoupled_weight_decay": True}], ids=str)
def test_capturable_arithmetic(rng, decay, lr, foreach):
    """That of accelerators, which works wherever torch's own operations do."""
    params = [parameter(rng, (3,)), parameter(rng, (4, 2)), parameter(rng, ())]
    chosen = {"lr": lr, "weight_decay": 0.1, "capturable": True, "foreach": foreach}
    gradients = [[draw(rng, p.shape) for p in params] for _ in range(10)]
    follow(Adamax(params, **chosen, **decay), gradients)


# --- Parameter groups ---------------------------------------------------------------------


@paths
def test_groups_have_options_of_their_own(rng, path):
    options = [
        {},
        {"lr": 0.1},
        {"betas": (0.5, 0.9)},
        {"eps": 0.1},
        {"weight_decay": 0.2},
        {"weight_decay": 0.2, "decoupled_weight_decay": True},
        {"maximize": True},
        {"foreach": True, "fused": None},
        {"fused": False},
        {"lr": torch.tensor(0.25)},
    ]
    groups = [{"params": [parameter(rng, (4,))], **chosen} for chosen in options]
    if path == "fused":
        groups[7]["fused"] = False
    optimizer = Adamax(groups, lr=0.01, **PATHS[path])
    gradients = [[draw(rng, (4,)) for _ in options] for _ in range(10)]
    follow(optimizer, gradients)
    assert optimizer.param_groups[0]["lr"] == 0.01


@paths
def test_groups_may_be_added_in_the_middle(rng, path):
    optimizer = Adamax([parameter(rng, (4,))], **PATHS[path])
    follow(optimizer, [[draw(rng, (4,))]] * 3)
    optimizer.add_param_group({"params": parameter(rng, (5,)), "lr": 0.3})
    follow(optimizer, [[draw(rng, (4,)), draw(rng, (5,))]] * 3)
    steps = [state["step"].item() for state in optimizer.state.values()]
    assert steps == [6.0, 3.0]


def test_options_may_be_changed_between_steps(rng):
    w = parameter(rng, (4,))
    optimizer = Adamax([w])
    changes = [
        {"lr": 0.5},
        {"betas": [0.0, 0.5]},
        {"eps": 1},
        {"weight_decay": np.float64(0.1)},
        {"decoupled_weight_decay": True},
        {"maximize": True},
        {"fused": False},
        {"foreach": True},
        {"lr": torch.tensor([0.25])},
        {"fused": True, "foreach": False},
    ]
    for change in changes:
        optimizer.param_groups[0].update(change)
        follow(optimizer, [[draw(rng, (4,))]] * 2)


def test_named_parameters(rng):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = Adamax(model.named_parameters(), lr=0.1)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    model(draw(rng, (5, 3))).square().sum().backward()
    check_step(optimizer)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@paths
@pytest.mark.parametrize("decay", [{}, {"decoupled_weight_decay": True}], ids=str)
def test_lr_tensors_may_have_any_shape_and_change_in_place(rng, decay, path, shape):
    lr = torch.full(shape, 0.5)
    chosen = {"weight_decay": 0.1, **decay, **PATHS[path]}
    params = [parameter(rng, ()), parameter(rng, (4,)), parameter(rng, (2, 3))]
    optimizer = Adamax(params, lr=lr, **chosen)
    for value in (0.5, 0.25, 0.0, 2.0):
        lr.fill_(value)
        follow(optimizer, [[draw(rng, p.shape) for p in params]] * 2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert all(p.ndim == ndim for p, ndim in zip(params, (0, 1, 2), strict=True))


@paths
def test_an_lr_that_requires_a_gradient(rng, path):
    """Its value is taken, without a word, unless the step is differentiable."""
    lr = torch.tensor(0.5, requires_grad=True)
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = Adamax([w], lr=lr, weight_decay=0.1, **PATHS[path])
    take_steps(optimizer, [[torch.ones(3)]] * 2)
    assert not optimizer.state[w]["exp_avg"].requires_grad
    assert w.is_leaf
    assert lr.grad is None


def test_betas_may_be_tensors_and_change_in_place(rng):
    betas = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.5, 0.75))
    start, gradients = draw(rng, (4,)), [[draw(rng, (4,))] for _ in range(3)]
    w, expected = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Adamax([w], betas=betas)
    plain = Adamax([expected], betas=(0.5, 0.75))
    for beta_1 in (0.5, 0.25):
        betas[0].fill_(beta_1)
        plain.param_groups[0]["betas"] = (beta_1, 0.75)
        assert_same_contents(take_steps(optimizer, gradients), take_steps(plain, gradients))


# --- Schedulers ---------------------------------------------------------------------------

schedulers = torch.optim.lr_scheduler


def in_sequence(optimizer):
    parts = [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.StepLR(optimizer, 2)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[4])


def in_a_chain(optimizer):
    parts = [schedulers.ExponentialLR(optimizer, 0.9), schedulers.StepLR(optimizer, 3)]
    return schedulers.ChainedScheduler(parts, optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": in_sequence,
    "ChainedScheduler": in_a_chain,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=5),
}


def test_the_table_has_every_scheduler():
    known = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type) and issubclass(value, schedulers.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(rng, name, kind):
    """Each gives the rates that it gives torch's own Adamax, and they are used."""

    def start(kind_of_optimizer):
        lr = 0.1 if kind == "float" else torch.tensor(0.1, dtype=torch.float64)
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = kind_of_optimizer([{"params": [w]}], lr=lr)
        return optimizer, SCHEDULERS[name](optimizer)

    (ours, our_scheduler), (theirs, their_scheduler) = map(
        start, (Adamax, torch.optim.Adamax)
    )
    rates = []
    for _ in range(10):
        gradient = draw(rng, (3,))
        follow(ours, [[gradient]])
        take_steps(theirs, [[gradient]])
        for scheduler in (our_scheduler, their_scheduler):
            metric = (1.0,) if name == "ReduceLROnPlateau" else ()
            scheduler.step(*metric)
        our_group, their_group = ours.param_groups[0], theirs.param_groups[0]
        assert float(our_group["lr"]) == float(their_group["lr"])
        assert our_group["betas"] == their_group["betas"]
        assert isinstance(our_group["lr"], torch.Tensor) == (kind == "tensor")
        rates.append(float(our_group["lr"]))
    assert len(set(rates)) > 1


# --- Closures and hooks -------------------------------------------------------------------


@paths
def test_a_closure_is_called_once_and_its_loss_returned(rng, path):
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = Adamax([w], lr=0.1, **PATHS[path])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        expected = w.square().sum()
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss == expected
    assert optimizer.step(closure=closure) < loss
    assert calls == [True, True]
    assert optimizer.step() is None


def test_an_error_in_a_closure_changes_nothing(rng):
    optimizer = take_steps(Adamax([parameter(rng, (4,))]), [[draw(rng, (4,))]])
    before = contents(optimizer)
    with pytest.raises(ZeroDivisionError, match="division"):
        optimizer.step(lambda: 1 / 0)
    assert_same_contents(optimizer, before)
    assert torch.is_grad_enabled()


def test_a_step_leaves_grad_mode_as_it_was(rng):
    optimizer = Adamax([parameter(rng, (4,))])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            take_steps(optimizer, [[draw(rng, (4,))]])
            assert torch.is_grad_enabled() == enabled


def test_steps_work_in_inference_mode(rng):
    """Where it is torch that refuses to write to the leaf, or not, for both."""
    start, gradient = draw(rng, (4,)), draw(rng, (4,))
    outcomes = []
    for kind in (Adamax, torch.optim.Adamax):
        w = torch.nn.Parameter(start.clone())
        w.grad = gradient.clone()
        with torch.inference_mode():
            kind([w]).step()
        outcomes.append(w)
    torch.testing.assert_close(*outcomes)


def test_step_hooks(rng):
    w = parameter(rng, (4,))
    optimizer = Adamax([w], lr=0.5)
    seen = []

    def note(what):
        def hook(given, args, kwargs):
            assert given is optimizer
            seen.append((what, len(given.state), args, kwargs))

        return hook

    def replace(given, args, kwargs):
        return args, {"closure": lambda: 7}

    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    handles = [
        register_optimizer_step_pre_hook(note("first")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("last")),
    ]
    w.grad = draw(rng, (4,))
    assert optimizer.step() is None
    order = [what for what, *_ in seen]
    assert order == ["first", "before", "after", "last"]
    assert [states for _, states, *_ in seen] == [0, 0, 1, 1]
    handles.append(optimizer.register_step_pre_hook(replace))
    assert optimizer.step() == 7
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert len(seen) == 8


def test_zero_grad(rng):
    w = parameter(rng, (4,))
    optimizer = take_steps(Adamax([w]), [[draw(rng, (4,))]])
    optimizer.zero_grad(set_to_none=False)
    assert not w.grad.any()
    optimizer.zero_grad()
    assert w.grad is None
    before = contents(optimizer)
    optimizer.step()
    assert_same_contents(optimizer, before)


def test_docs_name_every_argument():
    for name in inspect.signature(Adamax).parameters:
        assert re.search(rf"^\s+{name}: ", Adamax.__doc__, re.MULTILINE), name
