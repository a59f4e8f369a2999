"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import adamax
from conftest import framework

NEEDS = {
    "adamax.torch": "torch",
    "adamax._torch_paths": "torch",
    "adamax.keras": "keras",
    "adamax.jax": "optax",
    "adamax._jax_rows": "optax",
    "adamax._jax_step": "optax",
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(adamax.__path__, "adamax.")
    if not module.name.startswith("adamax._keras_")  # each for one back end of Keras
]
FRONT_ENDS = ["adamax.numpy", "adamax.torch", "adamax.keras", "adamax.jax"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in NEEDS:
        framework(NEEDS[name])
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", [*FRONT_ENDS, "adamax._rule"])
def test_there_are_examples(name):
    if name in NEEDS:
        framework(NEEDS[name])
    assert doctest.testmod(importlib.import_module(name)).attempted > 0


def test_the_page_about_exact_mode_runs():
    framework("torch")
    page = Path(__file__).parents[1] / "docs" / "exact.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, page, "exec"), {})
