"""The machine and the versions that results belong to; None for what is not known."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("adamax", "numpy", "torch", "triton", "tensorflow", "keras", "tf_keras"),
    *("jax", "jaxlib", "optax"),
)


def describe() -> dict[str, Any]:
    """The machine, in types of JSON."""
    cpu = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in _lines("/proc/cpuinfo"))
    }
    name = cpu.get("model name") or platform.processor() or None
    model = " (family {cpu family}, model {model})".format_map(cpu) if cpu else ""
    huge_pages = _lines("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": name and name + model,
        "cores": os.cpu_count(),
        "memory_bytes": _memory("MemTotal"),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "transparent_huge_pages": huge_pages[0].split("[")[1].split("]")[0]
        if huge_pages
        else None,
        "gpu": _gpu(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, of the package and its source, and of all peers that are installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # The commit of the checkout, with a plus if the source was changed.
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--", "../src"])
    return {**found, "commit": commit and commit + ("+" if changes else "")}


def available_memory() -> int | None:
    """How many bytes can be allocated without swapping."""
    return _memory("MemAvailable")


def why_no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None if it can."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return "torch finds no CUDA GPU"


def _gpu() -> dict[str, Any] | None:
    if why_no_gpu() is not None:
        return None
    import torch

    about = torch.cuda.get_device_properties(0)
    query = ["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "driver": _output(["nvidia-smi", *query]),
        "cuda": torch.version.cuda,
    }


def _memory(name: str) -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
