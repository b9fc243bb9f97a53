"""Shared by the tests of `moc`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(20260101)


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what was compiled before: torch.compile limits the variants of one function in a process."""
    torch._dynamo.reset()
