"""The example that trains a text classifier with Keras, on every back end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frameworks import framework, load_example

for needed in ("matplotlib", "safetensors"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_text_classifier.py"
SMALL = ["--epochs", "6", "--rows", "5000", "--dim", "8", "--batch", "16"]


@pytest.fixture
def texts(tmp_path, rng):
    """Two labels, each with words of its own among others."""
    for label, own in {"fruit": "apple plum pear", "metal": "iron zinc lead"}.items():
        folder = tmp_path / "texts" / label
        folder.mkdir(parents=True)
        for number in range(60):
            words = rng.choice([*own.split(), "the", "of", "and"], 12)
            (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return tmp_path / "texts"


def run(back_end, *arguments):
    command = [sys.executable, EXAMPLE, *SMALL, *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": back_end},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("back_end", ["tensorflow", "jax", "torch"])
def test_it_learns_and_saves_what_it_learned(back_end, texts, tmp_path):
    framework("keras")
    framework(back_end)
    out = tmp_path / "out"
    done = run(back_end, "--text", str(texts), "--out", str(out), "--learning-rate", "0.1")
    assert done.returncode == 0, done.stderr
    assert "loaded again and found to be the same" in done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("Held out"))
    right, alone = (float(word[:-1]) for word in line.split() if word.endswith("%"))
    assert right > 90 > 60 > alone
    assert sorted(path.name for path in out.iterdir()) == ["classifier.keras", "curves.png"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_cannot_use_is_said_in_a_line(tmp_path):
    framework("keras")
    (tmp_path / "only").mkdir()
    for given, message in [
        (tmp_path, "must have a folder for each of two labels or more"),
        (tmp_path / "nothing", "No such file or directory"),
    ]:
        done = run("jax", "--text", str(given), "--out", str(tmp_path / "out"))
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_docstrings_of_python_are_found_and_hashed():
    framework("keras")
    example = load_example(EXAMPLE)
    texts = example.python_docstrings()
    assert len(texts) == example.LABELS
    assert {"asyncio", "email", "unittest"} <= set(texts)
    examples = example.build_examples({"a": ["one two", "two"], "b": ["one"]}, 100)
    assert examples.labels.tolist() == [0, 0, 1]
    assert (examples.rows > 0).sum(axis=1).tolist() == [3, 1, 1]
    assert np.isin(examples.rows[2][0], examples.rows[0])
    training, held_out = example.split(examples, np.random.default_rng(0))
    assert len(training.labels) + len(held_out.labels) == 3
