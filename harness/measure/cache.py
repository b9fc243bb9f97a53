"""Where measured ceilings and tokenised text are kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`MOCBENCH_CACHE`, or `~/.cache/mocbench`."""
    return Path(os.environ.get("MOCBENCH_CACHE") or Path.home() / ".cache" / "mocbench")
