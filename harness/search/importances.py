"""Which parameters of a search decide an objective, from its trials as the rows tell them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, create_trial

from harness.search import pareto
from harness.search.outcome import Search
from harness.search.samplers import space

MIN_TRIALS = 12  # fewer say nothing about which half is better and why
# The best share of trials that is told apart from the rest: fewer than five trials are too few to estimate a
# density from, says Optuna's documentation of the evaluator.
BEST_SHARE = 0.25
RESAMPLES = 200


def importances(search: Search, seed: int = 0) -> pd.DataFrame:
    """Share of each varied parameter in telling the best quarter of the measured trials from the others.

    By PED-ANOVA (arXiv 2304.10255), which compares densities of parameter values and so does not mind that a
    sampler crowds the good ones; shares sum to 1 over the parameters of an objective. Columns: `objective`,
    `parameter`, `share`, and `low` and `high`, where 95 % of bootstrap resamples of the trials lie. Empty
    with fewer than `MIN_TRIALS` measured trials.
    """
    columns = ["objective", "parameter", "share", "low", "high"]
    trials = search.measured
    if len(trials) < MIN_TRIALS or len(search.varied) < 2:
        return pd.DataFrame(columns=columns)
    generator = np.random.default_rng(seed)
    samples = generator.integers(len(trials), size=(RESAMPLES, len(trials)))
    lines = []
    for objective in search.settings.objectives:
        frozen = _frozen(search, trials, objective.metric, objective.direction)
        whole = _shares(frozen, search.varied)
        spread = np.array([_shares([frozen[i] for i in indices], search.varied) for indices in samples])
        low, high = np.quantile(spread, (0.025, 0.975), axis=0)
        order = np.argsort(-whole, kind="stable")
        lines += [[objective.metric, search.varied[at], whole[at], low[at], high[at]] for at in order]
    return pd.DataFrame(lines, columns=columns)


def _frozen(search: Search, trials: pd.DataFrame, metric: str, direction: str) -> list[FrozenTrial]:
    """The trials as Optuna takes them, with one objective to minimise."""
    distributions = {name: value for name, value in space(search.part, []).items() if name in search.varied}
    values = pareto.losses(trials[[metric]].to_numpy(dtype=float), [direction])[:, 0]
    return [
        create_trial(
            value=float(value),
            params={name: _plain(line[name]) for name in distributions},
            distributions=distributions,
        )
        for value, (_, line) in zip(values, trials.iterrows(), strict=True)
    ]


def _shares(trials: Sequence[FrozenTrial], names: Sequence[str]) -> np.ndarray:
    study = optuna.create_study(direction="minimize")
    with warnings.catch_warnings():
        # A resample can hold a parameter value once, or best trials that all tie: its share is then unsure,
        # which is what the interval is there to show.
        warnings.simplefilter("ignore", UserWarning)
        study.add_trials(trials)
        evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(names))
    return np.array([found[name] for name in names])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
