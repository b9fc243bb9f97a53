"""What a search found, in words: names of objectives and parameters, messages of plots, sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.report import wording
from harness.search import pareto
from harness.search.outcome import Search, losses_of
from harness.sweep.metrics import METRICS
from harness.sweep.model import Objective

_PARAMETERS = {
    "k_frac": "K (% of d_ffn)",
    "lr": "learning rate",
    "batch": "batch (sequences)",
    "seq_len": "sequence length (tokens)",
    "tokens": "tokens per step",
    "preset": "model",
}
_SHORT = {"k_frac": "K", "lr": "learning rate", "seq_len": "sequence length", "preset": "model"}
_NAMES = {
    "tokens_per_s": "tokens/s trained",
    "perplexity": "validation perplexity",
    "eval_loss_nats": "validation loss (nats/token)",
    "saved_activation_bytes_per_token": "saved bytes per token",
}
_WHY = {
    "oom": "out of memory",
    "unsupported": "not supported",
    "wrong": "wrong or diverged",
    "timeout": "over the time limit",
    "crashed": "crashed",
}
_SAMPLERS = {"tpe": "TPE", "nsga2": "NSGA-II", "random": "random draws"}
# Of the whole hypervolume: what the last third of the trials may add to a search that has come to rest.
SETTLED_SHARE = 0.01


@dataclass(frozen=True)
class View:
    """How an objective is shown: `name` with its unit, values divided by `scale`."""

    metric: str
    name: str
    scale: float
    direction: str

    @property
    def plain(self) -> str:
        """The name without a unit in parentheses."""
        return self.name.partition(" (")[0]

    @property
    def axis(self) -> str:
        """Name of a plot's axis."""
        return f"{self.name}, {'more' if self.direction == 'maximize' else 'less'} is better"

    def say(self, value: float) -> str:
        """A value with its unit, for a sentence: `588 validation perplexity`, `7,300 tokens/s trained`."""
        if METRICS[self.metric].unit == "bytes":
            return wording.size(value)
        return f"{wording.number(value)} {self.name}"


def view_of(objective: Objective, values: pd.Series) -> View:
    """How to show an objective with these values."""
    unit, scale = METRICS[objective.metric].unit, 1.0
    name = _NAMES.get(objective.metric)
    if unit == "bytes":
        unit, scale = wording.byte_unit(float(values.max())) if values.notna().any() else ("B", 1)
    if name is None and objective.metric.startswith("peak_"):
        name = f"{wording.peak_name(objective.metric)} ({unit})"
    return View(
        objective.metric,
        name or f"{objective.metric.replace('_', ' ')} ({unit})",
        float(scale),
        objective.direction,
    )


def parameter_axis(name: str) -> str:
    """A parameter with its unit, for an axis."""
    return _PARAMETERS.get(name, name.replace("_", " "))


def parameter_name(name: str) -> str:
    """A parameter in a sentence or a table."""
    return _SHORT.get(name, name.replace("_", " "))


def setting(search: Search, line: pd.Series) -> str:
    """What a trial varied: `K = 31.2 %, batch 8, learning rate 0.0031`."""
    parts = []
    for name in search.varied:
        if name == "k_frac":
            parts.append(f"K = {wording.percent(line['k_pct'])}")
        elif name == "selection":
            parts.append(str(line["selection"]) or "dense")
        elif isinstance(line[name], str):
            parts.append(str(line[name]))
        else:
            parts.append(f"{parameter_name(name)} {float(line[name]):.3g}")
    return ", ".join(parts)


def scope_sentence(search: Search, pruned: int) -> str:
    """What was searched, how, and how the trials ended."""
    trials, settings = search.trials, search.settings
    goals = [
        f"{'most' if o.direction == 'maximize' else 'least'} {view_of(o, trials[o.metric]).plain}"
        for o in settings.objectives
    ]
    counts = [f"{len(search.measured)} measured"]
    limited = trials[trials["status"].isin(("ok", "unstable")) & ~trials["feasible"]]
    if len(limited):
        counts.append(f"{len(limited)} beyond a limit")
    for status, why in _WHY.items():
        count = int((trials["status"] == status).sum())
        if count:
            counts.append(f"{count} {why}")
    if pruned:
        counts.append(f"{pruned} given up early by the {settings.pruner} rule (they have no row)")
    names = wording.listing([parameter_name(name) for name in search.varied])
    return (
        f"A search by {_SAMPLERS[settings.sampler]} over {names} for {wording.listing(goals)}: "
        f"{len(trials) + pruned} trials, of which {wording.listing(counts)}."
    )


