"""Sparse gradients of ``adamax.torch.Adamax``: rows that are touched, rows that are not."""

import itertools
import math

import numpy as np
import pytest

from cases import LARGE_TABLE, PATTERNS, TABLES
from torch_cases import (
    DTYPES,
    OPTIONS,
    PATHS,
    assert_same_contents,
    assert_same_tensor,
    check_step,
    contents,
    draw,
    follow,
    parameter,
    rows_of,
    take_steps,
    torch,
    touched,
)

from adamax.torch import Adamax  # isort: skip  (not without torch)
from adamax.torch.batch import by_shape  # isort: skip
from adamax.torch.sparse import sparse_rows  # isort: skip

paths = pytest.mark.parametrize("path", PATHS)
chosen_paths = pytest.mark.parametrize("path", ["fused", "foreach", "loop"])


def batch(rng, table, dtype="float32", pattern="repeated", sparse_dims=1):
    """A gradient of some rows, in the order and as often as the pattern says."""
    indices = PATTERNS[pattern](rng, math.prod(table[:sparse_dims]))
    values = draw(rng, (indices.size, *table[sparse_dims:]), dtype)
    places = np.stack(np.unravel_index(indices, table[:sparse_dims]))
    return rows_of(values, places.reshape(sparse_dims, -1), table)


# --- The oracle ---------------------------------------------------------------------------


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("table", TABLES)
def test_steps_follow_the_oracle(rng, table, pattern, dtype, path):
    w = parameter(rng, TABLES[table], dtype)
    gradients = [[batch(rng, w.shape, dtype, pattern)] for _ in range(3)]
    follow(Adamax([w], **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_follow_the_oracle(rng, options, dtype, path):
    w = parameter(rng, (20, 3), dtype)
    patterns = itertools.islice(itertools.cycle(PATTERNS), 12)
    gradients = [[batch(rng, w.shape, dtype, pattern)] for pattern in patterns]
    follow(Adamax([w], **OPTIONS[options], **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", ["maximize and coupled decay", "decoupled decay"])
def test_hundreds_of_steps_follow_the_oracle(rng, options, dtype, path):
    w = parameter(rng, (30, 3), dtype)
    patterns = ("repeated", "distinct", "none", "one") * 50
    gradients = [[batch(rng, w.shape, dtype, pattern)] for pattern in patterns]
    follow(Adamax([w], **OPTIONS[options], **PATHS[path]), gradients)


@chosen_paths
def test_large_tables_follow_the_oracle(rng, path):
    w = parameter(rng, LARGE_TABLE)
    gradients = [[batch(rng, w.shape)] for _ in range(2)]
    follow(Adamax([w], **PATHS[path]), gradients)


@chosen_paths
@pytest.mark.parametrize("options", ["defaults", "coupled decay", "decoupled decay"])
def test_dense_and_sparse_in_turn_and_at_once(rng, options, path):
    params = [parameter(rng, (20, 3)) for _ in range(4)]
    steps = []
    for step in range(12):
        made = [draw(rng, p.shape) if step & 1 else batch(rng, p.shape) for p in params[:2]]
        steps.append([*made, draw(rng, (20, 3)), batch(rng, (20, 3))])
        steps[-1][step % 4] = None
    follow(Adamax(params, **OPTIONS[options], **PATHS[path]), steps)


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize("pattern", ["repeated", "none", "every"])
@pytest.mark.parametrize("sparse_dims", [1, 2, 3])
def test_any_number_of_dimensions_may_be_sparse(rng, sparse_dims, pattern, dtype, path):
    w = parameter(rng, (4, 3, 5), dtype)
    gradients = [[batch(rng, w.shape, dtype, pattern, sparse_dims)] for _ in range(4)]
    follow(Adamax([w], **PATHS[path]), gradients)


@paths
def test_a_scalar_may_have_a_sparse_gradient(rng, path):
    """Of no sparse dimensions: all of its elements are touched or none is."""
    w = torch.nn.Parameter(torch.tensor(2.0))
    gradient = torch.tensor(3.0).to_sparse()
    assert gradient.sparse_dim() == 0
    take_steps(Adamax([w], lr=0.5, **PATHS[path]), [[gradient]])
    assert w.item() == pytest.approx(1.5)


# --- Touched and untouched ----------------------------------------------------------------


@paths
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
def test_untouched_rows_keep_every_bit(rng, dtype, pattern, path):
    w = parameter(rng, (50, 6), dtype)
    optimizer = Adamax([w], weight_decay=0.1, **PATHS[path])
    take_steps(optimizer, [[draw(rng, w.shape, dtype)]])
    w.data[::7], w.data[1::7] = -0.0, math.nan
    state = optimizer.state[w]
    state["exp_avg"][2::7], state["exp_inf"][3::7] = -0.0, math.inf
    gradient = batch(rng, w.shape, dtype, pattern)
    untouched = ~touched(gradient)
    tensors = [w.detach(), state["exp_avg"], state["exp_inf"]]
    before = [tensor[untouched].clone() for tensor in tensors]
    take_steps(optimizer, [[gradient]])
    assert [state["exp_avg"] is tensors[1], state["exp_inf"] is tensors[2]] == [True] * 2
    for tensor, expected in zip(tensors, before, strict=True):
        assert_same_tensor(tensor[untouched], expected)


@paths
def test_a_row_of_zeros_is_touched(path):
    w = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    chosen = {"weight_decay": 0.5, "decoupled_weight_decay": True, "lr": 0.1}
    optimizer = Adamax([w], **chosen, **PATHS[path])
    one = rows_of(torch.ones(2, 2, dtype=torch.float64), [0, 1], w.shape)
    zero = rows_of(torch.zeros(1, 2, dtype=torch.float64), [1], w.shape)
    take_steps(optimizer, [[one], [zero]])
    state = optimizer.state[w]
    assert state["exp_inf"][:, 0].tolist() == [1.0, 0.999, 0.0]
    assert state["exp_avg"][:, 0].tolist() == pytest.approx([0.1, 0.09, 0.0])
    assert w[0, 0] > w[1, 0]
    assert w[2].tolist() == [1.0, 1.0]


@paths
def test_without_rows_only_time_goes_by(rng, path):
    w = parameter(rng, (5, 2))
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[batch(rng, w.shape)]] * 2)
    before = contents(optimizer)
    take_steps(optimizer, [[rows_of(torch.zeros(0, 2), [], w.shape)]] * 3)
    assert optimizer.state[w]["step"] == 5.0
    assert_same_contents(optimizer, {**before, "0.step": np.array(5.0, np.float32)})
    follow(optimizer, [[batch(rng, w.shape)]])


@paths
def test_values_of_one_index_are_summed_first(rng, path):
    start = draw(rng, (6, 3), "float64")
    values = torch.tensor(rng.integers(-9, 9, size=(40, 3)), dtype=torch.float64)
    gradient = rows_of(values, rng.integers(6, size=40), start.shape)
    results = []
    for given in (gradient, gradient.coalesce(), gradient.to_dense()):
        w = torch.nn.Parameter(start.clone())
        results.append(take_steps(Adamax([w], **PATHS[path]), [[given]] * 3))
    assert_same_contents(results[0], results[1])
    for name, expected in contents(results[2]).items():
        np.testing.assert_allclose(contents(results[0])[name], expected, rtol=1e-14)


@paths
def test_sums_of_16_bit_values_are_not_rounded(path):
    w = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float16))
    values = torch.tensor([[2048.0], [1.0], [1.0], [1.0]], dtype=torch.float16)
    optimizer = Adamax([w], **PATHS[path])
    take_steps(optimizer, [[rows_of(values, [1, 1, 1, 1], w.shape)]])
    assert optimizer.state[w]["exp_inf"].tolist() == [[0.0], [2051.0]]


