"""What a hostile sweep file, results folder or checkpoint cannot do, and what no code here does at all."""

import ast
import builtins
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rows import rows_of, train_point
from typer.testing import CliRunner

from harness.cli import app
from harness.dashboard import attach_plots, guarded, is_loopback
from harness.errors import SpecError, UserError
from harness.run.options import RunOptions
from harness.run.progress import SweepProgress
from harness.run.runner import run_sweep
from harness.run.supervise import Finished
from harness.search.storage import open_storage
from harness.search.study import GridStudy
from harness.store.files import Store
from harness.store.folders import refuse_links, results_folder
from harness.store.frames import read_rows
from harness.sweep.load import parse_sweep
from harness.sweep.strict_yaml import MAX_DEPTH
from harness.training.checkpoint import Checkpoints

GOOD = """\
version: 1
name: demo
workload: ffn_train
axes: {preset: [1m], method: [dense, moc_reference], selection: ["topk:0.25"]}
fixed: {tokens: 256, seq_len: 128, dtype: fp32}
"""
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

SEARCH = f"""\
{GOOD}mode: optimize
optimize: {{n_trials: 4, objectives: [{{metric: step_ms, direction: minimize}}]}}
"""

HOSTILE = {
    "billion laughs": (LAUGHS, "aliases (*name) are not allowed in a sweep"),
    "deep list": ("axes: " + "[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
    "deep mapping": ("axes: " + "{a: " * 30_000, f"nested deeper than {MAX_DEPTH}"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(400)), f"nested deeper than {MAX_DEPTH}"),
    "python object": ("name: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "endless number": (f"seeds: [0x{'f' * 200_000}]", "a whole number beyond"),
    "endless decimal": (f"seeds: [{'9' * 200_000}]", "not YAML"),
    "list as a key": ("? [1, 2]\n: 3", "the key [1, 2] is not a name"),
    "line break in a key": ('"a\\nb": 1', "the key 'a\\nb' is not a name"),
    "endless range": (
        GOOD.replace("[1m]", "[1m], d_model: {low: 1, high: .inf}").replace("axes", "mode: optimize\naxes"),
        "axes.d_model is not finite",
    ),
    "import from nowhere": (GOOD.replace("dense,", "' x. y:f',"), "expected package.module:factory"),
    "impossible date": ("name: 2026-99-99", "not YAML: month must be in 1..12"),
    "wrong tag": ("name: !!bool maybe", "not YAML"),
    "control character": ("name: \x07", "not YAML"),
    "a grid of 10^12": (
        GOOD.replace("[1m]", "[1m]").replace(
            "axes: {", f"axes: {{batch: {list(range(1, 10_001))}, lr: {list(range(1, 10_001))}, "
        ).replace("tokens: 256, ", "").replace("ffn_train", "pretrain").replace(
            "fixed: {", "fixed: {train_tokens: 1000000, vocab_size: 512, "
        ),
        "span 2e+08 points; a part has at most 100000",
    ),
}  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sweep_file_is_one_clear_line_at_once(name: str) -> None:
    """Neither time nor memory nor a traceback: one line that names the file."""
    text, message = HOSTILE[name]
    with pytest.raises(SpecError) as caught:
        parse_sweep(text, "s.yaml")
    said = str(caught.value)
    assert message in said
    assert said.startswith("s.yaml:")
    assert "\n" not in said
    assert len(said) < 300


@given(st.data())
def test_a_damaged_sweep_file_is_never_a_traceback(data: st.DataObject) -> None:
    """Whatever stands in place of a piece of a good file, it is read or refused by name."""
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(len(GOOD), start + 20)))
    piece = data.draw(st.text("[]{}:,-?!&*|>'\"%@`#\n 0123456789.e_xinfa<=~\x00\u0085\ud7ff", max_size=12))
    try:
        parse_sweep(GOOD[:start] + piece + GOOD[end:], "s.yaml")
    except SpecError as error:
        assert str(error).startswith("s.yaml:")  # noqa: PT017 (that there is no error is fine as well)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported and must not be."""
    (tmp_path / "evil_rival.py").write_text("def factory(shape, selection): raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "evil_rival:factory"


def study_with_rows(folder: Path, method: str) -> Path:
    """A results folder with one measured point, its study, and a sweep file that searches the method."""
    point = train_point(method)
    rows = rows_of(point, {"step_ms": 2.0, "saved_activation_bytes_per_token": 100.0, "tokens_per_s": 10.0})
    Store(folder).append(rows)
    (folder / "sweep.yaml").write_text(SEARCH.replace("dense,", f"'{method}',"))
    sweep = parse_sweep(GOOD, "s.yaml")
    study = GridStudy(sweep, sweep.parts[0], open_storage(folder), "cpu", [train_point()])
    study.complete(study.begin(train_point()), point, rows)
    return folder


def test_nothing_named_in_results_is_imported(tmp_path: Path, evil: str) -> None:
    """Report, status, plan and dashboard read results of others; only a sweep file one names can import."""
    folder = study_with_rows(tmp_path / "results/demo", evil)
    sweep = tmp_path / "demo.yaml"
    sweep.write_text(GOOD)
    shared = ["--device", "cpu", "--results", str(tmp_path / "results")]
    for command in (["report", str(folder)], ["status", str(sweep), *shared], ["plan", str(sweep), *shared]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception!r}"
    assert "evil_rival:factory" in (folder / "report.md").read_text()
    attach_plots(folder, "demo")
    assert "evil_rival" not in sys.modules
    parse_sweep(GOOD.replace("dense,", f"'{evil}',"), "s.yaml")
    assert "evil_rival" in sys.modules


EVIL_TEXT = "[/x] [red]red[/red] <script>alert(1)</script>"


def test_what_rows_say_is_text_everywhere(tmp_path: Path) -> None:
    """A reason full of markup neither ends a run nor colours a terminal nor runs in a browser."""
    folder = tmp_path / "results/demo"
    (row,) = rows_of(train_point(), {}, status="crashed")
    rows = [{**row, "detail": EVIL_TEXT}]
    Store(folder).append(rows)
    (tmp_path / "demo.yaml").write_text(GOOD)
    named = [str(tmp_path / "demo.yaml"), "--device", "cpu", "--results", str(tmp_path / "results")]
    assert EVIL_TEXT in CliRunner().invoke(app, ["status", *named]).output
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    page = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    stream = io.StringIO()
    progress = SweepProgress(Console(file=stream, width=200), 1, 0)
    progress.finish(Finished(train_point(), "crashed", rows))
    assert f"crashed: {EVIL_TEXT}" in stream.getvalue()


def test_a_line_nested_without_end_is_skipped(tmp_path: Path) -> None:
    """It is no row, and it does not take the parser's stack down with it."""
    rows = rows_of(train_point(), {"step_ms": 1.0})
    Store(tmp_path).append(rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("[" * 200_000 + "\n")
    assert list(read_rows(tmp_path)["value"]) == [1.0]


class Malicious:
    """Unpickling it sets a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import builtins; builtins.unpickled = True",)


def test_a_pickle_in_place_of_a_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    """Checkpoints are safetensors: what a pickle says is never executed."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path / "run", 1.0, "me")
    checkpoints.save(model, optimizer, 1, {})
    for path in (tmp_path / "run").glob("*/*.safetensors"):
        path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(safetensors.SafetensorError):
        checkpoints.load(model, optimizer)
    assert not hasattr(builtins, "unpickled")


def run_demo(results: Path) -> None:
    """What `mocbench run` does."""
    run_sweep(parse_sweep(GOOD, "s.yaml"), RunOptions(results=results), Console(quiet=True))


WRITERS: dict[str, Callable[[Path], object]] = {
    "run": run_demo,
    "report": lambda results: refuse_links(results_folder(results, "demo")),
    "dashboard": lambda results: attach_plots(results_folder(results, "demo"), "demo"),
}
LINKS = ("demo", "demo/jobs", "demo/plots", "demo/checkpoints", "demo/artifacts", "demo/rows.jsonl",
         "demo/plots/x.png", "demo/jobs/j.json")  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("verb", WRITERS)
def test_no_link_leads_a_write_out_of_the_results_folder(tmp_path: Path, link: str, verb: str) -> None:
    """A link at the sweep's folder or anywhere in it is refused by name, and its target stays as it was."""
    outside = tmp_path / "outside"
    if Path(link).suffix:
        outside.write_text("mine")
    else:
        outside.mkdir()
    results = tmp_path / "results"
    (results / link).parent.mkdir(parents=True)
    (results / link).symlink_to(outside)
    if link != "demo":
        open_storage(results / "demo")
    with pytest.raises(UserError, match=f"{link} is a link; remove it"):
        WRITERS[verb](results)
    assert outside.read_text() == "mine" if outside.is_file() else list(outside.iterdir()) == []


def test_the_results_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """Where results lie is the user's to say, on another disk for example."""
    (tmp_path / "disk/demo").mkdir(parents=True)
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    assert results_folder(tmp_path / "results", "demo").is_dir()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../demo", "/etc"])
def test_a_name_cannot_leave_the_results_folder(tmp_path: Path, name: str) -> None:
    """Refused where folders are made as well as where a sweep is read."""
    with pytest.raises(SpecError, match=r"name is .*; it names a folder under results/"):
        parse_sweep(GOOD.replace("demo", name), "s.yaml")
    with pytest.raises(UserError, match="lies outside"):
        results_folder(tmp_path, name)


def test_a_report_command_refuses_links_before_it_writes(tmp_path: Path) -> None:
    """`mocbench report FOLDER` on somebody's folder writes nothing through a link in it."""
    folder = tmp_path / "demo"
    Store(folder).append(rows_of(train_point(), {"step_ms": 1.0}))
    (folder / "report.md").symlink_to(tmp_path / "profile")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert isinstance(done.exception, UserError)
    assert not (tmp_path / "profile").exists()


ADDRESSES = {
    **dict.fromkeys(("127.0.0.1", "127.8.0.9", "::1", "localhost"), True),
    **dict.fromkeys(("0.0.0.0", "::", "192.168.1.4", "box", ""), False),
}


@pytest.mark.parametrize(("host", "loopback"), ADDRESSES.items())
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    """All interfaces are not loopback, and neither is a name that anybody could give an address."""
    assert is_loopback(host) is loopback


REQUESTS = [
    ("127.0.0.1", {"HTTP_HOST": "localhost:80"}, True),
    ("127.0.0.1", {"HTTP_HOST": "[::1]:80"}, True),
    ("127.0.0.1", {"HTTP_HOST": "rebound.example:80"}, False),
    ("127.0.0.1", {}, False),
    ("0.0.0.0", {"HTTP_HOST": "box:80"}, True),
    ("127.0.0.1", {"HTTP_HOST": "localhost:80", "HTTP_ORIGIN": "http://localhost:80"}, True),
    ("0.0.0.0", {"HTTP_HOST": "box:80", "HTTP_ORIGIN": "http://other:80"}, False),
    ("0.0.0.0", {"HTTP_HOST": "box:80", "HTTP_ORIGIN": "null"}, False),
]


@pytest.mark.parametrize(("host", "headers", "answered"), REQUESTS)
def test_the_dashboard_answers_its_own_page_only(host: str, headers: dict[str, str], answered: bool) -> None:
    """Changes must come from the same origin, and on loopback the host must be named as loopback."""
    statuses: list[str] = []
    application = guarded(lambda environ, start: [b"inside"], host)
    body = application({"REQUEST_METHOD": "POST", **headers}, lambda status, _: statuses.append(status))
    assert (list(body) == [b"inside"]) is answered
    assert statuses == ([] if answered else ["403 Forbidden"])


SOURCES = [path for top in ("harness", "moc") for path in Path(top).rglob("*.py")]
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "commands", "pty"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}


def call_name(node: ast.Call) -> str:
    """The dotted name of what is called."""
    return ast.unparse(node.func)


def faults(tree: ast.AST) -> list[str]:
    """Shells, pickles and evaluation of text in a module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_IMPORTS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            name = call_name(node)
            if name in FORBIDDEN_CALLS or options.get("shell", "False") != "False":
                found.append(name)
            if options.get("allow_pickle", "False") != "False" or "trust_remote_code" in options:
                found.append(name)
            if name == "yaml.load" and options.get("Loader") != "_StrictLoader":
                found.append(name)
    return found


def test_no_shell_no_pickle_no_evaluated_text() -> None:
    """In all of the package; and the search itself finds each of them where they are."""
    bad = (
        "import pickle, os\nfrom joblib import load\nos.system('x')\nsubprocess.run('x', shell=True)\n"
        "torch.load(f)\nnp.load(f, allow_pickle=True)\nyaml.load(f)\neval('x')\n"
    )
    assert len(faults(ast.parse(bad))) == 8
    assert len(SOURCES) > 40
    found = {str(path): faults(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}
