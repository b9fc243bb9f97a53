"""What a `mode: optimize` part must satisfy beyond its fields; every mistake is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.metrics import METRICS
from harness.spec import Optimize, Part, Range, SpecError, near_miss

# What a training tells while it runs, so that a pruner can judge it before its end.
PRUNABLE = ("eval_loss_nats", "perplexity", "bits_per_byte")


def check_search(where: str, part: Part, search: Optimize) -> None:
    """Raise SpecError, its line beginning with `where`, for a search that cannot be run."""
    for index, objective in enumerate(search.objectives):
        place = f"{where}optimize.objectives[{index}].metric"
        if objective.metric not in METRICS:
            raise SpecError(f"{place} is {objective.metric!r}{near_miss(objective.metric, METRICS)}")
        if objective.metric in [other.metric for other in search.objectives[:index]]:
            raise SpecError(f"{place} is {objective.metric!r} a second time; name each objective once")
    for name in search.constraints:
        if name not in METRICS:
            raise SpecError(f"{where}optimize.constraints.{name} is not a metric{near_miss(name, METRICS)}")
    if part.exclude:
        raise SpecError(f"{where}exclude is for grids; narrow the axes of an optimisation instead")
    if not any(isinstance(axis, Range) or len(set(axis)) > 1 for axis in part.axes.values()):
        raise SpecError(f"{where}axes hold one value each; an optimisation needs something to vary")
    if len(set(part.seeds)) < len(part.seeds):
        raise SpecError(f"{where}seeds has a seed twice; give each once")
    _check_baseline(where, search)
    _check_pruner(where, part, search)
    if part.workload == "pretrain":
        _check_steps(where, part)


def _check_baseline(where: str, search: Optimize) -> None:
    from moc.methods import METHODS

    dense = [name for name, method in METHODS.items() if method.is_dense]
    if search.baseline not in dense:
        raise SpecError(
            f"{where}optimize.baseline is {search.baseline!r}, not a dense method"
            f"{near_miss(search.baseline, dense)}"
        )


def _check_pruner(where: str, part: Part, search: Optimize) -> None:
    if search.pruner == "none":
        return
    place = f"{where}optimize.pruner is {search.pruner!r}"
    if len(search.objectives) > 1:
        raise SpecError(
            f"{place} with {len(search.objectives)} objectives; only a study with one objective can prune"
        )
    if part.workload != "pretrain" or search.objectives[0].metric not in PRUNABLE:
        raise SpecError(
            f"{place}, but {search.objectives[0].metric} of {part.workload} is known only at the end;"
            f" pretrain with one of {', '.join(PRUNABLE)} can prune"
        )


def _check_steps(where: str, part: Part) -> None:
    """Every corner of the space must leave a training its least number of steps."""
    from harness.training import MIN_STEPS

    per_step = _bound(part, "tokens", max) or _bound(part, "batch", max) * _bound(part, "seq_len", max)
    budget = _bound(part, "train_tokens", min)
    if budget < MIN_STEPS * per_step:
        raise SpecError(
            f"{where}axes reach {per_step:,} tokens a step, but train_tokens {budget:,} is less than the"
            f" {MIN_STEPS} steps a training needs; lower batch or seq_len, or raise train_tokens"
        )


def _bound(part: Part, name: str, choose: Callable[[Iterable[float]], float]) -> int:
    """The largest or smallest value that an axis or fixed field can take; 0 if it has none."""
    axis = part.axes.get(name, [part.fixed[name]] if name in part.fixed else [0])
    values = [axis.low, axis.high] if isinstance(axis, Range) else [float(value) for value in axis]
    return int(choose(values))
