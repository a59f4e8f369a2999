"""The machine and the versions that results belong to."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import gpu

_PACKAGES = (
    "adamax",
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "triton",
    "tensorflow",
    "keras",
    "tf_keras",
    "jax",
    "jaxlib",
    "optax",
)


def describe() -> dict[str, Any]:
    """The machine, as JSON can hold it; None for what cannot be found out."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "transparent_huge_pages": _transparent_huge_pages(),
        "gpu": gpu.describe(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, of the package and its source, and of all peers that are installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    return found


def available_memory() -> int | None:
    """What can be allocated without swapping; None where it is not known."""
    return _field("/proc/meminfo", "MemAvailable", 1024)


def _memory() -> int | None:
    return _field("/proc/meminfo", "MemTotal", 1024) or _sysctl_number("hw.memsize")


def _cpu() -> str | None:
    lines = _lines("/proc/cpuinfo")
    about = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    about = {key.strip(): value for key, value in about.items()}
    if "model name" in about:
        numbers = (about.get(key, "?") for key in ("cpu family", "model"))
        return "{} (family {}, model {})".format(about["model name"], *numbers)
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def _transparent_huge_pages() -> str | None:
    for line in _lines("/sys/kernel/mm/transparent_hugepage/enabled"):
        return line[line.index("[") + 1 : line.index("]")]
    return None


def _commit() -> str | None:
    """The commit of the checkout this file lies in, with a plus if it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--", "../src"])
    return commit and commit + ("+" if changes else "")


def _sysctl(name: str) -> str | None:
    return _output(["sysctl", "-n", name]) if sys.platform == "darwin" else None


def _sysctl_number(name: str) -> int | None:
    number = _sysctl(name)
    return int(number) if number else None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, check=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _field(path: str, name: str, unit: int) -> int | None:
    for line in _lines(path):
        if line.startswith(f"{name}:"):
            return unit * int(line.split()[1])
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
