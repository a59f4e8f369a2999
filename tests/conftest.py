"""What all tests share: seeds, hypothesis profiles, frameworks and fresh interpreters.

Frameworks are imported by the tests that need them, through the fixtures below. A missing
one skips its tests, unless ``ADAMAX_REQUIRE_FRAMEWORKS=1`` says that it must be there.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

# Tests import oracle, cases and the like by their plain names.
sys.path.insert(0, str(Path(__file__).parent / "support"))

from frameworks import framework

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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each word is followed by one of two, so the last word tells much about the next."""
    rng = np.random.default_rng(3)
    number, words = 0, []
    for _ in range(6000):
        number = (2 * number + rng.integers(1, 3)) % 60
        words.append(f"w{'abcdefghij'[number // 10]}{'abcdefghij'[number % 10]}")
    paragraphs = [" ".join(words[start : start + 30]) for start in range(0, 6000, 30)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


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
