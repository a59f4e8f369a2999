"""What ``adamax.Adamax`` refuses, and that a refusal changes nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from adamax import Adamax, IndexedSlices
from cases import DTYPES, PRECISION
from compare import assert_same_contents, contents


@dataclass
class World:
    """An optimizer that has taken steps with a vector and a table, and what it takes."""

    optimizer: Adamax
    vector: np.ndarray = field(default_factory=lambda: np.ones(4, np.float32))
    table: np.ndarray = field(default_factory=lambda: np.ones((5, 3)))

    def __post_init__(self) -> None:
        for _ in range(2):
            self.optimizer.apply_gradients(self.good_pairs())

    def good_pairs(self) -> list:
        return [
            (np.full(4, 0.5, np.float32), self.vector),
            (IndexedSlices(np.full((2, 3), 0.25), [1, 1]), self.table),
        ]

    def contents(self) -> dict[str, np.ndarray]:
        return contents(self.optimizer, [self.vector, self.table])


@pytest.fixture
def world():
    return World(Adamax(0.1, global_clipnorm=1.0))


@pytest.fixture
def unchanged(world):
    """After the test: nothing had changed, and the next step is as if nothing had been."""
    before = world.contents()
    yield
    assert_same_contents(world.contents(), before)
    twin = World(Adamax(0.1, global_clipnorm=1.0))
    for one in (world, twin):
        one.optimizer.apply_gradients(one.good_pairs())
    assert_same_contents(world.contents(), twin.contents())


@dataclass(frozen=True)
class Refused:
    """A pair that is refused, at the end of a call with good pairs.

    ``instead_of`` is the number of the good pair that would have the same parameter.
    """

    pair: Callable[[World], object]
    error: type[Exception]
    match: str
    instead_of: int | None = None


def _of_vector(gradient, error, match):
    return Refused(lambda world: (gradient, world.vector), error, match, 0)


def _of_table(gradient, error, match):
    return Refused(lambda world: (gradient, world.table), error, match, 1)


def _of_new(gradient, parameter, error, match):
    return Refused(lambda world: (gradient, parameter()), error, match)


def _rows(values=((1.0, 1.0, 1.0),), indices=(0,), dense_shape=None):
    return IndexedSlices(np.array(values), indices, dense_shape)


def _read_only(parameter):
    parameter.flags.writeable = False
    return parameter


NO_PAIR = r"^grads_and_vars\[2\] must be a \(gradient, parameter\) pair, got {}$"
SHAPE = r"^the gradient of parameter '0' must have the shape \(4,\), got {}$"
NO_NUMBERS = r"^the gradient of parameter '0' must be an array of real numbers, got {}"
INDICES = r"^the indices of the gradient of parameter '1' must {}"
VALUES = r"^the values of the gradient of parameter '1' must have the shape {}, got {}$"
OUTSIDE = r"^the gradient of parameter '1': indices\[{}\] must be in \[0, 5\), got {}$"
PARAMETER = r"^parameter '2' must be a NumPy array, which is updated in place; got {}$"
DTYPE = (
    r"^parameter '2' must have one of the dtypes float32, float64, float16, bfloat16, "
    r"got {}$"
)
READ_ONLY = r"^parameter '{}' is read-only"
SHARES = r"^parameter '2' shares memory with (parameter )?'{}'"

REFUSED = {
    # Pairs.
    "an array for a pair": Refused(
        lambda world: np.ones((2, 4)), TypeError, NO_PAIR.format("ndarray")
    ),
    "three of a pair": Refused(
        lambda world: (np.ones(4), world.vector, "vector"),
        TypeError,
        NO_PAIR.format("tuple"),
    ),
    "None for a pair": Refused(lambda world: None, TypeError, NO_PAIR.format("NoneType")),
    "a parameter twice": Refused(
        lambda world: (np.ones(4), world.vector),
        ValueError,
        r"^parameter '0' occurs more than once$",
    ),
    "a table twice, dense and sparse": Refused(
        lambda world: (np.ones((5, 3)), world.table),
        ValueError,
        r"^parameter '1' occurs more than once$",
    ),
    # Dense gradients.
    "another length": _of_vector(np.ones(5), ValueError, SHAPE.format(r"\(5,\)")),
    "a shape that would broadcast": _of_vector(
        np.ones(1), ValueError, SHAPE.format(r"\(1,\)")
    ),
    "a scalar": _of_vector(1.0, ValueError, SHAPE.format(r"\(\)")),
    "more dimensions": _of_vector(np.ones((4, 1)), ValueError, SHAPE.format(r"\(4, 1\)")),
    "bool": _of_vector(np.ones(4, bool), TypeError, NO_NUMBERS.format("ndarray.* bool")),
    "complex": _of_vector(
        np.ones(4, np.complex64), TypeError, NO_NUMBERS.format("ndarray.* complex64")
    ),
    "text": _of_vector(["1"] * 4, TypeError, NO_NUMBERS.format("list")),
    "objects": _of_vector(
        np.array([1.0] * 4, object), TypeError, NO_NUMBERS.format("ndarray.* object")
    ),
    "times": _of_vector(np.zeros(4, "m8[s]"), TypeError, NO_NUMBERS.format("ndarray")),
    "a dict": _of_vector({"a": 1}, TypeError, NO_NUMBERS.format("dict")),
    "a ragged list": _of_vector([[1.0], [1.0, 2.0]], ValueError, "inhomogeneous"),
    # Sparse gradients.
    "rows of a scalar": _of_new(
        _rows(), lambda: np.ones(()), ValueError, r"^parameter '2' has no rows"
    ),
    "an index too large": _of_table(_rows(indices=[5]), IndexError, OUTSIDE.format(0, 5)),
    "a negative index": _of_table(
        _rows(np.ones((3, 3)), [0, -1, 7]), IndexError, OUTSIDE.format(1, -1)
    ),
    "an index of 64 bits": _of_table(
        _rows(indices=np.array([2**32])), IndexError, OUTSIDE.format(0, 2**32)
    ),
    "an unsigned index of 64 bits": _of_table(
        _rows(indices=np.array([2**63], np.uint64)), IndexError, OUTSIDE.format(0, 2**63)
    ),
    "indices that are floats": _of_table(
        _rows(indices=[0.0]), TypeError, INDICES.format("be integers, got float64$")
    ),
    "indices that are bools": _of_table(
        _rows(indices=[True]), TypeError, INDICES.format("be integers, got bool$")
    ),
    "indices that are text": _of_table(
        _rows(indices=["0"]), TypeError, INDICES.format("be integers, got <U1$")
    ),
    "indices of two dimensions": _of_table(
        _rows(indices=[[0]]),
        ValueError,
        INDICES.format(r"have one dimension, got the shape \(1, 1\)$"),
    ),
    "an index and no list of them": _of_table(
        _rows(indices=0),
        ValueError,
        INDICES.format(r"have one dimension, got the shape \(\)$"),
    ),
    "more indices than values": _of_table(
        _rows(indices=[0, 1]),
        ValueError,
        VALUES.format(r"\(2, 3\)", r"\(1, 3\)"),
    ),
    "values of another row length": _of_table(
        _rows([[1.0, 2.0]]), ValueError, VALUES.format(r"\(1, 3\)", r"\(1, 2\)")
    ),
    "values without rows": _of_table(
        _rows([1.0, 2.0, 3.0]), ValueError, VALUES.format(r"\(1, 3\)", r"\(3,\)")
    ),
    "values that are complex": _of_table(
        _rows([[1j] * 3]),
        TypeError,
        NO_NUMBERS.replace("'0'", "'1'").format("ndarray.* complex128"),
    ),
    "another dense shape": _of_table(
        _rows(dense_shape=(6, 3)),
        ValueError,
        r"^the dense_shape of .* parameter '1' must be \(5, 3\), got \(6, 3\)$",
    ),
    "a dense shape of other dimensions": _of_table(
        _rows(dense_shape=(5,)),
        ValueError,
        r"^the dense_shape of .* parameter '1' must be \(5, 3\), got \(5,\)$",
    ),
    # Parameters.
    "a list": _of_new([1.0], lambda: [1.0], TypeError, PARAMETER.format("list")),
    "a number": _of_new(1.0, lambda: 1.0, TypeError, PARAMETER.format("float")),
    "a NumPy scalar": _of_new(
        1.0, lambda: np.float32(1), TypeError, PARAMETER.format("float32")
    ),
    "None": _of_new(1.0, lambda: None, TypeError, PARAMETER.format("NoneType")),
    "integers": _of_new(
        np.ones(2), lambda: np.ones(2, np.int32), TypeError, DTYPE.format("int32")
    ),
    "complex numbers": _of_new(
        np.ones(2), lambda: np.ones(2, complex), TypeError, DTYPE.format("complex128")
    ),
    "long doubles": _of_new(
        np.ones(2),
        lambda: np.ones(2, np.longdouble),
        TypeError,
        DTYPE.format(np.dtype(np.longdouble)),
    ),
    "a structured array": _of_new(
        np.ones(2), lambda: np.ones(2, [("a", "f4")]), TypeError, DTYPE.format(".*")
    ),
    "a read-only array": _of_new(
        np.ones(2), lambda: _read_only(np.ones(2)), ValueError, READ_ONLY.format(2)
    ),
    "a broadcast array": _of_new(
        np.ones((3, 2)),
        lambda: np.broadcast_to(np.ones(2), (3, 2)),
        ValueError,
        READ_ONLY.format(2),
    ),
    "an array whose elements overlap": _of_new(
        np.ones((3, 3)),
        lambda: as_strided(np.ones(5), (3, 3), (8, 8)),
        ValueError,
        r"^parameter '2' ",
    ),
    "an array of one element many times": _of_new(
        np.ones((3, 3)),
        lambda: as_strided(np.ones(1), (3, 3), (0, 0)),
        ValueError,
        r"^parameter '2' ",
    ),
    "a new view of a known array": Refused(
        lambda world: (np.ones(4), world.vector[:]), ValueError, SHARES.format(0)
    ),
    "a part of a known array": Refused(
        lambda world: (np.ones(3), world.table[2]), ValueError, SHARES.format(1)
    ),
    "one element of a known array": Refused(
        lambda world: (np.ones(1), world.vector[-1:]), ValueError, SHARES.format(0)
    ),
    "a known array as another dtype": Refused(
        lambda world: (np.ones(2), world.vector.view(np.float64)),
        ValueError,
        SHARES.format(0),
    ),
    "every second element of a known array": Refused(
        lambda world: (np.ones((3, 2)), world.table[::2, ::2]),
        ValueError,
        SHARES.format(1),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("unchanged")
def test_a_refused_pair_changes_nothing(world, case):
    refused = REFUSED[case]
    pairs = world.good_pairs()
    if refused.instead_of is not None:
        del pairs[refused.instead_of]
    with pytest.raises(refused.error, match=refused.match):
        world.optimizer.apply_gradients([*pairs, refused.pair(world)])


@pytest.mark.usefixtures("unchanged")
def test_new_parameters_beside_a_refused_one_get_no_state(world):
    new = np.ones(2)
    pairs = [*world.good_pairs(), (np.ones(2), new), (np.ones(3), np.ones(2))]
    with pytest.raises(ValueError, match=r"parameter '3' must have the shape \(2,\)"):
        world.optimizer.apply_gradients(pairs)
    np.testing.assert_array_equal(new, 1)


@pytest.mark.parametrize("first", [slice(0, 6), slice(0, None, 2)], ids=str)
@pytest.mark.usefixtures("unchanged")
def test_new_parameters_that_overlap_are_refused(world, first):
    memory = np.ones(10)
    parameters = [memory[first], memory[4:]]
    pairs = [(np.ones_like(parameter), parameter) for parameter in parameters]
    with pytest.raises(ValueError, match=r"shares memory with (parameter )?'[23]'"):
        world.optimizer.apply_gradients([*world.good_pairs(), *pairs])
    np.testing.assert_array_equal(memory, 1)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.usefixtures("unchanged")
def test_a_step_without_a_gradient_is_refused(world, count):
    pairs = [(None, parameter) for parameter in (world.vector, np.ones(2))]
    expected = "^grads_and_vars must hold at least one gradient that is not None$"
    with pytest.raises(ValueError, match=expected):
        world.optimizer.apply_gradients(pairs[:count])


@pytest.mark.usefixtures("unchanged")
def test_an_error_of_the_callers_generator_changes_nothing(world):
    def pairs():
        yield from world.good_pairs()
        raise ZeroDivisionError("in the generator")

    with pytest.raises(ZeroDivisionError, match="in the generator"):
        world.optimizer.apply_gradients(pairs())


# --- Known parameters that are no longer what they were -----------------------------------


@pytest.mark.usefixtures("unchanged")
def test_a_parameter_that_became_read_only_is_refused(world):
    world.table.flags.writeable = False
    with pytest.raises(ValueError, match=READ_ONLY.format(1)):
        world.optimizer.apply_gradients(world.good_pairs())
    world.table.flags.writeable = True


def _reshaped(array):
    array.shape = (2, 2)


def _retyped(array):
    array.dtype = np.int32


def _byte_swapped(array):
    array.dtype = array.dtype.newbyteorder()


def _restrided(array):
    array.strides = (0,)


@pytest.mark.filterwarnings("ignore:Setting the .* on a NumPy array:DeprecationWarning")
@pytest.mark.parametrize("change", [_reshaped, _retyped, _byte_swapped, _restrided])
def test_a_parameter_that_was_changed_in_place_is_refused(change):
    w = np.ones(4, np.float32)
    optimizer = Adamax(0.1)
    optimizer.apply_gradients([(np.ones(4), w)])
    state = contents(optimizer, [])
    change(w)
    before = w.copy()
    with pytest.raises(ValueError, match=r"^parameter '0' "):
        optimizer.apply_gradients([(np.ones(w.shape), w)])
    np.testing.assert_array_equal(w, before)
    assert_same_contents(contents(optimizer, []), state)


# --- Learning rates -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (math.nan, ValueError, r"^learning_rate\(2\) must be in \[0, inf\), got nan$"),
        (-1, ValueError, r"^learning_rate\(2\) must be in \[0, inf\), got -1\.0$"),
        (math.inf, ValueError, r"^learning_rate\(2\) must be in \[0, inf\), got inf$"),
        (None, TypeError, r"^learning_rate\(2\) must be a real number, got None$"),
        ([0.1], TypeError, r"^learning_rate\(2\) must be a real number, got \[0\.1\]$"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_a_bad_value_of_a_schedule_changes_nothing(world, returned, error, match):
    world.optimizer.learning_rate = lambda step: returned
    with pytest.raises(error, match=match):
        world.optimizer.apply_gradients(world.good_pairs())
    world.optimizer.learning_rate = 0.1


@pytest.mark.usefixtures("unchanged")
def test_an_error_of_a_schedule_changes_nothing(world):
    world.optimizer.learning_rate = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        world.optimizer.apply_gradients(world.good_pairs())
    world.optimizer.learning_rate = 0.1


@pytest.mark.usefixtures("unchanged")
def test_an_array_as_learning_rate_is_checked_at_every_step(world):
    world.optimizer.learning_rate = rate = np.array(0.1)
    rate[...] = math.nan
    with pytest.raises(ValueError, match=r"^learning_rate must be in \[0, inf\), got nan$"):
        world.optimizer.apply_gradients(world.good_pairs())
    world.optimizer.learning_rate = 0.1


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (math.nan, ValueError), ("0.1", TypeError)]
)
@pytest.mark.usefixtures("unchanged")
def test_a_bad_learning_rate_is_not_assigned(world, value, error):
    with pytest.raises(error, match=r"^learning_rate must be "):
        world.optimizer.learning_rate = value
    assert world.optimizer.learning_rate == 0.1


# --- build and minimize -------------------------------------------------------------------

BUILD = {
    "a list": (lambda world: [[1.0]], TypeError, PARAMETER.format("list")),
    "integers": (lambda world: [np.ones(2, int)], TypeError, DTYPE.format("int64")),
    "one array": (
        lambda world: np.ones((2, 2)),
        TypeError,
        r"^parameters must be an iterable or a mapping of arrays, got one array$",
    ),
    "a read-only array": (
        lambda world: [_read_only(np.ones(2))],
        ValueError,
        READ_ONLY.format(2),
    ),
    "one array twice": (
        lambda world: [np.ones(2)] * 2,
        ValueError,
        r"^parameter '\d' occurs more than once$",
    ),
    "a known array twice": (
        lambda world: [world.vector, world.vector],
        ValueError,
        r"^parameter '0' occurs more than once$",
    ),
    "a view of a known array": (
        lambda world: [np.ones(2), world.table[:]],
        ValueError,
        r"^parameter '3' shares memory with (parameter )?'1'",
    ),
    "a name that is taken": (
        lambda world: {"2": np.ones(2), "1": np.ones(2)},
        ValueError,
        r"^the name '1' belongs to another parameter$",
    ),
    "two names that are one": (
        lambda world: {"2": np.ones(2), 2: np.ones(2)},
        ValueError,
        r"^the name '2' belongs to another parameter$",
    ),
}


@pytest.mark.parametrize("case", BUILD)
@pytest.mark.usefixtures("unchanged")
def test_build_with_a_refused_parameter_changes_nothing(world, case):
    parameters, error, match = BUILD[case]
    with pytest.raises(error, match=match):
        world.optimizer.build(parameters(world))


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.usefixtures("unchanged")
def test_minimize_wants_a_gradient_for_each_parameter(world, count):
    expected = rf"^loss_and_gradients must return one gradient for each of 2 .*got {count}$"
    with pytest.raises(ValueError, match=expected):
        world.optimizer.minimize(
            lambda: (0.0, [np.ones(4)] * count), [world.vector, world.table]
        )


@pytest.mark.usefixtures("unchanged")
def test_an_error_of_the_loss_changes_nothing(world):
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        world.optimizer.minimize(lambda: 1 / 0, [world.vector])


# --- The constructor ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, 1, b"Adamax"], ids=repr)
def test_a_name_is_a_str(name):
    with pytest.raises(TypeError, match=r"^name must be a str, got "):
        Adamax(name=name)


@pytest.mark.parametrize("state_dir", [1, b"state", ["state"], True], ids=repr)
def test_a_state_dir_is_a_path(state_dir):
    with pytest.raises(TypeError, match=r"^state_dir must be .*, got "):
        Adamax(state_dir=state_dir)


@pytest.mark.parametrize(
    "argument", ["lr", "betas", "eps", "decay", "foo", "ema_momentum", "loss_scale_factor"]
)
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(TypeError, match=rf"'{argument}'"):
        Adamax(**{argument: 0.1})


def test_only_the_arguments_that_keras_has_in_order_are_positional():
    optimizer = Adamax(0.1, 0.2, 0.3, 0.4, "mine")
    assert optimizer.get_config().items() >= {
        "learning_rate": 0.1, "beta_1": 0.2, "beta_2": 0.3, "epsilon": 0.4, "name": "mine"
    }.items()  # fmt: skip
    with pytest.raises(TypeError, match="positional"):
        Adamax(0.1, 0.2, 0.3, 0.4, "mine", 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"beta_1": 1.5}, ValueError, r"^beta_1 must be in \[0, 1\), got 1\.5$"),
        ({"learning_rate": "1"}, TypeError, r"^learning_rate must be a real number"),
        ({"clipnorm": 1, "clipvalue": 1}, ValueError, r"^at most one of clipnorm"),
        ({"sparse": "no"}, ValueError, r"^sparse must be .*'lazy'.*, got 'no'$"),
    ],
)
def test_hyperparameters_are_checked_by_the_constructor(arguments, error, match):
    """All of the checks are in the tests of the rule."""
    with pytest.raises(error, match=match):
        Adamax(**arguments)


def test_what_can_only_be_read_cannot_be_assigned(world):
    for name in ("iterations", "hyperparameters"):
        with pytest.raises(AttributeError, match=name):
            setattr(world.optimizer, name, getattr(world.optimizer, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_of_a_conversion_is_no_error(dtype):
    """A gradient too large for the parameter's dtype is infinite in it."""
    w = np.ones(2, PRECISION[dtype].dtype)
    with np.errstate(over="ignore"):
        Adamax().apply_gradients([(np.array([np.longdouble("1e4000"), 1]), w)])
    assert np.isfinite(w).tolist() == [False, True]
