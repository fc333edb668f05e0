"""Fixtures and helpers that several test files use."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

GOLDENS = Path(__file__).parent / "goldens"

torch.set_num_threads(1)  # more threads slow small models down on a busy machine
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("deterministic")
sys.dont_write_bytecode = True


@pytest.fixture(autouse=True)
def same_start():
    """Seed each test, so that its random numbers do not depend on the tests before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Keep tests away from the real Hub and from the user's cache."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent/hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def assert_close(actual, expected, tolerance=1e-5):
    """Check that two tensors are equal up to rounding. A failure prints the largest difference."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert difference <= tolerance, f"largest difference {difference:.2e} > {tolerance:.0e}"
