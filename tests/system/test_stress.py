"""A second of each part of ``make stress``."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
STRESS = Path(__file__).with_name("stress.py")
PARTS = ("killed-saves", "mutated-checkpoints", "threads", "interleavings", "soak")


@pytest.mark.parametrize("part", [*PARTS, *(["forks"] if hasattr(os, "fork") else [])])
def test_part(run_python, part):
    program = f"""
        import runpy, sys
        sys.argv[1:] = ["--part", {part!r}, "--minutes", "0.017"]
        runpy.run_path({str(STRESS)!r}, run_name="__main__")
    """
    # Python 3.12 warns of every fork beside threads.
    relaxed = "error,ignore::DeprecationWarning" if sys.version_info >= (3, 12) else "error"
    text = run_python(program, PYTHONWARNINGS=relaxed)
    assert text.startswith(f"{part}: ")
