"""Steps of all kinds in the words of a program, for processes of their own."""

# Large enough for several threads. Without clipping by norm, whose sums the reference adds
# up in another order than the native core.
STEPS = """
import hashlib
import os
import signal
import numpy as np
import numpy.random  # else NumPy imports it later, and a fork may come in the midst of that
from adamax import Adamax, IndexedSlices, set_num_threads

def taken(seed, steps=4, dtypes=("float32", "float64", "float16"), step=None):
    rng = np.random.default_rng(seed)
    dense = [rng.normal(size=(301, 1003)).astype(dtype) for dtype in dtypes]
    tables = [rng.normal(size=(2000, 70)).astype(dtype) for dtype in dtypes]
    optimizer = Adamax(0.01, weight_decay=0.1, clipvalue=2.0)
    for _ in range(steps):
        pairs = [(rng.normal(size=w.shape).astype(w.dtype), w) for w in dense]
        for w in tables:
            indices = rng.integers(2000, size=3000)
            rows = rng.normal(size=(3000, 70)).astype(w.dtype)
            pairs.append((IndexedSlices(rows, indices), w))
        (step or optimizer.apply_gradients)(pairs)
    digest = hashlib.sha256()
    for array in (*dense, *tables, *optimizer.state_dict().values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

def trained(sparse, steps=60, dtype="float32"):
    "Steps that depend on their number alone, taken again where an interrupt came before."
    table = np.random.default_rng(3).normal(size=(2000, 70)).astype(dtype)
    w = np.ones((500, 1009), dtype)
    optimizer = Adamax(0.01, weight_decay=0.1, sparse=sparse)
    torn = [0]

    def take():
        rng = np.random.default_rng(optimizer.iterations)
        ids = rng.integers(2000, size=3000)
        values = rng.normal(size=(3000, 70)).astype(dtype)
        optimizer.lookup(table, ids)
        optimizer.apply_gradients([(w, w), (IndexedSlices(values, ids), table)])

    def result():
        optimizer.flush()
        digest = hashlib.sha256()
        for array in (table, w, *optimizer.state_dict().values()):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    return optimizer, table, take, result
"""

_program: dict = {}
exec(STEPS, _program)
taken = _program["taken"]
trained = _program["trained"]
