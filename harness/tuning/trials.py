"""What the tunings of passes and of decoding share: how a variant is checked, timed and written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.measure.timing import TimingSettings, median_ms

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
SETTINGS = TimingSettings(rel_ci=0.005, max_seconds=1.0, max_rounds=60)

Row = dict[str, Any]
Candidate = TypeVar("Candidate")


def milliseconds(call: Callable[[], object], mode: str = "graph_cold", calls: int = 1) -> float:
    """Median time of one of `calls` units of work, by the timer of every measurement; `mode` as there."""
    return median_ms(call, DEVICE, SETTINGS, mode) / calls


def failure(error: Exception) -> str:
    """The end of an error as a row keeps it: that a variant does not compile or run is a result."""
    return f"{type(error).__name__}: {error}"[-400:]


def check_all(
    check: Callable[[Candidate], Row], candidates: Sequence[Candidate], processes: int
) -> dict[Candidate, Row]:
    """`check` of each candidate in parallel processes.

    A candidate that a broken neighbour in its process may have failed is checked again in a fresh process.
    """
    context, work = get_context("spawn"), partial(_checked, check)
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        found = dict(zip(candidates, pool.map(work, candidates), strict=True))
    again = [c for c in candidates if "CUDA error" in found[c].get("message", "")]
    if again:
        with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
            found |= dict(zip(again, pool.map(work, again), strict=True))
    return found


def _checked(check: Callable[[Candidate], Row], candidate: Candidate) -> Row:
    try:
        return check(candidate)
    except Exception as error:  # whatever a variant raises, see `failure`
        return {"error": math.inf, "message": failure(error)}


def compiled_to(kernel: Any) -> Row:
    """Registers and spills of what a kernel was compiled to last."""
    compiled = next(reversed(kernel.device_caches[torch.cuda.current_device()][0].values()))
    return {"registers": compiled.n_regs, "spills": compiled.n_spills}


def written(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """The rows, each written to the file, a line of JSON, as it comes."""
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            out.flush()
            yield row