@paths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_size_of_the_table_is_made(rng, dtype, path):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    w = torch.nn.Parameter(torch.zeros(5000, 4, dtype=DTYPES[dtype]))
    gradient = batch(rng, (10, 4), dtype)
    gradient = rows_of(gradient._values(), gradient._indices(), w.shape)
    optimizer = take_steps(Adamax([w], **PATHS[path]), [[gradient]])
    tables = [w, optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_inf"]]
    theirs = {table.untyped_storage().data_ptr() for table in tables}
    made = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            for result in tree_leaves(results):
                dense = isinstance(result, torch.Tensor) and not result.is_sparse
                if dense and result.untyped_storage().data_ptr() not in theirs:
                    made.append(result.numel())
            return results

    w.grad = gradient
    with Watch():
        optimizer.step()
    assert max(made) <= 4 * gradient._nnz()


@pytest.mark.parametrize("layout", ["transposed", "every other column", "some columns"])
@paths
@pytest.mark.parametrize("sparse_dims", [1, 2])
def test_tables_may_have_any_layout(rng, sparse_dims, layout, path):
    start = draw(rng, (20, 6))
    tables = {
        "transposed": torch.zeros(6, 20).T,
        "every other column": torch.zeros(20, 12)[:, ::2],
        "some columns": torch.zeros(20, 9)[:, 2:8],
    }
    w = torch.nn.Parameter(tables[layout].copy_(start))
    plain = torch.nn.Parameter(start.clone())
    gradients = [[batch(rng, w.shape, sparse_dims=sparse_dims)] for _ in range(5)]
    gradients.insert(2, [draw(rng, w.shape)])
    chosen = {"weight_decay": 0.1, **PATHS[path]}
    steps = (take_steps(Adamax([p], **chosen), gradients) for p in (w, plain))
    for name, (actual, expected) in zip(
        ("w", "step", "exp_avg", "exp_inf"),
        zip(*(contents(optimizer).values() for optimizer in steps), strict=True),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, 1e-5, 1e-5, err_msg=name)
    follow(Adamax([w], **chosen), gradients)


@paths
def test_values_may_have_any_layout(rng, path):
    w = parameter(rng, (9, 4))
    optimizer = Adamax([w], **PATHS[path])
    values = [
        draw(rng, (4, 6)).T,
        draw(rng, (6, 8))[:, ::2],
        torch.ones(1, 4).expand(6, 4),
        draw(rng, (6, 1)).expand(6, 4),
    ]
    for given in values:
        w.grad = torch.sparse_coo_tensor(
            torch.tensor([[3, 1, 3, 8, 0, 8]]), given, w.shape, check_invariants=True
        )
        check_step(optimizer)


@paths
def test_values_may_be_conjugates(rng, path):
    w = parameter(rng, (5, 2), "complex64")
    start = w.detach().clone()
    values = draw(rng, (3, 2), "complex64")
    take_steps(Adamax([w], **PATHS[path]), [[rows_of(values.conj(), [4, 0, 4], (5, 2))]])
    expected = torch.nn.Parameter(start)
    plain = rows_of(values.conj().resolve_conj(), [4, 0, 4], (5, 2))
    take_steps(Adamax([expected], **PATHS[path]), [[plain]])
    assert_same_tensor(w, expected)


@pytest.mark.parametrize("path", ["default", "fused", "loop"])
def test_tables_may_share_memory(rng, path):
    """Rows of one optimizer after the other."""
    start = draw(rng, (10, 3))
    slices = slice(0, 7), slice(4, 10)
    gradients = [[batch(rng, start[s].shape) for s in slices] for _ in range(4)]
    shared, apart = start.clone(), start.clone()
    params = [torch.nn.Parameter(shared[s]) for s in slices]
    take_steps(Adamax(params, weight_decay=0.1, **PATHS[path]), gradients)
    singles = [
        Adamax([torch.nn.Parameter(apart[s])], weight_decay=0.1, **PATHS[path])
        for s in slices
    ]
    for of_this_step in gradients:
        for optimizer, gradient in zip(singles, of_this_step, strict=True):
            take_steps(optimizer, [[gradient]])
    assert_same_tensor(shared, apart)


# --- Modules ------------------------------------------------------------------------------


@chosen_paths
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_embeddings(rng, index, padding, dtype, path):
    table = torch.nn.Embedding(12, 4, padding, sparse=True, dtype=DTYPES[dtype])
    layer = torch.nn.Linear(4, 2, dtype=DTYPES[dtype])
    params = [*table.parameters(), *layer.parameters()]
    optimizer = Adamax(params, lr=0.1, **PATHS[path])
    for _ in range(5):
        optimizer.zero_grad()
        ids = torch.tensor(rng.integers(12, size=(3, 5)), dtype=index)
        layer(table(ids)).square().mean().backward()
        assert table.weight.grad.is_sparse
        check_step(optimizer)
    if padding is not None:
        assert_same_tensor(table.weight[padding], torch.zeros(4, dtype=DTYPES[dtype]))


@chosen_paths
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)]
)
def test_embedding_bags(rng, mode, weighted, path):
    bag = torch.nn.EmbeddingBag(12, 4, mode=mode, sparse=True)
    optimizer = Adamax(bag.parameters(), lr=0.1, **PATHS[path])
    for _ in range(5):
        optimizer.zero_grad()
        ids = torch.tensor(rng.integers(12, size=9))
        weights = {"per_sample_weights": torch.rand(9)} if weighted else {}
        bag(ids, torch.tensor([0, 3, 3, 7]), **weights).square().sum().backward()
        assert bag.weight.grad.is_sparse
        check_step(optimizer)


