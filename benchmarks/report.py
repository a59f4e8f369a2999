"""Results as JSON, and as Markdown that other pages can quote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine
from .bars import Statistics, Verdict
from .harness import THREADS, Contestant, Result
from .meters import format_with_unit
from .oracle import TOLERANCE
from .pages import EVENTS


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
        "steps": case.steps,
        "environment": case.variables,
        "in_huge_pages": result.in_huge_pages,
        "contestants": [_contestant(result, c) for c in case.contestants],
        "bars": [asdict(verdict) for verdict in result.verdicts()],
    }


def _contestant(result: Result, c: Contestant) -> dict[str, Any]:
    measured = {}
    for way, samples in result.samples.items():
        relative = result.relative(c, way)
        measured[way] = asdict(Statistics.of(samples[c.name]))
        measured[way]["relative_to_ours"] = relative and asdict(relative)
    return {
        "name": c.name,
        "ours": c.ours,
        "work": asdict(c.work),  # type: ignore[call-overload]
        "measured": c.meter.name,
        "unit": c.meter.unit,
        **measured,
        "error_in_learning_rates": result.errors.get(c.name),
        "events_per_step": result.counts.get(c.name),
    }


def as_markdown(part: str, report: Mapping[str, Any], results: Sequence[Result]) -> str:
    sections = [
        f"# Benchmarks: {part}",
        "Written by `python -m benchmarks`; do not edit.",
        _setting(report),
        "## Bars",
        bars_table(results),
        "## Measurements",
        "Medians of interleaved rounds, with their quartiles. *Hot*: a contestant takes "
        "several steps in a row. *Cold*: the contestants take turns step by step, as the "
        "rest of a training loop does. *Relative*: the median of the ratios to the time of "
        "ours on the same work, taken round by round. *Error*: the largest deviation from "
        "the contestant's own rule in float64, in learning rates.",
        *(f"### {r.case.title}\n\n{measurements(r)}" for r in results),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(report: Mapping[str, Any]) -> str:
    about, memory = report["machine"], report["machine"]["memory_bytes"]
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    gpu = about["gpu"]
    on_gpu = "{name}, driver {driver}, CUDA {cuda}; ".format_map(gpu) if gpu else ""
    return (
        f"{on_gpu}{about['cpu']}, {about['cores']} cores{size}, {about['system']}, "
        f"transparent huge pages: {about['transparent_huge_pages']}; "
        f"{report['threads']} threads; {versions}; {report['date'][:10]}."
    )


def bars_table(results: Sequence[Result]) -> str:
    rows = [
        (result.case.name, *_bar(verdict))
        for result in results
        for verdict in result.verdicts()
    ]
    return _table(("case", "bar", "way", "measured", "quartiles", "bar is"), rows)


def _bar(verdict: Verdict) -> tuple[str, ...]:
    numbers = (verdict.measured.median, *verdict.measured.quartiles)
    value, first, third = (format_with_unit(n, verdict.unit) for n in numbers)
    met = "met" if verdict.met else "**missed**"
    return verdict.text, verdict.way, value, f"{first} to {third}", met


def measurements(result: Result) -> str:
    """The table of a case, that of its events, and its note."""
    header = ["contestant"]
    for way in result.samples:
        header += [way, "quartiles", "relative"]
    rows = [[c.name, *_cells(result, c)] for c in result.case.contestants]
    blocks = [_table([*header, "error"], rows)]
    if result.counts:
        blocks.append(_events(result))
    if result.case.note:
        blocks.append(result.case.note)
    return "\n\n".join(blocks)


def _cells(result: Result, c: Contestant) -> list[str]:
    cells = []
    for way, samples in result.samples.items():
        spread, relative = Statistics.of(samples[c.name]), result.relative(c, way)
        numbers = (spread.median, *spread.quartiles)
        median, first, third = (format_with_unit(n, c.meter.unit) for n in numbers)
        cells += [median, f"{first} to {third}"]
        cells.append(format_with_unit(relative.median, "") if relative else "")
    error = result.errors.get(c.name)
    return [*cells, "" if error is None else f"{error:.1g}"]


def _events(result: Result) -> str:
    rows = [
        [name, *("not counted" if n is None else f"{n:,.1f}" for n in counts.values())]
        for name, counts in result.counts.items()
    ]
    share = result.in_huge_pages
    pages = "" if share is None else f" {share:.0%} of the memory is in huge pages."
    events = f"Events per step, by `perf stat`.{pages}"
    return f"{events}\n\n{_table(['contestant', *EVENTS], rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
