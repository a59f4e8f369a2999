"""The Triton kernels and what launches them, through Triton's interpreter on the CPU."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest

from adamax._core.rule import Hyperparameters, scalars_of, step_size
from cases import PATTERNS, PRECISION
from torch_cases import (
    DTYPES,
    OPTIONS,
    assert_same_contents,
    assert_same_tensor,
    check_step,
    contents,
    draw,
    follow,
    numpy_of,
    parameter,
    rows_of,
    set_gradients,
    take_steps,
    torch,
    touched,
)
from torch_on_host import Host, NothingIsRead, host  # noqa: F401  (a fixture)

from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from torch.utils._pytree import tree_leaves  # isort: skip
from adamax.torch import Adamax, cuda, device  # isort: skip  (not without torch)
from adamax.torch.batch import Scaling  # isort: skip
from adamax.torch.options import DEFAULTS, Options  # isort: skip

pytestmark = [
    pytest.mark.usefixtures("host"),
    # One process imports Triton and has its interpreter ready.
    pytest.mark.xdist_group("triton"),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES)
SHAPES = ((6, 3), (5,), (), (0,), (600,))


def start(rng, dtype="float32", shapes=SHAPES, **options):
    return Adamax([parameter(rng, shape, dtype) for shape in shapes], **options)


def gradients_of(rng, optimizer, dtype="float32", steps=2):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[draw(rng, p.shape, dtype) for p in params] for _ in range(steps)]


def copy_of(optimizer, **options):
    """A fresh one with the same options, for parameters with the same numbers."""
    [group] = optimizer.param_groups
    params = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    return Adamax([{**group, **options, "params": params}])


@pytest.fixture
def kernels(host):  # noqa: F811
    return cuda.kernels()


# --- Dense gradients ----------------------------------------------------------------------


@dtypes
def test_steps_follow_the_oracle(rng, dtype):
    optimizer = start(rng, dtype, lr=0.1)
    follow(optimizer, gradients_of(rng, optimizer, dtype, steps=3))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_follow_the_oracle(rng, options, dtype):
    optimizer = start(rng, dtype, ((7, 2), (3,)), **OPTIONS[options])
    follow(optimizer, gradients_of(rng, optimizer, dtype))


@dtypes
def test_the_cpu_kernels_get_the_same_to_rounding(rng, dtype, monkeypatch):
    """Three steps; what differs is the last bit of a step size in float64."""
    optimizer = start(rng, dtype, lr=0.1, weight_decay=0.1)
    gradients = gradients_of(rng, optimizer, dtype, steps=3)
    on_cpu = copy_of(optimizer)
    take_steps(optimizer, gradients)
    monkeypatch.setattr(device, "DEVICE", device.Device())
    take_steps(on_cpu, gradients)
    for name, expected in contents(on_cpu).items():
        actual = contents(optimizer)[name]
        roundoff = PRECISION[expected.dtype.name].roundoff
        close = np.abs(actual.astype(float) - expected.astype(float))
        close = close <= 8 * roundoff * np.maximum(np.abs(expected.astype(float)), 0.3)
        assert close.all() or expected.dtype.itemsize == 2, name
        assert_within_one_place(actual, expected, close, name)


def assert_within_one_place(actual, expected, close, name):
    """Of 16 bits, at most the last one differs."""
    if expected.dtype.itemsize == 2:
        places = np.abs(actual.view(np.int16).astype(int) - expected.view(np.int16))
        assert (close | (places <= 1)).all(), name


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1024, 1535, 3000])
@pytest.mark.parametrize("programs", [1, 2, 8192])
def test_any_number_of_programs(rng, kernels, monkeypatch, programs, length):
    """Of blocks that are full and not, of one program or of many."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    shapes = ((length,), (7,), (0,), (1100,))
    optimizer = start(rng, shapes=shapes, lr=0.1)
    gradients = gradients_of(rng, optimizer, steps=1)
    follow(optimizer, gradients)


