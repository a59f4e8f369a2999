"""``adamax.torch.Adamax(sparse="exact")``: the dense trajectory, for the touched rows.

A model with sparse gradients is trained beside the same model with dense ones.
"""

import copy
import gc
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest

from exact_cases import FLOAT64, drawn
from torch_cases import assert_same_contents, assert_same_tensor, contents, rows_of, torch

from adamax.torch import Adamax, clip_grad_norm_  # isort: skip  (not without torch)

ROWS, WIDTH = 40, 3
nn = torch.nn


# --- Models -------------------------------------------------------------------------------


class Model(nn.Module):
    """A table, and a layer with dense gradients."""

    def __init__(self, sparse: bool, dtype: Any = torch.float64, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse, dtype=dtype, **options)
        self.layer = nn.Linear(WIDTH, 1, dtype=dtype)

    def forward(self, ids: Any) -> Any:
        return self.layer(self.table(ids)).square().mean()


class Bag(Model):
    """Bags of ids: in two dimensions, or one after the other."""

    def __init__(self, sparse: bool, mode: str = "mean", last: bool = False) -> None:
        super().__init__(sparse)
        self.two_dimensional = not last
        self.mode = mode
        self.table = nn.EmbeddingBag(
            ROWS,
            WIDTH,
            mode=mode,
            sparse=sparse,
            include_last_offset=last,
            dtype=torch.float64,
        )

    def forward(self, ids: Any) -> Any:
        weights = torch.ones_like(ids, dtype=torch.float64) if self.mode == "sum" else None
        if self.two_dimensional:
            read = self.table(ids.reshape(2, -1), per_sample_weights=_like(weights, 2))
        else:
            offsets = torch.tensor([0, 1, 1, len(ids)])
            read = self.table(input=ids, offsets=offsets, per_sample_weights=weights)
        return self.layer(read).square().mean()


def _like(weights, rows):
    return None if weights is None else weights.reshape(rows, -1)


class Tied(Model):
    """One weight in two modules, one of them used twice."""

    def __init__(self, sparse: bool) -> None:
        super().__init__(sparse)
        self.other = nn.Embedding(ROWS, WIDTH, sparse=sparse, dtype=torch.float64)
        self.other.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        first, second = ids.chunk(2)
        again = self.table((first + second) % ROWS)
        return self.layer(self.table(first) * self.other(second) + again).square().mean()


class Functional(Model):
    """Reads its table without a module."""

    optimizer: Any = None

    def forward(self, ids: Any) -> Any:
        weight = self.table.weight
        if self.optimizer is None:
            read = nn.functional.embedding(ids, weight)
        else:
            read = self.optimizer.lookup(weight, ids)
        return self.layer(read).square().mean()


MODELS = {
    "embedding": Model,
    "padding": lambda sparse: Model(sparse, padding_idx=4),
    "max_norm": lambda sparse: Model(sparse, max_norm=1.5),
    "scaled by frequency": lambda sparse: Model(sparse, scale_grad_by_freq=not sparse),
    "bag, mean": Bag,
    "bag, sum": lambda sparse: Bag(sparse, "sum"),
    "bag, offsets": lambda sparse: Bag(sparse, last=True),
    "bag, weighted, offsets": lambda sparse: Bag(sparse, "sum", last=True),
    "tied": Tied,
    "functional": Functional,
}
del MODELS["scaled by frequency"]  # torch has no sparse gradient for it


def batch(step: int, size: int = 4) -> Any:
    ids = np.random.default_rng(step).integers(ROWS, size=size)
    return torch.from_numpy(ids)


def train(model, optimizer, steps, start=0, after=lambda step: None):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
        after(step)


def exact(model, **options):
    """An optimizer that ``model`` is attached to."""
    optimizer = Adamax(model.parameters(), lr=0.05, sparse="exact", **options)
    if isinstance(model, Functional):
        model.optimizer = optimizer
    else:
        optimizer.attach(model)
    return optimizer


def dense(model, **options):
    return Adamax(model.parameters(), lr=0.05, **options)


def assert_close(actual, expected, factor=100.0):
    """Gradients depend on the weights, which carries roundings on."""
    expected = dict(expected)
    for name, tensor in actual.items():
        error = np.abs(tensor - expected[name]).max(initial=0.0)
        limit = factor * FLOAT64 * max(1.0, np.abs(expected[name]).max(initial=0.0))
        assert error <= limit, (name, error)


