"""Sweep files: YAML in, a validated model out; every mistake is one line that names file, field and value.

A sweep has one or more parts. A file with a single part writes its fields at the top level:

    version: 1
    name: k_ablation
    workload: ffn_train
    axes:
      preset: [60m, 130m]
      method: [dense, moc_reference]
      selection: ["topk:0.125", "topk:0.1875"]
    fixed: {tokens: 65536, seq_len: 256, dtype: bf16}

A file with several workloads lists them under `parts:`.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from harness.job import MeasureSettings
from harness.strict_yaml import load_yaml, short

MAX_FILE_BYTES = 256 * 1024
MAX_POINTS = 100_000

_SHAPE_AXES = ("preset", "d_model", "d_ffn", "n_layers", "n_heads")
_STEP_AXES = ("method", "selection", "k_frac", "batch", "seq_len", "tokens", "dtype")
_TRAINING_AXES = ("train_tokens", "eval_tokens", "vocab_size", "lr")
AXES: dict[str, tuple[str, ...]] = {
    "ffn_train": (*_SHAPE_AXES, *_STEP_AXES, "timing_mode"),
    "ffn_decode": (*_SHAPE_AXES, *_STEP_AXES, "timing_mode"),
    "generate": (*_SHAPE_AXES, *_STEP_AXES, "vocab_size", "timing_mode"),
    "pretrain": (*_SHAPE_AXES, *_STEP_AXES, *_TRAINING_AXES),
}
WHOLE_MODEL = ("pretrain", "generate")  # workloads of all layers, which need the model's depth and heads
INTEGER_AXES = frozenset(
    (*_SHAPE_AXES[1:], "batch", "seq_len", "tokens", "train_tokens", "eval_tokens", "vocab_size")
)
FLOAT_AXES = frozenset(("lr", "k_frac"))
DTYPES = ("bf16", "fp16", "fp32", "fp64")
TIMING_MODES = ("auto", "graph_cold", "launch_cold", "graph_hot")


class SpecError(ValueError):
    """A sweep file that cannot be run; the message is one line for people."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """A continuous or integer axis of an optimisation: `{low: 0.05, high: 0.5, log: false}`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


def _scalar(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a name or a number")
    return value


AxisValue = str | int | float
_Scalar = Annotated[Any, pydantic.AfterValidator(_scalar)]
Axis = Annotated[
    Annotated[list[_Scalar], Field(min_length=1), pydantic.Tag("list")]
    | Annotated[Range, pydantic.Tag("range")],
    pydantic.Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "list"),
]


class Timing(_Model):
    rel_ci: float = Field(0.01, gt=0, lt=1)
    max_seconds: float = Field(20.0, gt=0)


class Measure(_Model):
    timing: Timing = Timing()
    memory: bool = True
    gate: bool = True
    checkpoint_seconds: float | None = Field(None, gt=0)
    union: bool = False

    def settings(self) -> MeasureSettings:
        """The flat form a job carries."""
        return MeasureSettings(
            rel_ci=self.timing.rel_ci,
            max_seconds=self.timing.max_seconds,
            memory=self.memory,
            gate=self.gate,
            checkpoint_seconds=self.checkpoint_seconds,
            union=self.union,
        )


class Limits(_Model):
    trial_seconds: float = Field(1800.0, gt=0)
    memory_bytes: float | None = Field(None, gt=0)
    retries: int = Field(1, ge=0, le=10)


class Objective(_Model):
    metric: str
    direction: Literal["maximize", "minimize"]


class Optimize(_Model):
    """A search in place of a grid.

    `constraints` are limits: at most for a metric where less is better, at least where more is. `seed` is
    the sampler's; the seeds of the measurements are the part's own, the same for every trial, and an
    objective is the mean over them. `baseline` is the dense method each trial is compared with.
    """

    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    n_trials: int = Field(30, ge=1, le=MAX_POINTS)
    objectives: list[Objective] = Field(min_length=1)
    constraints: dict[str, Annotated[float, Field(gt=0)]] = {}
    pruner: Literal["none", "median", "hyperband"] = "none"
    baseline: str = "dense"
    seed: int = 0


class Part(_Model):
    """One workload over one set of axes."""

    name: str = ""
    workload: Literal["ffn_train", "ffn_decode", "generate", "pretrain"]
    mode: Literal["grid", "optimize"] = "grid"
    axes: dict[str, Axis]
    fixed: dict[str, _Scalar] = {}
    exclude: list[dict[str, _Scalar]] = []
    measure: Measure = Measure()
    seeds: list[int] = Field([0], min_length=1)
    limits: Limits = Limits()
    optimize: Optimize | None = None


class Sweep(_Model):
    """A whole sweep file. `name` is also the folder under results/."""

    version: Literal[1]
    name: str
    description: str = ""
    data: str = "stdlib"
    parts: list[Part] = Field(min_length=1)