def test_one_launch_for_many_parameters(rng, kernels, monkeypatch):
    launched = []
    for verb in ("advance", "dense_step"):
        original = getattr(kernels, verb)

        def counted(*args, verb=verb, original=original):
            launched.append(verb)
            original(*args)

        monkeypatch.setattr(kernels, verb, counted)
    optimizer = start(rng, shapes=[(n % 3 + 1,) for n in range(130)])
    follow(optimizer, gradients_of(rng, optimizer, steps=1))
    assert launched == ["advance", "dense_step"]


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("which", ["w", "exp_avg", "exp_inf", "grad"])
def test_memory_need_not_begin_at_16_bytes(rng, which, offset):
    def moved(tensor):
        return torch.zeros(tensor.numel() + offset)[offset:].copy_(tensor)

    w = parameter(rng, (1100,))
    if which == "w":
        w = torch.nn.Parameter(moved(w.detach()))
    optimizer = take_steps(Adamax([w], lr=0.1), [[draw(rng, (1100,))]])
    for name in ("exp_avg", "exp_inf"):
        if which == name:
            optimizer.state[w][name] = moved(optimizer.state[w][name])
    w.grad = draw(rng, (1100,))
    if which == "grad":
        w.grad = moved(w.grad)
    check_step(optimizer)


def layouts_of(start):
    holes = torch.zeros((*start.shape, 2), dtype=start.dtype)
    views = {
        "contiguous": torch.zeros_like(start),
        "channels last": torch.zeros_like(start).to(memory_format=torch.channels_last),
        "transposed": torch.zeros(start.shape[::-1], dtype=start.dtype).permute(3, 2, 1, 0),
        "holes": holes[..., 1],
    }
    return {name: view.copy_(start) for name, view in views.items()}


LAYOUTS = ("contiguous", "channels last", "transposed", "holes")


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layouts_change_nothing(rng, of_parameter, of_gradient, dtype):
    shape = (2, 3, 4, 5)
    numbers = draw(rng, shape, dtype)
    gradients = [draw(rng, shape, dtype) for _ in range(2)]
    expected = take_steps(
        Adamax([torch.nn.Parameter(numbers.clone())], weight_decay=0.1),
        [[gradient] for gradient in gradients],
    )
    w = torch.nn.Parameter(layouts_of(numbers)[of_parameter])
    optimizer = Adamax([w], weight_decay=0.1)
    for gradient in gradients:
        w.grad = layouts_of(gradient)[of_gradient]
        optimizer.step()
    assert_same_contents(optimizer, expected)


def test_parameters_that_overlap_are_stepped_one_after_the_other(rng):
    numbers = draw(rng, (12,))
    slices = slice(0, 9), slice(4, 12)
    gradients = [[draw(rng, numbers[s].shape) for s in slices] for _ in range(3)]
    shared, apart = numbers.clone(), numbers.clone()
    take_steps(Adamax([torch.nn.Parameter(shared[s]) for s in slices]), gradients)
    optimizers = [Adamax([torch.nn.Parameter(apart[s])]) for s in slices]
    for of_this_step in gradients:
        for optimizer, gradient in zip(optimizers, of_this_step, strict=True):
            take_steps(optimizer, [[gradient]])
    assert_same_tensor(shared, apart)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_gradients_are_not_hidden(broken, dtype):
    w = torch.nn.Parameter(torch.ones(3, dtype=DTYPES[dtype]))
    good, bad = torch.ones_like(w), torch.tensor([1.0, broken, 1.0], dtype=w.dtype)
    optimizer = take_steps(Adamax([w]), [[good], [bad], [good]])
    state = optimizer.state[w]
    assert w.isfinite().tolist() == [True, False, True]
    assert state["exp_inf"].isfinite().tolist() == [True, False, True]
    if math.isnan(broken):
        assert state["exp_inf"].isnan().tolist() == [False, True, False]


def test_groups_of_several_dtypes_and_options(rng):
    groups = [
        {"params": [parameter(rng, (4,), d) for d in DTYPES], "lr": 0.1},
        {"params": [parameter(rng, (3, 2), "float32")], "maximize": True},
    ]
    optimizer = Adamax(groups, weight_decay=0.1)
    for _ in range(2):
        for group in groups:
            for p in group["params"]:
                p.grad = draw(rng, p.shape, str(p.dtype).removeprefix("torch."))
        check_step(optimizer)


def test_gradients_come_and_go(rng):
    optimizer = start(rng, shapes=((4,), (5,), (6, 2)))
    for present in ((1, 1, 1), (0, 1, 1), (1, 1, 1), (0, 0, 0), (1, 0, 0), (1, 1, 1)):
        [gradients] = gradients_of(rng, optimizer, steps=1)
        follow(
            optimizer, [[g if p else None for g, p in zip(gradients, present, strict=True)]]
        )


