"""A next-word model with a large table of word sequences, trained in four ways.

    python examples/torch_next_word.py                     # on Python's own documentation
    python examples/torch_next_word.py --text novel.txt    # on any text in UTF-8

The model guesses the next word from the last three. It hashes the last word, the last two
and all three to one row each of a table with half a million rows, adds up the rows, and
two dense layers turn the sum into a guess. A step uses some thousand rows of the table.
With dense gradients an optimizer goes through the whole table nevertheless. With sparse
gradients, which name the rows that were used, it can leave the others alone.

Everything but the optimizer is the same in all runs: initial weights, batches, number of
steps. The learning rates are the best of 0.001, 0.003, 0.01, 0.03, 0.1 and 0.3 for the
default text and settings; judged by the held-out loss, so that all are favoured alike.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from adamax.torch import Adamax
from word_vectors import (
    OneLineParser,
    UnusableInputError,
    new_figure,
    python_documentation,
    rate,
    read_text,
    run_program,
    save_figure,
    whole_number,
    words_of,
)

CONTEXT = 3  # words that the model sees
GUESSES = 2000  # words that it can guess; the first stands for all that are rarer
HIDDEN = 64
MOST_HELD_OUT = 20_000  # words; more would measure the loss no better, only slower
EVALUATIONS = 15  # of the held-out loss, spread over the run
PLOT = "comparison.png"

# --- The text --------------------------------------------------------------------------


class Corpus(NamedTuple):
    """For each word of a text: the rows of the table that stand for the words before it."""

    rows: Tensor  # (words, CONTEXT)
    words: Tensor  # as numbers of guesses
    held_out: int  # how many at the end are not trained on

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        return self.rows[: -self.held_out], self.words[: -self.held_out]

    @property
    def unseen(self) -> tuple[Tensor, Tensor]:
        return self.rows[-self.held_out :], self.words[-self.held_out :]


def read_corpus(options: argparse.Namespace) -> Corpus:
    """The corpus that an example is to work on; tells what it is."""
    print(f"Text        {options.text or 'the documentation of Python'}", flush=True)
    text = read_text(options.text) if options.text else python_documentation()
    corpus = build_corpus(text, options.rows)
    used = len(corpus.training[0].unique())
    print(f"Words       {len(corpus.words):,}, the last {corpus.held_out:,} held out")
    print(f"Table       {options.rows:,} rows, of which the training text uses {used:,}")
    return corpus


def build_corpus(text: str, rows: int) -> Corpus:
    # A paragraph that repeats counts once: what is held out shall not be trained on too.
    paragraphs = dict.fromkeys(words_of(part) for part in re.split(r"\n\s*\n\s*", text))
    words = [word for paragraph in paragraphs for word in ("", *paragraph)]
    is_word = np.array(words, bool)  # and not the mark between paragraphs
    held_out = min(int(is_word.sum()) // 10, MOST_HELD_OUT)
    if not held_out:
        raise UnusableInputError("the text is too short: it has less than ten words")
    training_words = [word for word in words if word][:-held_out]
    frequent = [word for word, _ in Counter(training_words).most_common(GUESSES - 1)]
    guesses = {word: number for number, word in enumerate(frequent, start=1)}
    return Corpus(
        torch.from_numpy(hashed_contexts(words, rows)[is_word]),
        torch.tensor([guesses.get(word, 0) for word in words if word]),
        held_out,
    )


def hashed_contexts(words: Sequence[str], rows: int) -> np.ndarray:
    """For each word, the rows for the last word before it, the last two and so on."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words), start=1)}
    text = np.array([numbers[word] for word in words], np.uint64)
    hashes = np.zeros(len(text), np.uint64)
    columns = []
    for distance in range(1, CONTEXT + 1):
        hashes = (hashes ^ np.roll(text, distance)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
        columns.append(hashes % np.uint64(rows))
    return np.stack(columns, axis=1).astype(np.int64)


# --- The model -------------------------------------------------------------------------


class NextWord(nn.Module):
    def __init__(self, rows: int, dim: int, sparse: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode="sum", sparse=sparse)
        nn.init.normal_(self.table.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, GUESSES)
        )

    def forward(self, rows: Tensor) -> Tensor:
        guesses: Tensor = self.layers(self.table(rows))
        return guesses


