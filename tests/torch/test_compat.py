"""Private names of PyTorch: they are there, and without them something else serves."""

import importlib
import sys

import pytest

from torch_cases import torch

from adamax.torch import _compat  # isort: skip  (not without torch)

# What there is in the version that is tested.
NAMES = [
    ("torch._compile", "_disable_dynamo"),
    ("torch.optim.optimizer", "_use_grad_for_differentiable"),
    ("torch.utils._foreach_utils", "_get_foreach_kernels_supported_devices"),
    ("torch.optim.Optimizer", "_accelerator_graph_capture_health_check"),
    ("torch.optim.Optimizer", "_cuda_graph_capture_health_check"),
    ("torch.Tensor", "_indices"),
    ("torch.Tensor", "_values"),
    ("torch.Tensor", "_version"),
    *(
        ("torch", f"_foreach_{name}")
        for name in (
            "add",
            "mul",
            "lerp_",
            "copy_",
            "maximum",
            "abs",
            "div",
            "mul_",
            "sub_",
        )
    ),
]

STEPS = """
    import importlib, sys
    import torch

    def owner(path):
        module, _, name = path.rpartition(".")
        if path in sys.modules:
            return sys.modules[path]
        return getattr(importlib.import_module(module), name)

    class Gone:
        def __get__(self, tensor, kind=None):
            raise AttributeError("taken away")

    if sys.argv[1:]:
        import torch._dynamo  # which uses some of the names, too
    for taken in sys.argv[1:]:
        path, _, name = taken.rpartition(".")
        if path == "torch.Tensor":  # of C, where nothing can be deleted
            setattr(torch.Tensor, name, Gone())
        else:
            delattr(owner(path), name)

    from adamax.torch import Adamax

    torch.manual_seed(0)
    shown = []
    for options in (
        {},
        {"foreach": True, "weight_decay": 0.1},
        {"foreach": False, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"sparse": "exact"},
    ):
        w = torch.nn.Parameter(torch.randn(4, 2))
        table = torch.nn.Parameter(torch.randn(6, 2))
        optimizer = Adamax([w, table], lr=0.1, **options)
        for step in range(3):
            ids = torch.tensor([1, 5 - step, 1])
            optimizer.catch_up(table, ids)
            w.grad = torch.randn(4, 2)
            table.grad = torch.sparse_coo_tensor(
                ids[None], torch.randn(3, 2), (6, 2), check_invariants=True
            )
            optimizer.step()
        optimizer.flush()
        shown += [w, table]
    lr = torch.tensor(0.1, requires_grad=True)
    w = torch.ones(2).clone()
    optimizer = Adamax([w], lr=lr, differentiable=True)
    w.grad = torch.ones(2)
    optimizer.step()
    w.sum().backward()
    shown += [lr.grad]
    assert torch.is_grad_enabled()
    print(*(f"{x:.5f}" for tensor in shown for x in tensor.flatten().tolist()))
"""


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_private_names_are_there(path, name):
    module, _, last = path.rpartition(".")
    found = sys.modules.get(path) or getattr(importlib.import_module(module), last)
    assert hasattr(found, name)


def test_steps_without_private_names(run_python):
    expected = run_python(STEPS)
    taken = [f"{path}.{name}" for path, name in NAMES]
    assert run_python(STEPS, *taken) == expected
    assert len(expected.split()) == 4 * (8 + 12) + 1


def test_what_cannot_be_known_without_a_private_name(monkeypatch):
    """Whether a program is exported or traced is then taken for no."""
    monkeypatch.delattr(torch.compiler, "is_exporting")
    monkeypatch.delattr(torch.jit, "is_tracing")
    assert not _compat.is_exporting()
    assert not _compat.is_tracing()
    assert not _compat.is_in_join(torch.nn.Linear(1, 1))
    assert _compat.version_of(object()) is None
