"""The report on disk: its files, what it says, that its page loads nothing, and that devices never mix."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rows import CPU, GPU, curves, frame, gpu_rows, point, quality, write_results
from typer.testing import CliRunner

import harness.report.tables
from harness.cli import app, main
from harness.report.build import conclusions, read_results, write_report
from harness.report.plots.style import Board, Subject

TOPK = "topk:0.1875"
PLOTS = {
    *("perplexity_vs_k", "throughput_vs_k", "memory_vs_k", "perplexity_memory_pareto"),
    *("loss_vs_tokens", "loss_gap_vs_tokens", "throughput_vs_seq_len"),
    *("ffn_step_time", "ffn_saved_bytes", "ffn_speedup"),
}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A whole report of the first sweep on a GPU, with one failed and one misaligned point."""
    rows = gpu_rows()
    extra = frame(
        point("moc_reference", "topk:0.5", status="oom", detail="out of memory | tried <b>3 GiB</b>\nat x"),
        point("dense", None, {"tokens_per_s": 77777.0}, preset="paper-1b"),
    )
    merged = frame(rows.to_dict("records"), extra.to_dict("records"))
    folder = write_results(tmp_path_factory.mktemp("results") / "made_up", merged, curves(rows))
    return folder, write_report(read_results(folder))


def small(folder: Path, *devices: str) -> Path:
    """A results folder with a dense and a MoC point on each device."""
    points = []
    for place, device in enumerate(devices):
        rate = 1000.0 * (place + 1)
        points.append(point("dense", None, {"tokens_per_s": rate, **quality(4.0)}, device=device))
        points.append(point("moc_reference", TOPK, {"tokens_per_s": rate / 2, **quality(4.0)}, device=device))
    return write_results(folder, frame(*points))


def test_every_named_file_is_there(gpu_report: tuple[Path, list[Path]]) -> None:
    """The files returned are the plots, report.md and report.html, and each one exists with content."""
    folder, files = gpu_report
    assert {path.name for path in files if path.suffix != ".png"} == {"report.md", "report.html"}
    plots = {path for path in files if path.suffix == ".png"}
    assert plots == set((folder / "plots").glob("*.png"))
    assert {path.stem for path in plots} == PLOTS
    assert len(files) == len(PLOTS) + 2
    assert all(path.stat().st_size > 500 for path in files)


