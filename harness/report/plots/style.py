"""How every plot looks: a colour and marker per rule, a line style per method, message above, caption below.

Colour and marker say the selection rule, line style and filling say the method, so the same thing looks the
same in every plot and nothing depends on colour alone. Dense methods are greys, drawn as lines. Colours are
those of Okabe and Ito, which the common kinds of colour blindness keep apart.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from harness.report.wording import series_label

_SOFTWARE = "mocbench"  # the `Software` text of every PNG that is written here
WIDTH_IN = 9.0  # shown at 900 pixels, a point of type is then 1.4 pixels
DPI = 150

_BLUE, _VERMILION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_SKY, _PURPLE, _BROWN, _OLIVE = "#56B4E9", "#CC79A7", "#8C510A", "#7A7A00"
_RULES: dict[str, tuple[str, str]] = {
    "topk": (_BLUE, "o"),
    "topk_abs": (_PURPLE, "p"),
    "nm:2:8": (_VERMILION, "s"),
    "nm:12:64": (_GREEN, "^"),
    "threshold": (_ORANGE, "D"),
}
# Other n:m rules and other methods take one of these by a hash of their name: always the same one.
_SPARE = tuple((colour, marker) for marker in ("v", "P", "X", "*") for colour in (_SKY, _BROWN, _OLIVE))
_DENSE: dict[str, tuple[str, Any]] = {
    "dense": ("#8C8C8C", (0, (6, 2))),
    "dense_compiled": ("#000000", "-"),
    "dense_autotuned": ("#262626", (0, (12, 2))),
    "dense_fused": ("#3F3F3F", (0, (8, 2, 1, 2))),
    "dense_liger": ("#5C5C5C", (0, (4, 1, 1, 1, 1, 1))),
    "dense_recompute": ("#A6A6A6", (0, (1, 1))),
    "dense_gu": ("#737373", (0, (3, 2))),
}
# Dense as to selection, but rounded: no baseline, so drawn as the points that are judged, in grey.
_ROUNDED: dict[str, tuple[str, str]] = {"dense_fp8": ("#8C8C8C", "<"), "dense_int8": ("#4D4D4D", ">")}
# Line style, filling and hatch of a sparse method.
_METHODS: dict[str, tuple[Any, str, str]] = {
    "moc": ("-", "full", ""),
    "moc_reference": ((0, (5, 2)), "none", ""),
    "moc_fp8": ((0, (1, 1)), "left", "//"),
    "moc_int8": ((0, (3, 1)), "right", "xx"),
    "act_prune": ((0, (6, 2, 1, 2)), "bottom", ".."),
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    label: str
    color: str
    marker: str
    line: Any
    fill: str
    hatch: str

    def marks(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of a line with markers."""
        style = {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "fillstyle": self.fill,
            "markersize": 7,
            "markeredgewidth": 1.5,
            "linewidth": 1.6,
            "markerfacecoloralt": "white",
        }
        if self.fill == "none":
            style.update(fillstyle="full", markerfacecolor="white")
        return {**style, **changes}

    def points(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of markers without a line; a hexagon for a dense method, which has no K."""
        if self.marker:
            return self.marks(**{"linestyle": "", **changes})
        hexagon = {"marker": "h", "markersize": 8, "linestyle": "", "markeredgecolor": "white"}
        return {"color": self.color, **hexagon, **changes}


def look(method: str, rule: str, *, dense: bool) -> Look:
    """The fixed look of a method with a rule (`family` of `harness.report.points`)."""
    label = series_label(method, rule)
    if dense:
        color, line = _DENSE.get(method, ("#666666", (0, (2, 1))))
        return Look(label, color, "", line, "full", "")
    if rule in _RULES and method in _METHODS:
        color, marker = _RULES[rule]
    elif method in _ROUNDED:
        color, marker = _ROUNDED[method]
    else:
        name = rule if method in _METHODS else f"{method} {rule}"
        color, marker = _SPARE[zlib.crc32(name.encode()) % len(_SPARE)]
    line, fill, hatch = _METHODS.get(method, ((0, (3, 1, 1, 1)), "full", "xx"))
    return Look(label, color, marker, line, fill, hatch)


@dataclass(frozen=True)
class Subject:
    """What a plot is of: the points of a grid of these workloads, or the search of one part of a sweep."""

    workloads: tuple[str, ...] = ()
    search: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot on disk. `name` says which plot it is, `title` is its message, `subject` what it is of."""

    name: str
    path: Path
    title: str
    subject: Subject = Subject()


def subject_of(lines: pd.DataFrame) -> Subject:
    """The subject of a plot that draws these lines of points or of their summary."""
    return Subject(tuple(dict.fromkeys(map(str, lines["workload"]))))


def plot_subject(path: Path) -> Subject | None:
    """What a PNG that `Board.save` wrote is of; None for a picture of any other origin."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            texts = dict(picture.info)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if texts.get("Software") != _SOFTWARE:
        return None
    return Subject(tuple(str(texts.get("Workloads", "")).split()), str(texts.get("Search", "")))


@dataclass(frozen=True)
class Mark:
    """A data point with its vertical interval, and the text that belongs beside it (may be empty)."""

    x: float
    y: float
    low: float
    high: float
    text: str = ""


class Board:
    """A grid of panels with a message on top, one legend and one caption for all of them."""

    def __init__(
        self,
        panels: Sequence[str],
        *,
        columns: int,
        panel_inches: float = 2.7,
        share_x: bool = True,
        subject: Subject = Subject(),
    ) -> None:
        """`panels` are their titles, `columns` how many are side by side at most, `subject` what it is of."""
        self._subject = subject
        self._style = {
            **sns.axes_style("whitegrid"),
            **sns.plotting_context("notebook", font_scale=0.8),
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "axes.edgecolor": "#999999",
            "grid.color": "#E4E4E4",
            "axes.titlesize": 10,
            "hatch.linewidth": 0.6,
        }
        self.columns = columns = max(1, min(columns, len(panels)))
        lines = math.ceil(len(panels) / columns)
        titles = [_wrapped_at_commas(title, 84 // columns) for title in panels]
        title_lines = 1 + max(title.count("\n") for title in titles)
        self._panels_in = lines * (panel_inches + 0.16 * (title_lines - 1))
        self._legend: dict[str, Artist] = {}
        self._texts: list[tuple[Axes, list[Mark]]] = []
        with matplotlib.rc_context(self._style):
            self.figure = Figure(figsize=(WIDTH_IN, self._panels_in), dpi=DPI, layout="constrained")
            FigureCanvasAgg(self.figure)
            grid = self.figure.subplots(lines, columns, squeeze=False, sharex=share_x)
            flat = list(grid.flat)
            self.axes: list[Axes] = flat[: len(panels)]
            for axes, title in zip(self.axes, titles, strict=True):
                axes.set_title(title)
                axes.set_axisbelow(True)
                sns.despine(ax=axes)
        for empty in flat[len(panels) :]:
            empty.set_axis_off()
        for lowest in self.axes[max(0, len(panels) - columns) :]:
            lowest.tick_params(labelbottom=True)

    def legend(self, handle: Artist, label: str) -> None:
        """Name something once in the legend below the panels."""
        self._legend.setdefault(label, handle)

    def label(self, axes: Axes, marks: Sequence[Mark]) -> None:
        """Write the text of each mark beside it once the panels have their final size."""
        self._texts.append((axes, list(marks)))

    def save(self, path: Path, title: str, caption: str, *, x: str = "", y: str = "", note: str = "") -> Plot:
        """Write the PNG; axis names go once for all panels, `note` says how to read what is drawn."""
        heading = textwrap.fill(title, 88)
        below = "\n".join(textwrap.fill(line, 150) for line in (note, caption) if line)
        top = 0.22 * (heading.count("\n") + 1) + 0.16
        bottom = 0.15 * (below.count("\n") + 1) + 0.12
        labels, legend_in, per_line = list(self._legend), 0.0, 1
        if labels:
            per_line = _legend_columns(labels)
            legend_in = 0.21 * math.ceil(len(labels) / per_line) + 0.12
        name_in = 0.24 if x else 0.0
        height = self._panels_in + top + bottom + legend_in + name_in
        floor = (bottom + legend_in + name_in) / height
        left, up = (0.028 if y else 0.005), 1 - floor - top / height
        with matplotlib.rc_context(self._style):
            figure = self.figure
            figure.set_size_inches(WIDTH_IN, height)
            engine: Any = figure.get_layout_engine()
            engine.set(rect=(left, floor, 0.995 - left, up), h_pad=0.06, w_pad=0.06, hspace=0.05, wspace=0.03)
            bold: dict[str, Any] = {"fontsize": 11.5, "weight": "bold", "linespacing": 1.25}
            figure.text(0.012, 1 - 0.1 / height, heading, va="top", **bold)
            small: dict[str, Any] = {"fontsize": 7.5, "color": "#444444", "linespacing": 1.3}
            figure.text(0.012, 0.08 / height, below, va="bottom", **small)
            figure.text(0.5, floor - 0.02 / height, x, va="top", ha="center", fontsize=9.5)
            figure.text(0.008, floor + up / 2, y, rotation=90, va="center", ha="left", fontsize=9.5)
            if labels:
                below_panels: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, (bottom - 0.04) / height)}
                shape: Any = {"ncols": per_line, "frameon": False, "fontsize": 9, "handlelength": 3.2}
                figure.legend(list(self._legend.values()), labels, **below_panels, **shape)
            if self._texts:
                figure.draw_without_rendering()
            for axes, marks in self._texts:
                _place_labels(axes, marks)
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = {"Workloads": " ".join(self._subject.workloads), "Search": self._subject.search}
            named = {name: text for name, text in texts.items() if text}
            figure.savefig(path, metadata={"Software": _SOFTWARE, **named})
        return Plot(path.stem.partition("-")[0], path, title, self._subject)


def thousands(axis: Axis) -> None:
    """Write ticks with a prefix: 200k."""
    axis.set_major_formatter(EngFormatter(sep=""))


def handle(**style: Any) -> Line2D:
    """Legend handle with the given properties of a line or a marker."""
    return Line2D([], [], **style)


def line_handle(style: Look, **changes: Any) -> Line2D:
    """Legend handle of a series: a line with markers, or a plain line for a dense method."""
    if not style.marker and not changes:
        return handle(color=style.color, linestyle=style.line, linewidth=1.8)
    return handle(**style.marks(**changes))


def _wrapped_at_commas(title: str, width: int) -> str:
    """Lines of at most `width` characters that break after a comma, since a panel's conditions end there."""
    glued = title.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    lines = textwrap.fill(glued, width, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def _legend_columns(labels: Sequence[str]) -> int:
    """As many labels a line as fit the width, spread evenly; 11.5 characters are about an inch."""
    room, sample = WIDTH_IN * 11.5, 8
    if sum(len(label) + sample for label in labels) <= room:
        return len(labels)
    per_line = max(1, int(room / (max(len(label) for label in labels) + sample)))
    return math.ceil(len(labels) / math.ceil(len(labels) / per_line))


def _place_labels(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write each text beside its point where it covers no point, no interval and no other text.

    Greedy: of the spots around the point and beyond the ends of its interval the first free one inside the
    panel wins; if there is none, nothing is written.
    """
    figure: Any = axes.figure
    point = figure.dpi / 72  # pixels
    frame = axes.get_window_extent()
    ends = [axes.transData.transform([(m.x, m.low), (m.x, m.y), (m.x, m.high)]) for m in marks]
    taken = [_box(at[0], at[1], 9 * point, 9 * point) for _, at, _ in ends]
    taken += [_box(at[0], (low[1] + high[1]) / 2, 6 * point, high[1] - low[1]) for low, at, high in ends]
    for mark, (low, at, high) in zip(marks, ends, strict=True):
        if not mark.text:
            continue
        behind = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
        look: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": 7.5,
            "color": "#222222",
            "bbox": behind,
        }
        note = axes.annotate(mark.text, (mark.x, mark.y), (0, 0), textcoords="offset points", **look)
        extent = note.get_window_extent()
        wide, tall = extent.width + 2 * point, extent.height
        beside = [(x * (wide / 2 + 5 * point), y * (tall / 2 + 4 * point)) for x in (1, -1) for y in (1, -1)]
        above, below = high[1] - at[1] + tall / 2 + 4 * point, low[1] - at[1] - tall / 2 - 4 * point
        beyond = [(x * wide, y) for y in (above, below) for x in (0, -0.45, 0.45, -0.9, 0.9)]
        for x, y in beside + beyond:
            box = _box(at[0] + x, at[1] + y, wide, tall)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                note.set_position((x / point, y / point))
                break
        else:
            note.remove()


def _box(x: float, y: float, wide: float, high: float) -> Bbox:
    return Bbox.from_bounds(x - wide / 2, y - high / 2, wide, high)
