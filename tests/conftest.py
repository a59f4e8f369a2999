"""What all tests share: seeds, hypothesis profiles, frameworks and fresh interpreters.

Frameworks are imported by the tests that need them, through the fixtures below. A missing
one skips its tests, unless ``ADAMAX_REQUIRE_FRAMEWORKS=1`` says that it must be there.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

# Tests import oracle, cases and the like by their plain names.
sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_configure(config: pytest.Config) -> None:
    # Triton decides when it is imported whether its kernels run in its interpreter.
    if "not cuda" in config.option.markexpr:
        os.environ["TRITON_INTERPRET"] = "1"
    # PyTorch imports Triton, and where TensorFlow was loaded before, that is a crash.
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=200
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def framework(name: str) -> ModuleType:
    """Import a framework; skip the test without it, or fail where it is required."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if os.environ.get("ADAMAX_REQUIRE_FRAMEWORKS") == "1":
                pytest.fail(f"{name} is required and cannot be imported: {error}")
            pytest.skip(f"{name} cannot be imported: {error}")


def _framework_fixture(name: str) -> Callable[[], ModuleType]:
    @pytest.fixture(scope="session", name=name)
    def fixture() -> ModuleType:
        return framework(name)

    return fixture


tensorflow = _framework_fixture("tensorflow")
tf_keras = _framework_fixture("tf_keras")
keras = _framework_fixture("keras")
torch = _framework_fixture("torch")
optax = _framework_fixture("optax")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on nothing but the name of the test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """``adamax.set_num_threads`` until the end of the test."""
    import adamax

    before = adamax.get_num_threads()
    yield adamax.set_num_threads
    adamax.set_num_threads(before)


def load_example(path: Path) -> ModuleType:
    """An example as a module; those beside it can be imported meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


RunPython = Callable[..., str]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run a program in a fresh interpreter, with warnings as errors; what it printed."""

    def run(
        program: str, *arguments: object, returns: int = 0, **environment: str | None
    ) -> str:
        variables = {**os.environ, "PYTHONWARNINGS": "error", **environment}
        finished = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == returns, finished.stdout + finished.stderr
        return finished.stdout.strip()

    return run
