"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import adamax
from frameworks import framework

# What modules need that have this in their names.
NEEDS = {
    "torch": ("torch",),
    "triton": ("torch", "triton"),
    "keras": ("keras",),
    "jax": ("optax",),
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(adamax.__path__, "adamax.")
    if module.name
    not in ("adamax.keras.jax", "adamax.keras.tensorflow", "adamax.keras.torch")
]
# Of which the examples are what users read.
OPTIMIZERS = [f"adamax.{room}.optimizer" for room in ("numpy", "torch", "keras", "jax")]


def module_of(name):
    for part, frameworks in NEEDS.items():
        if part in name:
            for needed in frameworks:
                framework(needed)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(module_of(name))
    assert failed == 0


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adamax._core.rule"])
def test_there_are_examples(name):
    assert doctest.testmod(module_of(name)).attempted > 0


def test_the_page_about_exact_mode_runs():
    framework("torch")
    page = Path(__file__).parents[2] / "docs" / "exact.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, page, "exec"), {})
