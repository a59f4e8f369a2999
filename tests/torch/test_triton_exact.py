"""``sparse="exact"`` on a GPU, through Triton's interpreter on the CPU."""

import numpy as np
import pytest

from cases import PRECISION
from torch_cases import contents, rows_of, torch
from torch_on_host import host  # noqa: F401  (a fixture)

from adamax.torch import Adamax, cuda_exact, exact  # isort: skip  (needs torch)

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.xdist_group("triton")]

ROWS = 12


class Model(torch.nn.Module):
    def __init__(self, sparse, dtype, width):
        super().__init__()
        torch.manual_seed(5)
        self.table = torch.nn.Embedding(ROWS, width, sparse=sparse, dtype=dtype)
        self.layer = torch.nn.Linear(width, 1, dtype=dtype)

    def forward(self, ids):
        return self.layer(self.table(ids)).square().mean()


def batch(step):
    ids = np.random.default_rng(step).integers(ROWS, size=3)
    return torch.from_numpy(ids)


def trained(sparse, steps=14, dtype=torch.float64, width=3, lr=0.05, **options):
    """An optimizer after some steps, with its rows up to date."""
    model = Model(sparse, dtype, width)
    params = [*model.table.parameters(), *model.layer.parameters()]
    optimizer = Adamax(params, lr=lr, sparse="exact" if sparse else "lazy", **options)
    if sparse:
        optimizer.attach(model)
    for step in range(steps):
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.05 / (1 + step))
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    optimizer.flush()
    return optimizer


def assert_close(optimizer, expected, factor=100.0):
    """Gradients depend on the weights, which carries roundings on."""
    expected = contents(expected)
    for name, actual in contents(optimizer).items():
        wanted = expected[name]
        unit = PRECISION[wanted.dtype.name].roundoff if wanted.dtype.kind == "f" else 0
        limit = factor * unit * max(1.0, np.abs(wanted).max(initial=0.0))
        assert np.abs(actual - wanted).max(initial=0.0) <= limit, name


@pytest.fixture
def kept(monkeypatch):
    """How many rows or ids were caught up at once."""
    counts = []
    original = cuda_exact.RowsOnDevice.catch_up

    def counted(self, tensors, rows):
        counts.append(len(rows))
        original(self, tensors, rows)

    monkeypatch.setattr(cuda_exact.RowsOnDevice, "catch_up", counted)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"betas": (0.0, 0.999)},
        {"betas": (0.8, 0.99), "eps": 1e-3, "maximize": True},
        {"eps": 0.0},
        {"width": 40},
    ],
    ids=str,
)
def test_it_is_the_trajectory_of_dense_gradients(kept, options):
    assert_close(trained(True, **options), trained(False, **options))
    assert kept.count(3) == 13  # batches, from the second on
    assert kept[-1] == ROWS


def test_float32_follows_too():
    options = {"dtype": torch.float32, "steps": 10}
    assert_close(trained(True, **options), trained(False, **options))


def test_a_learning_rate_on_the_device_is_noted():
    rates = [torch.tensor(0.05), torch.tensor(0.05)]
    assert_close(trained(True, lr=rates[0]), trained(False, lr=rates[1]))


def test_the_history_is_a_ring(monkeypatch):
    """Of so few steps that it goes round, while rows take their turn."""
    made = []
    original = exact.StaleRows.__init__

    def noted(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(exact.StaleRows, "__init__", noted)
    options = {"betas": (0.02, 0.999), "dtype": torch.float32, "steps": 40}
    assert_close(trained(True, **options), trained(False, **options))
    assert made[0].history.entries < 40


def test_the_counter_is_read_once(monkeypatch):
    reads = []
    original = cuda_exact.RowsOnDevice.count

    def counted(self, step):
        reads.append(self._counter is None or self._counter[1] != step._version)
        return original(self, step)

    monkeypatch.setattr(cuda_exact.RowsOnDevice, "count", counted)
    trained(True, steps=4)
    assert reads == [True, False, False, False]


@pytest.mark.parametrize("start", [2**32 - 3, 2**31 - 3])
def test_stamps_begin_anew_at_their_end(monkeypatch, start):
    """A table that has made 2**32 steps, and 2**31."""
    original = exact.StaleRows.__init__

    def started(self, *args):
        original(self, *args)
        self.history.clock[0] = start
        self.history.restart()
        self.stamps.fill_(int(np.int64(start).astype(np.int32)))

    monkeypatch.setattr(exact.StaleRows, "__init__", started)
    assert_close(trained(True, steps=8), trained(False, steps=8))


def test_a_stale_row_stops_the_device():
    w = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = Adamax([w], sparse="exact")
    w.grad = rows_of(torch.ones(1, 2), [1], (5, 2))
    optimizer.step()
    w.grad = rows_of(torch.ones(2, 2), [1, 3], (5, 2))
    with pytest.raises(Exception, match="but was stale when it was read"):
        optimizer.step()


def test_stamps_that_are_ahead_of_the_history_stop_the_device():
    w = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = Adamax([w], sparse="exact")
    w.grad = rows_of(torch.ones(1, 2), [1], (5, 2))
    optimizer.step()
    optimizer._tables._tables[w].stale.stamps[3] = 7
    with pytest.raises(Exception, match="stamps do not belong to the history"):
        optimizer.flush()


def test_tables_must_be_contiguous():
    param = torch.nn.Parameter(torch.ones(3, 4).T)
    optimizer = Adamax([param], sparse="exact")
    param.grad = rows_of(torch.ones(1, 3), [1], (4, 3))
    with pytest.raises(
        RuntimeError, match=r"a contiguous one on an NVIDIA GPU, .*, got par"
    ):
        optimizer.step()
    assert not optimizer.state


def test_an_id_out_of_range_stops_the_device():
    w = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = Adamax([w], sparse="exact")
    w.grad = rows_of(torch.ones(1, 2), [1], (5, 2))
    optimizer.step()
    with pytest.raises(Exception, match="an id is out of the range of the table"):
        optimizer.catch_up(w, torch.tensor([2, 5]))


def test_a_skipped_step_is_not_made_up_for():
    w = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = Adamax([w], sparse="exact", lr=0.1)
    w.grad = rows_of(torch.ones(1, 2), [1], (5, 2))
    optimizer.step()
    optimizer.flush()
    before = contents(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    optimizer.flush()
    assert {name: array.tolist() for name, array in contents(optimizer).items()} == {
        name: array.tolist() for name, array in before.items()
    }
