"""The example that trains word vectors: what it learns, writes, resumes and refuses."""

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from frameworks import load_example

for needed in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "word_vectors.py"
SMALL = ["--dim", "12", "--epochs", "3", "--batch", "256", "--min-count", "3"]
STEPS_PER_EPOCH = 36  # of a run on `text` with these options
SUBJECTS = ["tree", "ship", "star", "bread", "song", "river", "wheel", "été"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example(EXAMPLE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs that each keep to one of eight subjects, with ten words per subject."""
    rng = np.random.default_rng(5)
    subjects = [[f"{name}{letter}" for letter in "abcdefghij"] for name in SUBJECTS]
    paragraphs = [" ".join(rng.choice(subjects[rng.integers(8)], 12)) for _ in range(850)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(
    example: ModuleType, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a run that was never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    assert example.main(["--text", str(text), "--out", str(out), *SMALL]) == 0
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refusal(
    example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """The one line with which the program refuses these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        example.main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "error: " in message
    return message


# --- What it learns and writes ---------------------------------------------------------


def test_the_program_beats_the_baseline_and_writes_its_files(
    example: ModuleType, text: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "directory"
    command = [sys.executable, "-W", "error", EXAMPLE, "--text", text, "--out", out, *SMALL]
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=120, env=utf8
    )
    assert run.returncode == 0, run.stderr
    loss = float(re.search(r"^Loss +([\d.]+)", run.stdout, re.M)[1])
    baseline = float(re.search(r"^Baseline +([\d.]+)", run.stdout, re.M)[1])
    assert loss < 0.8 * baseline
    assert re.search(r"^Pairs +[\d,]+ trained on, [\d,]+ held out$", run.stdout, re.M)
    assert re.search(r"words/s, loss \d", run.stderr)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert contents(out) == contents(finished)  # the same in another process


def test_neighbours_are_words_of_the_same_subject(
    example: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--text", str(text), "--out", str(tmp_path), *SMALL])
    table = capsys.readouterr().out.split("Nearest words")[1].split("\n\n")[0]
    rows = [re.findall(r"[^\W\d_]+", line) for line in table.splitlines()[1:]]
    assert len(rows) == len(example.SHOWN)
    for word, *neighbours in rows:
        assert len(neighbours) == 4
        assert {neighbour[:-1] for neighbour in neighbours} == {word[:-1]}


def test_the_vectors_read_back_bit_for_bit(example: ModuleType, finished: Path) -> None:
    lines = (finished / "vectors.txt").read_text(encoding="utf-8").splitlines()
    count, dim = map(int, lines[0].split())
    words = [line.split(" ")[0] for line in lines[1:]]
    vectors = np.array([line.split(" ")[1:] for line in lines[1:]]).astype(np.float32)
    assert (count, dim) == vectors.shape == (80, 12)
    assert {word[:-1] for word in words} == set(SUBJECTS)
    tensors = example.safetensors.numpy.load_file(finished / "checkpoint.safetensors")
    np.testing.assert_array_equal(vectors, tensors["centre"], strict=True)


def test_the_seed_decides(
    example: ModuleType, text: Path, finished: Path, tmp_path: Path
) -> None:
    example.main(["--text", str(text), "--out", str(tmp_path), *SMALL, "--seed", "1"])
    vectors = contents(tmp_path)["vectors.txt"]
    assert vectors != contents(finished)["vectors.txt"]


def test_the_default_text_is_read_and_never_imported(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = '''
    """Module %s."""
    raise SystemExit("imported")
    class C:
        """Class %s."""
        async def f(self):
            """Method %s."""
    '''
    for name in ("one.py", "two/three.py", "two/test/four.py", "idlelib/five.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(module).replace("%s", path.stem))
    monkeypatch.setattr(example.sysconfig, "get_path", lambda name: str(tmp_path))
    text = example.python_documentation()
    found = re.findall(r"^(Module|Class|Method) (\w+)\.$", text, re.M)
    assert set(found) == set(
        itertools.product(["Module", "Class", "Method"], ["one", "three"])
    )
    assert text == example.python_documentation()
    words = example.words_of(text)
    assert len(words) > 30_000  # of the language reference
    assert {"list", "string", "exception", "integer"} < set(words)


# --- The parts -------------------------------------------------------------------------


def test_pairs_stay_within_the_window_and_the_paragraph(
    example: ModuleType, rng: np.random.Generator
) -> None:
    paragraphs = [[f"w{i}x{j}" for j in range(30)] for i in range(20)]
    text = "\n \n".join(" ".join(paragraph) for paragraph in paragraphs)
    corpus = example.build_corpus(text, min_count=1, window=4)
    sampler = example.Sampler(corpus.counts, window=4, negatives=5)
    sampler.kept[:] = 1
    places = np.flatnonzero(corpus.training != example.GAP)
    found = set()
    for _ in range(30):
        centres, rows, contexts = sampler.pairs(corpus.training, places, rng)
        found |= set(zip(centres[rows].tolist(), contexts.tolist(), strict=True))
    named = {(corpus.vocabulary[a], corpus.vocabulary[b]) for a, b in found}
    words = [w for paragraph in paragraphs for w in paragraph][: len(places)]
    expected = {
        (a, b)
        for (i, a), (j, b) in itertools.permutations(enumerate(words), 2)
        if abs(i - j) <= 4 and a.split("x")[0] == b.split("x")[0]
    }
    assert named == expected


def test_a_repeated_paragraph_counts_once(example: ModuleType) -> None:
    corpus = example.build_corpus("one two\n\n\n" * 9 + "one two three", 1, 1)
    assert corpus.vocabulary == ["one", "two"]  # "three" is in the held-out part
    assert corpus.counts.tolist() == [2, 2]


def test_gradients_are_the_derivatives_of_the_loss(
    example: ModuleType, rng: np.random.Generator
) -> None:
    tables = example.Tables(rng.normal(size=(6, 3)), rng.normal(size=(6, 3)))
    sampler = example.Sampler(np.array([9, 7, 5, 4, 3, 2]), window=2, negatives=5)
    pairs = example.Pairs(
        np.array([3, 1, 3]), np.array([0, 0, 1, 2]), np.array([1, 2, 5, 1])
    )
    noise = np.array([0, 2, 2, 1])
    _, gradients = example.loss_and_gradients(tables, pairs, noise, sampler)
    for table, gradient in zip(tables, gradients, strict=True):
        dense = np.zeros_like(table)
        np.add.at(dense, gradient.indices, gradient.values)
        for place in np.ndindex(table.shape):
            losses = []
            for shift in (1e-6, -2e-6):
                table[place] += shift
                losses.append(example.loss_and_gradients(tables, pairs, noise, sampler)[0])
            table[place] += 1e-6
            slope = (losses[0] - losses[1]) / 2e-6
            assert dense[place] == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_no_model_without_the_centre_word_beats_the_baseline(
    example: ModuleType, rng: np.random.Generator
) -> None:
    held_out = example.HeldOut(
        rng.integers(8, size=400), rng.integers(8, size=400), rng.integers(8, size=(400, 5))
    )
    baseline = example.unigram_loss(held_out)
    tables = example.Tables(np.zeros((8, 2), np.float32), np.zeros((8, 2), np.float32))
    sampler = example.Sampler(np.arange(1, 9), window=2, negatives=5)
    true, noise = (np.bincount(part.ravel()) for part in held_out[1:])
    sampler.prior = np.log(true / noise)
    assert example.held_out_loss(tables, held_out, sampler) == pytest.approx(baseline)
    for _ in range(20):
        sampler.prior = np.log(true / noise) + rng.normal(scale=0.01, size=8)
        assert example.held_out_loss(tables, held_out, sampler) > baseline


# --- Interrupting and resuming ---------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([1], id="the first step"),
        pytest.param([STEPS_PER_EPOCH], id="the end of an epoch"),
        pytest.param([5, STEPS_PER_EPOCH + 9, 1], id="three times"),
    ],
)
def test_a_resumed_run_is_bit_identical(
    example: ModuleType,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: list[int],
) -> None:
    arguments = ["--text", str(text), "--out", str(tmp_path), *SMALL]
    compute, handler = example.loss_and_gradients, signal.getsignal(signal.SIGINT)
    for number, interrupted_at in enumerate(steps):
        countdown = itertools.count(interrupted_at, -1)

        def compute_and_interrupt(*parts: object, countdown=countdown) -> object:
            if next(countdown) == 1:
                signal.raise_signal(signal.SIGINT)  # in the middle of a step
            return compute(*parts)

        monkeypatch.setattr(example, "loss_and_gradients", compute_and_interrupt)
        assert example.main(arguments + ["--resume"] * (number > 0)) == 130
        assert signal.getsignal(signal.SIGINT) is handler
        last_line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"Interrupted; continue with: python .* --resume", last_line)
        assert last_line.count("--resume") == 1
        assert set(contents(tmp_path)) == {"checkpoint.safetensors"}
    monkeypatch.undo()
    assert example.main([*arguments, "--resume"]) == 0
    assert f"after step {sum(steps)} of {3 * STEPS_PER_EPOCH}" in capsys.readouterr().out
    assert contents(tmp_path) == contents(finished)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
def test_ctrl_c_in_the_terminal(
    example: ModuleType, text: Path, finished: Path, tmp_path: Path
) -> None:
    arguments = ["--text", str(text), "--out", str(tmp_path), *SMALL]
    command = [sys.executable, "-W", "error", str(EXAMPLE), *arguments]
    checkpoint = tmp_path / "checkpoint.safetensors"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    ) as program:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    assert program.returncode == 130, errors
    assert "Traceback" not in errors
    assert example.main([*arguments, "--resume"]) == 0
    assert contents(tmp_path) == contents(finished)


def test_resuming_a_finished_run_changes_nothing(
    example: ModuleType, text: Path, finished: Path
) -> None:
    before = contents(finished)
    arguments = ["--text", str(text), "--out", str(finished), *SMALL]
    assert example.main([*arguments, "--resume"]) == 0
    assert contents(finished) == before


def test_a_failed_save_leaves_the_previous_checkpoint(
    example: ModuleType,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saves = itertools.count()

    def fsync(descriptor: int) -> None:
        if next(saves) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(example.os, "fsync", fsync)
    arguments = ["--text", text, "--out", tmp_path, *SMALL]
    with pytest.raises(SystemExit, match=r"^2$"):
        example.main([str(argument) for argument in arguments])
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.endswith("error: No space left on device")
    monkeypatch.undo()
    assert example.main([*map(str, arguments), "--resume"]) == 0
    assert f"after step {STEPS_PER_EPOCH} of" in capsys.readouterr().out
    assert contents(tmp_path).items() >= contents(finished).items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "3"], r"cannot resume: .* was made with --seed 0, not 3"),
        (["--learning-rate", "1e-3"], r"was made with --learning-rate 0\.03, not 0\.001"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(
    example: ModuleType,
    text: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    arguments = ["--text", text, "--out", finished, *SMALL, *change, "--resume"]
    assert re.search(message, refusal(example, capsys, *arguments))


def test_a_checkpoint_of_another_text_is_refused(
    example: ModuleType,
    text: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + " more", encoding="utf-8")
    arguments = ["--text", other, "--out", finished, *SMALL, "--resume"]
    assert "was made from another text" in refusal(example, capsys, *arguments)


def test_what_is_no_checkpoint_is_refused(
    example: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", text, "--out", tmp_path, *SMALL, "--resume"]
    assert "there is nothing to resume" in refusal(example, capsys, *arguments)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"not a checkpoint")
    assert "is damaged" in refusal(example, capsys, *arguments)
    example.Adamax().save(checkpoint)
    assert "not a checkpoint of this program" in refusal(example, capsys, *arguments)


# --- Bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the text has no words", id="empty"),
        pytest.param(b"1 2 3 ... 4\n", "the text has no words", id="numbers only"),
        pytest.param(b"gr\xfc\xdfe " * 50, "is not UTF-8 text", id="not UTF-8"),
        pytest.param(
            " ".join(f"word{i}x" for i in range(500)).encode(),
            "too short: in its first nine tenths, no two words occur at least 8 times",
            id="no word repeats",
        ),
        pytest.param(b"only " * 200, "too short", id="one word only"),
        pytest.param(
            b"so far " * 50 + b"not known at all " * 7,
            "too short: in its last tenth, which is held out",
            id="held-out part without known words",
        ),
    ],
)
def test_an_unusable_text_is_refused_in_one_line(
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert message in refusal(example, capsys, "--text", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_text_is_refused_in_one_line(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "missing.txt: No such file" in refusal(
        example, capsys, "--text", tmp_path / "missing.txt"
    )
    message = refusal(example, capsys, "--text", tmp_path)
    assert re.search(r": (Is a directory|Permission denied)$", message.strip())


def test_an_unusable_output_directory_is_refused_in_one_line(
    example: ModuleType, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(example, capsys, "--text", text, *SMALL, "--out", text)
    assert "text.txt: File exists" in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *itertools.product(
            ["--epochs", "--dim", "--window", "--negatives", "--batch", "--min-count"],
            ["0", "-1", "2.5", "many"],
            ["a whole number of at least 1"],
        ),
        ("--seed", "-1", "a whole number of at least 0"),
        ("--learning-rate", "-0.1", "a number of at least 0"),
        ("--learning-rate", "nan", "a number of at least 0"),
        ("--weight-decay", "inf", "a number of at least 0"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    example: ModuleType,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    expected: str,
) -> None:
    message = refusal(example, capsys, f"{option}={value}")
    assert message.endswith(f"argument {option}: must be {expected}, got {value!r}\n")
