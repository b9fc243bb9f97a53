"""Grid expansion: a part of a sweep becomes points; a parameter assignment becomes one point."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from harness.points import Point
from harness.spec import AxisValue, Part, Range
from moc.config import get_preset
from moc.methods import get_method
from moc.selection import parse_selection

PRETRAIN_DEFAULTS: dict[str, AxisValue] = {"vocab_size": 32000, "eval_tokens": 262_144, "lr": 1e-3}


def expand(part: Part, data_ids: Mapping[int, str] | None = None) -> list[Point]:
    """All points of a grid part, in the order the axes are written, each once.

    Dense methods ignore `selection`, so they appear once per shape. `data_ids` maps a vocabulary size to
    the fingerprint of the tokenised text (`pretrain` only).
    """
    names = list(part.axes)
    choices = [axis for axis in part.axes.values() if not isinstance(axis, Range)]
    points: dict[str, Point] = {}
    for seed in part.seeds:
        for values in itertools.product(*choices):
            assignment = dict(zip(names, values, strict=True))
            if any(all(assignment[k] == v for k, v in rule.items()) for rule in part.exclude):
                continue
            point = make_point(part, assignment, seed, data_ids)
            points.setdefault(point.key, point)
    return list(points.values())


def make_point(
    part: Part, assignment: Mapping[str, AxisValue], seed: int, data_ids: Mapping[int, str] | None = None
) -> Point:
    """One point from values for every axis of the part; `fixed` fills the rest."""
    values: dict[str, Any] = {**part.fixed, **assignment}
    method = str(values["method"])
    takes_selection = get_method(method).takes_selection
    rule = values.get("selection")
    if rule is None and "k_frac" in values:
        rule = f"topk:{round(float(values['k_frac']), 4)}"
    selection = str(parse_selection(str(rule))) if takes_selection and rule is not None else None

    shape: dict[str, Any] = {"d_model": None, "d_ffn": None, "n_layers": None, "n_heads": None}
    if "preset" in values:
        config = get_preset(str(values["preset"]))
        shape = {name: getattr(config, name) for name in shape}
    shape.update({name: values[name] for name in shape if name in values})

    pretrain = part.workload == "pretrain"
    extra: dict[str, Any] = {}
    if pretrain:
        extra = {name: values.get(name, default) for name, default in PRETRAIN_DEFAULTS.items()}
        extra["lr"] = float(extra["lr"])
        extra["train_tokens"] = values["train_tokens"]
        extra["n_heads"] = shape["n_heads"]
        extra["data_id"] = (data_ids or {}).get(extra["vocab_size"])
    batch, seq_len = _batch_and_length(part, values)
    return Point(
        workload=part.workload,
        method=method,
        selection=selection,
        preset=str(values["preset"]) if "preset" in values else None,
        d_model=shape["d_model"],
        d_ffn=shape["d_ffn"],
        n_layers=shape["n_layers"] if pretrain else int(values.get("n_layers", 1)),
        batch=batch,
        seq_len=seq_len,
        dtype=str(values.get("dtype", "bf16")),
        seed=seed,
        timing_mode=str(values.get("timing_mode", "auto")),
        **extra,
    )


def vocab_sizes(part: Part) -> list[int]:
    """Vocabulary sizes a `pretrain` part needs tokenised text for; empty for other workloads."""
    if part.workload != "pretrain":
        return []
    axis = part.axes.get("vocab_size", [part.fixed.get("vocab_size", PRETRAIN_DEFAULTS["vocab_size"])])
    return [int(value) for value in axis] if isinstance(axis, list) else []


def _batch_and_length(part: Part, values: Mapping[str, Any]) -> tuple[int, int]:
    if part.workload == "ffn_decode":
        return int(values["batch"]), 1
    seq_len = int(values["seq_len"])
    if "batch" in values:
        return int(values["batch"]), seq_len
    tokens = int(values["tokens"])
    # A step of fewer tokens than one sequence is a step of one shorter sequence.
    return (tokens // seq_len, seq_len) if tokens >= seq_len else (1, tokens)
