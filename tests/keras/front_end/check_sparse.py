"""Sparse gradients on the back ends that have them: TensorFlow and PyTorch."""

import numpy as np
import pytest

import oracle
from cases import HYPERPARAMETERS, LARGE_TABLE, PATTERNS, TABLES, values
from compare import assert_same_bits
from keras_support import (
    BACK_END,
    Adamax,
    as_gradient,
    draw,
    follow,
    keras,
    numpy,
    options,
    tensor,
    variable,
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("table", [*TABLES.values(), LARGE_TABLE], ids=str)
def test_the_rule_touches_the_rows_that_are_there(table, pattern, rng):
    w = variable(values(rng, table, "float32"))
    gradients = [[draw(rng, table, pattern)] for _ in range(2)]
    optimizer = Adamax(0.1, weight_decay=0.1)
    optimizer.build([w])
    before = [numpy(v) for v in (w, *optimizer.variables[2:])]
    rule = oracle.Rule(learning_rate=0.1, weight_decay=0.1)
    follow(optimizer, rule, [w], gradients)
    touched = np.unique(np.concatenate([g.indices for (g,) in gradients]))
    for old, new in zip(before, (w, *optimizer.variables[2:]), strict=True):
        untouched = np.delete(numpy(new), touched, axis=0)
        assert_same_bits(untouched, np.delete(old, touched, axis=0))


@pytest.mark.parametrize("size", [(40, 7), LARGE_TABLE], ids=["small", "large"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameters_beside_a_dense_variable(name, size, rng):
    hyperparameters = {"learning_rate": 0.001, **HYPERPARAMETERS[name]}
    variables = [variable(values(rng, s, "float32")) for s in (size, (3, 2), size)]
    gradients = [
        [
            draw(rng, size, "repeated"),
            values(rng, (3, 2), "float32"),
            draw(rng, size, "distinct"),
        ]
        for _ in range(3)
    ]
    rule = oracle.Rule(**hyperparameters)
    follow(Adamax(**options(hyperparameters)), rule, variables, gradients)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [(40, 7), LARGE_TABLE], ids=["small", "large"])
def test_dtypes(dtype, size, rng):
    w = variable(values(rng, size, dtype))
    gradients = [[draw(rng, size, "distinct", dtype)] for _ in range(2)]
    follow(Adamax(0.5), oracle.Rule(learning_rate=0.5), [w], gradients)


@pytest.mark.parametrize("index", [40, -1, 2**31 - 1])
@pytest.mark.parametrize("rows", [40, 40_000], ids=["small", "large"])
def test_an_index_out_of_range_is_refused_before_anything_is_written(index, rows):
    index = rows if index == 40 else index
    first, table = (variable(np.ones(s, np.float32)) for s in [(3,), (rows, 2)])
    wrong = oracle.Rows(np.ones((2, 2), np.float32), np.array([1, index]))
    optimizer = Adamax()
    optimizer.build([first, table])
    given = [tensor(np.ones(3, np.float32)), as_gradient(wrong, table)]
    error, message = IndexError, r"indices\[1\] must be in \[0, "
    if BACK_END == "tensorflow":
        import tensorflow as tf

        error = tf.errors.InvalidArgumentError
        message = r"indices of the gradient of .* must be in \[0, "
    with pytest.raises(error, match=message):
        optimizer.apply(given)
    for v in (first, table):
        assert (numpy(v) == 1).all()
    assert not any(numpy(v).any() for v in optimizer.variables[2:])


def test_values_that_do_not_fit_the_table_are_refused():
    table = variable(np.ones((40, 2), np.float32))
    wrong = oracle.Rows(np.ones((2, 3), np.float32), np.array([1, 2]))
    other = variable(np.ones((40, 3), np.float32))
    with pytest.raises(ValueError, match=r"gradient of variable .* must have the shape"):
        Adamax().apply([as_gradient(wrong, other)], [table])


def test_repeated_rows_are_summed_first():
    """Gradients +1 and -3 of a row are one of -2: u = 2 and a step of the learning rate."""
    moved, norms = {}, {}
    for make in (Adamax, keras.optimizers.Adamax):
        table = variable(np.zeros((3, 1), np.float32))
        rows = oracle.Rows(np.array([[1.0], [-3.0]], np.float32), np.array([1, 1]))
        optimizer = make(learning_rate=0.1)
        if BACK_END == "torch" and make is not Adamax:
            with pytest.raises((RuntimeError, NotImplementedError)):
                optimizer.apply([as_gradient(rows, table)], [table])
            continue
        optimizer.apply([as_gradient(rows, table)], [table])
        moved[make] = float(numpy(table)[1, 0])
        norms[make] = float(numpy(optimizer.variables[3])[1, 0])
    assert moved[Adamax] == pytest.approx(0.1)
    assert norms[Adamax] == 2.0
    if BACK_END == "tensorflow":  # what Keras makes of it; better if this fails one day
        assert moved[keras.optimizers.Adamax] == pytest.approx(0.05)
        assert norms[keras.optimizers.Adamax] == 4.0


def test_a_loss_scale_divides_sparse_gradients():
    table = variable(np.ones((40, 2), np.float32))
    rows = oracle.Rows(np.full((2, 2), 8, np.float32), np.array([1, 1]))
    optimizer = Adamax(0.1, loss_scale_factor=4.0)
    optimizer.apply([as_gradient(rows, table)], [table])
    assert numpy(optimizer.variables[3])[1].tolist() == [4.0, 4.0]


def test_accumulated_gradients_are_applied_as_a_dense_one(rng):
    start = rng.normal(size=(6, 2)).astype(np.float32)
    sparse, dense = variable(start), variable(start)
    ones = [Adamax(0.1, gradient_accumulation_steps=2), Adamax(0.1)]
    for _ in range(3):
        mean = np.zeros((6, 2), np.float32)
        for _ in range(2):
            rows = draw(rng, (6, 2), "repeated")
            np.add.at(mean, np.asarray(rows.indices), rows.values / 2)
            ones[0].apply([as_gradient(rows, sparse)], [sparse])
        ones[1].apply([tensor(mean)], [dense])
    np.testing.assert_allclose(numpy(sparse), numpy(dense), rtol=2e-5, atol=2e-6)


def test_the_moving_average_is_of_the_whole_table(rng):
    table = variable(np.ones((6, 2), np.float32))
    optimizer = Adamax(0.5, use_ema=True, ema_momentum=0.5)
    optimizer.apply([as_gradient(draw(rng, (6, 2), "one"), table)], [table])
    first = numpy(table)
    optimizer.apply([as_gradient(draw(rng, (6, 2), "one"), table)], [table])
    average = 0.5 * first + 0.5 * numpy(table)
    optimizer.finalize_variable_values([table])
    np.testing.assert_allclose(numpy(table), average, rtol=1e-6)