@torch.no_grad()
def held_out_loss(model: NextWord, corpus: Corpus) -> float:
    """The loss per word on text that the model has not seen."""
    pieces = zip(*(part.split(4096) for part in corpus.unseen), strict=True)
    total = sum(cross_entropy(model(x), y, reduction="sum").item() for x, y in pieces)
    return total / corpus.held_out


def context_free_loss(corpus: Corpus) -> float:
    """The held-out loss of guesses that are as frequent as the words were in training."""
    counts = torch.bincount(corpus.training[1], minlength=GUESSES) + 1
    return cross_entropy(counts.log().expand(corpus.held_out, -1), corpus.unseen[1]).item()


# --- The optimizers --------------------------------------------------------------------


class Contender(NamedTuple):
    label: str
    learning_rate: float
    sparse: bool  # whether the table has sparse gradients
    make: Callable[[NextWord, float], list[torch.optim.Optimizer]]


CONTENDERS = {
    "adam": Contender(
        "torch Adam",
        0.01,
        False,
        lambda model, lr: [torch.optim.Adam(model.parameters(), lr, fused=True)],
    ),
    "torch-adamax": Contender(
        "torch Adamax",
        0.1,
        False,
        lambda model, lr: [torch.optim.Adamax(model.parameters(), lr)],
    ),
    "sparse-adam": Contender(
        "torch SparseAdam + Adamax",
        0.03,
        True,
        lambda model, lr: [
            torch.optim.SparseAdam(model.table.parameters(), lr),
            torch.optim.Adamax(model.layers.parameters(), lr),
        ],
    ),
    "adamax": Contender(
        "adamax.torch Adamax",
        0.1,
        True,
        lambda model, lr: [Adamax(model.parameters(), lr)],
    ),
}


# --- Training --------------------------------------------------------------------------


class Run(NamedTuple):
    """What became of one optimizer."""

    label: str
    learning_rate: float
    steps: np.ndarray  # at which the held-out loss was taken
    losses: np.ndarray
    seconds: np.ndarray  # of each step, from the batch to new weights
    update_seconds: np.ndarray  # the optimizer's part of them


def step(
    model: NextWord, optimizers: list[torch.optim.Optimizer], rows: Tensor, words: Tensor
) -> tuple[float, float, float]:
    """Take a step; return the loss, the time of the step and that of the optimizer."""
    start = time.perf_counter()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = cross_entropy(model(rows), words)
    loss.backward()
    before_update = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    end = time.perf_counter()
    return loss.item(), end - start, end - before_update


