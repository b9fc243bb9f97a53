"""How numbers and names are written for people: sensible digits, units, ranges; one spelling everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from harness.sweep.catalog import FIELD, Field

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
SEED_NOISE = "about 0.02 nats"  # standard deviation over eight seeds at 60m and 30M tokens: docs/measured.md
_BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
_PEAK_NAMES = {
    "peak_allocated_bytes": "peak allocated memory",
    "peak_rss_over_start_bytes": "peak resident memory over start",
}


def number(value: float, digits: int = 3) -> str:
    """`digits` significant figures, no exponent: 12345.6 -> 12,300; 0.01234 -> 0.0123; NaN -> a dash."""
    if math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    places = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])  # exponent after rounding
    return f"{round(value, places):,.{max(0, places)}f}".replace("-", MINUS)


def signed(value: float, places: int) -> str:
    """Fixed places with a sign, and no sign on a zero: +0.012, 0.000; NaN -> a dash."""
    if math.isnan(value):
        return DASH
    text = f"{value:+.{places}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def ratio(value: float) -> str:
    """A speed ratio: 0.71x."""
    return DASH if math.isnan(value) else f"{value:.2f}x" if abs(value) < 10 else f"{value:.1f}x"


def percent(value: float) -> str:
    """A share in percent with at most two places: 18.75 %, 25 %."""
    return DASH if math.isnan(value) else f"{value:.2f}".rstrip("0").rstrip(".") + " %"


def size(value: float, digits: int = 3) -> str:
    """Bytes in the largest binary unit that leaves at least one: 1.50 GiB."""
    if math.isnan(value):
        return DASH
    unit, scale = byte_unit(value)
    return f"{number(value / scale, digits)} {unit}"


def byte_unit(value: float) -> tuple[str, int]:
    """Name and size of the binary unit to write `value` bytes in."""
    return next((item for item in _BYTE_UNITS if abs(value) >= item[1]), _BYTE_UNITS[-1])


def tokens(value: float) -> str:
    """A count of tokens: 40M, 1.3B, 262k."""
    if math.isnan(value):
        return DASH
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def span(values: Iterable[float], form: Callable[[float], str], between: str = " to ") -> str:
    """`a`, or `a to b` from the smallest to the largest; a dash if there is no number.

    Where the sentence around it says `from ... to`, a dash belongs `between` the two.
    """
    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return DASH
    low, high = form(min(finite)), form(max(finite))
    return low if low == high else f"{low}{between}{high}"


def with_interval(line: pd.Series, name: str, form: Callable[[float], str]) -> str:
    """A column of a line with its interval: `12.3 (12.1–12.6)`, or the value alone where it has none."""
    value, low, high = line[name], line[f"{name}_ci_low"], line[f"{name}_ci_high"]
    if math.isnan(value) or math.isnan(low):
        return form(value)
    return f"{form(value)} ({form(low)}{DASH}{form(high)})"


def listing(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def names(found: Iterable[str]) -> str:
    """Each name once, in the order found: a, b and c; empty names are left out."""
    return listing(list(dict.fromkeys(name for name in found if name)))


def by_pairing(paired: pd.Series, every: str, some: str, none: str) -> str:
    """The one of three texts that says which of these lines have a speed ratio that was measured as such."""
    return every if paired.all() else some if paired.any() else none


def peak_name(metric: str) -> str:
    """What a peak-memory metric is called: the allocator's on CUDA, the process's on a CPU."""
    return _PEAK_NAMES[metric]


def series_label(method: str, rule: str) -> str:
    """`moc_reference topk`; a `package.module:factory` loses its packages."""
    return f"{method.rpartition('.')[2]} {rule}".strip()


def field_value(field: Field, line: pd.Series) -> str:
    """A field of a point as people read it, by its `form`; a dash if the point does not have it."""
    value = line[field.name]
    if pd.isna(value) or value == "":
        return DASH
    if field.form == "count":
        return f"{value:,.0f}"
    if field.form == "tokens":
        return tokens(value)
    if field.form == "number":
        return f"{value:g}"
    return str(value)[:8] if field.form == "hash" else str(value)


def cell_label(line: pd.Series, varying: Sequence[str] = (), *, shape: bool = False) -> str:
    """What a cell is called: `60m, seq 256`; `varying` names what else to say, `shape` adds d and d_ffn."""
    widths = f"{line['d_model']:.0f}/{line['d_ffn']:.0f}"
    preset = line["preset"] if isinstance(line["preset"], str) else ""
    parts = [f"{preset} ({widths})" if preset and shape else preset or widths]
    parts += [FIELD[name].phrase.format(field_value(FIELD[name], line)) for name in varying]
    return ", ".join(parts)


def change(fractions: Iterable[float]) -> str:
    """Relative changes as words: `12 % below`, `3 to 5 % above`, `from 4 % below to 2 % above`.

    A change that rounds to nothing is `level with`. Raises ValueError if there is no number.
    """
    known = [value for value in fractions if not math.isnan(value)]
    low, high = _side(min(known)), _side(max(known))
    if low == high:
        return low
    if low.endswith("below") and high.endswith("below"):
        return f"{high.split(' ')[0]} to {low}"
    if low.endswith("above") and high.endswith("above"):
        return f"{low.split(' ')[0]} to {high}"
    return f"from {low} to {high}"


def _side(fraction: float) -> str:
    shown = f"{abs(100 * fraction):.0f}" if abs(fraction) >= 0.0995 else f"{abs(100 * fraction):.1f}"
    return "level with" if float(shown) == 0 else f"{shown} % {'below' if fraction < 0 else 'above'}"


def without_paths(command: str) -> str:
    """A command line without the folders or servers of the machine it was typed on: only names stay."""
    command = re.sub(r"(\w[\w+]*://)\S+", r"\1...", command)
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s'\"/]+/)*|(?<=:)/(?!/)(?:[^\s'\"/]+/)*", "", command)
