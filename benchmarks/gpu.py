"""The GPU, if there is one."""

import subprocess
from typing import Any


def why_not() -> str | None:
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


def describe() -> dict[str, Any] | None:
    """The GPU, as JSON can hold it."""
    if why_not() is not None:
        return None
    import torch

    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        shown = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shown.stdout.strip()
