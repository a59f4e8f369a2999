"""What the tests of ``adamax.torch`` share: paths, tensors, snapshots and the oracle."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import compare
import oracle
from cases import PRECISION, values
from frameworks import framework

try:
    torch = framework("torch")
except pytest.skip.Exception as missing:
    pytest.skip(str(missing), allow_module_level=True)

# The ways in which a step can be carried out, as a user asks for them.
PATHS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"fused": False},
}

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
}
# What numbers a dtype is made of, as the table of tolerances knows them.
REAL = {**{name: name for name in PRECISION}, "complex64": "float32"}
REAL["complex128"] = "float64"

# Options in torch's terms that the oracle knows too.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "no learning": {"lr": 0.0},
    "lr tensor": {"lr": torch.tensor(0.03, dtype=torch.float64)},
    "no memory": {"betas": (0.0, 0.0)},
    "long memory": {"betas": (0.999, 0.99999)},
    "short norm": {"betas": (0.95, 0.5)},
    "large eps": {"eps": 0.5, "lr": 0.1},
    "smallest eps": {"eps": 2.0**-126},
    "coupled decay": {"lr": 0.1, "weight_decay": 0.3},
    "decoupled decay": {
        "lr": 0.1,
        "weight_decay": 0.3,
        "decoupled_weight_decay": True,
    },
    "maximize": {"maximize": True},
    "maximize and coupled decay": {"maximize": True, "weight_decay": 0.3},
    "maximize and decoupled decay": {
        "maximize": True,
        "weight_decay": 0.3,
        "decoupled_weight_decay": True,
    },
}


# --- Tensors ------------------------------------------------------------------------------


def tensor_of(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_of(tensor: Any) -> np.ndarray:
    """A copy of its numbers; those of a complex tensor as pairs."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous()
        return np.array(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())


def draw(rng: np.random.Generator, shape: Sequence[int], dtype: str = "float32") -> Any:
    """A tensor of numbers of all sizes."""
    if dtype.startswith("complex"):
        pairs = tensor_of(values(rng, (*shape, 2), REAL[dtype]))
        return torch.complex(pairs[..., 0], pairs[..., 1])
    return tensor_of(values(rng, tuple(shape), dtype))


def parameter(rng: np.random.Generator, shape: Sequence[int], dtype: str = "float32"):
    return torch.nn.Parameter(draw(rng, shape, dtype))


def rows_of(values: Any, indices: Any, shape: Sequence[int]) -> Any:
    """A sparse gradient that is not coalesced."""
    if not isinstance(indices, torch.Tensor):
        indices = torch.tensor(np.asarray(indices, np.int64))
    indices = indices[None] if indices.ndim == 1 else indices
    return torch.sparse_coo_tensor(indices, values, tuple(shape), check_invariants=True)


def touched(gradient: Any) -> Any:
    """Which elements of a parameter a gradient touches, as a boolean tensor."""
    mask = torch.zeros(gradient.shape, dtype=torch.bool)
    if gradient.layout is torch.strided:
        return ~mask
    mask[tuple(gradient._indices())] = True
    return mask


# --- Snapshots ----------------------------------------------------------------------------


def contents(optimizer: Any) -> dict[str, np.ndarray]:
    """A copy of all that a step may change."""
    copied = {}
    params = (p for group in optimizer.param_groups for p in group["params"])
    for i, param in enumerate(params):
        copied[f"{i}.w"] = numpy_of(param)
        for name, value in optimizer.state.get(param, {}).items():
            copied[f"{i}.{name}"] = numpy_of(value)
    return copied


def assert_same_contents(actual: Any, expected: Any, what: str = "") -> None:
    if not isinstance(actual, dict):
        actual = contents(actual)
    if not isinstance(expected, dict):
        expected = contents(expected)
    compare.assert_same_contents(actual, expected, what)


def assert_same_tensor(actual: Any, expected: Any, what: object = "") -> None:
    assert actual.dtype is expected.dtype, what
    assert actual.shape == expected.shape, what
    compare.assert_same_bits(numpy_of(actual), numpy_of(expected), what)


def set_gradients(optimizer: Any, gradients: Sequence[Any]) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.clone()


def take_steps(optimizer: Any, gradients: Iterable[Sequence[Any]]) -> Any:
    """One step for each entry of ``gradients``, which are copied."""
    for of_this_step in gradients:
        set_gradients(optimizer, of_this_step)
        optimizer.step()
    return optimizer