# --- The step size ------------------------------------------------------------------------

BETAS = (0.0, 1e-8, 0.5, 0.9, 0.95, 0.999, 0.99999, 1 - 1e-9, 1 - 2.0**-52)


@pytest.mark.parametrize("beta_1", BETAS)
def test_the_step_size_is_exact_to_float64(kernels, beta_1):
    t = [0.0, 1.0, 5.0, 6.0, 99.0, 1e4, 1e6, 2.0**24 - 1]
    steps = [torch.tensor(count) for count in t]
    table = torch.zeros(len(t), len(kernels.COLUMNS), dtype=torch.int64)
    at = kernels.COLUMNS.index("STEP")
    table[:, at] = torch.tensor([step.data_ptr() for step in steps])
    scalars = torch.full((len(t), kernels.SCALARS), math.nan, dtype=torch.float64)
    group = {**DEFAULTS, "lr": 0.1, "betas": (beta_1, 0.25), "eps": 0.125}
    group |= {"weight_decay": 0.5, "maximize": True}
    of_step = cuda.OfStep.on(
        torch.device("cpu"), Options.from_group(group), Scaling(torch.tensor(8.0))
    )
    arguments = of_step.tensors, of_step.numbers
    kernels.advance(table, torch.float32, scalars, *arguments)
    assert [float(step) for step in steps] == [count + 1 for count in t]
    chosen = Hyperparameters(beta_1=beta_1, beta_2=0.25, epsilon=0.125)
    exact = [
        scalars_of(chosen, step_size(0.1, beta_1, int(count) + 1), 1.0, -1 / 8, 0.5)
        for count in t
    ]
    np.testing.assert_allclose(scalars[:, :7], np.array(exact)[:, :7], rtol=1e-15)
    one = torch.full((1, kernels.SCALARS), math.nan, dtype=torch.float64)
    counter = torch.tensor(4.0)
    kernels.advance(None, counter, one, *arguments)
    assert counter == 5
    assert one[0, 0].item() == pytest.approx(step_size(0.1, beta_1, 5), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_on_the_device_is_read_by_the_kernels(rng, dtype):
    lr = torch.tensor(0.5, dtype=dtype)
    optimizer = start(rng, lr=lr, weight_decay=0.1, decoupled_weight_decay=True)
    for rate in (0.5, 0.25, 0.0, 0.125):
        lr.fill_(rate)
        follow(optimizer, gradients_of(rng, optimizer, steps=1))


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_steps_are_counted_in_either_dtype(rng, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        optimizer = start(rng)
        follow(optimizer, gradients_of(rng, optimizer))
    finally:
        torch.set_default_dtype(before)
    assert {state["step"].dtype for state in optimizer.state.values()} == {default}


# --- Nothing is waited for ----------------------------------------------------------------


def everything(rng, **options):
    """Dense and sparse gradients, of one and of several sparse dimensions."""
    shapes = ((6, 3), (5,), (9, 4), (3, 2, 5))
    optimizer = start(rng, shapes=shapes, **options)
    gradients = [
        draw(rng, (6, 3)),
        draw(rng, (5,)),
        rows_of(draw(rng, (7, 4)), rng.integers(9, size=7), (9, 4)),
        rows_of(draw(rng, (4, 5)), np.array([[0, 2, 2, 1], [1, 0, 0, 1]]), (3, 2, 5)),
    ]
    return optimizer, gradients


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_reads_nothing_back(rng, scaled, capturable):
    lr = torch.tensor(0.1)
    options = {"weight_decay": 0.1, "capturable": capturable}
    optimizer, gradients = everything(rng, lr=lr, **options)
    plain = copy_of(optimizer)
    for _ in range(3):
        set_gradients(
            optimizer, [gradient * 8.0 if scaled else gradient for gradient in gradients]
        )
        if scaled:
            optimizer.grad_scale = torch.tensor(8.0)
            optimizer.found_inf = torch.tensor(0.0)
        with NothingIsRead():
            optimizer.step()
    for _ in range(3):
        set_gradients(plain, gradients)
        check_step(plain)
    assert_same_contents(optimizer, plain)


def test_the_check_for_reads_can_fail():
    with NothingIsRead(), pytest.raises(AssertionError, match="local_scalar"):
        torch.ones(1).item()
    with NothingIsRead(), pytest.raises(AssertionError, match="nonzero"):
        torch.ones(1).nonzero()


# --- Loss scaling -------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_found_infinities_skip_the_step(rng, first):
    """And the next one is as if nothing had been."""
    optimizer, gradients = everything(rng, weight_decay=0.1)
    plain = copy_of(optimizer)
    if not first:
        take_steps(optimizer, [gradients])
        take_steps(plain, [gradients])
    broken = [gradient * math.inf for gradient in gradients]
    set_gradients(optimizer, broken)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with NothingIsRead():
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    if first:
        assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}
    else:
        assert_same_contents(optimizer, plain)
    take_steps(optimizer, [gradients])
    take_steps(plain, [gradients])
    assert_same_contents(optimizer, plain)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_grad_scaler(rng, dtype):
    optimizer = start(rng, dtype, lr=0.1)
    plain = copy_of(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for _ in range(2):
        numbers = torch.randn
        [gradients] = gradients_of(rng, optimizer, dtype, steps=1)
        gradients = [numbers(g.shape, dtype=g.dtype) for g in gradients]
        set_gradients(optimizer, [gradient * 4.0 for gradient in gradients])
        scaler.step(optimizer)
        scaler.update()
        take_steps(plain, [gradients])
        assert_same_contents(optimizer, plain)


# --- Sparse gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_follow_the_oracle(rng, pattern, dtype):
    w = parameter(rng, (40, 7), dtype)
    optimizer = Adamax([w], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        ids = PATTERNS[pattern](rng, 40).copy()
        gradient = rows_of(draw(rng, (ids.size, 7), dtype), ids, (40, 7))
        before = w.detach().clone()
        follow(optimizer, [[gradient]])
        untouched = ~touched(gradient)
        assert_same_tensor(w.detach()[untouched], before[untouched])


@pytest.mark.parametrize(
    "shape", [(40,), (40, 1), (40, 0), (40, 3, 2), (40, 128), (40, 1100)]
)
def test_rows_of_any_length(rng, shape):
    """Shorter than a program's columns, as long, and of several programs."""
    w = parameter(rng, shape)
    ids = rng.integers(40, size=9)
    gradients = [rows_of(draw(rng, (9, *shape[1:])), ids, shape) for _ in range(2)]
    follow(Adamax([w]), [[gradient] for gradient in gradients])


# Runs of equal indices that begin and end inside of chunks and at their bounds (at 128),
# and that take tiles of sums (of 16 chunks) in part and whole.
RUNS = {
    "less than a chunk": (100, 20),
    "two rows at a bound": (127, 2, 5),
    "one chunk": (128,),
    "one chunk and a row": (128, 1),
    "two chunks": (256, 3),
    "chunks inside": (100, 400, 60),
    "from a bound": (128, 300, 1),
    "to a bound": (100, 284, 10),
    "16 chunks": (2048, 7),
    "more than 16 chunks": (5, 2400, 9),
    "many short ones": (1, 2, 3) * 60,
}


@pytest.mark.parametrize("runs", RUNS)
def test_runs_of_any_length(rng, runs):
    ids = np.repeat(np.arange(len(RUNS[runs])), RUNS[runs])
    shuffled = rng.permutation(ids)
    w = parameter(rng, (200, 3))
    follow(Adamax([w]), [[rows_of(draw(rng, (ids.size, 3)), shuffled, (200, 3))]])


def test_repeats_are_added_in_the_same_order_every_time(rng):
    ids = np.minimum(rng.zipf(1.3, size=700), 40) - 1
    gradient = rows_of(draw(rng, (700, 5)), ids, (40, 5))
    numbers = draw(rng, (40, 5))
    first, second = (
        take_steps(Adamax([torch.nn.Parameter(numbers.clone())]), [[gradient]] * 2)
        for _ in range(2)
    )
    assert_same_contents(first, second)


def test_the_table_is_not_copied(rng):
    """Neither whole nor in part: what a step makes depends on the batch alone."""
    w = parameter(rng, (100_000, 8))
    gradient = rows_of(draw(rng, (9, 8)), rng.integers(100_000, size=9), w.shape)
    optimizer = take_steps(Adamax([w]), [[gradient]])
    tables = [w, optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_inf"]]
    theirs = {table.data_ptr() for table in tables}
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **kwargs or {})
            for result in tree_leaves(results):
                dense = isinstance(result, torch.Tensor) and not result.is_sparse
                if dense and result.data_ptr() not in theirs:
                    made.append(result.nbytes)
            return results

    set_gradients(optimizer, [gradient])
    with Made():
        optimizer.step()
    assert made
    assert max(made) <= 9 * 8 * 8


@pytest.mark.parametrize(
    ("index", "values"),
    [([[3, 5]], (2, 2)), ([[-1]], (1, 2)), ([[2**40]], (1, 2)), ([[0, 1], [1, 2]], (2,))],
    ids=["too large", "negative", "huge", "in the second dimension"],
)
def test_an_index_out_of_range_is_an_assertion_of_the_device(rng, index, values):
    w = parameter(rng, (5, 2))
    w.grad = torch.sparse_coo_tensor(
        torch.tensor(index), torch.ones(values), (5, 2), check_invariants=False
    )
    with pytest.raises(Exception, match="index of a sparse gradient is out of range"):
        Adamax([w]).step()


def test_a_transposed_table_takes_the_slow_way(rng):
    w = torch.nn.Parameter(draw(rng, (7, 9)).t())
    gradient = rows_of(draw(rng, (5, 7)), rng.integers(9, size=5), (9, 7))
    optimizer = Adamax([w], lr=0.1)
    follow(optimizer, [[gradient]] * 2)
    optimizer.found_inf = torch.tensor(1.0)
    before = contents(optimizer)
    optimizer.step()
    assert_same_contents(optimizer, before)


# --- Tables on the device -----------------------------------------------------------------


def test_what_does_not_change_is_uploaded_once(rng, host):  # noqa: F811
    optimizer = start(rng)
    [gradients] = gradients_of(rng, optimizer, steps=1)
    set_gradients(optimizer, gradients)
    check_step(optimizer)
    first = len(host.staged)
    check_step(optimizer)
    assert len(host.staged) == first
    held = [p.grad for p in optimizer.param_groups[0]["params"]]  # so memory is other
    set_gradients(optimizer, gradients)
    check_step(optimizer)
    assert len(host.staged) == first + 1
    assert held


def test_another_stream_gets_its_own_tables(rng, host):  # noqa: F811
    optimizer = start(rng)
    follow(optimizer, gradients_of(rng, optimizer, steps=1))
    first = len(host.staged)
    host.of_stream = 7
    check_step(optimizer)
    assert len(host.staged) == first + 1
    check_step(optimizer)
    assert len(host.staged) == first + 1


def test_graphs_keep_what_they_copy_from(rng, host, monkeypatch):  # noqa: F811
    """It was pinned before the capture, and is never written again."""
    monkeypatch.setattr(cuda, "_READ_BY_GRAPHS", kept := [])
    optimizer = start(rng, capturable=True)
    follow(optimizer, gradients_of(rng, optimizer, steps=1))
    staged = len(host.staged)
    host.capturing = True
    check_step(optimizer)
    host.capturing = False
    assert len(kept) == 1
    assert len(host.staged) == staged
    before = [source.clone() for source in kept]
    follow(optimizer, gradients_of(rng, optimizer, steps=3))
    host.capturing = True
    check_step(optimizer)
    assert len(kept) == 2
    assert len({source.data_ptr() for source in kept}) == 2
    for source, copy in zip(kept, before, strict=False):
        assert_same_tensor(source, copy)


def test_state_that_is_replaced_is_seen(rng):
    optimizer = start(rng)
    follow(optimizer, gradients_of(rng, optimizer))
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_inf", "step"):
            state[name] = state[name].clone()
    follow(optimizer, gradients_of(rng, optimizer))
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()
    follow(optimizer, gradients_of(rng, optimizer))


def test_a_parameter_may_be_transposed_in_place(rng):
    w = parameter(rng, (3, 3))
    optimizer = Adamax([w])
    follow(optimizer, [[draw(rng, (3, 3))]])
    with torch.no_grad():
        w.t_()
        for name in ("exp_avg", "exp_inf"):
            optimizer.state[w][name].t_()
    follow(optimizer, [[draw(rng, (3, 3))], [draw(rng, (3, 3)).t()]])


def test_version_counters_advance(rng):
    optimizer, gradients = everything(rng)
    take_steps(optimizer, [gradients])
    versions = [p._version for p in optimizer.param_groups[0]["params"]]
    take_steps(optimizer, [gradients])
    now = [p._version for p in optimizer.param_groups[0]["params"]]
    assert all(a < b for a, b in zip(versions, now, strict=True))


# --- Which way a step takes ---------------------------------------------------------------


@pytest.fixture
def launched(kernels, monkeypatch):
    """The dtypes that were given to the Triton kernels."""
    seen = []
    original = kernels.dense_step

    def counted(dtypes, *args):
        seen.append(str(dtypes[0]).removeprefix("torch."))
        original(dtypes, *args)

    monkeypatch.setattr(kernels, "dense_step", counted)
    return seen


@pytest.mark.parametrize(
    ("options", "serves"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"capturable": True}, True),
        ({"fused": True, "capturable": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"foreach": False, "fused": True}, True),
    ],
    ids=str,
)
def test_options_choose(rng, launched, options, serves):
    optimizer = start(rng, **options)
    follow(optimizer, gradients_of(rng, optimizer, steps=1))
    assert launched == ["float32"] * serves


def test_a_group_on_several_devices(rng, launched, monkeypatch):
    class Float64(Host):
        """The device has what is of float64."""

        def holds(self, tensors):
            return all(tensor.dtype is torch.float64 for tensor in tensors)

    monkeypatch.setattr(device, "DEVICE", Float64())
    dtypes = ("float64", "float32")
    params = [parameter(rng, (4,), dtype) for dtype in dtypes]
    optimizer = Adamax(params)
    gradients = [[draw(rng, (4,), dtype) for dtype in dtypes]] * 2
    follow(optimizer, gradients)
    assert launched == ["float64"] * 2
    before = contents(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert_same_contents(optimizer, before)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    device.has_triton.cache_clear()
    yield
    device.has_triton.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_foreach_serves_with_a_warning_once(rng, launched):
    optimizer = start(rng)
    with pytest.warns(UserWarning, match="need Triton, which is not installed"):
        take_steps(optimizer, gradients_of(rng, optimizer, steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(optimizer, gradients_of(rng, optimizer))
        another = start(rng)
        follow(another, gradients_of(rng, another))
    assert not launched


@pytest.mark.filterwarnings("ignore:adamax has fused CUDA kernels:UserWarning")
@pytest.mark.usefixtures("without_triton")
def test_without_triton_fused_is_an_error(rng, host):  # noqa: F811
    host.holds = lambda tensors: True
    param = torch.nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="with Triton installed, on an NVIDIA GPU"):
        Adamax([param], fused=True).step()


def test_triton_is_imported_when_it_is_needed(run_python):
    program = """
        import sys, torch
        from adamax.torch import Adamax
        w = torch.nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        Adamax([w]).step()
        print("adamax.torch.triton" in sys.modules)
    """
    assert run_python(program) == "False"


# --- Checkpoints --------------------------------------------------------------------------

WAYS = {"triton": {}, "foreach": {"foreach": True}, "loop": {"fused": False}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("old", "new"), list(pairwise([*WAYS, "triton"])))
def test_checkpoints_cross_from_one_way_to_another(rng, old, new, dtype):
    first = start(rng, dtype, **WAYS[old])
    gradients = gradients_of(rng, first, dtype)
    take_steps(first, gradients)
    way = {"fused": None, "foreach": None} | WAYS[new]
    second = copy_of(first, **way)
    saved = first.state_dict()
    saved["param_groups"][0].update(way)
    second.load_state_dict(saved)
    assert_same_contents(first, second)
    follow(second, gradients)


@pytest.mark.parametrize("wrong", [torch.tensor(1), torch.zeros((), device="meta")])
def test_a_counter_that_kernels_cannot_count_is_refused(rng, wrong):
    for gradient in (draw(rng, (4, 2)), rows_of(draw(rng, (3, 2)), [1, 1, 0], (4, 2))):
        w = parameter(rng, (4, 2))
        optimizer = take_steps(Adamax([w]), [[gradient]])
        before = numpy_of(w)
        optimizer.state[w]["step"] = wrong
        with pytest.raises(
            RuntimeError, match=r"step counter .* must be float32 or float64"
        ):
            optimizer.step()
        assert (numpy_of(w) == before).all()
