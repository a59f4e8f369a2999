"""Optimizer state in 2, 4 and 8 bytes for each parameter: the same losses?

    python examples/compact_state.py                     # on Python's own documentation
    python examples/compact_state.py --text novel.txt    # on any text in UTF-8
    python examples/compact_state.py --sparse dense      # or exact, or lazy

The model is the next-word model of torch_next_word.py. For each seed it is trained with
each state_dtype, from the same initial weights and with the same batches. What is printed
is the mean of the held-out loss over the seeds in the course of training, how far the means
of compact state are from those of float32, and what the state takes in memory.
"""

import argparse
import sys
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
    new_figure,
    rate,
    run_program,
    save_figure,
    whole_number,
)

EVALUATIONS = 5  # of the held-out loss, spread over the run
PLOT = "compact_state.png"
KINDS = ("float32", "bfloat16", "8bit")

# --- Training --------------------------------------------------------------------------


class Run(NamedTuple):
    losses: np.ndarray  # (evaluations,)
    state_bytes: int
    parameters: int


def train(
    kind: str, seed: int, corpus: Corpus, options: argparse.Namespace, bar: tqdm
) -> Run:
    torch.manual_seed(seed)
    model = NextWord(options.rows, options.dim, sparse=options.sparse != "dense")
    optimizer = Adamax(
        model.parameters(),
        lr=options.learning_rate,
        sparse="exact" if options.sparse == "exact" else "lazy",
        state_dtype=kind,
    )
    if options.sparse == "exact":
        optimizer.attach(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses = []
    seeded = argparse.Namespace(**{**vars(options), "seed": seed})
    for number, (rows, words) in enumerate(batches(corpus, seeded), start=1):
        optimizer.zero_grad()
        cross_entropy(model(rows), words).backward()
        optimizer.step()
        schedule.step()
        bar.update()
        if number in evaluated_steps(options.steps):
            losses.append(held_out_loss(model, corpus))
    return Run(
        np.array(losses),
        sum(state_bytes(state) for state in optimizer.state.values()),
        sum(param.numel() for param in model.parameters()),
    )


def evaluated_steps(steps: int) -> list[int]:
    spread = np.linspace(0, steps, EVALUATIONS + 1).round().astype(int)
    return sorted(set(spread[1:].tolist()) - {0})


def state_bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for name, tensor in state.items() if name != "step")


def all_runs(corpus: Corpus, options: argparse.Namespace) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    total = len(KINDS) * options.seeds * options.steps
    with tqdm(total=total, unit=" steps", dynamic_ncols=True) as bar:
        for seed, kind in of_each(options.seeds):
            bar.set_description(f"seed {seed}, {kind}")
            runs[kind].append(train(kind, seed, corpus, options, bar))
    return runs


def of_each(seeds: int) -> Iterator[tuple[int, str]]:
    return ((seed, kind) for seed in range(seeds) for kind in KINDS)


# --- Results ---------------------------------------------------------------------------


def means(runs: dict[str, list[Run]]) -> dict[str, np.ndarray]:
    return {kind: np.mean([r.losses for r in of], axis=0) for kind, of in runs.items()}


def print_results(runs: dict[str, list[Run]], steps: Sequence[int]) -> None:
    losses = means(runs)
    print(f"\n{'':10}{'bytes a':>10}  held-out loss after so many steps")
    print(f"{'':10}{'parameter':>10}" + "".join(f"{step:>10}" for step in steps))
    for kind, of_kind in runs.items():
        held = of_kind[0].state_bytes / of_kind[0].parameters
        print(f"{kind:10}{held:10.2f}" + "".join(f"{loss:10.4f}" for loss in losses[kind]))
    print("\nmean differences to float32")
    for kind in KINDS[1:]:
        apart = losses[kind] - losses["float32"]
        print(f"{kind:20}" + "".join(f"{difference:10.4f}" for difference in apart))
    spread = np.std([run.losses for run in runs["float32"]], axis=0)
    print(f"{'spread over seeds':20}" + "".join(f"{number:10.4f}" for number in spread))


def save_plot(path: Path, runs: dict[str, list[Run]], steps: Sequence[int]) -> None:
    figure = new_figure(9, 4)
    by_steps, apart = figure.subplots(1, 2)
    losses = means(runs)
    looks = {
        "float32": {"color": "0.6", "linewidth": 4},
        "bfloat16": {"color": "C0", "linewidth": 1.5},
        "8bit": {"color": "C1", "linewidth": 1.5},
    }
    for kind in KINDS:
        by_steps.plot(steps, losses[kind], label=kind, marker=".", **looks[kind])
        if kind != "float32":
            difference = losses[kind] - losses["float32"]
            apart.plot(steps, difference, label=kind, marker=".", **looks[kind])
    by_steps.set(xlabel="steps", ylabel="held-out loss per word")
    apart.set(
        xlabel="steps", ylabel="difference of the loss to float32", ylim=(-0.01, 0.01)
    )
    save_figure(figure, path)


# --- The program -----------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Compare training with state of 2, 4 and 8 bytes.")
    add = partial(parser.add_argument, metavar="X")
    count = whole_number
    add("--text", type=Path, help="a text in UTF-8 (the documentation of Python)")
    add(
        "--sparse", default="lazy", choices=("lazy", "exact", "dense"), help="(%(default)s)"
    )
    add("--steps", type=count, default=200, help="of each run (%(default)s)")
    add("--seeds", type=count, default=2, help="runs of each kind (%(default)s)")
    add("--rows", type=count, default=2**15, help="of the table (%(default)s)")
    add("--dim", type=count, default=32, help="length of a row (%(default)s)")
    add("--batch", type=count, default=1024, help="words per step (%(default)s)")
    add("--learning-rate", type=rate, default=0.03, help="of all runs (%(default)s)")
    add("--out", type=Path, default=Path("out/compact_state"), help="(%(default)s)")
    return parser


def run(options: argparse.Namespace) -> None:
    corpus = read_corpus(options)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Gradients   {options.sparse}")
    runs = all_runs(corpus, options)
    steps = evaluated_steps(options.steps)
    print_results(runs, steps)
    save_plot(options.out / PLOT, runs, steps)
    print(f"\nThe losses are drawn in {options.out / PLOT}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
