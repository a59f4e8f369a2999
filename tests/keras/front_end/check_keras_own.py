"""Keras' own tests, of its Adamax and of what all its optimizers share, run on ours.

They ship in Keras' package. Its tests of the base class work with SGD and Adam; here these
names stand for our Adamax. A few of them expect the numbers of SGD, and are left out.
"""

import importlib
import types

import pytest

from keras_support import BACK_END, Adamax, keras

optimizers = importlib.import_module("keras.src.optimizers")
adamax_test = importlib.import_module("keras.src.optimizers.adamax_test")
optimizer_test = importlib.import_module("keras.src.optimizers.optimizer_test")
with pytest.MonkeyPatch.context() as patch:  # its cases hold the classes
    patch.setattr(optimizers, "Adamax", Adamax)
    sparse_test = importlib.import_module("keras.src.optimizers.optimizer_sparse_test")

# A step of SGD is as long as the gradient.
NUMBERS_OF_SGD = {
    "test_ema_with_model_fit",
    "test_static_loss_scaling",
    "test_overwrite_with_gradient_with_gradient_accumulation",
}
WITH_TENSORFLOW_ONLY = {"test_tf_checkpointing", "test_mixed_with_tf_variables"}
NAMES_OF_OTHERS = {"test_get_method", "test_optimizer_auto_naming"}
# The same once more for each optimizer, all of which are ours here.
REPEATED = {f"test_gradient_accumulation_with_weigth_decay{i}" for i in range(1, 11)}


def ours_for(identifier):
    """``keras.optimizers.get``, with our class for any of theirs."""
    return Adamax(**(identifier["config"] if isinstance(identifier, dict) else {}))


@pytest.fixture(autouse=True)
def use_ours(monkeypatch):
    classes = dict.fromkeys(("SGD", "Adam", "AdamW", "Adamax"), Adamax)
    schedules = keras.optimizers.schedules
    ours = types.SimpleNamespace(**classes, get=ours_for, schedules=schedules)
    monkeypatch.setattr(optimizer_test, "optimizers", ours)
    monkeypatch.setattr(adamax_test, "Adamax", Adamax)


def part_of(test_class, leave_out=(), only=""):
    """``test_class`` with some of its tests only."""
    tests = {name for name in dir(test_class) if name.startswith("test_")}
    assert set(leave_out) <= tests
    tests_left = {name for name in tests - set(leave_out) if only in name}
    assert tests_left
    return type(test_class.__name__, (test_class,), dict.fromkeys(tests - tests_left))


TestAdamax = part_of(adamax_test.AdamaxTest)
TestOptimizer = part_of(
    optimizer_test.OptimizerTest,
    NUMBERS_OF_SGD
    | NAMES_OF_OTHERS
    | (set() if BACK_END == "tensorflow" else WITH_TENSORFLOW_ONLY),
)
if BACK_END != "torch":  # which has no sparse tensors in Keras
    TestSparse = part_of(sparse_test.OptimizerSparseTest, only="adamax")
