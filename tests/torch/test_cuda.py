"""``adamax.torch.Adamax`` on an NVIDIA GPU: ``pytest -m cuda``."""

import copy

import numpy as np
import pytest

from cases import PATTERNS
from frameworks import framework
from torch_cases import (
    DTYPES,
    OPTIONS,
    assert_same_contents,
    assert_same_tensor,
    check_step,
    contents,
    draw,
    follow,
    rows_of,
    set_gradients,
    take_steps,
    torch,
)
from torch_on_gpu import DEVICE, gpu  # noqa: F401  (a fixture)

from adamax.torch import Adamax, clip_grad_norm_, clip_grad_value_  # isort: skip

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def parameter(rng, shape, dtype="float32", device=None):
    return torch.nn.Parameter(draw(rng, shape, dtype).to(device or DEVICE))


def sparse(rng, ids, shape, dtype="float32"):
    values = draw(rng, (len(ids), *shape[1:]), dtype)
    return rows_of(values, np.array(ids), shape).to(DEVICE)


def start(rng, dtype="float32", shapes=((6, 3), (5,), (), (0,), (5000,)), **options):
    return Adamax([parameter(rng, shape, dtype) for shape in shapes], **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients_of(rng, optimizer, dtype="float32", steps=3):
    return [
        [draw(rng, p.shape, dtype).to(DEVICE) for p in params_of(optimizer)]
        for _ in range(steps)
    ]


def copy_of(optimizer, device=None, **options):
    """A fresh one with the same options, for parameters with the same numbers."""
    [group] = optimizer.param_groups
    params = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in group["params"]]
    return Adamax([{**group, **options, "params": params}])


