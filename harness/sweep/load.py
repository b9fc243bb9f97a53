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

import re
import sys
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel

from harness.errors import SpecError, near_miss, short
from harness.sweep.check import check_sweep
from harness.sweep.model import Limits, Measure, Objective, Optimize, Part, Range, Sweep, Timing
from harness.sweep.strict_yaml import load_yaml

MAX_FILE_BYTES = 256 * 1024


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
    prefix: tuple[Any, ...] = () if "parts" in values else ("parts", 0)
    if prefix:
        whole = {key: values.pop(key) for key in ("version", "name", "description", "data") if key in values}
        values = {**whole, "parts": [values]}
    try:
        sweep = Sweep.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_explain(source, prefix, item) for item in error.errors()]
        raise SpecError("\n".join(dict.fromkeys(lines))) from error
    if not import_methods:
        _refuse_imports(source, sweep)
    check_sweep(source, prefix, sweep)
    return sweep


def _refuse_imports(source: str, sweep: Sweep) -> None:
    for part in sweep.parts:
        axis = part.axes.get("method", [part.fixed.get("method", "")])
        for name in axis if isinstance(axis, list) else []:
            module, colon, _ = str(name).partition(":")
            if colon and module not in sys.modules:
                raise SpecError(f"{source}: method {short(name)} is not imported; name the sweep file itself")


def _path(prefix: tuple[Any, ...], location: tuple[Any, ...]) -> str:
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
    field, kind, value = _path(prefix, location), item["type"], item.get("input")
    if kind == "extra_forbidden":
        owner = _path(prefix, location[:-1])
        return f"{source}: {field} is not a field{near_miss(location[-1], _fields_at(owner))}"
    if kind == "missing":
        return f"{source}: {field} is missing; a sweep needs it"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", item["ctx"]["expected"]) or [item["ctx"]["expected"]]
        return f"{source}: {field} is {value!r}{near_miss(value, valid)}"
    if kind == "list_type" and location[-1] == "list":
        return (
            f"{source}: {field} is {short(value)}; it should be a list, such as [{value}],"
            " or {low: ..., high: ...} in an optimisation"
        )
    if kind == "too_short":
        least = item["ctx"]["min_length"]
        return f"{source}: {field} is {short(value)}; it should have at least {least} item"
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{source}: {field} is {short(value)}; it should be {message}"


def _fields_at(owner: str) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "measure": Measure,
        "timing": Timing,
        "limits": Limits,
        "parts": Part,
    }
    models |= {"optimize": Optimize, "objectives": Objective}
    last = re.sub(r"\[\d+\]", "", owner).rpartition(".")[2]
    if last:
        return list(models.get(last, Range).model_fields)
    return sorted({*Sweep.model_fields, *Part.model_fields} - {"parts"})
