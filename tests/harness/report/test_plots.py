"""Plots: which are drawn, that they show the rows as they are, and that nothing overlaps or is cut off."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from PIL import Image
from rows import CPU, around, curves, frame, gpu_rows, point, quality, quick_rows

from harness.report.plots.draw import draw_plots
from harness.report.plots.style import Board, Look, Mark, Plot, look
from harness.report.tables import tables_of
from moc.methods import METHODS

CAPTION = "Example GPU 80GB · 2026-11-24 · torch 2.11.0 · mocbench run sweeps/made_up.yaml"
OVER_K = {"perplexity_vs_k", "throughput_vs_k", "memory_vs_k", "perplexity_memory_pareto"}
CURVES = {"loss_vs_tokens", "loss_gap_vs_tokens"}
FFN = {"ffn_step_time", "ffn_saved_bytes", "ffn_speedup"}


Drawn = tuple[dict[str, Plot], dict[str, Board]]


@contextlib.contextmanager
def kept_boards() -> Iterator[dict[str, Board]]:
    """The figure of every plot saved inside the context, by the plot's name."""
    seen: dict[str, Board] = {}
    save = Board.save

    def keep(self: Board, path: Path, *args: Any, **kwargs: Any) -> Plot:
        seen[path.stem] = self
        return save(self, path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "save", keep)
        yield seen


@pytest.fixture
def boards() -> Iterator[dict[str, Board]]:
    """The figures a test draws itself."""
    with kept_boards() as seen:
        yield seen


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Plots and figures of the sweep of a machine without a GPU."""
    with kept_boards() as seen:
        return draw(quick_rows(), tmp_path_factory.mktemp("quick"), curves(quick_rows())), seen


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Plots and figures of the first sweep on a GPU."""
    with kept_boards() as seen:
        return draw(gpu_rows(), tmp_path_factory.mktemp("gpu"), curves(gpu_rows())), seen


def draw(rows: pd.DataFrame, folder: Path, samples: pd.DataFrame | None = None) -> dict[str, Plot]:
    """The plots of some rows by name."""
    return {plot.name: plot for plot in draw_plots(tables_of(rows, samples), CAPTION, folder, "")}


def panel(board: Board, title: str) -> Axes:
    """The panel with this title."""
    return next(axes for axes in board.axes if axes.get_title() == title)


def marks_of(axes: Axes, style: Look) -> list[tuple[float, float]]:
    """Data points drawn with the marker and colour of a series."""
    return [
        (float(x), float(y))
        for line in axes.get_lines()
        if line.get_marker() == style.marker and line.get_color() == style.color
        for x, y in zip(*line.get_data(), strict=True)
    ]


def assert_nothing_is_cut_or_covered(name: str, board: Board) -> None:
    """Every text lies inside the figure, and no two titles, legends, axis names or captions overlap."""
    figure = board.figure
    figure.draw_without_rendering()
    texts = [item for item in figure.texts if item.get_text()]
    texts += [axes.title for axes in board.axes]
    boxes = [(item.get_text(), item.get_window_extent()) for item in texts]
    boxes += [("legend", item.get_window_extent()) for item in figure.legends]
    for axes in board.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        low, high = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        shown = [
            item
            for item in ticks
            if item.get_text()
            and item.get_visible()
            and (low[0] <= item.get_position()[0] <= low[1] or item in axes.get_yticklabels())
            and (high[0] <= item.get_position()[1] <= high[1] or item in axes.get_xticklabels())
        ]
        boxes += [(item.get_text(), item.get_window_extent()) for item in shown]
        boxes += [(item.get_text(), item.get_window_extent()) for item in axes.texts]
    for words, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{name}: {words!r} is cut off"
    for (words, box), (other_words, other) in itertools.combinations(boxes, 2):
        shared_x = min(box.x1, other.x1) - max(box.x0, other.x0)
        shared_y = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert shared_x <= 1 or shared_y <= 1, f"{name}: {words!r} covers {other_words!r}"


