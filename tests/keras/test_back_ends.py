"""The Keras front end: a run for each back end, which is fixed per process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import framework

TESTS = Path(__file__).parent / "front_end"
PARTS = {
    "tensorflow": ("dense", "sparse", "tensorflow", "keras_own"),
    "jax": ("dense", "jax", "keras_own"),
    "torch": ("dense", "sparse", "keras_own"),
}
NEEDED = {
    "tensorflow": ("tf_keras",),
    "keras_own": ("keras.src.optimizers.adamax_test",),  # not in the wheel of Keras 3.10
}


@pytest.mark.parametrize(
    ("back_end", "part"), [(b, part) for b, parts in PARTS.items() for part in parts]
)
def test_part(back_end, part, tmp_path):
    for needed in ("keras", back_end, *NEEDED.get(part, ())):
        framework(needed)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--quiet", "-ra"]
    # Keras hands NumPy arrays of which NumPy says that they are old-fashioned.
    options += ["-W", "ignore:__array__:DeprecationWarning"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"tests/keras/front_end/check_{part}.py",
            *options,
        ],
        cwd=TESTS.parents[2],
        env={
            **os.environ,
            "KERAS_BACKEND": back_end,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            # Keras has JAX compile some functions again in each step.
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


def test_other_back_ends_are_refused(run_python):
    framework("keras")
    program = """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import keras
        import adamax.keras
    """
    with pytest.raises(AssertionError, match=r"needs tensorflow, jax or torch as the back"):
        run_python(program, KERAS_BACKEND="numpy")
