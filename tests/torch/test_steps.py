"""Steps of ``adamax.torch.Adamax`` with dense gradients: the oracle, and other peers."""

import math

import ml_dtypes
import numpy as np
import pytest

import adamax
import oracle
from cases import HYPERPARAMETERS, LARGE, PRECISION, ROUNDINGS, SHAPES, values
from compare import assert_same_bits
from torch_cases import (
    DTYPES,
    OPTIONS,
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    contents,
    draw,
    follow,
    numpy_of,
    parameter,
    rows_of,
    take_steps,
    tensor_of,
    torch,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)
# Without the default, which is shown to be one of them.
chosen_paths = pytest.mark.parametrize("path", ["fused", "foreach", "loop"])

# --- The oracle ---------------------------------------------------------------------------


@chosen_paths
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_follow_the_oracle(rng, dtype, options, path):
    params = [parameter(rng, shape, dtype) for shape in SHAPES.values()]
    gradients = [[draw(rng, p.shape, dtype) for p in params] for _ in range(3)]
    gradients[1][::2] = [None] * len(params[::2])
    follow(Adamax(params, **OPTIONS[options], **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize(
    "options",
    ["defaults", "long memory", "maximize and coupled decay", "decoupled decay"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hundreds_of_steps_follow_the_oracle(rng, dtype, options, path):
    w = parameter(rng, (13,), dtype)
    gradients = [[draw(rng, w.shape, dtype)] for _ in range(250)]
    follow(Adamax([w], **OPTIONS[options], **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_tensors_follow_the_oracle(rng, dtype, path):
    w = parameter(rng, LARGE, dtype)
    gradients = [[draw(rng, LARGE, dtype)]]
    follow(Adamax([w], weight_decay=0.1, **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", ["lr", "coupled decay", "decoupled decay", "maximize"])
def test_trajectories_stay_close_to_the_oracles(rng, options, dtype, path):
    """Errors add up over the steps, and none grows on its own."""
    steps = 300
    w = parameter(rng, (50,), dtype)
    start = oracle.State.of(numpy_of(w))
    gradients = [[draw(rng, w.shape, dtype)] for _ in range(steps)]
    optimizer = Adamax([w], **OPTIONS[options], **PATHS[path])
    take_steps(optimizer, gradients)
    group = optimizer.param_groups[0]
    decay = {"weight_decay": group["weight_decay"]}
    if not group["decoupled_weight_decay"]:
        decay = {"coupled_decay": group["weight_decay"]}
    rule = oracle.Rule(learning_rate=group["lr"], epsilon=group["eps"], **decay)
    sign = -1 if group["maximize"] else 1
    for_oracle = [[sign * numpy_of(g).astype(np.float64)] for [g] in gradients]
    [expected] = oracle.trajectory(rule, [start], for_oracle)
    travelled = 1.01 * group["lr"] * steps
    error = steps * ROUNDINGS * PRECISION[dtype].roundoff * (np.abs(start.w) + travelled)
    assert (np.abs(numpy_of(w) - expected.w) <= error).all()


@paths
def test_parameters_of_all_dtypes_may_be_in_one_group(rng, path):
    params = [parameter(rng, (3, 4), dtype) for dtype in DTYPES]
    gradients = [[draw(rng, (3, 4), dtype) for dtype in DTYPES] for _ in range(5)]
    follow(Adamax(params, **PATHS[path]), gradients)


@paths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_together_are_the_steps_of_each_alone(rng, dtype, path):
    starts = [draw(rng, shape, dtype) for shape in SHAPES.values()]
    gradients = [[draw(rng, s.shape, dtype) for s in starts] for _ in range(3)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    together = take_steps(Adamax(params, **PATHS[path]), gradients)
    for i, start in enumerate(starts):
        w = torch.nn.Parameter(start.clone())
        alone = take_steps(Adamax([w], **PATHS[path]), [[g[i]] for g in gradients])
        assert_same_tensor(params[i], w)
        for name, value in alone.state[w].items():
            assert_same_tensor(together.state[params[i]][name], value)


# --- Peers: the NumPy front end, torch's own Adamax ---------------------------------------

_FOR_NUMPY = {
    "lr": "learning_rate",
    "eps": "epsilon",
    "weight_decay": "weight_decay",
}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    "options",
    ["defaults", "lr", "long memory", "short norm", "large eps", "decoupled decay"],
)
def test_the_numpy_front_end_gets_the_same_bits(rng, options, dtype):
    """Dense, missing and sparse gradients; the paths of torch itself come close."""
    chosen = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, **OPTIONS[options]}
    shapes = [(7, 3), (20, 5), ()]
    starts = [values(rng, shape, dtype) for shape in shapes]
    arrays = [start.copy() for start in starts]
    of_numpy = adamax.Adamax(
        **{_FOR_NUMPY[k]: v for k, v in chosen.items() if k in _FOR_NUMPY},
        beta_1=chosen["betas"][0],
        beta_2=chosen["betas"][1],
    )
    params = [torch.nn.Parameter(tensor_of(start.copy())) for start in starts]
    of_torch = Adamax(params, **chosen)
    for step in range(60):
        dense = values(rng, shapes[0], dtype)
        indices = rng.integers(shapes[1][0], size=step % 30)
        rows = values(rng, (indices.size, shapes[1][1]), dtype)
        number = values(rng, shapes[2], dtype)
        gradients = [dense, adamax.IndexedSlices(rows, indices), number]
        of_numpy.apply_gradients(zip(gradients, arrays, strict=True))
        sparse = rows_of(tensor_of(rows), indices, shapes[1])
        take_steps(of_torch, [[tensor_of(dense), sparse, tensor_of(number)]])
    state = of_numpy.state_dict()
    for i, (param, array) in enumerate(zip(params, arrays, strict=True)):
        assert_same_bits(numpy_of(param), array, f"w of {i}")
        assert_same_bits(numpy_of(of_torch.state[param]["exp_avg"]), state[f"{i}.m"])
        assert_same_bits(numpy_of(of_torch.state[param]["exp_inf"]), state[f"{i}.u"])


# torch clips in torch.nn.utils and has schedulers of its own.
_ALSO_IN_TORCH = [
    name
    for name, chosen in HYPERPARAMETERS.items()
    if not any("clip" in key or callable(value) for key, value in chosen.items())
]


@chosen_paths
@pytest.mark.parametrize("options", _ALSO_IN_TORCH)
def test_hyperparameters_of_all_front_ends(rng, options, path):
    """The table that every front end is held to."""
    chosen = dict(HYPERPARAMETERS[options])
    betas = (chosen.pop("beta_1", 0.9), chosen.pop("beta_2", 0.999))
    chosen = {
        "lr": chosen.pop("learning_rate", 0.001),
        "eps": chosen.pop("epsilon", 1e-7),
        "decoupled_weight_decay": True,
        **chosen,
    }
    w = parameter(rng, (23,))
    gradients = [[draw(rng, w.shape)] for _ in range(20)]
    follow(Adamax([w], betas=betas, **chosen, **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize(
    "options",
    ["defaults", "lr", "short norm", "coupled decay", "maximize and coupled decay"],
)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_torchs_own_adamax_comes_close(rng, dtype, options, path):
    """As close as its epsilon, which it adds to |g|, lets it come."""
    start = draw(rng, (6, 5), dtype)
    gradients = [[torch.randn(6, 5, dtype=DTYPES[dtype])] for _ in range(100)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    chosen = {**OPTIONS[options], "eps": 1e-12}
    take_steps(Adamax([ours], **chosen, **PATHS[path]), gradients)
    take_steps(torch.optim.Adamax([theirs], **chosen), gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_agree(rng, dtype, options):
    """In one step from the same state, in all but the last bits."""
    start = [draw(rng, shape, dtype) for shape in ((5, 4), (17,))]
    gradients = [[draw(rng, s.shape, dtype) for s in start] for _ in range(3)]
    results = []
    for path in PATHS.values():
        params = [torch.nn.Parameter(s.clone()) for s in start]
        optimizer = take_steps(Adamax(params, **OPTIONS[options], **path), gradients)
        results.append(contents(optimizer))
    for other in results[1:]:
        for name, expected in results[0].items():
            tolerance = 3 * ROUNDINGS * float(ml_dtypes.finfo(expected.dtype).eps)
            np.testing.assert_allclose(
                other[name].astype(np.float64),
                expected.astype(np.float64),
                rtol=tolerance,
                atol=100 * tolerance,  # numbers are as large as that
                err_msg=name,
            )


def test_the_default_is_the_fused_path(rng):
    start, gradients = draw(rng, (9,)), [[draw(rng, (9,))] for _ in range(5)]
    results = []
    for chosen in ({}, {"fused": True}):
        w = torch.nn.Parameter(start.clone())
        results.append(take_steps(Adamax([w], **chosen), gradients))
    assert_same_contents(*results)


def test_foreach_false_is_the_loop(rng):
    start, gradients = draw(rng, (9,)), [[draw(rng, (9,))] for _ in range(5)]
    results = []
    for chosen in ({"foreach": False}, {"fused": False}):
        w = torch.nn.Parameter(start.clone())
        results.append(take_steps(Adamax([w], **chosen), gradients))
    assert_same_contents(*results)


# --- Facts --------------------------------------------------------------------------------


@paths
def test_the_rule_by_hand(path):
    """Two steps in numbers that a reader can follow."""
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Adamax(
        [w],
        lr=0.5,
        betas=(0.5, 0.75),
        eps=0.25,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        **PATHS[path],
    )
    take_steps(optimizer, [[torch.tensor([2.0], dtype=torch.float64)]])
    # m = 0.5 * 2 = 1, u = 2, w = (1 - 0.25) * 1 - 0.5 / (1 - 0.5) * 1 / 2.25
    state = optimizer.state[w]
    assert (state["step"], state["exp_avg"], state["exp_inf"]) == (1.0, 1.0, 2.0)
    assert w.item() == pytest.approx(0.75 - 1 / 2.25, rel=1e-15)
    before = w.item()
    take_steps(optimizer, [[torch.tensor([-1.0], dtype=torch.float64)]])
    # m = 1 + 0.5 * (-1 - 1) = 0, u = max(0.75 * 2, 1) = 1.5
    assert (state["step"], state["exp_avg"], state["exp_inf"]) == (2.0, 0.0, 1.5)
    assert w.item() == pytest.approx(0.75 * before, rel=1e-15)


@paths
def test_coupled_decay_by_hand(path):
    w = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    chosen = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 2.0**-126}
    optimizer = Adamax([w], weight_decay=0.25, maximize=True, **chosen, **PATHS[path])
    take_steps(optimizer, [[torch.tensor([3.0], dtype=torch.float64)]])
    # g = -3 + 0.25 * 4 = -2, m = -1, u = 2, w = 4 - 0.5 / 0.5 * -1 / 2
    state = optimizer.state[w]
    assert (state["exp_avg"], state["exp_inf"], w) == (-1.0, 2.0, 4.5)


@paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_gradient_from_the_start_changes_nothing(rng, dtype, zero, path):
    w = parameter(rng, (4, 3), dtype)
    start = w.detach().clone()
    optimizer = Adamax([w], **PATHS[path])
    take_steps(optimizer, [[torch.full_like(start, zero)]] * 3)
    assert_same_tensor(w, start)
    assert optimizer.state[w]["step"] == 3.0


@paths
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_norm_of_16_bit_parameters_decays(dtype, path):
    """In 16 bits ``0.999 * u`` is ``u``."""
    w = torch.nn.Parameter(torch.zeros(3, dtype=DTYPES[dtype]))
    one, zero = torch.ones(3, dtype=DTYPES[dtype]), torch.zeros(3, dtype=DTYPES[dtype])
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[one]] + [[zero]] * 100)
    exp_inf = optimizer.state[w]["exp_inf"]
    assert exp_inf.dtype is torch.float32
    torch.testing.assert_close(exp_inf, torch.full((3,), 0.999**100))


@paths
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_at_least_float32(rng, dtype, path):
    w = parameter(rng, (3,), dtype)
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[draw(rng, (3,), dtype)]])
    wide = {"float16": torch.float32, "bfloat16": torch.float32}.get(dtype, w.dtype)
    state = optimizer.state[w]
    assert list(state) == ["step", "exp_avg", "exp_inf"]
    assert [state[name].dtype for name in state] == [torch.float32, wide, wide]
    assert state["step"].shape == ()


def test_the_step_count_has_torchs_default_dtype(rng):
    w = parameter(rng, (3,), "float64")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = take_steps(Adamax([w]), [[draw(rng, (3,), "float64")]] * 2)
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[w]["step"].dtype is torch.float64
    follow(optimizer, [[draw(rng, (3,), "float64")]] * 3)


@paths
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", PRECISION)
def test_broken_gradients_are_not_hidden(dtype, broken, path):
    w = torch.nn.Parameter(torch.ones(3, dtype=DTYPES[dtype]))
    gradient = torch.tensor([1.0, broken, -1.0]).to(DTYPES[dtype])
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[gradient]])
    state = optimizer.state[w]
    assert state["exp_inf"].isfinite().tolist() == [True, False, True]
    assert state["exp_avg"].isfinite().tolist() == [True, False, True]
    assert w.isnan().tolist() == [False, True, False]
    take_steps(optimizer, [[torch.ones(3, dtype=DTYPES[dtype])]])
    assert state["exp_inf"].isfinite().tolist() == [True, False, True]
    assert w.isnan().tolist() == [False, True, False]


@paths
def test_a_broken_parameter_stays_alone(path):
    w = torch.nn.Parameter(torch.tensor([math.inf, math.nan, 1.0]))
    optimizer = take_steps(Adamax([w], lr=0.5, **PATHS[path]), [[torch.ones(3)]])
    assert w.tolist() == [math.inf, pytest.approx(math.nan, nan_ok=True), 0.5]
    assert optimizer.state[w]["exp_avg"].isfinite().all()


@paths
def test_a_step_is_bounded_by_the_learning_rate(rng, path):
    bound = (1 - 0.9) / (1 - 0.9 / 0.999)
    w = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = Adamax([w], lr=0.1, **PATHS[path])
    for _ in range(60):
        before = w.detach().clone()
        take_steps(optimizer, [[draw(rng, (50,), "float64")]])
        assert (w - before).abs().max() <= 0.1 * bound * (1 + 1e-12)


@paths
def test_maximize_is_descent_on_the_opposite_gradient(rng, path):
    start, gradients = draw(rng, (9,)), [[draw(rng, (9,))] for _ in range(10)]
    up, down = (torch.nn.Parameter(start.clone()) for _ in range(2))
    chosen = {"weight_decay": 0.1, **PATHS[path]}
    take_steps(Adamax([up], maximize=True, **chosen), gradients)
    take_steps(Adamax([down], **chosen), [[-g] for [g] in gradients])
    assert_same_tensor(up, down)


@paths
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("options", ["defaults", "coupled decay", "decoupled decay"])
def test_complex_parameters_are_pairs_of_real_ones(rng, options, dtype, path):
    start = draw(rng, (5, 4), dtype)
    gradients = [[draw(rng, (5, 4), dtype)] for _ in range(10)]
    w = torch.nn.Parameter(start.clone())
    pairs = torch.nn.Parameter(torch.view_as_real(start.clone()))
    chosen = {**OPTIONS[options], **PATHS[path]}
    one = take_steps(Adamax([w], **chosen), gradients)
    real = [[torch.view_as_real(g)] for [g] in gradients]
    other = take_steps(Adamax([pairs], **chosen), real)
    assert one.state[w]["exp_inf"].is_complex()
    assert_same_contents(one, other)


# --- Gradients that are not as they are in memory -----------------------------------------


@paths
def test_a_conjugate_gradient(rng, path):
    """Autograd hands out lazy conjugates."""
    start, factor = draw(rng, (4,), "complex64"), draw(rng, (4,), "complex64")
    w = torch.nn.Parameter(start.clone())
    (w.conj() * factor).abs().sum().backward()
    assert w.grad.is_conj()
    expected = torch.nn.Parameter(start.clone())
    take_steps(Adamax([w], **PATHS[path]), [[w.grad]])
    take_steps(Adamax([expected], **PATHS[path]), [[w.grad.resolve_conj()]])
    assert_same_tensor(w, expected)


@paths
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,)])
def test_a_negated_gradient(rng, shape, path):
    """The imaginary part of a lazy conjugate is lazily negated; autograd hands it out."""
    w = torch.nn.Parameter(torch.ones(shape))
    w.grad = draw(rng, shape, "complex64").conj().imag
    assert w.grad.is_neg()
    expected = torch.nn.Parameter(torch.ones(shape))
    expected.grad = w.grad.resolve_neg().clone()
    Adamax([w], **PATHS[path]).step()
    Adamax([expected], **PATHS[path]).step()
    assert_same_tensor(w, expected)


def test_autograd_hands_out_negated_gradients():
    real, imaginary = (torch.nn.Parameter(torch.tensor(1.0)) for _ in range(2))
    (torch.complex(real, imaginary).conj() * (1 + 2j)).real.backward()
    assert imaginary.grad.is_neg()
    assert imaginary.grad == 2
    Adamax([real, imaginary], lr=0.5).step()
    assert (real.item(), imaginary.item()) == (0.5, 0.5)


# --- Layouts in memory --------------------------------------------------------------------


def strided_views(start):
    """The same numbers, laid out in memory in different ways."""
    reversed_dims = tuple(reversed(range(start.ndim)))
    holes = torch.zeros((*start.shape, 2), dtype=start.dtype)
    offset = torch.zeros(start.numel() + 3, dtype=start.dtype)
    views = {
        "contiguous": torch.zeros(start.shape, dtype=start.dtype),
        "transposed": torch.zeros(start.shape[::-1], dtype=start.dtype).permute(
            reversed_dims
        ),
        "channels last": torch.zeros(start.shape, dtype=start.dtype).to(
            memory_format=torch.channels_last
        ),
        "with holes": holes[..., 1],
        "offset": offset[3:].view(start.shape),
        "part": torch.zeros((5, *start.shape[1:]), dtype=start.dtype)[1:3, :, :, :],
        "inner part": torch.zeros(tuple(n + 1 for n in start.shape), dtype=start.dtype)[
            tuple(slice(1, None) for _ in start.shape)
        ],
    }
    return {name: view.copy_(start) for name, view in views.items()}


LAYOUTS = list(strided_views(torch.zeros(2, 3, 4, 5)))


@paths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layouts_change_nothing(rng, of_parameter, of_gradient, dtype, path):
    shape = (2, 3, 4, 5)
    start = draw(rng, shape, dtype)
    gradients = [draw(rng, shape, dtype) for _ in range(3)]
    plain = torch.nn.Parameter(start.clone())
    chosen = {"weight_decay": 0.1, **PATHS[path]}
    expected = take_steps(Adamax([plain], **chosen), [[g] for g in gradients])
    w = torch.nn.Parameter(strided_views(start)[of_parameter])
    optimizer = Adamax([w], **chosen)
    for gradient in gradients:
        w.grad = strided_views(gradient)[of_gradient]
        optimizer.step()
    assert_same_contents(optimizer, expected)


def test_state_has_the_layout_of_its_parameter(rng):
    views = strided_views(draw(rng, (2, 3, 4, 5)))
    w = torch.nn.Parameter(views["channels last"])
    optimizer = take_steps(Adamax([w]), [[draw(rng, w.shape)]])
    for name in ("exp_avg", "exp_inf"):
        assert optimizer.state[w][name].stride() == w.stride()


def test_what_surrounds_a_parameter_is_left_alone(rng):
    buffer = draw(rng, (4, 6, 8))
    w = torch.nn.Parameter(buffer[1:3, 2:5, ::2])
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:3, 2:5, ::2] = False
    before = buffer[outside].clone()
    take_steps(Adamax([w], lr=0.1), [[draw(rng, w.shape)]])
    assert_same_tensor(buffer[outside], before)


