"""The message of each plot: a sentence computed from what is drawn."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from harness.report import wording
from harness.report.summary import SEEDS_FOR_INTERVAL, gaps_hold_zero, lead_lines


def _k(line: pd.Series) -> str:
    return f"At K = {wording.percent(line['k_pct'])}, {wording.series_label(line['method'], line['family'])}"


def _percent(changes: pd.Series) -> str:
    return wording.span(changes, lambda value: f"{wording.signed(value, 1)} %")


def _dense_methods(lead: pd.DataFrame, who: str) -> str:
    as_fast = "the leanest dense method at least as fast"
    what = as_fast if lead["dense_as_fast"].all() else "the fastest dense method"
    return f"{wording.names(lead[who])}, {what}"


def k_title(summary: pd.DataFrame, metric: str) -> str:
    """Message of a plot over K: the lead series at the K nearest to the default, against dense."""
    known = {
        "perplexity": ("Perplexity", "perplexity_change"),
        "tokens_per_s": ("Training speed", "x_best_dense"),
    }
    name, column = known.get(metric, ("Peak memory", "memory_change"))
    lead = lead_lines(summary)
    compared = lead[lead[column].notna()]
    if compared.empty:
        return f"{name} against K (no dense method in this run to compare with)"
    line = compared.iloc[0]
    if metric == "perplexity":
        seeds = int(compared["seeds"].min())
        if seeds >= SEEDS_FOR_INTERVAL and gaps_hold_zero(compared):
            return f"{_k(line)}: no difference from dense in perplexity shows over {seeds} seeds"
        return f"{_k(line)} differs from dense by {_percent(compared[column])} in perplexity"
    if metric == "tokens_per_s":
        reached = wording.span(compared[column], wording.ratio)
        return f"{_k(line)} trains at {reached} the speed of the fastest dense method"
    dense = _dense_methods(compared, "leanest")
    return f"{_k(line)}'s peak memory is {wording.change(compared[column])} {dense}"


def pareto_title(known: pd.DataFrame) -> str:
    """Message of the Pareto plot: in how many panels the lead series is on the front."""
    lead = lead_lines(known)
    if lead.empty:
        return "Perplexity against peak memory of the dense methods"
    line = lead.iloc[0]
    total, on = len(lead), int(lead["on_front"].sum())
    fraction = {0: "is dominated", total: "is on the perplexity-memory front"}.get(
        on, f"is on the perplexity-memory front in {on} of {total} panels"
    )
    every = "both" if total == 2 else f"all {total}"
    everywhere = f" in {every} panels" if on in (0, total) and total > 1 else ""
    return f"{_k(line)} {fraction}{everywhere}"


def scaling_title(summary: pd.DataFrame) -> str:
    """Message of the scaling plot: the ratio to dense at the shortest and the longest sequence."""
    lead = lead_lines(summary)
    lead = lead[lead["x_best_dense"].notna()]
    lengths = sorted(set(summary["seq_len"]))
    ends = [lead[lead["seq_len"] == length] for length in (lengths[0], lengths[-1])]
    if lead.empty or ends[0].empty or ends[1].empty:
        return f"Training speed from sequence length {lengths[0]:.0f} to {lengths[-1]:.0f}"
    first, last = (wording.span(end["x_best_dense"], wording.ratio, wording.DASH) for end in ends)
    label = wording.series_label(lead.iloc[0]["method"], lead.iloc[0]["family"])
    if first == last:
        reach = f"from sequence length {lengths[0]:.0f} to {lengths[-1]:.0f}"
        return f"{label} stays at {first} the speed of the fastest dense method {reach}"
    return (
        f"{label} goes from {first} the speed of the fastest dense method at sequence length "
        f"{lengths[0]:.0f} to {last} at {lengths[-1]:.0f}"
    )


def loss_title(curves: pd.DataFrame) -> str:
    """Message of the loss plot: from where to where validation loss falls."""
    by_run = curves.sort_values("x").groupby(["point_key"])["value"]
    start, end = by_run.first(), by_run.last()
    verb = "falls" if (end < start).all() else "goes"
    first, last = (wording.span(values, "{:.2f}".format, wording.DASH) for values in (start, end))
    return f"Validation loss {verb} from {first} to {last} nats while training"


def gap_title(lead: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Message of the gap plot: the lead series' gap to dense early and at the end."""
    if lead.empty:
        return "How far from dense each method is while training"
    line = lead.iloc[0]
    own = curves[(curves["method"] == line["method"]) & (curves["selection"] == line["selection"])]
    means = own[own["x"] > 0].groupby(["cell", "x"])["value"].mean()  # over the seeds
    ordered = means.groupby("cell")
    middle = ordered.apply(lambda values: values.iloc[(len(values) - 1) // 2])
    halfway = wording.span(middle, lambda value: wording.signed(value, 3))
    end = wording.span(ordered.last(), lambda value: wording.signed(value, 3))
    return f"{_k(line)} is {halfway} nats from dense halfway and {end} nats at the end"


def step_title(summary: pd.DataFrame) -> str:
    """Message of the step-time plot: which method is fastest."""
    aligned = summary[~summary["misaligned"]]
    shown = aligned if not aligned.empty else summary
    best = shown.loc[shown.groupby("cell")["step_ms"].idxmin()]
    counts = Counter(map(wording.series_label, best["method"], best["selection"]))
    if len(counts) == 1:
        return f"{next(iter(counts))} has the fastest FFN training step at every shape"
    shapes = [f"{name} ({count})" for name, count in counts.items()]
    return f"Fastest FFN training step, by number of shapes: {wording.listing(shapes)}"


def saved_title(summary: pd.DataFrame) -> str:
    """Message of the saved-bytes plot: the lead series against the leanest dense method as fast."""
    lead = lead_lines(summary)
    lead = lead[lead["saved_change"].notna()]
    if lead.empty:
        return "Bytes one FFN layer keeps for its backward pass"
    line, dense = lead.iloc[0], _dense_methods(lead, "saved_leanest")
    return f"{_k(line)}'s saved bytes are {wording.change(lead['saved_change'])} {dense}"


def ratio_note(lines: pd.DataFrame) -> str:
    """What the speeds against dense are, as a note begins: paired, quotients of two runs, or some of each."""
    return wording.by_pairing(
        lines["paired"],
        every="Medians of paired ratios",
        some="Medians of paired ratios, or quotients of speeds where a faster dense method was measured"
        " later",
        none="Quotients of speeds",
    )


def speedup_title(summary: pd.DataFrame) -> str:
    """Message of the speed-up plot: the best that is not dense, and whether it beats dense."""
    others = summary[~summary["is_dense"] & ~summary["misaligned"] & summary["x_best_dense"].notna()]
    if others.empty:
        return "Speed of the dense methods against the fastest of them"
    best = others.loc[others.groupby("cell")["x_best_dense"].idxmax()]
    reached = wording.span(best["x_best_dense"], wording.ratio)
    wins = int((best["x_best_dense_ci_low"].fillna(best["x_best_dense"]) > 1).sum())
    if wins == 0:
        return f"Nothing beats the fastest dense step: the best other method reaches {reached}"
    shapes = f"{wins} of {len(best)} shapes"
    return f"Other methods beat the fastest dense step at {shapes}: the best reaches {reached}"
