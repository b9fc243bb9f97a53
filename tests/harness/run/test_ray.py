"""Who gets which part of the machine."""

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from harness.errors import UserError
from harness.run.options import RunOptions, worker_environments
from harness.run.ray import run_on_ray
from harness.soak.run import soak_sweep


@pytest.mark.parametrize(
    ("workers", "names"), [(None, ["3", "GPU-a", "5"]), (2, ["3", "GPU-a"]), (9, ["3", "GPU-a", "5"])]
)
def test_each_worker_has_a_gpu_of_its_own(
    workers: int | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many workers as asked for, at most one a GPU, and only GPUs that this process was given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a,5")
    assert worker_environments("cuda", workers) == [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def test_workers_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker has all cores, more have equal parts, and never less than one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    shares = {workers: worker_environments("cpu", workers) for workers in (None, 3, 20)}
    assert {workers: [share["OMP_NUM_THREADS"] for share in own] for workers, own in shares.items()} == {
        None: ["8"],
        3: ["2"] * 3,
        20: ["1"] * 20,
    }


def test_a_machine_without_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed; pip install 'mocbench\\[ray\\]'"):
        run_on_ray(soak_sweep(1), RunOptions(results=tmp_path), Console(file=io.StringIO()), lambda: None)
