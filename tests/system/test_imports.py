"""What importing the package does, what it offers, and that its documentation is true."""

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import adamax

FRAMEWORKS = ("torch", "tensorflow", "keras", "tf_keras", "jax", "optax")
PUBLIC = [adamax.Adamax, adamax.IndexedSlices]
PUBLIC += [adamax.get_num_threads, adamax.set_num_threads]
PUBLIC += [
    member
    for name, member in vars(adamax.Adamax).items()
    if not name.startswith("_") and callable(getattr(adamax.Adamax, name))
]


def _plain(member):
    return getattr(member, "__func__", member)


def test_importing_loads_no_framework_and_no_compiler(run_python):
    modules = [*FRAMEWORKS, "numba", "llvmlite", "safetensors", "ml_dtypes"]
    program = """
        import sys
        import adamax, adamax.numpy
        optimizer = adamax.Adamax(0.1)
        optimizer.get_config()
        adamax.get_num_threads()
        print(*[name for name in sys.argv[1:] if name in sys.modules])
    """
    assert run_python(program, *modules) == ""


def test_stepping_loads_no_framework(run_python):
    program = """
        import sys
        import numpy as np
        import adamax
        w = np.ones((3, 2), np.float32)
        optimizer = adamax.Adamax(0.1, clipnorm=1.0)
        optimizer.apply_gradients([(w.copy(), w)])
        optimizer.apply_gradients([(adamax.IndexedSlices(np.ones((1, 2)), [0]), w)])
        print(*[name for name in sys.argv[1:] if name in sys.modules])
    """
    assert run_python(program, *FRAMEWORKS) == ""


def test_importing_starts_no_thread(run_python):
    assert run_python("import adamax, threading; print(threading.active_count())") == "1"


def test_types_are_shipped():
    assert Path(adamax.__file__).with_name("py.typed").is_file()


def test_public_names_exist():
    assert sorted(adamax.__all__) == [
        "Adamax", "IndexedSlices", "get_num_threads", "set_num_threads",
    ]  # fmt: skip
    assert all(hasattr(adamax, name) for name in adamax.__all__)
    assert adamax.numpy.Adamax is adamax.Adamax
    assert all(hasattr(adamax.numpy, name) for name in adamax.numpy.__all__)


def test_the_version_is_that_of_the_distribution():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", adamax.__version__)
    assert importlib.metadata.version("adamax") == adamax.__version__


@pytest.mark.parametrize("member", PUBLIC, ids=lambda member: _plain(member).__name__)
def test_public_names_are_documented(member):
    assert inspect.getdoc(_plain(member))


def _documented_arguments(docstring):
    """The names of the section of a docstring that lists arguments."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return re.findall(r"^    (\w+): ", section[1], re.MULTILINE) if section else None


WITH_ARGUMENTS = [
    member for member in PUBLIC if "Args:\n" in (inspect.getdoc(_plain(member)) or "")
]


@pytest.mark.parametrize(
    "member", WITH_ARGUMENTS, ids=lambda member: _plain(member).__name__
)
def test_documented_arguments_are_those_of_the_signature(member):
    function = _plain(member)
    signature = set(inspect.signature(function).parameters) - {"self", "cls"}
    assert set(_documented_arguments(inspect.getdoc(function))) == signature


def test_arguments_are_documented_where_there_are_several():
    documented = {_plain(member).__name__ for member in WITH_ARGUMENTS}
    for member in PUBLIC:
        parameters = [
            parameter
            for name, parameter in inspect.signature(_plain(member)).parameters.items()
            if name not in ("self", "cls")
        ]
        if len(parameters) > 1:
            assert _plain(member).__name__ in documented


def test_defaults_in_the_signature_are_those_of_the_rule():
    given = inspect.signature(adamax.Adamax).parameters
    hyperparameters = adamax.Adamax().hyperparameters
    for name in ("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay", "sparse"):
        assert given[name].default == getattr(hyperparameters, name)


def test_tests_without_any_framework_are_skipped_and_not_broken(run_python):
    """What ``make test`` does on a machine that has none of them."""
    program = """
        import os, sys
        import pytest
        frameworks, *arguments = sys.argv[1:]
        for name in frameworks.split():
            sys.modules[name] = None
        os.chdir(arguments.pop())
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
    """
    missing = " ".join([*FRAMEWORKS, "triton"])
    root = Path(__file__).parents[2]
    without = {"ADAMAX_REQUIRE_FRAMEWORKS": None, "PYTHONWARNINGS": None}
    run_python(program, missing, "--collect-only", root, **without)
    assert "skipped" in run_python(
        program, missing, "tests/system/test_doctests.py", root, **without
    )