def test_page_loads_nothing(gpu_report: tuple[Path, list[Path]]) -> None:
    """No script, style sheet, font or picture comes from outside: every src is data, decodable PNG."""
    folder, files = gpu_report
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(""", text)
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == sum(path.suffix == ".png" for path in files)
    for source in pictures:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")


def test_text_is_escaped(gpu_report: tuple[Path, list[Path]]) -> None:
    """Markup in a reason is shown, not obeyed, and a bar or a line break does not break a Markdown table."""
    folder, _ = gpu_report
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "b" not in {tag for tag, _ in page.tags}
    assert "out of memory | tried <b>3 GiB</b> at x" in page.words
    rows = [line for line in (folder / "report.md").read_text().splitlines() if "out of memory" in line]
    assert len(rows) == 1
    assert r"memory \| tried &lt;b>3 GiB&lt;/b> at x" in rows[0]


def test_markdown_tables_are_rectangular_and_pictures_exist(gpu_report: tuple[Path, list[Path]]) -> None:
    """Every table has equally many cells in all of its lines; every picture is a file next to the report."""
    folder, files = gpu_report
    text = (folder / "report.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [re.sub(r"\\\|", "", line) for line in block.splitlines()]
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [folder / name for name in pictures] == [path for path in files if path.suffix == ".png"]
    assert all((folder / name).is_file() and not name.startswith("/") for name in pictures)


def test_headline_shows_the_measured_numbers(gpu_report: tuple[Path, list[Path]]) -> None:
    """A headline line has speed, ratio, memory with unit, saved bytes and perplexity of an aligned shape."""
    folder, _ = gpu_report
    text = (folder / "report.md").read_text(encoding="utf-8")
    headline = text.split("### Headline")[1].split("###")[0]
    line = next(item for item in headline.splitlines() if TOPK in item)
    for cell in ("60m", "256", "18.75", "402,000", "0.33x", "28.0 GiB", "2,080", "89.30", "32,860"):
        assert f"| {cell} |" in line
    assert "unpaired" in headline
    assert "paper-1b" not in headline
    assert "77,7" not in headline
    table = text.split("### All points of pretrain")[1].split("###")[0]
    assert "misaligned" in next(item for item in table.splitlines() if "paper-1b" in item)


def test_failed_points_are_listed_with_status_and_reason(gpu_report: tuple[Path, list[Path]]) -> None:
    """A point without a result has its line: method, rule, status and why."""
    folder, _ = gpu_report
    text = (folder / "report.md").read_text(encoding="utf-8")
    section = text.split("### Points without a result")[1].split("###")[0]
    assert re.search(r"moc_reference \| topk:0.5 \|.*\| oom \| out of memory", section)


def test_environment_command_and_sweep_file_are_in_both_forms(gpu_report: tuple[Path, list[Path]]) -> None:
    """The page and the Markdown hold the environment, the command and the sweep file, without paths."""
    folder, _ = gpu_report
    page = Page((folder / "report.html").read_text(encoding="utf-8")).words
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "2.11.0" in text
        assert "mocbench run sweeps/made_up.yaml --data 'files:*.txt'" in text
        assert "name: made_up" in text
        assert "/home/me" not in text


def test_devices_get_sections_and_plots_of_their_own(tmp_path: Path) -> None:
    """Rows of two devices make two sections whose ratios come from inside, and plots named by device."""
    folder = small(tmp_path, GPU, CPU)
    files = write_report(read_results(folder))
    names = {path.name for path in files}
    assert {"throughput_vs_k-example_gpu_80gb.png", "throughput_vs_k-cpu_example_2_cores.png"} <= names
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.index(f"## {GPU}") < text.index(f"## {CPU}")
    assert "numbers of two devices never mix" in text
    for section in re.split(r"^## (?:CPU: )?Example ", text, flags=re.MULTILINE)[1:]:
        headline = section.split("### Headline")[1].split("###")[0]
        assert sorted(re.findall(r"\d\.\d\dx", headline)) == ["0.50x", "1.00x"]


def test_one_device_can_be_chosen(tmp_path: Path) -> None:
    """With a device name only its rows are reported; an unknown one is refused, naming those there are."""
    folder = small(tmp_path, GPU, CPU)
    files = write_report(read_results(folder, CPU))
    assert "throughput_vs_k.png" in {path.name for path in files}
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert f"## {CPU}" in text
    assert GPU not in text
    with pytest.raises(ValueError, match=f"no rows of 'H100'; it has {GPU}, {CPU}"):
        write_report(read_results(folder, "H100"))


def test_old_plots_go_and_foreign_files_stay(tmp_path: Path) -> None:
    """Plots the rows no longer support are removed; a file this module never wrote is left alone."""
    folder = small(tmp_path, GPU)
    (folder / "plots").mkdir()
    for name in ("no_longer_drawn", "loss_vs_tokens-old_device"):
        board = Board([""], columns=1, subject=Subject(("pretrain",)))
        board.save(folder / "plots" / f"{name}.png", "old", "caption")
    foreign = {"my_own.png": b"not a picture", "figure.png": _plain_png()}
    for name, content in foreign.items():
        (folder / "plots" / name).write_bytes(content)
    write_report(read_results(folder))
    left = {path.name for path in (folder / "plots").glob("*.png")}
    assert foreign.keys() <= left
    assert not {"no_longer_drawn.png", "loss_vs_tokens-old_device.png"} & left


def _plain_png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def test_a_report_needs_nothing_but_rows(tmp_path: Path) -> None:
    """Without environment, sweep file, command and curves there is still a report, without their sections."""
    folder = small(tmp_path, GPU)
    for path in folder.iterdir():
        if path.name != "rows.jsonl":
            path.unlink()
    write_report(read_results(folder))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "0.50x" in text
    assert "How it was run" not in text
    assert "### Environment" not in text


def test_an_environment_line_cut_short_is_left_out(tmp_path: Path) -> None:
    """A run that was killed while it wrote its environment does not end the report of what was measured."""
    folder = small(tmp_path, GPU)
    with (folder / "environments.jsonl").open("a") as file:
        file.write('{"env_id": "cut", "tor')
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.exception
    assert "| torch | 2.11.0 |" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_file_without_rows_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep that was stopped before its first point is the user's to run again, not a traceback."""
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["mocbench", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{tmp_path}: no rows to report; `mocbench run` writes them\n"


@pytest.mark.parametrize("content", [b"version: 1\nname: [", b"\xff\xfe", b"version: 1\nname: made_up\n"])
def test_a_sweep_file_that_cannot_be_read_is_said(tmp_path: Path, content: bytes) -> None:
    """Whether there was a search is then unknown, and the reader must know that the tables are a grid's."""
    folder = small(tmp_path, GPU)
    (folder / "sweep.yaml").write_bytes(content)
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.exception
    for text in (" ".join(done.output.split()), (folder / "report.md").read_text(encoding="utf-8")):
        assert "The sweep file cannot be read (" in text
        assert "so a search in it is reported as a grid." in text


def test_no_rows_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """An empty folder is refused in one line."""
    with pytest.raises(ValueError, match="no rows to report; `mocbench run` writes them"):
        write_report(read_results(tmp_path))


def test_a_sweep_that_only_failed_has_a_report(tmp_path: Path) -> None:
    """When every point failed the report lists them and claims nothing; long reasons are cut."""
    failed = point("moc_reference", TOPK, status="crashed", detail="boom " * 100)
    folder = write_results(tmp_path, frame(failed))
    files = write_report(read_results(folder))
    assert [path.name for path in files] == ["report.md", "report.html"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "1 of 1 points failed (1 crashed)" in text
    reason = next(line for line in text.splitlines() if "boom" in line).rpartition("crashed |")[2]
    assert len(reason) < 210
    assert reason.rstrip(" |").endswith("...")


def test_environments_that_differ_are_side_by_side(tmp_path: Path) -> None:
    """Two environments of one device are two columns; what they share stands once."""
    rows = frame(
        point("dense", None, {"tokens_per_s": 10.0}, env_id="a"),
        point("moc_reference", TOPK, {"tokens_per_s": 9.0}, env_id="b"),
    )
    folder = write_results(tmp_path, rows)
    records = [
        {"env_id": name, "torch": version, "cpu": "same"} for name, version in (("a", "2.11"), ("b", "2.13"))
    ]
    (folder / "environments.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report(read_results(folder))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| torch | 2.11 | 2.13 |" in text
    assert "| cpu | same |  |" in text


def test_report_is_the_same_when_written_again(tmp_path: Path) -> None:
    """Writing twice gives the same text and the same pictures: a kept report changes only with its rows."""
    folder = small(tmp_path / "one", GPU)
    first = {path.relative_to(folder): path.read_bytes() for path in write_report(read_results(folder))}
    shutil.rmtree(folder / "plots")
    second = {path.relative_to(folder): path.read_bytes() for path in write_report(read_results(folder))}
    assert first == second


def test_tables_are_computed_once_per_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report, plots and sentences share one point table and one summary of each device."""
    computed = []
    for name in ("point_table", "summarise"):
        whole = getattr(harness.report.tables, name)
        monkeypatch.setattr(
            harness.report.tables, name, lambda *args, n=name, f=whole: computed.append(n) or f(*args)
        )
    results = read_results(small(tmp_path, CPU, GPU))
    write_report(results)
    assert conclusions(results)
    assert computed == ["point_table", "summarise"] * 2
