"""The benchmarks: every case runs at a small size, and bars are judged rightly."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frameworks import framework

ROOT = Path(__file__).parents[2]

FRAMEWORKS = {
    "numpy": ("torch", "tensorflow", "tf_keras"),
    "torch": ("torch",),
    "startup": ("torch",),
    "exact": ("torch", "jax", "optax"),
    "jax": ("jax", "optax"),
    "keras": ("torch", "jax", "tensorflow", "tf_keras"),
}


@pytest.fixture
def module(monkeypatch):
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("part", FRAMEWORKS)
def test_small_sizes_run_and_agree_with_float64(module, part):
    for needed in FRAMEWORKS[part]:
        framework(needed)
    done = run("--quick", "--part", part)
    assert done.returncode == 0, done.stderr
    for case in module("__main__").PARTS[part]:
        assert f"{case.name}: {case.title} ...\n| contestant " in done.stdout
        for contestant in case.contestants:
            assert f"| {contestant.name} " in done.stdout


def test_cases_are_listed_and_unknown_ones_refused():
    assert "numpy-memory" in run("--list").stdout
    refused = run("--only", "nothing")
    assert refused.returncode == 2
    assert "unknown case nothing" in refused.stderr


def test_cases_for_a_gpu_say_that_there_is_none(module, torch, monkeypatch, capsys):
    main = module("__main__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["--part", "cuda"]) == 1
    shown = capsys.readouterr()
    assert "cuda: not measured: torch" in shown.err
    assert "needs an NVIDIA GPU and a CUDA build of torch" in shown.out

    monkeypatch.setattr(main, "PARTS", {"cuda": main.PARTS["cuda"]})
    assert main.main(["--quick"]) == 0  # nothing was asked for by name
    assert "cuda: not measured: torch" in capsys.readouterr().out


def test_cases_for_a_gpu_agree_with_float64(torch, run_python):
    """On the CPU, as if it were a GPU: the times mean nothing then."""
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from benchmarks import cases_cuda, contestants_cuda, harness
        contestants_cuda.DEVICE = "cpu"
        contestants_cuda.check_memory = lambda needed: None
        contestants_cuda.wait = lambda: None
        for case in cases_cuda.CASES:
            if case.name != "cuda-memory":
                result = harness.Result(case, *harness.measure(case.toy()))
                assert len(result.errors) >= 2, result.errors
                assert max(result.errors.values()) < 1e-3, result.errors
                assert len(result.verdicts()) >= len(case.bars)
                print(case.name)
    """
    assert len(run_python(program, ROOT).split()) == 5


class Recorder:
    """A contestant that notes its steps, and the number drawn for each."""

    def __init__(self, name, steps):
        self.name, self.steps = name, steps

    def take(self, draw):
        self.draw = draw

    def step(self):
        self.steps.append((self.name, self.draw))

    def parameters(self):
        return []


class Draws:
    """A work whose draws are 1, 2, 3 and so on."""

    memory = drawn = 0

    def stream(self, rules):
        return self

    def draw(self):
        self.drawn += 1
        return self.drawn


def test_hot_steps_are_taken_in_a_row_and_cold_ones_in_turns(module):
    harness, meters = module("harness"), module("meters")
    steps, work = [], Draws()

    def measure(step):
        step()
        return float(len(steps))

    meter = meters.Meter(meters.SECONDS.name, meters.SECONDS.unit, lambda: measure)
    contestants = tuple(
        harness.Contestant(
            name, lambda _, name=name: Recorder(name, steps), work, None, meter=meter
        )
        for name in "ab"
    )
    counts = {"rounds": 1, "warm_ups": 0, "steps": 2}
    samples, *_ = harness.measure(harness.Case("", "", contestants, pause=0, **counts))

    hot, cold = steps[:6], steps[6:]
    assert hot == [(name, draw) for name in "ab" for draw in (1, 2, 3)]
    assert cold == [("a", 4), ("b", 4), ("b", 5), ("a", 5)]
    assert samples["hot"] == {"a": [2.5], "b": [5.5]}  # without the first step
    assert samples["cold"] == {"a": [8.5], "b": [8.5]}


