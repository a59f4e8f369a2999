"""The device of the tests that need an NVIDIA GPU: ``pytest -m cuda``."""

import os

import pytest

from torch_cases import torch

DEVICE = "cuda"


@pytest.fixture(scope="module")
def gpu():
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU"
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "Triton is to compile"