@chosen_paths
def test_embedding_bags_of_maxima_are_dense(rng, path):
    bag = torch.nn.EmbeddingBag(12, 4, mode="max")
    optimizer = Adamax(bag.parameters(), **PATHS[path])
    bag(torch.tensor(rng.integers(12, size=(3, 4)))).sum().backward()
    check_step(optimizer)


@paths
def test_gradients_that_accumulate(rng, path):
    table = torch.nn.Embedding(9, 3, sparse=True)
    optimizer = Adamax(table.parameters(), **PATHS[path])
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(3):
            ids = torch.tensor(rng.integers(9, size=7))
            table(ids).square().sum().backward()
        assert not table.weight.grad.is_coalesced()
        check_step(optimizer)


@paths
def test_a_table_that_is_also_a_layer(rng, path):
    """Tied weights: the sum of a sparse and a dense gradient is dense."""
    table = torch.nn.Embedding(9, 3, sparse=True)
    optimizer = Adamax(table.parameters(), **PATHS[path])
    for _ in range(3):
        optimizer.zero_grad()
        hidden = table(torch.tensor(rng.integers(9, size=7)))
        (hidden @ table.weight.T).square().sum().backward()
        assert not table.weight.grad.is_sparse
        check_step(optimizer)


def test_training_matches_the_dense_gradient_where_every_row_is_touched(rng):
    results = []
    ids = torch.tensor(rng.permutation(20))
    start = draw(rng, (20, 3), "float64")
    for sparse in (False, True):
        table = torch.nn.Embedding.from_pretrained(start.clone(), False, sparse=sparse)
        optimizer = Adamax(table.parameters(), weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            table(ids).sin().sum().backward()
            optimizer.step()
        results.append(optimizer)
    assert_same_contents(*results)


# --- Errors -------------------------------------------------------------------------------


def unchecked(indices, values, shape):
    return torch.sparse_coo_tensor(
        torch.tensor(indices), values, shape, check_invariants=False
    )


OUT_OF_RANGE = {
    "too large": ([[0, 5]], torch.ones(2, 2)),
    "negative": ([[0, -1, 2]], torch.ones(3, 2)),
    "far away": ([[2**40]], torch.ones(1, 2)),
    "most negative": ([[-(2**63)]], torch.ones(1, 2)),
    "in the second dimension": ([[0, 1], [1, 2]], torch.ones(2)),
    "in the first dimension": ([[0, 5], [1, 1]], torch.ones(2)),
    "negative in two dimensions": ([[1], [-1]], torch.ones(1)),
}


@paths
@pytest.mark.parametrize("case", OUT_OF_RANGE)
@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_index_out_of_range_changes_nothing(rng, groups, first_step, case, path):
    """Nor does it in a parameter before, in the same group or not."""
    indices, values = OUT_OF_RANGE[case]
    params = [parameter(rng, (5, 2)) for _ in range(4)]
    good = [draw(rng, (5, 2)), batch(rng, (5, 2)), batch(rng, (5, 2)), draw(rng, (5, 2))]
    optimizer = Adamax(
        params if groups == 1 else [{"params": params[:2]}, {"params": params[2:]}],
        **PATHS[path],
    )
    if not first_step:
        take_steps(optimizer, [good])
    before = contents(optimizer)
    bad = [*good[:2], unchecked(indices, values, (5, 2)), good[3]]
    with pytest.raises(IndexError, match=r"indices\[.*must be in .*5.*, got"):
        take_steps(optimizer, [bad])
    assert_same_contents(optimizer, before)
    follow(optimizer, [good])


def test_only_state_of_a_failed_first_step_is_removed(rng):
    params = [parameter(rng, (5, 2)) for _ in range(2)]
    optimizer = Adamax(params)
    take_steps(optimizer, [[batch(rng, (5, 2)), None]])
    bad = unchecked([[9]], torch.ones(1, 2), (5, 2))
    with pytest.raises(IndexError, match=r"indices\[0\]"):
        take_steps(optimizer, [[draw(rng, (5, 2)), bad]])
    assert list(optimizer.state) == [params[0]]
    assert optimizer.state[params[0]]["step"] == 1.0


@pytest.mark.filterwarnings("ignore:Sparse CS[CR] tensor support:UserWarning")
@pytest.mark.parametrize("convert", ["to_sparse_csr", "to_sparse_csc"])
def test_other_sparse_layouts_are_refused(rng, convert):
    w = parameter(rng, (5, 2))
    gradient = getattr(torch.eye(5, 2), convert)()
    # Today torch refuses first.
    with pytest.raises(RuntimeError, match="gradient to a tensor that has data of a diff"):
        w.grad = gradient
    with pytest.raises(ValueError, match=r"must have the layout torch.sparse_coo, got"):
        sparse_rows(w, gradient, by_shape)


def test_sparse_parameters_are_refused(rng):
    w = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises(ValueError, match="parameters must be strided tensors"):
        Adamax([w])
    optimizer = Adamax([parameter(rng, (2,))])
    with pytest.raises(ValueError, match="parameters must be strided tensors"):
        optimizer.add_param_group({"params": [w]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("mode", ["dense", "eager", None, 1, ""])
def test_unknown_modes_are_refused(rng, mode):
    with pytest.raises(ValueError, match=r"sparse must be 'lazy' or 'exact', got"):
        Adamax([parameter(rng, (2,))], sparse=mode)