def test_a_ratio_is_taken_round_by_round_with_the_fastest_peer(module):
    bars = module("bars")
    hot = {
        "ours": np.array([1.0, 2.0, 3.0]),
        "slow": np.array([9.0, 9.0, 9.0]),
        "fast": np.array([3.0, 4.0, 9.0]),
    }
    samples = {"hot": hot, "cold": {**hot, "fast": np.array([30.0, 4.0, 90.0])}}
    one, other = bars.speed("ours", ("slow", "fast"), hot=3, cold=4.6).verdicts(samples)
    assert (one.way, one.measured.median, one.met) == ("hot", 3.0, True)
    assert (other.way, other.measured.median, other.met) == ("cold", 4.5, False)
    assert one.text == "speed of ours relative to fast: at least 3"
    assert "slow" in other.text

    def met(bar):
        return [verdict.met for verdict in bar.verdicts(samples)]

    assert met(bars.relative_time("fast", ("ours",), hot=2.99, cold=15)) == [False, False]
    assert met(bars.relative_time("fast", ("ours",), hot=3, cold=30)) == [True, True]
    assert met(bars.seconds_more("slow", ("ours",), hot=7)) == [True]
    assert met(bars.seconds_more("slow", ("ours",), hot=6.9)) == [False]
    assert met(bars.seconds("ours", cold=2.0)) == [True]
    assert met(bars.most_memory("ours", cold=2.0)) == [False]  # in every round


@pytest.mark.parametrize(
    ("error", "wrong"), [(1e-5, []), (0.1, ["ours"]), (np.nan, ["ours"])]
)
def test_a_wrong_answer_of_ours_is_found(module, error, wrong):
    harness, oracle = module("harness"), module("oracle")
    ours = harness.Contestant("ours", None, None, oracle.ADAMAX, ours=True)
    peer = harness.Contestant("peer", None, None, oracle.ADAMAX)
    case = harness.Case("name", "title", (ours, peer))
    assert harness.Result(case, {}, {"ours": error, "peer": 1.0}).wrong() == wrong


@pytest.mark.parametrize(("times", "status"), [(2, 0), (3, 1)])
def test_results_are_written_and_a_missed_bar_is_the_exit_status(
    module, monkeypatch, tmp_path, capsys, times, status
):
    main, harness, bars = module("__main__"), module("harness"), module("bars")
    work = module("workloads").Dense(arrays=1, length=8)
    ours = harness.Contestant("ours", None, work, None, ours=True)
    peer = harness.Contestant("peer", None, work, None)
    case = harness.Case(
        "a-case", "A case", (ours, peer), (bars.speed("ours", ("peer",), 1, times),)
    )
    of_way = {"ours": np.array([1.0, 1.0]), "peer": np.array([2.0, 2.0])}
    result = harness.Result(
        case,
        {"hot": of_way, "cold": of_way},
        {},
        {"ours": {"page-faults": 1.5, "dTLB-load-misses": None, "dTLB-store-misses": None}},
        in_huge_pages=0.25,
    )
    monkeypatch.setattr(main, "PARTS", {"part": (case,)})
    monkeypatch.setattr(main, "run", lambda case, process: result)

    assert main.main(["--output", str(tmp_path)]) == status
    (written,) = json.loads((tmp_path / "part.json").read_text())["cases"]
    hot, cold = written["bars"]
    assert (hot["way"], hot["measured"]["median"], hot["met"]) == ("hot", 2.0, True)
    assert (cold["way"], cold["met"]) == ("cold", not status)
    assert written["contestants"][1]["cold"]["relative_to_ours"]["median"] == 2.0
    missed = f"a-case: missed, cold: speed of ours relative to peer: at least {times}"
    assert (missed in capsys.readouterr().err) == bool(status)
    page = (tmp_path / "part.md").read_text()
    assert page.count("| met ") == 2 - status
    assert page.count("| **missed** ") == status
    assert "25% of the memory is in huge pages" in page
    assert "| ours       | 1.5 " in page
    assert "| not counted" in page


