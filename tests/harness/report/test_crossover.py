"""The crossover: up to which batch a sparse method decodes faster, and the channels a batch needs."""

import math
from pathlib import Path

import pandas as pd
import pytest
from rows import CPU, around, frame, point
from typer.testing import CliRunner

from harness.cli import app, crossover
from harness.errors import UserError
from harness.report.build import read_results, write_report
from harness.report.crossover import crossover_table, independent_union
from harness.report.plots.crossover import crossover_plot, union_curves
from harness.report.points import point_table
from harness.report.tables import tables_of
from harness.store.files import Store

TOPK = "topk:0.1875"


def decoding(
    ratios: dict[int, float],
    rule: str = TOPK,
    method: str = "moc",
    workload: str = "ffn_decode",
    half: float = 0.01,
    **more: object,
) -> list[list[dict]]:
    """Points of dense and of one sparse method at these batches."""
    length = 1 if workload == "ffn_decode" else 128
    time = "latency_us" if workload == "ffn_decode" else "latency_ms"
    found = []
    for batch, ratio in ratios.items():
        options = {"workload": workload, "preset": "1b", "seq_len": length, "tokens": batch * length, **more}
        dense = {time: 100.0, "tokens_per_s": batch * 1e4, "speedup_vs_best_dense": 1.0}
        sparse = {time: 100 / ratio, "tokens_per_s": batch * 1e4 * ratio}
        found.append(point("dense_compiled", None, dense, **options))
        found.append(point(method, rule, {**sparse, "speedup_vs_best_dense": around(ratio, half)}, **options))
    return found


def unions(preset: str, rule: str, curve: list[float]) -> tuple[list[dict], pd.DataFrame]:
    """A trained model's point and the samples of its union."""
    rows = point("moc", rule, {"tokens_per_s": 1e5, "union_share": curve[-1]}, preset=preset)
    key = rows[0]["point_key"]
    samples = [
        {"run_id": "run", "point_key": key, "metric": "union_share", "x": float(at + 1), "value": value}
        for at, value in enumerate(curve)
    ]
    return rows, pd.DataFrame(samples)


def only(rows: pd.DataFrame) -> pd.Series:
    found = tables_of(rows).crossovers
    assert len(found) == 1
    return found.iloc[0]


def test_the_last_batch_that_wins_is_named() -> None:
    """It wins up to batch 4, and on the way to batch 8 the ratio falls through one."""
    line = only(frame(*decoding({1: 2.0, 2: 1.5, 4: 1.2, 8: 0.9, 16: 0.6})))
    assert (line["wins_to"], line["smallest"], line["largest"]) == (4, 1, 16)
    assert line["crossing"] == pytest.approx(4 * 2 ** (math.log(1.2) / math.log(1.2 / 0.9)))
    assert (line["x_smallest"], line["x_largest"]) == (2.0, 0.6)


@pytest.mark.parametrize(
    ("ratios", "wins", "crossing"),
    [
        ({1: 0.9, 2: 0.8}, None, None),
        ({1: 2.0, 2: 1.8}, 2, None),
        ({1: 1.5, 2: 1.005, 4: 0.5}, 1, True),  # at 2 the interval holds 1.0
        ({1: 0.9, 2: 1.2, 4: 0.9}, None, True),  # a win after a loss is no "up to"
    ],
    ids=["never", "always", "unclear", "later"],
)
def test_winning_means_the_whole_interval_and_every_smaller_batch(
    ratios: dict[int, float], wins: int | None, crossing: bool | None
) -> None:
    """A ratio counts as a win with its interval, and "up to" breaks at the first batch without one."""
    line = only(frame(*decoding(ratios)))
    assert (line["wins_to"] == wins) if wins else math.isnan(line["wins_to"])
    assert math.isnan(line["crossing"]) == (crossing is None)


def test_lines_are_apart_by_workload_length_rule_and_device() -> None:
    """What is not one curve over the batch is another line; one batch alone is none."""
    rows = frame(
        *decoding({1: 2.0, 2: 0.9}),
        *decoding({1: 2.0, 2: 0.9}, "nm:2:8"),
        *decoding({1: 2.0, 2: 0.9}, device=CPU),
        *decoding({1: 1.3, 2: 1.1}, workload="generate"),
        *decoding({1: 1.3}, "nm:12:64", workload="generate"),
    )
    found = tables_of(rows).crossovers
    assert len(found) == 4
    assert set(found["workload"]) == {"ffn_decode", "generate"}
    assert tables_of(frame()).crossovers.empty