def best_sentence(search: Search) -> str:
    """The best trial, or both ends of the front."""
    good = search.measured
    if good.empty:
        return "No trial was measured within its limits, so there is no best one."
    objectives = search.settings.objectives
    views = [view_of(objective, good[objective.metric]) for objective in objectives]
    if len(objectives) == 1:
        line = best_by(good, objectives[0])
        low, high = (line[f"{objectives[0].metric}_ci_{end}"] for end in ("low", "high"))
        interval = f" (95 % interval {wording.number(low)} to {wording.number(high)})" if low == low else ""
        return (
            f"Best is trial {line['trial']}, with {views[0].say(line[objectives[0].metric])}{interval}: "
            f"{setting(search, line)}."
        )
    ends = []
    for objective in objectives:
        line = best_by(good[good["on_front"]], objective)
        values = wording.listing([view.say(line[view.metric]) for view in views])
        ends.append(f"trial {line['trial']} ({values}; {setting(search, line)})")
    count = int(good["on_front"].sum())
    return (
        f"{count} of {len(good)} measured trials are on the front (no other trial is as good in everything "
        f"and better in something); best in each objective: {'; '.join(dict.fromkeys(ends))}."
    )


def best_by(lines: pd.DataFrame, objective: Objective) -> pd.Series:
    """The line with the best value of an objective."""
    ordered = lines.sort_values(objective.metric, ascending=objective.direction == "minimize", kind="stable")
    return ordered.iloc[0]


def against_dense_counts(search: Search) -> tuple[int, int, int]:
    """Trials on the front, how many of them some dense baseline beats, and baselines that no trial beats."""
    best = search.measured[search.measured["on_front"]]
    rivals = losses_of(search.settings, search.baselines)
    beaten = pareto.dominated(losses_of(search.settings, best), rivals)
    return len(best), int(beaten.sum()), int(search.baselines["on_front"].sum())


def dense_sentence(search: Search) -> str:
    """The front against the dense baselines, overall and shape by shape."""
    count, beaten, unbeaten = against_dense_counts(search)
    dense = len(search.baselines)
    if not dense or not count:
        return "No dense baseline was measured, so nothing here says whether sparsity pays."
    best = search.measured[search.measured["on_front"]]
    clauses = []
    speeds = best["speed_vs_dense"].dropna()
    if not speeds.empty:
        how = "paired" if best["speed_paired"].all() else "unpaired: each in a process of its own"
        clauses.append(f"{wording.span(speeds, wording.ratio)} its speed ({how})")
    for objective in search.settings.objectives:
        ratios = best[f"{objective.metric}_vs_dense"].dropna()
        if not ratios.empty:
            view = view_of(objective, best[objective.metric])
            percent = wording.span(100 * (ratios - 1), lambda value: f"{wording.signed(value, 1)} %")
            clauses.append(f"{percent} in {view.plain}")
    name = search.settings.baseline
    shape = f"Against {name} of the same shape: {wording.listing(clauses)}. " if clauses else ""
    baselines = f"{dense} {name} baseline{'s' * (dense > 1)}"
    if count == 1:
        verdict = "Some baseline beats" if beaten else "No baseline beats"
        return f"{shape}{verdict} the best trial ({baselines})." + tuned_note(search)
    return (
        f"{shape}Taken together with the {baselines}: {beaten} of the {count} trials on the front "
        f"{'is' if beaten == 1 else 'are'} beaten by a baseline in everything, and {unbeaten} of the "
        f"baselines by no trial.{tuned_note(search)}"
    )


def tuned_note(search: Search) -> str:
    """That baselines share one learning rate while trials have their own."""
    if "lr" not in search.varied or search.baselines.empty:
        return ""
    rate = search.baselines["lr"].iloc[0]
    return (
        f" The baselines were trained at learning rate {rate:g}, the middle of the range, while trials choose"
        " theirs: that flatters the trials; list the dense method among the methods to tune it as well."
    )


def history(search: Search) -> np.ndarray:
    """After each trial: share of the hypervolume (%), or the best value of a single objective so far."""
    objectives = search.settings.objectives
    points = losses_of(search.settings, search.trials)
    points[~search.trials["feasible"].to_numpy(dtype=bool)] = np.nan
    if len(objectives) > 1:
        return 100 * pareto.hypervolume_history(points)
    best = np.fmin.accumulate(points[:, 0])
    return -best if objectives[0].direction == "maximize" else best


