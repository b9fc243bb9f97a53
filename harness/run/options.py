"""What the command line decides about a run, how a run ended, and what each worker's processes get."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from harness.run.trial import TRIAL_COMMAND
from harness.store.rows import MEASURED

MEANWHILE_SECONDS = 2.0  # between two updates of the studies while workers run


@dataclass(frozen=True)
class RunOptions:
    """What the command line decides about a run; none of it changes what a point is."""

    results: Path = Path("results")
    device: str = "cpu"
    workers: int | None = None  # None: one per GPU, one on a CPU
    retry: str = "none"
    storage: str | None = None  # where rows and leases of several hosts meet; None: the results folder
    executor: str = "local"
    command: str = "mocbench run"
    trial_command: tuple[str, ...] = TRIAL_COMMAND


@dataclass
class Summary:
    """How a run ended."""

    folder: Path
    total: int = 0
    already_done: int = 0
    statuses: dict[str, int] = field(default_factory=dict)

    def count(self, status: str) -> None:
        """One point more of this run that ended so."""
        self.statuses[status] = self.statuses.get(status, 0) + 1

    @property
    def failed(self) -> int:
        """Points of this run without a measured value, apart from unsupported ones."""
        return sum(n for status, n in self.statuses.items() if status not in (*MEASURED, "unsupported"))


def worker_environments(device: str, workers: int | None) -> list[dict[str, str]]:
    """What each worker's children get: one GPU each, or an equal share of the CPU's cores."""
    if device != "cuda":
        count = workers or 1
        return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}] * count
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: workers or len(names)]]
