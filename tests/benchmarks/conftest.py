"""What a file of `make bench` says about the machine: the project's own record, by which runs compare."""

from typing import Any

import pytest
import torch

from harness.measure.environment import environment_record
from harness.regression.compare.stored import RECORD


@pytest.hookimpl(optionalhook=True)  # the other tests run without the plugin
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """A hook of pytest-benchmark."""
    machine_info[RECORD] = environment_record("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["node"] = ""  # the host's name is nobody's business
