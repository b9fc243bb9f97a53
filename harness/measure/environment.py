"""What the numbers were measured on and with: a record per machine and software state, joined by `env_id`."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from harness.measure.clocks import open_nvml

CPU_PREFIX = "CPU: "  # of a device_name that is no GPU's
_ROOT = Path(__file__).resolve().parents[2]


def environment_record(device: str) -> dict[str, Any]:
    """The environment of measurements on `device` ("cpu" or "cuda"), as JSON values; unknown is None.

    `env_id` is a hash of all the rest, so equal environments share it and any change shows. Host names, user
    names and paths are not part of it, and the GPU's serial identity only as a hash.
    """
    import torch

    record: dict[str, Any] = {
        "device": device,
        "device_name": device_name(device),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "numpy": installed_version("numpy"),
        "scipy": installed_version("scipy"),
        "cpu_model": _cpu_model(),
        "cpu_cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        **_git(),
        **(_gpu() if device == "cuda" else {}),
    }
    return {**record, "env_id": _digest(record)}


def device_name(device: str) -> str:
    """What a row calls the device: the GPU's own name, or `CPU: <model>, <n> cores`."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{CPU_PREFIX}{_cpu_model() or platform.machine()}, {_cores()} cores"


def gpu_identity() -> str:
    """A hash that tells this GPU from another of the same name."""
    import torch

    return _digest(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvml = open_nvml()
    driver = nvml.nvmlSystemGetDriverVersion() if nvml is not None else None
    return {
        "gpu_id": gpu_identity(),
        "gpu_memory_bytes": properties.total_memory,
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_l2_bytes": properties.L2_cache_size,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _git() -> dict[str, Any]:
    """Revision of the code and whether tracked files differ from it; None outside a checkout.

    Untracked files and results do not make it dirty: they do not change what is measured. A copy of the code
    without its history (a container image) may say what it is in MOCBENCH_REVISION.
    """
    revision = _run_git("rev-parse", "HEAD")
    if revision is None:
        return {"git_revision": os.environ.get("MOCBENCH_REVISION"), "git_dirty": None}
    changes = _run_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"git_revision": revision, "git_dirty": None if changes is None else bool(changes)}


def _run_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    for line in lines:
        if line.lower().startswith(("model name", "cpu part")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _cores() -> int:
    """Cores this process may use, which in a container is not what the machine has."""
    process = psutil.Process()  # macOS knows no affinity
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