def both(make, steps=60, options=None, **of_exact):
    """A model after training in exact mode, and with dense gradients."""
    options = options or {}
    results = []
    for sparse in (True, False):
        model = make(sparse)
        optimizer = (exact if sparse else dense)(model, **options)
        train(model, optimizer, steps)
        optimizer.flush()
        results.append(contents(optimizer))
    return results


def assert_exact_is_dense(run, make=Model, **tolerance):
    """``run(model, optimizer)`` ends in the same with exact steps and with dense ones."""
    results = []
    for sparse in (True, False):
        model = make(sparse)
        optimizer = (exact if sparse else dense)(model)
        more = run(model, optimizer) or {}
        optimizer.flush()
        results.append({**contents(optimizer), **more})
    assert_close(*results, **tolerance)


# --- The trajectory -----------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True},
        {"betas": (0.8, 0.999), "eps": 1e-3},
        {"fused": True},
        {"foreach": False},
    ],
    ids=str,
)
def test_it_is_the_trajectory_of_dense_gradients(model, options):
    assert_close(*both(MODELS[model], options=options))


def test_lazy_is_another_trajectory():
    """The comparison above can fail."""
    model = Model(True)
    optimizer = dense(model)
    train(model, optimizer, 60)
    other = Model(False)
    expected = dense(other)
    train(other, expected, 60)
    with pytest.raises(AssertionError):
        assert_close(contents(optimizer), contents(expected))


@pytest.mark.parametrize("seed", range(20, 24))
def test_it_is_nearer_to_the_oracle_than_dense_float32(seed):
    run = drawn(seed, steps=1500)
    expected = run.oracle()
    expected.epsilon = 1e-8
    params = [nn.Parameter(torch.from_numpy(run.table())) for _ in range(2)]
    options = {
        "betas": (run.beta_1, run.beta_2),
        "weight_decay": run.weight_decay,
        "decoupled_weight_decay": True,
    }
    optimizers = [
        Adamax([params[0]], sparse="exact", **options),
        Adamax([params[1]], **options),
    ]
    for step, (ids, values) in enumerate(run.gradients()):
        whole = run.densified(ids, values)
        rate = run.learning_rate(step)
        ids = torch.from_numpy(ids)
        optimizers[0].catch_up(params[0], ids)
        values = torch.from_numpy(values)
        params[0].grad = rows_of(values, ids, params[0].shape)
        params[1].grad = torch.from_numpy(whole)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        expected.step(whole, rate)
    optimizers[0].flush()
    errors = [np.abs(param.detach().numpy() - expected.w).max() for param in params]
    assert errors[0] <= errors[1], run


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_tables(dtype):
    dtype = getattr(torch, dtype)
    params = [nn.Parameter(torch.ones(9, 2, dtype=dtype)) for _ in range(2)]
    optimizers = [Adamax([params[0]], sparse="exact"), Adamax([params[1]])]
    for step in range(20):
        ids = batch(step) % 9
        torch.manual_seed(step)
        values = torch.randn(len(ids), 2, dtype=dtype)
        optimizers[0].catch_up(params[0], ids)
        params[0].grad = rows_of(values, ids, params[0].shape)
        params[1].grad = params[0].grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].flush()
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tables_of_16_bits(dtype):
    """State is as exact as in float32; rows are rounded when they are read."""
    dtype = getattr(torch, dtype)
    params = [nn.Parameter(torch.ones(9, 2, dtype=d)) for d in (dtype, torch.float32)]
    optimizers = [Adamax([p], lr=0.01, sparse="exact") for p in params]
    for step in range(20):
        ids = batch(step) % 9
        torch.manual_seed(step)
        values = torch.randn(len(ids), 2).to(dtype)
        for optimizer, param in zip(optimizers, params, strict=True):
            optimizer.catch_up(param, ids)
            g = values.to(param.dtype)
            param.grad = rows_of(g, ids, param.shape)
            optimizer.step()
    for optimizer in optimizers:
        optimizer.flush()
    states = [o.state[p] for o, p in zip(optimizers, params, strict=True)]
    torch.testing.assert_close(states[0]["exp_inf"], states[1]["exp_inf"])
    error = (params[0].float() - params[1]).abs().max()
    assert error <= 40 * torch.finfo(dtype).eps


# --- Passes and steps ---------------------------------------------------------------------


def test_several_passes_for_a_step():
    def run(model, optimizer):
        for step in range(40):
            optimizer.zero_grad()
            for part in range(3):
                model(batch(3 * step + part)).backward()
            optimizer.step()

    assert_exact_is_dense(run)


