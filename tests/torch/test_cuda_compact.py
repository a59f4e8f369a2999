"""Compact state and stochastic rounding on an NVIDIA GPU: ``pytest -m cuda``."""

import numpy as np
import pytest

from torch_cases import (
    assert_same_contents,
    contents,
    draw,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)
from torch_on_gpu import DEVICE, gpu  # noqa: F401  (a fixture)

from adamax.torch import Adamax  # isort: skip  (not without torch)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

SHAPES = ((300_001,), (2000, 33), (2000, 600))
DTYPES = ("float32", "bfloat16")

kinds = pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])


def started(numbers, device, **options):
    params = [torch.nn.Parameter(w.to(device, copy=True)) for w in numbers]
    return Adamax(params, lr=0.05, stochastic_rounding=True, **options)


def gradients_of(rng, dtype, sparse):
    gradients = [draw(rng, shape, dtype) for shape in SHAPES]
    if sparse:
        for i in (1, 2):
            values = draw(rng, (700, *SHAPES[i][1:]), dtype)
            gradients[i] = rows_of(values, rng.permutation(2000)[:700], SHAPES[i])
    return gradients


def assert_close(on_gpu, on_cpu):
    """All but few elements are equal: a fused product and sum may tip one over."""
    actual, expected = contents(on_gpu), contents(on_cpu)
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        found, wanted = actual[name].astype(float), wanted.astype(float)
        near = np.isclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert near.mean() >= 0.998, name


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_state_is_that_of_the_cpu(rng, kind, dtype, sparse):
    numbers = [draw(rng, shape, dtype) for shape in SHAPES]
    optimizers = [started(numbers, on, state_dtype=kind) for on in (DEVICE, "cpu")]
    for _ in range(3):
        gradients = gradients_of(rng, dtype, sparse)
        for optimizer, on in zip(optimizers, (DEVICE, "cpu"), strict=True):
            take_steps(optimizer, [[gradient.to(on) for gradient in gradients]])
    assert_close(*optimizers)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_mode_is_that_of_the_cpu(rng, kind, dtype):
    numbers = [draw(rng, (300, 70), dtype)]
    optimizers = [
        started(numbers, on, state_dtype=kind, sparse="exact") for on in (DEVICE, "cpu")
    ]
    for _ in range(20):
        ids, values = rng.permutation(300)[:40], draw(rng, (40, 70), dtype)
        gradient = rows_of(values, ids, (300, 70))
        for optimizer, on in zip(optimizers, (DEVICE, "cpu"), strict=True):
            [w] = optimizer.param_groups[0]["params"]
            optimizer.catch_up(w, torch.tensor(ids, device=on))
            take_steps(optimizer, [[gradient.to(on)]])
    for optimizer in optimizers:
        optimizer.flush()
    assert_close(*optimizers)


@kinds
def test_runs_are_equal_bit_for_bit(rng, kind):
    numbers = [draw(rng, shape, "bfloat16") for shape in SHAPES]
    steps = [gradients_of(rng, "bfloat16", sparse=True) for _ in range(3)]
    results = []
    for _ in range(2):
        optimizer = started(numbers, DEVICE, state_dtype=kind)
        take_steps(optimizer, [[g.to(DEVICE) for g in gradients] for gradients in steps])
        results.append(contents(optimizer))
    assert_same_contents(*results)


@kinds
@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_waits_for_nothing(rng, kind, skipped):
    numbers = [draw(rng, shape, "bfloat16") for shape in SHAPES]
    optimizer = started(numbers, DEVICE, state_dtype=kind)
    gradients = [g.to(DEVICE) for g in gradients_of(rng, "bfloat16", sparse=True)]
    take_steps(optimizer, [gradients])
    set_gradients(optimizer, gradients)
    before = contents(optimizer)
    optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(float(skipped), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = contents(optimizer)
    if skipped:
        assert_same_contents(after, before)
    else:
        assert (after["0.w"] != before["0.w"]).any()
