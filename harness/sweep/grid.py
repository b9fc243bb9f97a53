"""Grid expansion: a part of a sweep becomes points; a parameter assignment becomes one point, and back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from harness.sweep.catalog import FIELD, SHAPE_AXES, STEP_AXES, WORKLOADS, AxisValue
from harness.sweep.model import Part, Range
from harness.sweep.point import Point
from moc.config import get_preset
from moc.methods import get_method
from moc.selection import parse_selection


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
    shape: dict[str, Any] = {"d_model": None, "d_ffn": None, "n_layers": None, "n_heads": None}
    if "preset" in values:
        config = get_preset(str(values["preset"]))
        shape = {name: getattr(config, name) for name in shape}
    shape.update({name: values[name] for name in shape if name in values})

    rule = values.get("selection")
    if rule is None and "k_frac" in values:
        fraction = float(values["k_frac"])
        if isinstance(part.axes.get("k_frac"), Range):
            fraction = _whole_channels(fraction, shape["d_ffn"])
        rule = f"topk:{round(fraction, 6)}"
    selection = str(parse_selection(str(rule))) if takes_selection and rule is not None else None

    workload = WORKLOADS[part.workload]
    whole = workload.whole_model
    extra: dict[str, Any] = {
        name: FIELD[name].type(values.get(name, FIELD[name].default))  # type: ignore[arg-type]
        for name in workload.axes
        if name not in (*SHAPE_AXES, *STEP_AXES) and (name in values or FIELD[name].default is not None)
    }
    if whole:
        extra["n_heads"] = shape["n_heads"]
    if workload.reads_text:
        extra["data_id"] = (data_ids or {}).get(extra["vocab_size"])
    batch, seq_len = _batch_and_length(part, values)
    return Point(
        workload=part.workload,
        method=method,
        selection=selection,
        preset=str(values["preset"]) if "preset" in values else None,
        d_model=shape["d_model"],
        d_ffn=shape["d_ffn"],
        n_layers=shape["n_layers"] if whole else int(values.get("n_layers", 1)),
        batch=batch,
        seq_len=seq_len,
        seed=seed,
        **extra,
    )


def _whole_channels(fraction: float, d_ffn: int) -> float:
    """The four-digit fraction (more on wide layers) of the channels kept: 0.18734 of 704 is 132, so 0.1875.

    A sampler's continuous values are many names for few points; this gives each point one.
    """
    k = max(1, round(fraction * d_ffn))
    spellings = (round(k / d_ffn, digits) for digits in (4, 5, 6))
    return next((value for value in spellings if round(value * d_ffn) == k), fraction)


def baseline_of(part: Part, assignment: Mapping[str, AxisValue]) -> dict[str, AxisValue]:
    """The assignment of the dense point that a trial is compared with.

    Dense has no K, and speed and memory do not depend on the learning rate, so all trials of a shape share
    one baseline, at the middle of the range of learning rates.
    """
    assert part.optimize is not None
    shared: dict[str, AxisValue] = {**assignment, "method": part.optimize.baseline}
    axis = part.axes.get("lr")
    if isinstance(axis, Range):
        middle = math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
        shared["lr"] = float(f"{middle:.4g}")
    elif axis is not None:
        shared["lr"] = sorted(axis)[(len(axis) - 1) // 2]
    return shared


def point_of_row(part: Part, row: Mapping[str, Any]) -> Point | None:
    """The point that a row was measured for, or None if its key says it is another one.

    Rows carry every field of a point but the timing mode that was asked for, which the part knows.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Point):
        value = row[field.name]
        if hasattr(value, "item"):  # of numpy
            value = value.item()
        values[field.name] = None if isinstance(value, float) and math.isnan(value) else value
    axis = part.axes.get("timing_mode", [part.fixed.get("timing_mode", "auto")])
    for mode in axis if isinstance(axis, list) else ():
        point = Point(**{**values, "timing_mode": mode})
        if point.key == row["point_key"]:
            return point
    return None


def assignment_of(
    part: Part, point: Point, data_ids: Mapping[int, str] | None = None
) -> dict[str, AxisValue] | None:
    """The values of the axes that make a point, or None if the part's space does not hold it.

    The inverse of `make_point`, up to what the point does not say: the K or rule of a dense method, and
    which of the fractions that keep the same channels a sampler named.
    """
    given = {**point.to_dict(), "tokens": point.tokens}
    found: dict[str, AxisValue] = {}
    for name, axis in part.axes.items():
        if name == "k_frac":
            value: Any = None if point.rule is None else point.k_frac
        else:
            value = given.get(name)
        if isinstance(axis, Range):
            inside = min(max(axis.high if value is None else value, axis.low), axis.high)
            found[name] = int(inside) if FIELD[name].type is int else float(inside)
        elif value is None:
            found[name] = axis[0]
        else:
            match = [choice for choice in axis if _same(name, choice, value, point.d_ffn)]
            if not match:
                return None
            found[name] = match[0]
    made = make_point(part, found, point.seed, data_ids)
    same_rule = made.rule and point.rule and (made.rule.rule, made.k) == (point.rule.rule, point.k)
    if "k_frac" in part.axes and same_rule:
        made = dataclasses.replace(made, selection=point.selection)  # a K has many spellings
    return found if made.key == point.key else None


def _same(name: str, choice: AxisValue, value: Any, d_ffn: int) -> bool:
    if name == "selection":
        return str(parse_selection(str(choice))) == value
    if name == "k_frac":
        return parse_selection(f"topk:{choice}").k(d_ffn) == round(value * d_ffn)
    return bool(choice == value)


def vocab_sizes(part: Part) -> list[int]:
    """Vocabulary sizes a `pretrain` part needs tokenised text for; empty for other workloads."""
    if not WORKLOADS[part.workload].reads_text:
        return []
    axis = part.axes.get("vocab_size", [part.fixed.get("vocab_size", FIELD["vocab_size"].default)])
    return [int(value) for value in axis] if isinstance(axis, list) else []


def _batch_and_length(part: Part, values: Mapping[str, Any]) -> tuple[int, int]:
    workload = WORKLOADS[part.workload]
    if workload.decodes and not workload.whole_model:
        return int(values["batch"]), 1
    seq_len = int(values["seq_len"])
    if "batch" in values:
        return int(values["batch"]), seq_len
    tokens = int(values["tokens"])
    # A step of fewer tokens than one sequence is a step of one shorter sequence.
    return (tokens // seq_len, seq_len) if tokens >= seq_len else (1, tokens)
