"""What a comparison leaves: summary.md with changes.png beside it, and all of it as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.measure.stats import Verdict
from harness.regression.compare.checkouts import Compared
from harness.regression.compare.verdict import RULES
from harness.report.plots.style import Board, handle

EXIT_FAILED, EXIT_SLOW = 1, 3
VERDICTS: tuple[Verdict, ...] = ("SAME", "FAST", "SLOW", "AMBG")
_COLOURS = {"SAME": "#5C5C5C", "FAST": "#0072B2", "SLOW": "#D55E00", "AMBG": "#E69F00"}
_MARKERS = {"SAME": "o", "FAST": "<", "SLOW": ">", "AMBG": "D"}


@dataclass(frozen=True)
class Comparison:
    """All that came out. With several runs, the outcomes of each, in order."""

    base: str
    head: str
    command: str
    device: str  # cpu or cuda
    environment: dict[str, Any]
    runs: list[list[Compared]]

    @property
    def outcomes(self) -> list[Compared]:
        """Of all runs."""
        return [outcome for run in self.runs for outcome in run]

    @property
    def exit_code(self) -> int:
        """3 if anything became slower, else 1 if anything failed, else 0."""
        if any(outcome.verdict == "SLOW" for outcome in self.outcomes):
            return EXIT_SLOW
        return EXIT_FAILED if any(outcome.failed for outcome in self.outcomes) else 0

    def sentence(self) -> str:
        """What a reader has to know, in one sentence."""
        judged = [outcome for outcome in self.outcomes if outcome.verdict is not None]
        counts = Counter(outcome.verdict for outcome in judged)
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        slow = {outcome.name: outcome.change for outcome in judged if outcome.verdict == "SLOW"}
        names = ", ".join(f"{name} {change}" for name, change in slow.items())
        failed = sum(outcome.failed for outcome in self.outcomes)
        parts = [f"{self.head} against {self.base}: {said or 'nothing judged'}"]
        parts += [f"{failed} failed"] if failed else []
        return "; ".join(parts) + (f". Slower: {names}" if names else "")


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write everything into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.md", folder / "comparison.json"]
    plotted = [outcome for outcome in comparison.runs[-1] if outcome.change is not None]
    if plotted:
        paths.insert(1, folder / "changes.png")
        _plot(comparison, plotted, paths[1])
    paths[0].write_text(markdown(comparison), encoding="utf-8")
    paths[-1].write_text(json.dumps(_plain(comparison), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return paths


def markdown(comparison: Comparison) -> str:
    """The summary."""
    rule = RULES[comparison.device]
    environment = comparison.environment
    lines = [
        f"# {comparison.sentence()}",
        "",
        f"`{comparison.command}` on {environment['device_name']}, torch {environment['torch']}, triton "
        f"{environment['triton']}.",
        "",
    ]
    if len(comparison.runs) > 1:
        lines += [f"Verdicts of {len(comparison.runs)} runs:", "", *_counts_table(comparison), ""]
        lines += ["The last of them:", ""]
    lines += [
        "| benchmark | verdict | change of time (95 %) | base ms | head ms | head tokens/s | rounds | note |",
        "|---|---|--:|--:|--:|--:|--:|---|",
        *(_row(outcome) for outcome in comparison.runs[-1]),
        "",
    ]
    if any(outcome.change is not None for outcome in comparison.runs[-1]):
        lines += ["![change of time of each benchmark](changes.png)", ""]
    lines += [
        f"A change of {100 * rule.smallest_change:g} % is reported. SLOW and FAST mean that the whole "
        f"interval lies beyond {100 * rule.limit:g} % and that the difference is more than "
        f"{1e3 * rule.floor_ms:g} us; SLOW came out twice. SAME means that the whole interval lies within "
        "these limits, AMBG that it takes more samples to say.",
        "",
    ]
    return "\n".join(lines)


def _counts_table(comparison: Comparison) -> list[str]:
    names = list(dict.fromkeys(o.name for o in comparison.outcomes if o.verdict is not None))
    lines = [f"| benchmark | {' | '.join(VERDICTS)} |", "|---|" + "--:|" * len(VERDICTS)]
    for name in names:
        counts = Counter(outcome.verdict for outcome in comparison.outcomes if outcome.name == name)
        lines.append(f"| {name} | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |")
    return lines


def _row(outcome: Compared) -> str:
    numbers = ["" if value is None else f"{value:.4g}" for value in (outcome.base_ms, outcome.head_ms)]
    rate = "" if outcome.tokens_per_s is None else f"{outcome.tokens_per_s:,.0f}"
    verdict = outcome.verdict or ("failed" if outcome.failed else "")
    cells = [outcome.name, verdict, str(outcome.change or ""), *numbers, rate, str(outcome.rounds or "")]
    return f"| {' | '.join([*cells, outcome.note.replace('|', '/')])} |"


def _plot(comparison: Comparison, outcomes: Sequence[Compared], path: Path) -> None:
    limit = 100 * RULES[comparison.device].limit
    board = Board([""], columns=1, panel_inches=0.6 + 0.24 * len(outcomes))
    (axes,) = board.axes
    axes.axvspan(-limit, limit, color="#E4E4E4", zorder=0)
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, outcome in enumerate(outcomes):
        assert outcome.change is not None
        assert outcome.verdict is not None
        change = outcome.change
        ends = [[change.value - change.low], [change.high - change.value]]
        style: dict[str, Any] = {
            "color": _COLOURS[outcome.verdict],
            "marker": _MARKERS[outcome.verdict],
            "markersize": 5,
            "linestyle": "none",
        }
        bar = None if math.isnan(change.low) else [[100 * end for end in side] for side in ends]
        axes.errorbar(100 * change.value, place, xerr=bar, capsize=3, **style)
        board.legend(handle(**style), outcome.verdict)
    axes.set_yticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
    axes.invert_yaxis()
    environment = comparison.environment
    board.save(
        path,
        comparison.sentence(),
        f"{environment['device_name']}, torch {environment['torch']}; {comparison.command}",
        x="change of time, % (right is slower)",
        note=f"Dot: median; bar: 95 % interval; grey: within {limit:g} %, where nothing is reported.",
    )


def _plain(comparison: Comparison) -> dict[str, Any]:
    values = dataclasses.asdict(comparison)
    for run in values["runs"]:
        for outcome in run:
            if outcome["change"] is not None:  # JSON has no NaN
                known = outcome["change"].items()
                outcome["change"] = {name: None if math.isnan(end) else end for name, end in known}
    return values
