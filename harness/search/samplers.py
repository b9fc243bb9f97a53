"""The space of a study, which point a search tries next, and which training it gives up: Optuna's side of it.

Settings were chosen on a surface whose front is known (`tests/harness/test_optimize_front.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers.nsgaii import BLXAlphaCrossover

from harness.search import quiet
from harness.sweep.catalog import FIELD, AxisValue
from harness.sweep.model import Optimize, Part, Range
from harness.sweep.point import Point

# Where trainings are compared, in percent of their tokens: the evaluations before the last one.
RUNGS = (25, 50, 75)


def space(part: Part, points: Sequence[Point]) -> dict[str, BaseDistribution]:
    """The parameter space: the axes of a search, or what varies over the `points` of a grid."""
    if part.mode == "optimize":
        return {name: _distribution(name, axis) for name, axis in part.axes.items()}
    found: dict[str, list[Any]] = {}
    names = [name for name in part.axes if name != "k_frac"] + ["method", "selection"]
    if len(part.seeds) > 1:
        names.append("seed")
    for name in dict.fromkeys(names):
        for point in points:
            value = point.tokens if name == "tokens" else getattr(point, name)
            choice = "none" if value is None else value
            if choice not in found.setdefault(name, []):
                found[name].append(choice)
    return {name: CategoricalDistribution(choices) for name, choices in found.items()}


def _distribution(name: str, axis: list[AxisValue] | Range) -> BaseDistribution:
    if isinstance(axis, list):
        return CategoricalDistribution(axis)
    if FIELD[name].type is int:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def population_size(n_trials: int) -> int:
    """Trials in a generation of NSGA-II: some fifteen generations, as the first alone is a random search."""
    return min(50, max(4, n_trials // 15))


def make_sampler(search: Optimize, trial: int) -> BaseSampler:
    """The sampler of one trial of a search, its seed a hash of the sweep's seed and the trial's number.

    A seed per process would repeat itself: workers that share one, and a run that is taken up again, draw the
    same first points. A trial's number is unique in a study whoever takes it.
    """
    seed = int.from_bytes(hashlib.sha256(f"{search.seed}/{trial}".encode()).digest()[:4], "big")
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    with quiet():
        if search.sampler == "nsga2":
            # Swapping parents' values alone finds no new value of a continuous axis; blending does.
            size = population_size(search.n_trials)
            return NSGAIISampler(seed=seed, population_size=size, crossover=BLXAlphaCrossover())
        startup = max(2, min(10, search.n_trials // 3))
        # Running trials count as bad ones, so that workers do not all propose the same.
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup)


def make_pruner(search: Optimize | None) -> BasePruner:
    """The pruner a sweep asks for; its steps are percent of a training's tokens."""
    if search is None or search.pruner == "none":
        return NopPruner()
    if search.pruner == "median":
        # Before half-time a learning rate that is best in the end can look bad.
        startup = max(3, min(5, search.n_trials // 4))
        return MedianPruner(n_startup_trials=startup, n_warmup_steps=RUNGS[1], n_min_trials=3)
    return HyperbandPruner(min_resource=RUNGS[0], max_resource=100, reduction_factor=2)


def generation_attributes(search: Optimize, index: int) -> dict[str, Any]:
    """The attributes NSGA-II keeps on trial number `index`, for a study made again from rows.

    Without it the trials would breed no others; if Optuna gave it another name, the search would begin with
    a random generation again and lose nothing else.
    """
    if search.sampler != "nsga2":
        return {}
    return {"NSGAIISampler:generation": index // population_size(search.n_trials)}
