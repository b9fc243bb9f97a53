"""Two measurements that are on disk: the rows of two results folders, or two JSON files of `make bench`.

Nothing can be measured again here, so the two looks that SLOW needs are the two halves of the samples in the
order they were taken. Runs at different times are not paired either: a clock that was lower that day is in
the ratio. `mocbench compare` of two revisions is subject to neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from harness.errors import UserError
from harness.measure.stats import MIN_SAMPLES, Verdict, median
from harness.regression.compare.checkouts import Compared
from harness.regression.compare.sides import Side, refuse_other_machine
from harness.regression.compare.verdict import RULES, Change, Rule, judge, unpaired_speedup
from harness.store.files import read_environments
from harness.store.frames import read_rows, read_samples
from harness.store.rows import MEASURED
from harness.sweep.metrics import METRICS

RECORD = "mocbench"  # where `make bench` puts the environment record into pytest-benchmark's machine_info
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_TIMES = [name for name, metric in METRICS.items() if metric.unit in _MS]
_PLACE = ["device_name", "point_key"]


def compare_stored(base: Side, head: Side) -> tuple[list[Compared], dict[str, Any]]:
    """The outcomes of all points, and the environment both were measured in.

    Raises UserError if they were measured on different machines, or hold nothing that can be compared.
    """
    if base.kind == "benchmark":
        return _compare_benchmarks(base, head)
    return _compare_results(base, head)


def compare_samples(name: str, base: ArrayLike, head: ArrayLike, rule: Rule) -> Compared:
    """The outcome of one point from samples in milliseconds, each in the order they were taken."""
    first, second = np.asarray(base, dtype=np.float64), np.asarray(head, dtype=np.float64)
    change = Change.of(unpaired_speedup(first, second))
    verdict, note = judge(change, median(first), rule), ""
    looks: tuple[Verdict, ...] = (verdict,)
    if verdict == "SLOW":
        if min(first.size, second.size) < 2 * MIN_SAMPLES:
            note = f"slower, but too few samples to look twice: {2 * MIN_SAMPLES} are needed"
            verdict = "AMBG"
        else:
            halves = zip(np.array_split(first, 2), np.array_split(second, 2), strict=True)
            looks = tuple(judge(Change.of(unpaired_speedup(a, b)), median(a), rule) for a, b in halves)
            if set(looks) != {"SLOW"}:
                verdict = "AMBG"
                note = f"slower, but the halves of the samples say {looks[0]} and {looks[1]}"
    return Compared(
        name=name,
        verdict=verdict,
        note=note,
        change=change,
        base_ms=median(first),
        head_ms=median(second),
        rounds=min(first.size, second.size),
        looks=looks,
    )


def _compare_results(base: Side, head: Side) -> tuple[list[Compared], dict[str, Any]]:
    first, second = _Results(base.path), _Results(head.path)
    if not set(first.devices) & set(second.devices):
        devices = f"{', '.join(first.devices)} against {', '.join(second.devices)}"
        raise UserError(f"measured on different machines, which cannot be compared: {devices}")
    outcomes: list[Compared] = []
    environment: dict[str, Any] = {}
    for place, point in first.points.items():
        if place not in second.points:
            outcomes.append(Compared(_label(point), None, "only base has it"))
            continue
        other = second.points[place]
        environment = second.environment(other)
        refuse_other_machine(first.environment(point), environment)
        if other["status"] not in MEASURED:
            failed = point["status"] in MEASURED
            note = f"head: {other['status']}: {other['detail']}"
            outcomes.append(Compared(_label(point), None, note, failed=failed))
            continue
        rule = RULES["cuda" if environment["device"] == "cuda" else "cpu"]
        for metric in _TIMES:
            samples = first.samples(point, metric), second.samples(other, metric)
            if all(values.size for values in samples):
                outcomes.append(compare_samples(f"{_label(point)}: {metric}", *samples, rule))
    outcomes += [
        Compared(_label(point), None, "only head has it")
        for place, point in second.points.items()
        if place not in first.points
    ]
    if not environment:
        raise UserError(f"{base.name} and {head.name} have no point in common")
    return outcomes, environment


class _Results:
    """A results folder: its points by device and key, and what belongs to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        rows = read_rows(folder)
        if rows.empty:
            raise UserError(f"{folder}: holds no whole point")
        primary = rows.groupby(_PLACE, sort=False).tail(1)  # the primary metric is written last
        self.points = {(row["device_name"], row["point_key"]): row for _, row in primary.iterrows()}
        self.devices = sorted(set(rows["device_name"]))
        samples = read_samples(folder)
        samples = samples[samples["metric"].isin(_TIMES)].sort_values("x", kind="stable")
        self._samples = dict(list(samples.groupby(["run_id", "point_key", "metric"])["value"]))
        self._environments = read_environments(folder)

    def samples(self, point: pd.Series, metric: str) -> np.ndarray:
        """In milliseconds; none if there are none."""
        values = self._samples.get((point["run_id"], point["point_key"], metric))
        if values is None:
            return np.empty(0)
        return values.to_numpy(dtype=np.float64) * _MS[METRICS[metric].unit]

    def environment(self, point: pd.Series) -> dict[str, Any]:
        """Raises UserError if it is not kept."""
        if point["env_id"] not in self._environments:
            raise UserError(
                f"{self._folder}/environments.jsonl: has no {point['env_id']}, so nobody knows "
                "what machine it was"
            )
        record: dict[str, Any] = self._environments[point["env_id"]]
        return record


def _label(point: pd.Series) -> str:
    words = [
        point["workload"],
        point["preset"],
        f"seq {point['seq_len']}",
        point["method"],
        point["selection"],
    ]
    if point["seed"]:
        words.append(f"seed {point['seed']}")
    return " ".join(str(word) for word in words if isinstance(word, str))


def _compare_benchmarks(base: Side, head: Side) -> tuple[list[Compared], dict[str, Any]]:
    first, second = (_read_benchmarks(side.path) for side in (base, head))
    environment = second["machine_info"][RECORD]
    refuse_other_machine(first["machine_info"][RECORD], environment)
    rule = RULES[environment["device"]]
    known, other = (dict(_samples_ms(file)) for file in (first, second))
    outcomes = [
        compare_samples(name, known[name], other[name], rule)
        if name in other
        else Compared(name, None, "only base has it")
        for name in known
    ]
    outcomes += [Compared(name, None, "only head has it") for name in other if name not in known]
    return outcomes, environment


def _read_benchmarks(path: Path) -> dict[str, Any]:
    try:
        file: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = RECORD in file["machine_info"] and all("data" in b["stats"] for b in file["benchmarks"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of pytest-benchmark ({type(error).__name__}: {error})"
        ) from error
    if not known:
        raise UserError(f"{path}: was not written by `make bench`: samples or environment are missing")
    return file


def _samples_ms(file: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for benchmark in file["benchmarks"]:
        yield benchmark["extra_info"]["benchmark"], 1e3 * np.asarray(benchmark["stats"]["data"])
