"""The tests of the verbs with a native core that sanitizers watch: ``make sanitize``.

Builds the package into a folder of its own, beside the environment that this runs in, and
runs the tests of the verbs and of the NumPy front end there. ThreadSanitizer watches the
threads alone (``test_native.py``): it does not work in a Python that was not built for it.
"""

import argparse
import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SELECTION = ["tests/core", "tests/numpy", "tests/system/test_threads.py"]
# What measures memory, limits it, or kills processes on purpose does not go with it.
LEFT_OUT = (
    "not memory and not takes_up and not no_thread_can_be_started and not without "
    "and not killed and not crash_while_saving and not choice and not demanded "
    "and not fork"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=SELECTION, help="paths for pytest")
    parser.add_argument("--sanitizers", default="address,undefined")
    options = parser.parse_args()
    python = environment(ROOT / "build" / "sanitize")
    run(
        *(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
            ROOT,
        ),
        *("-C", f"cmake.define.ADAMAX_SANITIZE={options.sanitizers}"),
        *("-C", "build-dir=build/sanitize-{wheel_tag}"),
    )
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")  # both: see the sanitizer's own errors
    ]
    run(
        *(python, "-m", "pytest", "-q", "-n", "2", "-k", LEFT_OUT, *options.tests),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONMALLOC="malloc",
    )
    run(sys.executable, "-m", "pytest", "-q", "tests/native/test_native.py", "-k", "pool")
    print("clean")
    return 0


def environment(folder: Path) -> Path:
    """An environment that has all of this one's packages but this package itself."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Files of paths in a folder that is itself on such a path are not read, and with them
    # not the one of the editable installation.
    (Path(purelib) / "peers.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert Path(purelib) not in map(Path, site.getsitepackages())
    return python


def run(*command: object, **variables: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **variables}, check=True
    )


if __name__ == "__main__":
    sys.exit(main())
