"""Compact state and stochastic rounding in the PyTorch front end."""

import copy
import io
import math

import numpy as np
import pytest

import adamax
from cases import values
from torch_cases import assert_same_contents, contents, numpy_of, rows_of, torch

from adamax.torch import Adamax  # isort: skip  (not without torch)

KINDS = ("bfloat16", "8bit")


def model_of(sparse=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.EmbeddingBag(30, 6, sparse=sparse), torch.nn.Linear(6, 4)
    )


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        ids = torch.randint(30, (5, 3), generator=generator)
        (model(ids) - 1).square().mean().backward()
        optimizer.step()


def optimizer_of(model, sparse="lazy", **chosen):
    optimizer = Adamax(model.parameters(), lr=0.01, sparse=sparse, **chosen)
    if sparse == "exact":
        optimizer.attach(model)
    return optimizer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_what_is_held_is_two_bytes_a_parameter_and_four_a_row(sparse):
    model = model_of()
    optimizer = optimizer_of(model, sparse, state_dtype="8bit")
    train(model, optimizer, 3)
    held = [
        sum(t.nbytes for name, t in state.items() if name != "step")
        for state in optimizer.state.values()
    ]
    assert held == [2 * 180 + 4 * 30, 2 * 24 + 4, 2 * 4 + 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_training_follows_float32(kind, sparse):
    found = {}
    for state_dtype in ("float32", kind):
        model = model_of()
        start = weights(model)
        optimizer = optimizer_of(model, sparse, state_dtype=state_dtype)
        train(model, optimizer, 80)
        optimizer.flush()
        found[state_dtype] = weights(model)
    moved = (found["float32"] - start).square().mean().sqrt()
    assert (found[kind] - found["float32"]).square().mean().sqrt() < 0.15 * moved


@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_the_numbers_are_those_of_numpy(rng, sparse):
    table = values(rng, (40, 5), "float32")
    param = torch.nn.Parameter(torch.from_numpy(table.copy()))
    ours = Adamax([param], lr=0.01, eps=1e-7, sparse=sparse, state_dtype="8bit")
    numpy = adamax.Adamax(0.01, sparse=sparse, state_dtype="8bit")
    for _ in range(12):
        ids, g = rng.integers(40, size=7), values(rng, (7, 5), "float32")
        if sparse == "exact":
            numpy.lookup(table, ids)
            ours.catch_up(param, torch.from_numpy(ids))
        numpy.apply_gradients([(adamax.IndexedSlices(g, ids), table)])
        param.grad = rows_of(torch.from_numpy(g), torch.from_numpy(ids), (40, 5))
        ours.step()
    numpy.flush()
    ours.flush()
    np.testing.assert_array_equal(numpy_of(param), table)
    state = numpy.state_dict()
    for name, part in (("exp_avg", "0.m"), ("exp_inf", "0.u"), ("frame", "0.frame")):
        np.testing.assert_array_equal(ours.state[param][name].numpy(), state[part])


def test_a_table_takes_dense_gradients_too(rng):
    param = torch.nn.Parameter(torch.ones(20, 4))
    optimizer = Adamax([param], state_dtype="8bit")
    param.grad = torch.ones(20, 4)
    optimizer.step()
    param.grad = rows_of(torch.ones(2, 4), torch.tensor([3, 3]), (20, 4))
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(20, 4)
    optimizer.step()
    assert (param < before).all()
    assert optimizer.state[param]["frame"].shape == (20,)


def test_a_gradient_that_is_sparse_in_two_dimensions_raises_and_changes_nothing():
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = Adamax([param], state_dtype="8bit")
    ids = torch.tensor([[1, 2], [0, 2]])
    param.grad = rows_of(torch.ones(2), ids, (4, 3))
    with pytest.raises(ValueError, match=r"sparse in the rows alone, got one of .* with 2"):
        optimizer.step()
    assert (param == 1).all()
    assert not optimizer.state


def test_a_table_that_grew_under_its_frames_raises_and_changes_nothing():
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = Adamax([param], state_dtype="8bit")
    param.grad = rows_of(torch.ones(2, 3), torch.tensor([1, 2]), (4, 3))
    optimizer.step()
    state = optimizer.state[param]
    param.data = torch.ones(6, 3)
    state["exp_avg"], state["exp_inf"] = (
        torch.zeros(6, 3, dtype=state[name].dtype) for name in ("exp_avg", "exp_inf")
    )
    param.grad = rows_of(torch.ones(2, 3), torch.tensor([1, 5]), (6, 3))
    with pytest.raises(ValueError, match=r"its frame must be"):
        optimizer.step()
    assert (param == 1).all()
    state["frame"] = torch.zeros(1)
    optimizer.step()
    assert state["frame"].shape == (6,)
    assert (param != 1).any(dim=1).nonzero().flatten().tolist() == [1, 5]


def test_bfloat16_parameters_move_with_stochastic_rounding():
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = Adamax([param], lr=1e-3, stochastic_rounding=stochastic)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved = 1 - param.detach().float().mean().item()
        assert moved == pytest.approx(0.1 if stochastic else 0, rel=0.05)


# --- Checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
@pytest.mark.parametrize("way", ["dict", "file", "deepcopy"])
def test_going_on_from_a_checkpoint_is_not_having_stopped(kind, sparse, way):
    model = model_of()
    optimizer = optimizer_of(model, sparse, state_dtype=kind)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    if way == "deepcopy":
        other_model, other = copy.deepcopy((model, optimizer))
        if sparse == "exact":
            other.attach(other_model)
    else:
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other_model = model_of()
        other_model.load_state_dict(model.state_dict())
        other = optimizer_of(other_model, sparse, state_dtype=kind)
        other.load_state_dict(state)
    assert_same_contents(contents(other), contents(optimizer))
    train(model, optimizer, 3, seed=2)
    train(other_model, other, 3, seed=2)
    optimizer.flush()
    other.flush()
    assert_same_contents(contents(other), contents(optimizer))


@pytest.mark.parametrize("source", ["float32", *KINDS])
@pytest.mark.parametrize("target", ["float32", *KINDS])
def test_state_of_one_kind_loads_into_another(source, target):
    model = model_of()
    first = optimizer_of(model, state_dtype=source)
    train(model, first, 5)
    for saved in (first.state_dict(), first.state_dict(state_dtype="float32")):
        second = optimizer_of(model, state_dtype=target)
        second.load_state_dict(saved)
        assert {group["state_dtype"] for group in second.param_groups} == {target}
        expected, actual = (
            o.state_dict(state_dtype="float32")["state"] for o in (first, second)
        )
        for i, state in expected.items():
            limit = 2**0.1251 - 1 if target == "8bit" else 0.005
            torch.testing.assert_close(
                actual[i]["exp_inf"], state["exp_inf"], rtol=limit, atol=0
            )
            error = (actual[i]["exp_avg"] - state["exp_avg"]).abs()
            assert (error <= 1.1 * 1.25 / 127 * state["exp_inf"] + 1e-12).all()
        train(model, second, 1)


def test_torch_goes_on_from_float32_and_back():
    model = model_of(sparse=False)
    ours = optimizer_of(model, state_dtype="8bit")
    train(model, ours, 5)
    theirs = torch.optim.Adamax(model.parameters(), lr=0.01)
    theirs.load_state_dict(ours.state_dict(state_dtype="float32"))
    train(model, theirs, 2)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[model[1].weight]["exp_avg"].dtype is torch.int8
    train(model, ours, 2)
    assert ours.state[model[1].weight]["step"] == 9


def test_what_is_not_finite_survives_a_conversion():
    param = torch.nn.Parameter(torch.ones(4))
    first = Adamax([param])
    param.grad = torch.tensor([math.nan, math.inf, 1.0, 0.0])
    first.step()
    second = Adamax([param], state_dtype="8bit")
    second.load_state_dict(first.state_dict())
    state = second.state_dict(state_dtype="float32")["state"][0]
    assert state["exp_inf"].isnan().tolist() == [True, True, False, False]
    assert state["exp_avg"][3] == 0


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, r"^frame of .* must be a float32 tensor of numbers in \[0, 1\), got None$"),
        (torch.tensor([1.0]), r"must be a float32 tensor of numbers in \[0, 1\)"),
        (torch.tensor([math.nan]), r"must be a float32 tensor of numbers in \[0, 1\)"),
        (torch.zeros(1, dtype=torch.float64), r"must be a float32 tensor of numbers"),
        (torch.zeros(7), r"^frame of .* must have 1 or 30 elements, got 7$"),
    ],
)
def test_a_broken_frame_changes_nothing(frame, message):
    model = model_of()
    optimizer = optimizer_of(model, state_dtype="8bit")
    train(model, optimizer, 2)
    before = contents(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["frame"] = frame
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_contents(contents(optimizer), before)


# --- Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "excluded",
    [{"foreach": True}, {"fused": False}, {"differentiable": True}, {"capturable": True}],
)
@pytest.mark.parametrize("chosen", [{"state_dtype": "8bit"}, {"stochastic_rounding": True}])
def test_options_that_exclude_it_raise(chosen, excluded):
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r" excludes foreach, fused=False"):
        Adamax([param], **chosen, **excluded)


