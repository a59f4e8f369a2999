"""The example that compares optimizers on a next-word model."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from frameworks import load_example

for needed in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_next_word.py"
SMALL = ["--steps", "40", "--rows", "3001", "--dim", "8", "--batch", "128"]
LABELS = [
    "torch Adam",
    "torch Adamax",
    "torch SparseAdam + Adamax",
    "adamax.torch Adamax",
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def example(torch: ModuleType) -> ModuleType:
    return load_example(EXAMPLE)


def rows_of(output: str) -> dict[str, list[float]]:
    """The table that is printed: the numbers after each label."""
    rows = re.findall(r"^(\S.*?) {2,}([-\d. e]+)$", output, re.M)
    return {label: [float(number) for number in numbers.split()] for label, numbers in rows}


def test_a_run_compares_all_optimizers_and_draws_a_plot(torch, text, tmp_path):
    out = tmp_path / "new" / "directory"
    command = [sys.executable, "-W", "error", EXAMPLE, "--text", text, "--out", out, *SMALL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "100%" in run.stderr

    rows = rows_of(run.stdout)
    assert list(rows) == ["untrained", "word frequencies", *LABELS]
    untrained, frequencies = (rows.pop(name)[0] for name in list(rows)[:2])
    assert frequencies < untrained
    for rate, of_step, of_optimizer, loss, perplexity in rows.values():
        assert 0 < rate < 1
        assert 0 <= of_optimizer <= of_step
        assert loss < frequencies - 0.5
        assert perplexity == pytest.approx(np.exp(loss), rel=1e-3, abs=0.06)
    assert [path.name for path in out.iterdir()] == ["comparison.png"]
    assert (out / "comparison.png").read_bytes().startswith(PNG)


def test_runs_with_the_same_seed_are_the_same(example, text, tmp_path, capsys):
    """... but for the times that they took."""

    def qualities(*options: str) -> list[list[float]]:
        some = ["--optimizers", "adamax", "torch-adamax", "--out", str(tmp_path)]
        assert example.main(["--text", str(text), *SMALL, *some, *options]) == 0
        rows = rows_of(capsys.readouterr().out)
        assert list(rows)[2:] == ["adamax.torch Adamax", "torch Adamax"]
        return [numbers[-2:] for numbers in rows.values()]

    same = qualities("--learning-rate", "0.02")
    assert qualities("--learning-rate", "0.02") == same
    assert qualities("--learning-rate", "0.02", "--seed", "1") != same


def test_the_rows_for_a_context_depend_on_its_words(example):
    words = ["a", "b", "c", "a", "b", "c", "d", "b", "c", "x"]
    contexts = example.hashed_contexts(words, 1 << 40)
    assert contexts.shape == (len(words), example.CONTEXT)
    assert ((contexts >= 0) & (contexts < 1 << 40)).all()
    after_c = [3, 6, 9]  # after "c", "b c" and "a b c" or "d b c"
    assert (contexts[after_c, :2] == contexts[3, :2]).all()
    assert contexts[3, 2] == contexts[6, 2] != contexts[9, 2]
    assert len(np.unique(contexts[3])) == example.CONTEXT


# --- What it refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["--text", "latin1.txt"], "latin1.txt is not UTF-8 text"),
        (["--text", "short.txt"], "the text is too short: it has less than ten words"),
        (["--out", "short.txt"], "short.txt: File exists"),
        (["--optimizers", "sgd"], "argument --optimizers: invalid choice: 'sgd'"),
        (
            ["--steps", "0"],
            "argument --steps: must be a whole number of at least 1, got '0'",
        ),
        (["--rows", "1.5"], "argument --rows: must be a whole number of at least 1, got"),
        (
            ["--rows", "999999999", "--dim", "99999"],
            "there is not enough memory for a table of 999999999 rows of 99999 numbers",
        ),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a number of at lea"),
        (["--speed", "fast"], "unrecognized arguments: --speed fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_input_is_refused_in_one_line(
    example, text, tmp_path, monkeypatch, capsys, options, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    (tmp_path / "short.txt").write_text("just a few words")
    with pytest.raises(SystemExit, match=r"^2$"):
        example.main(["--text", str(text), "--out", "out", *SMALL, *options])
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if line.strip()]
    [line] = [line for line in lines if "steps/s" not in line]
    assert f"error: {expected}" in line
