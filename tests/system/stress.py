"""Random inputs and events for as long as one likes: ``make stress``.

Each part draws cases by a seed and counts what it has done; a case that fails says its
seed, with which ``--part`` and ``--seed`` repeat it. ``tests/system/test_stress.py`` runs a
second of each.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from safetensors.numpy import load_file, save_file

import oracle
from adamax import Adamax, IndexedSlices
from exact_cases import EPSILON, Dense


def killed_saves(seed: int) -> None:
    """A process is killed while it saves: the file is whole, and nothing is left over."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        w, optimizer = np.ones(50_000), Adamax()
        optimizer.apply_gradients([(np.ones(50_000), w)])
        optimizer.save(path)
        program = (
            "import sys, numpy as np; from adamax import Adamax\n"
            "w, optimizer = np.ones(50_000), Adamax()\n"
            "optimizer.load(sys.argv[1], [w]); print(1, flush=True)\n"
            "while True:\n"
            "    optimizer.apply_gradients([(w, w)]); optimizer.save(sys.argv[1])\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program, path], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.read(1)
        time.sleep(rng.random() * 0.05)
        child.kill()
        child.wait()
        child.stdout.close()
        optimizer.load(path)
        assert optimizer.iterations >= 1
        optimizer.save(path)
        assert list(Path(folder).iterdir()) == [path]


def mutated_checkpoints(seed: int) -> None:
    """A file with wrong bytes, or wrong entries, loads wholly or is refused wholly."""
    rng = np.random.default_rng(seed)
    table, w = np.ones((20, 3), np.float32), np.ones(())
    optimizer = Adamax()
    optimizer.build({"table": table, "w": w})
    ids = rng.integers(20, size=5)
    optimizer.apply_gradients([(IndexedSlices(np.ones((5, 3)), ids), table), (2.0, w)])
    before = {name: np.array(entry) for name, entry in optimizer.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        optimizer.save(path)
        content = bytearray(path.read_bytes())
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(rng.integers(1, 9)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            if rng.random() < 0.3:
                damaged = damaged[: rng.integers(len(damaged))]
            path.write_bytes(damaged)
            _load_or_refuse(optimizer, lambda: optimizer.load(path), before)
        path.write_bytes(content)
        entries = load_file(path)
        for _ in range(40):
            wrong = {name: _mutated(rng, entry) for name, entry in entries.items()}
            if rng.random() < 0.2:
                wrong.pop(rng.choice(list(wrong)))
            save_file(wrong, path, metadata={"format": "adamax", "version": "1"})
            _load_or_refuse(optimizer, lambda: optimizer.load(path), before)


def _mutated(rng: np.random.Generator, entry: np.ndarray) -> np.ndarray:
    kind = rng.integers(8)
    if kind == 0:
        return entry.astype(rng.choice(["float16", "int8", "float64", "int64"]))
    if kind == 1:
        return np.ascontiguousarray(entry.T[..., None])
    if kind == 2:
        return np.full(entry.shape, -1, entry.dtype)
    return entry


def _load_or_refuse(
    optimizer: Adamax, load: Callable[[], None], before: dict[str, np.ndarray]
) -> None:
    try:
        load()
    except (ValueError, TypeError, OSError):
        after = optimizer.state_dict()
        for name, entry in before.items():
            np.testing.assert_array_equal(after[name], entry)
    optimizer.load_state_dict(before)


def threads_with_optimizers(seed: int) -> None:
    """16 threads with optimizers of their own, each held to the float64 oracle."""
    errors: list[BaseException] = []

    def train(number: int) -> None:
        try:
            rng = np.random.default_rng([seed, number])
            shape = (int(rng.integers(1, 400)), int(rng.integers(1, 300)))
            w = rng.normal(size=shape)
            rule = oracle.Rule(learning_rate=0.01, weight_decay=0.1, clipnorm=3.0)
            [state] = [oracle.State.of(w)]
            optimizer = Adamax(0.01, weight_decay=0.1, clipnorm=3.0)
            for step in range(20):
                g = rng.normal(size=shape)
                optimizer.apply_gradients([(g, w)])
                [state] = oracle.step(rule, [state], [g], step)
            np.testing.assert_allclose(w, state.w, rtol=1e-9, atol=1e-11)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def forks(seed: int) -> None:
    """Forks while threads step; children step too."""
    context, stop = multiprocessing.get_context("fork"), threading.Event()

    def stepping() -> None:
        w, optimizer = np.ones(300_000, np.float32), Adamax()
        while not stop.is_set():
            optimizer.apply_gradients([(w.copy(), w)])

    def child() -> None:
        signal.alarm(60)
        w, optimizer = np.ones(300_000, np.float32), Adamax()
        for _ in range(3):
            optimizer.apply_gradients([(np.ones_like(w), w)])
        os._exit(7 if np.allclose(w, 1 - 3 * 0.001) else 1)

    threads = [threading.Thread(target=stepping) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(random.Random(seed).random() * 0.02)
        process = context.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 7, process.exitcode
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def interleavings(seed: int) -> None:
    """All that one may do in exact mode, in any order, against the dense rule."""
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(2, 60)), int(rng.integers(1, 5))
    betas = [(0.9, 0.999), (0.8, 0.99), (0.95, 0.9995), (0.0, 0.5)]
    beta_1, beta_2 = betas[rng.integers(4)]
    table = rng.normal(size=(rows, width))
    optimizer = Adamax(
        0.01,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=EPSILON,
        weight_decay=float(rng.choice([0.0, 0.1])),
        sparse="exact",
    )
    optimizer.build([table])
    expected = Dense(table.copy(), beta_1, beta_2, optimizer.weight_decay)
    for _ in range(int(rng.integers(1, 120))):
        action = rng.integers(12)
        if action < 7:
            ids = rng.integers(rows, size=int(rng.integers(0, 6)))
            g = rng.normal(size=(len(ids), width)) * 10.0 ** rng.integers(-6, 3)
            optimizer.learning_rate = float(rng.choice([0.0, 0.001, 0.1]))
            read = optimizer.lookup(table, ids)
            np.testing.assert_allclose(read, expected.w[ids], rtol=1e-9, atol=1e-11)
            optimizer.apply_gradients([(IndexedSlices(g, ids), table)])
            whole = np.zeros((rows, width))
            np.add.at(whole, ids, g)
            expected.step(whole, optimizer.learning_rate)
        elif action == 7:
            optimizer.flush()
            g = rng.normal(size=(rows, width))
            optimizer.apply_gradients([(g, table)])
            expected.step(g, optimizer.learning_rate)
        elif action == 8:
            optimizer.lookup(table, rng.integers(rows, size=3))
        elif action == 9:
            state = {n: np.array(e) for n, e in optimizer.state_dict().items()}
            other = Adamax.from_config(optimizer.get_config())
            other.load_state_dict(state, [table])
            optimizer = other
        elif action == 10 and beta_1:
            optimizer.flush()
            beta_1, beta_2 = betas[rng.integers(3)]
            optimizer.beta_1, optimizer.beta_2 = beta_1, beta_2
            expected.beta_1, expected.beta_2 = beta_1, beta_2
        elif action == 11 and beta_1:
            optimizer.beta_1 = expected.beta_1 = beta_1 = float(rng.uniform(0.7, 0.95))
            optimizer.beta_2 = expected.beta_2 = beta_2 = 0.999
    optimizer.flush()
    scale = max(1.0, float(np.abs(expected.w).max()))
    assert np.abs(table - expected.w).max() <= 1e-10 * scale


def soak(seed: int) -> None:
    """2,000 steps at a time; memory is flat, by the part as a whole."""
    rng = np.random.default_rng(seed)
    table, w = np.ones((500, 16), np.float32), np.ones(100)
    optimizer = Adamax(sparse="exact" if seed % 2 else "lazy")
    for _ in range(2000):
        ids = rng.integers(500, size=10)
        optimizer.lookup(table, ids)
        g = rng.normal(size=(10, 16))
        optimizer.apply_gradients([(IndexedSlices(g, ids), table), (np.ones(100), w)])
    assert np.isfinite(table).all()


PARTS: dict[str, Callable[[int], None]] = {
    "killed-saves": killed_saves,
    "mutated-checkpoints": mutated_checkpoints,
    "threads": threads_with_optimizers,
    "forks": forks,
    "interleavings": interleavings,
    "soak": soak,
}


def resident() -> float:
    """Memory of this process in MiB, or NaN where it cannot be asked for."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    seconds = 60 * options.minutes / len(parts)
    for name in parts:
        PARTS[name](options.seed)  # warms up
        before, end, done = resident(), time.monotonic() + seconds, 1
        with tqdm(desc=name, unit=" cases", disable=None) as bar:
            while time.monotonic() < end:
                seed = options.seed + done
                try:
                    PARTS[name](seed)
                except BaseException:
                    print(f"failed: --part {name} --seed {seed}", file=sys.stderr)
                    raise
                done += 1
                bar.update()
        grown = resident() - before
        print(f"{name}: {done} cases, {grown:+.0f} MiB")
        if grown > 100:
            print(f"failed: {name} keeps memory", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
