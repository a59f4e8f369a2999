"""Compact state and stochastic rounding on a GPU, through Triton's interpreter.

State is held to that of the native core bit for bit: the interpreter fuses no product with
a sum, so only step sizes may differ, in the last bit of a float64.
"""

import math

import numpy as np
import pytest

from adamax._core import compact
from frameworks import framework
from torch_cases import (
    assert_same_contents,
    assert_same_tensor,
    contents,
    draw,
    numpy_of,
    parameter,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)
from torch_on_host import NothingIsRead, host  # noqa: F401  (a fixture)

from adamax.torch import Adamax, cuda, device, state  # isort: skip  (not without torch)

try:
    triton = framework("triton")
except pytest.skip.Exception as missing:
    pytest.skip(str(missing), allow_module_level=True)
tl = triton.language

from adamax.torch.triton_compact import mixed, random_bits  # noqa: E402

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.xdist_group("triton")]

KINDS = ("bfloat16", "8bit")
SHAPES = ((6, 3), (5,), (), (0,), (600,), (1100,))


def start(rng, dtype="float32", shapes=SHAPES, **options):
    params = [parameter(rng, shape, dtype) for shape in shapes]
    return Adamax(params, **{"lr": 0.05, **options})


def copies_of(optimizer):
    """A fresh optimizer of the same groups, for parameters with the same numbers."""
    groups = [
        {**group, "params": list(map(copy_of, group["params"]))}
        for group in optimizer.param_groups
    ]
    return Adamax(groups)


def copy_of(param):
    return torch.nn.Parameter(param.detach().clone())


def gradients_of(rng, optimizer, dtype="float32", steps=4):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[draw(rng, p.shape, dtype) for p in params] for _ in range(steps)]


def assert_as_on_the_cpu(optimizer, gradients, monkeypatch, equal=True):
    """Take steps here and with the native core.

    Without ``equal`` sums are rounded in other places, so that a code may be another one.
    """
    on_cpu = copies_of(optimizer)
    take_steps(optimizer, gradients)
    with monkeypatch.context() as patched:
        patched.setattr(device, "DEVICE", device.Device())
        take_steps(on_cpu, gradients)
    actual, expected = contents(optimizer), contents(on_cpu)
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        assert_close(actual[name], wanted, name, equal or name.endswith(("frame", "step")))


def assert_close(actual, wanted, name, equal):
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype), name
    of_state = name.split(".")[1] != "w"
    actual, wanted = actual.astype(float), wanted.astype(float)
    if of_state and equal:
        np.testing.assert_array_equal(actual, wanted, err_msg=name)
        return
    # An element may be rounded to the other side, here and there.
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted), err_msg=name)
    finite = np.isfinite(wanted)
    near = np.isclose(actual[finite], wanted[finite], rtol=1e-5, atol=1e-6)
    assert near.mean() >= 0.98 if near.size else True, name
    if not of_state:
        # The last place of 16 bits, of numbers up to 8.
        assert np.abs(actual - wanted)[finite].max(initial=0) <= 2.0**-5, name


# --- On elements --------------------------------------------------------------------------


@triton.jit
def _bits_kernel(to, seed, first, operand: tl.constexpr, block: tl.constexpr):
    seed = mixed(seed.to(tl.int64).to(tl.uint64))
    bits = random_bits(seed, tl.load(first), operand, block)
    tl.store(to + tl.arange(0, block), bits.to(tl.int32))


@pytest.mark.parametrize("first", [0, 512, 2**31, 2**32 - 512, 2**32, 5 * 2**32 + 1024])
@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**64 - 3])
def test_random_bits_are_those_of_the_cpu(seed, first):
    for operand in range(3):
        to = torch.zeros(512, dtype=torch.int32)
        signed = seed - 2**64 if seed >= 2**63 else seed
        _bits_kernel[(1,)](to, signed, torch.tensor(first), operand=operand, block=512)
        expected = compact.random_bits(seed, operand, first + np.arange(512))
        np.testing.assert_array_equal(to.numpy(), expected.astype(np.int32))


