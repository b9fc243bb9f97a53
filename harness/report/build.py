"""The report of a sweep: `report.md` and a self-contained `report.html`, from its rows alone.

A report is a list of blocks, written once as Markdown and once as HTML. Several devices are several sections;
nothing is ever compared across them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.report import render, wording
from harness.report.crossover import crossover_table
from harness.report.findings import findings
from harness.report.memory_formula import memory_formula
from harness.report.plots.draw import draw_plots
from harness.report.plots.style import Subject, plot_subject
from harness.report.present import failure_table, headline_for_people, memory_formula_table, workload_table
from harness.report.render import Block, Bullets, Code, Heading, Paragraph, Picture, Table
from harness.report.search.section import Section, search_section, search_sentences, searched_parts, split
from harness.report.summary import headline_table
from harness.report.tables import Tables, tables_of
from harness.search.outcome import Search
from harness.store.files import read_environments
from harness.store.frames import read_rows, read_samples
from harness.sweep.model import part_name

_MEMORY_NOTE = (
    "Peak of the whole model as it should be: dense peak minus what each FFN layer does not keep,"
    " times tokens and layers. The formula does not know transient memory at the peak."
)


@dataclass(frozen=True)
class DeviceResults:
    """What a results folder holds of one device.

    `rows` are all current rows of the device, `searches` its searches, and `tables` are of the points that
    belong to no search.
    """

    name: str
    rows: pd.DataFrame
    searches: tuple[Search, ...]
    tables: Tables


@dataclass(frozen=True)
class Results:
    """A results folder as the report sees it, a `DeviceResults` per device.

    `problem` is a sentence that says why the sweep file could not be used; empty if there is no problem.
    """

    folder: Path
    devices: tuple[DeviceResults, ...]
    problem: str = ""


def read_results(folder: Path, device_name: str | None = None) -> Results:
    """Read a results folder and compute its tables, with `device_name` those of that device alone.

    Raises UserError if there are no rows, or none of that device.
    """
    rows = read_rows(folder)
    rows = rows.assign(device_name=rows["device_name"].fillna("unknown device").astype(str))
    names = list(dict.fromkeys(rows["device_name"]))
    if not names:
        raise UserError(f"{folder}: no rows to report; `mocbench run` writes them")
    if device_name is not None:
        if device_name not in names:
            raise UserError(f"{folder}: no rows of {device_name!r}; it has {', '.join(names)}")
        names = [device_name]
    samples = read_samples(folder)
    parts, problem = searched_parts(folder)
    devices = []
    for name in names:
        own = rows[rows["device_name"] == name]
        searches, rest = split(parts, own)
        devices.append(DeviceResults(name, own, tuple(searches), tables_of(rest, samples)))
    return Results(folder, tuple(devices), problem)


def write_report(results: Results) -> list[Path]:
    """Write plots/*.png, report.md and report.html into the results folder; returns every file written.

    Every device has a section. Plots of an earlier report that the rows no longer support are removed.
    """
    folder, devices = results.folder, results.devices
    environments = read_environments(folder)
    command = wording.without_paths(_read(folder / "command.txt").strip())
    blocks: list[Block] = [Heading(1, f"Sweep {devices[0].rows['sweep'].iloc[0]}")]
    if len(devices) > 1:
        blocks.append(Paragraph(f"{len(devices)} devices, a section each; numbers of two devices never mix."))
    if results.problem:
        blocks.append(Paragraph(results.problem))
    for device in devices:
        tail = "" if len(devices) == 1 else "-" + _slug(device.name)
        env_ids = device.rows["env_id"].dropna().unique()
        records = [environments[key] for key in env_ids if key in environments]
        caption = _caption(device.rows, records, command, device.name)
        blocks.append(Heading(2, device.name))
        for search in device.searches:
            place = tail if len(device.searches) == 1 else f"-{_slug(part_name(search.part))}{tail}"
            blocks += _search_blocks(search_section(search, folder, caption, place))
        blocks += _grid_blocks(device.tables, caption, folder / "plots", tail)
        if records:
            blocks += [Heading(3, "Environment"), Table(_environment_table(records))]
    blocks += _how_it_was_run(command, _read(folder / "sweep.yaml"))
    pictures = [block.path for block in blocks if isinstance(block, Picture)]
    _remove_stale(folder / "plots", pictures)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(render.to_markdown(blocks, folder), encoding="utf-8")
    page.write_text(render.to_html(blocks), encoding="utf-8")
    return [*pictures, markdown, page]


def conclusions(results: Results) -> list[str]:
    """What the rows show, device by device: of its searches, and of all points that belong to none."""
    sentences = [results.problem] if results.problem else []
    for device in results.devices:
        prefix = f"{device.name}: " if len(results.devices) > 1 else ""
        found = [item for search in device.searches for item in search_sentences(results.folder, search)]
        sentences += [prefix + sentence for sentence in (*found, *findings(device.tables))]
    return sentences


def _search_blocks(section: Section) -> list[Block]:
    blocks: list[Block] = [Heading(3, section.heading), Bullets(section.sentences)]
    blocks += [Picture(plot.path, plot.title) for plot in section.plots]
    for heading, table, note in section.tables:
        blocks += [Heading(4, heading), Table(table)]
        if note:
            blocks.append(Paragraph(note))
    return blocks


def _grid_blocks(tables: Tables, caption: str, folder: Path, tail: str) -> list[Block]:
    """Everything about the points of one device that belong to no search."""
    blocks: list[Block] = []
    sentences = findings(tables)
    if sentences:
        blocks += [Heading(3, "What the numbers say"), Bullets(tuple(sentences))]
    headline = headline_table(tables.summary)
    if not headline.empty:
        blocks += [Heading(3, "Headline"), Table(headline_for_people(headline))]
        blocks.append(Paragraph(_headline_note(headline)))
    plots = draw_plots(tables, caption, folder, tail)
    if plots:
        blocks.append(Heading(3, "Plots"))
        blocks += [Picture(plot.path, plot.title) for plot in plots]
    for workload, lines in tables.summary.groupby("workload", sort=False):
        blocks += [Heading(3, f"All points of {workload}"), Table(workload_table(lines))]
    if not tables.crossovers.empty:
        heading = Heading(3, "Up to which batch it decodes faster")
        blocks += [heading, Table(crossover_table(tables.crossovers))]
    checked = memory_formula(tables.points)
    if not checked.empty:
        blocks += [Heading(3, "Memory self-test"), Paragraph(_MEMORY_NOTE)]
        blocks.append(Table(memory_formula_table(checked)))
    failed = failure_table(tables.points)
    if not failed.empty:
        blocks += [Heading(3, "Points without a result"), Table(failed)]
    return blocks


def _how_it_was_run(command: str, sweep_file: str) -> list[Block]:
    blocks: list[Block] = [Heading(2, "How it was run")] if sweep_file or command else []
    if command:
        blocks.append(Code(command, "sh"))
    if sweep_file:
        blocks.append(Code(wording.without_paths(sweep_file.rstrip()), "yaml"))
    return blocks


def _headline_note(headline: pd.DataFrame) -> str:
    paired = wording.by_pairing(
        headline["paired"],
        every="Speed ratios are paired: the methods took turns in one process.",
        some="Speed ratios are paired (the methods took turns in one process), except those marked unpaired:"
        " the fastest dense method was measured later, and they are quotients of two runs' speeds.",
        none="Speed ratios are unpaired: each method ran in a process of its own.",
    )
    peak = wording.peak_name(str(headline["peak_metric"].iloc[0]))
    return (
        f"x best dense: speed against the fastest dense method of the same setting and seed. {paired} "
        f"Peak memory is the {peak}. Saved bytes are what one FFN layer keeps for its backward pass."
    )


def _caption(rows: pd.DataFrame, records: list[dict[str, Any]], command: str, device: str) -> str:
    """Device, date of the measurement, torch version and command; never a path of the machine."""
    dates = sorted({str(value)[:10] for value in rows["started_at"].dropna()})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "date unknown"
    versions = sorted({str(record["torch"]) for record in records if record.get("torch")})
    torch = f"torch {', '.join(versions)}" if versions else "torch version unknown"
    return " · ".join(part for part in (device, when, torch, command) if part)


def _environment_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per property and a column per environment; a value that all share is in the first one alone."""
    names = list(dict.fromkeys(name for record in records for name in record))
    same = [name for name in names if len({str(record.get(name)) for record in records}) == 1]
    lines = []
    for name in names:
        known = (record.get(name) for record in records)
        values = [wording.DASH if value is None else str(value) for value in known]
        lines.append([name, values[0], *([""] * (len(records) - 1) if name in same else values[1:])])
    several = [f"environment {index + 1}" for index in range(len(records))]
    return pd.DataFrame(lines, columns=["", *(several if len(records) > 1 else ["value"])])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _remove_stale(folder: Path, written: list[Path]) -> None:
    """Remove the plots of an earlier report that this one does not have; pictures without a subject stay."""
    for path in folder.glob("*.png"):
        if path not in written and plot_subject(path) not in (None, Subject()):
            path.unlink()