def test_memory_may_be_misaligned(rng):
    start, gradient = draw(rng, (1000,)), draw(rng, (1000,))
    place = torch.frombuffer(bytearray(4 * 1000 + 1), dtype=torch.float32, offset=1)
    w, expected = torch.nn.Parameter(place.copy_(start)), torch.nn.Parameter(start.clone())
    assert w.data_ptr() % 4
    take_steps(Adamax([w]), [[gradient]] * 2)
    take_steps(Adamax([expected]), [[gradient]] * 2)
    assert_same_tensor(w, expected)


# --- Shared memory ------------------------------------------------------------------------

ONE_BY_ONE = ["default", "fused", "loop"]


@pytest.mark.parametrize("path", ONE_BY_ONE)
@pytest.mark.parametrize("options", ["defaults", "coupled decay", "decoupled decay"])
@pytest.mark.parametrize("second", [slice(0, 9), slice(4, 12), slice(9, 12)], ids=str)
def test_parameters_that_overlap_are_stepped_one_after_the_other(
    rng, second, options, path
):
    start = draw(rng, (12,))
    slices = slice(0, 9), second
    gradients = [[draw(rng, start[s].shape) for s in slices] for _ in range(5)]
    chosen = {**OPTIONS[options], **PATHS[path]}
    shared, apart = start.clone(), start.clone()
    params = [torch.nn.Parameter(shared[s]) for s in slices]
    take_steps(Adamax(params, **chosen), gradients)
    optimizers = [Adamax([torch.nn.Parameter(apart[s])], **chosen) for s in slices]
    for of_this_step in gradients:
        for optimizer, gradient in zip(optimizers, of_this_step, strict=True):
            take_steps(optimizer, [[gradient]])
    assert_same_tensor(shared, apart)


