"""The example that trains word vectors in JAX."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_cases  # noqa: F401  (skips without jax)

for needed in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "jax_word_vectors.py"
SMALL = ["--epochs", "4", "--dim", "8", "--batch", "128", "--min-count", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words of one of six topics for each paragraph, so that neighbours tell a lot."""
    rng = np.random.default_rng(5)
    paragraphs = []
    for _ in range(300):
        topic = "abcdef"[rng.integers(6)]
        numbers = rng.integers(10, size=30)
        paragraphs.append(" ".join(f"{topic}{'abcdefghij'[i]}" for i in numbers))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def run(*options):
    command = [sys.executable, "-W", "error", EXAMPLE, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("options", [[], ["--exact"], ["--dense"]], ids=str)
def test_a_run_learns_more_than_how_frequent_words_are(text, options):
    done = run("--text", text, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    loss, baseline = (
        float(re.search(rf"^{name} +([\d.]+)", done.stdout, re.M)[1])
        for name in ("Loss", "Baseline")
    )
    assert loss < 0.8 * baseline
    optimizer = {"--dense": "optax.adamaxw", "--exact": "adamax.jax.adamax, exact"}
    expected = optimizer[options[0]] if options else "adamax.jax.adamax"
    assert re.search(rf"^Optimizer +{re.escape(expected)}$", done.stdout, re.M)
    # The words nearest to one are of its topic.
    shown = re.findall(r"^  (\w)\w +(\w)\w [\d.]+", done.stdout, re.M)
    assert len(shown) == 8
    assert all(word == nearest for word, nearest in shown)


def test_unusable_input_is_refused_in_one_line(tmp_path):
    refused = run("--text", tmp_path / "missing.txt")
    assert refused.returncode == 1
    assert "missing.txt" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
