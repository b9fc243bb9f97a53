"""What a search found, in words: names of objectives and parameters, titles of plots, sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from harness.report import wording
from harness.search import pareto
from harness.search.outcome import Search, losses_of
from harness.store.rows import MEASURED
from harness.sweep.metrics import METRICS
from harness.sweep.model import Objective

_PARAMETERS = {"k_frac": "K", "lr": "learning rate", "seq_len": "sequence length", "preset": "model"}
_OBJECTIVES = {
    "tokens_per_s": "tokens/s trained",
    "perplexity": "validation perplexity",
    "eval_loss_nats": "validation loss (nats/token)",
    "saved_activation_bytes_per_token": "saved bytes per token",
}
_FAILURES = {
    "oom": "out of memory",
    "unsupported": "not supported",
    "wrong": "wrong or diverged",
    "timeout": "over the time limit",
    "crashed": "crashed",
}
_SAMPLERS = {"tpe": "TPE", "nsga2": "NSGA-II", "random": "random draws"}


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
        """A value with its unit: `588 validation perplexity`, `7,300 tokens/s trained`."""
        if METRICS[self.metric].unit == "bytes":
            return wording.size(value)
        return f"{wording.number(value)} {self.name}"


def _view(objective: Objective, values: pd.Series) -> View:
    metric, unit, scale = objective.metric, METRICS[objective.metric].unit, 1
    if unit == "bytes":
        unit, scale = wording.byte_unit(float(values.max())) if values.notna().any() else ("B", 1)
    name = _OBJECTIVES.get(metric) or f"{metric.replace('_', ' ')} ({unit})"
    if metric.startswith("peak_"):
        name = f"{wording.peak_name(metric)} ({unit})"
    return View(metric, name, float(scale), objective.direction)


def views_of(search: Search) -> list[View]:
    """How to show the objectives of a search."""
    trials = search.measured if len(search.measured) else search.trials
    return [_view(objective, trials[objective.metric]) for objective in search.settings.objectives]


def parameter_name(name: str) -> str:
    """A parameter in a sentence."""
    return _PARAMETERS.get(name, name.replace("_", " "))


def parameter_value(name: str, line: pd.Series, digits: int) -> str:
    """What a trial has for a parameter: numbers with so many digits, K in percent of the channels."""
    value = line["k_pct" if name == "k_frac" else name]
    return (value or "dense") if isinstance(value, str) else f"{float(value):.{digits}g}"


def best_first(lines: pd.DataFrame, view: View) -> pd.DataFrame:
    """The lines sorted by an objective, the best one first."""
    return lines.sort_values(view.metric, ascending=view.direction == "minimize", kind="stable")


def scope_sentence(search: Search, pruned: int) -> str:
    """What was searched, how, and how the trials ended; `pruned` trainings were stopped early."""
    trials, settings = search.trials, search.settings
    most = {"maximize": "most", "minimize": "least"}
    goals = [f"{most[view.direction]} {view.plain}" for view in views_of(search)]
    limited = trials["status"].isin(MEASURED) & ~trials["feasible"]
    ends = {"beyond a limit": int(limited.sum())}
    ends |= {words: int((trials["status"] == status).sum()) for status, words in _FAILURES.items()}
    ends[f"stopped early by the {settings.pruner} rule (they have no row)"] = pruned
    counts = [f"{len(search.measured)} measured", *(f"{n} {words}" for words, n in ends.items() if n)]
    names = wording.listing([parameter_name(name) for name in search.varied])
    return (
        f"A search by {_SAMPLERS[settings.sampler]} over {names} for {wording.listing(goals)}: "
        f"{len(trials) + pruned} trials, of which {wording.listing(counts)}."
    )


def best_sentence(search: Search) -> str:
    """The best trial, or the best trial on the front in each objective."""
    good, views = search.measured, views_of(search)
    if good.empty:
        return "No trial was measured within its limits, so there is no best trial."
    if len(views) == 1:
        line, view = best_first(good, views[0]).iloc[0], views[0]
        ends = [line[f"{view.metric}_ci_{end}"] for end in ("low", "high")]
        interval = "" if math.isnan(ends[0]) else f" (95 % interval {wording.span(ends, wording.number)})"
        value = view.say(line[view.metric])
        return f"The best is trial {line['trial']}, with {value}{interval}: {_setting(search, line)}."
    best = good[good["on_front"]]
    found = []
    for view in views:
        line = best_first(best, view).iloc[0]
        values = wording.listing([each.say(line[each.metric]) for each in views])
        found.append(f"trial {line['trial']} ({values}; {_setting(search, line)})")
    return (
        f"{len(best)} of {len(good)} measured trials are on the front (no other trial is as good in"
        f" everything and better in something); best in each objective: {'; '.join(dict.fromkeys(found))}."
    )


def _setting(search: Search, line: pd.Series) -> str:
    """What a trial varied: `K = 31.2 %, batch 8, learning rate 0.0031`."""
    parts = []
    for name in search.varied:
        if name == "k_frac":
            parts.append(f"K = {wording.percent(line['k_pct'])}")
        else:
            prefix = "" if isinstance(line[name], str) else f"{parameter_name(name)} "
            parts.append(prefix + parameter_value(name, line, 3))
    return ", ".join(parts)


def k_sentence(search: Search) -> str:
    """Which K the trials on the front (or the best trial) have, of all K that were measured."""
    good = search.measured
    if "k_frac" not in search.varied or good.empty:
        return ""
    best = good.loc[good["on_front"], "k_pct"]
    where = "The best trial has" if len(best) == 1 else "The trials on the front have"
    kept, tried = (wording.span(values, wording.percent) for values in (best, good["k_pct"]))
    return f"{where} K = {kept}; the measured trials have K = {tried}."


def dense_sentence(search: Search) -> str:
    """The front against the dense baselines, shape by shape and all together."""
    best, dense = search.measured[search.measured["on_front"]], search.baselines
    if best.empty or dense.empty:
        return "No dense baseline was measured, so nothing here says whether sparsity pays."
    clauses = []
    speeds = best["speed_vs_dense"].dropna()
    if not speeds.empty:
        how = "paired" if best["speed_paired"].all() else "unpaired: each in a process of its own"
        clauses.append(f"{wording.span(speeds, wording.ratio)} its speed ({how})")
    for view in views_of(search):
        changes = 100 * (best[f"{view.metric}_vs_dense"].dropna() - 1)
        if not changes.empty:
            percent = wording.span(changes, lambda value: f"{wording.signed(value, 1)} %")
            clauses.append(f"{percent} in {view.plain}")
    name, beaten = search.settings.baseline, beaten_by_dense(search)
    shape = f"Against {name} of the same shape: {wording.listing(clauses)}. " if clauses else ""
    baselines = f"{len(dense)} {name} baseline{'s' * (len(dense) > 1)}"
    verdict = f"{'Some' if beaten else 'No'} baseline beats the best trial ({baselines})."
    if len(best) > 1:
        are, unbeaten = "is" if beaten == 1 else "are", int(dense["on_front"].sum())
        verdict = (
            f"Of the {len(best)} trials on the front, {beaten} {are} beaten in everything by one of the"
            f" {baselines}; {unbeaten} of the baselines are beaten by no trial."
        )
    return shape + verdict + _tuning_note(search)


def beaten_by_dense(search: Search) -> int:
    """How many trials on the front some dense baseline beats."""
    best = search.measured[search.measured["on_front"]]
    front, dense = (losses_of(search.settings, lines) for lines in (best, search.baselines))
    return int(pareto.dominated(front, dense).sum())


def _tuning_note(search: Search) -> str:
    """That all baselines have one learning rate, if each trial has its own."""
    if "lr" not in search.varied:
        return ""
    rate = search.baselines["lr"].iloc[0]
    return (
        f" The baselines were trained at learning rate {rate:g}, the middle of the range, while each trial"
        " has its own: that favours the trials; list the dense method among the methods to tune it as well."
    )


def front_title(search: Search) -> str:
    """Title of the plot of the front."""
    good, name = search.measured, search.settings.baseline
    count, beaten = int(good["on_front"].sum()), beaten_by_dense(search)
    share = f"{count} of {len(good)} trials are on the front"
    if search.baselines.empty:
        return share
    how_many = {0: "none", count: "all"}.get(beaten, str(beaten))
    return f"{share}; {name} beats {how_many} of them in everything"


def history_title(search: Search) -> str:
    """Title of the plot over trials: how late the best trials came."""
    trials = search.trials
    best = trials.loc[trials["on_front"], "trial"]
    if best.empty:
        return "No trial was measured within its limits"
    total = len(trials)
    if len(search.settings.objectives) == 1:
        return f"The best trial is number {best.iloc[0]} of {total}"
    late = int((best > total - total // 3).sum())
    return f"{late} of the {len(best)} trials on the front are among the last {total // 3} of {total} trials"


def hedge_sentence(search: Search) -> str:
    """What these numbers cannot show."""
    seeds, trained = len(search.part.seeds), search.part.workload == "pretrain"
    if not trained and seeds > 1:
        return ""
    once = "is one training with one seed" if trained else "was measured once"
    how = once if seeds == 1 else f"is the mean over {seeds} seeds"
    short = "; short trainings rank settings differently from long ones" if trained else ""
    return (
        f"Each trial {how}, and the best of many is partly luck{short}: measure the chosen trials again with"
        " new seeds."
    )


def sentences(search: Search, pruned: int) -> list[str]:
    """What a search found, one or two sentences an item."""
    found = [scope_sentence(search, pruned), best_sentence(search)]
    if not search.measured.empty:
        found += [k_sentence(search), dense_sentence(search), f"{history_title(search)}."]
    found.append(hedge_sentence(search))
    return [sentence for sentence in found if sentence]
