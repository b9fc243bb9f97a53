"""Shared by the kernel tests, which run on the GPU where there is one (marker `gpu`), else interpreted."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        on_cpu = item.path.name == "test_kernels_distributed.py"  # of processes that see no GPU
        if DEVICE == "cuda" and "tests/kernels" in item.path.as_posix() and not on_cpu:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20260101)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return DEVICE
