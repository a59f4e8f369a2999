"""``python -m benchmarks``: measure all cases, write results, fail if a bar is missed."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from . import cases, cases_cuda, cases_exact, cases_jax, cases_keras, report
from .harness import Case, Result, new_process, run
from .machine import why_no_gpu
from .meters import CannotMeasureError

PARTS: dict[str, tuple[Case, ...]] = {
    "numpy": cases.NUMPY,
    "torch": cases.TORCH,
    "startup": cases.STARTUP,
    "exact": cases_exact.CASES,
    "jax": cases_jax.CASES,
    "keras": cases_keras.CASES,
    "cuda": cases_cuda.CASES,
}

_RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    chosen = {
        part: [c for c in of_part if not options.only or c.name in options.only]
        for part, of_part in PARTS.items()
        if options.part in (None, part)
    }
    if unknown := set(options.only) - {
        c.name for of_part in chosen.values() for c in of_part
    }:
        print(f"unknown case {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for part, of_part in chosen.items():
            for case in of_part:
                print(f"{case.name:30} {part}: {case.title}, {len(case.bars)} bars")
        return 0

    complete = not (options.only or options.quick or options.rounds)
    output = options.output or (_RESULTS if complete else None)
    failures: list[str] = []
    for part, of_part in chosen.items():
        if part == "cuda" and of_part and not options.only and (why := why_no_gpu()):
            remedy = "python -m benchmarks --part cuda, where there are both"
            message = f"cuda: not measured: {why}; needs an NVIDIA GPU and a CUDA build"
            print(f"{message} of torch: {remedy}")
            if options.part:
                failures.append(f"cuda: not measured: {why}")
            continue
        if options.quick:
            results = _measure([c.toy() for c in of_part], failures, quick=True)
        else:
            rounds = {"rounds": options.rounds} if options.rounds else {}
            results = _measure([replace(c, **rounds) for c in of_part], failures)
            if results:
                print(report.bars_table(results), "", sep="\n")
        if output is not None and of_part:
            report.write(output, part, results)
            print(f"written to {output}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _measure(
    chosen: list[Case], failures: list[str], *, quick: bool = False
) -> list[Result]:
    """Measure cases, each in a new process; quick ones of one environment share one."""
    results = []
    if quick:
        chosen = sorted(chosen, key=lambda c: sorted(c.variables.items()))
    for _, group in groupby(chosen, lambda c: c.variables if quick else c.name):
        together = list(group)
        with new_process(together[0].variables) as process:
            for case in together:
                print(f"{case.name}: {case.title} ...", flush=True)
                try:
                    result = run(case, process)
                except Exception as error:  # the other cases are measured all the same
                    failures.append(f"{case.name}: not measured: {_reason(error)}")
                    continue
                results.append(result)
                failures += _failures(result, judge=not quick)
                print(report.measurements(result), "", sep="\n", flush=True)
    return results


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; install the peers (pip install --group frameworks)"
    if isinstance(error, CannotMeasureError | BrokenProcessPool):
        return str(error)
    traceback.print_exception(error)
    return repr(error)


def _failures(result: Result, judge: bool) -> list[str]:
    name = result.case.name
    wrong = [f"{name}: wrong answer of {contestant}" for contestant in result.wrong()]
    missed = [
        f"{name}: missed, {verdict.way}: {verdict.text}"
        for verdict in result.verdicts()
        if judge and not verdict.met
    ]
    return wrong + missed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Adamax beside its peers. The exit status is 1 if a bar is "
        "missed, an answer is wrong or a case could not be measured.",
    )
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", default=[], help="only these cases"
    )
    parser.add_argument("--part", choices=PARTS, help="only the cases of this part")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument(
        "--rounds", metavar="N", type=int, help="measure N rounds of each case"
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", action="store_true", help="small sizes; only answers are judged"
    )
    extent.add_argument(
        "--output",
        metavar="DIRECTORY",
        type=Path,
        help="where to write results (default: benchmarks/results/ after a complete run, "
        "else nowhere)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