def batches(corpus: Corpus, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """The training text in random order, again and again; always the same for a seed."""
    generator = torch.Generator().manual_seed(options.seed)
    rows, words = corpus.training
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(options.steps):
        while len(order) < options.batch:
            order = torch.cat([order, torch.randperm(len(words), generator=generator)])
        batch, order = order[: options.batch], order[options.batch :]
        yield rows[batch], words[batch]


def train(
    contender: Contender, corpus: Corpus, options: argparse.Namespace, bar: tqdm
) -> Run:
    if (learning_rate := options.learning_rate) is None:
        learning_rate = contender.learning_rate
    # The first step of all takes longer, as it loads code. A small model can take that one.
    small = NextWord(1, 1, contender.sparse)
    rows, words = corpus.training
    step(small, contender.make(small, learning_rate), rows[:1] * 0, words[:1])

    torch.manual_seed(options.seed)
    try:
        model = NextWord(options.rows, options.dim, contender.sparse)
    except RuntimeError:
        table = f"a table of {options.rows} rows of {options.dim} numbers"
        raise UnusableInputError(f"there is not enough memory for {table}") from None
    optimizers = contender.make(model, learning_rate)
    bar.set_description(contender.label)
    evaluated = np.linspace(0, options.steps, EVALUATIONS + 1).round().astype(int)
    evaluated = np.unique(evaluated)
    losses = [held_out_loss(model, corpus)]
    seconds, update_seconds = [], []
    for number, batch in enumerate(batches(corpus, options), start=1):
        loss, of_step, of_update = step(model, optimizers, *batch)
        seconds.append(of_step)
        update_seconds.append(of_update)
        if number in evaluated:
            losses.append(held_out_loss(model, corpus))
        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        bar.update()
    return Run(
        contender.label,
        learning_rate,
        evaluated,
        np.array(losses),
        np.array(seconds),
        np.array(update_seconds),
    )


# --- Results ---------------------------------------------------------------------------


def print_results(runs: Sequence[Run], baseline: float) -> None:
    def line(label: str, *numbers: str) -> None:
        print(f"{label:26}", *(f"{number:>10}" for number in numbers))

    def quality(loss: float) -> tuple[str, str]:
        # As hard to guess as one of how many equally likely words?
        perplexity = math.exp(min(loss, 700))
        return f"{loss:.3f}", f"{perplexity:.1f}"

    print()
    line("", "learning", "ms per", "of which", "held-out", "held-out")
    line("", "rate", "step", "optimizer", "loss", "perplexity")
    line("untrained", "", "", "", *quality(runs[0].losses[0]))
    line("word frequencies", "", "", "", *quality(baseline))
    for run in runs:
        times = (np.median(times) * 1e3 for times in (run.seconds, run.update_seconds))
        numbers = f"{run.learning_rate:g}", *(f"{time:.1f}" for time in times)
        line(run.label, *numbers, *quality(run.losses[-1]))


def save_plot(path: Path, runs: Sequence[Run], baseline: float) -> None:
    figure = new_figure(10, 4.2)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for run in runs:
        seconds = np.concatenate([[0.0], run.seconds.cumsum()])[run.steps]
        by_steps.plot(run.steps, run.losses, label=run.label)
        by_seconds.plot(seconds[1:], run.losses[1:], marker=".", label=run.label)
    by_steps.set(xlabel="steps", ylabel="held-out loss per word")
    by_seconds.set(xlabel="seconds of training, without evaluation", xscale="log")
    for axes in (by_steps, by_seconds):
        axes.axhline(baseline, color="0.45", linestyle="--", linewidth=1.2)
    by_seconds.legend(frameon=False)
    save_figure(figure, path, legends=False)


# --- The program -----------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Train a next-word model with several optimizers and compare them."
    )
    add = partial(parser.add_argument, metavar="X")
    count = whole_number
    add("--text", type=Path, help="a text in UTF-8 (the documentation of Python)")
    add("--steps", type=count, default=230, help="for each optimizer (%(default)s)")
    add("--rows", type=count, default=2**19, help="of the table (%(default)s)")
    add("--dim", type=count, default=32, help="length of a row (%(default)s)")
    add("--batch", type=count, default=1024, help="words per step (%(default)s)")
    add("--learning-rate", type=rate, help="the same for all (chosen for each)")
    add("--seed", type=partial(count, least=0), default=0, help="(%(default)s)")
    add("--out", type=Path, default=Path("out/torch_next_word"), help="(%(default)s)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="X",
        help=f"some of {', '.join(CONTENDERS)} (all)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    corpus = read_corpus(options)
    options.out.mkdir(parents=True, exist_ok=True)
    baseline = context_free_loss(corpus)
    contenders = [CONTENDERS[name] for name in dict.fromkeys(options.optimizers)]
    with tqdm(
        total=len(contenders) * options.steps, unit=" steps", dynamic_ncols=True
    ) as bar:
        runs = [train(contender, corpus, options, bar) for contender in contenders]
    print_results(runs, baseline)
    save_plot(options.out / PLOT, runs, baseline)
    print(f"\nThe losses in the course of training are drawn in {options.out / PLOT}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