def test_a_case_that_fails_does_not_keep_others_from_being_measured(
    module, monkeypatch, capsys
):
    main, harness = module("__main__"), module("harness")
    errors = {
        "missing": ModuleNotFoundError("No module named 'x'"),
        "impossible": module("meters").CannotMeasureError("no reason"),
        "broken": TypeError("a fault"),
    }

    def fail(case, process):
        raise errors[case.name]

    cases = tuple(harness.Case(name, "A case", ()) for name in errors)
    monkeypatch.setattr(main, "PARTS", {"part": cases})
    monkeypatch.setattr(main, "run", fail)
    assert main.main(["--only", *errors]) == 1
    shown = capsys.readouterr().err
    assert "missing: not measured: No module named 'x'; install the peers" in shown
    assert "impossible: not measured: no reason\n" in shown
    assert "broken: not measured: TypeError('a fault')\n" in shown
    assert shown.count("Traceback") == 1


def test_the_passes_over_memory_move_what_they_say(module):
    limits, oracle, workloads = (module(n) for n in ("limits", "oracle", "workloads"))
    dense = workloads.Dense(arrays=3, length=70_001)
    rows = workloads.Sparse(5000, "zipf", number=2000, width=20)
    for make, work, rule in (
        (limits.DensePass, dense, oracle.MOVE),
        (limits.RowsPass, rows, oracle.MOVE_ROWS),
    ):
        stream, entry = work.stream({rule}), make(work)
        for _ in range(4):
            entry.take(stream.draw())
            entry.step()
        # In learning rates; sums of repeated ids are in float32.
        assert stream.error(rule, entry.parameters()) < 0.1


def test_without_a_compiler_the_speed_of_memory_is_not_measured(module, monkeypatch):
    limits, meters = module("limits"), module("meters")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(meters.CannotMeasureError, match=r"no C\+\+ compiler was found"):
        limits._library.__wrapped__()


def test_a_program_finds_bytecode_or_not_and_its_failure_shows(module):
    program = module("contestants").Program
    program(None, "import adamax").step()
    with pytest.raises(subprocess.CalledProcessError):
        program(None, _COMPILES).step()  # has its bytecode now
    program(None, _COMPILES, cached=False).step()


_COMPILES = """
import builtins
compiled, before = [], builtins.compile
def compile(source, name, *arguments, **keywords):
    compiled.append(str(name))
    return before(source, name, *arguments, **keywords)
builtins.compile = compile
import adamax
assert any("adamax" in name for name in compiled), compiled
"""


PERF = f"""#!{sys.executable}
import os, re, signal, sys
control = next(a for a in sys.argv if a.startswith("--control="))
commands, answers = map(int, re.findall(r"\\d+", control))
def end(*_):
    for line in ("80,,page-faults:u,1,100.00,,", "<not supported>,,dTLB-load-misses,0,,,"):
        print(line, file=sys.stderr)
    sys.exit()
signal.signal(signal.SIGINT, end)
while text := os.read(commands, 16):
    os.write(answers, b"ack\\n")
"""


@pytest.mark.parametrize(
    ("perf", "faults"), [(PERF, 4.0), ("#!/bin/sh\nexit 1\n", None), ("", None)]
)
def test_events_are_counted_where_perf_can(module, monkeypatch, tmp_path, perf, faults):
    pages, steps = module("pages"), []
    if perf:
        path = tmp_path / "perf"
        path.write_text(perf)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    counts = pages.count_events(Recorder("a", steps), range(20))
    assert counts == {
        "page-faults": faults,
        "dTLB-load-misses": None,
        "dTLB-store-misses": None,
    }
    assert len(steps) == (20 if perf else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux'")
def test_huge_pages_can_be_switched_off(module, run_python):
    pages = module("pages")
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import numpy as np
        from benchmarks import pages
        pages.set_huge_pages(allowed=sys.argv[2] == "True")
        array = np.ones(1 << 26, np.uint8)
        print(pages.share_of_huge_pages())
    """

    def share(on):
        variables = {**os.environ, **pages.VARIABLES[on]}
        return float(run_python(program, ROOT, on, **variables))

    assert share(False) == 0
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert share(True) > 0.5
