"""The tables of one sweep that the report, its plots and its sentences share, each computed once."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from harness.report.crossover import crossovers, decoded
from harness.report.points import point_table
from harness.report.summary import summarise
from harness.store.frames import SAMPLE_COLUMNS


@dataclass(frozen=True)
class Tables:
    """What `tables_of` computes. Nothing may change a table in place.

    points: one line per point (`harness.report.points.point_table`).
    summary: one line per cell, method and selection (`harness.report.summary.summarise`).
    decoded: the lines of `summary` that compare the decoding speed of a sparse method with dense.
    crossovers: up to which batch each of those wins (`harness.report.crossover.crossovers`).
    samples: the raw samples behind the rows.
    """

    points: pd.DataFrame
    summary: pd.DataFrame
    decoded: pd.DataFrame
    crossovers: pd.DataFrame
    samples: pd.DataFrame


def tables_of(rows: pd.DataFrame, samples: pd.DataFrame | None = None) -> Tables:
    """Compute all tables of the current rows of a sweep.

    `rows` and `samples` are as `read_rows` and `read_samples` of `harness.store.frames` give them. With
    `samples` the interval of a loss gap is paired over the windows of the validation text.
    """
    known = pd.DataFrame(columns=list(SAMPLE_COLUMNS)) if samples is None else samples
    points = point_table(rows, known)
    summary = summarise(points)
    decodes = decoded(summary)
    return Tables(points, summary, decodes, crossovers(decodes), known)