def progress_title(search: Search) -> str:
    """Message of the progress plot: whether the search had come to rest."""
    values = history(search)
    known = values[~np.isnan(values)]
    if known.size == 0:
        return "No trial was measured within its limits"
    steps = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    last = int(search.trials["trial"].iloc[steps[-1]]) if steps.size else 1
    total = len(values)
    if len(search.settings.objectives) == 1:
        return f"The best trial came as number {last} of {total} with a row"
    before = values[max(0, total - 1 - total // 3)]
    gained = 1 - (0 if before != before else before) / values[-1]
    if gained <= SETTLED_SHARE:
        return f"The front had come to rest: the last third of {total} trials added {100 * gained:.1f} %"
    return f"The front was still growing: the last third of {total} trials added {100 * gained:.1f} %"


def pareto_title(search: Search) -> str:
    """Message of the Pareto plot."""
    count, beaten, _ = against_dense_counts(search)
    dense = len(search.baselines)
    share = f"{count} of {len(search.measured)} trials are on the front"
    if not dense:
        return share
    name = search.settings.baseline
    if beaten == 0:
        return f"{share}; {name} beats none of them in everything"
    return f"{share}; {name} beats {beaten if beaten < count else 'all'} of them in everything"


def importance_sentence(search: Search, shares: pd.DataFrame) -> str:
    """Which parameter decides each objective, with its interval; empty if too few trials were measured."""
    clauses = []
    for objective in search.settings.objectives:
        own = shares[shares["objective"] == objective.metric]
        if own.empty:
            continue
        first, name = own.iloc[0], parameter_name(own.iloc[0]["parameter"])
        share = f"{100 * first['share']:.0f} %"
        bounds = f"95 % range {100 * first['low']:.0f} to {100 * first['high']:.0f}"
        view = view_of(objective, search.measured[objective.metric])
        if _decides(own):
            clauses.append(f"{name} most for {view.plain} ({share}, {bounds})")
        else:
            clauses.append(f"nothing clearly for {view.plain} ({name} has {share}, {bounds})")
    said = f"What tells the best quarter of the trials from the rest: {'; '.join(clauses)}."
    return said if clauses else ""


def _decides(shares: pd.DataFrame) -> bool:
    """Whether the first parameter of an objective leads however the trials are resampled."""
    return bool(shares["low"].iloc[0] > shares["share"].iloc[1:].max())


def importance_title(search: Search, shares: pd.DataFrame) -> str:
    """Message of the importance plot; a parameter decides only where resampling leaves no other as large."""
    sure: dict[str, list[str]] = {}
    unsure = []
    for objective in search.settings.objectives:
        own = shares[shares["objective"] == objective.metric]
        what = view_of(objective, search.measured[objective.metric]).plain
        name = parameter_name(own.iloc[0]["parameter"])
        if _decides(own):
            sure.setdefault(name, []).append(what)
        else:
            unsure.append(what)
    clauses = [f"{name} decides most about {wording.listing(what)}" for name, what in sure.items()]
    if unsure:
        clauses.append(f"what decides {wording.listing(unsure)} is not clear from so few trials")
    return _upper("; ".join(clauses))


def slices_title(search: Search, shares: pd.DataFrame) -> str:
    """Message of the plot of objectives over parameters: where the best quarter lies."""
    clauses = []
    for objective in search.settings.objectives:
        own = shares[shares["objective"] == objective.metric]
        if own.empty:
            continue
        name = str(own.iloc[0]["parameter"])
        ordered = search.measured.sort_values(objective.metric, ascending=objective.direction == "minimize")
        best = ordered.head(max(1, len(ordered) // 4))
        view = view_of(objective, search.measured[objective.metric])
        clauses.append(f"{view.plain}: {parameter_name(name)} {_range(best, name)}")
    return f"Best quarter by {'; by '.join(clauses)}" if clauses else "Where the good values lie"


def _range(best: pd.DataFrame, name: str) -> str:
    if name == "k_frac":
        return f"{wording.span(best['k_pct'], lambda value: f'{value:.3g}')}\N{NO-BREAK SPACE}%"
    values = best[name]
    if isinstance(values.iloc[0], str):
        counts = values.value_counts()
        several = len(counts) > 1
        return wording.listing(
            [f"{value} ({count})" if several else str(value) for value, count in counts.items()]
        )
    return wording.span(values.astype(float), lambda value: f"{value:.3g}")


def _upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def hedge_sentence(search: Search) -> str:
    """What these numbers cannot carry."""
    hedges = []
    seeds = len(search.part.seeds)
    if search.part.workload == "pretrain":
        if seeds == 1:
            hedges.append("each trial is one training with one seed, and the best of many is partly luck")
        else:
            hedges.append(f"each trial is the mean over {seeds} seeds, and the best of many is partly luck")
        hedges.append("short trainings order settings otherwise than long ones do")
    elif seeds == 1:
        hedges.append("each trial was measured once, and the best of many is partly luck")
    return f"{_upper('; '.join(hedges))}: measure the chosen trials again with new seeds." if hedges else ""


def sentences(search: Search, pruned: int, shares: pd.DataFrame) -> list[str]:
    """What a search found, one or two sentences an item."""
    found = [scope_sentence(search, pruned), best_sentence(search)]
    if not search.measured.empty:
        found += [dense_sentence(search), f"{progress_title(search)}.", importance_sentence(search, shares)]
    found.append(hedge_sentence(search))
    return [sentence for sentence in found if sentence]
