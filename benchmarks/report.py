"""Results as JSON, and as Markdown that a README can quote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine
from .harness import THREADS, Result, Statistics, Verdict
from .meters import format_with_unit
from .oracle import TOLERANCE


def write(directory: Path, part: str, results: Sequence[Result]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report = as_json(results)
    (directory / f"{part}.json").write_text(json.dumps(report, indent=2) + "\n")
    (directory / f"{part}.md").write_text(as_markdown(part, report, results))


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "threads": THREADS,
        "tolerance_in_learning_rates": TOLERANCE,
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "title": case.title,
        "note": case.note,
        "rounds": case.rounds,
        "contestants": [
            {
                "name": c.name,
                "ours": c.ours,
                "work": asdict(c.work),  # type: ignore[call-overload]
                "measured": c.meter.name,
                "unit": c.meter.unit,
                **asdict(Statistics.of(result.samples[c.name])),
                "relative_to_ours": _as_dict(result.relative(c)),
                "error_in_learning_rates": result.errors.get(c.name),
            }
            for c in case.contestants
        ],
        "bars": [asdict(verdict) for verdict in result.verdicts()],
    }


def _as_dict(statistics: Statistics | None) -> dict[str, Any] | None:
    return None if statistics is None else asdict(statistics)


def as_markdown(part: str, report: Mapping[str, Any], results: Sequence[Result]) -> str:
    sections = [
        f"# Benchmarks: {part}",
        "Written by `python -m benchmarks`; do not edit.",
        _setting(report),
        "## Bars",
        bars_table(results),
        "## Measurements",
        "Medians and quartiles of rounds in which the contestants took turns. "
        "*Relative* is the median of the ratios to `adamax` on the same work, round by "
        "round. *Error* is the largest deviation from the contestant's own rule in "
        "float64, in learning rates.",
        *(f"### {result.case.title}\n\n{measurements_table(result)}" for result in results),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(report: Mapping[str, Any]) -> str:
    about, memory = report["machine"], report["machine"]["memory_bytes"]
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    gpu = about["gpu"]
    on_gpu = "{name}, driver {driver}, CUDA {cuda}; ".format_map(gpu) if gpu else ""
    return (
        f"{on_gpu}{about['cpu']}, {about['cores']} cores{size}, {about['system']}; "
        f"{report['threads']} threads; {versions}; {report['date'][:10]}."
    )


def bars_table(results: Sequence[Result]) -> str:
    rows = [
        (result.case.name, *_bar(verdict))
        for result in results
        for verdict in result.verdicts()
    ]
    return _table(("case", "bar", "measured", "quartiles", "met"), rows)


def _bar(verdict: Verdict) -> tuple[str, ...]:
    value, first, third = (
        format_with_unit(n, verdict.unit) for n in (verdict.value, *verdict.quartiles)
    )
    return verdict.text, value, f"{first} to {third}", "yes" if verdict.met else "**no**"


def measurements_table(result: Result) -> str:
    rows = []
    for c in result.case.contestants:
        spread = Statistics.of(result.samples[c.name])
        median, first, third = (
            c.meter.format(n) for n in (spread.median, *spread.quartiles)
        )
        relative = result.relative(c)
        error = result.errors.get(c.name)
        rows.append(
            (
                c.name,
                median,
                f"{first} to {third}",
                format_with_unit(relative.median, "") if relative else "",
                "" if error is None else f"{error:.1g}",
            )
        )
    table = _table(("contestant", "median", "quartiles", "relative", "error"), rows)
    return f"{table}\n\n{result.case.note}" if result.case.note else table


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
