"""The example that compares state of 2, 4 and 8 bytes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "compact_state.py"
SMALL = ["--steps", "40", "--seeds", "1", "--rows", "3001", "--dim", "8", "--batch", "64"]


@pytest.mark.parametrize("sparse", ["lazy", "exact", "dense"])
def test_losses_are_close_and_state_is_small(torch, text, tmp_path, sparse):
    command = [sys.executable, "-W", "error", EXAMPLE, "--text", text, "--out", tmp_path]
    done = subprocess.run(
        list(map(str, [*command, "--sparse", sparse, *SMALL])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table, _ = done.stdout.split("mean differences")
    found = re.findall(r"^(float32|bfloat16|8bit) +([\d.]+)((?: +[\d.]+)+)$", table, re.M)
    held = {kind: float(size) for kind, size, _ in found}
    assert list(held) == ["float32", "bfloat16", "8bit"]
    assert held["float32"] == 8
    assert held["bfloat16"] == 4
    rows_of_frames = 4 * 3001 / (3001 * 8) if sparse != "dense" else 0
    assert held["8bit"] <= 2.01 + rows_of_frames
    losses = {kind: [float(n) for n in of.split()] for kind, _, of in found}
    for kind in ("bfloat16", "8bit"):
        assert losses[kind] == pytest.approx(losses["float32"], abs=0.02)
        assert losses[kind] != losses["float32"]
    assert (tmp_path / "compact_state.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
