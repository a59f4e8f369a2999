"""``adamax.jax`` under transformations of JAX and optax, and in libraries that use it."""

import functools
import operator
import re

import numpy as np
import pytest

from cases import values
from compare import assert_same_bits
from frameworks import framework
from jax_cases import PATHS, jax, jnp, optax, rows, take_step

from adamax.jax import (  # isort: skip  (not without jax)
    IndexedSlices,
    adamax,
    apply_updates,
    lookup,
    on_rows,
    scale_by_adamax,
    value_and_sparse_grad,
)

paths = pytest.mark.parametrize("path", PATHS)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, actual, expected)


def problem(rng, number=None):
    """Parameters, and gradients of them, of rows and whole; or stacks of that many."""
    lead = () if number is None else (number,)
    draw = functools.partial(values, rng, dtype="float32")
    params = {
        "table": jnp.asarray(draw(shape=(*lead, 20, 3))),
        "weights": jnp.asarray(draw(shape=(*lead, 5))),
    }
    gradients = {
        "table": IndexedSlices(
            jnp.asarray(draw(shape=(*lead, 8, 3))),
            jnp.asarray(rng.integers(-2, 22, size=(*lead, 8)), jnp.int32),
        ),
        "weights": jnp.asarray(draw(shape=(*lead, 5))),
    }
    return params, gradients


# --- JAX ----------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("shared_state", [False, True])
def test_vmap(rng, path, shared_state):
    number = 4
    optimizer = adamax(0.1, weight_decay=0.1)
    step = take_step(optimizer, path)
    params, gradients = problem(rng, number)
    if shared_state:
        state = optimizer.init(jax.tree.map(lambda x: x[0], params))
        in_axes = (0, None, 0)
    else:
        state = jax.vmap(optimizer.init)(params)
        in_axes = 0
    actual = jax.vmap(step, in_axes)(params, state, gradients)
    for i in range(number):
        one = jax.tree.map(lambda x, i=i: x[i], (params, gradients))
        of_one = state if shared_state else jax.tree.map(lambda x, i=i: x[i], state)
        expected = step(one[0], of_one, one[1])
        assert_close(jax.tree.map(lambda x, i=i: x[i], actual), expected)


def test_vmap_of_whole_steps_uses_the_kernels(rng):
    """Where the scalars are the same for all, one more axis is nothing new."""
    optimizer = adamax(0.1)
    w, g = (jnp.asarray(values(rng, (4, 5), "float32")) for _ in range(2))
    state = optimizer.init(w[0])
    state = (state[0]._replace(mu=jnp.zeros((4, 5)), nu=jnp.zeros((4, 5))), state[1])
    axes = (0, (optax.ScaleByAdamState(None, 0, 0), None), 0)
    vmapped = jax.jit(jax.vmap(optimizer.step, axes, (0, axes[1])))
    assert "adamax_dense" in vmapped.lower(w, state, g).as_text()
    expected, _ = optimizer.step(w, optimizer.init(w), g)
    assert_close(vmapped(w, state, g)[0], expected)


