"""What it costs to look at a sweep: neither PyTorch nor pandas."""

import subprocess
import sys

import pytest

SWEEP = "load, check, model, catalog, point, grid, metrics, support, strict_yaml"


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        (f"from harness.sweep import {SWEEP}", ("torch", "pandas", "optuna")),
        ("import harness.cli", ("torch", "pandas", "optuna", "pydantic")),
        ("import harness.run.runner, harness.report.build", ("torch",)),
    ],
    ids=["sweep", "cli", "runner_and_report"],
)
def test_light_modules_load_no_heavy_library(statement: str, without: tuple[str, ...]) -> None:
    """Modules that only read sweeps and rows start without the libraries that measuring needs."""
    code = f"import sys; {statement}; print(*(name for name in {without} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
