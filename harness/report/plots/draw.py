"""Draws every plot that the rows of one device support."""

from __future__ import annotations

from pathlib import Path

from harness.report import wording
from harness.report.plots.bars import ffn_plots
from harness.report.plots.crossover import crossover_plot
from harness.report.plots.curves import gap_over_tokens, loss_curves, loss_over_tokens
from harness.report.plots.over_k import against_k, pareto, scaling
from harness.report.plots.style import Plot
from harness.report.tables import Tables


def draw_plots(tables: Tables, caption: str, folder: Path, tail: str) -> list[Plot]:
    """Draw every plot that the tables of one device support into `folder/NAME{tail}.png`.

    `caption` says device, date and command.
    """
    points, summary = tables.points, tables.summary
    if summary.empty:
        return []

    def path(name: str) -> Path:
        return folder / f"{name}{tail}.png"

    plots: list[Plot | None] = []
    whole = summary[summary["workload"] == "pretrain"]
    if not whole.empty:
        seeds = points[points["measured"] & (points["workload"] == "pretrain")]
        curves = loss_curves(seeds, tables.samples)
        peak = str(whole["peak_metric"].iloc[0])
        name = wording.peak_name(peak)
        unit, scale = wording.byte_unit(whole["peak_bytes"].max() if whole["peak_bytes"].notna().any() else 1)
        plots = [
            against_k(whole, seeds, "perplexity", "validation perplexity", caption, path("perplexity_vs_k")),
            against_k(whole, seeds, "tokens_per_s", "tokens/s trained", caption, path("throughput_vs_k")),
            against_k(whole, seeds, peak, f"{name} ({unit})", caption, path("memory_vs_k"), scale=scale),
            pareto(whole, peak, f"{name} ({unit})", scale, caption, path("perplexity_memory_pareto")),
            scaling(whole, caption, path("throughput_vs_seq_len")),
            loss_over_tokens(whole, curves, caption, path("loss_vs_tokens")),
            gap_over_tokens(whole, curves, caption, path("loss_gap_vs_tokens")),
        ]
    plots += ffn_plots(summary[summary["workload"] == "ffn_train"], caption, folder, tail)
    plots.append(crossover_plot(tables, caption, path("batch_crossover")))
    return [plot for plot in plots if plot is not None]