# --- Dense gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_state_is_that_of_the_cpu(rng, monkeypatch, kind, dtype, stochastic):
    options = {"state_dtype": kind, "stochastic_rounding": stochastic}
    optimizer = start(rng, dtype, **options)
    assert_as_on_the_cpu(optimizer, gradients_of(rng, optimizer, dtype), monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.5, 0.9)},  # whose frame goes round every other step
        {"betas": (0.0, 0.0)},
        {"betas": (0.0, 0.5), "eps": 0.0},
        {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"fused": True, "lr": torch.tensor(0.03, dtype=torch.float64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_do_as_on_the_cpu(rng, monkeypatch, kind, options):
    optimizer = start(rng, state_dtype=kind, **options)
    assert_as_on_the_cpu(optimizer, gradients_of(rng, optimizer, steps=7), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_all_sizes_do_as_on_the_cpu(monkeypatch, kind):
    """Beyond both ends of the range of codes, and what is not finite."""
    sizes = torch.exp2(torch.arange(-60.0, 60.0, 0.25))
    broken = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, 1e-45])
    first = torch.cat([sizes, -sizes, broken])
    second = torch.cat([sizes * 1e-3, sizes, torch.zeros(7)])
    optimizer = Adamax([torch.nn.Parameter(torch.ones_like(first))], state_dtype=kind)
    assert_as_on_the_cpu(optimizer, [[first], [second], [second]], monkeypatch)


@pytest.mark.parametrize("programs", [1, 2, 8192])
def test_any_number_of_programs_gives_the_same_bits(rng, monkeypatch, programs):
    optimizer = start(rng, "bfloat16", ((3000,), (7,)), state_dtype="8bit")
    optimizer.param_groups[0]["stochastic_rounding"] = True
    monkeypatch.setattr(cuda.kernels(), "PROGRAMS", programs)
    assert_as_on_the_cpu(optimizer, gradients_of(rng, optimizer, "bfloat16"), monkeypatch)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_do_as_on_the_cpu(rng, monkeypatch, kind, layout):
    numbers = draw(rng, (2, 3, 4, 5))
    views = {
        "channels last": numbers.to(memory_format=torch.channels_last),
        "transposed": numbers.permute(3, 2, 1, 0),
        "holes": torch.stack([numbers, numbers], -1)[..., 1],
    }
    param = torch.nn.Parameter(views[layout])
    optimizer = Adamax([param], state_dtype=kind)
    gradients = [draw(rng, param.shape) for _ in range(3)]
    other = Adamax([torch.nn.Parameter(views[layout].clone())], state_dtype=kind)
    take_steps(optimizer, [[gradient] for gradient in gradients])
    with monkeypatch.context() as patched:
        patched.setattr(device, "DEVICE", device.Device())
        take_steps(other, [[gradient] for gradient in gradients])
    for name, wanted in contents(other).items():
        assert_close(contents(optimizer)[name], wanted, name, equal=True)


def test_memory_need_not_begin_at_16_bytes(rng):
    whole = draw(rng, (1101,), "bfloat16")
    expected = None
    for param in (whole[1:].clone(), whole[1:]):
        optimizer = Adamax(
            [torch.nn.Parameter(param)], state_dtype="8bit", stochastic_rounding=True
        )
        gradient = torch.linspace(-1, 1, 1100, dtype=torch.bfloat16)
        take_steps(optimizer, [[gradient]] * 3)
        expected = expected or contents(optimizer)
        assert_same_contents(optimizer, expected)


def test_kinds_in_one_group_are_stepped_apart(rng):
    """State that there was when the option was changed stays as it is."""
    params = [parameter(rng, (40,)) for _ in range(2)]
    optimizer = Adamax(params, lr=0.1)
    params[0].grad = torch.ones(40)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    params[1].grad = torch.ones(40)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    kinds = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert kinds == [torch.float32, torch.int8]
    assert all((p != old).all() for p, old in zip(params, before, strict=True))


def test_bfloat16_parameters_move_with_stochastic_rounding():
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = Adamax([param], lr=1e-3, stochastic_rounding=stochastic)
        take_steps(optimizer, [[torch.ones_like(param)]] * 50)
        moved = 1 - param.detach().float().mean().item()
        assert moved == pytest.approx(0.05 if stochastic else 0, rel=0.1)


# --- Sparse gradients ---------------------------------------------------------------------


def rows(rng, shape, dtype="float32", count=9, distinct=True):
    table = shape[0]
    ids = rng.permutation(table)[:count] if distinct else rng.integers(table, size=count)
    return rows_of(draw(rng, (count, *shape[1:]), dtype), ids, shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40,), (40, 7), (40, 0), (40, 128), (40, 1100)])
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_rows_do_as_on_the_cpu(rng, monkeypatch, kind, shape, dtype):
    options = {"state_dtype": kind, "stochastic_rounding": True}
    optimizer = start(rng, dtype, [shape], betas=(0.5, 0.9), **options)
    gradients = [[rows(rng, shape, dtype)] for _ in range(6)]
    assert_as_on_the_cpu(optimizer, gradients, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [60, 700])
