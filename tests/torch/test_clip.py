"""``clip_grad_norm_`` and ``clip_grad_value_``: torch's own, for sparse gradients too."""

import inspect
import math

import pytest

import oracle
from cases import PRECISION
from torch_cases import (
    DTYPES,
    assert_same_gradient,
    assert_same_tensor,
    oracle_gradient,
    parameter,
    rows_of,
    torch,
)

from adamax.torch import clip_grad_norm_, clip_grad_value_  # isort: skip  (needs torch)

FUNCTIONS = {
    "norm": (clip_grad_norm_, torch.nn.utils.clip_grad_norm_),
    "value": (clip_grad_value_, torch.nn.utils.clip_grad_value_),
}
NORMS = [1, 2, 2.0, 3.5, math.inf, "inf"]
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "complex64": 1e-5}


def with_gradients(rng, dtype="float32", kinds="dsdsc"):
    """Parameters with dense, sparse and coalesced gradients, and one without."""
    params = []
    for kind in kinds:
        param = parameter(rng, (8, 3), dtype)
        gradient = torch.randn(8, 3, dtype=DTYPES[dtype])
        if kind != "d":
            rows = torch.randn(12, 3, dtype=DTYPES[dtype])
            gradient = rows_of(rows, rng.integers(8, size=12), (8, 3))
        param.grad = gradient.coalesce() if kind == "c" else gradient
        params.append(param)
    return [*params, parameter(rng, (4,), dtype)]


def copies_of(params, densified=False):
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for param, copy in zip(params, copies, strict=True):
        if param.grad is not None:
            copy.grad = param.grad.clone()
            if densified:
                copy.grad = copy.grad.to_dense()
    return copies


def assert_same_gradients(params, expected):
    for param, other in zip(params, expected, strict=True):
        assert (param.grad is None) == (other.grad is None)
        if param.grad is not None:
            assert_same_gradient(param.grad, other.grad)


def assert_close(params, dense, dtype):
    """What the sparse gradients of ``params`` stand for is that of ``dense``."""
    tolerance = TOLERANCE.get(dtype, 1e-12)
    for param, other in zip(params, dense, strict=True):
        if param.grad is not None:
            actual = param.grad.to_dense()
            torch.testing.assert_close(actual, other.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_torchs(name):
    ours, theirs = (inspect.signature(f).parameters for f in FUNCTIONS[name])
    assert list(ours) == list(theirs)
    for argument, other in theirs.items():
        assert (ours[argument].default, ours[argument].kind) == (other.default, other.kind)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.1, 1e6])
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_dense_gradients_are_torchs(rng, dtype, norm_type, limit, foreach):
    params = with_gradients(rng, dtype, "ddd")
    expected = copies_of(params)
    ours, theirs = FUNCTIONS["norm"]
    norm = ours(params, limit, norm_type, foreach=foreach)
    assert_same_tensor(norm, theirs(expected, limit, norm_type, foreach=foreach))
    assert_same_gradients(params, expected)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", PRECISION)
def test_values_of_dense_gradients_are_torchs(rng, dtype, foreach):
    params = with_gradients(rng, dtype, "ddd")
    expected = copies_of(params)
    ours, theirs = FUNCTIONS["value"]
    assert ours(params, 0.5, foreach) is None
    theirs(expected, 0.5, foreach)
    assert_same_gradients(params, expected)


