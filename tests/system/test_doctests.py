"""The examples in docstrings and pages run, and give what they say."""

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


# --- Pages -------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def name_of(page):
    return str(page.relative_to(ROOT))


def python_of(page):
    return re.findall(r"^```python\n.*?^```", page.read_text("utf-8"), re.M | re.S)


WITH_PYTHON = [page for page in PAGES if python_of(page)]

# A print that ends in a comment has to print what the comment says. Blocks of a page share
# their names, and lines are numbered as in the page.
RUN_PAGE = r"""
    import contextlib, importlib, io, re, sys, warnings
    from pathlib import Path

    page, *needed = sys.argv[1:]
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # their own, at import
        if "torch" in needed:
            import triton  # before TensorFlow, see conftest.py
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in needed:
            importlib.import_module(name)
    warnings.filterwarnings("ignore", "__array__", DeprecationWarning)  # of Keras
    text, names = Path(page).read_text("utf-8"), {"__name__": "page"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        lines = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(lines, page, "exec"), names)
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", block[1], re.M)
        assert printed.getvalue().splitlines() == expected, printed.getvalue()
"""


def test_the_pages_have_examples():
    names = {page.stem for page in WITH_PYTHON}
    assert names >= {"README", "rule", "numpy", "pytorch", "keras", "jax", "exact"}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_page_runs(page, run_python):
    """In a process of its own."""
    imported = set(re.findall(r"^(?:import|from) ([\w.]+)", "".join(python_of(page)), re.M))
    needed = [n for part in NEEDS if f"adamax.{part}" in imported for n in NEEDS[part]]
    needed += ["tensorflow"] if "keras" in needed else []
    for name in needed:
        framework(name)
    run_python(RUN_PAGE, page, *needed, KERAS_BACKEND="tensorflow")


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link
