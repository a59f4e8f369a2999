"""Three meanings of a sparse gradient: one next-word model, trained from one seed.

    python examples/exact_or_lazy.py                     # on Python's own documentation
    python examples/exact_or_lazy.py --text novel.txt    # on any text in UTF-8

The model is that of torch_next_word.py: it adds up three rows of a table with half a
million rows, and two dense layers make a guess of the sum. All runs have the same initial
weights, the same batches and the same learning rate. They differ in what happens to rows
that a batch does not use:

    dense   their gradient is zero, so they go on moving by their momentum, and their norm
            decays; every step goes through the whole table
    exact   the same, but they are moved when they are needed (sparse="exact")
    lazy    they stand still (sparse="lazy")

Exact and dense runs differ by roundings, which training makes larger with time. What is
printed and drawn is how far both sparse runs are from the dense one, and what they cost.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from adamax.torch import Adamax
from torch_next_word import Corpus, NextWord, batches, held_out_loss, read_corpus
from word_vectors import (
    OneLineParser,
    UnusableInputError,
    new_figure,
    rate,
    run_program,
    save_figure,
    whole_number,
)

EVALUATIONS = 20  # of the held-out loss, spread over the run
PLOT = "exact.png"
DENSE, EXACT, LAZY = "dense", "exact", "lazy"
KINDS = (DENSE, EXACT, LAZY)

# --- Training --------------------------------------------------------------------------


class Run(NamedTuple):
    steps: np.ndarray  # at which the held-out loss was taken
    losses: np.ndarray
    seconds: np.ndarray  # of each step, from the batch to new weights
    table: torch.Tensor  # in the end


def step(
    model: NextWord, optimizer: Adamax, rows: torch.Tensor, words: torch.Tensor
) -> float:
    """Take a step; return how long it took."""
    start = time.perf_counter()
    optimizer.zero_grad()
    cross_entropy(model(rows), words).backward()
    optimizer.step()
    return time.perf_counter() - start


def make(
    kind: str, rows: int, dim: int, options: argparse.Namespace
) -> tuple[NextWord, Adamax]:
    torch.manual_seed(options.seed)
    model = NextWord(rows, dim, sparse=kind != DENSE)
    optimizer = Adamax(
        model.parameters(),
        lr=options.learning_rate,
        sparse=EXACT if kind == EXACT else LAZY,
    )
    if kind == EXACT:
        optimizer.attach(model)
    return model, optimizer


def train(
    kind: str, corpus: Corpus, options: argparse.Namespace, bar: tqdm
) -> Iterator[Run]:
    """Yield what has become of a run after each evaluation; the last is all of it."""
    # The first steps of all take longer, as they load code. A small model can take those.
    small = make(kind, 1, 1, options)
    rows, words = corpus.training
    for _ in range(2):
        step(*small, rows[:1] * 0, words[:1])

    try:
        model, optimizer = make(kind, options.rows, options.dim, options)
    except RuntimeError:
        table = f"a table of {options.rows} rows of {options.dim} numbers"
        raise UnusableInputError(f"there is not enough memory for {table}") from None
    evaluated = np.linspace(0, options.steps, EVALUATIONS + 1).round().astype(int)
    evaluated = np.unique(evaluated)
    losses, seconds = [held_out_loss(model, corpus)], []
    for number, batch in enumerate(batches(corpus, options), start=1):
        seconds.append(step(model, optimizer, *batch))
        bar.update()
        if number in evaluated:
            losses.append(held_out_loss(model, corpus))
            if number == options.steps:
                optimizer.flush()
            yield Run(
                evaluated, np.array(losses), np.array(seconds), model.table.weight.detach()
            )


# --- Results ---------------------------------------------------------------------------


def print_results(runs: dict[str, Run]) -> None:
    dense = runs[DENSE]
    moved = float((dense.table - dense.table.mean()).std())
    print()
    print(f"{'':6}{'ms per':>9}{'held-out':>10}{'largest':>12}{'rms':>12}")
    print(f"{'':6}{'step':>9}{'loss':>10}{'loss diff.':>12}{'weight diff.':>14}")
    for kind, run in runs.items():
        milliseconds = 1e3 * np.median(run.seconds)
        of_loss = np.abs(run.losses - dense.losses).max()
        of_weights = float((run.table - dense.table).square().mean().sqrt()) / moved
        differences = f"{of_loss:12.1e}{of_weights:14.1e}" if kind != DENSE else ""
        print(f"{kind:6}{milliseconds:9.1f}{run.losses[-1]:10.4f}{differences}")
    print(
        "\nDifferences are those to the dense run, at the same steps; that of the table is"
    )
    print("relative to the spread of its numbers.")


def save_plot(path: Path, runs: dict[str, Run]) -> None:
    figure = new_figure(13, 4.2)
    by_steps, differences, by_seconds = figure.subplots(1, 3)
    looks = {
        DENSE: {"color": "0.6", "linewidth": 4},
        EXACT: {"color": "C0", "linewidth": 1.3},
        LAZY: {"color": "C1", "linewidth": 1.3},
    }
    for kind, run in runs.items():
        seconds = run.steps * np.median(run.seconds)  # of any one step others may take time
        by_steps.plot(run.steps, run.losses, label=kind, **looks[kind])
        by_seconds.plot(seconds[1:], run.losses[1:], label=kind, **looks[kind])
        if kind != DENSE:
            apart = np.abs(run.losses - runs[DENSE].losses)
            some = apart > 0  # a logarithmic axis has no 0
            steps = run.steps[some]
            differences.plot(steps, apart[some], marker=".", label=kind, **looks[kind])
    by_steps.set(xlabel="steps", ylabel="held-out loss per word")
    differences.set(
        xlabel="steps", ylabel="difference of the loss to the dense run", yscale="log"
    )
    by_seconds.set(
        xlabel="seconds of training, by the median step",
        ylabel="held-out loss per word",
        xscale="log",
    )
    save_figure(figure, path)


# --- The program -----------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Compare dense, exact and lazy updates of a table.")
    add = partial(parser.add_argument, metavar="X")
    count = whole_number
    add("--text", type=Path, help="a text in UTF-8 (the documentation of Python)")
    add("--steps", type=count, default=200, help="of each run (%(default)s)")
    add("--rows", type=count, default=2**19, help="of the table (%(default)s)")
    add("--dim", type=count, default=32, help="length of a row (%(default)s)")
    add("--batch", type=count, default=1024, help="words per step (%(default)s)")
    add("--learning-rate", type=rate, default=0.03, help="of all runs (%(default)s)")
    add("--seed", type=partial(count, least=0), default=0, help="(%(default)s)")
    add("--out", type=Path, default=Path("out/exact_or_lazy"), help="(%(default)s)")
    return parser


def run(options: argparse.Namespace) -> None:
    corpus = read_corpus(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(KINDS) * options.steps, unit=" steps", dynamic_ncols=True) as bar:
        trained = [train(kind, corpus, options, bar) for kind in KINDS]
        # By turns, so that whatever else the machine does slows all of them down.
        for latest in zip(*trained, strict=True):
            runs = dict(zip(KINDS, latest, strict=True))
    print_results(runs)
    save_plot(options.out / PLOT, runs)
    print(f"\nThe losses in the course of training are drawn in {options.out / PLOT}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