@pytest.mark.parametrize("sweep", ["quick", "gpu"])
def test_every_supported_plot_is_a_picture(sweep: str, request: pytest.FixtureRequest) -> None:
    """Both first sweeps give all their plots: PNGs with content, 1350 pixels wide, nothing cut or covered."""
    plots, boards = request.getfixturevalue(sweep)
    expected = OVER_K | CURVES | {"throughput_vs_seq_len"} | (FFN if sweep == "gpu" else set())
    assert set(plots) == expected
    for name, plot in plots.items():
        assert plot.path.name == f"{name}.png"
        with Image.open(plot.path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width == 1350
            pixels = np.asarray(image.convert("L"))
        assert (pixels < 128).mean() > 0.002
        assert pixels.std() > 10
        assert_nothing_is_cut_or_covered(name, boards[name])


def test_long_names_and_many_panels_still_fit(tmp_path: Path, boards: dict[str, Board]) -> None:
    """A rival's long name, nine settings and misaligned shapes neither overlap nor leave the figure."""
    points = []
    for preset, place in itertools.product(("60m", "130m", "paper-1b"), (1, 4, 16)):
        for method, rule, rate in (
            ("dense", None, 1e5),
            ("dense_compiled", None, 3e5),
            ("moc_reference", "topk:0.1875", 1e5),
            ("moc_reference", "nm:12:64", 0.9e5),
            ("package.rivals:a_rather_long_factory_name", None, 2e5),
        ):
            metrics = {"tokens_per_s": around(rate, 0.02), "peak_allocated_bytes": 9e9, **quality(3.3)}
            points.append(point(method, rule, metrics, preset=preset, seq_len=256 * place, tokens=65536))
            ffn = {"step_ms": 1e5 / rate, "speedup_vs_best_dense": around(rate / 3e5, 0.02)}
            size = 4096 * place
            points.append(point(method, rule, ffn, workload="ffn_train", preset=preset, tokens=size))
    draw(frame(*points), tmp_path)
    assert len(boards["perplexity_vs_k"].axes) == 9
    for name, board in boards.items():
        assert_nothing_is_cut_or_covered(name, board)


def test_titles_say_the_computed_figure(gpu: Drawn) -> None:
    """The messages carry the ratio, the memory change and the quality change of the lead series."""
    plots, _ = gpu
    start = "At K = 18.75 %, moc_reference topk"
    assert plots["throughput_vs_k"].title == f"{start} trains at 0.33x the speed of the fastest dense method"
    assert plots["perplexity_vs_k"].title == f"{start} differs from dense by −1.0 % in perplexity"
    assert plots["memory_vs_k"].title.startswith(f"{start}'s peak memory is 20 % above dense_compiled")
    assert plots["perplexity_memory_pareto"].title.endswith("on the perplexity-memory front in both panels")
    assert plots["loss_vs_tokens"].title.startswith("Validation loss falls from 10.40 to 4.42–4.52 nats")
    assert plots["loss_gap_vs_tokens"].title.endswith("and −0.010 nats at the end")
    assert plots["ffn_step_time"].title == "dense_compiled has the fastest FFN training step at every shape"
    assert plots["ffn_speedup"].title.endswith("the best other method reaches 0.39x to 0.59x")
    assert "101 to 103 % above dense_recompute" in plots["ffn_saved_bytes"].title


def test_marks_stand_at_the_measured_values(quick: Drawn) -> None:
    """Perplexity over K: sparse marks at K and value, the dense line at its value with its band."""
    rows = quick_rows()
    axes = panel(quick[1]["perplexity_vs_k"], "4m, seq 128")
    chosen = rows[(rows["preset"] == "4m") & (rows["seq_len"] == 128) & (rows["metric"] == "perplexity")]
    by_rule = chosen.set_index(chosen["selection"].fillna("dense"))
    drawn = dict(marks_of(axes, look("moc_reference", "topk", dense=False)))
    assert drawn[12.5] == pytest.approx(by_rule.loc["topk:0.125", "value"])
    assert drawn[18.75] == pytest.approx(by_rule.loc["topk:0.1875", "value"])
    levels = [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert by_rule.loc["dense", "value"] in levels
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert band.y0 == pytest.approx(by_rule.loc["dense", "ci_low"])
    assert band.y1 == pytest.approx(by_rule.loc["dense", "ci_high"])


def test_rules_of_equal_k_stand_side_by_side(quick: Drawn) -> None:
    """topk at 25 % and 2:8 are moved apart around 25, symmetrically; a K of one rule is not moved."""
    axes = panel(quick[1]["throughput_vs_k"], "1m, seq 512")
    topk = [x for x, _ in marks_of(axes, look("moc_reference", "topk", dense=False))]
    local = [x for x, _ in marks_of(axes, look("moc_reference", "nm:2:8", dense=False))]
    assert max(topk) < 25 < min(local)
    assert max(topk) + min(local) == pytest.approx(50)


def test_amounts_start_at_zero(gpu: Drawn) -> None:
    """Speed, memory and bars are drawn from zero, so lengths read as ratios."""
    _, boards = gpu
    for name in ("throughput_vs_k", "memory_vs_k", "throughput_vs_seq_len"):
        assert all(axes.get_ylim()[0] == 0 for axes in boards[name].axes)
    for name in ("ffn_step_time", "ffn_saved_bytes"):
        for axes in boards[name].axes:
            assert axes.get_xlim()[0] == 0
            assert all(patch.get_x() == 0 for patch in axes.patches)


def test_speedups_have_a_line_at_one(gpu: Drawn) -> None:
    """Every speed-up panel shows 1.0 inside its range, and each ratio with its interval."""
    _, boards = gpu
    for axes in boards["ffn_speedup"].axes:
        low, high = axes.get_xlim()
        assert low < 1.0 < high
        assert any(list(line.get_xdata()) == [1.0, 1.0] for line in axes.get_lines())
    first = boards["ffn_speedup"].axes[0]
    ratio = 1.97 / 5.1
    assert [ratio * 0.994, ratio * 1.006] in [pytest.approx(line.get_xdata()) for line in first.get_lines()]


def test_memory_axis_says_which_memory(quick: Drawn, gpu: Drawn) -> None:
    """The axis names the allocator's peak on CUDA and the resident set on a CPU, with the unit."""
    on_gpu, on_cpu = ([t.get_text() for t in made["memory_vs_k"].figure.texts] for _, made in (gpu, quick))
    assert "peak allocated memory (GiB)" in on_gpu
    assert "peak resident memory over start (MiB)" in on_cpu


def test_single_seeds_are_drawn_beside_their_mean(tmp_path: Path, boards: dict[str, Board]) -> None:
    """With three seeds each point has its mean and three small marks at the same K."""
    draw(quick_rows(3), tmp_path)
    axes = panel(boards["perplexity_vs_k"], "1m, seq 128")
    at_k = [y for x, y in marks_of(axes, look("moc_reference", "topk", dense=False)) if x == 18.75]
    assert len(at_k) == 4
    assert np.mean(sorted(at_k)) == pytest.approx(at_k[0])


@pytest.mark.parametrize(
    ("third", "told"), [(-0.04, "differs from dense by −4.9 %"), (0.01, "no difference")]
)
def test_titles_over_seeds_speak_of_the_mean(third: float, told: str, tmp_path: Path) -> None:
    """Gaps of -0.06, -0.05 and a third: titles name the mean, and a difference only beyond the scatter."""
    points = []
    for seed, gap in enumerate((-0.06, -0.05, third)):
        points.append(point("dense", None, quality(4.0), seed=seed))
        points.append(point("moc_reference", "topk:0.1875", quality(4.0 + gap), seed=seed))
    rows = frame(*points)
    plots = draw(rows, tmp_path, curves(rows))
    mean = (third - 0.11) / 3
    assert told in plots["perplexity_vs_k"].title
    assert plots["loss_gap_vs_tokens"].title.endswith(f"and \N{MINUS SIGN}{abs(mean):.3f} nats at the end")


def test_only_what_the_rows_support_is_drawn(tmp_path: Path) -> None:
    """One dense point: nothing. One sparse point: K plots without a claim. No curves: no loss plots."""
    assert draw(frame(point("dense", None, {"tokens_per_s": 5.0})), tmp_path) == {}
    alone = draw(frame(point("moc_reference", "topk:0.1875", {"tokens_per_s": 5.0})), tmp_path)
    assert set(alone) == {"throughput_vs_k"}
    assert "no dense method in this run" in alone["throughput_vs_k"].title
    failed = frame(point("moc_reference", "topk:0.1875", status="oom", detail="too big"))
    assert draw(failed, tmp_path) == {}


def test_sparse_methods_without_dense_make_no_ratio_plot(tmp_path: Path) -> None:
    """FFN rows without a dense method still show step times, and no speed-up."""
    rows = frame(
        point("moc_reference", "topk:0.1875", {"step_ms": (5.0, 4.9, 5.1)}, workload="ffn_train"),
        point("moc_reference", "nm:2:8", {"step_ms": 6.0}, workload="ffn_train"),
    )
    plots = draw(rows, tmp_path)
    assert set(plots) == {"ffn_step_time"}
    assert plots["ffn_step_time"].title.startswith("moc_reference topk:0.1875 has the fastest")


def test_misaligned_shapes_are_flagged_and_carry_no_message(tmp_path: Path, boards: dict[str, Board]) -> None:
    """A misaligned shape has its panel with the flag, while the title speaks of the aligned shape alone."""
    points = []
    for preset, ratio in (("1b", 0.5), ("paper-1b", 3.0)):
        for method, rule, value in (("dense", None, 1.0), ("moc_reference", "topk:0.1875", ratio)):
            metrics = {"step_ms": 10 / value, "speedup_vs_best_dense": value}
            points.append(point(method, rule, metrics, workload="ffn_train", preset=preset))
    plots = draw(frame(*points), tmp_path)
    titles = [axes.get_title() for axes in boards["ffn_speedup"].axes]
    assert sum(title.endswith("(misaligned)") for title in titles) == 1
    assert plots["ffn_speedup"].title.endswith("the best other method reaches 0.50x")
    assert plots["ffn_step_time"].title.startswith("dense has the fastest")


def test_gap_to_dense_is_taken_at_the_same_token(tmp_path: Path, boards: dict[str, Board]) -> None:
    """The gap curve is the method's loss minus the dense loss at each place, and crosses a line at zero."""
    rows = frame(
        point("dense", None, {"tokens_per_s": 9.0, **quality(4.0)}, device=CPU),
        point("moc_reference", "topk:0.1875", {"tokens_per_s": 5.0, **quality(4.1)}, device=CPU),
    )
    keys = rows.drop_duplicates("method").set_index("method")["point_key"]
    samples = pd.DataFrame(
        [
            ("run", keys[method], "eval_loss_nats", x, value)
            for method, values in (("dense", (9.0, 6.0, 4.0)), ("moc_reference", (9.0, 5.5, 4.1)))
            for x, value in zip((0, 10, 20), values, strict=True)
        ],
        columns=["run_id", "point_key", "metric", "x", "value"],
    )
    plots = draw(rows, tmp_path, samples)
    assert plots["loss_gap_vs_tokens"].title.endswith(
        "is −0.500 nats from dense halfway and +0.100 nats at the end"
    )
    drawn = marks_of(boards["loss_gap_vs_tokens"].axes[0], look("moc_reference", "topk", dense=False))
    assert drawn == [(0.0, pytest.approx(0.0)), (10.0, pytest.approx(-0.5)), (20.0, pytest.approx(0.1))]


def test_looks_are_fixed_and_tell_series_apart_without_colour() -> None:
    """The same series always looks the same; no two share marker, filling and line style at once."""
    rules = ("topk", "topk_abs", "nm:2:8", "nm:12:64", "threshold")
    sparse = [name for name, method in METHODS.items() if method.takes_selection]
    rounded = [name for name, method in METHODS.items() if not method.is_dense and name not in sparse]
    looks = [look(method, rule, dense=False) for method in sparse for rule in rules]
    assert looks == [look(method, rule, dense=False) for method in sparse for rule in rules]
    looks += [look(method, "", dense=False) for method in (*rounded, "one.s:own")]
    assert len({(item.marker, item.fill, str(item.line)) for item in looks}) == len(looks)
    dense = [name for name, method in METHODS.items() if method.is_dense]
    lines = [look(name, "", dense=True) for name in (*dense, "one.s:own")]
    assert len({str(item.line) for item in lines}) == len(lines)
    colours = {rule: look("moc_reference", rule, dense=False).color for rule in rules}
    assert len(set(colours.values())) == len(rules)


def test_labels_of_crowded_points_do_not_cover_anything(tmp_path: Path) -> None:
    """Texts beside points keep clear of each other and of the panel's edge; hopeless ones are left out."""
    board = Board(["crowded"], columns=1)
    axes = board.axes[0]
    marks = [Mark(i % 6, i // 6, i // 6 - 0.1, i // 6 + 0.1, f"{i} %") for i in range(36)]
    axes.plot([mark.x for mark in marks], [mark.y for mark in marks], "o")
    board.label(axes, marks)
    board.save(tmp_path / "crowded.png", "Crowded", "caption")
    boxes = [item.get_window_extent() for item in axes.texts]
    assert len(boxes) >= 20
    frame_box = axes.get_window_extent()
    assert all(frame_box.x0 <= box.x0 and box.x1 <= frame_box.x1 for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
