"""What would be uploaded, and whether it works as installed: ``make dist``.

Builds the source distribution and, from it, the wheel; has auditwheel make the wheel one
for other machines; checks both with twine; then installs the wheel into a fresh environment
and runs the tests of the NumPy and PyTorch front ends away from the tree, with no compiler
on the path.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
SELECTION = ["core", "numpy", "torch/test_steps.py", "torch/test_sparse.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=SELECTION, help="below tests/")
    options = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (wheel,) = DIST.glob("*.whl")
    repaired = ROOT / "build" / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel),
        env=tools,  # patchelf among them
    )
    wheel.unlink()
    (wheel,) = [Path(shutil.copy(path, DIST)) for path in repaired.glob("*.whl")]
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, Path(folder), options.tests)
    print(*sorted(path.name for path in DIST.iterdir()), sep="\n")
    return 0


def try_out(wheel: Path, folder: Path, tests: list[str]) -> None:
    """Install the wheel, and run tests of it where there is neither tree nor compiler."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    run(python, "-m", "pip", "check")
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # pytest and the frameworks are this environment's.
    (Path(purelib) / "peers.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    check = "import adamax, adamax._native.verbs as v; print(adamax.__file__, v.__file__)"
    path = {"PATH": str(python.parent)}
    where = subprocess.check_output([python, "-c", check], text=True, cwd=folder, env=path)
    assert all(str(folder) in place for place in where.split()), where
    run(
        *(python, "-m", "pytest", "-q", "-n", "2", *(f"tests/{test}" for test in tests)),
        cwd=folder,
        env={**os.environ, **path},
    )


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, env=env, check=True)


if __name__ == "__main__":
    sys.exit(main())