def kernels_of(function):
    """The names of what the GPU ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type.name == "CUDA"]


# --- Dense gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@dtypes
def test_steps_follow_the_oracle(rng, dtype, options):
    optimizer = start(rng, dtype, **OPTIONS[options])
    follow(optimizer, gradients_of(rng, optimizer, dtype))


@pytest.mark.parametrize("length", [1, 511, 512, 513, 100_003, (1 << 23) + 77])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_length(rng, dtype, length):
    optimizer = start(rng, dtype, shapes=((length,), (3,)), lr=0.1)
    follow(optimizer, gradients_of(rng, optimizer, dtype, steps=1))


def test_more_elements_than_an_int32_counts():
    count = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 14 * count:
        pytest.skip("needs 28 GiB of GPU memory")
    w = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    w.grad = torch.zeros_like(w)
    w.grad[-3:] = torch.tensor([1.0, -1.0, 2.0])
    Adamax([w], lr=0.5).step()
    assert w[-4:].tolist() == [0.0, -0.5, 0.5, -0.5]
    assert not w[:-3].any()


@pytest.mark.parametrize("offset", range(1, 5))
def test_memory_need_not_begin_at_16_bytes(rng, offset):
    room = torch.zeros(5000 + offset, device=DEVICE)
    w = torch.nn.Parameter(room[offset:].copy_(draw(rng, (5000,))))
    optimizer = Adamax([w], lr=0.1)
    for _ in range(2):
        w.grad = torch.zeros(5003, device=DEVICE)[3:].copy_(draw(rng, (5000,)))
        check_step(optimizer)


@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_parameter", [torch.contiguous_format, torch.channels_last])
def test_layouts_in_memory(rng, of_parameter, of_gradient):
    numbers = draw(rng, (2, 3, 4, 5)).to(DEVICE)
    w = torch.nn.Parameter(numbers.to(memory_format=of_parameter))
    optimizer = Adamax([w])
    for _ in range(2):
        gradient = draw(rng, w.shape).to(DEVICE)
        w.grad = gradient.to(memory_format=of_gradient)
        check_step(optimizer)


@pytest.mark.parametrize("sparse_too", [False, True])
def test_a_step_on_the_cpu_is_the_same_to_rounding(rng, sparse_too):
    shapes = ((300_001,), (2000, 33))
    on_gpu = start(rng, shapes=shapes, lr=0.1, weight_decay=0.01)
    on_cpu = copy_of(on_gpu, "cpu")
    for _ in range(3):
        [gradients] = gradients_of(rng, on_gpu, steps=1)
        if sparse_too:
            ids = rng.permutation(2000)[:700]
            gradients[1] = sparse(rng, ids, (2000, 33))
        take_steps(on_gpu, [gradients])
        take_steps(on_cpu, [[gradient.cpu() for gradient in gradients]])
    expected = contents(on_cpu)
    for name, actual in contents(on_gpu).items():
        np.testing.assert_allclose(
            actual, expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_runs_are_equal_bit_for_bit(rng):
    ids = np.minimum(rng.zipf(1.2, size=40_000), 5000) - 1
    gradients = [draw(rng, (200_001,)).to(DEVICE), sparse(rng, ids, (5000, 64))]
    first = start(rng, shapes=((200_001,), (5000, 64)))
    second = copy_of(first)
    for optimizer in (first, second):
        take_steps(optimizer, [gradients] * 3)
    assert_same_contents(first, second)


def test_one_launch_for_hundreds_of_parameters(rng):
    optimizer = start(rng, shapes=[(n % 7 + 1, 64) for n in range(300)])
    gradients = gradients_of(rng, optimizer, steps=3)
    take_steps(optimizer, gradients[:2])
    set_gradients(optimizer, gradients[2])
    torch.cuda.synchronize()
    launched = kernels_of(optimizer.step)
    assert sum("_dense_step" in name for name in launched) == 1
    assert len(launched) <= 5, launched  # besides, addresses of gradients are copied


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_the_default_is_our_own_kernels(rng, options):
    optimizer = start(rng, **options)
    set_gradients(optimizer, gradients_of(rng, optimizer)[0])
    assert any("_dense_step" in name for name in kernels_of(optimizer.step))
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cuda"}


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": False}], ids=str)
def test_other_paths_still_serve(rng, options):
    optimizer = start(rng, **options)
    gradients = gradients_of(rng, optimizer)
    set_gradients(optimizer, gradients[0])
    assert not any("_dense_step" in name for name in kernels_of(optimizer.step))
    follow(optimizer, gradients[1:])


def test_parameters_on_every_device(rng):
    places = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    optimizer = Adamax([parameter(rng, (9, 2), device=place) for place in places])
    for _ in range(3):
        for p in params_of(optimizer):
            p.grad = draw(rng, p.shape).to(p.device)
        check_step(optimizer)


# --- Nothing is waited for ----------------------------------------------------------------


def everything(rng, **options):
    """Dense gradients, and sparse ones of one and of two sparse dimensions."""
    optimizer = start(rng, shapes=((60, 3), (5,), (90, 4), (3, 2, 5)), **options)
    gradients = [
        draw(rng, (60, 3)).to(DEVICE),
        draw(rng, (5,)).to(DEVICE),
        sparse(rng, rng.integers(90, size=70), (90, 4)),
        rows_of(draw(rng, (4, 5)), np.array([[0, 2, 2, 1], [1, 0, 0, 1]]), (3, 2, 5)).to(
            DEVICE
        ),
    ]
    return optimizer, gradients


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_a_step_waits_for_nothing(rng, lr_on_device, capturable, scaled):
    lr = torch.tensor(0.1, device=DEVICE) if lr_on_device else 0.1
    optimizer, gradients = everything(rng, lr=lr, capturable=capturable)
    take_steps(optimizer, [gradients])
    for _ in range(2):
        set_gradients(optimizer, [g * 8.0 if scaled else g for g in gradients])
        if scaled:
            optimizer.grad_scale = torch.tensor(8.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("rows_too", [False, True])
def test_steps_in_a_cuda_graph(rng, rows_too):
    """Gradients and the learning rate change from one replay to the next."""
    lr = torch.tensor(0.1, device=DEVICE)
    shapes = ((50, 4), (7,), (3000,))
    captured = start(rng, shapes=shapes, lr=lr, capturable=True, weight_decay=0.1)
    eager = copy_of(captured)
    ids = torch.tensor(rng.integers(50, size=200), device=DEVICE)

    def drawn():
        gradients = gradients_of(rng, captured, steps=1)[0]
        if rows_too:
            gradients[0] = rows_of(draw(rng, (200, 4)).to(DEVICE), ids, (50, 4))
        return gradients

    static = drawn()
    for p, gradient in zip(params_of(captured), static, strict=True):
        p.grad = gradient
    for p, gradient in zip(params_of(eager), static, strict=True):
        p.grad = gradient.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for rate in (0.1, 0.05, 0.0, 0.2):
        lr.fill_(rate)
        new = drawn()
        for target, source in zip(static, new, strict=True):
            (target._values() if target.is_sparse else target).copy_(
                source._values() if source.is_sparse else source
            )
        graph.replay()
        set_gradients(eager, new)
        eager.step()
        assert_same_contents(captured, eager)
    # Steps outside of the graph do not disturb what it reads.
    follow(captured, [drawn()])
    take_steps(eager, [[p.grad for p in params_of(captured)]])
    for target, source in zip(static, new, strict=True):
        (target._values() if target.is_sparse else target).copy_(
            source._values() if source.is_sparse else source
        )
    graph.replay()
    set_gradients(eager, new)
    eager.step()
    assert_same_contents(captured, eager)


def test_steps_on_several_streams(rng):
    optimizer = start(rng)
    gradients = gradients_of(rng, optimizer, steps=6)
    plain = take_steps(copy_of(optimizer), gradients)
    for i, of_this_step in enumerate(gradients):
        set_gradients(optimizer, of_this_step)
        stream = torch.cuda.Stream() if i % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_same_contents(optimizer, plain)


# --- Loss scaling -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_grad_scaler(rng, dtype):
    optimizer = start(rng, dtype, lr=0.1)
    plain = copy_of(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    for broken in (False, True, False):
        shapes = [p.shape for p in params_of(optimizer)]
        gradients = [torch.randn(s, device=DEVICE).to(DTYPES[dtype]) for s in shapes]
        scale = scaler.get_scale()
        set_gradients(optimizer, [gradient * scale for gradient in gradients])
        if broken:
            params_of(optimizer)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if broken else scale)
        if not broken:
            take_steps(plain, [gradients])
        assert_same_contents(optimizer, plain)


# --- Sparse gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_rows_follow_the_oracle(rng, dtype, pattern):
    w = parameter(rng, (40, 7), dtype)
    optimizer = Adamax([w], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        ids = PATTERNS[pattern](rng, 40).copy()
        follow(optimizer, [[sparse(rng, ids, (40, 7), dtype)]])


@pytest.mark.parametrize("width", [1, 4, 100, 128, 768, 1100])
@pytest.mark.parametrize("longest", [1, 2, 130, 5000, 40_000])
def test_runs_of_any_length(rng, longest, width):
    ids = np.concatenate([np.full(longest, 3), np.arange(100, 200), np.full(300, 250)])
    w = parameter(rng, (300, width))
    follow(Adamax([w]), [[sparse(rng, rng.permutation(ids), (300, width))]])


def test_a_step_needs_memory_for_the_batch_alone(rng):
    w = torch.nn.Parameter(torch.zeros(2_000_000, 64, device=DEVICE))
    optimizer = Adamax([w])
    gradient = sparse(rng, rng.integers(2_000_000, size=4096), w.shape)
    take_steps(optimizer, [[gradient]])
    w.grad = gradient
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4e6  # of a table of 512 MB


def test_embeddings(rng):
    embedding = torch.nn.EmbeddingBag(500, 16, sparse=True).to(DEVICE)
    linear = torch.nn.Linear(16, 1).to(DEVICE)
    optimizer = Adamax([*embedding.parameters(), *linear.parameters()], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        ids = torch.tensor(rng.integers(500, size=(32, 20)), device=DEVICE)
        linear(embedding(ids)).square().mean().backward()
        check_step(optimizer)


def test_an_index_out_of_range_stops_the_device(run_python):
    program = """
        import torch
        from adamax.torch import Adamax
        w = torch.nn.Parameter(torch.zeros(5, 2, device="cuda"))
        w.grad = torch.sparse_coo_tensor(
            torch.tensor([[3, 5]], device="cuda"),
            torch.ones(2, 2, device="cuda"),
            (5, 2),
            check_invariants=False,
        )
        try:
            Adamax([w]).step()
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("assert" in str(error))
    """
    assert run_python(program, CUDA_LAUNCH_BLOCKING="0").endswith("True")


def test_clipping_sparse_gradients(rng):
    w = parameter(rng, (50, 4))
    w.grad = sparse(rng, [3, 3, 7, 49], (50, 4))
    dense = w.grad.to_dense()
    norm = clip_grad_norm_([w], 0.5)
    torch.testing.assert_close(norm, dense.norm())
    torch.testing.assert_close(w.grad.to_dense(), dense * (0.5 / (dense.norm() + 1e-6)))
    clip_grad_value_([w], 0.01)
    assert w.grad.is_sparse
    assert w.grad.to_dense().abs().max() <= 0.01


# --- torch.compile and checkpoints --------------------------------------------------------


def test_compiled_steps(rng):
    framework("torch._inductor.compile_fx")  # which warns when it is imported
    optimizer = start(rng, lr=0.1)
    plain = copy_of(optimizer)
    gradients = gradients_of(rng, optimizer)
    compiled = torch.compile(optimizer.step)
    for of_this_step in gradients:
        set_gradients(optimizer, of_this_step)
        compiled()
    assert_same_contents(optimizer, take_steps(plain, gradients))


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpoints_cross_to_the_kernels_and_back(rng, device, way):
    first = start(rng)
    take_steps(first, gradients_of(rng, first))
    second = copy_of(first, device, **{"foreach": None, "fused": None} | way)
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0].update(foreach=None, fused=None)
    saved["param_groups"][0].update(way)
    second.load_state_dict(saved)
    assert_same_contents(second, first)
    third = copy_of(second, DEVICE, foreach=None, fused=None)
    saved = copy.deepcopy(second.state_dict())
    saved["param_groups"][0].update(foreach=None, fused=None)
    third.load_state_dict(saved)
    gradients = gradients_of(rng, first)
    take_steps(first, gradients)
    take_steps(third, gradients)
    assert_same_contents(third, first)


def test_pickled_optimizers_go_on(rng):
    optimizer = start(rng)
    take_steps(optimizer, gradients_of(rng, optimizer))
    other = copy.deepcopy(optimizer)
    gradients = gradients_of(rng, optimizer)
    take_steps(optimizer, gradients)
    take_steps(other, gradients)
    for a, b in zip(params_of(optimizer), params_of(other), strict=True):
        assert_same_tensor(a, b)


# --- Exact mode ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_exact_mode_is_the_trajectory_of_dense_gradients(dtype, decay):
    results = []
    for is_sparse in (True, False):
        torch.manual_seed(5)
        table = torch.nn.Embedding(200, 70, sparse=is_sparse, dtype=dtype).to(DEVICE)
        mode = "exact" if is_sparse else "lazy"
        options = {"weight_decay": decay, "decoupled_weight_decay": True, "sparse": mode}
        optimizer = Adamax(table.parameters(), lr=0.05, **options)
        if is_sparse:
            optimizer.attach(table)
        for step in range(300):
            ids = np.random.default_rng(step).integers(200, size=30)
            optimizer.zero_grad()
            table(torch.tensor(ids, device=DEVICE)).square().mean().backward()
            optimizer.step()
        optimizer.flush()
        results.append(contents(optimizer))
    exact, dense = results
    tolerance = 1e-4 if dtype is torch.float32 else 1e-12
    for name, expected in dense.items():
        np.testing.assert_allclose(
            exact[name], expected, rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_exact_mode_waits_for_nothing(rng):
    w = torch.nn.Parameter(draw(rng, (500, 64)).to(DEVICE))
    optimizer = Adamax([w], sparse="exact")
    ids = torch.tensor(rng.integers(500, size=90), device=DEVICE)
    gradient = rows_of(draw(rng, (90, 64)).to(DEVICE), ids, (500, 64))
    for step in range(4):
        w.grad = gradient.clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.catch_up(w, ids)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_row_that_was_behind_stops_the_device(run_python):
    program = """
        import torch
        from adamax.torch import Adamax
        w = torch.nn.Parameter(torch.zeros(5, 2, device="cuda"))
        optimizer = Adamax([w], sparse="exact")
        try:
            for ids in ([1], [1, 3]):
                w.grad = torch.sparse_coo_tensor(
                    torch.tensor([ids], device="cuda"),
                    torch.ones(len(ids), 2, device="cuda"),
                    (5, 2),
                    check_invariants=False,
                )
                optimizer.step()
                torch.cuda.synchronize()
        except RuntimeError as error:
            print("assert" in str(error))
    """
    assert run_python(program).endswith("True")
