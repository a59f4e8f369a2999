"""``python -m benchmarks``: measure all cases, write results, fail if a bar is missed."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from . import (
    cases_cuda,
    cases_exact,
    cases_jax,
    cases_keras,
    cases_numpy,
    cases_torch,
    report,
)
from .gpu import why_not
from .harness import Case, Result, run
from .meters import CannotMeasureError

PARTS: dict[str, tuple[Case, ...]] = {
    "numpy": cases_numpy.CASES,
    "torch": cases_torch.CASES,
    "keras": cases_keras.CASES,
    "exact": cases_exact.CASES,
    "jax": cases_jax.CASES,
    "cuda": cases_cuda.CASES,
}

_RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = {
        part: [c for c in cases if not options.only or c.name in options.only]
        for part, cases in PARTS.items()
        if options.part in (None, part)
    }
    if unknown := set(options.only) - {c.name for cases in chosen.values() for c in cases}:
        print(f"unknown case {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for part, cases in chosen.items():
            for case in cases:
                print(f"{case.name:24} {part}: {case.title}, {len(case.bars)} bars")
        return 0

    complete = not (options.only or options.quick)
    output = options.output or (_RESULTS if complete else None)
    failures: list[str] = []
    for part, cases in chosen.items():
        if part == "cuda" and cases and not options.only and (reason := why_not()):
            remedy = "python -m benchmarks --part cuda, where there are both"
            message = f"cuda: not measured: {reason}; needs an NVIDIA GPU and a CUDA build"
            print(f"{message} of torch: {remedy}")
            if options.part:
                failures.append(f"cuda: not measured: {reason}")
            continue
        results = []
        for case in cases:
            print(f"{case.name}: {case.title} ...", flush=True)
            try:
                result = run(case.toy() if options.quick else case)
            except (CannotMeasureError, BrokenProcessPool) as error:
                failures.append(f"{case.name}: not measured: {error}")
                continue
            except ModuleNotFoundError as error:
                remedy = "install the peers (pip install --group frameworks)"
                failures.append(f"{case.name}: not measured: {error}; {remedy}")
                continue
            results.append(result)
            failures += _failures(result, judge=not options.quick)
            print(report.measurements_table(result), "", sep="\n")
        if results and not options.quick:
            print(report.bars_table(results), "", sep="\n")
        if output is not None and cases:
            report.write(output, part, results)
            print(f"written to {output}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _failures(result: Result, judge: bool) -> list[str]:
    name = result.case.name
    wrong = [f"{name}: wrong answer of {contestant}" for contestant in result.wrong()]
    missed = [f"{name}: missed: {v.text}" for v in result.verdicts() if judge and not v.met]
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
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", action="store_true", help="toy sizes, nothing judged but answers"
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
