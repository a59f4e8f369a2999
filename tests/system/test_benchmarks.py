"""The benchmarks: bars are judged rightly, and every kind of case runs at a toy size."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frameworks import framework

ROOT = Path(__file__).parents[2]


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.harness")


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_toy_sizes_run_and_agree_with_float64(torch):
    cases = ["dense", "sparse-zipf-1e6"]
    exact = ["exact-numpy-zipf-1e6", "exact-torch-uniform-1e6"]
    done = run("--quick", "--only", *cases, *exact)
    assert done.returncode == 0, done.stderr
    for case in (*cases, *exact):
        assert f"{case}: " in done.stdout
    assert done.stdout.count("| adamax ") == len(cases)
    assert done.stdout.count("| exact: lookup and step ") == len(exact)


def test_toy_sizes_of_jax_run_and_agree_with_float64():
    for needed in ("jax", "optax"):
        framework(needed)
    cases = ["jax-dense", "jax-sparse-1e6", "exact-jax-zipf-1e6"]
    done = run("--quick", "--only", *cases)
    assert done.returncode == 0, done.stderr
    for name in ("adamax.jax (step)", "adamax.jax (update)", "optax.adamax"):
        assert done.stdout.count(f"| {name} ") == 2
    assert "| exact: lookup and step " in done.stdout


def test_cases_are_listed_and_unknown_ones_refused():
    assert "sparse-memory" in run("--list").stdout
    refused = run("--only", "nothing")
    assert refused.returncode == 2
    assert "unknown case nothing" in refused.stderr


def test_cases_for_a_gpu_say_that_there_is_none(harness, torch, monkeypatch, capsys):
    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["--part", "cuda"]) == 1
    shown = capsys.readouterr()
    assert "cuda: not measured: torch" in shown.err
    assert "needs an NVIDIA GPU and a CUDA build of torch" in shown.out

    monkeypatch.setattr(main, "PARTS", {"cuda": main.PARTS["cuda"]})
    assert main.main(["--quick"]) == 0  # nothing was asked for by name
    assert "cuda: not measured: torch" in capsys.readouterr().out


def test_cases_for_a_gpu_agree_with_float64(torch, run_python):
    """On the CPU, as if it were one: what they measure then means nothing."""
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from benchmarks import cases_cuda, contestants_cuda, harness
        contestants_cuda.DEVICE = "cpu"
        contestants_cuda._check = lambda needed: None
        contestants_cuda._wait = lambda: None
        for case in cases_cuda.CASES:
            if case.name != "cuda-sparse-memory":
                samples, errors = harness._measure(case.toy())
                assert len(errors) >= 2, errors
                assert max(errors.values()) < 1e-3, errors
                harness.Result(case, samples, errors).verdicts()
                print(case.name)
    """
    assert len(run_python(program, ROOT).split()) == 5


def test_a_ratio_is_taken_round_by_round_with_the_fastest_peer(harness):
    samples = {
        "ours": np.array([1.0, 2.0, 3.0]),
        "slow": np.array([9.0, 9.0, 9.0]),
        "fast": np.array([3.0, 4.0, 9.0]),
    }
    verdict = harness.Faster("ours", ("slow", "fast"), 3).judge(samples)
    assert (verdict.value, verdict.met) == (3.0, True)
    assert "fast" in verdict.text
    assert not harness.Faster("ours", ("fast",), 3.01).judge(samples).met
    assert not harness.CostsAtMost("fast", "ours", 2.99).judge(samples).met
    assert harness.Below("ours", 2.0).judge(samples).met
    assert not harness.Below("ours", 2.0, worst=True).judge(samples).met


@pytest.mark.parametrize(
    ("error", "wrong"), [(1e-5, []), (0.1, ["ours"]), (np.nan, ["ours"])]
)
def test_a_wrong_answer_of_ours_is_found(harness, error, wrong):
    oracle = importlib.import_module("benchmarks.oracle")
    ours = harness.Contestant("ours", None, None, oracle.ADAMAX, ours=True)
    peer = harness.Contestant("peer", None, None, oracle.ADAMAX)
    case = harness.Case("name", "title", (ours, peer))
    assert harness.Result(case, {}, {"ours": error, "peer": 1.0}).wrong() == wrong


@pytest.mark.parametrize(("times", "status"), [(2, 0), (3, 1)])
def test_results_are_written_and_a_missed_bar_is_the_exit_status(
    harness, monkeypatch, tmp_path, capsys, times, status
):
    main = importlib.import_module("benchmarks.__main__")
    work = importlib.import_module("benchmarks.workloads").Dense(arrays=1, length=8)
    ours = harness.Contestant("ours", None, work, None, ours=True)
    peer = harness.Contestant("peer", None, work, None)
    case = harness.Case(
        "a-case", "A case", (ours, peer), (harness.Faster("ours", ("peer",), times),)
    )
    samples = {"ours": np.array([1.0, 1.0]), "peer": np.array([2.0, 2.0])}
    monkeypatch.setattr(main, "PARTS", {"part": (case,)})
    monkeypatch.setattr(main, "run", lambda case: harness.Result(case, samples, {}))

    assert main.main(["--output", str(tmp_path)]) == status
    (bar,) = json.loads((tmp_path / "part.json").read_text())["cases"][0]["bars"]
    assert (bar["value"], bar["met"]) == (2.0, not status)
    assert ("a-case: missed: " in capsys.readouterr().err) == bool(status)
    assert "| a-case |" in (tmp_path / "part.md").read_text()