def test_repeats_are_summed(rng, monkeypatch, kind, count):
    """In float32, where the native core has float64."""
    optimizer = start(rng, shapes=[(20, 5)], state_dtype=kind)
    gradients = [[rows(rng, (20, 5), count=count, distinct=False)] for _ in range(2)]
    assert_as_on_the_cpu(optimizer, gradients, monkeypatch, equal=False)


def test_several_sparse_dimensions(rng, monkeypatch):
    at = np.array([[0, 2, 1, 1], [1, 0, 0, 1]])
    optimizer = start(rng, shapes=[(3, 2, 5)], state_dtype="bfloat16")
    gradients = [[rows_of(draw(rng, (4, 5)), at, (3, 2, 5))] for _ in range(3)]
    assert_as_on_the_cpu(optimizer, gradients, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_are_left_alone(rng, kind):
    optimizer = start(rng, shapes=[(40, 7)], state_dtype=kind)
    take_steps(optimizer, [[rows(rng, (40, 7), count=40)]])
    before, gradient = contents(optimizer), rows(rng, (40, 7))
    take_steps(optimizer, [[gradient]])
    touched = np.zeros(40, bool)
    touched[gradient._indices()[0].numpy()] = True
    for name, after in contents(optimizer).items():
        if after.shape:
            changed = (after != before[name]).reshape(40, -1).any(1)
            assert not changed[~touched].any(), name
            assert changed[touched].mean() > 0.9 or name == "0.exp_inf", name


def test_a_table_takes_dense_gradients_too(rng, monkeypatch):
    optimizer = start(rng, shapes=[(20, 4), (3,)], state_dtype="8bit")
    of_steps = [
        [draw(rng, (20, 4)), draw(rng, (3,))],
        [rows(rng, (20, 4)), draw(rng, (3,))],
        [draw(rng, (20, 4)), draw(rng, (3,))],
        [rows(rng, (20, 4)), draw(rng, (3,))],
    ]
    in_float32 = copies_of(optimizer)
    in_float32.param_groups[0]["state_dtype"] = "float32"
    assert_as_on_the_cpu(optimizer, of_steps, monkeypatch)
    take_steps(in_float32, of_steps)
    [table, _] = optimizer.param_groups[0]["params"]
    [expected, _] = in_float32.param_groups[0]["params"]
    assert optimizer.state[table]["frame"].shape == (20,)
    assert (table - expected).abs().mean() < 0.01  # a step moves by up to 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_positions_in_a_step_are_those_of_the_cpu(rng, monkeypatch, kind):
    """In several groups, of dense and sparse gradients and of several dtypes."""
    shapes = [(9, 4), (5,), (9, 4), (6, 3)]
    groups = [
        {"params": [parameter(rng, shape) for shape in shapes]},
        {"params": [parameter(rng, shape, "bfloat16") for shape in shapes], "lr": 0.1},
    ]
    optimizer = Adamax(groups, state_dtype=kind, stochastic_rounding=True)
    of_steps = [
        [
            draw(rng, shape, dtype) if i % 2 else rows(rng, shape, dtype, count=5)
            for dtype in ("float32", "bfloat16")
            for i, shape in enumerate(shapes)
        ]
        for _ in range(3)
    ]
    assert_as_on_the_cpu(optimizer, of_steps, monkeypatch)


# --- Nothing is waited for ----------------------------------------------------------------


def everything(rng, kind):
    shapes = ((6, 3), (5,), (9, 4), (9, 4))
    options = {"state_dtype": kind, "stochastic_rounding": True}
    optimizer = start(rng, "bfloat16", shapes, lr=torch.tensor(0.1), **options)
    dense = [draw(rng, shape, "bfloat16") for shape in shapes[:2]]
    of_tables = [rows(rng, shape, "bfloat16", count=5) for shape in shapes[2:]]
    return optimizer, [*dense, *of_tables]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back(rng, kind):
    optimizer, gradients = everything(rng, kind)
    for _ in range(3):
        set_gradients(optimizer, gradients)
        with NothingIsRead():
            optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_found_infinities_skip_the_step(rng, kind):
    """And the next one is as if nothing had been, to the frames and the random bits."""
    optimizer, gradients = everything(rng, kind)
    plain = copies_of(optimizer)
    take_steps(optimizer, [gradients])
    take_steps(plain, [gradients])
    set_gradients(optimizer, [gradient * math.inf for gradient in gradients])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with NothingIsRead():
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_same_contents(optimizer, plain)
    take_steps(optimizer, [gradients])
    take_steps(plain, [gradients])
    assert_same_contents(optimizer, plain)


# --- State --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_checkpoint_is_not_having_stopped(rng, kind, sparse):
    optimizer = start(rng, "bfloat16", [(9, 4)], state_dtype=kind, stochastic_rounding=True)
    gradients = [rows(rng, (9, 4), "bfloat16", 5) for _ in range(4)]
    if not sparse:
        gradients = [gradient.to_dense() for gradient in gradients]
    take_steps(optimizer, [[gradient] for gradient in gradients[:2]])
    other = copies_of(optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert_same_contents(other, optimizer)
    for one in (optimizer, other):
        take_steps(one, [[gradient] for gradient in gradients[2:]])
    assert_same_contents(other, optimizer)


def test_frames_are_beside_their_parameters():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    [group] = Adamax([torch.ones(3)], state_dtype="8bit").param_groups
    new = state.state_of(param, group)
    assert new["frame"].is_meta
    given = {
        "exp_avg": torch.ones(3, dtype=torch.int8, device="meta"),
        "exp_inf": torch.ones(3, dtype=torch.uint8, device="meta"),
        "frame": torch.zeros(1),
    }
    assert state.converted(param, given, "8bit")["frame"].is_meta


# --- What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen", [{"state_dtype": kind} for kind in KINDS] + [{"stochastic_rounding": True}]
)
def test_rows_of_a_transposed_table_are_refused(rng, chosen):
    w = torch.nn.Parameter(draw(rng, (7, 9), "bfloat16").t())
    dense = parameter(rng, (3,), "bfloat16")
    optimizer = Adamax([dense, w], **chosen)
    gradient = rows_of(draw(rng, (5, 7), "bfloat16"), rng.integers(9, size=5), (9, 7))
    set_gradients(optimizer, [draw(rng, (3,), "bfloat16"), gradient])
    before = numpy_of(dense)
    with pytest.raises(RuntimeError, match=r"^compact state .* rows lie in their order"):
        optimizer.step()
    assert not optimizer.state
    assert (numpy_of(dense) == before).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "must be a contiguous float32 tensor on cpu, got None"),
        (torch.zeros(1, dtype=torch.float64), "must be a contiguous float32 tensor"),
        (torch.zeros(2)[::2], None),
        (torch.zeros(18)[::2], "must be a contiguous float32 tensor"),
        (torch.zeros(1, device="meta"), "must be a contiguous float32 tensor on cpu"),
        (torch.zeros(4), "must have 1 or 9 elements, got 4"),
    ],
)
def test_a_broken_frame_changes_nothing(rng, frame, message, sparse):
    optimizer = start(rng, shapes=[(9, 4)], state_dtype="8bit")
    [w] = optimizer.param_groups[0]["params"]
    gradient = rows(rng, (9, 4), count=3)
    gradient = gradient if sparse else gradient.to_dense()
    take_steps(optimizer, [[gradient]])
    optimizer.state[w]["frame"] = frame
    if message is None:
        take_steps(optimizer, [[gradient]])
        return
    before, step = w.detach().clone(), optimizer.state[w]["step"].clone()
    set_gradients(optimizer, [gradient])
    with pytest.raises(ValueError, match=rf"^frame of parameter 0 of group 0 {message}"):
        optimizer.step()
    assert_same_tensor(w.detach(), before)
    assert optimizer.state[w]["step"] == step


# --- sparse="exact" -----------------------------------------------------------------------


def exact_run(start_of, gradients, turns=(), **options):
    """Steps on rows that are read before; all are flushed after the steps in ``turns``."""
    w = torch.nn.Parameter(start_of.clone())
    optimizer = Adamax([w], lr=0.05, sparse="exact", **options)
    for step, gradient in enumerate(gradients):
        optimizer.catch_up(w, gradient._indices()[0])
        take_steps(optimizer, [[gradient]])
        if step in turns:
            optimizer.flush()
    optimizer.flush()
    return optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [3, 600])
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_exact_mode_does_as_on_the_cpu(rng, monkeypatch, kind, width, dtype):
    numbers = draw(rng, (12, width), dtype)
    gradients = [rows(rng, numbers.shape, dtype, count=3) for _ in range(9)]
    options = {"state_dtype": kind, "stochastic_rounding": True, "turns": (3, 6)}
    ours = exact_run(numbers, gradients, **options)
    with monkeypatch.context() as patched:
        patched.setattr(device, "DEVICE", device.Device())
        on_cpu = exact_run(numbers, gradients, **options)
    for name, wanted in contents(on_cpu).items():
        actual = contents(ours)[name]
        assert_close(actual, wanted, name, name.endswith("step"))
