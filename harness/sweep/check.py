"""Checks of a sweep beyond the types of its fields; every mistake is one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from harness.errors import SpecError, near_miss, short
from harness.sweep.catalog import FIELD, MIN_STEPS, PRUNABLE, WORKLOADS, AxisValue
from harness.sweep.metrics import METRICS
from harness.sweep.model import MAX_POINTS, Axis, Optimize, Part, Range, Sweep, part_name
from moc.config import PRESETS
from moc.methods import METHODS, get_method
from moc.selection import parse_selection

# What may stand in a path: no separator, and no leading dot, so no `..` either.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_sweep(source: str, prefix: tuple[Any, ...], sweep: Sweep) -> None:
    """Raise SpecError for a sweep that cannot be run; `source` names the file, `prefix` the only part."""
    if not _NAME.fullmatch(sweep.name):
        raise SpecError(
            f"{source}: name is {short(sweep.name)}; it names a folder under results/: letters, digits,"
            " _ . - only"
        )
    names = [part_name(part) for part in sweep.parts]
    for index, part in enumerate(sweep.parts):
        where = f"{source}: " if prefix else f"{source}: parts[{index}]."
        if not _NAME.fullmatch(names[index]):
            raise SpecError(f"{where}name is {short(part.name)}; it names files: letters, digits, _ . - only")
        if names.count(names[index]) > 1:
            raise SpecError(f"{where}name {names[index]!r} stands twice; give each part its own name")
        _check_part(where, part)


def _check_part(where: str, part: Part) -> None:
    if part.workload not in WORKLOADS:
        raise SpecError(f"{where}workload is {part.workload!r}{near_miss(part.workload, WORKLOADS)}")
    valid = WORKLOADS[part.workload].axes
    for section, name in (*(("axes", name) for name in part.axes), *(("fixed", name) for name in part.fixed)):
        if name not in valid:
            raise SpecError(
                f"{where}{section}.{name} is not an axis of {part.workload}{near_miss(name, valid)}"
            )
    for name in set(part.axes) & set(part.fixed):
        raise SpecError(f"{where}fixed.{name} is also an axis; keep one of the two")
    for index, rule in enumerate(part.exclude):
        for name in sorted(rule.keys() - part.axes.keys()):
            hint = near_miss(name, part.axes)
            raise SpecError(f"{where}exclude[{index}].{name} is not an axis of this part{hint}")
    given: dict[str, Axis] = {**part.axes, **{name: [value] for name, value in part.fixed.items()}}
    for name, axis in given.items():
        path = f"{where}{'axes' if name in part.axes else 'fixed'}.{name}"
        if isinstance(axis, Range):
            _check_range(path, name, axis, part)
        else:
            for value in axis:
                _check_value(path, name, value)
    _check_complete(where, part, set(given))
    sizes = [len(axis) for axis in part.axes.values() if isinstance(axis, list)]
    if part.mode == "grid" and (count := math.prod([*sizes, len(part.seeds)])) > MAX_POINTS:
        raise SpecError(f"{where}axes span {count:.3g} points; a part has at most {MAX_POINTS}")
    if part.mode == "optimize":
        if part.optimize is None:
            raise SpecError(f"{where}optimize is missing; mode: optimize needs objectives and n_trials")
        check_search(where, part, part.optimize)
    elif part.optimize is not None:
        raise SpecError(f"{where}optimize is given but mode is grid; say mode: optimize")


def _check_range(path: str, name: str, axis: Range, part: Part) -> None:
    if part.mode != "optimize":
        raise SpecError(f"{path} is a range; a grid needs a list (ranges are for mode: optimize)")
    if FIELD[name].type is str:
        raise SpecError(f"{path} is a range, but {name} takes names; list them")
    if not all(math.isfinite(bound) for bound in (axis.low, axis.high, axis.step or 1)):
        raise SpecError(f"{path} is not finite; a range has a lowest, a highest value and a step")
    if not axis.low < axis.high:
        raise SpecError(f"{path}.low is {axis.low}; it must be below high, {axis.high}")
    if axis.low <= 0:
        raise SpecError(f"{path}.low is {axis.low}; it must be above 0")
    if name == "k_frac" and axis.high > 1:
        raise SpecError(f"{path}.high is {axis.high}; a fraction of the channels is at most 1")
    if axis.step is not None and axis.log:
        raise SpecError(f"{path} has log and step; Optuna takes one of the two")
    if axis.step is not None and axis.step <= 0:
        raise SpecError(f"{path}.step is {axis.step}; it must be above 0")
    if FIELD[name].type is int:
        for bound, value in (("low", axis.low), ("high", axis.high), ("step", axis.step or 1)):
            if value != int(value):
                raise SpecError(f"{path}.{bound} is {value}; {name} is a whole number")


def _check_value(path: str, name: str, value: AxisValue) -> None:
    field = FIELD[name]
    if field.type is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{path} has {short(value)}; it should be a whole number of at least 1")
    elif field.type is float:
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SpecError(f"{path} has {short(value)}; it should be a finite number above 0")
        if name == "k_frac" and value > 1:
            raise SpecError(f"{path} has {short(value)}; a fraction of the channels is at most 1")
    elif name == "preset":
        if value not in PRESETS:
            raise SpecError(f"{path} has {short(value)}{near_miss(str(value), PRESETS)}")
    elif field.choices:
        if value not in field.choices:
            raise SpecError(f"{path} has {short(value)}{near_miss(str(value), field.choices)}")
    elif name == "selection":
        try:
            parse_selection(str(value))
        except ValueError as error:
            raise SpecError(f"{path} has {short(value)}: {error}") from error
    elif name == "method":
        try:
            get_method(str(value))
        except (ValueError, ImportError, AttributeError) as error:
            raise SpecError(f"{path} has {short(value)}: {error}") from error


def _check_complete(where: str, part: Part, given: set[str]) -> None:
    if "method" not in given:
        raise SpecError(f"{where}axes.method is missing; list at least one method")
    if "preset" not in given and not {"d_model", "d_ffn"} <= given:
        raise SpecError(f"{where}axes.preset is missing; give preset, or d_model and d_ffn")
    workload = WORKLOADS[part.workload]
    if workload.whole_model and "preset" not in given and not {"n_layers", "n_heads"} <= given:
        needs = f"{part.workload} without a preset needs n_layers and n_heads"
        raise SpecError(f"{where}axes.preset is missing; {needs}")
    size = given & {"batch", "seq_len", "tokens"}
    if workload.decodes and not workload.whole_model:
        if size != {"batch"}:
            raise SpecError(
                f"{where}axes.batch is what {workload.name} needs, and neither seq_len nor tokens"
            )
    elif "seq_len" not in given or len(size) != 2:
        raise SpecError(f"{where}axes needs seq_len and one of batch or tokens; it has {sorted(size)}")
    for name in workload.required:
        if name not in given:
            raise SpecError(f"{where}fixed.{name} is missing; {workload.name} needs it")
    if {"selection", "k_frac"} <= given:
        raise SpecError(f"{where}axes.k_frac and axes.selection exclude each other; k_frac means topk")
    methods = part.axes.get("method", [part.fixed.get("method", "")])
    if isinstance(methods, list) and not {"selection", "k_frac"} & given:
        for name in methods:
            if get_method(str(name)).takes_selection:
                raise SpecError(f"{where}axes.selection is missing; the method {name} needs one")


def check_search(where: str, part: Part, search: Optimize) -> None:
    """Raise SpecError, its line beginning with `where`, for a search that cannot be run."""
    for index, objective in enumerate(search.objectives):
        path = f"{where}optimize.objectives[{index}].metric"
        if objective.metric not in METRICS:
            raise SpecError(f"{path} is {objective.metric!r}{near_miss(objective.metric, METRICS)}")
        if objective.metric in [other.metric for other in search.objectives[:index]]:
            raise SpecError(f"{path} is {objective.metric!r} a second time; name each objective once")
    for name in search.constraints:
        if name not in METRICS:
            raise SpecError(f"{where}optimize.constraints.{name} is not a metric{near_miss(name, METRICS)}")
    if part.exclude:
        raise SpecError(f"{where}exclude is for grids; narrow the axes of an optimisation instead")
    if not any(isinstance(axis, Range) or len(set(axis)) > 1 for axis in part.axes.values()):
        raise SpecError(f"{where}axes hold one value each; an optimisation needs something to vary")
    if len(set(part.seeds)) < len(part.seeds):
        raise SpecError(f"{where}seeds has a seed twice; give each once")
    _check_baseline(where, search)
    _check_pruner(where, part, search)
    if WORKLOADS[part.workload].reads_text:
        _check_steps(where, part)


def _check_baseline(where: str, search: Optimize) -> None:
    dense = [name for name, method in METHODS.items() if method.is_dense]
    if search.baseline not in dense:
        hint = near_miss(search.baseline, dense)
        raise SpecError(f"{where}optimize.baseline is {search.baseline!r}, not a dense method{hint}")


def _check_pruner(where: str, part: Part, search: Optimize) -> None:
    if search.pruner == "none":
        return
    path = f"{where}optimize.pruner is {search.pruner!r}"
    count, metric = len(search.objectives), search.objectives[0].metric
    if count > 1:
        raise SpecError(f"{path} with {count} objectives; only a study with one objective can prune")
    if not WORKLOADS[part.workload].reads_text or metric not in PRUNABLE:
        raise SpecError(
            f"{path}, but {metric} of {part.workload} is known only at the end;"
            f" pretrain with one of {', '.join(PRUNABLE)} can prune"
        )


def _check_steps(where: str, part: Part) -> None:
    """Every corner of the space must leave a training its least number of steps."""
    per_step = _bound(part, "tokens", max) or _bound(part, "batch", max) * _bound(part, "seq_len", max)
    budget = _bound(part, "train_tokens", min)
    if budget < MIN_STEPS * per_step:
        raise SpecError(
            f"{where}axes reach {per_step:,} tokens a step, but train_tokens {budget:,} is less than the"
            f" {MIN_STEPS} steps a training needs; lower batch or seq_len, or raise train_tokens"
        )


def _bound(part: Part, name: str, choose: Callable[[Iterable[float]], float]) -> int:
    """The largest or smallest value that an axis or fixed field can take; 0 if it has none."""
    axis = part.axes.get(name, [part.fixed[name]] if name in part.fixed else [0])
    values = [axis.low, axis.high] if isinstance(axis, Range) else [float(value) for value in axis]
    return int(choose(values))
