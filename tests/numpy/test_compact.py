"""Compact state and stochastic rounding in the NumPy front end."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

from adamax import Adamax, IndexedSlices
from adamax._core import compact
from cases import values
from compare import assert_same_bits

KINDS = ("bfloat16", "8bit")


def dense_gradients(rng, steps=12, shape=(20, 6)):
    return [values(rng, shape, "float32") for _ in range(steps)]


def row_gradients(rng, steps=12, shape=(40, 6), count=9):
    return [
        IndexedSlices(
            values(rng, (count, *shape[1:]), "float32"),
            rng.integers(shape[0], size=count),
        )
        for _ in range(steps)
    ]


def train(optimizer, arrays, gradients):
    optimizer.build(arrays)
    for of_step in gradients:
        if optimizer.sparse == "exact":
            for gradient, array in zip(of_step, arrays, strict=True):
                if isinstance(gradient, IndexedSlices):
                    optimizer.lookup(array, gradient.indices)
        optimizer.apply_gradients(zip(of_step, arrays, strict=True))


def both(rng, steps=12):
    return list(zip(dense_gradients(rng, steps), row_gradients(rng, steps), strict=True))


def parameters():
    return [np.ones((20, 6), np.float32), np.ones((40, 6), np.float32)]


def assert_same(first, second, arrays, others):
    for a, b in zip(arrays, others, strict=True):
        assert_same_bits(a, b)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert_same_bits(np.asarray(array), np.asarray(theirs[name]), name)


# --- Steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_what_is_held_is_two_bytes_a_parameter_and_four_a_row(rng, sparse):
    optimizer, arrays = Adamax(sparse=sparse, state_dtype="8bit"), parameters()
    train(optimizer, arrays, both(rng, 3))
    sizes = {name: array.nbytes for name, array in optimizer.state_dict().items()}
    assert sizes == {
        "iterations": 8,
        "0.m": 120, "0.u": 120, "0.frame": 4,
        "1.m": 240, "1.u": 240, "1.frame": 160,
    }  # fmt: skip
    optimizer = Adamax(state_dtype="bfloat16")
    train(optimizer, arrays, both(rng, 1))
    assert optimizer.state_dict()["0.m"].nbytes == 240


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_training_follows_float32(rng, kind, sparse):
    gradients = both(rng, 60)
    found = {}
    for state_dtype in ("float32", kind):
        arrays = parameters()
        optimizer = Adamax(0.01, sparse=sparse, state_dtype=state_dtype)
        train(optimizer, arrays, gradients)
        optimizer.flush()
        found[state_dtype] = arrays
    for expected, actual in zip(found["float32"], found[kind], strict=True):
        moved = np.sqrt(np.mean((expected - 1) ** 2))
        assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.2 * moved


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_the_dense_trajectory(rng, kind):
    gradients = row_gradients(rng, 80)
    table, dense = np.ones((40, 6), np.float32), np.ones((40, 6), np.float32)
    exact = Adamax(0.01, sparse="exact", state_dtype=kind)
    other = Adamax(0.01, state_dtype=kind)
    train(exact, [table], [[g] for g in gradients])
    exact.flush()
    for gradient in gradients:
        whole = np.zeros((40, 6), np.float32)
        np.add.at(whole, gradient.indices, gradient.values)
        other.apply_gradients([(whole, dense)])
    moved = np.sqrt(np.mean((dense - 1) ** 2))
    assert np.sqrt(np.mean((table - dense) ** 2)) < 0.15 * moved


@pytest.mark.parametrize("sparse", ["lazy", "exact"])
def test_a_table_takes_dense_gradients_too(sparse):
    table = np.ones((40, 6), np.float32)
    optimizer = Adamax(0.01, sparse=sparse, state_dtype="8bit")
    optimizer.apply_gradients([(np.ones((40, 6), np.float32), table)])
    gradient = IndexedSlices(np.ones((3, 6), np.float32), [5, 9, 5])
    train(optimizer, [table], [[gradient]])
    optimizer.flush()
    before = table.copy()
    optimizer.apply_gradients([(np.ones((40, 6), np.float32), table)])
    assert (table < before).all()
    assert optimizer.state_dict()["0.frame"].shape == (40,)
    wrong = np.ones((40, 5), np.float32)
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply_gradients([(wrong, table)])


def test_runs_are_the_same_and_parameters_do_not_round_alike(rng):
    gradients = [[g, g] for g in dense_gradients(rng)]
    runs = []
    for _ in range(2):
        arrays = [np.ones((20, 6), np.float32), np.ones((20, 6), np.float32)]
        optimizer = Adamax(state_dtype="8bit")
        train(optimizer, arrays, gradients)
        runs.append((optimizer, arrays))
    assert_same(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    assert (runs[0][1][0] != runs[0][1][1]).any()


def test_bfloat16_parameters_move_with_stochastic_rounding():
    for stochastic in (False, True):
        w = np.ones(1000, np.dtype(ml_dtypes.bfloat16))
        optimizer = Adamax(1e-3, stochastic_rounding=stochastic)
        for _ in range(100):
            optimizer.apply_gradients([(np.ones(1000, np.float32), w)])
        moved = 1 - float(w.astype(np.float32).mean())
        assert moved == pytest.approx(0.1 if stochastic else 0, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scalar_is_a_parameter_too(kind):
    w = np.ones((), np.float32)
    first = Adamax(0.1, state_dtype=kind)
    for _ in range(3):
        first.apply_gradients([(np.ones((), np.float32), w)])
    assert w == pytest.approx(0.7, abs=0.05)
    other = w.copy()
    second = Adamax(0.1, state_dtype=kind)
    second.load_state_dict(first.state_dict(), [other])
    assert_same(first, second, [w], [other])
    second.load_state_dict(first.state_dict(state_dtype="float32"))
    assert second.state_dict(state_dtype="float32")["0.m"].shape == ()


# --- Checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", ["lazy", "exact"])
@pytest.mark.parametrize("way", ["file", "dict", "pickle", "deepcopy", "files of state"])
def test_going_on_from_a_checkpoint_is_not_having_stopped(rng, tmp_path, kind, sparse, way):
    gradients = both(rng, 8)
    arrays = parameters()
    state_dir = tmp_path / "state" if way == "files of state" else None
    first = Adamax(0.01, sparse=sparse, state_dtype=kind, state_dir=state_dir)
    train(first, arrays, gradients[:5])
    first.flush()
    if way in ("pickle", "deepcopy"):
        both_ = first, arrays
        copied = pickle.loads(pickle.dumps(both_)) if way == "pickle" else None
        second, others = copied or copy.deepcopy(both_)
    else:
        others = [array.copy() for array in arrays]
        other_dir = tmp_path / "other" if state_dir else None
        second = Adamax(0.01, sparse=sparse, state_dtype=kind, state_dir=other_dir)
        if way == "dict":
            second.load_state_dict(first.state_dict(), others)
        else:
            first.save(tmp_path / "optimizer.safetensors")
            second.load(tmp_path / "optimizer.safetensors", others)
    assert_same(first, second, arrays, others)
    train(first, arrays, gradients[5:])
    train(second, others, gradients[5:])
    assert_same(first, second, arrays, others)


@pytest.mark.parametrize("source", ["float32", *KINDS])
@pytest.mark.parametrize("target", ["float32", *KINDS])
def test_state_of_one_kind_loads_into_another(rng, tmp_path, source, target):
    arrays = parameters()
    first = Adamax(state_dtype=source)
    train(first, arrays, both(rng, 5))
    first.save(tmp_path / "state.safetensors")
    for given in (first.state_dict(), first.state_dict(state_dtype="float32")):
        second = Adamax(state_dtype=target)
        second.load_state_dict(given, arrays)
        check_close(first, second, target)
    second = Adamax(state_dtype=target)
    second.load(tmp_path / "state.safetensors", arrays)
    check_close(first, second, target)
    if source == target:
        for name, array in first.state_dict().items():
            assert_same_bits(np.asarray(second.state_dict()[name]), np.asarray(array))


def check_close(first, second, target):
    expected, actual = (o.state_dict(state_dtype="float32") for o in (first, second))
    assert expected.keys() == actual.keys()
    worst = 1.25 / 127 if target == "8bit" else 0.005
    for name in ("0", "1"):
        m, u = expected[f"{name}.m"], expected[f"{name}.u"]
        limit = 2**0.1251 - 1 if target == "8bit" else 0.005
        np.testing.assert_allclose(actual[f"{name}.u"], u, rtol=limit)
        assert (np.abs(actual[f"{name}.m"] - m) <= worst * 1.1 * u + 0.005 * abs(m)).all()


def test_state_whose_view_is_gone_is_converted_too():
    base = np.ones((4, 6), np.float32)
    optimizer, view = Adamax(state_dtype="8bit"), base[:, :3]
    optimizer.apply_gradients([(np.ones((4, 3), np.float32), view)])
    del view
    state = optimizer.state_dict(state_dtype="float32")
    np.testing.assert_allclose(state["0.u"], 1, rtol=0.1)


def broken(name, value):
    optimizer, arrays = Adamax(state_dtype="8bit"), [np.ones((4, 3), np.float32)]
    optimizer.apply_gradients([(np.ones((4, 3), np.float32), arrays[0])])
    state = {key: array.copy() for key, array in optimizer.state_dict().items()}
    if value is None:
        del state[name]
    else:
        state[name] = value
    return optimizer, arrays, state


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("0.frame", None, ValueError, r"^state_dict lacks 0\.frame$"),
        ("0.frame", np.float32([1.5]), ValueError, r"frame'\] must be in \[0, 1\)$"),
        ("0.frame", np.float32([np.nan]), ValueError, r"frame'\] must be in \[0, 1\)$"),
        ("0.frame", np.zeros(3, np.float32), ValueError, r"shape \(4,\), got \(3,\)$"),
        ("0.u", np.ones((4, 3), np.int8), TypeError, r"'0\.u'\] must have the dtype"),
        ("0.u", np.ones((4, 3), np.float32), TypeError, r"'0\.u'\] must have the dtype"),
        ("0.m", np.ones((4, 3), np.float32), ValueError, r"entries that belong to no"),
        ("0.u", np.ones((4, 2), np.uint8), ValueError, r"shape \(4, 3\), got \(4, 2\)$"),
    ],
)
def test_a_broken_checkpoint_changes_nothing(name, value, error, message):
    optimizer, _arrays, state = broken(name, value)
    before = {key: np.array(array) for key, array in optimizer.state_dict().items()}
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    for key, array in optimizer.state_dict().items():
        assert_same_bits(np.asarray(array), before[key])


# --- Arguments ----------------------------------------------------------------------------


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"^state_dtype must be one of .*, got 'int8'$"):
        Adamax(state_dtype="int8")
    with pytest.raises(TypeError, match=r"^stochastic_rounding must be a bool, got 1$"):
        Adamax(stochastic_rounding=1)
    with pytest.raises(ValueError, match=r"^state_dtype='8bit' needs .* 0\.9 and 0\.5$"):
        Adamax(beta_2=0.5, state_dtype="8bit")
    optimizer = Adamax(state_dtype="8bit")
    with pytest.raises(ValueError, match=r"^state_dtype='8bit' needs"):
        optimizer.beta_2 = 0.9
    assert optimizer.beta_2 == 0.999
    with pytest.raises(ValueError, match=r"at most 32 bits, got float64$"):
        optimizer.build([np.ones(3)])
    with pytest.raises(AttributeError):
        optimizer.state_dtype = "float32"
    with pytest.raises(ValueError, match=r"^state_dtype must be None or 'float32'"):
        optimizer.state_dict(state_dtype="8bit")


def test_configurations_have_them():
    config = Adamax(state_dtype="8bit", stochastic_rounding=True).get_config()
    optimizer = Adamax.from_config(config)
    assert optimizer.state_dtype == "8bit"
    assert optimizer.stochastic_rounding is True
    del config["state_dtype"], config["stochastic_rounding"]  # of an older version
    assert Adamax.from_config(config).state_dtype == "float32"
    assert compact.STATE_DTYPES == ("float32", "bfloat16", "8bit")