def test_arguments_are_checked():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^state_dtype must be one of .*, got 'fp8'$"):
        Adamax([param], state_dtype="fp8")
    with pytest.raises(TypeError, match=r"^stochastic_rounding must be a bool, got 'yes'$"):
        Adamax([param], stochastic_rounding="yes")
    with pytest.raises(ValueError, match=r"^state_dtype='8bit' needs .* for betas of"):
        Adamax([param], betas=(0.9, 0.9), state_dtype="8bit")
    for dtype in (torch.float64, torch.complex64):
        optimizer = Adamax([param], state_dtype="8bit")
        wide = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        with pytest.raises(ValueError, match=rf"of at most 32 bits, got {dtype}$"):
            optimizer.add_param_group({"params": [wide]})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"^state_dtype must be None or 'float32'"):
        optimizer.state_dict(state_dtype="8bit")


def test_rows_that_do_not_lie_in_their_order_are_refused():
    param = torch.nn.Parameter(torch.ones(2, 3, 5).transpose(0, 1))
    optimizer = Adamax([param], state_dtype="bfloat16")
    param.grad = torch.ones(3, 2, 5)
    optimizer.step()
    before = contents(optimizer)
    param.grad = rows_of(torch.ones(2, 5), torch.tensor([[0, 2], [1, 0]]), (3, 2, 5))
    with pytest.raises(RuntimeError, match=r"^compact state .* rows lie in their order"):
        optimizer.step()
    assert_same_contents(contents(optimizer), before)