def test_passes_whose_gradients_are_not_applied():
    """In eval() and without gradients, thrown away, or left out of a sum."""

    def run(model, optimizer):
        losses = []
        for step in range(40):
            model.eval()
            with torch.no_grad():
                losses.append(float(model(batch(1000 + step))))
            with torch.inference_mode():
                losses.append(float(model(batch(3000 + step))))
            model.train()
            model(batch(2000 + step)).backward()
            optimizer.zero_grad()
            unused = model(batch(4000 + step))
            (model(batch(step)) + 0 * unused.detach()).backward()
            optimizer.step()
        return {"losses": np.array(losses)}

    assert_exact_is_dense(run)


def test_steps_without_a_gradient_are_not_made_up_for():
    def run(model, optimizer):
        for step in range(40):
            optimizer.zero_grad()
            model(batch(step)).backward()
            if step % 3 == 0:
                model.table.weight.grad = None
            optimizer.step()
        optimizer.flush()
        assert float(optimizer.state[model.table.weight]["step"]) == 26

    assert_exact_is_dense(run)


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR", "CosineAnnealingWarmRestarts"])
def test_schedulers(kind):
    """OneCycleLR changes a beta in every step."""
    schedulers = torch.optim.lr_scheduler

    def run(model, optimizer):
        scheduler = {
            "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.0 if t % 9 else 1.0),
            "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=101),
            "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(
                o, 17
            ),
        }[kind](optimizer)
        train(model, optimizer, 100, after=lambda step, s=scheduler: s.step())

    assert_exact_is_dense(run)


def test_clipped_gradients():
    def run(model, optimizer):
        for step in range(40):
            optimizer.zero_grad()
            model(batch(step)).backward()
            clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()

    assert_exact_is_dense(run)


def test_steps_that_a_grad_scaler_skips_have_not_been():
    def run(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(40):
            optimizer.zero_grad()
            loss = model(batch(step))
            scaler.scale(loss * (math.inf if step % 5 == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.flush()
        assert float(optimizer.state[model.table.weight]["step"]) == 32

    assert_exact_is_dense(run, make=lambda sparse: Model(sparse, torch.float32), factor=1e8)


def test_a_closure_reads_rows_too():
    model, other = Model(True), Model(False)
    optimizer, expected = exact(model), dense(other)
    for step in range(30):
        for m, o in ((model, optimizer), (other, expected)):

            def closure(m=m, o=o, step=step):
                o.zero_grad()
                loss = m(batch(step))
                loss.backward()
                return loss

            o.step(closure)
    optimizer.flush()
    assert_close(contents(optimizer), contents(expected))


def test_a_compiled_step(monkeypatch):
    results = []
    for sparse in (True, False):
        model = Model(sparse)
        optimizer = (exact if sparse else dense)(model)
        step = torch.compile(optimizer.step, backend="eager") if sparse else optimizer.step
        for number in range(10):
            optimizer.zero_grad()
            model(batch(number)).backward()
            step()
        optimizer.flush()
        results.append(contents(optimizer))
    torch._dynamo.reset()
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's
def test_a_compiled_model():
    results = []
    for sparse in (True, False):
        model = Model(sparse)
        optimizer = (exact if sparse else dense)(model)
        called = torch.compile(model, backend="eager") if sparse else model
        train(called, optimizer, 10)
        optimizer.flush()
        results.append(contents(optimizer))
    torch._dynamo.reset()
    assert_close(*results)


def test_the_kernels_tell_autograd_what_they_change():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 5)
    weight = model.table.weight
    product = (weight * weight).sum()
    model.table(torch.arange(ROWS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    before = weight._version
    model.table(torch.arange(ROWS))  # changes nothing
    optimizer.flush()
    assert weight._version == before + 1  # stamps alone do not tell
    optimizer.flush()
    assert weight._version == before + 1


# --- What was stale -----------------------------------------------------------------------


def test_a_gradient_for_a_stale_row_is_refused():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 10)
    optimizer.zero_grad()
    ids = torch.tensor([5, 6, 5])
    nn.functional.embedding(ids, model.table.weight, sparse=True).sum().backward()
    model.layer(torch.ones(WIDTH, dtype=torch.float64)).sum().backward()
    model.table(torch.tensor([5]))
    before = contents(optimizer)
    expected = re.escape(
        "row 6 of parameter 'table.weight' has a gradient, but was stale when it was read: "
        "call attach(model) with the outermost module, or lookup(weight, ids), before rows "
        "are read, or flush() to catch up all rows"
    )
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        optimizer.step()
    assert_same_contents(optimizer, before)
    optimizer.flush()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda model: model.parameters(), "parameter 0 of group 0"),
        (lambda model: model.named_parameters(), "parameter 'table.weight'"),
    ],
    ids=["no names", "names"],
)
def test_tables_that_are_not_attached_have_names_too(make, name):
    model = Model(True)
    optimizer = Adamax(make(model), sparse="exact")
    model(torch.tensor([1])).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.tensor([2])).backward()
    with pytest.raises(RuntimeError, match=f"^row 2 of {name} has a gradient"):
        optimizer.step()


