"""What `mocbench doctor` says: the machine, its measured ceilings, and whether its measurements can be
trusted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harness.measure.environment import environment_record
from harness.measure.roofline import ensure_ceilings
from harness.measure.selftest import SelfTestRow, dense_training_step, run_self_test
from harness.measure.stats import Verdict
from harness.measure.timing import PairedTimes
from harness.regression.compare.verdict import RULES, judge_rounds
from harness.workloads.profiler_check import ProfilerCheck, check_against_profiler
from moc.config import get_preset

# What the self-test repeats: one dense FFN training step, in the dtype people train in on that device.
_SELF_TEST: dict[str, tuple[str, int, str]] = {"cuda": ("350m", 16384, "bf16"), "cpu": ("1m", 256, "fp32")}
_CHECKED_PRESETS = ("1b", "7b")  # decode shapes the profiler check looks at
PROFILER_TOLERANCE = 0.05


def examine(
    console: Console, device: str, *, trials: int = 0, profiler: bool = False, output: Path | None = None
) -> bool:
    """Print tables about the device ("cpu" or "cuda") and return whether every check passed.

    Ceilings are measured once per device and PyTorch version and then read from the cache. With `trials`, a
    method is compared with itself, and with itself slowed down by 1, 3 and 5 %, that often each. With
    `profiler`, decoding times of dense by CUDA graph are compared with the profiler's kernel times. All that
    is printed is also written to `output` as JSON, if given. Raises ValueError for `profiler` without CUDA.
    """
    record: dict[str, Any] = {"environment": environment_record(device)}
    _print_pairs(console, "environment", record["environment"])
    ceilings = ensure_ceilings(torch.device(device))
    record["ceilings"] = dataclasses.asdict(ceilings)
    rates = {f"GEMM {name}": f"{rate / 1e12:,.1f} TFLOP/s" for name, rate in ceilings.gemm_flop_per_s.items()}
    _print_pairs(
        console, "measured ceilings", {"copy": f"{ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s", **rates}
    )
    good = True
    if trials:
        rows = _self_test(device, trials)
        record["self_test"] = [dataclasses.asdict(row) for row in rows]
        console.print(_self_test_table(rows, device))
    if profiler:
        checks = {
            name: check_against_profiler(get_preset(name).ffn, 1, "bf16", torch.device(device))
            for name in _CHECKED_PRESETS
        }
        record["profiler_check"] = {name: dataclasses.asdict(check) for name, check in checks.items()}
        console.print(_profiler_table(checks))
        good = all(abs(check.difference) <= PROFILER_TOLERANCE for check in checks.values())
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return good


def _self_test(device: str, trials: int) -> list[SelfTestRow]:
    """The self-test of the judge of `mocbench compare`, with its rule for the device."""
    preset, tokens, dtype = _SELF_TEST[device]
    call = dense_training_step(torch.device(device), preset, tokens, dtype)
    rule = RULES[device]

    def verdict_of_compare(take: Callable[[int], PairedTimes], seed: int) -> Verdict:
        return judge_rounds(take, rule, seed=seed)[0]

    return run_self_test(call, torch.device(device), rule.timing(seed=0), trials, verdict_of_compare)


def _self_test_table(rows: list[SelfTestRow], device: str) -> Table:
    preset, tokens, dtype = _SELF_TEST[device]
    table = Table(
        "injected",
        "trials",
        "SAME",
        "SLOW",
        "FAST",
        "AMBG",
        "at the cap",
        "median ratio",
        "rounds",
        title=f"a dense training step against itself ({preset}, {tokens:,} tokens, {dtype})",
    )
    for row in rows:
        counts = (row.trials, row.same, row.slow, row.fast, row.ambiguous, row.capped)
        table.add_row(
            f"{100 * row.injected:g} %",
            *map(str, counts),
            f"{row.median_ratio:.4f}",
            f"{row.median_rounds:g}",
        )
    return table


def _profiler_table(checks: dict[str, ProfilerCheck]) -> Table:
    table = Table(
        "shape",
        "graph us",
        "profiler us",
        "difference",
        "of it in kernels",
        "kernels",
        title="decoding, dense, batch 1",
    )
    for name, check in checks.items():
        table.add_row(
            name,
            f"{check.graph_us:.2f}",
            f"{check.span_us:.2f}",
            f"{100 * check.difference:+.1f} %",
            f"{check.busy_us:.2f} us",
            f"{check.kernels:g}",
        )
    return table


def _print_pairs(console: Console, title: str, values: dict[str, Any]) -> None:
    table = Table("what", "value", title=title)
    for name, value in values.items():
        table.add_row(name, "unknown" if value is None else str(value))
    console.print(table)
