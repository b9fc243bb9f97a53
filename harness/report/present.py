"""Tables for people: the numbers of `harness.report.points` with units, sensible digits and plain column
names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pandas as pd

from harness.report import wording
from harness.report.summary import failures
from harness.sweep.catalog import FIELDS

# A column that is the same on every line of a table says nothing and is left out, except these.
_ALWAYS = ("seq_len",)
_IN_MODEL = ("workload", "preset", "d_model", "d_ffn", "n_layers", "n_heads")  # the model says these
_DETAIL_CHARACTERS = 200

_Cell = Callable[[pd.Series], str]


def _keys(table: pd.DataFrame) -> dict[str, _Cell]:
    """Columns that say which point a line is, leaving out those that never change."""
    columns: dict[str, _Cell] = {"model": lambda line: wording.cell_label(line)}
    for field in (field for field in FIELDS if field.in_cell and field.name not in _IN_MODEL):
        if field.name in _ALWAYS or table[field.name].nunique(dropna=False) > 1:
            columns[field.heading] = partial(wording.field_value, field)
    columns |= {"method": _text("method"), "selection": _text("selection")}
    columns["K %"] = lambda line: wording.DASH if math.isnan(line["k_pct"]) else f"{line['k_pct']:.4g}"
    if "seeds" in table and table["seeds"].nunique() > 1:
        columns["seeds"] = _value("seeds", _whole)
    return columns


def _build(table: pd.DataFrame, columns: dict[str, _Cell]) -> pd.DataFrame:
    lines = [[form(line) for form in columns.values()] for _, line in table.iterrows()]
    built = pd.DataFrame(lines, columns=list(columns))
    empty = [name for name in built if (built[name].isin(["", wording.DASH])).all() and name != "selection"]
    return built.drop(columns=empty)


def _text(name: str) -> _Cell:
    return lambda line: str(line[name] or wording.DASH)


def _value(name: str, form: Callable[[float], str]) -> _Cell:
    return lambda line: form(line[name])


def _with_interval(name: str, form: Callable[[float], str]) -> _Cell:
    return lambda line: wording.with_interval(line, name, form)


def _digits(count: int) -> Callable[[float], str]:
    return lambda value: wording.number(value, count)


def _whole(value: float) -> str:
    return wording.DASH if math.isnan(value) else f"{value:,.0f}"


def _exponent(value: float) -> str:
    return wording.DASH if math.isnan(value) else f"{value:.1e}"


def headline_for_people(headline: pd.DataFrame) -> pd.DataFrame:
    """`harness.report.summary.headline_table` as text; columns that say nothing are left out."""
    columns = _keys(headline) | {
        "tokens/s": _value("tokens_per_s", _digits(4)),
        "x best dense": _value("x_best_dense", wording.ratio),
        "peak memory": _value("peak_memory_bytes", wording.size),
        "saved bytes/token": _value("saved_bytes_per_token", _whole),
        "perplexity": _value("perplexity", _digits(4)),
        "bits/byte": _value("bits_per_byte", _digits(4)),
        "untrained perplexity": _value("untrained_perplexity", _digits(4)),
        "note": _note,
    }
    return _build(headline, columns)


def workload_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Every measured point of one workload (lines of `harness.report.summary.summarise`), misaligned ones
    flagged.
    """
    shape: dict[str, _Cell] = {"d / d_ffn": lambda line: f"{line['d_model']:.0f} / {line['d_ffn']:.0f}"}
    columns = (
        shape
        | _keys(summary)
        | {
            "forward ms": _value("forward_ms", _digits(3)),
            "backward ms": _value("backward_ms", _digits(3)),
            "step ms": _with_interval("step_ms", _digits(3)),
            "latency us": _with_interval("latency_us", _digits(3)),
            "ms per token": _with_interval("latency_ms", _digits(3)),
            "first token ms": _with_interval("time_to_first_token_ms", _digits(3)),
            "tokens/s": _with_interval("tokens_per_s", _digits(4)),
            "x best dense": _with_interval("x_best_dense", wording.ratio),
            "peak memory": _value("peak_bytes", wording.size),
            "transient peak": _value("transient_peak_bytes", wording.size),
            "saved bytes/token": _value("saved_activation_bytes_per_token", _whole),
            "loss (nats)": _with_interval("eval_loss_nats", _digits(4)),
            "against dense (nats)": _value("loss_gap", partial(wording.signed, places=3)),
            "perplexity": _value("perplexity", _digits(4)),
            "against dense (%)": _value("perplexity_change", partial(wording.signed, places=1)),
            "bits/byte": _value("bits_per_byte", _digits(4)),
            "untrained perplexity": _value("untrained_perplexity", _digits(4)),
            "tokens/parameter": _value("tokens_per_parameter", _digits(2)),
            "% of roofline": _value("pct_of_roofline", _digits(3)),
            "max rel. error": _value("max_rel_err", _exponent),
            "logits error": _value("logits_rel_err", _exponent),
            "overflow": _value("overflow_fraction", lambda v: wording.percent(100 * v)),
            "compile s": _value("compile_s", _digits(2)),
            "note": _note,
        }
    )
    return _build(summary, columns)


def _note(line: pd.Series) -> str:
    return ", ".join(name for name in ("misaligned", "unstable", "throttled", "unpaired") if line[name])


def memory_formula_table(checked: pd.DataFrame) -> pd.DataFrame:
    """The lines of `harness.report.memory_formula.memory_formula` with units and signs, for people."""
    columns: dict[str, _Cell] = {
        "model": _text("preset"),
        "seq_len": lambda line: f"{line['seq_len']:.0f}",
        **{name: _text(name) for name in ("method", "selection", "against")},
        "measured peak": _value("measured_bytes", wording.size),
        "by formula": _value("predicted_bytes", wording.size),
        "error %": lambda line: wording.signed(100 * line["error"], 1),
    }
    return _build(checked, columns)


def failure_table(points: pd.DataFrame) -> pd.DataFrame:
    """The points without a measurement: which, how they ended and why (first characters of the reason)."""
    failed = failures(points)
    why = {"seed": _value("seed", _whole), "status": _text("status"), "reason": _reason}
    return _build(failed, {"workload": _text("workload"), **_keys(failed), **why})


def _reason(line: pd.Series) -> str:
    detail = " ".join(str(line["detail"]).split()) if isinstance(line["detail"], str) else ""
    cut = detail if len(detail) <= _DETAIL_CHARACTERS else detail[: _DETAIL_CHARACTERS - 3] + "..."
    return cut or "no reason recorded"
