"""Checkpoints, copies and pickles of ``adamax.torch.Adamax``."""

import copy
import io
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from torch_cases import (
    DTYPES,
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    contents,
    draw,
    follow,
    parameter,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "at once": lambda state_dict: state_dict,
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "pickle": lambda state_dict: pickle.loads(pickle.dumps(state_dict)),
}


def model_of(rng, dtype="float32"):
    """Parameters of several shapes and layouts, and what makes gradients for them."""
    starts = [draw(rng, shape, dtype) for shape in ((6, 4), (5,), (), (2, 3, 4, 4), (0,))]
    starts[3] = starts[3].to(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(start) for start in starts]

    def gradients(steps):
        made = []
        for _ in range(steps):
            rows = rows_of(draw(rng, (9, 4), dtype), rng.integers(6, size=9), (6, 4))
            made.append([rows, *(draw(rng, p.shape, dtype) for p in params[1:])])
        return made

    return params, gradients


def copies_of(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def groups_of(optimizer):
    """The options of all groups, without the parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


# --- Stop and go on -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_going_on_from_a_checkpoint_is_not_having_stopped(rng, dtype, way, path):
    params, gradients = model_of(rng, dtype)
    chosen = {"weight_decay": 0.1, "maximize": True, **PATHS[path]}
    optimizer = take_steps(Adamax(params, lr=0.1, **chosen), gradients(3))
    others = copies_of(params)
    other = Adamax(others)
    other.load_state_dict(WAYS[way](optimizer.state_dict()))
    assert groups_of(other) == groups_of(optimizer)
    assert_same_contents(other, optimizer)
    more = gradients(3)
    assert_same_contents(take_steps(other, more), take_steps(optimizer, more))
    for name in ("exp_avg", "exp_inf"):
        strides = other.state[others[3]][name].stride()
        assert strides == others[3].stride()


def test_a_checkpoint_does_not_change_with_the_optimizers_that_use_it(rng):
    params, gradients = model_of(rng)
    optimizer = take_steps(Adamax(params), gradients(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    expected = copy.deepcopy(state_dict)
    others = [Adamax(copies_of(params)) for _ in range(2)]
    for other in others:
        other.load_state_dict(state_dict)
    more = gradients(2)
    results = [contents(take_steps(other, more)) for other in (*others, optimizer)]
    assert_same_contents(results[0], results[2])
    assert_same_contents(results[1], results[2])
    torch.testing.assert_close(state_dict["state"], expected["state"], rtol=0, atol=0)
    assert state_dict["param_groups"] == expected["param_groups"]


def test_a_state_dict_is_that_of_torch(rng):
    """Of the same form and, but for options of our own, the same contents."""
    params, gradients = model_of(rng)
    ours, theirs = Adamax(params), torch.optim.Adamax(copies_of(params))
    dense = [[g.to_dense() for g in of_this_step] for of_this_step in gradients(2)]
    our_state = take_steps(ours, dense).state_dict()
    their_state = take_steps(theirs, dense).state_dict()
    assert list(our_state) == list(their_state)
    [our_group], [their_group] = our_state["param_groups"], their_state["param_groups"]
    more = {
        "fused": None,
        "decoupled_weight_decay": False,
        "sparse": "lazy",
        "state_dtype": "float32",
        "stochastic_rounding": False,
    }
    assert our_group == {**their_group, **more}
    torch.testing.assert_close(our_state["state"], their_state["state"])


def test_parameters_without_state_have_none_after_loading(rng):
    params, gradients = model_of(rng)
    some = [[None, *of_this_step[1:3], None, None] for of_this_step in gradients(2)]
    optimizer = take_steps(Adamax(params), some)
    other = Adamax(copies_of(params))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert len(other.state) == 2
    assert_same_contents(other, optimizer)
    follow(other, gradients(2))


def test_loading_replaces_all_that_was_there(rng):
    params, gradients = model_of(rng)
    fresh = Adamax(copies_of(params), lr=0.5)
    used = take_steps(Adamax(params), gradients(2))
    used.load_state_dict(fresh.state_dict())
    assert not used.state
    assert used.param_groups[0]["lr"] == 0.5
    follow(used, gradients(2))


def test_an_optimizer_may_load_its_own_state(rng):
    params, gradients = model_of(rng)
    optimizer = take_steps(Adamax(params), gradients(2))
    before = contents(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_contents(optimizer, before)
    follow(optimizer, gradients(2))


def test_an_lr_tensor_is_loaded_as_one(rng):
    w = parameter(rng, (3,))
    optimizer = take_steps(Adamax([w], lr=torch.tensor(0.25)), [[draw(rng, (3,))]])
    other = Adamax(copies_of([w]))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.25
    other.param_groups[0]["lr"].fill_(0.5)
    assert optimizer.param_groups[0]["lr"] == 0.25
    follow(other, [[draw(rng, (3,))]])


SAME_KIND = [
    (before, after)
    for before, after in itertools.product(DTYPES, DTYPES)
    if DTYPES[before].is_complex == DTYPES[after].is_complex
]


@pytest.mark.parametrize(("before", "after"), SAME_KIND)
def test_state_takes_the_dtype_that_goes_with_the_parameter(rng, before, after):
    w = parameter(rng, (4,), before)
    optimizer = take_steps(Adamax([w]), [[draw(rng, (4,), before)]] * 3)
    other_w = torch.nn.Parameter(w.detach().to(DTYPES[after]))
    other = Adamax([other_w])
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    own = take_steps(Adamax(copies_of([other_w])), [[draw(rng, (4,), after)]])
    for name, value in optimizer.state[w].items():
        loaded = other.state[other_w][name]
        assert loaded.dtype == next(iter(own.state.values()))[name].dtype
        torch.testing.assert_close(loaded, value.to(loaded.dtype), rtol=0, atol=0)
    follow(other, [[draw(rng, (4,), after)]] * 2)


# --- torch.optim.Adamax -------------------------------------------------------------------


@paths
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_checkpoints_go_both_ways(rng, dtype, path):
    """And training goes on as if there had been one optimizer all the time."""
    start = draw(rng, (5, 3), dtype)
    gradients = [[torch.randn(5, 3, dtype=DTYPES[dtype])] for _ in range(12)]
    chosen = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-12, "weight_decay": 0.1}
    chosen["maximize"] = True
    expected = torch.nn.Parameter(start.clone())
    take_steps(torch.optim.Adamax([expected], **chosen), gradients)
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adamax([w], **chosen)
    for part, kind in enumerate([Adamax, torch.optim.Adamax, Adamax]):
        take_steps(optimizer, gradients[3 * part : 3 * part + 3])
        other = kind([w], **(PATHS[path] if kind is Adamax else {}))
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
        loaded = groups_of(other)[0]
        assert {name: loaded[name] for name in chosen} == chosen
        optimizer = other
    take_steps(optimizer, gradients[9:])
    assert optimizer.state[w]["step"] == 12.0
    torch.testing.assert_close(w, expected, rtol=1e-8, atol=1e-8)


@paths
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_state_of_torch_becomes_float32(rng, dtype, path):
    w = parameter(rng, (5,), dtype)
    theirs = torch.optim.Adamax([w])
    take_steps(theirs, [[torch.randn(5).to(DTYPES[dtype])]] * 3)
    state_dict = saved_and_loaded(theirs.state_dict())
    ours = Adamax([w], **PATHS[path])
    ours.load_state_dict(state_dict)
    for name in ("exp_avg", "exp_inf"):
        given = state_dict["state"][0][name]
        assert given.dtype is DTYPES[dtype]
        assert_same_tensor(ours.state[w][name], given.float())
    follow(ours, [[draw(rng, (5,), dtype)]] * 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_bit_of_our_16_bit_state_is_lost(rng, dtype):
    w = parameter(rng, (50,), dtype)
    optimizer = take_steps(Adamax([w]), [[draw(rng, (50,), dtype)]] * 3)
    narrow = optimizer.state[w]["exp_avg"].to(DTYPES[dtype])
    assert (narrow != optimizer.state[w]["exp_avg"]).any()
    other = Adamax(copies_of([w]))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_contents(other, optimizer)


NOT_IN_OLD_CHECKPOINTS = ["maximize", "foreach", "differentiable", "capturable"]


@pytest.mark.parametrize("missing", [*NOT_IN_OLD_CHECKPOINTS, "all"])
@pytest.mark.parametrize("step", [float, int, lambda step: step.reshape(1)])
def test_older_checkpoints(rng, step, missing):
    """Without some options, and with steps that were numbers once."""
    params, gradients = model_of(rng)
    theirs = torch.optim.Adamax(params)
    dense = [[g.to_dense() for g in of_this_step] for of_this_step in gradients(3)]
    state_dict = take_steps(theirs, dense).state_dict()
    for name in NOT_IN_OLD_CHECKPOINTS if missing == "all" else [missing]:
        del state_dict["param_groups"][0][name]
    for state in state_dict["state"].values():
        state["step"] = step(state["step"])
    ours = Adamax(params)
    ours.load_state_dict(state_dict)
    assert groups_of(ours) == groups_of(Adamax(copies_of(params)))
    assert {float(state["step"]) for state in ours.state.values()} == {3.0}
    follow(ours, gradients(2))
    assert {float(state["step"]) for state in ours.state.values()} == {5.0}


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_checkpoints_with_and_without_names(rng, named):
    model = torch.nn.Linear(3, 2)

    def start(with_names):
        return Adamax(model.named_parameters() if with_names else model.parameters())

    first, second = map(start, named)
    take_steps(first, [[torch.ones(2, 3), torch.ones(2)]])
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_same_contents(second, first)


# --- Checkpoints that do not fit ----------------------------------------------------------


def without(name):
    def change(state_dict):
        del state_dict["state"][1][name]

    return change


def replaced(name, value, parameter=1):
    def change(state_dict):
        state_dict["state"][parameter][name] = value

    return change


def option(name, value):
    def change(state_dict):
        state_dict["param_groups"][0][name] = value

    return change


def no_option(name):
    def change(state_dict):
        del state_dict["param_groups"][0][name]

    return change


def fewer_parameters(state_dict):
    state_dict["param_groups"][0]["params"].pop()


def more_groups(state_dict):
    state_dict["param_groups"] *= 2


MALFORMED = {
    "no first moment": (without("exp_avg"), r"must have step, exp_avg, exp_inf, got step"),
    "no norm": (without("exp_inf"), r"must have step, .*, got step, exp_avg$"),
    "no step": (without("step"), r"must have step, .*, got exp_avg, exp_inf$"),
    "wrong shape": (
        replaced("exp_inf", torch.zeros(1, 5)),
        r"exp_inf of .* must be like it, .* shape \(5,\), got .*float32 and shape \(1, 5\)",
    ),
    "as many elements": (
        replaced("exp_avg", torch.zeros(4, 6), 0),
        r"exp_avg of .* must be like it, .* shape \(6, 4\), got .* and shape \(4, 6\)",
    ),
    "complex": (
        replaced("exp_avg", torch.zeros(5, dtype=torch.complex64)),
        r"exp_avg of .* must be like it, torch.float32 .*, got Tensor of torch.complex64",
    ),
    "no tensor": (
        replaced("exp_avg", [0.0] * 5),
        r"exp_avg of .* must be like it, .*, got \[0",
    ),
    "nothing": (replaced("exp_inf", None), r"exp_inf of .* must be like it, .*, got None"),
    "no number": (replaced("step", "three"), r"^step of .* must be a number, got 'three'"),
    "negative step": (replaced("step", -1.0), r"^step of .* whole number in .*, got -1.0"),
    "half a step": (replaced("step", torch.tensor(2.5)), r"^step of .* whole .*, got 2.5"),
    "no step at all": (replaced("step", torch.tensor(math.nan)), r"^step of .* got nan"),
    "no end of steps": (replaced("step", math.inf), r"^step of .* whole .*, got inf"),
    "too many steps": (replaced("step", 1e300), r"^step of .* whole .*, got 1e\+300"),
    "complex step": (replaced("step", torch.tensor(2j)), r"^step of .* must be a number"),
    "step on meta": (
        replaced("step", torch.tensor(3.0, device="meta")),
        r"^step of .* must be a number",
    ),
    "sparse step": (
        replaced("step", torch.ones(1).to_sparse()),
        r"^step of .* must be a number",
    ),
    "state on meta": (
        replaced("exp_avg", torch.zeros(5, device="meta")),
        r"exp_avg of .* must be like it, .*, got .*on meta",
    ),
    "sparse state": (
        replaced("exp_avg", torch.ones(5).to_sparse()),
        r"exp_avg of .* must be like it, .*, got .*torch.sparse_coo",
    ),
    "integers": (
        replaced("exp_inf", torch.ones(5, dtype=torch.int32)),
        r"exp_inf of .* must be like it, .*, got Tensor of torch.int32",
    ),
    "wrong lr": (option("lr", -1.0), r"^lr must be in \[0, inf\), got -1.0"),
    "wrong betas": (option("betas", (0.9, 2.0)), r"^betas\[1\] must be in .*, got 2.0"),
    "several steps": (
        replaced("step", torch.ones(5)),
        r"^step of .* must be a number, got tens",
    ),
    "fewer parameters": (fewer_parameters, "doesn't match the size of optimizer's group"),
    "more groups": (more_groups, "different number of parameter groups"),
    "no betas": (no_option("betas"), r"group must have lr, betas, eps, weight_decay, got"),
    "no lr": (no_option("lr"), r"group must have lr, betas, eps, weight_decay, got"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("used", [True, False])
def test_checkpoints_that_do_not_fit_change_nothing(rng, used, case):
    spoil, match = MALFORMED[case]
    params, gradients = model_of(rng)
    state_dict = copy.deepcopy(take_steps(Adamax(params), gradients(2)).state_dict())
    spoil(state_dict)
    other = Adamax(copies_of(params), lr=0.5)
    if used:
        take_steps(other, gradients(1))
    before, groups = contents(other), groups_of(other)
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(state_dict)
    assert_same_contents(other, before)
    assert groups_of(other) == groups
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks
    follow(other, gradients(1))


@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "NAdam", "RMSprop", "SGD", "Adagrad", "Adadelta"]
)
def test_checkpoints_of_other_optimizers_change_nothing(rng, name):
    start = draw(rng, (4,))
    other = getattr(torch.optim, name)([torch.nn.Parameter(start.clone())], lr=0.1)
    take_steps(other, [[torch.ones(4)]] * 2)
    optimizer = take_steps(Adamax([torch.nn.Parameter(start)]), [[torch.ones(4)]])
    before, groups = contents(optimizer), groups_of(optimizer)
    with pytest.raises(ValueError, match="must have"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_contents(optimizer, before)
    assert groups_of(optimizer) == groups


# --- Checkpoints of earlier versions ------------------------------------------------------


@pytest.mark.parametrize("name", ["lazy", "exact"])
def test_checkpoints_from_before_the_native_core_load(name):
    """And go on as they did: dense and sparse, in 16 bits, and exact."""
    path = Path(__file__).parent / "data" / f"{name}.pt"
    saved = torch.load(path, weights_only=True)
    params = {name: torch.nn.Parameter(w) for name, w in saved["params"].items()}
    groups = saved["optimizer"]["param_groups"]
    optimizer = Adamax(
        [{"params": [(n, params[n]) for n in group["param_names"]]} for group in groups],
        sparse=name,
    )
    optimizer.load_state_dict(saved["optimizer"])
    assert [group["sparse"] for group in optimizer.param_groups] == (
        ["lazy"] * 2 if name == "lazy" else ["exact", "lazy"]
    )
    for gradients in saved["gradients"]:
        for key, param in params.items():
            param.grad = gradients[key]
            if key == "table" and name == "exact":
                optimizer.catch_up(param, param.grad._indices()[0])
        optimizer.step()
    optimizer.flush()
    for key, expected in saved["later"].items():
        for entry, value in expected.items():
            actual = params[key] if entry == "w" else optimizer.state[params[key]][entry]
            assert actual.dtype is value.dtype
            torch.testing.assert_close(actual.detach(), value, rtol=1e-6, atol=1e-7)


# --- Hooks --------------------------------------------------------------------------------


def test_state_dict_hooks(rng):
    params, gradients = model_of(rng)
    optimizer = take_steps(Adamax(params), gradients(1))
    calls = []

    def before(given):
        assert given is optimizer
        calls.append("before")

    def after(given, state_dict):
        calls.append("after")
        return {**state_dict, "note": 7}

    handles = [
        optimizer.register_state_dict_pre_hook(before),
        optimizer.register_state_dict_post_hook(after),
    ]
    state_dict = optimizer.state_dict()
    assert (calls, state_dict["note"]) == (["before", "after"], 7)
    Adamax(copies_of(params)).load_state_dict(state_dict)
    for handle in handles:
        handle.remove()
    assert "note" not in optimizer.state_dict()


@pytest.mark.parametrize("prepend", [True, False])
def test_load_state_dict_hooks(rng, prepend):
    """One before loading may repair a checkpoint, one after it sees the final state."""
    params, gradients = model_of(rng, "bfloat16")
    optimizer = take_steps(Adamax(params), gradients(2))
    old_names = copy.deepcopy(optimizer.state_dict())
    for state in old_names["state"].values():
        state["norm"] = state.pop("exp_inf")
    other = Adamax(copies_of(params))
    calls = []

    def repair(given, state_dict):
        calls.append("before")
        repaired = copy.deepcopy(state_dict)
        for state in repaired["state"].values():
            state["exp_inf"] = state.pop("norm")
        return repaired

    def look(given):
        calls.append({state["exp_inf"].dtype for state in given.state.values()})

    other.register_load_state_dict_pre_hook(repair, prepend=prepend)
    other.register_load_state_dict_post_hook(look, prepend=prepend)
    other.load_state_dict(old_names)
    assert calls == ["before", {torch.float32}]
    assert "norm" in old_names["state"][0]
    assert_same_contents(other, optimizer)


# --- Copies -------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@paths
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_model_and_optimizer_go_on_by_themselves(rng, way, path):
    params, gradients = model_of(rng)
    optimizer = take_steps(Adamax(params, lr=0.1, **PATHS[path]), gradients(2))
    before = contents(optimizer)
    other_params, other = COPIES[way]((params, optimizer))
    for param, expected in zip(other_params, other.param_groups[0]["params"], strict=True):
        assert param is expected
    assert_same_contents(other, before)
    more = gradients(2)
    after = contents(take_steps(other, more))
    assert_same_contents(optimizer, before)
    assert_same_contents(take_steps(optimizer, more), after)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_all_public_attributes(rng, way):
    optimizer = Adamax([parameter(rng, (2,))])

    def public(of):
        return {name for name in vars(of) if not name.startswith("_")}

    other = COPIES[way](optimizer)
    assert public(other) == public(optimizer)
    assert type(other) is Adamax
    assert other.defaults == optimizer.defaults


def test_a_subclass_keeps_its_options(rng):
    class WithDefaults(Adamax):
        def __init__(self, params):
            super().__init__(params, lr=0.5, weight_decay=0.1)

    w = parameter(rng, (3,))
    optimizer = WithDefaults([w])
    follow(optimizer, [[draw(rng, (3,))]])
    follow(copy.deepcopy(optimizer), [[draw(rng, (3,))]])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_state_belongs_to_its_own_optimizer(rng):
    w = parameter(rng, (3,))
    first, second = Adamax([w]), Adamax([w])
    set_gradients(first, [draw(rng, (3,))])
    first.step()
    assert not second.state
    second.step()
    addresses = [o.state[w]["exp_avg"].data_ptr() for o in (first, second)]
    assert len(set(addresses)) == 2
    np.testing.assert_array_equal([o.state[w]["step"] for o in (first, second)], [1, 1])


# --- Large parameters, whose state is laid out on purpose ---------------------------------

LARGE_LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T,
    "channels last": lambda t: t.reshape(4, 6, 150, -1).to(
        memory_format=torch.channels_last
    ),
    "with holes": lambda t: t[:, ::2],
}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    sorted(
        {
            *itertools.product(DTYPES, ["contiguous"]),
            *itertools.product(["float32"], LARGE_LAYOUTS),
        }
    ),
)
def test_large_state_has_the_layout_that_torch_gives_it(rng, dtype, layout):
    start = LARGE_LAYOUTS[layout](draw(rng, (600, 1200), dtype))
    param = torch.nn.Parameter(start)
    optimizer = Adamax([param])
    follow(optimizer, [[draw(rng, param.shape, dtype)] for _ in range(2)])
    for name in ("exp_avg", "exp_inf"):
        state = optimizer.state[param][name]
        expected = torch.zeros_like(param, memory_format=torch.preserve_format)
        assert state.stride() == expected.stride()
        assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("way", WAYS)
def test_training_with_large_state_goes_on_after_a_checkpoint(rng, way):
    start = draw(rng, (600, 601))
    gradients = [[draw(rng, start.shape)] for _ in range(4)]
    results = []
    for stop in (False, True):
        param = torch.nn.Parameter(start.clone())
        optimizer = Adamax([param])
        take_steps(optimizer, gradients[:2])
        if stop:
            state_dict = WAYS[way](optimizer.state_dict())
            param = torch.nn.Parameter(param.detach().clone())
            optimizer = Adamax([param])
            optimizer.load_state_dict(state_dict)
        take_steps(optimizer, gradients[2:])
        results.append(contents(optimizer))
    assert_same_contents(*results)