@paths
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_a_gradient_may_overlap_its_parameter(rng, shift, path):
    buffer = draw(rng, (200,))
    expected = torch.nn.Parameter(buffer[:150].clone())
    expected.grad = buffer[shift : 150 + shift].clone()
    Adamax([expected], **PATHS[path]).step()
    w = torch.nn.Parameter(buffer[:150])
    w.grad = buffer[shift : 150 + shift]
    Adamax([w], **PATHS[path]).step()
    assert_same_tensor(w, expected)


@paths
def test_parameters_may_share_a_gradient(rng, path):
    gradient = draw(rng, (9,))
    params = [parameter(rng, (9,)) for _ in range(2)]
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    take_steps(Adamax(copies, **PATHS[path]), [[gradient, gradient]])
    for param in params:
        param.grad = gradient
    Adamax(params, **PATHS[path]).step()
    for param, copy in zip(params, copies, strict=True):
        assert_same_tensor(param, copy)


def test_two_optimizers_may_share_a_parameter(rng):
    w = parameter(rng, (9,))
    optimizers = [Adamax([w]), Adamax([w], lr=0.1)]
    for _ in range(3):
        for optimizer in optimizers:
            follow(optimizer, [[draw(rng, (9,))]])


# --- Many ---------------------------------------------------------------------------------


