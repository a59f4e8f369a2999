"""Shapes that change, gradients of other dtypes, and numbers at the edge."""

import math

import pytest

from torch_cases import (
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    contents,
    draw,
    parameter,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)
from torch_on_host import host  # noqa: F401  (a fixture)

from adamax.torch import Adamax, clip_grad_norm_  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(params=[*PATHS, "triton"])
def any_path(request):
    """Options for a path; that of GPUs is interpreted."""
    if request.param == "triton":
        request.getfixturevalue("host")
        return {}
    return PATHS[request.param]


pytestmark = pytest.mark.xdist_group("triton")

# --- Shapes -------------------------------------------------------------------------------


def test_a_sparse_gradient_from_before_its_parameter_was_widened(rng, any_path):
    w, other = parameter(rng, (5, 2)), parameter(rng, (3,))
    gradient = rows_of(draw(rng, (2, 2)), [1, 3], (5, 2))
    optimizer = take_steps(Adamax([other, w], **any_path), [[draw(rng, (3,)), gradient]])
    set_gradients(optimizer, [draw(rng, (3,)), gradient])
    w.data = torch.cat([w.data, w.data], 1)
    for name in ("exp_avg", "exp_inf"):
        optimizer.state[w][name] = optimizer.state[w][name].repeat(1, 2)
    before = contents(optimizer)
    with pytest.raises(
        ValueError, match=r"sparse gradient of parameter 1 of group 0 must h"
    ):
        optimizer.step()
    assert_same_contents(optimizer, before)


@pytest.mark.parametrize("name", ["exp_avg", "exp_inf", "gradient"])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_does_not_fit_is_refused_before_another_group_changes(
    rng, any_path, sparse, name
):
    dense, table = parameter(rng, (4,)), parameter(rng, (6, 2))
    optimizer = Adamax([{"params": [dense]}, {"params": [table]}], **any_path)
    rows = rows_of(draw(rng, (3, 2)), [5, 0, 5], (6, 2))
    gradients = [draw(rng, (4,)), rows if sparse else draw(rng, (6, 2))]
    take_steps(optimizer, [gradients])
    set_gradients(optimizer, gradients)
    if name == "gradient":
        table.data = torch.ones(6, 3)
        for state in ("exp_avg", "exp_inf"):
            optimizer.state[table][state] = torch.zeros(6, 3)
    else:
        optimizer.state[table][name] = torch.zeros(6, 3)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 of group 1 must "):
        optimizer.step()
    assert_same_contents(optimizer, before)


@paths
@pytest.mark.parametrize(
    "step", [-1.0, math.nan, math.inf, 1e300, 0.5, torch.ones(2)], ids=str
)
def test_a_counter_that_is_none_is_refused(rng, step, path):
    params = [parameter(rng, (4,)) for _ in range(2)]
    gradients = [draw(rng, (4,)) for _ in params]
    optimizer = take_steps(Adamax(params, **PATHS[path]), [gradients])
    count = step if isinstance(step, torch.Tensor) else torch.tensor(step).double()
    optimizer.state[params[1]]["step"] = count
    before = contents(optimizer)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"step of parameter 1 of group 0 must be"
    ):
        take_steps(optimizer, [gradients])
    assert_same_contents(optimizer, before)


@pytest.mark.parametrize("path", ["default", "fused"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_inf"])
def test_state_that_shares_memory_with_its_parameter_is_refused(rng, name, path):
    w = parameter(rng, (4,))
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[draw(rng, (4,))]])
    optimizer.state[w][name] = w.detach()
    before = contents(optimizer)
    with pytest.raises(
        ValueError, match=rf"parameter 0 of group 0: its {name} must be strid"
    ):
        take_steps(optimizer, [[draw(rng, (4,))]])
    assert_same_contents(optimizer, before)


# --- Gradients of another dtype -----------------------------------------------------------


def with_gradient(param, gradient):
    if not hasattr(param, "grad_dtype"):
        pytest.skip("needs grad_dtype, which PyTorch has since 2.10")
    param.grad_dtype = gradient.dtype
    param.grad = gradient


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_gradient_of_a_narrow_parameter_is_not_narrowed(any_path, dtype, sparse):
    w = torch.nn.Parameter(torch.zeros(2, 1, dtype=dtype))
    gradient = torch.tensor([[1e-8], [1e5]])
    with_gradient(w, rows_of(gradient, [0, 1], (2, 1)) if sparse else gradient)
    optimizer = Adamax([w], **any_path)
    optimizer.step()
    state = optimizer.state[w]
    assert state["exp_inf"].flatten().tolist() == pytest.approx([1e-8, 1e5])
    assert state["exp_avg"].flatten().tolist() == pytest.approx([1e-9, 1e4])
    assert w.isfinite().all()
    assert (w != 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_float64_gradient_is_scaled_before_it_is_rounded(any_path, sparse):
    w = torch.nn.Parameter(torch.zeros(2, 1))
    gradient = torch.tensor([[1e40], [-2e40]], dtype=torch.float64)
    if sparse and not any_path:
        gradient = gradient.clamp(-3e38, 3e38)  # Triton sums in float32
    with_gradient(w, rows_of(gradient, [0, 1], (2, 1)) if sparse else gradient)
    optimizer = Adamax([w], **any_path)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1e38), torch.tensor(0.0)
    optimizer.step()
    expected = (gradient / 1e38).abs().flatten().tolist()
    assert optimizer.state[w]["exp_inf"].flatten().tolist() == pytest.approx(expected)