def test_a_dense_gradient_needs_all_rows_to_be_up_to_date():
    class Both(Model):
        """Predicts ids through the table that it reads them from."""

        whole = True

        def forward(self, ids):
            read = self.table(ids)
            if self.whole:
                read = read @ self.table.weight.T
                return nn.functional.cross_entropy(read, ids)
            return read.square().mean()

    results = []
    for sparse in (True, False):
        model = Both(sparse)
        optimizer = (exact if sparse else dense)(model)
        for step in range(30):
            model.whole = step % 3 == 1
            optimizer.zero_grad()
            if model.whole:
                optimizer.flush(model.table.weight)
            model(batch(step)).backward()
            optimizer.step()
        if sparse:
            before = contents(optimizer)
            model.table.weight.grad = torch.ones_like(model.table.weight)
            expected = r"^parameter 'table.weight' has a dense gradient.* call flush\(\)"
            with pytest.raises(RuntimeError, match=expected):
                optimizer.step()
            assert_same_contents(optimizer, before)
        optimizer.flush()
        results.append(contents(optimizer))
    assert_close(*results)


def test_an_eps_that_rows_cannot_be_brought_over():
    model = Model(True)
    optimizer = exact(model)
    (group,) = optimizer.param_groups
    train(model, optimizer, 5)
    group["eps"] = 1e-3
    before = contents(optimizer)
    model(torch.tensor([1])).backward()
    expected = r"^epsilon of parameter 'table.weight' changed from 1e-08 to 0.001 while r"
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
    assert_same_contents(optimizer, before)
    optimizer.flush()
    train(model, optimizer, 3, start=5)
    group["betas"] = (0.9, 0.5)
    model(torch.tensor([1])).backward()
    with pytest.raises(ValueError, match=r"got betas\[0\]=0.9 and betas\[1\]=0.5"):
        optimizer.step()


@pytest.mark.parametrize("flush", [False, True])
def test_betas_that_fall_and_rise(flush):
    """As OneCycleLR has them by default."""
    results = []
    for sparse in (True, False):
        model = Model(sparse)
        optimizer = (exact if sparse else dense)(model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60)
        for step in range(60):
            train(model, optimizer, 1, start=step)
            schedule.step()
            if sparse and flush and step % 25 == 20:
                optimizer.flush()
        if sparse:
            optimizer.flush()
        results.append(contents(optimizer))
    assert_close(*results)


def test_weight_decay_that_is_faster_than_the_momentum_is_refused():
    model = Model(True)
    optimizer = exact(model, weight_decay=1.0, decoupled_weight_decay=True)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.2
    model(torch.tensor([1])).backward()
    before = contents(optimizer)
    with pytest.raises(
        ValueError, match=r"to be at least beta_1, got 0.8 and 0.9 for para"
    ):
        optimizer.step()
    assert_same_contents(optimizer, before)


def test_a_group_may_become_lazy_when_no_row_is_stale():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 5)
    optimizer.param_groups[0]["sparse"] = "lazy"
    model(torch.tensor([1])).backward()
    with pytest.raises(RuntimeError, match=r"^rows of parameter 'table.weight' are stale"):
        optimizer.step()
    optimizer.flush()
    optimizer.step()


def test_a_table_that_was_converted_is_not_written_to():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 5)
    model.float()
    with pytest.raises(
        RuntimeError, match=r"^parameter 'table.weight' or its state was moved, converted, "
    ):
        model(torch.tensor([1]))
    model.double()
    optimizer.flush()


