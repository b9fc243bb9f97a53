"""The report of a sweep: `report.md` and a self-contained `report.html`, from its rows alone.

A report is a list of blocks, written once as Markdown and once as HTML. Several devices are several sections;
nothing is ever compared across them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.report import wording
from harness.report.crossover import crossover_table, crossovers
from harness.report.findings import findings
from harness.report.memory_formula import memory_formula
from harness.report.plots.draw import draw_plots
from harness.report.points import point_table
from harness.report.present import failure_table, headline_for_people, memory_formula_table, workload_table
from harness.report.render import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from harness.report.search.plots import PLOT_NAMES as _SEARCH_PLOTS
from harness.report.search.section import Section, search_section, search_sentences, searched_parts, split
from harness.report.summary import headline_table, summarise
from harness.store.frames import read_rows, read_samples
from harness.sweep.model import part_name

_PLOT_NAMES = (
    *("perplexity_vs_k", "throughput_vs_k", "memory_vs_k", "perplexity_memory_pareto"),
    *("throughput_vs_seq_len", "loss_vs_tokens", "loss_gap_vs_tokens"),
    *("ffn_step_time", "ffn_saved_bytes", "ffn_speedup", "batch_crossover"),
    *_SEARCH_PLOTS,
)


def write_report(results_dir: Path, device_name: str | None = None) -> list[Path]:
    """Write plots/*.png, report.md and report.html of a results folder; returns every file written.

    With `device_name` only that device's rows are reported, else every device gets a section. Plots of an
    earlier report that the rows no longer support are removed. Raises UserError if there are no rows, or
    none of that device.
    """
    rows = read_rows(results_dir)
    devices = [str(name) for name in dict.fromkeys(rows["device_name"].fillna("unknown device"))]
    if not devices:
        raise UserError(f"{results_dir}: no rows to report; `mocbench run` writes them")
    if device_name is not None:
        if device_name not in devices:
            raise UserError(f"{results_dir}: no rows of {device_name!r}; it has {', '.join(devices)}")
        devices = [device_name]
    rows = rows.assign(device_name=rows["device_name"].fillna("unknown device"))
    samples = read_samples(results_dir)
    environments = _environments(results_dir)
    command = wording.without_paths(_read(results_dir / "command.txt").strip())

    parts = searched_parts(results_dir)
    blocks: list[Block] = [Heading(1, f"Sweep {rows['sweep'].iloc[0]}")]
    if len(devices) > 1:
        blocks.append(Paragraph(f"{len(devices)} devices, a section each; numbers of two devices never mix."))
    pictures: list[Path] = []
    for device in devices:
        own = rows[rows["device_name"] == device]
        tail = "" if len(devices) == 1 else "-" + _slug(device)
        records = [environments[key] for key in dict.fromkeys(own["env_id"].dropna()) if key in environments]
        caption = _caption(own, records, command, device)
        blocks.append(Heading(2, device))
        searches, rest = split(parts, own)
        for search in searches:
            place = tail if len(searches) == 1 else f"-{_slug(part_name(search.part))}{tail}"
            found = search_section(search, results_dir, caption, place)
            blocks += _search_blocks(found)
            pictures += [plot.path for plot in found.plots]
        if not rest.empty:
            section, paths = _grid_section(rest, samples, caption, results_dir / "plots", tail)
            blocks += section
            pictures += paths
        if records:
            blocks += [Heading(3, "Environment"), Table(_environment_table(records))]
    sweep_file = _read(results_dir / "sweep.yaml")
    if sweep_file or command:
        blocks.append(Heading(2, "How it was run"))
    if command:
        blocks.append(Code(command, "sh"))
    if sweep_file:
        blocks.append(Code(wording.without_paths(sweep_file.rstrip()), "yaml"))
    _remove_stale(results_dir / "plots", pictures)
    markdown, page = results_dir / "report.md", results_dir / "report.html"
    markdown.write_text(to_markdown(blocks, results_dir), encoding="utf-8")
    page.write_text(to_html(blocks), encoding="utf-8")
    return [*pictures, markdown, page]


def conclusions(results_dir: Path) -> list[str]:
    """What the rows of a results folder show: of its searches, and of all that belongs to none."""
    rows, samples = read_rows(results_dir), read_samples(results_dir)
    parts = searched_parts(results_dir)
    said: list[str] = []
    left = rows
    for _, own in rows.groupby("device_name", sort=False, dropna=False) if parts else ():
        for search in split(parts, own)[0]:
            said += search_sentences(results_dir, search)
            theirs = (left["device_name"] == own["device_name"].iloc[0]) & left["point_key"].isin(search.keys)
            left = left[~theirs]
    return said + findings(left, samples)


def _search_blocks(section: Section) -> list[Block]:
    blocks: list[Block] = [Heading(3, section.heading), Bullets(section.sentences)]
    blocks += [Picture(plot.path, plot.title) for plot in section.plots]
    for heading, table, note in section.tables:
        blocks += [Heading(4, heading), Table(table)]
        if note:
            blocks.append(Paragraph(note))
    return blocks


def _grid_section(
    rows: pd.DataFrame, samples: pd.DataFrame, caption: str, folder: Path, tail: str
) -> tuple[list[Block], list[Path]]:
    points = point_table(rows, samples)
    summary = summarise(points)
    blocks: list[Block] = []
    sentences = findings(rows, samples)
    if sentences:
        blocks += [Heading(3, "What the numbers say"), Bullets(tuple(sentences))]
    headline = headline_table(rows)
    if not headline.empty:
        blocks += [Heading(3, "Headline"), Table(headline_for_people(headline))]
        blocks.append(Paragraph(_headline_note(headline)))
    plots = draw_plots(rows, samples, caption, folder, tail)
    if plots:
        blocks.append(Heading(3, "Plots"))
        blocks += [Picture(plot.path, plot.title) for plot in plots]
    for workload in dict.fromkeys(summary["workload"]) if not summary.empty else ():
        blocks.append(Heading(3, f"All points of {workload}"))
        blocks.append(Table(workload_table(summary[summary["workload"] == workload])))
    crossed = crossovers(rows)
    if not crossed.empty:
        blocks += [Heading(3, "Up to which batch it decodes faster"), Table(crossover_table(crossed))]
    checked = memory_formula(points)
    if not checked.empty:
        blocks.append(Heading(3, "Memory self-test"))
        blocks.append(
            Paragraph(
                "Peak of the whole model as it should be: dense peak minus what each FFN layer does not keep,"
                " times tokens and layers. The formula does not know transient memory at the peak."
            )
        )
        blocks.append(Table(memory_formula_table(checked)))
    failed = failure_table(points)
    if not failed.empty:
        blocks += [Heading(3, "Points without a result"), Table(failed)]
    return blocks, [plot.path for plot in plots]


def _headline_note(headline: pd.DataFrame) -> str:
    paired = wording.by_pairing(
        headline["paired"],
        every="Speed ratios are paired: rivals took turns in one process.",
        some="Speed ratios are paired, since rivals took turns in one process, except those marked unpaired:"
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


def _environments(results_dir: Path) -> dict[str, dict[str, Any]]:
    lines = _read(results_dir / "environments.jsonl").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return {str(record["env_id"]): record for record in records}


def _environment_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """A line per property, a column per environment; what is the same everywhere is said once."""
    names = list(dict.fromkeys(name for record in records for name in record))
    same = [name for name in names if len({str(record.get(name)) for record in records}) == 1]
    lines = []
    for name in names:
        values = [_plain(record.get(name)) for record in records]
        lines.append([name, values[0], *([""] * (len(records) - 1) if name in same else values[1:])])
    several = [f"environment {index + 1}" for index in range(len(records))]
    return pd.DataFrame(lines, columns=["", *(several if len(records) > 1 else ["value"])])


def _plain(value: object) -> str:
    return wording.DASH if value is None else str(value)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _remove_stale(folder: Path, written: list[Path]) -> None:
    """Remove plots this module once wrote and the rows no longer support; other files stay."""
    for path in folder.glob("*.png"):
        if path.stem.partition("-")[0] in _PLOT_NAMES and path not in written:
            path.unlink()