def load_sweep(path: Path) -> Sweep:
    """Read and validate a sweep file.

    Raises SpecError with one line per mistake, each naming the file, the path inside it, the value and
    what would be valid.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise SpecError(f"{path}: {len(raw)} bytes; a sweep file is at most {MAX_FILE_BYTES}")
    return parse_sweep(raw.decode("utf-8", errors="replace"), str(path))


def parse_sweep(text: str, source: str, *, import_methods: bool = True) -> Sweep:
    """Validate the text of a sweep file; `source` names it in messages. Raises SpecError.

    A method given as `package.module:factory` is imported. Not so with `import_methods` False, for a sweep
    that nobody named but that lies in a results folder: then a method that is not imported yet is refused.
    """
    try:
        values = load_yaml(text)
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{source}: a sweep is a mapping with version, name, workload and axes")
    if "parts" not in values:
        whole = {key: values.pop(key) for key in ("version", "name", "description", "data") if key in values}
        values = {**whole, "parts": [values]}
        prefix: tuple[Any, ...] = ("parts", 0)
    else:
        prefix = ()
    try:
        sweep = Sweep.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_explain(source, prefix, item) for item in error.errors()]
        raise SpecError("\n".join(dict.fromkeys(lines))) from error
    if not import_methods:
        _refuse_imports(source, sweep)
    _check_sweep(source, prefix, sweep)
    return sweep


def _refuse_imports(source: str, sweep: Sweep) -> None:
    for part in sweep.parts:
        axis = part.axes.get("method", [part.fixed.get("method", "")])
        for name in axis if isinstance(axis, list) else []:
            module, colon, _ = str(name).partition(":")
            if colon and module not in sys.modules:
                raise SpecError(f"{source}: method {short(name)} is not imported; name the sweep file itself")


def sweep_text(sweep: Sweep) -> str:
    """The sweep as YAML that `load_sweep` reads back, with what was left out spelled as its default."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


def near_miss(name: str, valid: Iterable[str]) -> str:
    """`; did you mean X?` if something valid is close, else `; valid: ...`."""
    options = list(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(options)}"


def _place(prefix: tuple[Any, ...], location: tuple[Any, ...]) -> str:
    parts = location[len(prefix) :] if prefix and location[: len(prefix)] == prefix else location
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not str(part).startswith(("list", "range", "str", "int", "float", "function-")):
            text += f".{part}" if text else str(part)
    return text


def _explain(source: str, prefix: tuple[Any, ...], item: Any) -> str:
    location = tuple(item["loc"])
    place = _place(prefix, location)
    kind = item["type"]
    value = item.get("input")
    if kind == "extra_forbidden":
        owner = _place(prefix, location[:-1])
        return f"{source}: {place} is not a field{near_miss(location[-1], _fields_at(owner))}"
    if kind == "missing":
        return f"{source}: {place} is missing; a sweep needs it"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", item["ctx"]["expected"]) or [item["ctx"]["expected"]]
        return f"{source}: {place} is {value!r}{near_miss(value, valid)}"
    if kind == "list_type" and location[-1] == "list":
        return (
            f"{source}: {place} is {short(value)}; it should be a list, such as [{value}],"
            " or {low: ..., high: ...} in an optimisation"
        )
    if kind == "too_short":
        return (
            f"{source}: {place} is {short(value)}; it should have at least {item['ctx']['min_length']} item"
        )
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{source}: {place} is {short(value)}; it should be {message}"


def _fields_at(owner: str) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "measure": Measure, "timing": Timing, "limits": Limits, "optimize": Optimize, "objectives": Objective,
    }  # fmt: skip
    last = re.sub(r"\[\d+\]", "", owner).rpartition(".")[2]
    if last in models:
        return list(models[last].model_fields)
    if last == "parts":
        return list(Part.model_fields)
    if last:
        return list(Range.model_fields)
    return sorted({*Sweep.model_fields, *Part.model_fields} - {"parts"})


# What may stand in a path: no separator, and no leading dot, so no `..` either.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _check_sweep(source: str, prefix: tuple[Any, ...], sweep: Sweep) -> None:
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


def part_name(part: Part) -> str:
    """The part's name, its workload if it has none."""
    return part.name or part.workload


def _check_part(where: str, part: Part) -> None:
    from harness.spec_optimize import check_search

    valid = AXES[part.workload]
    for section, names in (("axes", list(part.axes)), ("fixed", list(part.fixed))):
        for name in names:
            if name not in valid:
                raise SpecError(
                    f"{where}{section}.{name} is not an axis of {part.workload}{near_miss(name, valid)}"
                )
    for name in set(part.axes) & set(part.fixed):
        raise SpecError(f"{where}fixed.{name} is also an axis; keep one of the two")
    for index, rule in enumerate(part.exclude):
        for name in rule:
            if name not in part.axes:
                raise SpecError(
                    f"{where}exclude[{index}].{name} is not an axis of this part{near_miss(name, part.axes)}"
                )
    given: dict[str, Axis] = {**part.axes, **{name: [value] for name, value in part.fixed.items()}}
    for name, axis in given.items():
        place = f"{where}{'axes' if name in part.axes else 'fixed'}.{name}"
        if isinstance(axis, Range):
            _check_range(place, name, axis, part)
        else:
            for value in axis:
                _check_value(place, name, value)
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