# --- Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"foreach": True}, RuntimeError, "needs the compiled kernels, got foreach=True"),
        ({"fused": False}, RuntimeError, "needs the compiled kernels, .* fused=False$"),
        ({"differentiable": True}, RuntimeError, "excludes differentiable=True$"),
        ({"capturable": True}, RuntimeError, "excludes capturable=True$"),
        ({"weight_decay": 0.1}, ValueError, "needs decoupled_weight_decay=True for weig"),
        ({"betas": (0.9, 0.5)}, ValueError, r"needs betas\[0\] further from 1 and betas\["),
        ({"betas": (0.95, 0.99)}, ValueError, r"needs .* for float64, got betas\[0\]=0.95"),
    ],
    ids=str,
)
def test_options_that_exclude_exact_updates(options, error, expected):
    model = Model(True)
    with pytest.raises(error, match=f"^sparse='exact' {expected}"):
        Adamax(model.parameters(), sparse="exact", **options)
    optimizer = Adamax([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=f"^sparse='exact' {expected}"):
        optimizer.add_param_group(
            {"params": model.parameters(), "sparse": "exact", **options}
        )
    assert len(optimizer.param_groups) == 1


def test_options_that_change_later_are_seen():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = contents(optimizer)
    model(torch.tensor([1])).backward()
    with pytest.raises(ValueError, match="needs decoupled_weight_decay=True"):
        optimizer.step()
    assert_same_contents(optimizer, before)


@pytest.mark.parametrize(
    "layout",
    [lambda t: t.T.contiguous().T, lambda t: t.repeat(1, 2)[:, ::2]],
    ids=["transposed", "with holes"],
)
def test_tables_may_have_any_layout(layout):
    def make(sparse):
        model = Model(sparse)
        model.table.weight.data = layout(model.table.weight.data)
        return model

    assert_close(*both(make))


def test_gradients_must_be_sparse_in_the_rows_alone():
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = Adamax([param], sparse="exact")
    param.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(ValueError, match=r"got one of .* with 2 sparse dimensions$"):
        optimizer.step()


# --- Attaching ----------------------------------------------------------------------------


def test_attach_finds_what_reads_its_tables():
    model = nn.ModuleDict(
        {
            "a": nn.Embedding(4, 2, sparse=True),
            "b": nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True)),
            "not sparse": nn.Embedding(4, 2),
            "of another": nn.Embedding(4, 2, sparse=True),
            "lazy": nn.Embedding(4, 2, sparse=True),
            "tied": nn.Embedding(4, 2),
        }
    )
    model["tied"].weight = model["a"].weight
    groups = [
        {"params": [*model["a"].parameters(), *model["b"].parameters()]},
        {"params": model["not sparse"].parameters()},
        {"params": model["lazy"].parameters(), "sparse": "lazy"},
    ]
    optimizer = Adamax(groups, sparse="exact")
    attachment = optimizer.attach(model)
    assert attachment.names == ("a.weight", "b.0.weight", "tied.weight")
    hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks]
    assert hooked == ["a", "b.0", "tied"]
    attachment.remove()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks


def test_attach_needs_something_to_attach():
    model = Model(False)
    optimizer = Adamax(model.parameters(), sparse="exact")
    with pytest.raises(ValueError, match=r"^the model must have an nn.Embedding .* of 1 "):
        optimizer.attach(model)
    lazy = Model(True)
    with pytest.raises(ValueError, match=r"^the model must have an nn.Embedding "):
        Adamax(lazy.parameters()).attach(lazy)


def test_letting_go_brings_tables_up_to_date():
    model, other = Model(True), Model(True)
    optimizer, expected = exact(model), exact(other)
    train(other, expected, 10)
    expected.flush()
    optimizer = Adamax(Model(True).parameters())
    optimizer = Adamax(model.parameters(), lr=0.05, sparse="exact")
    with optimizer.attach(model) as attachment:
        assert repr(attachment) == "Attachment(table.weight)"
        train(model, optimizer, 10)
    assert_same_contents(optimizer, expected)


def test_functional_calls_with_other_weights_are_left_alone():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 10)
    before = contents(optimizer)
    others = {"table.weight": torch.ones(ROWS, WIDTH, dtype=torch.float64)}
    torch.func.functional_call(model, others, (batch(0),))
    assert_same_contents(optimizer, before)


@pytest.mark.parametrize("call", ["lookup", "catch_up", "flush"])
def test_tables_of_others_are_refused(call):
    optimizer = exact(Model(True))
    other = torch.ones(3, 2)
    arguments = () if call == "flush" else (torch.tensor([1]),)
    with pytest.raises(
        ValueError, match=r"^weight must be a parameter of this optimizer, "
    ):
        getattr(optimizer, call)(other, *arguments)