def test_the_table_says_it_in_words() -> None:
    """None, a batch, or all that were measured; one device and dtype have no column."""
    rows = frame(
        *decoding({1: 2.0, 2: 0.9}),
        *decoding({1: 0.9, 2: 0.8}, "nm:2:8"),
        *decoding({1: 1.3, 2: 1.1}, workload="generate"),
    )
    table = crossover_table(tables_of(rows).crossovers).set_index(["workload", "selection"])
    assert table.loc[("ffn_decode", TOPK), "wins up to batch"] == "1"
    assert table.loc[("ffn_decode", "nm:2:8"), "wins up to batch"] == "none"
    assert table.loc[("generate", TOPK), "wins up to batch"] == "2 (all measured)"
    assert table.loc[("generate", TOPK), "x at smallest batch"] == "1.30x (1)"
    assert not {"device", "dtype"} & set(table.columns)


def test_independent_choices_fill_up() -> None:
    """One token needs K; of two, the second finds a share K of its channels there already."""
    assert independent_union(0.1875, 1) == pytest.approx(0.1875)
    assert independent_union(0.25, 2) == pytest.approx(0.25 + 0.75 * 0.25)
    assert independent_union(0.25, 16) == pytest.approx(1 - 0.75**16)


def test_measured_unions_are_means_over_models() -> None:
    """Two seeds of one model and rule are one curve, their mean; a run measured again counts once."""
    first, one = unions("60m", TOPK, [0.2, 0.3])
    second, other = unions("60m", "topk:0.25", [0.25, 0.4])
    stale = one.assign(run_id="old", value=0.9)
    points = point_table(frame(first, second))
    found = union_curves(points, pd.concat([stale, one, other])).set_index(["selection", "x"])["value"]
    assert found[TOPK, 2.0] == pytest.approx(0.3)
    assert found["topk:0.25", 1.0] == pytest.approx(0.25)
    assert union_curves(points, pd.DataFrame()).empty


def test_the_plot_says_up_to_where_it_wins(tmp_path: Path) -> None:
    """The title names the crossover of the lead series, and a measured union is in the note's words."""
    model, samples = unions("60m", TOPK, [0.19, 0.33, 0.4, 0.5])
    rows = frame(*decoding({1: 2.0, 2: 1.5, 4: 0.8}), model)
    drawn = crossover_plot(tables_of(rows, samples), "made up", tmp_path / "x.png")
    assert drawn is not None
    assert drawn.title == "moc topk beats the fastest dense decoding up to batch 2 with one FFN"
    assert drawn.path.stat().st_size > 20_000
    rows = frame(*decoding({4: 0.8}))
    assert crossover_plot(tables_of(rows, samples), "made up", tmp_path / "y.png") is None


def stored(folder: Path, *points: list[dict]) -> Path:
    store = Store(folder)
    for rows in points:
        store.append(rows)
    return folder


def test_the_report_holds_table_and_plot(tmp_path: Path) -> None:
    """A sweep that decodes several batches has the crossover in its report; another one has not."""
    folder = stored(tmp_path / "r", *decoding({1: 2.0, 2: 1.5, 4: 0.8}))
    written = {path.name for path in write_report(read_results(folder))}
    assert "batch_crossover.png" in written
    assert "Up to which batch it decodes faster" in (folder / "report.md").read_text(encoding="utf-8")
    single = stored(tmp_path / "s", *decoding({1: 2.0}))
    assert "batch_crossover.png" not in {path.name for path in write_report(read_results(single))}


def test_the_verb_reads_folders_together(tmp_path: Path) -> None:
    """`mocbench crossover A B --plot P` prints one table of both and draws it."""
    one = stored(tmp_path / "a", *decoding({1: 2.0, 2: 0.9}))
    two = stored(tmp_path / "b", *decoding({1: 1.3, 2: 1.1}, workload="generate"))
    result = CliRunner().invoke(app, ["crossover", str(one), str(two), "--plot", str(tmp_path / "p.png")])
    assert result.exit_code == 0, result.output
    assert "2 (all measured)" in result.output
    assert "ffn_decode" in result.output
    assert (tmp_path / "p.png").exists()


def test_a_report_keeps_the_plot_of_several_folders(tmp_path: Path) -> None:
    """A plot of the verb in the folder of a report's own plots is there after the next report."""
    folder = stored(tmp_path / "a", *decoding({1: 2.0, 2: 0.9}))
    write_report(read_results(folder))
    plot = folder / "plots/crossover.png"
    assert CliRunner().invoke(app, ["crossover", str(folder), "--plot", str(plot)]).exit_code == 0
    write_report(read_results(folder))
    assert plot.exists()


def test_the_verb_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    """No rows, nothing to compare, and a plot of two devices are one line each."""
    with pytest.raises(UserError, match="has no rows; give a folder"):
        crossover([tmp_path / "nothing"])
    single = stored(tmp_path / "s", *decoding({1: 2.0}))
    with pytest.raises(UserError, match="no sparse method was decoded at two batches"):
        crossover([single])
    both = stored(tmp_path / "d", *decoding({1: 2.0, 2: 0.9}), *decoding({1: 2.0, 2: 0.9}, device=CPU))
    with pytest.raises(UserError, match="a plot shows one device"):
        crossover([both], tmp_path / "p.png")