def _check_range(place: str, name: str, axis: Range, part: Part) -> None:
    if part.mode != "optimize":
        raise SpecError(f"{place} is a range; a grid needs a list (ranges are for mode: optimize)")
    if name not in INTEGER_AXES | FLOAT_AXES:
        raise SpecError(f"{place} is a range, but {name} takes names; list them")
    if not all(math.isfinite(bound) for bound in (axis.low, axis.high, axis.step or 1)):
        raise SpecError(f"{place} is not finite; a range has a lowest, a highest value and a step")
    if not axis.low < axis.high:
        raise SpecError(f"{place}.low is {axis.low}; it must be below high, {axis.high}")
    if axis.low <= 0:
        raise SpecError(f"{place}.low is {axis.low}; it must be above 0")
    if name == "k_frac" and axis.high > 1:
        raise SpecError(f"{place}.high is {axis.high}; a fraction of the channels is at most 1")
    if axis.step is not None and axis.log:
        raise SpecError(f"{place} has log and step; Optuna takes one of the two")
    if axis.step is not None and axis.step <= 0:
        raise SpecError(f"{place}.step is {axis.step}; it must be above 0")
    if name in INTEGER_AXES:
        for bound, value in (("low", axis.low), ("high", axis.high), ("step", axis.step or 1)):
            if value != int(value):
                raise SpecError(f"{place}.{bound} is {value}; {name} is a whole number")


def _check_value(place: str, name: str, value: AxisValue) -> None:
    from moc.config import PRESETS
    from moc.methods import get_method
    from moc.selection import parse_selection

    if name in INTEGER_AXES:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{place} has {short(value)}; it should be a whole number of at least 1")
    elif name in FLOAT_AXES:
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SpecError(f"{place} has {short(value)}; it should be a finite number above 0")
        if name == "k_frac" and value > 1:
            raise SpecError(f"{place} has {short(value)}; a fraction of the channels is at most 1")
    elif name == "preset":
        if value not in PRESETS:
            raise SpecError(f"{place} has {short(value)}{near_miss(str(value), PRESETS)}")
    elif name == "dtype":
        if value not in DTYPES:
            raise SpecError(f"{place} has {short(value)}{near_miss(str(value), DTYPES)}")
    elif name == "timing_mode":
        if value not in TIMING_MODES:
            raise SpecError(f"{place} has {short(value)}{near_miss(str(value), TIMING_MODES)}")
    elif name == "selection":
        try:
            parse_selection(str(value))
        except ValueError as error:
            raise SpecError(f"{place} has {short(value)}: {error}") from error
    elif name == "method":
        try:
            get_method(str(value))
        except (ValueError, ImportError, AttributeError) as error:
            raise SpecError(f"{place} has {short(value)}: {error}") from error


def _check_complete(where: str, part: Part, given: set[str]) -> None:
    from moc.methods import get_method

    if "method" not in given:
        raise SpecError(f"{where}axes.method is missing; list at least one method")
    if "preset" not in given and not {"d_model", "d_ffn"} <= given:
        raise SpecError(f"{where}axes.preset is missing; give preset, or d_model and d_ffn")
    if part.workload in WHOLE_MODEL and "preset" not in given and not {"n_layers", "n_heads"} <= given:
        raise SpecError(
            f"{where}axes.preset is missing; {part.workload} without a preset needs n_layers and n_heads"
        )
    size = given & {"batch", "seq_len", "tokens"}
    if part.workload == "ffn_decode":
        if "batch" not in given or size - {"batch"}:
            raise SpecError(f"{where}axes.batch is what ffn_decode needs, and neither seq_len nor tokens")
    elif "seq_len" not in given or len(size) != 2:
        raise SpecError(f"{where}axes needs seq_len and one of batch or tokens; it has {sorted(size)}")
    if part.workload == "pretrain" and "train_tokens" not in given:
        raise SpecError(f"{where}fixed.train_tokens is missing; pretrain needs its token budget")
    if {"selection", "k_frac"} <= given:
        raise SpecError(f"{where}axes.k_frac and axes.selection exclude each other; k_frac means topk")
    methods = part.axes.get("method", [part.fixed.get("method", "")])
    if isinstance(methods, list) and not {"selection", "k_frac"} & given:
        for name in methods:
            if get_method(str(name)).takes_selection:
                raise SpecError(f"{where}axes.selection is missing; the method {name} needs one")
