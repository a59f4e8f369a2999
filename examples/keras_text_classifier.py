"""Tells from a description of a function which part of Python it belongs to, with Keras.

    python examples/keras_text_classifier.py                # docstrings of Python itself
    python examples/keras_text_classifier.py --text DIR     # DIR/<label>/<anything>.txt
    KERAS_BACKEND=jax python examples/keras_text_classifier.py

The words of a text, and each two that follow each other, are hashed to the rows of a large
Embedding; their mean goes through one dense layer. A fifth of the texts is held out. The
back end of Keras is the one that is installed; on TensorFlow a step reads and writes only
the rows that its batch uses.
"""

# ruff: noqa: E402  (the back end is chosen before Keras is imported)

import ast
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

BACK_ENDS = ("tensorflow", "jax", "torch")
if "KERAS_BACKEND" not in os.environ:
    installed = [name for name in BACK_ENDS if importlib.util.find_spec(name)]
    os.environ["KERAS_BACKEND"] = installed[0] if installed else BACK_ENDS[0]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from adamax.keras import Adamax
from word_vectors import (
    OneLineParser,
    UnusableInputError,
    new_figure,
    rate,
    run_program,
    save_figure,
    whole_number,
)

WORDS = 60  # of a text; those that follow are left out
LABELS = 20  # of Python's packages, those with the most docstrings
LEAST_WORDS = 6  # of a docstring
MODEL, PLOT = "classifier.keras", "curves.png"

# --- The texts -------------------------------------------------------------------------

Texts = Mapping[str, Sequence[str]]  # by label


def python_docstrings() -> Texts:
    """Docstrings of the standard library by the package that they are in."""
    library = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, dict[str, None]] = defaultdict(dict)  # each text once
    for path in sorted(library.rglob("*.py")):
        label, *rest = path.relative_to(library).with_suffix("").parts
        if label in sys.stdlib_module_names and not {"test", "tests"} & set(rest):
            for docstring in docstrings_in(path):
                texts[label][docstring] = None
    most = sorted(texts, key=lambda label: (-len(texts[label]), label))[:LABELS]
    return {label: list(texts[label]) for label in sorted(most)}


def docstrings_in(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code that is read
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some files are there to be wrong
            return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(words_of(text)) >= LEAST_WORDS]


def read_texts(directory: Path) -> Texts:
    texts = {
        folder.name: [
            path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))
        ]
        for folder in sorted(directory.iterdir())
        if folder.is_dir()
    }
    texts = {label: found for label, found in texts.items() if len(found) > 1}
    if len(texts) < 2:
        raise UnusableInputError(
            f"{directory} must have a folder for each of two labels or more, with two "
            f"files *.txt or more in each"
        )
    return texts


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())[:WORDS]


class Examples(NamedTuple):
    rows: np.ndarray  # (texts, 2 * WORDS) of the table; 0 where a text has ended
    labels: np.ndarray

    def select(self, chosen: np.ndarray) -> "Examples":
        return Examples(self.rows[chosen], self.labels[chosen])


def build_examples(texts: Texts, rows: int) -> Examples:
    numbered = [
        (hashed(words_of(text), rows), number)
        for number, label in enumerate(texts)
        for text in texts[label]
    ]
    return Examples(
        np.array([found for found, _ in numbered], np.int32),
        np.array([number for _, number in numbered], np.int32),
    )


def hashed(words: Sequence[str], rows: int) -> list[int]:
    """The rows of words and of neighbours; row 0 is for none."""
    terms = [*words, *map(" ".join, pairwise(words))]
    found = [1 + zlib.crc32(term.encode()) % (rows - 1) for term in terms]
    return found + [0] * (2 * WORDS - len(found))


