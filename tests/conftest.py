"""What several test files need."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

GOLDENS = Path(__file__).parent / "goldens"

torch.set_num_threads(1)  # small models gain nothing from more, and lose much on a busy machine
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("deterministic")
sys.dont_write_bytecode = True


@pytest.fixture(autouse=True)
def same_start():
    """Each test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test asks the real Hub, nor reads the user's cache."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent/hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def assert_close(actual, expected, tolerance=1e-5):
    """Equal but for rounding; a failure tells the largest difference."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert difference <= tolerance, f"largest difference {difference:.2e} > {tolerance:.0e}"