@paths
def test_hundreds_of_small_parameters(rng, path):
    shapes = [tuple(rng.integers(0, 5, size=rng.integers(0, 4))) for _ in range(150)]
    params = [parameter(rng, shape) for shape in shapes]
    follow(
        Adamax(params, **PATHS[path]),
        [[draw(rng, shape) for shape in shapes] for _ in range(3)],
    )


def test_state_that_is_replaced_is_seen(rng):
    """By hand, in the middle of training."""
    params = [parameter(rng, (4,)) for _ in range(3)]
    optimizer = Adamax(params)
    gradients = [[draw(rng, (4,)) for _ in params] for _ in range(3)]
    follow(optimizer, gradients)
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].clone()
    follow(optimizer, gradients)
    state["exp_inf"] = torch.ones(4, dtype=torch.float64)
    take_steps(optimizer, gradients[:1])
    assert (state["exp_inf"] <= 1e3).all()
    state["exp_avg"] = torch.ones(8)[::2]
    follow(optimizer, gradients[1:])
    params[2].data = draw(rng, (4,))
    follow(optimizer, gradients)
    del optimizer.state[params[0]]
    follow(optimizer, gradients)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 15, 15]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_step_counts_may_be_of_any_dtype(rng, dtype):
    """All of them, or some of them."""
    params = [parameter(rng, (4,)) for _ in range(3)]
    optimizer = Adamax(params)
    gradients = [[draw(rng, (4,)) for _ in params] for _ in range(2)]
    follow(optimizer, gradients)
    for param in params:
        state = optimizer.state[param]
        state["step"] = state["step"].to(dtype)
        follow(optimizer, gradients)
    assert [int(optimizer.state[p]["step"]) for p in params] == [8, 8, 8]
    assert {optimizer.state[p]["step"].dtype for p in params} == {dtype}