@paths
def test_scan(rng, path):
    optimizer = adamax(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    step = take_step(optimizer, path)
    _, gradients = problem(rng, 6)
    params, _ = problem(rng)
    state = optimizer.init(params)

    @jax.jit
    def scanned(params, state):
        def body(carry, gradients):
            return step(*carry, gradients), None

        return jax.lax.scan(body, (params, state), gradients)[0]

    actual = scanned(params, state)
    for i in range(6):
        params, state = step(params, state, jax.tree.map(lambda x, i=i: x[i], gradients))
    assert_close(actual, (params, state))


@paths
def test_cond(rng, path):
    optimizer = adamax(0.1)
    step = take_step(optimizer, path)
    params, gradients = problem(rng)
    state = optimizer.init(params)

    @jax.jit
    def perhaps(go, params, state):
        return jax.lax.cond(go, lambda *a: step(*a, gradients), lambda *a: a, params, state)

    assert_close(perhaps(True, params, state), step(params, state, gradients))
    assert_close(perhaps(False, params, state), (params, state))


@paths
def test_steps_can_be_differentiated(rng, path):
    """As meta-learning does: through the step, by the learning rate and the gradient."""
    w, g = (jnp.asarray(rng.normal(size=30).astype(np.float32)) for _ in range(2))
    start = adamax(0.1).init(w)

    def distance(learning_rate, g, of_rows):
        optimizer = adamax(learning_rate)
        step = take_step(optimizer, path)
        after, state = step(w, start, g)
        after, _ = step(after, state, 2 * g)
        table = jnp.zeros((4, 3))
        slices = IndexedSlices(of_rows, jnp.array([1, 1]))
        rows_after, _ = step(table, optimizer.init(table), slices)
        return (after**2).sum() + (rows_after**2).sum()

    def exact(learning_rate, g, of_rows):
        m, u, after = 0.0, 0.0, w
        for t, each in ((1, g), (2, 2 * g)):
            m, u = m + 0.1 * (each - m), jnp.maximum(0.999 * u, abs(each))
            after = after - learning_rate / (1 - 0.9**t) * m / (u + 1e-8)
        s = of_rows.sum(axis=0)
        return (after**2).sum() + ((learning_rate * s / (abs(s) + 1e-8)) ** 2).sum()

    at = jnp.float32(0.1), g, jnp.asarray(rng.normal(size=(2, 3)).astype(np.float32))
    actual = jax.grad(distance, argnums=(0, 1, 2))(*at)
    assert_close(actual, jax.grad(exact, argnums=(0, 1, 2))(*at), rtol=1e-3, atol=1e-4)


def test_two_threads_may_step_at_once(rng):
    """With all of XLA's threads busy."""
    from concurrent.futures import ThreadPoolExecutor

    optimizer = adamax(0.1)
    step = take_step(optimizer, "step")
    w, g = (jnp.asarray(rng.normal(size=(600_000,)).astype(np.float32)) for _ in range(2))
    table = jnp.asarray(rng.normal(size=(3000, 64)).astype(np.float32))
    of_rows = rows(rng, rng.integers(3000, size=6000), table)

    def train(seed):
        params, gradients = {"a": w + seed, "b": table}, {"a": g, "b": of_rows}
        state = optimizer.init(params)
        for _ in range(10):
            params, state = step(params, state, gradients)
        return params

    expected = [train(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for actual, known in zip(pool.map(train, range(2)), expected, strict=True):
            jax.tree.map(assert_same_bits, actual, known)


def test_kernels_may_be_asked_for_by_several_threads_first(run_python):
    program = """
        import threading, warnings
        import jax, jax.numpy as jnp
        from adamax.jax import adamax
        warnings.simplefilter("error")
        optimizer, w = adamax(0.1), jnp.ones(3)
        state = optimizer.init(w)
        together = threading.Barrier(4)
        texts = []
        def lower():
            together.wait()
            texts.append(jax.jit(optimizer.step).lower(w, state, w).as_text())
        threads = [threading.Thread(target=lower) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(sum("adamax_dense" in text for text in texts))
    """
    assert run_python(program) == "4"


def test_a_process_may_end_in_the_midst_of_a_step(run_python):
    program = """
        import jax, jax.numpy as jnp
        from adamax.jax import adamax
        optimizer = adamax(0.1)
        step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        w = jnp.ones(8 << 20)
        state = optimizer.init(w)
        for _ in range(30):
            w, state = step(w, state, jnp.ones(8 << 20))  # returns before it is done
        print("at the end")
    """
    assert run_python(program) == "at the end"


def test_a_version_of_jax_that_refuses_the_handlers_is_told_of(run_python):
    program = """
        import warnings
        import jax, jax.numpy as jnp
        from jaxlib import xla_client

        def refuse(*args):
            raise jax.errors.JaxRuntimeError("the handler's API version is incompatible")

        register = xla_client._xla.register_custom_call_target
        xla_client._xla.register_custom_call_target = refuse
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from adamax.jax import adamax
            xla_client._xla.register_custom_call_target = register
            optimizer = adamax(0.1)
            w = jnp.ones(3)
            after, _ = jax.jit(optimizer.step)(w, optimizer.init(w), w)
        print(len(caught), caught[0].message, after)
    """
    printed = run_python(program)
    assert re.match(r"1 jax [\d.]+ cannot use the native core of adamax here", printed)
    assert "API version is incompatible" in printed
    assert printed.endswith("[0.9 0.9 0.9]")


def test_handlers_are_registered_without_the_private_function(run_python):
    program = """
        import jax, jax.numpy as jnp
        from jaxlib import xla_client

        class Hidden:
            def __init__(self, module): self.module = module
            def __getattr__(self, name):
                if name == "register_custom_call_target":
                    raise AttributeError(name)
                return getattr(self.module, name)

        private, xla_client._xla = xla_client._xla, Hidden(xla_client._xla)
        from adamax.jax import adamax
        xla_client._xla = private
        optimizer, w = adamax(0.1), jnp.ones(3)
        step = jax.jit(optimizer.step)
        print("adamax_dense" in step.lower(w, optimizer.init(w), w).as_text())
        print(step(w, optimizer.init(w), w)[0])
    """
    assert run_python(program) == "True\n[0.9 0.9 0.9]"


def test_importing_starts_no_backend(run_python):
    program = """
        import adamax.jax, adamax.jax.optimizer
        from jax._src import xla_bridge
        adamax.jax.adamax(0.1, sparse="exact")
        print(xla_bridge.backends_are_initialized())
    """
    assert run_python(program) == "False"


def test_with_the_reference_kernels_xla_compiles_the_rule(run_python):
    program = """
        import jax, jax.numpy as jnp
        from adamax.jax import adamax
        optimizer = adamax(0.1)
        w = jnp.ones(3)
        step = jax.jit(optimizer.step)
        print("adamax_dense" in step.lower(w, optimizer.init(w), w).as_text())
        print(step(w, optimizer.init(w), w)[0])
    """
    assert run_python(program, ADAMAX_KERNELS="reference") == "False\n[0.9 0.9 0.9]"


def test_without_the_native_core_one_warning_tells_of_it(run_python):
    program = """
        import sys, warnings
        sys.modules["adamax._native.verbs"] = None
        import jax, jax.numpy as jnp
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from adamax.jax import IndexedSlices, adamax
            print(len(caught))
            optimizer, w = adamax(0.1), jnp.ones((3, 1))
            for g in (w, IndexedSlices(w, jnp.arange(3))):
                after, _ = jax.jit(optimizer.step)(w, optimizer.init(w), g)
                print(after[:, 0], len(caught), str(caught[0].message)[:41])
    """
    line = "[0.9 0.9 0.9] 1 the native core of adamax was not built"
    printed = run_python(program).split("\n")
    assert printed[0] == "0"
    assert all(each.startswith(line) for each in printed[1:])


def test_importing_compiles_nothing(run_python):
    program = "import sys, adamax.jax; print('numba' in sys.modules, 'flax' in sys.modules)"
    assert run_python(program) == "False False"


# --- optax --------------------------------------------------------------------------------


def test_a_chain_with_clipping_and_masks(rng):
    params, gradients = problem(rng)
    mask = {"table": True, "weights": False}
    masked = optax.chain(
        on_rows(optax.clip_by_global_norm(1.0)), optax.masked(adamax(0.1), mask)
    )
    updates, state = jax.jit(masked.update)(gradients, masked.init(params), params)
    assert state[1].inner_state[0].mu["weights"] == optax.MaskedNode()
    after = apply_updates(params, updates)
    assert (after["table"] != params["table"]).any()
    # What is masked is passed on as it is.
    clipped = params["weights"] + gradients["weights"]
    assert (abs(after["weights"] - params["weights"]) <= abs(clipped) + 1).all()


def test_partition(rng):
    params, gradients = problem(rng)
    labels = {"table": "ours", "weights": "theirs"}
    optimizer = optax.partition({"ours": adamax(0.1), "theirs": optax.sgd(0.1)}, labels)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    alone = adamax(0.1)
    expected, _ = take_step(alone, "update")(
        params["table"], alone.init(params["table"]), gradients["table"]
    )
    assert_close(after["table"], expected)
    assert_close(after["weights"], params["weights"] - 0.1 * gradients["weights"])


def test_hyperparameters_can_be_injected(rng):
    params, gradients = problem(rng)
    injected = optax.inject_hyperparams(adamax)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1
    )
    plain = adamax(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    states = [injected.init(params), plain.init(params)]
    both = [params, params]
    update = [jax.jit(injected.update), jax.jit(plain.update)]
    for _ in range(3):
        for i in range(2):
            updates, states[i] = update[i](gradients, states[i], both[i])
            both[i] = apply_updates(both[i], updates)
    assert_close(*both)
    assert update[0]._cache_size() == 1
    names = {"learning_rate", "b1", "b2", "eps", "weight_decay"}
    assert states[0].hyperparams.keys() == names
    states[0].hyperparams["learning_rate"] = jnp.float32(0.0)


def test_gradients_can_be_accumulated(rng):
    """Whole ones; those of rows have another structure, which optax refuses."""
    params = {"weights": problem(rng)[0]["weights"]}
    every = [{"weights": problem(rng)[1]["weights"]} for _ in range(4)]
    accumulated = optax.MultiSteps(adamax(0.1), every_k_schedule=2)
    state, actual = accumulated.init(params), params
    update = jax.jit(accumulated.update)
    for gradients in every:
        updates, state = update(gradients, state, actual)
        actual = optax.apply_updates(actual, updates)
    optimizer, expected = adamax(0.1), params
    of_expected = optimizer.init(params)
    for pair in (every[:2], every[2:]):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        expected, of_expected = take_step(optimizer, "update")(expected, of_expected, mean)
    assert_close(actual, expected)
    table, of_rows = ({"table": each["table"]} for each in problem(rng))
    accumulated = optax.MultiSteps(adamax(0.1), every_k_schedule=2)
    with pytest.raises(ValueError, match="IndexedSlices"):
        accumulated.update(of_rows, accumulated.init(table), table)


def test_gradients_of_rows_are_accumulated_by_joining_them(rng):
    table = jnp.asarray(values(rng, (20, 3), "float32"))
    one, two = (rows(rng, rng.integers(20, size=9), table) for _ in range(2))
    joined = jax.tree.map(
        operator.add, one, two, is_leaf=lambda node: isinstance(node, IndexedSlices)
    )
    np.testing.assert_allclose(table + joined, (table + one) + two, rtol=1e-5, atol=1e-5)


def test_apply_if_finite(rng):
    params, gradients = problem(rng)
    optimizer = optax.apply_if_finite(adamax(0.1), 5)
    state = optimizer.init(params)
    bad = {**gradients, "weights": gradients["weights"].at[0].set(jnp.nan)}
    updates, state = jax.jit(optimizer.update)(bad, state, params)
    jax.tree.map(assert_same_bits, apply_updates(params, updates), params)
    updates, state = jax.jit(optimizer.update)(gradients, state, params)
    assert int(state.inner_state[0].count) == 1


def test_a_schedule_counts_from_0(rng):
    params, gradients = problem(rng)
    optimizer = adamax(lambda count: jnp.where(count == 0, 0.0, 0.1))
    for path in PATHS:
        after, state = take_step(optimizer, path)(params, optimizer.init(params), gradients)
        jax.tree.map(assert_same_bits, after, params)
        after, state = take_step(optimizer, path)(after, state, gradients)
        assert (after["weights"] != params["weights"]).any()
        assert int(state[1].count) == 2


@pytest.mark.parametrize("as_function", [False, True])
@paths
def test_what_a_mask_leaves_out_does_not_decay(path, as_function):
    params = {"a": [jnp.ones(2), jnp.ones((2, 2))], "b": jnp.ones((3, 2))}
    mask = {"a": [False, True], "b": True}
    if as_function:
        mask = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    optimizer = adamax(0.1, weight_decay=0.5, mask=mask)
    gradients = jax.tree.map(jnp.zeros_like, params)
    after, _ = take_step(optimizer, path)(params, optimizer.init(params), gradients)
    np.testing.assert_array_equal(after["a"][0], 1)
    for decayed in (after["a"][1], after["b"]):
        np.testing.assert_allclose(decayed, 0.95, rtol=1e-6)


def test_a_mask_may_be_of_whole_branches():
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "b": jnp.ones(2)}
    optimizer = adamax(0.1, weight_decay=0.5, mask={"a": True, "b": False})
    gradients = jax.tree.map(jnp.zeros_like, params)
    for path in PATHS:
        after, _ = take_step(optimizer, path)(params, optimizer.init(params), gradients)
        np.testing.assert_allclose(after["a"]["y"], 0.95, rtol=1e-6)
        np.testing.assert_array_equal(after["b"], 1)


def test_scale_by_adamax_is_the_rule_without_the_rate(rng):
    params, gradients = problem(rng)
    optimizer, rule = adamax(0.1), scale_by_adamax()
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    scaled, of_rule = rule.update(gradients, rule.init(params), params)
    assert isinstance(of_rule, optax.ScaleByAdamState)
    np.testing.assert_allclose(updates["weights"], -0.1 * scaled["weights"], rtol=1e-6)
    assert_close(state[0], of_rule)


# --- Libraries ----------------------------------------------------------------------------


def test_checkpoints_of_orbax(rng, tmp_path):
    """Saved, loaded, and gone on with: bit for bit as if nothing had happened."""
    framework("orbax.checkpoint")
    import orbax.checkpoint as ocp

    params, gradients = problem(rng)
    optimizer = adamax(optax.linear_schedule(0.1, 0.0, 10))
    step = take_step(optimizer, "step")
    params, state = step(params, optimizer.init(params), gradients)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (params, state))
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: (params, optimizer.init(params)))
        loaded = checkpointer.restore(tmp_path / "saved", abstract)
        jax.tree.map(assert_same_bits, loaded, (params, state))
        # optax has the same structure.
        theirs = optax.adamax(optax.linear_schedule(0.1, 0.0, 10))
        abstract = jax.eval_shape(lambda: (params, theirs.init(params)))
        jax.tree.map(
            assert_same_bits, checkpointer.restore(tmp_path / "saved", abstract), loaded
        )
    jax.tree.map(assert_same_bits, step(*loaded, gradients), step(params, state, gradients))


