"""``adamax.jax`` on several devices: eight of them, which XLA makes of the CPU.

In processes of their own, as the number of devices is fixed when JAX starts.
"""

import pytest

import jax_cases  # noqa: F401  (skips without jax)

PREPARE = """
    import os, re, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from adamax.jax import IndexedSlices, adamax, apply_updates

    ROWS, WIDTH, IDS = 8000, 16, 512
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    start = {"table": draw(ROWS, WIDTH), "weights": draw(800, 16)}
    steps = [
        (rng.integers(-9, ROWS + 9, IDS).astype(np.int32), draw(IDS, WIDTH), draw(800, 16))
        for _ in range(3)
    ]
    optimizer = adamax(0.1, weight_decay=0.1)

    def by_updates(params, state, ids, values, weights):
        gradients = {"table": IndexedSlices(values, ids), "weights": weights}
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates(params, updates), state

    def by_steps(params, state, ids, values, weights):
        gradients = {"table": IndexedSlices(values, ids), "weights": weights}
        return optimizer.step(params, state, gradients)

    take = {"update": by_updates, "step": by_steps}[sys.argv[1]]

    def on_one_device():
        params = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        for each in steps:
            params, state = jax.jit(take)(params, state, *each)
        return jax.tree.map(np.asarray, (params, state))

    def assert_equal_results(actual):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6),
            jax.tree.map(np.asarray, actual),
            on_one_device(),
        )
"""

SHARDED = (
    PREPARE
    + """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = {"rows": P("x", None), "columns": P(None, "x"), "replicated": P()}[sys.argv[2]]
    where = NamedSharding(mesh, spec)
    params = jax.device_put(start, where)
    state = optimizer.init(params)
    assert all(x.sharding.is_equivalent_to(where, 2) for x in jax.tree.leaves(state[0].mu))

    everywhere = NamedSharding(mesh, P())
    steps_there = [
        (*jax.device_put((ids, values), everywhere), jax.device_put(weights, where))
        for ids, values, weights in steps
    ]
    step = jax.jit(take, donate_argnums=(0, 1))
    program = step.lower(params, state, *steps_there[0]).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    collectives = re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", program)
    for shapes, kind in collectives:
        # The rows of the ids have to come from where they are, but never a table.
        sizes = re.findall(r"\\[([\\d,]*)\\]", shapes)
        sizes = [np.prod([int(n) for n in size.split(",") if n]) for size in sizes]
        assert max(sizes) <= IDS * WIDTH, (kind, shapes)
        assert kind == "all-reduce", (kind, shapes)
    assert bool(collectives) == (sys.argv[2] == "rows"), collectives

    for each in steps_there:
        params, state = step(params, state, *each)
    for leaf in jax.tree.leaves((params, state[0].mu, state[0].nu)):
        assert leaf.sharding.is_equivalent_to(where, 2), leaf.sharding
    assert state[0].count.sharding.is_fully_replicated
    assert_equal_results((params, state))
    print("done")
"""
)

# Each device has its own columns and steps with them alone.
SHARD_MAP = (
    PREPARE
    + """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    columns, everywhere = P(None, "x"), P()
    of_params = {"table": columns, "weights": columns}
    of_moments = optax.ScaleByAdamState(everywhere, of_params, of_params)
    of_state = (of_moments, optax.EmptyState())
    step = jax.jit(
        jax.shard_map(
            take,
            mesh=mesh,
            in_specs=(of_params, of_state, everywhere, columns, columns),
            out_specs=(of_params, of_state),
        ),
        donate_argnums=(0, 1),
    )
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for each in steps:
        params, state = step(params, state, *each)
    text = step.lower(params, state, *steps[0]).as_text()
    assert ("adamax_rows" in text) == (sys.argv[1] == "step")
    assert_equal_results((params, state))
    print("done")
"""
)

# Shardings that are part of the types.
EXPLICIT = (
    PREPARE
    + """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    jax.set_mesh(mesh)
    params = {"weights": jax.device_put(start["weights"], P("x", None))}
    state = jax.jit(optimizer.init)(params)
    for *_, weights in steps:
        gradients = {"weights": jax.device_put(weights, P("x", None))}
        if sys.argv[1] == "step":
            params, state = jax.jit(optimizer.step)(params, state, gradients)
        else:
            updates, state = jax.jit(optimizer.update)(gradients, state, params)
            params = apply_updates(params, updates)
    assert jax.typeof(params["weights"]).sharding.spec == P("x", None)
    jax.set_mesh(jax.make_mesh((1,), ("x",)))
    expected = on_one_device()[0]["weights"]
    np.testing.assert_allclose(params["weights"], expected, rtol=2e-6, atol=2e-6)
    print("done")
"""
)

