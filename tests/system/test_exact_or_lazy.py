"""The example that compares dense, exact and lazy updates."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "exact_or_lazy.py"
SMALL = ["--steps", "60", "--rows", "3001", "--dim", "8", "--batch", "64"]


def run(*arguments):
    command = [sys.executable, "-W", "error", EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_exact_is_dense_and_lazy_is_not(torch, text, tmp_path):
    done = run("--text", text, "--out", tmp_path / "new", *SMALL)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(dense|exact|lazy) +([-\d. e]+)$", done.stdout, re.M))
    assert list(rows) == ["dense", "exact", "lazy"]
    numbers = {kind: [float(n) for n in row.split()] for kind, row in rows.items()}
    of_loss, of_weights = zip(
        *(numbers[kind][2:] for kind in ("exact", "lazy")), strict=True
    )
    assert of_loss[0] < 1e-3 < of_loss[1]
    assert of_weights[0] < 1e-3 < of_weights[1]
    assert (tmp_path / "new" / "exact.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_text_that_is_too_short_is_refused(torch, tmp_path):
    (tmp_path / "text").write_text("one two three")
    done = run("--text", tmp_path / "text", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: the text is too short: it has less than ten words\n"
    )