def split(examples: Examples, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """A fifth is held out, but not more than half of the texts of a label."""
    held_out = np.zeros(len(examples.labels), bool)
    for label in np.unique(examples.labels):
        of_label = rng.permutation(np.flatnonzero(examples.labels == label))
        held_out[of_label[: max(1, len(of_label) // 5)]] = True
    return examples.select(~held_out), examples.select(held_out)


# --- The model -------------------------------------------------------------------------


def build_model(rows: int, dim: int, labels: int) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((2 * WORDS,), dtype="int32"),
            layers.Embedding(rows, dim, mask_zero=True, name="table"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(labels, activation="softmax"),
        ]
    )


def train(model: keras.Model, training: Examples, held_out: Examples, options: Any) -> Any:
    steps = options.epochs * -(-len(training.labels) // options.batch)
    model.compile(
        optimizer=Adamax(
            learning_rate=keras.optimizers.schedules.CosineDecay(
                options.learning_rate, steps
            )
        ),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model.fit(
        training.rows,
        training.labels,
        validation_data=(held_out.rows, held_out.labels),
        batch_size=options.batch,
        epochs=options.epochs,
    ).history


# --- Results ---------------------------------------------------------------------------


def reloaded_agrees(model: keras.Model, path: Path, examples: Examples) -> bool:
    """Whether the model that was saved is the model, state of the optimizer included."""
    again = keras.models.load_model(path)
    pairs = zip(
        [*model.variables, *model.optimizer.variables],
        [*again.variables, *again.optimizer.variables],
        strict=True,
    )
    same_variables = all(
        np.array_equal(np.asarray(a.numpy()), np.asarray(b.numpy())) for a, b in pairs
    )
    guesses = (m.predict(examples.rows[:64], verbose=0) for m in (model, again))
    return same_variables and bool(np.allclose(*guesses))


def save_plot(path: Path, history: Mapping[str, Sequence[float]]) -> None:
    figure = new_figure(9, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "held out")):
            axes.plot(range(1, len(history[key]) + 1), history[key], ".-", label=label)
        axes.set(xlabel="epoch", ylabel=name)
    save_figure(figure, path)


# --- The program -----------------------------------------------------------------------


def make_parser() -> OneLineParser:
    parser = OneLineParser(description="Train a text classifier with Keras and Adamax.")
    add = partial(parser.add_argument, metavar="X")
    count = whole_number
    two = partial(count, least=2)
    add("--text", type=Path, help="folders of texts, one for each label (docstrings)")
    add("--epochs", type=count, default=8, help="(%(default)s)")
    add("--rows", type=two, default=200_000, help="of the table (%(default)s)")
    add("--dim", type=count, default=32, help="length of a row (%(default)s)")
    add("--batch", type=count, default=64, help="texts per step (%(default)s)")
    add("--learning-rate", type=rate, default=0.03, help="at the start (%(default)s)")
    add("--seed", type=partial(count, least=0), default=0, help="(%(default)s)")
    add("--out", type=Path, default=Path("out/keras_text_classifier"), help="(%(default)s)")
    return parser


def run(options: Any) -> None:
    print(f"Back end    {keras.backend.backend()}, Keras {keras.version()}")
    texts = read_texts(options.text) if options.text else python_docstrings()
    examples = build_examples(texts, options.rows)
    training, held_out = split(examples, np.random.default_rng(options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    most_frequent = np.bincount(held_out.labels).max() / len(held_out.labels)
    print(f"Texts       {len(training.labels):,}, and {len(held_out.labels):,} held out")
    print(f"Labels      {', '.join(texts)}", flush=True)

    keras.utils.set_random_seed(options.seed)
    model = build_model(options.rows, options.dim, len(texts))
    history = train(model, training, held_out, options)
    model.save(options.out / MODEL)
    if not reloaded_agrees(model, options.out / MODEL, held_out):
        raise RuntimeError("the model that was saved is not the one that was trained")
    save_plot(options.out / PLOT, history)
    right = history["val_accuracy"][-1]
    print(f"""
Held out    {right:.1%} right; the most frequent label alone: {most_frequent:.1%}
Model       {options.out / MODEL}, loaded again and found to be the same
Curves      {options.out / PLOT}""")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
