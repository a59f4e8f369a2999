"""Autograd and ``adamax.torch.Adamax``: steps it records, steps in backward, versions."""

import pytest

from torch_cases import (
    DTYPES,
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    check_step,
    contents,
    draw,
    follow,
    parameter,
    rows_of,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)

# --- Differentiable steps -----------------------------------------------------------------

RECORDED = {
    "defaults": {},
    "coupled decay": {"weight_decay": 0.3},
    "decoupled decay": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "capturable": {"capturable": True},
    "no memory": {"betas": (0.0, 0.5)},
    "eps": {"eps": 0.5},
}


def after_steps(options, start, lr, exp_avg, exp_inf, *gradients):
    """Parameter and state after one step for each gradient, as a function of them all."""
    w = start.clone()  # no leaf
    optimizer = Adamax([w], lr=lr, differentiable=True, **options)
    optimizer.state[w] = {
        "step": torch.tensor(3.0),
        "exp_avg": exp_avg.clone(),
        "exp_inf": exp_inf.clone(),
    }
    for gradient in gradients:
        w.grad = gradient
        optimizer.step()
    state = optimizer.state[w]
    return w, state["exp_avg"], state["exp_inf"]


@pytest.mark.parametrize(
    ("dtype", "steps"), [("float64", 1), ("float64", 2), ("complex128", 2)]
)
@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.parametrize("name", RECORDED)
def test_gradients_of_steps(name, lr, steps, dtype):
    torch.manual_seed(0)

    def number():
        return torch.randn(4, dtype=DTYPES[dtype])

    exp_inf = number().abs() + (number().abs() * 1j if "complex" in dtype else 0)
    rate = torch.tensor(0.1, dtype=torch.float64) if lr == "tensor" else 0.1
    inputs = [number(), rate, number(), exp_inf, *(number() for _ in range(steps))]
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]

    def function(*given):
        return after_steps(RECORDED[name], *given)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("options", [name for name in RECORDED if name != "capturable"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_recorded_steps_follow_the_oracle(rng, dtype, lr, options):
    chosen = {**RECORDED[options], "lr": lr}
    params = [parameter(rng, (4,), dtype), parameter(rng, (2, 3), dtype)]
    params = [param.detach() for param in params]
    gradients = [[draw(rng, param.shape, dtype) for param in params] for _ in range(5)]
    follow(Adamax(params, differentiable=True, **chosen), gradients)


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_recorded_sparse_steps_follow_the_oracle(rng, dtype):
    table = parameter(rng, (9, 3), dtype).detach()
    optimizer = Adamax([table], differentiable=True, weight_decay=0.1)
    for _ in range(3):
        values = draw(rng, (12, 3), dtype)
        follow(optimizer, [[rows_of(values, rng.integers(9, size=12), (9, 3))]])


def test_leaves_cannot_be_stepped_differentiably(rng):
    """Autograd does not let a leaf that it tracks be written to."""
    optimizer = Adamax([parameter(rng, (3,))], differentiable=True)
    with pytest.raises(RuntimeError, match="needs parameters that are computed from oth"):
        take_steps(optimizer, [[draw(rng, (3,))]])
    assert not optimizer.state


def test_a_learning_rate_can_be_learned():
    """Through two steps; the gradient is that of the rule by hand."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = torch.ones(1, dtype=torch.float64).clone()
    optimizer = Adamax([w], lr=lr, differentiable=True, eps=2.0**-126)
    for _ in range(2):
        w.grad = torch.full((1,), 3.0, dtype=torch.float64)
        optimizer.step()
    w.sum().backward()  # w = 1 - 2 * lr
    assert w.item() == pytest.approx(0.8)
    assert lr.grad.item() == pytest.approx(-2.0)


def loss_of(w):
    return (w.sin() * torch.arange(1.0, 4.0, dtype=torch.float64)).sum()


def test_torch_func_differentiates_steps():
    """The gradient of the loss after a step that used the gradient of the loss."""

    def after_step(start):
        w = start.clone()
        optimizer = Adamax([w], lr=0.1, eps=0.5, differentiable=True)
        w.grad = torch.func.grad(loss_of)(start)
        optimizer.step()
        return loss_of(w)

    start = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    gradient = torch.func.grad(after_step)(start)
    step = 1e-6
    for i in range(3):
        ahead, behind = start.clone(), start.clone()
        ahead[i] += step
        behind[i] -= step
        slope = (after_step(ahead) - after_step(behind)) / (2 * step)
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-6)


@paths
def test_gradients_of_torch_func(rng, path):
    layer = torch.nn.Linear(3, 2)
    params = dict(layer.named_parameters())
    optimizer = Adamax(layer.parameters(), **PATHS[path])
    x = draw(rng, (5, 3))

    def loss(given):
        return torch.func.functional_call(layer, given, x).square().sum()

    for _ in range(3):
        for name, gradient in torch.func.grad(loss)(params).items():
            params[name].grad = gradient
        check_step(optimizer)


# --- Steps that are not recorded ----------------------------------------------------------


@paths
def test_parameters_stay_leaves(rng, path):
    w = parameter(rng, (3,))
    gradient = draw(rng, (3,)).requires_grad_()
    optimizer = Adamax([w], weight_decay=0.1, **PATHS[path])
    for _ in range(2):
        w.grad = gradient * 2  # with a graph of its own
        optimizer.step()
    assert w.is_leaf
    assert w.requires_grad
    assert w.grad.requires_grad
    state = optimizer.state[w]
    assert not any(value.requires_grad for value in state.values())


@paths
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradients_that_have_gradients(rng, path):
    w = parameter(rng, (3,))
    optimizer = Adamax([w], **PATHS[path])
    for _ in range(2):
        w.grad = None
        w.sin().sum().backward(create_graph=True)
        assert w.grad.requires_grad
        check_step(optimizer)
    w.grad = None  # the cycle


@paths
@pytest.mark.parametrize("kind", ["dense", "layout", "sparse", "any sparse layout", "16"])
def test_writing_is_seen_by_autograd(rng, kind, path):
    start = draw(rng, (6, 3), "bfloat16" if kind == "16" else "float32")
    if kind == "layout":
        start = start.repeat(1, 2)[:, ::2]
    if kind == "any sparse layout":
        start = draw(rng, (3, 6)).T
    w = torch.nn.Parameter(start)
    other = parameter(rng, (2,))
    optimizer = Adamax([w, other], **PATHS[path])
    w.grad = draw(rng, (6, 3), "bfloat16" if kind == "16" else "float32")
    if "sparse" in kind:
        w.grad = rows_of(draw(rng, (2, 3)), [4, 4], (6, 3))
    loss, untouched = w.square().sum(), other.square().sum()
    version, other_version = w._version, other._version
    optimizer.step()
    assert w._version > version
    assert other._version == other_version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    untouched.backward()


@paths
def test_writing_is_seen_through_views(rng, path):
    w = parameter(rng, (6, 3))
    part = w[2:4]
    loss = part.square().sum()
    take_steps(Adamax([w], **PATHS[path]), [[draw(rng, (6, 3))]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Steps in backward --------------------------------------------------------------------


def model_with_table():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Embedding(12, 4, sparse=True),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 5),
        torch.nn.Tanh(),
        torch.nn.Linear(5, 1),
    )


@paths
def test_steps_in_backward_are_steps_after_it(rng, path):
    """One optimizer for each parameter, so that gradients need not be kept."""
    batches = [torch.tensor(rng.integers(12, size=(8, 3))) for _ in range(6)]
    plain = model_with_table()
    optimizer = Adamax(plain.parameters(), lr=0.05, **PATHS[path])
    for ids in batches:
        optimizer.zero_grad()
        plain(ids).square().sum().backward()
        optimizer.step()

    model = model_with_table()
    optimizers = {p: Adamax([p], lr=0.05, **PATHS[path]) for p in model.parameters()}

    def step_and_forget(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_and_forget)
    for ids in batches:
        model(ids).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())

    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_tensor(param, expected)
        for name, value in optimizers[param].state[param].items():
            assert_same_tensor(value, optimizer.state[expected][name])


@paths
def test_training_goes_on_after_an_error_in_backward(rng, path):
    w = parameter(rng, (3,))
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[draw(rng, (3,))]])
    before = contents(optimizer)
    bad = rows_of(torch.ones(1), [2], (3,))
    bad._indices()[:] = 7

    def give_bad_gradient(param):
        param.grad = bad
        optimizer.step()

    handle = w.register_post_accumulate_grad_hook(give_bad_gradient)
    with pytest.raises(IndexError, match=r"indices\["):
        w.sum().backward()
    handle.remove()
    assert_same_contents(optimizer, before)
    follow(optimizer, [[draw(rng, (3,))]])