def test_norms_of_gradients_that_are_wider(any_path):
    w = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float16))
    with_gradient(w, rows_of(torch.tensor([[3e5], [4e5]]), [0, 1], (2, 1)))
    assert clip_grad_norm_([w], 1.0) == pytest.approx(5e5)
    assert w.grad.to_dense().flatten().tolist() == pytest.approx([0.6, 0.8])


@paths
def test_an_index_that_repeats_very_often(path):
    count = 1_000_000
    w = torch.nn.Parameter(torch.zeros(3, 1))
    optimizer = Adamax([w], **PATHS[path])
    take_steps(optimizer, [[rows_of(torch.full((count, 1), 0.1), [1] * count, (3, 1))]])
    exact = count * torch.tensor(0.1).double().item()
    assert optimizer.state[w]["exp_inf"][1].item() == pytest.approx(exact, rel=1e-7)


# --- Overlap ------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_state_is_right_where_a_gradient_overlaps_its_parameter(rng, any_path, shift):
    buffer = draw(rng, (200,))
    expected = torch.nn.Parameter(buffer[:150].clone())
    w = torch.nn.Parameter(buffer[:150])
    expected.grad, w.grad = buffer[shift : 150 + shift].clone(), buffer[shift : 150 + shift]
    optimizers = Adamax([w], **any_path), Adamax([expected], **any_path)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_contents(*optimizers)


def test_rows_are_right_where_values_overlap_their_table(rng, any_path):
    w = parameter(rng, (6, 3))
    expected = torch.nn.Parameter(w.detach().clone())
    expected.grad = rows_of(w.detach()[1:4].clone(), [2, 3, 2], (6, 3))
    w.grad = torch.sparse_coo_tensor(
        torch.tensor([[2, 3, 2]]), w.detach()[1:4], (6, 3), check_invariants=True
    )
    optimizers = Adamax([w], **any_path), Adamax([expected], **any_path)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_contents(*optimizers)


# --- Numbers ------------------------------------------------------------------------------

ZERO_OR_NOT = torch.tensor([[0.0, 3.0], [0.0, 0.0], [math.nan, -2.0]])


@pytest.mark.parametrize("eps", [0.0, 1e-60])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_without_epsilon(any_path, dtype, sparse, eps):
    """The paper's own rule; NaN still shows."""
    dtype = getattr(torch, dtype)
    w = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
    gradient = ZERO_OR_NOT.to(dtype)
    given = rows_of(gradient, [0, 1, 2], (3, 2)) if sparse else gradient
    optimizer = take_steps(Adamax([w], lr=0.25, eps=eps, **any_path), [[given]] * 2)
    expected = torch.tensor([[1.0, 0.5], [1.0, 1.0], [math.nan, 1.5]])
    assert_same_tensor(w.real.detach().float(), expected)
    state = optimizer.state[w]
    assert state["exp_inf"].real.flatten()[:4].tolist() == [0.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("fused", [None, True])
def test_without_epsilon_in_exact_mode(fused):
    """An element of a stale row that has seen zeros only does not move."""
    results = []
    for sparse in ("exact", "lazy"):
        w = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        optimizer = Adamax([w], lr=0.25, eps=0, sparse=sparse, fused=fused)
        for step in range(9):
            ids = torch.tensor([step % 3])
            values = torch.tensor([[0.0, 1.0 + step]], dtype=torch.float64)
            if sparse == "exact":
                optimizer.catch_up(w, ids)
            w.grad = rows_of(values, ids, (4, 2))
            w.grad = w.grad if sparse == "exact" else w.grad.to_dense()
            optimizer.step()
        optimizer.flush()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert results[0][:, 0].tolist() == [1.0] * 4
    assert results[0][3].tolist() == [1.0, 1.0]
    assert results[0].isfinite().all()


@pytest.mark.parametrize("lr", [1e39, 1e300])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_learning_rate_beyond_float32_moves_nothing_without_a_gradient(
    any_path, sparse, lr
):
    w = torch.nn.Parameter(torch.ones(3, 1))
    gradient = torch.tensor([[0.0], [1.0], [-1.0]])
    given = rows_of(gradient, [0, 1, 2], (3, 1)) if sparse else gradient
    take_steps(Adamax([w], lr=lr, **any_path), [[given]])
    assert w[0] == 1.0
    assert not w.isnan().any()
    assert w[1] < -1e37
    assert w[2] > 1e37
