"""Word vectors in JAX: gradients of the rows that a step uses, inside ``jax.jit``.

    python examples/jax_word_vectors.py                     # on Python's own documentation
    python examples/jax_word_vectors.py --text novel.txt    # on any text in UTF-8
    python examples/jax_word_vectors.py --dense             # by optax, with dense gradients

The model, the text and how it is judged are those of ``word_vectors.py``, beside this file.
Here JAX differentiates the loss. What it reads with ``lookup`` gets gradients of rows, and
a step costs what these cost, whatever the size of the vocabulary. An index of -1 is of no
row, so batches are padded with it to sizes that JAX need not compile anew.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from adamax.jax import adamax, lookup, value_and_sparse_grad
from word_vectors import (
    GAP,
    HELD_OUT_PAIRS,
    INITIAL_TABLES,
    ORDER_OF_EPOCH,
    SHARED_NOISE,
    STEP,
    Corpus,
    Sampler,
    Tables,
    UnusableInputError,
    add_options,
    build_corpus,
    held_out_loss,
    held_out_pairs,
    print_neighbours,
    python_documentation,
    read_text,
    unigram_loss,
)

Params: TypeAlias = dict[str, jax.Array]
Step: TypeAlias = Callable[..., tuple[Params, Any, jax.Array]]


class Batch(NamedTuple):
    """The pairs of a step, padded with -1; ``weights`` is how much noise a centre gets."""

    centres: Any
    weights: Any
    rows: Any  # of the centre of each pair among the centres
    contexts: Any
    noise: Any


def padded(values: Any, fill: Any) -> Any:
    """Filled up to a power of two, as JAX compiles a program for each size."""
    room = np.full(
        1 << max(0, len(values) - 1).bit_length(), fill, np.asarray(values).dtype
    )
    room[: len(values)] = values
    return room


def batches(
    corpus: Corpus, sampler: Sampler, settings: argparse.Namespace
) -> Iterator[Batch]:
    """One for each step."""
    places = np.flatnonzero(corpus.training != GAP)
    number = 0
    for epoch in range(settings.epochs):
        order = rng(settings, ORDER_OF_EPOCH, epoch).permutation(places)
        for start in range(0, len(order), settings.batch):
            random = rng(settings, STEP, number)
            at = order[start : start + settings.batch]
            centres, rows, contexts = sampler.pairs(corpus.training, at, random)
            noise = sampler.noise((SHARED_NOISE,), random).astype(np.int32)
            pairs_of_centre = np.bincount(rows, minlength=len(centres))
            weights = pairs_of_centre * np.float32(sampler.negatives / SHARED_NOISE)
            yield Batch(
                padded(centres, -1),
                padded(weights.astype(np.float32), 0),
                padded(rows.astype(np.int32), 0),
                padded(contexts, -1),
                noise,
            )
            number += 1


def rng(settings: argparse.Namespace, purpose: int, count: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, purpose, count])


def loss(params: Params, batch: Batch, prior: jax.Array) -> jax.Array:
    """The loss of a batch, summed over its pairs; see ``word_vectors.py``."""
    centre = lookup(params["centre"], batch.centres)
    context = lookup(params["context"], batch.contexts)
    noise = lookup(params["context"], batch.noise)

    logits = (centre[batch.rows] * context).sum(axis=1) + prior[batch.contexts]
    of_pairs = jnp.where(batch.contexts >= 0, jax.nn.softplus(-logits), 0)
    noise_logits = centre @ noise.T + prior[batch.noise]
    return of_pairs.sum() + (batch.weights[:, None] * jax.nn.softplus(noise_logits)).sum()


def make_step(
    settings: argparse.Namespace, steps: int, prior: jax.Array
) -> tuple[Any, Step]:
    """The optimizer, and a step of the training, which takes and returns its state."""
    schedule = optax.linear_schedule(settings.learning_rate, 0.0, steps)
    if settings.dense:
        theirs = optax.adamaxw(schedule, weight_decay=settings.weight_decay)

        @partial(jax.jit, donate_argnums=(0, 1))
        def dense_step(params: Params, state: Any, batch: Batch) -> Any:
            value, gradients = jax.value_and_grad(loss)(params, batch, prior)
            updates, state = theirs.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        return theirs, dense_step

    sparse = "exact" if settings.exact else "lazy"
    ours = adamax(schedule, weight_decay=settings.weight_decay, sparse=sparse)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, batch: Batch) -> Any:
        current = ours.current(params, state)  # lazy tables always are
        value, gradients = value_and_sparse_grad(loss)(current, batch, prior)
        params, state = ours.step(params, state, gradients)
        return params, state, value

    return ours, step


def train(corpus: Corpus, sampler: Sampler, settings: argparse.Namespace) -> Tables:
    steps = settings.epochs * math.ceil((corpus.training != GAP).sum() / settings.batch)
    shape = (len(corpus.vocabulary), settings.dim)
    start = rng(settings, INITIAL_TABLES, 0).uniform(-0.5, 0.5, shape) / settings.dim
    params = {"centre": jnp.asarray(start, jnp.float32), "context": jnp.zeros(shape)}
    optimizer, step = make_step(settings, steps, jnp.asarray(sampler.prior))
    state = optimizer.init(params)
    began = time.perf_counter()
    for number, batch in enumerate(tqdm(batches(corpus, sampler, settings), total=steps)):
        params, state, _ = step(params, state, batch)
        if number == 20:  # by then, most of what has to be compiled is
            jax.block_until_ready(params)
            began = time.perf_counter()
    jax.block_until_ready(params)
    milliseconds = 1e3 * (time.perf_counter() - began) / max(1, steps - 21)
    print(f"Time        {milliseconds:.2f} ms per step, batches included")
    if settings.exact:
        params, state = jax.jit(optimizer.flush, donate_argnums=(0, 1))(params, state)
    return Tables(np.asarray(params["centre"]), np.asarray(params["context"]))


def run(settings: argparse.Namespace) -> None:
    text = read_text(settings.text) if settings.text else python_documentation()
    corpus = build_corpus(text, settings.min_count, settings.window)
    sampler = Sampler(corpus.counts, settings.window, settings.negatives)
    held_out = held_out_pairs(corpus.held_out, sampler, rng(settings, HELD_OUT_PAIRS, 0))
    print(f"Vocabulary  {len(corpus.vocabulary):,} words")
    ours = "adamax.jax.adamax, exact" if settings.exact else "adamax.jax.adamax"
    print(f"Optimizer   {'optax.adamaxw' if settings.dense else ours}")
    tables = train(corpus, sampler, settings)
    after, baseline = held_out_loss(tables, held_out, sampler), unigram_loss(held_out)
    print(f"Loss        {after:.3f} per held-out pair")
    print(
        f"Baseline    {baseline:.3f}, the best possible without looking at the centre word"
    )
    print("\nNearest words, with the cosines of their vectors")
    print_neighbours(tables.centre, corpus.vocabulary, sampler)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn word vectors with JAX and Adamax.")
    add_options(parser)
    way = parser.add_mutually_exclusive_group()
    meaning = "the result of gradients of all rows, from those of some"
    way.add_argument("--exact", action="store_true", help=meaning)
    meaning = "for comparison: optax's Adamax, with gradients of all rows"
    way.add_argument("--dense", action="store_true", help=meaning)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        run(parse_arguments())
    except (UnusableInputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
