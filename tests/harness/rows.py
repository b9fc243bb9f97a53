"""Rows as a trial would write them, for tests of what is downstream. Nothing here was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness.store.files import Store
from harness.store.frames import read_rows
from harness.store.rows import COLUMNS
from harness.sweep.catalog import WORKLOADS
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.job import Job
from harness.workloads.reporter import make_row
from moc.config import PRESETS

CPU = "CPU: Example, 2 cores"
GPU = "Example GPU 80GB"

SWEEP_FILE = """\
version: 1
name: made_up
data: files:/home/me/text/*.txt
workload: ffn_train
axes: {preset: [1m], method: [dense]}
fixed: {batch: 2, seq_len: 64, dtype: fp32}
"""

Value = float | tuple[float, float, float]


def train_point(method: str = "dense", selection: str | None = None, **changes: Any) -> Point:
    """A small ffn_train point."""
    values = {"preset": "1m", "d_model": 128, "d_ffn": 384, "n_layers": 1, "batch": 2, "seq_len": 64}
    return Point("ffn_train", method, selection, **{**values, "dtype": "fp32", "seed": 0, **changes})


def rows_of(
    point: Point,
    values: Mapping[str, Value | None],
    status: str = "ok",
    run_id: str = "r1",
    device: str = "D",
    detail: str = "because",
    **columns: Any,
) -> list[dict[str, Any]]:
    """One finished point's rows: a row per metric, or the single row of a failure.

    A metric is a value or (value, ci_low, ci_high). `columns` replace those of every row.
    """
    job = Job("t", run_id, 1, (point,), Measure(), "cpu", "work")
    primary = WORKLOADS[point.workload].primary_metric
    if status not in ("ok", "unstable"):
        row = make_row(job, point, primary, status, detail, device_name=device, env_id="e")
        return [{**row, **columns}]
    rows = []
    for metric, value in values.items():
        its_status = status if metric == primary else "ok"
        row = make_row(job, point, metric, its_status, "", device_name=device, env_id="e")
        numbers = value if isinstance(value, tuple) else (value, None, None)
        row |= {**dict(zip(("value", "ci_low", "ci_high"), numbers, strict=True)), "n_samples": 3}
        rows.append({**row, **columns})
    return rows


def point(
    method: str,
    selection: str | None = None,
    metrics: dict[str, Value] | None = None,
    *,
    workload: str = "pretrain",
    preset: str | None = "60m",
    seq_len: int = 256,
    tokens: int = 4096,
    seed: int = 0,
    device: str = GPU,
    status: str = "ok",
    detail: str = "",
    train_tokens: int = 40_000_000,
    vocab_size: int = 32000,
    run_id: str = "run",
    **columns: Any,
) -> list[dict[str, Any]]:
    """All rows of one point of a preset, with the fields that its workload uses, by `rows_of`."""
    config, whole = PRESETS[str(preset)], workload == "pretrain"
    training = {"train_tokens": train_tokens, "vocab_size": vocab_size, "lr": 1e-3, "data_id": "abc"}
    made = Point(
        workload,
        method,
        selection,
        preset,
        config.d_model,
        config.d_ffn,
        config.n_layers if whole else 1,
        tokens // seq_len,
        seq_len,
        "fp32" if device == CPU else "bf16",
        seed,
        "auto" if whole else "launch_cold",
        **(training if whole else {}),
    )
    primary = WORKLOADS[workload].primary_metric
    values: dict[str, Value | None] = {**(metrics or {})}
    values[primary] = values.pop(primary, None)
    started = "2026-11-24T08:00:00+00:00"
    named = {"sweep": "made_up", "env_id": f"env-{device}", "started_at": started, **columns}
    return rows_of(made, values, status, run_id, device, detail, **named)


def around(value: float, share: float) -> tuple[float, float, float]:
    """A value with an interval of plus and minus a share of it."""
    return value, value * (1 - share), value * (1 + share)


def quality(loss: float, half: float | None = 0.02, untrained: float = 10.4) -> dict[str, Value]:
    """The quality metrics of a trained model with this validation loss."""
    loss_row: Value = loss if half is None else (loss, loss - half, loss + half)
    ends = (math.exp(loss), math.exp(loss - (half or 0)), math.exp(loss + (half or 0)))
    return {
        "eval_loss_nats": loss_row,
        "perplexity": ends[0] if half is None else ends,
        "bits_per_byte": loss / math.log(2) / 4.2,
        "untrained_loss_nats": untrained,
        "untrained_perplexity": math.exp(untrained),
    }


def frame(*points: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of points as a data frame, as `harness.store.frames.read_rows` would give them."""
    return pd.DataFrame([row for rows in points for row in rows], columns=list(COLUMNS))


def quick_rows(seeds: int = 1) -> pd.DataFrame:
    """The shape of the sweep of a machine without a GPU: two sizes, two lengths, three K and 2:8."""
    rules = {None: 0.0, "topk:0.125": 0.021, "topk:0.1875": 0.008, "topk:0.25": 0.003, "nm:2:8": 0.012}
    speed = {None: 1.0, "topk:0.125": 0.74, "topk:0.1875": 0.71, "topk:0.25": 0.69, "nm:2:8": 0.66}
    memory = {None: 1.0, "topk:0.125": 0.78, "topk:0.1875": 0.80, "topk:0.25": 0.83, "nm:2:8": 0.81}
    points = []
    for seed in range(seeds):
        for preset, loss, rate, peak, parameters in (
            ("1m", 5.31, 5200, 310e6, 1.9e6),
            ("4m", 4.97, 2300, 720e6, 5.4e6),
        ):
            for seq_len, slower in ((128, 1.0), (512, 0.86)):
                for rule, worse in rules.items():
                    wobble = 0.004 * math.sin(7 * seed + len(rule or "") + seq_len)
                    metrics = {
                        "tokens_per_s": around(rate * slower * speed[rule] * (1 + wobble), 0.015),
                        "peak_rss_over_start_bytes": peak * memory[rule] * (1 + wobble),
                        "saved_activation_bytes_per_token": 8064.0 * (0.4 if rule else 1),
                        "parameters": parameters,
                        "train_tokens_seen": 400_000.0,
                        **quality(loss + worse * (preset == "4m") + wobble, 0.012, 8.33),
                    }
                    name = "moc_reference" if rule else "dense"
                    options = {"preset": preset, "seq_len": seq_len, "seed": seed, "device": CPU}
                    points.append(
                        point(name, rule, metrics, train_tokens=400_000, vocab_size=4096, **options)
                    )
    return frame(*points)


def gpu_rows() -> pd.DataFrame:
    """The shape of the first sweep on a GPU: 60m at two lengths, and one FFN layer at two shapes."""
    series = [
        ("dense", None, 465e3, 41.7e9, 4.501),
        ("dense_compiled", None, 1227e3, 25.0e9, 4.502),
        ("moc_reference", "topk:0.1875", 402e3, 30.1e9, 4.492),
        ("moc_reference", "nm:2:8", 380e3, 31.0e9, 4.456),
        ("moc_reference", "nm:12:64", 371e3, 30.3e9, 4.460),
    ]
    points = []
    for seq_len, slower in ((256, 1.0), (1024, 0.93)):
        for method, rule, rate, peak, loss in series:
            metrics = {
                "tokens_per_s": around(rate * slower, 0.004),
                "peak_allocated_bytes": peak,
                "parameters": 58.1e6,
                "train_tokens_seen": 40e6,
                "compile_s": 21.0 if method == "dense_compiled" else 0.1,
                **quality(loss - 0.05 * (seq_len > 256), 0.018),
            }
            points.append(point(method, rule, metrics, seq_len=seq_len, tokens=65536))
    times = {
        "dense": (2.30, 6.2),
        "dense_compiled": (1.97, 5.76),
        "dense_recompute": (2.93, 7.65),
        "dense_gu": (2.41, 6.5),
        "topk:0.1875": (5.1, 9.8),
        "nm:2:8": (5.9, 11.2),
        "nm:12:64": (6.1, 11.9),
    }
    for at, (preset, tokens) in enumerate((("60m", 65536), ("1b", 16384))):
        config = PRESETS[preset]
        kept = {"dense": 4.0, "dense_compiled": 4.0, "dense_recompute": 0.0, "dense_gu": 2.0}
        for name, both in times.items():
            method, rule = (name, None) if name.startswith("dense") else ("moc_reference", name)
            ratio = times["dense_compiled"][at] / both[at]
            share = kept.get(name, 2 * 0.1875 if name != "nm:2:8" else 0.5)
            step = around(both[at], 0.008)
            metrics = {
                "step_ms": step,
                "forward_ms": both[at] / 3,
                "backward_ms": both[at] * 2 / 3,
                "speedup_vs_best_dense": 1.0 if name == "dense_compiled" else around(ratio, 0.006),
                "saved_activation_bytes_per_token": 2 * (config.d_model + share * config.d_ffn),
                "peak_allocated_bytes": 1.2e9 + 2 * tokens * share * config.d_ffn,
                "max_rel_err": 0.004,
            }
            points.append(point(method, rule, metrics, workload="ffn_train", preset=preset, tokens=tokens))
    return frame(*points)


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Validation-loss curves that end where the rows say, one sample per sixteenth of the training."""
    lines = []
    known = rows[rows["metric"] == "eval_loss_nats"]
    for row in known.to_dict("records"):
        for step in range(17):
            gone = step / 16
            wobble = 0.006 * math.sin(0.7 * step + len(str(row["selection"])))
            loss = row["value"] + (10.4 - row["value"]) * math.exp(-6 * gone) + wobble * (0 < step < 16)
            lines.append(
                (row["run_id"], row["point_key"], "eval_loss_nats", gone * row["train_tokens"], loss)
            )
    return pd.DataFrame(lines, columns=["run_id", "point_key", "metric", "x", "value"])


def write_results(folder: Path, rows: pd.DataFrame, samples: pd.DataFrame | None = None) -> Path:
    """A results folder with these rows, their environments, a sweep file and a command."""
    store = Store(folder)
    for (_, key), group in rows.groupby(["device_name", "point_key"], sort=False):
        plain = json.loads(group.to_json(orient="records"))
        whole = [
            {**row, **{n: int(row[n]) for n in ("attempt", "seed") if row[n] is not None}} for row in plain
        ]
        names = ["run_id", "point_key", "metric"]
        behind = [] if samples is None else samples[samples["point_key"] == key].groupby(names, sort=False)
        store.append(
            whole,
            [
                {**dict(zip(names, name, strict=True)), "x": list(part["x"]), "value": list(part["value"])}
                for name, part in behind
            ],
        )
    for device in rows["device_name"].unique():
        store.append_environment(
            {
                "env_id": f"env-{device}",
                "device_name": device,
                "torch": "2.11.0",
                "python": "3.12.3",
                "gpu": None,
            }
        )
    (folder / "sweep.yaml").write_text(SWEEP_FILE)
    (folder / "command.txt").write_text(
        "mocbench run sweeps/made_up.yaml --data 'files:/home/me/text/*.txt'\n"
    )
    assert len(read_rows(folder)) == len(rows)
    return folder
