"""A made-up measurement with a known front, and what tests of the search share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage
from rows import rows_of

from harness.search.proposals import Proposal, SearchStudy
from harness.sweep.load import parse_sweep
from harness.sweep.model import Sweep
from harness.sweep.point import Point
from moc.selection import parse_selection

# Three axes, two objectives. The front is known: batch 8, lr 1e-3, and any K.
TRADE_OFF = """\
version: 1
name: tuned
workload: pretrain
mode: optimize
axes:
  k_frac: {low: 0.05, high: 0.5}
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  batch: [4, 8, 16]
  method: [moc_reference]
fixed: {preset: 1m, seq_len: 64, train_tokens: 8192, eval_tokens: 1024, vocab_size: 512, dtype: fp32}
optimize:
  sampler: tpe
  n_trials: 60
  objectives: [{metric: perplexity, direction: minimize}, {metric: tokens_per_s, direction: maximize}]
"""
K_LOW, K_HIGH = 0.05, 0.5

Measure = Callable[[Point], list[dict[str, Any]]]


def k_frac(point: Point) -> float:
    """K of a point as a fraction; 1 for dense."""
    return parse_selection(point.selection).k_frac(point.d_ffn) if point.selection else 1.0


def perplexity(k: float, lr: float, batch: int) -> float:
    """Best at K = 0.5, lr = 1e-3 and a small batch."""
    return 20 + 50 * (0.5 - k) ** 2 + 5 * math.log10(lr / 1e-3) ** 2 + (3 if batch == 16 else 0)


def speed(k: float, batch: int) -> float:
    """Falls with K; a batch of 4 is slower."""
    return 1000 * (1.5 - k) * (0.7 if batch == 4 else 1.0)


def trade_off(point: Point) -> list[dict[str, Any]]:
    """The rows of a point on the surface."""
    assert point.lr is not None
    k = min(k_frac(point), K_HIGH)
    values = {
        "perplexity": perplexity(k, point.lr, point.batch),
        "peak_rss_over_start_bytes": 1e6 * point.batch,
        "tokens_per_s": speed(k, point.batch),
    }
    return rows_of(point, values)


def open_search(text: str = TRADE_OFF, storage: BaseStorage | None = None) -> tuple[SearchStudy, Sweep]:
    """The search of a sweep's only part, in memory unless a storage is given."""
    sweep = parse_sweep(text, "s.yaml")
    return SearchStudy(sweep, sweep.parts[0], storage or InMemoryStorage(), "cpu"), sweep


def answer(
    study: SearchStudy,
    proposal: Proposal,
    measure: Measure = trade_off,
    rows: dict[str, list[dict[str, Any]]] | None = None,
) -> str:
    """Measure a proposal and settle it; what was measured is added to `rows`."""
    known = {} if rows is None else rows
    for point in (*proposal.baselines, *proposal.points):
        known.setdefault(point.key, measure(point))
    return study.settle(proposal, known)


def search_all(text: str = TRADE_OFF, measure: Measure = trade_off) -> tuple[SearchStudy, list[Point]]:
    """Run a search to its end; returns the study and the point of each trial."""
    study, _ = open_search(text)
    points = []
    while (proposal := study.propose()) is not None:
        answer(study, proposal, measure)
        points.append(proposal.points[0])
    return study, points
