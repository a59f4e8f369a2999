"""Adamax side by side with its peers and with the memory limit: ``python -m benchmarks``.

A case is a row of a table (``cases_<front end>.py``): contestants, each with the work it
does, and bars that the results must clear. One harness runs them all. A case runs in a
process of its own, in which its contestants take turns, each on its own copy of the same
data. What each contestant computed is compared with float64, so that a fast wrong answer
shows.
"""
