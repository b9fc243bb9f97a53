"""`mocbench crossover`: the crossover table of one or more results folders, and its plot."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from harness.crossover import crossover_table, crossovers
from harness.errors import SpecError
from harness.plot_crossover import crossover_plot
from harness.store.frames import read_rows, read_samples
from harness.tables import point_table


def show(folders: list[Path], console: Console, plot: Path | None) -> None:
    """Print up to which batch each sparse method decodes faster, and draw it to `plot` if that is given.

    Folders are read together, so that the channels a batch needs, measured where a model was trained, stand
    beside speeds measured elsewhere. Raises SpecError for a folder without rows, rows without a batch to
    compare, and a plot of several devices.
    """
    for folder in folders:
        if not (folder / "rows.jsonl").exists() and not (folder / "rows.parquet").exists():
            raise SpecError(
                f"{folder}: has no rows; give a folder that `mocbench run` wrote, such as results/x"
            )
    rows = pd.concat([read_rows(folder) for folder in folders], ignore_index=True)
    samples = pd.concat([read_samples(folder) for folder in folders], ignore_index=True)
    found = crossovers(rows)
    if found.empty:
        raise SpecError(
            f"{', '.join(map(str, folders))}: no sparse method was decoded at two batches or more beside a"
            " dense one; sweeps/ffn_decode_h100.yaml and sweeps/generate_h100.yaml do that"
        )
    shown = crossover_table(found)
    table = Table(*shown.columns)
    for line in shown.itertuples(index=False):
        table.add_row(*map(str, line))
    console.print(table)
    if plot is None:
        return
    devices = list(dict.fromkeys(found["device_name"]))
    if len(devices) > 1:
        raise SpecError(f"--plot: the rows are of {', '.join(devices)}; a plot shows one device")
    own = rows[rows["workload"].isin(["ffn_decode", "generate"])]
    dates = sorted({str(value)[:10] for value in own["started_at"].dropna()})
    names = " ".join(folder.resolve().name for folder in folders)
    caption = " · ".join(
        [devices[0], " to ".join(dict.fromkeys((dates[0], dates[-1]))), f"crossover {names}"]
    )
    drawn = crossover_plot(rows, point_table(rows), samples, caption, plot)
    if drawn is not None:
        console.print(f"wrote {drawn.path}", highlight=False, soft_wrap=True)
