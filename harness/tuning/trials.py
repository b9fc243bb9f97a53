"""What the tunings of passes and of decoding share: how a variant is checked, timed and written down."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
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
Variant = TypeVar("Variant")


def failure(error: Exception) -> str:
    """The end of an error as a row keeps it: that a variant does not compile or run is a result."""
    return f"{type(error).__name__}: {error}"[-400:]


def check_all(check: Callable[[Variant], Row], variants: Sequence[Variant]) -> dict[Variant, Row]:
    """`check` of each variant in parallel processes.

    A variant that a broken neighbour in its process may have failed is checked again in a fresh process.
    """
    context, work, processes = get_context("spawn"), partial(_checked, check), min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        found = dict(zip(variants, pool.map(work, variants), strict=True))
    again = [variant for variant in variants if "CUDA error" in found[variant].get("message", "")]
    if again:
        with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
            found |= dict(zip(again, pool.map(work, again), strict=True))
    return found


def _checked(check: Callable[[Variant], Row], variant: Variant) -> Row:
    try:
        return check(variant)
    except Exception as error:  # whatever a variant raises, see `failure`
        return {"error": math.inf, "message": failure(error)}


def compiled_to(kernel: Any) -> Row:
    """Registers and spills of what a kernel was compiled to last."""
    compiled = next(reversed(kernel.device_caches[torch.cuda.current_device()][0].values()))
    return {"registers": compiled.n_regs, "spills": compiled.n_spills}


def timed(call: Callable[[], object], mode: str = "graph_cold", calls: int = 1) -> Row:
    """Median milliseconds of one of `calls` units of work, or why it cannot run.

    By the timer of every measurement; `mode` as there.
    """
    try:
        return {"ms": median_ms(call, DEVICE, SETTINGS, mode) / calls}
    except Exception as error:  # whatever a variant raises, see `failure`
        return {"message": failure(error)}


def write_rows(rows: Iterable[Row], path: Path, report: Callable[[list[Row]], None]) -> None:
    """Write the rows to the file as they come, a line of JSON each, and report them at the end."""
    found = []
    try:
        with path.open("w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row) + "\n")
                out.flush()
                found.append(row)
    finally:
        report(found)


def print_groups(rows: Sequence[Row], keys: Sequence[str], shown: int = 5) -> None:
    """Print what is alike in `keys` together: today's tiling (the first), the fastest, and wrong ones.

    Rows without a tiling, which are compared with them, are all printed. Of a tiling that is not today's only
    what differs is named.
    """
    of = {id(row): tuple(row.get(key) for key in keys) for row in rows}
    for group_key in dict.fromkeys(of.values()):
        group = [row for row in rows if of[id(row)] == group_key]
        print("==", *(value for value in group_key if value is not None))
        today = next((row for row in group if "tiling" in row), {})
        fastest = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])[:shown]
        for row in group:
            if row is today or row in fastest or "ms" not in row or "tiling" not in row:
                tiling = row.get("tiling", {}).items()
                changed = {k: v for k, v in tiling if row is today or v != today["tiling"].get(k)}
                values = {k: v for k, v in row.items() if k not in (*keys, "tiling")}
                words = " ".join(f"{k} {_short(v)}" for k, v in (*values.items(), *changed.items()))
                print("TODAY" if row is today else "     ", words if "ms" in row else f"WRONG {words}")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(_short(part) for part in value.values())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
