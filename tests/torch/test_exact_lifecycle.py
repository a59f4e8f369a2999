"""What becomes of stale rows: tables that change, copies, threads, compilers of models."""

import copy
import gc
import pickle
import threading
import weakref

import pytest

from torch_cases import assert_same_contents, assert_same_tensor, contents, rows_of, torch

from adamax.torch import Adamax  # isort: skip  (not without torch)

nn = torch.nn
ROWS, WIDTH = 12, 3


def start(rows=ROWS, width=WIDTH, seed=0):
    """A table, and an optimizer that it is attached to."""
    torch.manual_seed(seed)
    table = nn.Embedding(rows, width, sparse=True, dtype=torch.float64)
    optimizer = Adamax(table.parameters(), lr=0.05, sparse="exact")
    return table, optimizer, optimizer.attach(table)


def train(table, optimizer, steps=6, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        ids = torch.tensor([step % 7, (3 * step) % 5, 1])
        table(ids).square().sum().backward()
        optimizer.step()
    return optimizer


def trained(steps=6):
    table, optimizer, _ = start()
    return table, train(table, optimizer, steps)


def flushed(steps=6):
    """What all rows are after some steps."""
    table, optimizer = trained(steps)
    optimizer.flush()
    return table.weight.detach()


EVERYTHING = torch.arange(ROWS)


# --- Tables that change -------------------------------------------------------------------


def grow(table, optimizer, rows=4):
    """A table and its state, as users do it for new words."""
    weight, state = table.weight, optimizer.state[table.weight]
    weight.data = torch.cat([weight.data, weight.data[:rows]])
    for name in ("exp_avg", "exp_inf"):
        state[name] = torch.cat([state[name], torch.zeros(rows, WIDTH, dtype=weight.dtype)])
    weight.grad = None


def test_a_table_may_grow_when_no_row_is_stale():
    table, optimizer = trained()
    optimizer.flush()
    grow(table, optimizer)
    expected = torch.nn.Parameter(table.weight.detach().clone())
    dense = Adamax([expected], lr=0.05)
    dense.load_state_dict(
        {**dense.state_dict(), "state": copy.deepcopy(optimizer.state_dict()["state"])}
    )
    for step in range(20):
        ids = torch.tensor([ROWS + step % 4, step % ROWS])
        optimizer.zero_grad()
        table(ids).square().sum().backward()
        expected.grad = table.weight.grad.to_dense()
        optimizer.step()
        dense.step()
    optimizer.flush()
    torch.testing.assert_close(table.weight, expected, rtol=1e-12, atol=1e-12)


def test_a_table_may_not_grow_while_rows_are_stale():
    table, optimizer = trained()
    grow(table, optimizer)
    before = contents(optimizer)
    match = "^parameter 'weight' or its state was .*resized or replaced while rows"
    with pytest.raises(RuntimeError, match=match):
        table(torch.tensor([ROWS]))
    with pytest.raises(RuntimeError, match=match):
        optimizer.flush()
    table.weight.grad = rows_of(torch.ones(1, WIDTH).double(), [ROWS], (ROWS + 4, WIDTH))
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert_same_contents(optimizer, before)


@pytest.mark.parametrize("reset", ["clear", "defaultdict", "the parameter's"])
@pytest.mark.parametrize("stale", [False, True])
def test_state_that_is_reset_by_hand(stale, reset):
    table, optimizer = trained()
    if not stale:
        optimizer.flush()
    if reset == "clear":
        optimizer.state.clear()
    elif reset == "defaultdict":
        optimizer.state = type(optimizer.state)(dict)
    else:
        del optimizer.state[table.weight]
    if stale:
        before = table.weight.detach().clone()
        with pytest.raises(
            RuntimeError, match=r"^parameter 'weight' or its state was .*repl"
        ):
            train(table, optimizer)
        assert_same_tensor(table.weight, before)
        return
    other = nn.Embedding.from_pretrained(table.weight.detach().clone(), False, sparse=True)
    expected = Adamax(other.parameters(), lr=0.05, sparse="exact")
    expected.attach(other)
    assert_same_contents(train(table, optimizer), train(other, expected))


def test_parameters_that_are_replaced_are_let_go():
    table, optimizer = trained()
    optimizer.flush()
    gone = weakref.ref(table.weight)
    [group] = optimizer.param_groups
    gc.disable()
    try:
        del optimizer.state[table.weight]
        new = nn.Parameter(table.weight.detach().clone())
        table.weight = group["params"][0] = new
        assert gone() is None
    finally:
        gc.enable()
    train(table, optimizer)


def test_optimizers_are_freed_without_the_cycle_collector():
    table, optimizer = trained()
    gone = weakref.ref(optimizer)
    state = weakref.ref(optimizer.state[table.weight]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        # An attached model still needs the state for its stale rows.
        assert state() is not None
        assert_same_tensor(table(EVERYTHING), flushed())
        del table
        assert state() is None
    finally:
        gc.enable()


def test_a_parameter_that_leaves_its_group_is_still_caught_up():
    table, optimizer = trained()
    other = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"] = [other]
    assert_same_tensor(table(EVERYTHING), flushed())
    train(table, optimizer)  # it is not stepped any more
    optimizer.flush()
    assert_same_tensor(table.weight.detach(), flushed())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_hold_what_has_been_flushed(way):
    table, optimizer = trained()
    if way == "pickle":
        optimizer.flush()
        other, copied = pickle.loads(pickle.dumps((table, optimizer)))
    else:
        other, copied = copy.deepcopy((table, optimizer))
    assert_same_tensor(other.weight.detach(), flushed())
    copied.attach(other)
    assert_same_contents(train(table, optimizer, 9, 6), train(other, copied, 9, 6))
    optimizer.flush()
    copied.flush()
    assert_same_contents(optimizer, copied)


# --- Reading in other ways ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("way", ["trace", "export"])
def test_programs_that_are_made_of_a_model_read_current_rows(way):
    table, optimizer = trained()
    if way == "trace":
        program = torch.jit.trace(table, (EVERYTHING,))
    else:
        program = torch.export.export(table, (EVERYTHING,)).module()
    assert_same_tensor(program(EVERYTHING).detach(), flushed())
    train(table, optimizer)


REFUSED = {
    "torch.vmap": lambda table: torch.vmap(table)(EVERYTHING),
    "torch.jit.script": torch.jit.script,
    "torch.export": lambda table: torch.export.export(table, (EVERYTHING,), strict=True),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_read_stale_rows_says_how_to_go_on(what):
    table, optimizer, attachment = start()
    train(table, optimizer)
    with pytest.raises(
        Exception, match=rf"(?s){what}.*remove\(\) on what attach\(model\) has"
    ):
        REFUSED[what](table)
    attachment.remove()
    REFUSED[what](table)
    assert_same_tensor(table.weight.detach(), flushed())


def test_vmap_is_fine_when_no_row_is_stale():
    table, optimizer = trained()
    optimizer.flush()
    assert_same_tensor(torch.vmap(table)(EVERYTHING).detach(), flushed())


# --- Threads ------------------------------------------------------------------------------


def test_a_thread_may_read_while_another_steps():
    table, optimizer, _ = start(rows=3000, width=16)
    other, expected, _ = start(rows=3000, width=16)
    done, errors, reads = threading.Event(), [], []

    def read():
        torch.manual_seed(1)
        try:
            with torch.no_grad():
                while not done.is_set():
                    rows = table(torch.randint(3000, (500,)))
                    reads.append(bool(rows.isfinite().all()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for each, its in ((table, optimizer), (other, expected)):
        for step in range(150):
            its.zero_grad()
            ids = torch.from_numpy(torch.arange(200).numpy() * (step + 7) % 3000)
            each(ids).square().sum().backward()
            its.step()
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert reads
    assert all(reads)
    optimizer.flush()
    expected.flush()
    # Rows are rounded where they are caught up, and that the readers decide.
    torch.testing.assert_close(table.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_a_fork_while_another_thread_holds_the_lock(run_python):
    program = """
        import os, threading
        import torch
        from adamax.torch import Adamax

        table = torch.nn.Embedding(9, 2, sparse=True)
        optimizer = Adamax(table.parameters(), sparse="exact")
        optimizer.attach(table)
        table(torch.tensor([1])).sum().backward()
        optimizer.step()
        held, done = threading.Event(), threading.Event()

        def hold():
            with optimizer._tables.lock.held:
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            table(torch.tensor([2]))
            os._exit(0)
        done.set()
        thread.join()
        print(os.waitpid(child, 0)[1])
    """
    assert run_python(program, PYTHONWARNINGS="ignore") == "0"