@pytest.mark.parametrize("limit", [0.5, 1e6])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_the_summed_gradients(rng, dtype, norm_type, limit):
    params = with_gradients(rng, dtype)
    dense = copies_of(params, densified=True)
    norm = clip_grad_norm_(params, limit, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(dense, limit, norm_type)
    tolerance = TOLERANCE.get(dtype, 1e-12)
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)
    assert_close(params, dense, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_the_oracles(rng, dtype):
    params = with_gradients(rng, dtype)
    gradients = [oracle_gradient(param.grad) for param in params]
    expected = math.sqrt(math.fsum(map(oracle.square_sum, gradients)))
    norm = clip_grad_norm_(params, 1.0)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(expected, rel=TOLERANCE.get(dtype, 1e-12))


@pytest.mark.parametrize("dtype", PRECISION)
def test_values_are_those_of_the_summed_gradients(rng, dtype):
    params = with_gradients(rng, dtype)
    dense = copies_of(params, densified=True)
    assert clip_grad_value_(params, 0.5) is None
    torch.nn.utils.clip_grad_value_(dense, 0.5)
    assert_close(params, dense, dtype)
    assert max(param.grad.to_dense().abs().max() for param in params[:-1]) == 0.5


@pytest.mark.parametrize("sparse_dims", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_with_several_sparse_dimensions(rng, name, sparse_dims):
    w = parameter(rng, (4, 3, 2))
    places = [rng.integers(size, size=20) for size in w.shape[:sparse_dims]]
    w.grad = rows_of(torch.randn(20, *w.shape[sparse_dims:]), places, w.shape)
    [dense] = copies_of([w], densified=True)
    ours, theirs = FUNCTIONS[name]
    ours(w, 0.5)
    theirs(dense, 0.5)
    assert_close([w], [dense], "float32")


def test_only_values_are_scaled_and_in_place(rng):
    """A sparse gradient keeps its indices, their order and its repeats."""
    params = with_gradients(rng)
    before = copies_of(params)
    grads = [param.grad for param in params]
    addresses = [param.grad._values().data_ptr() for param in params[1:4:2]]
    clip_grad_norm_(params, 0.5)
    for param, other, grad in zip(params, before, grads, strict=True):
        assert param.grad is grad
        if grad is not None and grad.is_sparse:
            assert grad.is_coalesced() == other.grad.is_coalesced()
            assert_same_tensor(grad._indices(), other.grad._indices())
            assert not torch.equal(grad._values(), other.grad._values())
    assert [param.grad._values().data_ptr() for param in params[1:4:2]] == addresses


def test_clamped_gradients_are_coalesced(rng):
    params = with_gradients(rng)
    dense, coalesced = params[0].grad, params[4].grad
    uncoalesced = params[1].grad
    before = uncoalesced.clone()
    clip_grad_value_(params, 0.5)
    assert params[0].grad is dense
    assert params[4].grad is coalesced
    assert params[1].grad.is_coalesced()
    assert_same_gradient(uncoalesced, before)


@pytest.mark.parametrize("norm_type", NORMS)
def test_a_norm_within_the_limit_changes_nothing(rng, norm_type):
    params = with_gradients(rng)
    before = copies_of(params)
    clip_grad_norm_(params, 1e6, norm_type)
    assert_same_gradients(params, before)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("position", [0, 1])
def test_norms_that_are_not_finite(rng, position, norm_type, broken):
    params = with_gradients(rng)
    values = params[position].grad
    (values._values() if values.is_sparse else values)[2, 1] = broken
    before = copies_of(params)
    with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
        clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    assert_same_gradients(params, before)
    dense = copies_of(params, densified=True)
    norm = clip_grad_norm_(params, 1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(dense, 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for param, other in zip(params[:-1], dense[:-1], strict=True):
        nan = param.grad.coalesce().values() if param.grad.is_sparse else param.grad
        assert nan.isnan().any() == other.grad.isnan().any()


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_values_cannot_be_clamped(rng, dtype):
    """Nor can they in torch."""
    for kinds in ("d", "s"):
        with pytest.raises(RuntimeError, match="complex"):
            clip_grad_value_(with_gradients(rng, dtype, kinds), 0.5)


def test_parameters_may_be_one_tensor_any_iterable_or_none(rng):
    params = with_gradients(rng)
    for name, (ours, _) in FUNCTIONS.items():
        results = []
        for kind in (list, tuple, iter):
            copies = copies_of(params)
            results.append((ours(kind(copies), 0.5), copies))
        for norm, copies in results[1:]:
            assert_same_gradients(copies, results[0][1])
            assert norm == results[0][0], name
        [one], [expected] = copies_of(params[1:2]), copies_of(params[1:2])
        ours(one, 0.5)
        ours([expected], 0.5)
        assert_same_gradients([one], [expected])
        ours([], 0.5)
        ours(params[-1:], 0.5)
    assert clip_grad_norm_([], 1.0) == 0.0
    assert clip_grad_norm_(params[-1:], 1.0) == 0.0


def test_dtypes_may_be_mixed(rng):
    params = with_gradients(rng, "float32") + with_gradients(rng, "float64")
    dense = copies_of(params, densified=True)
    norm = clip_grad_norm_(params, 0.5)
    expected = torch.nn.utils.clip_grad_norm_(dense, 0.5)
    torch.testing.assert_close(norm, expected)
    assert_close(params, dense, "float32")


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("norm_type", NORMS)
def test_gradients_without_values(rng, norm_type, rows):
    """None at all, or of rows of nothing."""
    w = torch.nn.Parameter(torch.ones(5, 1 - rows))
    w.grad = rows_of(torch.ones(rows, 1 - rows), [3] * rows, w.shape)
    other = parameter(rng, (3,))
    other.grad = torch.tensor([3.0, 0.0, -4.0])
    expected = torch.nn.Parameter(torch.ones(3))
    expected.grad = other.grad.clone()
    norm = clip_grad_norm_([w, other], 0.5, norm_type)
    torch.testing.assert_close(
        norm, torch.nn.utils.clip_grad_norm_(expected, 0.5, norm_type)
    )
    torch.testing.assert_close(other.grad, expected.grad)
    clip_grad_value_([w, other], 0.1)
    assert other.grad.abs().max() <= 0.1


def test_graphs_are_not_recorded(rng):
    params = with_gradients(rng)
    norm = clip_grad_norm_(params, 0.5)
    assert not norm.requires_grad
    assert torch.is_grad_enabled()
