"""The example that trains a table larger than the memory it may use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "larger_than_memory.py"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits memory as Linux can"
)


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_table_larger_than_the_limit_is_trained_and_checked(tmp_path):
    done = run("--rows", 20_000, "--steps", 10, "--limit", 256, "--directory", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^checked  \d+ rows equal, bit for bit", done.stdout, re.M)
    assert re.search(r"^without  files, .*: MemoryError: ", done.stdout, re.M)
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rows", 100], r"the table \(2 MB\) is not larger than the limit \(268 MB\)"),
        (["--directory", "missing"], r"No such file or directory: 'missing'"),
        (["--rows", 10**12], r"may need .* MB are free"),
        (["--limit", 1], r"the training failed; is --limit too small\?"),
    ],
    ids=str,
)
def test_unusable_input_is_refused_in_one_line(options, expected):
    refused = run(*options)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert re.search(rf"^larger_than_memory.py: .*{expected}", line)
