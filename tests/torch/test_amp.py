"""``torch.amp.GradScaler`` with ``adamax.torch.Adamax``."""

import math

import pytest

from torch_cases import (
    DTYPES,
    PATHS,
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

from adamax.torch import Adamax, clip_grad_norm_  # isort: skip  (not without torch)

paths = pytest.mark.parametrize("path", PATHS)
SHAPES = ((6, 3), (5,), ())


def start(rng, dtype="float32", **options):
    params = [parameter(rng, shape, dtype) for shape in SHAPES]
    return Adamax(params, lr=0.1, **options)


def copy_of(optimizer):
    [group] = optimizer.param_groups
    params = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    return Adamax([{**group, "params": params}])


def gradients_of(rng, dtype="float32"):
    made = [torch.randn(shape, dtype=DTYPES[dtype]) for shape in SHAPES]
    rows = torch.randn(9, 3, dtype=DTYPES[dtype])
    return [rows_of(rows, rng.integers(6, size=9), (6, 3)), *made[1:]]


def scaler_with(optimizer, gradients, scale=2.0**10):
    """A scaler, and gradients of a loss that it has scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    set_gradients(optimizer, [gradient * scale for gradient in gradients])
    return scaler


def broken(gradients, position, value):
    gradients = [gradient.clone() for gradient in gradients]
    target = gradients[position]
    (target._values() if target.is_sparse else target)[(0,) * target.ndim] = value
    return gradients


@paths
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_scaled_steps_are_plain_steps(rng, dtype, unscale, path):
    optimizer = start(rng, dtype, weight_decay=0.1, **PATHS[path])
    plain = copy_of(optimizer)
    for _ in range(4):
        gradients = gradients_of(rng, dtype)
        scaler = scaler_with(optimizer, gradients)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        take_steps(plain, [gradients])
        assert_same_contents(optimizer, plain)


@paths
def test_scaled_steps_of_float16(rng, path):
    """Which GradScaler does not unscale in place, but the step itself may."""
    optimizer = start(rng, "float16", **PATHS[path])
    plain = copy_of(optimizer)
    for _ in range(4):
        gradients = gradients_of(rng, "float16")
        gradients[0] = gradients[0].coalesce()  # GradScaler would, and round the sums
        scaler = scaler_with(optimizer, gradients, scale=8.0)
        scaler.step(optimizer)
        take_steps(plain, [gradients])
        assert_same_contents(optimizer, plain)


def test_who_scales(rng):
    """As with torch's own optimizers, the step scales with fused=True and not otherwise.

    Lightning clips gradients only where it does not. Those of float16 nobody else scales.
    """
    for options in ({}, {"foreach": True}, {"fused": False}, {"fused": True}):
        theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], **options)
        scales = start(rng, **options)._step_supports_amp_scaling
        assert scales is getattr(theirs, "_step_supports_amp_scaling", False)
        assert scales is options.get("fused", False)
        assert start(rng, "float16", **options)._step_supports_amp_scaling
    both = start(rng, fused=True)
    both.add_param_group({"params": [parameter(rng, (2,))], "fused": False})
    assert not both._step_supports_amp_scaling
    assert "_step_supports_amp_scaling" not in vars(both)


@paths
@pytest.mark.parametrize("scale", [3.0, 1e5, 1e-3])
def test_any_scale(rng, scale, path):
    optimizer = start(rng, **PATHS[path])
    plain = copy_of(optimizer)
    for _ in range(4):
        gradients = gradients_of(rng)
        scaler_with(optimizer, gradients, scale).step(optimizer)
        take_steps(plain, [gradients])
    for name, expected in contents(plain).items():
        assert contents(optimizer)[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@paths
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 1])
def test_broken_gradients_skip_the_step(rng, position, value, unscale, first, path):
    """And the next one is as if nothing had been."""
    optimizer = start(rng, **PATHS[path])
    if not first:
        take_steps(optimizer, [gradients_of(rng)])
    before = contents(optimizer)
    scaler = scaler_with(optimizer, broken(gradients_of(rng), position, value))
    if unscale:
        scaler.unscale_(optimizer)
    assert scaler.step(optimizer) is None
    assert_same_contents(optimizer, before)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    gradients = gradients_of(rng)
    plain = copy_of(optimizer)
    if not first:
        plain.load_state_dict(optimizer.state_dict())
    set_gradients(optimizer, [g * scaler.get_scale() for g in gradients])
    scaler.step(optimizer)
    assert_same_contents(optimizer, take_steps(plain, [gradients]))


@paths
def test_clipping_unscaled_gradients(rng, path):
    optimizer = start(rng, **PATHS[path])
    plain = copy_of(optimizer)
    gradients = gradients_of(rng)
    scaler = scaler_with(optimizer, gradients)
    scaler.unscale_(optimizer)
    set_gradients(plain, gradients)
    norms = [
        clip_grad_norm_(given.param_groups[0]["params"], 0.5)
        for given in (optimizer, plain)
    ]
    assert norms[0] == norms[1]
    scaler.step(optimizer)
    plain.step()
    assert_same_contents(optimizer, plain)


def test_one_optimizer_may_skip_while_another_steps(rng):
    good, bad = start(rng), start(rng)
    gradients = gradients_of(rng)
    scaler = scaler_with(good, gradients)
    set_gradients(bad, broken([g * 2.0**10 for g in gradients], 1, math.inf))
    scaler.step(good)
    scaler.step(bad)
    scaler.update()
    assert not bad.state
    assert {float(state["step"]) for state in good.state.values()} == {1.0}


def test_the_scale_is_forgotten_after_the_step(rng):
    optimizer = start(rng)
    scaler_with(optimizer, gradients_of(rng)).step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    set_gradients(optimizer, gradients_of(rng))
    check_step(optimizer)


def test_a_disabled_scaler_does_nothing(rng):
    optimizer = start(rng)
    plain = copy_of(optimizer)
    gradients = gradients_of(rng)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_gradients(optimizer, gradients)
    scaler.step(optimizer)
    scaler.update()
    assert_same_contents(optimizer, take_steps(plain, [gradients]))


@paths
def test_training_in_bfloat16_autocast(rng, path):
    """The parameters of float32 see gradients of float32."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    optimizer = Adamax(model.parameters(), lr=0.05, **PATHS[path])
    scaler = torch.amp.GradScaler("cpu")
    x = draw(rng, (32, 4)).clamp(-1, 1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