def test_ids_that_are_wrong_are_refused():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 5)
    before = contents(optimizer)
    with pytest.raises(IndexError, match=r"indices\[1\] must be in \[0, 40\), got 40"):
        model(torch.tensor([0, 40]))
    with pytest.raises(TypeError, match=r"^ids must be int32 or int64, got torch.float32"):
        optimizer.lookup(model.table.weight, torch.tensor([1.0]))
    assert_same_contents(optimizer, before)


# --- Copies and checkpoints ---------------------------------------------------------------


def flushed_in_the_middle(options=None):
    model = Model(True)
    optimizer = exact(model, **(options or {}))
    train(model, optimizer, 20)
    optimizer.flush()
    train(model, optimizer, 20, start=20)
    return contents(optimizer)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_resuming_is_not_having_stopped(tmp_path, order):
    """Bit for bit, beside a run that brings all rows up to date in the same step."""
    expected = flushed_in_the_middle()
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 20)
    parts = {"model": model, "optimizer": optimizer}
    names = list(parts) if order == "model first" else list(parts)[::-1]
    torch.save({name: parts[name].state_dict() for name in names}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    model = Model(True)
    nn.init.zeros_(model.table.weight)
    optimizer = exact(model)
    parts = {"model": model, "optimizer": optimizer}
    for name in names:
        parts[name].load_state_dict(saved[name])
    train(model, optimizer, 20, start=20)
    assert_same_contents(contents(optimizer), expected)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_dense_optimizer_takes_up_a_checkpoint(kind):
    model, other = Model(True), Model(False)
    optimizer, expected = exact(model), dense(other)
    train(model, optimizer, 30)
    train(other, expected, 30)
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_inf"}
    weights = model.state_dict()
    taking_up = Model(False)
    taking_up.load_state_dict(weights)
    make = torch.optim.Adamax if kind == "stock" else Adamax
    continued = make(taking_up.parameters())
    continued.load_state_dict(state)
    continued.param_groups[0]["sparse"] = "lazy"
    train(taking_up, continued, 20, start=30)
    train(other, expected, 20, start=30)
    # The stock optimizer adds eps to |g|.
    assert_close(contents(continued), contents(expected), factor=1e8)


def test_a_stock_checkpoint_leaves_the_mode_as_it_is():
    model, other = Model(True), Model(False)
    stock = torch.optim.Adamax(other.parameters())
    train(other, stock, 5)
    optimizer = exact(model)
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["sparse"] == "exact"
    train(model, optimizer, 5)


def test_state_is_not_loaded_over_stale_rows():
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5)
    before = contents(optimizer)
    with pytest.raises(
        RuntimeError, match=r"^rows of parameter 'table.weight' are stale: "
    ):
        optimizer.load_state_dict(saved)
    assert_same_contents(optimizer, before)
    model.load_state_dict(model.state_dict())  # brings rows up to date
    optimizer.load_state_dict(saved)
    train(model, optimizer, 5)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "state_dict"])
def test_copies_of_a_model_are_up_to_date(tmp_path, way):
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 10)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "torch.save":
        torch.save(model, tmp_path / "model")
        other = torch.load(tmp_path / "model", weights_only=False)
    else:
        other = Model(True)
        other.load_state_dict(model.state_dict())
    optimizer.flush()
    assert_same_tensor(other.table.weight.detach(), model.table.weight.detach())
    before = other.table.weight.detach().clone()
    train(model, optimizer, 5, start=10)
    other(batch(0))  # is not attached to anything
    assert_same_tensor(other.table.weight.detach(), before)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_of_an_optimizer_go_on_by_themselves(way):
    expected = flushed_in_the_middle()
    model = Model(True)
    optimizer = exact(model)
    train(model, optimizer, 20)
    if way == "pickle":
        optimizer.flush()  # pickle writes the model before it sees the optimizer
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.attach(model)
    train(model, optimizer, 20, start=20)
    assert_same_contents(contents(optimizer), expected)


def test_a_model_keeps_what_its_rows_have_missed():
    """Also when nobody else knows the optimizer any more."""
    model, other = Model(True), Model(True)
    for each in (model, other):
        optimizer = exact(each)
        train(each, optimizer, 10)
    optimizer.flush()
    del optimizer
    gc.collect()
    everything = torch.arange(ROWS)
    assert_same_tensor(model.table(everything), other.table(everything))