# --- The oracle ---------------------------------------------------------------------------


class _Held(NamedTuple):
    """What an optimizer holds for a parameter."""

    w: np.ndarray  # of the dtype of the parameter
    state: oracle.State
    steps: int

    def of_rows(self, sparse_dims: int) -> "_Held":
        """With the sparse dimensions of a gradient made one."""
        shape = (-1, *self.w.shape[sparse_dims:])
        if 0 in shape or not self.w.size:
            shape = (int(np.prod(self.w.shape[:sparse_dims])), *shape[1:])
        arrays = (self.state.w, self.state.m, self.state.u)
        state = oracle.State(*(array.reshape(shape) for array in arrays))
        return _Held(self.w.reshape(shape), state, self.steps)


def _held(optimizer: Any, param: Any) -> _Held:
    w = numpy_of(param)
    kept = optimizer.state.get(param)
    if not kept:
        return _Held(w, oracle.State.of(w), 0)
    m, u = numpy_of(kept["exp_avg"]), numpy_of(kept["exp_inf"])
    return _Held(w, oracle.State.of(w, m, u), int(kept["step"]))


def rule_of(group: dict[str, Any]) -> oracle.Rule:
    decay = float(group["weight_decay"])
    decoupled = group["decoupled_weight_decay"]
    return oracle.Rule(
        learning_rate=float(group["lr"]),
        beta_1=group["betas"][0],
        beta_2=group["betas"][1],
        epsilon=group["eps"],
        weight_decay=decay if decoupled else 0.0,
        coupled_decay=0.0 if decoupled else decay,
    )


def oracle_gradient(gradient: Any, maximize: bool = False) -> Any:
    if gradient is None:
        return None
    sign = -1.0 if maximize else 1.0
    if gradient.layout is torch.strided:
        return sign * numpy_of(gradient).astype(np.float64)
    indices = gradient._indices().cpu().numpy()
    if gradient.sparse_dim() == 1:
        rows = indices[0]
    else:
        rows = np.ravel_multi_index(indices, gradient.shape[: gradient.sparse_dim()])
    return oracle.Rows(sign * numpy_of(gradient._values()).astype(np.float64), rows)


def check_step(optimizer: Any) -> Any:
    """Take a step with the gradients there are, and hold it to the oracle's.

    Gradients must be left as they are. What ``step`` returned is returned.
    """
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    before = [_held(optimizer, param) for param, _ in pairs]
    given = [None if param.grad is None else param.grad.clone() for param, _ in pairs]
    returned = optimizer.step()
    for i, (param, group) in enumerate(pairs):
        what = f"step {before[i].steps}, parameter {i}"
        _hold(before[i], _held(optimizer, param), given[i], group, what)
        if given[i] is not None:
            assert_same_gradient(param.grad, given[i], f"gradient, {what}")
    return returned


def assert_same_gradient(actual: Any, expected: Any, what: str = "") -> None:
    assert actual.layout is expected.layout, what
    if actual.layout is torch.strided:
        assert_same_tensor(actual, expected, what)
    else:
        assert_same_tensor(actual._indices(), expected._indices(), what)
        assert_same_tensor(actual._values(), expected._values(), what)


def follow(optimizer: Any, gradients: Iterable[Sequence[Any]]) -> None:
    """Take steps, and hold each to the oracle's step from the same state."""
    for of_this_step in gradients:
        set_gradients(optimizer, of_this_step)
        check_step(optimizer)


def _hold(before: _Held, after: _Held, given: Any, group: Any, what: str) -> None:
    assert after.steps == before.steps + (given is not None), what
    gradient = oracle_gradient(given, group["maximize"])
    if isinstance(gradient, oracle.Rows):
        before = before.of_rows(given.sparse_dim())
        after = after.of_rows(given.sparse_dim())
    rule = rule_of(group)
    [expected] = oracle.step(rule, [before.state], [gradient], before.steps)
    precision = PRECISION[before.w.dtype.name]
    # Two roundings of the part of w that decay adds to the gradient, and those of its sum.
    error = 4 * precision.roundoff * rule.coupled_decay * np.abs(before.state.w)
    compare.assert_step_close(
        precision,
        before.state,
        after.state,
        expected,
        rule.step_size(before.steps),
        rule.epsilon,
        error + compare.error_of_sums(gradient, before.w),
        what,
    )
