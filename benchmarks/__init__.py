"""``python -m benchmarks``: Adamax side by side with its peers and the speed of memory.

A case is a row of a table (``cases_<part>.py``): contestants, the work each of them does,
and bars, which are the limits that the results must reach. One harness runs all cases. A
case runs in a process of its own, and each contestant has its own copy of the same data.
What a contestant computed is compared with float64, so that a fast wrong answer shows.

Each case is measured in two ways. *Hot*: a contestant takes several steps in a row. *Cold*:
the contestants take turns step by step, so that caches and branch predictors hold what the
others left there. A training loop is like that, since the model runs between two steps.
"""
