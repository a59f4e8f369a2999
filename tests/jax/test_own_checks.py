"""optax's own checks of its Adamax, on ours.

They ship with optax. They run in a process of their own, where our functions take the
places of optax's before the checks are imported, with eight devices, which some of them
need.
"""

import jax_cases  # noqa: F401  (skips without jax)

# What of a check tells that it is about Adamax: its name, or its parameters.
PROGRAM = """
    import sys, types, unittest

    class Unused:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    try:
        import sklearn
    except ImportError:  # for checks of other optimizers
        sys.modules["sklearn"] = types.ModuleType("sklearn")
        sys.modules["sklearn"].datasets = sys.modules["sklearn"].linear_model = Unused()

    import jax
    import optax
    from optax._src import alias, transform
    from adamax.jax import adamax, scale_by_adamax

    def adamaxw(learning_rate, weight_decay=1e-4):
        return adamax(learning_rate, weight_decay=weight_decay)

    for module in (optax, alias):
        module.adamax, module.adamaxw = adamax, adamaxw
    optax.scale_by_adamax = transform.scale_by_adamax = scale_by_adamax

    jax.__version__ = "9"  # some are skipped if it is less, as a string, than 0.7.2
    from optax._src import alias_test, sharding_test, transform_test

    def checks(suite):
        for each in suite:
            if isinstance(each, unittest.TestSuite):
                yield from checks(each)
            elif "adamax" in each.id() + (each.shortDescription() or ""):
                yield each

    chosen = unittest.TestSuite()
    for module in (alias_test, sharding_test, transform_test):
        chosen.addTests(checks(unittest.defaultTestLoader.loadTestsFromModule(module)))
    result = unittest.TextTestRunner(verbosity=2).run(chosen)
    for check, reason in result.skipped:
        print(check.id(), reason)
    print(result.testsRun, len(result.failures), len(result.errors), len(result.skipped))
"""


def test_the_checks_of_optax_pass(run_python):
    eight = "--xla_force_host_platform_device_count=8"
    printed = run_python(PROGRAM, PYTHONWARNINGS="ignore", XLA_FLAGS=eight)
    ran, failed, broken, skipped = map(int, printed.split("\n")[-1].split())
    assert (failed, broken, skipped) == (0, 0, 0), printed
    # In optax 0.2.8: 30 of the aliases, 8 of shardings, one of the transformation, and more
    # may come.
    assert ran >= 39
