"""Importing what a test needs: frameworks, which may be missing, and examples."""

import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import pytest


def framework(name: str) -> ModuleType:
    """Import a framework; skip the test without it, or fail where it is required."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if os.environ.get("ADAMAX_REQUIRE_FRAMEWORKS") == "1":
                pytest.fail(f"{name} is required and cannot be imported: {error}")
            pytest.skip(f"{name} cannot be imported: {error}")


def load_example(path: Path) -> ModuleType:
    """An example as a module; those beside it can be imported meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