@pytest.mark.parametrize("name", ["exp_avg", "exp_inf"])
def test_state_of_another_shape_is_refused(rng, name):
    params = [parameter(rng, (4,)) for _ in range(2)]
    optimizer = take_steps(Adamax(params), [[draw(rng, (4,)), draw(rng, (4,))]])
    optimizer.state[params[1]][name] = torch.zeros(5)
    before = contents(optimizer)
    with pytest.raises(
        ValueError,
        match=rf"^{name} of parameter 1 of group 0 must be like it, .* shape \(4,\), got",
    ):
        optimizer.step()
    assert_same_contents(optimizer, before)


def test_a_parameter_may_be_transposed_in_place(rng):
    """It is the same tensor in the same place, but not the same elements."""
    w = parameter(rng, (3, 3))
    optimizer = Adamax([w])
    follow(optimizer, [[draw(rng, (3, 3))]] * 2)
    w.grad = None
    w.data = w.data.T
    follow(optimizer, [[draw(rng, (3, 3))]] * 2)


def test_gradients_come_and_go(rng):
    params = [parameter(rng, (4,)) for _ in range(3)]
    optimizer = Adamax(params)
    for present in range(8):
        gradients = [draw(rng, (4,)) if present >> i & 1 else None for i in range(3)]
        follow(optimizer, [gradients])
    follow(optimizer, [[draw(rng, (4,)) for _ in params] for _ in range(3)])
