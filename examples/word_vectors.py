"""Word vectors from a text: skip-gram with negative sampling, trained by Adamax.

    python examples/word_vectors.py                     # on Python's own documentation
    python examples/word_vectors.py --text novel.txt    # on any text in UTF-8

Every word has two vectors: one as a centre word, one as the context of others. They learn
to tell the words that stand near a centre word from words drawn at random. A step meets
only some words of the vocabulary, so the gradients of the two tables are sparse:
`IndexedSlices` name the rows that were used, and no other row is read or written.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from adamax import Adamax, IndexedSlices

Floats: TypeAlias = npt.NDArray[Any]
Integers: TypeAlias = npt.NDArray[np.integer[Any]]

FREQUENT = 2.5  # times the count of the average word; beyond, words are thinned out
SHARED_NOISE = 256  # noise words of a step, which all its pairs share
MOST_HELD_OUT = 50_000  # words; more would measure the loss no better, only slower
SHOWN = ["list", "string", "file", "exception", "socket", "thread", "integer", "path"]
VECTORS, PLOT, CHECKPOINT = "vectors.txt", "loss.png", "checkpoint.safetensors"

# Random numbers depend on the seed, one of these purposes and a count, not on what was
# drawn before. So a checkpoint needs no state of a generator: the step says everything.
INITIAL_TABLES, HELD_OUT_PAIRS, ORDER_OF_EPOCH, STEP = range(4)


class UnusableInputError(Exception):
    """The text or the checkpoint cannot be used; the message is one line that says why."""


# --- The text --------------------------------------------------------------------------


def python_documentation() -> str:
    """The language reference and the docstrings of the standard library, from their files.

    The order is random but fixed, so that the end, which is held out, is like the rest.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    skipped = {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3"}
    skipped |= {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - skipped)
        for name in sorted(files):
            if name.endswith(".py"):
                documents += docstrings(ast.parse(Path(folder, name).read_bytes()))
    random.Random(0).shuffle(documents)
    return "\n\n".join(documents)


def docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UnusableInputError(f"{path} is not UTF-8 text: {error.reason}") from None


def words_of(paragraph: str) -> tuple[str, ...]:
    """The words of two letters or more; none of an interactive example."""
    if paragraph.startswith(">>>"):
        return ()
    return tuple(re.findall(r"_*[^\W\d_]\w+", paragraph.lower()))


GAP = -1


class Corpus(NamedTuple):
    """A text in numbers, cut in two: one part to train on, one to judge the vectors by."""

    vocabulary: list[str]  # the most frequent word first
    counts: Integers  # of these words in the training part
    training: Integers  # the running text, with GAP between paragraphs
    held_out: Integers  # likewise


def build_corpus(text: str, min_count: int, window: int) -> Corpus:
    # A paragraph that repeats (a licence, a header) counts once. Otherwise some of what is
    # held out would be in the training text too.
    paragraphs = dict.fromkeys(words_of(part) for part in re.split(r"\n\s*\n\s*", text))
    words = [word for paragraph in paragraphs for word in ("", *paragraph)]
    cut = max(len(words) * 9 // 10, len(words) - MOST_HELD_OUT)
    counts = Counter(filter(None, words[:cut]))
    vocabulary = [word for word, count in counts.most_common() if count >= min_count]
    if not counts:
        raise UnusableInputError("the text has no words")
    if len(vocabulary) < 2:
        raise UnusableInputError(
            f"the text is too short: in its first nine tenths, no two words occur at least "
            f"{min_count} times each (--min-count)"
        )
    numbers = {word: [number] for number, word in enumerate(vocabulary)}
    numbers[""] = [GAP] * window  # so wide that no window reaches across it

    def passage(words: list[str]) -> Integers:
        found = (numbers.get(word, []) for word in ("", *words, ""))
        return np.fromiter(itertools.chain.from_iterable(found), np.int32)

    ordered = np.array([counts[word] for word in vocabulary])
    return Corpus(vocabulary, ordered, passage(words[:cut]), passage(words[cut:]))


# --- Pairs of words --------------------------------------------------------------------


class Pairs(NamedTuple):
    """Pair ``i`` is the centre word ``centres[rows[i]]`` with the word ``contexts[i]``."""

    centres: Integers
    rows: Integers
    contexts: Integers


class Sampler:
    """Draws pairs of words that stand near each other, and noise words."""

    def __init__(self, counts: Integers, window: int, negatives: int) -> None:
        self.window = window
        self.negatives = negatives
        # Frequent words tell little about their neighbours; most of them are left out.
        self.kept = np.minimum(1, np.sqrt(FREQUENT * counts.mean() / counts))
        noise = counts**0.75 / (counts**0.75).sum()
        self.noise_limits = noise.cumsum() / noise.cumsum()[-1]  # the last is 1 exactly
        # The logit of a pair is prior[context] + centre vector * context vector. The prior
        # is the best logit for someone who does not see the centre word (`unigram_loss`).
        # word2vec has no such term; with it, the vectors learn only what the centre tells.
        context = counts * self.kept / (counts * self.kept).sum()
        self.prior = np.log(context / (negatives * noise)).astype(np.float32)

    def pairs(self, text: Integers, at: Integers, rng: np.random.Generator) -> Pairs:
        """Pair the words at some places of a text with the words around them."""
        at = at[rng.random(len(at)) < self.kept[text[at]]]
        distances = np.array([d for d in range(-self.window, self.window + 1) if d])
        contexts = text[at[:, None] + distances]
        # A reach drawn anew for each centre makes near words count more than far ones.
        reach = rng.integers(1, self.window, (len(at), 1), endpoint=True)
        paired = (contexts != GAP) & (np.abs(distances) <= reach)
        paired &= rng.random(contexts.shape) < self.kept[contexts]
        return Pairs(text[at], np.nonzero(paired)[0], contexts[paired])

    def noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> Integers:
        return np.searchsorted(self.noise_limits, rng.random(shape), side="right")


# --- The model -------------------------------------------------------------------------


class Tables(NamedTuple):
    """A row for each word: its vector as a centre word, and as the context of others."""

    centre: Floats
    context: Floats


def sigmoid(x: Floats) -> Floats:
    return 0.5 * np.tanh(0.5 * x) + 0.5


def softplus(x: Floats) -> Floats:
    """log(1 + exp(x)), the loss of logit x for noise and of logit -x for a true pair."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def loss_and_gradients(
    tables: Tables, pairs: Pairs, noise: Integers, sampler: Sampler
) -> tuple[float, list[IndexedSlices]]:
    """The loss, summed over the pairs, and its gradient for each table.

    In the textbook each pair has a few noise words of its own. Here all pairs share many,
    which are weighted to count as few: that is less random, and a product of matrices.
    """
    centres, rows, contexts = pairs
    centre, context = tables.centre[centres], tables.context[contexts]
    centre_of_pair, noise_vectors = centre[rows], tables.context[noise]
    pairs_of_centre = np.bincount(rows, minlength=len(centres)).astype(np.float32)
    weight = (pairs_of_centre * np.float32(sampler.negatives / len(noise)))[:, None]

    logits = np.einsum("ij,ij->i", centre_of_pair, context) + sampler.prior[contexts]
    noise_logits = centre @ noise_vectors.T + sampler.prior[noise]
    loss = softplus(-logits).sum() + (weight * softplus(noise_logits)).sum()

    slope = -sigmoid(-logits)[:, None]  # the derivative of the loss by each logit
    noise_slope = weight * sigmoid(noise_logits)
    # A word that is used several times has several rows here. They need not be summed:
    # the optimizer does that with indices that repeat.
    centre_gradient = IndexedSlices(
        np.concatenate([slope * context, noise_slope @ noise_vectors]),
        np.concatenate([centres[rows], centres]),
    )
    context_gradient = IndexedSlices(
        np.concatenate([slope * centre_of_pair, noise_slope.T @ centre]),
        np.concatenate([contexts, noise]),
    )
    return float(loss), [centre_gradient, context_gradient]


class HeldOut(NamedTuple):
    """Pairs of the held-out text, each with noise words of its own: always the same."""

    centres: Integers
    contexts: Integers
    noise: Integers


def held_out_pairs(text: Integers, sampler: Sampler, rng: np.random.Generator) -> HeldOut:
    centres, rows, contexts = sampler.pairs(text, np.flatnonzero(text != GAP), rng)
    if not len(contexts):
        raise UnusableInputError(
            "the text is too short: in its last tenth, which is held out to judge the "
            "vectors, no two words of the vocabulary stand near each other"
        )
    noise = sampler.noise((len(contexts), sampler.negatives), rng)
    return HeldOut(centres[rows], contexts, noise)


def held_out_loss(tables: Tables, held_out: HeldOut, sampler: Sampler) -> float:
    """The loss per pair on text that the model has not seen."""
    total = 0.0
    for start in range(0, len(held_out.centres), 4096):  # in pieces, for memory's sake
        centres, contexts, noise = (part[start : start + 4096] for part in held_out)
        words = np.column_stack([contexts, noise])
        vectors = tables.centre[centres][:, :, None]
        logits = (tables.context[words] @ vectors)[:, :, 0] + sampler.prior[words]
        logits[:, 0] *= -1  # of the true word
        total += float(softplus(logits).sum(dtype=np.float64))
    return total / len(held_out.centres)


def unigram_loss(held_out: HeldOut) -> float:
    """The least held-out loss of any model that ignores the centre word.

    Such a model has one logit s for a word c, whatever stands beside it. If c is the
    context of a pairs and the noise of b, its loss is a softplus(-s) + b softplus(s). That
    is least where sigmoid(s) = a / (a + b), so for s = log(a / b): the logit is
    log P_context(c) - log(k P_noise(c)) with k noise words per pair. Both probabilities are
    counted in the held-out pairs themselves, which a model cannot know. Whoever gets below
    this loss has learned something from the centre words.
    """
    size = 1 + int(max(held_out.contexts.max(), held_out.noise.max()))
    as_context = np.bincount(held_out.contexts, minlength=size)
    as_noise = np.bincount(held_out.noise.ravel(), minlength=size)
    both = (as_context > 0) & (as_noise > 0)  # the others cost nothing: s is infinite
    a, b = as_context[both], as_noise[both]
    loss = a * np.log1p(b / a) + b * np.log1p(a / b)
    return float(loss.sum()) / len(held_out.contexts)


# --- Training --------------------------------------------------------------------------


class Training:
    """All that changes while training. A checkpoint is this, in one file."""

    def __init__(self, settings: dict[str, Any], words: int, steps_per_epoch: int) -> None:
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.steps = steps_per_epoch * settings["epochs"]
        shape = (words, settings["dim"])
        centre = self.rng(INITIAL_TABLES, 0).uniform(-0.5, 0.5, shape) / settings["dim"]
        self.tables = Tables(centre.astype(np.float32), np.zeros(shape, np.float32))
        self.optimizer = Adamax(
            lambda step: settings["learning_rate"] * (1 - step / self.steps),
            weight_decay=settings["weight_decay"],  # so that rare words do not overfit
        )
        self.optimizer.build(self.tables._asdict())
        self.pairs = np.zeros(settings["epochs"], np.int64)  # of each epoch
        self.losses = np.zeros(settings["epochs"])  # summed over these pairs
        self.held_out_losses = np.zeros(settings["epochs"] + 1)  # before and after each

    @property
    def step(self) -> int:
        return self.optimizer.iterations

    def rng(self, purpose: int, count: int) -> np.random.Generator:
        return np.random.default_rng([self.settings["seed"], purpose, count])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        names = ("losses", "pairs", "held_out_losses")
        return self.tables._asdict() | {name: getattr(self, name) for name in names}

    def save(self, path: Path) -> None:
        """Write one file that holds everything, and is replaced as a whole.

        So the tables and the optimizer are always of the same step, even after a crash.
        """
        state = self.optimizer.state_dict()
        tensors = self.arrays() | {f"optimizer.{name}": a for name, a in state.items()}
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            settings = {"settings": json.dumps(self.settings)}
            file.write(safetensors.numpy.save(tensors, settings))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same text and the same settings."""
        if not path.is_file():
            raise UnusableInputError(f"there is nothing to resume: {path} does not exist")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                settings = json.loads((file.metadata() or {}).get("settings", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise UnusableInputError(f"{path} is damaged: {error}") from None
        if settings.keys() != self.settings.keys():
            raise UnusableInputError(f"{path} is not a checkpoint of this program")
        for name, value in self.settings.items():
            if settings[name] != value:
                option = f"with --{name.replace('_', '-')} {settings[name]}, not {value}"
                other = "from another text" if name == "text" else option
                raise UnusableInputError(f"cannot resume: {path} was made {other}")
        for name, array in self.arrays().items():
            array[...] = tensors.pop(name)
        state = {name.removeprefix("optimizer."): a for name, a in tensors.items()}
        self.optimizer.load_state_dict(state)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C stop nothing, but be told by the function that this yields."""
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    training: Training,
    text: Integers,
    held_out: HeldOut,
    sampler: Sampler,
    checkpoint: Path,
    interrupted: Callable[[], bool],
) -> None:
    """Train to the end or until interrupted; save then, and after each epoch."""
    places = np.flatnonzero(text != GAP)
    batch, epochs = training.settings["batch"], training.settings["epochs"]
    order = None
    with tqdm(
        total=epochs * len(places),
        initial=training.step * len(places) // training.steps_per_epoch,
        unit=" words",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # less often in a log file
    ) as bar:
        while True:
            epoch, batch_number = divmod(training.step, training.steps_per_epoch)
            stop = training.step == training.steps or interrupted()
            if batch_number == 0:
                loss = held_out_loss(training.tables, held_out, sampler)
                training.held_out_losses[epoch] = loss
            if batch_number == 0 or stop:
                training.save(checkpoint)
            if stop:
                return
            if batch_number == 0 or order is None:
                order = training.rng(ORDER_OF_EPOCH, epoch).permutation(places)
            at = order[batch_number * batch :][:batch]

            rng = training.rng(STEP, training.step)
            pairs = sampler.pairs(text, at, rng)
            noise = sampler.noise((SHARED_NOISE,), rng)
            loss, gradients = loss_and_gradients(training.tables, pairs, noise, sampler)
            training.optimizer.apply_gradients(zip(gradients, training.tables, strict=True))

            training.losses[epoch] += loss
            training.pairs[epoch] += len(pairs.contexts)
            mean_loss = training.losses[epoch] / max(1, training.pairs[epoch])
            bar.set_postfix_str(f"loss {mean_loss:.3f}", refresh=False)
            bar.update(len(at))


# --- Results ---------------------------------------------------------------------------


def print_neighbours(vectors: Floats, vocabulary: list[str], sampler: Sampler) -> None:
    # For a text without the usual words: its own frequent ones, but not "the" and "of".
    telling = np.argsort(sampler.kept < 0.5, kind="stable")
    frequent = [vocabulary[number] for number in telling[: len(SHOWN)]]
    usual = [word for word in SHOWN if word in vocabulary]
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for word in list(dict.fromkeys(usual + frequent))[: len(SHOWN)]:
        cosines = directions @ directions[vocabulary.index(word)]
        nearest = [i for i in np.argsort(-cosines)[:5] if vocabulary[i] != word][:4]
        print(
            f"  {word:11}", ", ".join(f"{vocabulary[i]} {cosines[i]:.2f}" for i in nearest)
        )


def save_vectors(path: Path, vectors: Floats, vocabulary: list[str]) -> None:
    """Write the text format of word2vec, with digits enough to get each float32 back."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        print(*vectors.shape, file=file)
        for word, vector in zip(vocabulary, vectors, strict=True):
            print(word, *(f"{x:.9g}" for x in vector), file=file)


def save_plot(path: Path, training: Training, baseline: float) -> None:
    epochs = np.arange(len(training.held_out_losses))
    mean_losses = training.losses / np.maximum(1, training.pairs)
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot(xlabel="epochs", ylabel="loss per pair")
    axes.set_title("Skip-gram word vectors, trained by Adamax")
    label = "best possible without the centre word"
    axes.axhline(baseline, color="0.5", linestyle="--", label=label)
    axes.plot(epochs, training.held_out_losses, color="C3", label="held-out text")
    axes.plot(epochs[1:] - 0.5, mean_losses, color="C0", label="training text")
    save_figure(figure, path, grids=False)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(
    figure: Figure, path: Path, *, grids: bool = True, legends: bool = True
) -> None:
    """Save a figure in the style of all examples."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grids:
            axes.grid(color="0.92")
        if legends:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# --- The program -----------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong without repeating all options, which --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str, least: int = 1) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        message = f"must be a whole number of at least {least}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")


def run_program(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Run an example with its options; what it cannot use is said in a line."""
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UnusableInputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the text and of the training."""
    number, from_zero = whole_number, functools.partial(whole_number, least=0)
    options: list[tuple[str, Callable[[str], Any], Any, str]] = [
        ("--text", Path, None, "a text in UTF-8 (the documentation inside Python)"),
        ("--epochs", number, 15, "times to go through the text"),
        ("--dim", number, 200, "length of a vector"),
        ("--window", number, 3, "how many words away a context word may stand"),
        ("--negatives", number, 5, "noise words per pair"),
        ("--batch", number, 2048, "words of the text per step"),
        ("--learning-rate", rate, 0.03, "at the start; it falls to 0 in a straight line"),
        ("--weight-decay", rate, 0.2, "decoupled; of the rows that a step uses"),
        ("--min-count", number, 8, "leave out words that occur less often"),
        ("--seed", from_zero, 0, "of all random numbers"),
    ]
    for name, kind, default, meaning in options:
        meaning += "" if default is None else " (%(default)s)"
        parser.add_argument(name, type=kind, default=default, metavar="X", help=meaning)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Learn word vectors from a text with Adamax.")
    add_options(parser)
    out, meaning = Path("out/word_vectors"), "directory for the results (%(default)s)"
    parser.add_argument("--out", type=Path, default=out, metavar="X", help=meaning)
    meaning = "continue a run that was interrupted, with the same options"
    parser.add_argument("--resume", action="store_true", help=meaning)
    return parser


def run(options: argparse.Namespace, resume_command: str) -> int:
    """Train on a text, write the results and return the exit status."""
    python = f"the documentation inside Python {platform.python_version()}"
    print(f"Text        {options.text or python}", flush=True)
    text = read_text(options.text) if options.text else python_documentation()
    corpus = build_corpus(text, options.min_count, options.window)
    vocabulary = corpus.vocabulary
    words, words_held_out = (
        int(np.count_nonzero(part != GAP)) for part in (corpus.training, corpus.held_out)
    )
    sampler = Sampler(corpus.counts, options.window, options.negatives)
    settings = {
        k: v for k, v in vars(options).items() if k not in ("text", "out", "resume")
    }
    settings["text"] = hashlib.sha256(text.encode()).hexdigest()
    training = Training(settings, len(vocabulary), math.ceil(words / options.batch))
    held_out = held_out_pairs(corpus.held_out, sampler, training.rng(HELD_OUT_PAIRS, 0))
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / CHECKPOINT
    if options.resume:
        training.load(checkpoint)

    print(f"Words       {words:,} to train on, {words_held_out:,} held out")
    print(f"Vocabulary  {len(vocabulary):,} words")
    steps = f"{training.steps_per_epoch:,} steps of {options.batch:,} words"
    print(f"Training    {options.epochs} epochs of {steps}")
    if options.resume:
        print(f"Resuming    after step {training.step:,} of {training.steps:,}")
    print(flush=True)

    first_step, start = training.step, time.perf_counter()
    with deferred_interrupt() as interrupted:
        train(training, corpus.training, held_out, sampler, checkpoint, interrupted)
        if training.step < training.steps:
            print(f"Interrupted; continue with: {resume_command}", file=sys.stderr)
            return 130
        seconds = time.perf_counter() - start
        speed = (training.step - first_step) / training.steps_per_epoch * words / seconds
        loss, baseline = training.held_out_losses[-1], unigram_loss(held_out)
        save_vectors(options.out / VECTORS, training.tables.centre, vocabulary)
        save_plot(options.out / PLOT, training, baseline)

    print(f"""
Pairs       {training.pairs.sum():,} trained on, {len(held_out.contexts):,} held out
Speed       {speed:,.0f} words per second
Loss        {loss:.3f} per held-out pair
Baseline    {baseline:.3f}, the best possible without looking at the centre word

Nearest words, with the cosines of their vectors""")
    print_neighbours(training.tables.centre, vocabulary, sampler)
    print(f"""
In {options.out}
  {VECTORS:24}the centre vectors, in the text format of word2vec
  {PLOT:24}the losses in the course of training
  {CHECKPOINT:24}both tables and the state of the optimizer""")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    others = [argument for argument in arguments if argument != "--resume"]
    try:
        return run(options, shlex.join(["python", sys.argv[0], *others, "--resume"]))
    except (UnusableInputError, MemoryError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(
            ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        )
    except KeyboardInterrupt:
        print("Interrupted before the training", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