# Rows that are behind, each brought up to date where it is.
EXACT = (
    PREPARE
    + """
    kind = sys.argv[3]
    optimizer = adamax(0.1, weight_decay=0.1, sparse="exact", state_dtype=kind)

    def take(table, state, ids, values):
        rows = optimizer.lookup(table, state, ids)
        g = IndexedSlices(values + rows, ids, current=True)
        if sys.argv[1] == "step":
            return optimizer.step(table, state, g)
        updates, state = optimizer.update(g, state, table)
        return apply_updates(table, updates), state

    def trained(table, steps):
        state = optimizer.init(table)
        stamps = state[2].stamps.sharding
        step = jax.jit(take, donate_argnums=(0, 1))
        for ids, values, _ in steps:
            table, state = step(table, state, ids, values)
        assert stamps.is_equivalent_to(state[2].stamps.sharding, 1), stamps
        return step, *jax.jit(optimizer.flush)(table, state)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = {"rows": P("x", None), "columns": P(None, "x"), "replicated": P()}[sys.argv[2]]
    where = NamedSharding(mesh, spec)
    everywhere = NamedSharding(mesh, P())
    there = [jax.device_put(step, everywhere) for step in steps]
    table = jax.device_put(start["table"], where)
    step, ours, state = trained(table, there)
    assert ours.sharding.is_equivalent_to(where, 2), ours.sharding
    assert state[0].mu.sharding.is_equivalent_to(where, 2)

    text = step.lower(ours, state, *there[0][:2]).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", text):
        sizes = re.findall(r"\\[([\\d,]*)\\]", shapes)
        sizes = [np.prod([int(n) for n in size.split(",") if n]) for size in sizes]
        # The rows of the ids, and some more in turn.
        assert max(sizes) <= (IDS + 4) * WIDTH, (kind, shapes)
        assert kind == "all-reduce", (kind, shapes)

    _, expected, of_expected = trained(jnp.asarray(start["table"]), steps)
    if kind == "float32":
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(state[0].nu, of_expected[0].nu, rtol=1e-5)
    else:
        assert (abs(np.asarray(ours) - np.asarray(expected)) > 1e-5).mean() < 0.02
        different = np.asarray(state[0].nu) != np.asarray(of_expected[0].nu)
        assert different.mean() < 0.01
    print("done")
"""
)

# Each device has gradients of its own rows; all have the same parameters.
DATA_PARALLEL = (
    PREPARE
    + """
    from adamax.jax import psum
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    everywhere, split, check = P(), P("x"), sys.argv[2] == "check_vma"

    def take_together(params, state, ids, values, weights):
        gradients = {"table": IndexedSlices(values, ids), "weights": weights / 8}
        gradients = psum(gradients, "x")
        if sys.argv[1] == "step":
            return optimizer.step(params, state, gradients)
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates(params, updates), state

    step = jax.jit(
        jax.shard_map(
            take_together,
            mesh=mesh,
            in_specs=(everywhere, everywhere, split, split, everywhere),
            out_specs=everywhere,
            check_vma=check,
        )
    )
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for ids, values, weights in steps:
        params, state = step(params, state, ids, values, weights)
    assert_equal_results((params, state))

    def wrong(params, state, ids, values):
        gradients = jax.lax.psum(IndexedSlices(values, ids), "x")
        return optimizer.step(params, state, {"table": gradients, "weights": None})

    specs = (everywhere, everywhere, split, split)
    shards = jax.shard_map(
        wrong, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=check
    )
    try:
        jax.jit(shards)(params, state, *steps[0][:2])
    except TypeError as error:
        assert "adamax.jax.on_rows or psum" in str(error), error
        print("done")
"""
)

# Codes and frames, where the parameters are, and where XLA puts them.
COMPACT = (
    PREPARE
    + """
    optimizer = adamax(0.1, weight_decay=0.1, state_dtype=sys.argv[3])
    type_ = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[sys.argv[4]]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(type_,))
    spec = {"rows": P("x", None), "columns": P(None, "x")}[sys.argv[2]]
    where = NamedSharding(mesh, spec)

    def take(params, state, weights):
        if sys.argv[1] == "step":
            return optimizer.step(params, state, weights)
        updates, state = optimizer.update(weights, state, params)
        return apply_updates(params, updates), state

    def trained(put):
        params = put(start["weights"])
        state = jax.jit(optimizer.init)(params)
        step = jax.jit(take)
        for *_, weights in steps:
            params, state = step(params, state, put(weights))
        text = step.lower(params, state, params).compile().as_text()
        return params, state, text

    expected, of_expected, _ = trained(jnp.asarray)
    if type_ == AxisType.Explicit:
        jax.set_mesh(mesh)
    params, state, text = trained(lambda array: jax.device_put(array, where))
    for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert kind + "(" not in text, kind
    assert params.sharding.is_equivalent_to(where, 2)
    assert state[0].mu.sharding.is_equivalent_to(where, 2), state[0].mu.sharding
    assert (abs(np.asarray(params) - np.asarray(expected)) > 2e-6).mean() < 0.02
    np.testing.assert_allclose(params, expected, atol=5e-3)
    different = np.asarray(state[0].nu) != np.asarray(of_expected[0].nu)
    assert different.mean() < 0.01
    print("done")
"""
)

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
paths = pytest.mark.parametrize("path", ["update", "step"])


@paths
@pytest.mark.parametrize("spread", ["rows", "columns", "replicated"])
def test_spread_over_devices(run_python, path, spread):
    assert run_python(SHARDED, path, spread, **EIGHT) == "done"


@paths
def test_shard_map(run_python, path):
    assert run_python(SHARD_MAP, path, **EIGHT) == "done"


@paths
@pytest.mark.parametrize("check", ["check_vma", ""])
def test_data_parallel_gradients_are_summed_over_devices(run_python, path, check):
    assert run_python(DATA_PARALLEL, path, check, **EIGHT) == "done"


@paths
def test_explicit_shardings(run_python, path):
    assert run_python(EXPLICIT, path, **EIGHT) == "done"


@paths
@pytest.mark.parametrize("spread", ["rows", "columns", "replicated"])
def test_exact_tables_spread_over_devices(run_python, path, spread):
    assert run_python(EXACT, path, spread, "float32", **EIGHT) == "done"


@paths
@pytest.mark.parametrize("spread", ["rows", "columns"])
def test_compact_exact_tables_spread_over_devices(run_python, path, spread):
    assert run_python(EXACT, path, spread, "8bit", **EIGHT) == "done"


@paths
@pytest.mark.parametrize("spread", ["rows", "columns"])
@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_compact_state_spread_over_devices(run_python, path, spread, kind, axis_type):
    assert run_python(COMPACT, path, spread, kind, axis_type, **TWO) == "done"
