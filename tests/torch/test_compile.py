"""``torch.compile`` and ``adamax.torch.Adamax``: the step is one operator in the graph."""

import copy
import math
import types

import pytest

from frameworks import framework
from torch_cases import (
    DTYPES,
    OPTIONS,
    assert_same_contents,
    check_step,
    contents,
    draw,
    parameter,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

pytestmark = pytest.mark.xdist_group("torch_compile")

framework("torch._inductor.compile_fx")  # which warns when it is imported


@pytest.fixture
def compiler():
    """Compiles with a backend that keeps what it is given, and then runs it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def compiled(function, **options):
        return torch.compile(function, backend=backend, **options)

    yield types.SimpleNamespace(
        compiled=compiled, graphs=graphs, counters=torch._dynamo.utils.counters
    )
    torch._dynamo.reset()


def operators(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def pair(rng, shapes=((4, 3), (5,), ()), dtype="float32", **options):
    """Two optimizers with equal parameters."""
    starts = [draw(rng, shape, dtype) for shape in shapes]
    return [
        Adamax([torch.nn.Parameter(start.clone()) for start in starts], **own)
        for own in (options, copy.deepcopy(options))
    ]


def gradients_for(optimizer, rng, dtype="float32"):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [draw(rng, param.shape, dtype) for param in params]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_step_is_one_operator_and_the_same_step(rng, compiler, options):
    one, other = pair(rng, **OPTIONS[options])
    step = compiler.compiled(lambda: one.step())
    for _ in range(4):
        gradients = gradients_for(one, rng)
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
    assert_same_contents(one, other)
    [made] = map(operators, compiler.graphs)
    lr_is_tensor = isinstance(OPTIONS[options].get("lr"), torch.Tensor)
    assert len(made) == (1 if lr_is_tensor else 3)  # or it is made one
    assert [name for name in made if "adamax" in name] == ["adamax.step_"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_steps_of_all_dtypes(rng, compiler, dtype):
    one, other = pair(rng, dtype=dtype, weight_decay=0.1)
    step = compiler.compiled(lambda: one.step())
    for _ in range(3):
        gradients = gradients_for(one, rng, dtype)
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
    assert_same_contents(one, other)


def test_an_lr_tensor_may_change_without_recompilation(rng, compiler):
    one, other = pair(rng, lr=torch.tensor(0.5))
    step = compiler.compiled(lambda: one.step())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, other)]
    for _ in range(12):
        gradients = gradients_for(one, rng)
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
        for scheduler in schedulers:
            scheduler.step()
    assert float(one.param_groups[0]["lr"]) == pytest.approx(0.5 * 0.9**12)
    assert_same_contents(one, other)
    assert len(compiler.graphs) == 1
    assert compiler.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_schedule_of_numbers_takes_two_graphs(rng, backend):
    """As torch's own optimizers do: for the first number, and for any other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    one, other = pair(rng, weight_decay=0.1, decoupled_weight_decay=True)
    step = torch.compile(lambda: one.step(), backend=backend)
    for number in range(1, 13):
        gradients = gradients_for(one, rng)
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.1 / number
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
        assert_same_contents(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_what_changes_between_steps_is_seen(rng, compiler):
    """Options, parameters without a gradient, new groups, loaded state."""
    one, other = pair(rng)
    step = compiler.compiled(lambda: one.step())

    def take(missing=()):
        gradients = gradients_for(one, rng)
        for i in missing:
            gradients[i] = None
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
        assert_same_contents(one, other)

    take(missing=[1])
    take()
    for option in ({"lr": 0.25}, {"maximize": True}, {"weight_decay": 0.1}):
        for optimizer in (one, other):
            optimizer.param_groups[0].update(option)
        take()
    start = draw(rng, (2,))
    for optimizer in (one, other):
        optimizer.add_param_group({"params": [torch.nn.Parameter(start.clone())]})
    take(missing=[0])
    take()
    one.load_state_dict(one.state_dict())
    take()


def test_the_default_compiler(rng):
    """With its transformations of a graph that writes to its inputs."""
    torch._dynamo.reset()
    one, other = pair(rng, weight_decay=0.1)
    step = torch.compile(lambda: one.step())
    for _ in range(3):
        gradients = gradients_for(one, rng)
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
    torch._dynamo.reset()
    assert_same_contents(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_training_in_a_compiled_function(rng):
    """Forward, backward and step."""
    torch._dynamo.reset()
    x = draw(rng, (16, 3)).clamp(-1, 1)
    trajectories = []
    for compiled in (True, False):
        torch.manual_seed(0)
        layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        model = torch.nn.Sequential(*layers)
        optimizer = Adamax(model.parameters(), lr=torch.tensor(0.05))

        def train(model=model, optimizer=optimizer):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        function = torch.compile(train, backend="aot_eager") if compiled else train
        trajectories.append([float(function()) for _ in range(20)])
    torch._dynamo.reset()
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-4)
    assert trajectories[0][-1] < trajectories[0][0] / 2


def test_a_compiled_model_with_a_plain_optimizer(rng, compiler):
    model = torch.nn.Linear(3, 2)
    forward = compiler.compiled(model)
    optimizer = Adamax(forward.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        forward(draw(rng, (5, 3))).square().sum().backward()
        check_step(optimizer)


def test_a_compiled_method(rng, compiler):
    one, other = pair(rng)
    one.step = compiler.compiled(one.step)
    for _ in range(3):
        gradients = gradients_for(one, rng)
        for optimizer in (one, other):
            take_steps(optimizer, [gradients])
    assert_same_contents(one, other)


def test_sparse_gradients_are_left_to_the_plain_step(rng, compiler):
    """By a graph break: torch.compile knows no sparse tensors."""
    one, other = pair(rng, ((6, 3), (5,)), weight_decay=0.1)
    step = compiler.compiled(lambda: one.step())
    for _ in range(4):
        rows = rows_of(draw(rng, (9, 3)), rng.integers(6, size=9), (6, 3))
        gradients = [rows, draw(rng, (5,))]
        set_gradients(one, gradients)
        step()
        take_steps(other, [gradients])
    assert_same_contents(one, other)
    assert not compiler.graphs
    assert any("sparse Tensor" in reason for reason in compiler.counters["graph_break"])


@pytest.mark.parametrize("broken", [False, True])
def test_a_scaler_is_heeded(rng, compiler, broken):
    """It tells the step the scale, and to skip, by attributes of the optimizer."""
    one, other = pair(rng)
    one.step = compiler.compiled(one.step)
    gradients = gradients_for(one, rng)
    if broken:
        gradients[1][2] = math.inf
    for optimizer in (one, other):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(torch.zeros(()))
        set_gradients(optimizer, [gradient * 2.0**8 for gradient in gradients])
        scaler.step(optimizer)
    assert_same_contents(one, other)
    assert bool(one.state) != broken


def test_differentiable_steps_are_recorded(compiler):
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = torch.ones(1, dtype=torch.float64).clone()
    optimizer = Adamax([w], lr=lr, differentiable=True, eps=2.0**-126)
    step = compiler.compiled(lambda: optimizer.step())
    for _ in range(2):
        w.grad = torch.full((1,), 3.0, dtype=torch.float64)
        step()
    w.sum().backward()
    assert w.item() == pytest.approx(0.8)
    assert lr.grad.item() == pytest.approx(-2.0)


def test_autograd_sees_that_a_compiled_step_writes(rng, compiler):
    [one, _] = pair(rng, ((4,),))
    [w] = one.param_groups[0]["params"]
    step = compiler.compiled(lambda: one.step())
    w.grad = draw(rng, (4,))
    loss = w.square().sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("lr", [-1.0, math.nan, torch.tensor(-1.0)], ids=str)
def test_errors_of_a_compiled_step_change_nothing(rng, compiler, lr):
    [one, _] = pair(rng)
    step = compiler.compiled(lambda: one.step())
    set_gradients(one, gradients_for(one, rng))
    step()
    before = contents(one)
    one.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got"):
        step()
    assert_same_contents(one, before)


OPERATOR_CASES = {
    "plain": ("float32", {}),
    "decay": ("float64", {"weight_decay": 0.1}),
    "maximize": ("float32", {"maximize": True}),
    "half": ("bfloat16", {"decoupled_weight_decay": True}),
}


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_the_operator_is_what_it_says(rng, case):
    """Its schema, its fake, and that it may be traced."""
    dtype, options = OPERATOR_CASES[case]
    params = [parameter(rng, shape, dtype).detach() for shape in ((4, 3), (5,), (0,))]
    grads = [draw(rng, param.shape, dtype) for param in params]
    wide = torch.float32 if dtype == "bfloat16" else DTYPES[dtype]
    state = [[torch.zeros(p.shape, dtype=wide) for p in params] for _ in range(2)]
    steps = [torch.tensor(2.0) for _ in params]
    lr = torch.tensor(0.1, dtype=torch.float64)
    arguments = (params, grads, *state, steps, lr, [0.9, 0.999], 1e-8)
    decay = {"weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False}
    decay.update(options)
    checks = torch.library.opcheck(
        torch.ops.adamax.step_.default, (*arguments, *decay.values())
    )
    assert set(checks.values()) == {"SUCCESS"}
