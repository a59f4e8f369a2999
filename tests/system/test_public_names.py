"""The public names and their arguments are those on record.

``public_names.txt`` is the record. A change of it is a change for users: note it in
``CHANGELOG.md``.
"""

from pathlib import Path

import pytest

from frameworks import framework

RECORD = Path(__file__).with_name("public_names.txt")
LIST_NAMES = """
import importlib, inspect, sys, warnings

def arguments(member):
    function = getattr(member, "__func__", member)
    parameters = inspect.signature(function).parameters.values()
    names = [
        {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        for p in parameters
        if p.name not in ("self", "cls")
    ]
    return f"({', '.join(names)})"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of frameworks, at import
    module = importlib.import_module(sys.argv[1])
for name in module.__all__:
    member = getattr(module, name)
    print(f"{name}{arguments(member)}")
    if isinstance(member, type):
        for inner, value in vars(member).items():
            if not inner.startswith("_"):
                suffix = arguments(value) if callable(getattr(member, inner)) else ""
                print(f"{name}.{inner}{suffix}")
"""


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("adamax", ()),
        ("adamax.numpy", ()),
        ("adamax.torch", ("torch",)),
        ("adamax.keras", ("keras", "tensorflow")),
        ("adamax.jax", ("jax", "optax")),
    ],
)
def test_the_public_names_are_those_on_record(run_python, module, needed):
    for name in needed:
        framework(name)
    names = run_python(LIST_NAMES, module).splitlines()
    assert sorted(names) == recorded_names()[module]


def recorded_names():
    sections = RECORD.read_text(encoding="utf-8").split("\n\n")
    parts = [section.split("\n") for section in sections]
    return {part[0].strip("[]"): [line for line in part[1:] if line] for part in parts}