@pytest.mark.parametrize("excluded", [{"foreach": True}, {"fused": False}])
def test_state_that_is_compact_is_refused_where_kernels_are_excluded(excluded):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Adamax([param], state_dtype="8bit")
    param.grad = torch.ones(3)
    optimizer.step()
    before = contents(optimizer)
    optimizer.param_groups[0].update({"state_dtype": "float32", **excluded})
    with pytest.raises(RuntimeError, match=r"^compact state .* need the compiled kernels"):
        optimizer.step()
    assert_same_contents(contents(optimizer), before)


def test_a_device_without_the_kernels_raises_and_changes_nothing():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = Adamax([param], state_dtype="8bit")
    param.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match=r"^state_dtype='8bit' and stochastic_rounding"):
        optimizer.step()
    assert not optimizer.state


def test_groups_have_kinds_of_their_own():
    first, second = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "state_dtype": "8bit"}]
    optimizer = Adamax(groups)
    for _ in range(3):
        for param in (first, second):
            param.grad = torch.ones(5)
        optimizer.step()
    assert optimizer.state[first]["exp_avg"].dtype is torch.float32
    assert optimizer.state[second]["exp_avg"].dtype is torch.int8
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_the_kind_is_that_of_new_state():
    first, second = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = Adamax([first, second])
    first.grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    for _ in range(2):
        first.grad, second.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
    assert optimizer.state[first]["exp_avg"].dtype is torch.float32
    assert optimizer.state[second]["exp_avg"].dtype is torch.int8
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[first]["exp_avg"].dtype is torch.int8
