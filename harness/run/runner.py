"""Runs a sweep: measures the missing points and exports the tables.

Any number of processes may run or work on one sweep at once. Each goes through the missing points, leases
those it measures, and returns to those that others hold until they are measured or the others are gone.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from harness.run.local import LocalRun
from harness.run.options import RunOptions, Summary
from harness.run.plan import grid_points
from harness.run.ray import run_on_ray
from harness.run.shared import open_shared
from harness.run.text import prepare_data
from harness.search.mirror import Mirror
from harness.store.files import RowStore, Store, copy_rows
from harness.store.folders import results_folder
from harness.store.frames import export
from harness.store.leases import Claims
from harness.sweep.model import Sweep, sweep_text


def run_sweep(sweep: Sweep, options: RunOptions, console: Console) -> Summary:
    """Measure every missing point of a sweep and write its tables under `options.results / sweep.name`.

    Raises UserError if the sweep cannot be started, OSError if rows cannot be written.
    """
    folder = results_folder(options.results, sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    data_ids = prepare_data(sweep, lambda text: console.print(text, highlight=False))
    (folder / "sweep.yaml").write_text(sweep_text(sweep), encoding="utf-8")
    (folder / "command.txt").write_text(options.command + "\n", encoding="utf-8")
    shared = open_shared(folder, sweep.name, options.storage)
    if options.storage is not None:
        copy_rows(Store(folder), shared.store)  # what was measured here before is not measured again
    claims = Claims(shared.book)
    try:
        mirror = Mirror(
            sweep, grid_points(sweep, data_ids), shared.store, shared.storage, claims, options.device
        )
        if options.executor == "ray":
            return _run_on_ray(sweep, options, folder, shared.store, mirror, console)
        return LocalRun(sweep, options, folder, data_ids, shared, claims, console).run(mirror.update)
    finally:
        claims.close()
        if options.storage is not None:
            copy_rows(shared.store, Store(folder))
        if (folder / "rows.jsonl").exists():
            export(folder)


def _run_on_ray(
    sweep: Sweep, options: RunOptions, folder: Path, store: RowStore, mirror: Mirror, console: Console
) -> Summary:
    before = store.finished()
    run_on_ray(sweep, options, console, mirror.update)
    mirror.update()
    after = store.finished()
    summary = Summary(folder, total=len(after), already_done=len(before))
    for at, status in after.items():
        if before.get(at) != status:
            summary.count(status)
    return summary