def test_flax_nnx(rng):
    framework("flax")
    from flax import nnx

    class Words(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (50, 4)))
            self.linear = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, ids):
            return self.linear(lookup(self.table[...], ids).mean(axis=1))

    model = Words(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamax(0.05), wrt=nnx.Param)
    ids = jnp.asarray(rng.integers(40, size=(16, 3)))
    wanted = (ids[:, :1] % 2).astype(jnp.float32)

    @nnx.jit
    def train(model, optimizer):
        graph, params = nnx.split(model)

        def loss(params):
            return ((nnx.merge(graph, params)(ids) - wanted) ** 2).mean()

        value, gradients = value_and_sparse_grad(loss)(params)
        optimizer.update(model, gradients)
        return value

    before = model.table[...]
    losses = [float(train(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(model.table[...][40:], before[40:])
    assert (model.table[...][ids[0]] != before[ids[0]]).any()


def test_equinox(rng):
    framework("equinox")
    import equinox as eqx

    class Words(eqx.Module):
        table: jax.Array
        linear: eqx.nn.Linear

        def __call__(self, ids):
            return jax.vmap(self.linear)(lookup(self.table, ids).mean(axis=1))

    keys = jax.random.split(jax.random.key(0))
    linear = eqx.nn.Linear(4, 1, key=keys[1])
    model = Words(0.1 * jax.random.normal(keys[0], (50, 4)), linear)
    optimizer = adamax(0.05)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    ids = jnp.asarray(rng.integers(40, size=(16, 3)))
    wanted = (ids[:, :1] % 2).astype(jnp.float32)

    @eqx.filter_jit
    def train(model, state):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(params):
            return ((eqx.combine(params, static)(ids) - wanted) ** 2).mean()

        value, gradients = value_and_sparse_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return eqx.combine(apply_updates(params, updates), static), state, value

    before, losses = model.table, []
    for _ in range(60):
        model, state, loss = train(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(model.table[40:], before[40:])
