"""The dashboard in a real headless Chromium, on the study of a sweep that is running while one looks."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from harness.report.plots.style import Board, Subject
from harness.search.storage import open_storage
from harness.search.study import GridStudy
from harness.soak.postgres import NoPostgresError, PrivatePostgres
from harness.sweep.load import parse_sweep
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.job import Job
from harness.workloads.reporter import make_row

if "CI" not in os.environ:  # there it is installed, and a test that is skipped would hide that it is not
    pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Nothing here may look for another machine: some are closed, and then every start would wait for it.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1500,1600",
)
PATIENCE = 60  # seconds; a wait ends as soon as what is waited for is there
SWEEP = """\
version: 1
name: watched
description: A sweep that is looked at while it runs.
data: files:{text}/*.txt
workload: pretrain
axes: {{method: [dense, moc_reference], selection: ["topk:0.25"]}}
fixed: {{preset: 1m, seq_len: 32, tokens: 128, train_tokens: 2560, eval_tokens: 1024, vocab_size: 512,
        lr: 3e-3, dtype: fp32}}
"""


SMALL = """\
version: 1
name: small
workload: ffn_train
axes: {preset: [1m], method: [dense]}
fixed: {batch: 2, seq_len: 64, dtype: fp32}
"""


class Watched:
    """A sweep of two points under way, with one of them measured, and its dashboard."""

    def __init__(self, folder: Path) -> None:
        text = folder / "text"
        text.mkdir()
        for number, page in enumerate(sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:24]):
            shutil.copy(page, text / f"{number}.txt")
        self._sweep = folder / "watched.yaml"
        self._sweep.write_text(SWEEP.format(text=text))
        self._cache = folder / "cache"
        self.results = folder / "results"
        self._started: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Run the sweep until its first point is there, then open the dashboard."""
        self.run = self._start("run")
        _read_until(self.run, "[1/2]")
        self.dashboard = self._start("dashboard", "--port", "0")
        line = _read_until(self.dashboard, "http://")
        self.url = line[line.index("http://") :].split("/ ")[0]

    def _start(self, verb: str, *more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "harness", verb, str(self._sweep)),
                *("--device", "cpu", "--results", str(self.results), *more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MOCBENCH_CACHE": str(self._cache), "OMP_NUM_THREADS": "1"},
        )
        self._started.append(process)
        return process

    def finish_run(self) -> None:
        """Wait for the sweep's end, which leaves plots and report."""
        if self.run.poll() is None:
            output, _ = self.run.communicate(timeout=240)
            assert self.run.returncode == 0, output

    def close(self) -> None:
        """End what was started."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    """The first line of output with `text` in it; fails with all output if there is none."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The sweep and its dashboard."""
    watched = Watched(tmp_path_factory.mktemp("watched"))
    try:
        watched.start()
        yield watched
    finally:
        watched.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium, with a profile of its own."""
    if "CI" not in os.environ and (CHROMIUM is None or DRIVER is None):
        pytest.skip("needs Debian's chromium and chromium-driver")
    assert CHROMIUM is not None, "CI installs chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


Page = Callable[[str, list[str]], str]


@pytest.fixture
def page(watched: Watched, browser: webdriver.Chrome, tmp_path: Path) -> Page:
    """Open a page of the dashboard, wait until it shows all of the texts, and return its whole text."""

    def open_page(path: str, texts: list[str]) -> str:
        browser.get(watched.url + path)
        return wait_for_texts(browser, texts, tmp_path / "page.png")

    return open_page


def wait_for_texts(browser: webdriver.Chrome, texts: list[str], screenshot: Path) -> str:
    """The page's text once it holds all of `texts`; a screenshot is left either way."""

    def missing(_: object = None) -> list[str]:
        shown = browser.find_element(By.TAG_NAME, "body").text
        return [text for text in texts if text not in shown]

    try:
        WebDriverWait(browser, PATIENCE).until(lambda _: not missing(), f"not on the page: {texts}")
    except Exception as error:
        shown = browser.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"{missing()} never appeared on {browser.current_url}:\n{shown}") from error
    finally:
        browser.save_screenshot(str(screenshot))
    return browser.find_element(By.TAG_NAME, "body").text


def pictures(browser: webdriver.Chrome) -> dict[str, int]:
    """Width in pixels, as decoded, of every artifact's picture on the page; waits until all are loaded."""
    selector = "img[src^='/artifacts/']"
    WebDriverWait(browser, PATIENCE).until(
        lambda _: browser.execute_script(
            "const all = [...document.querySelectorAll(arguments[0])];"
            "return all.length > 0 && all.every(one => one.complete)",
            selector,
        )
    )
    found = browser.find_elements(By.CSS_SELECTOR, selector)
    return {str(one.get_attribute("alt")): int(str(one.get_attribute("naturalWidth"))) for one in found}


def test_a_running_sweep_is_shown_and_followed(watched: Watched, page: Page) -> None:
    """The first point is there before the sweep has ended; the same dashboard then knows of the second."""
    page("/dashboard", ["watched.pretrain", "MAXIMIZE, MINIMIZE, MINIMIZE"])
    page("/dashboard/studies/0/trials", ["Trial 0", "Complete", "method dense"])
    watched.finish_run()
    shown = page("/dashboard/studies/0/trials", ["2 Trials", "Trial 1"])
    assert "Running" not in shown
    assert "Fail" not in shown


def test_a_trial_shows_its_attributes_note_and_loss_curves(
    watched: Watched, page: Page, browser: webdriver.Chrome
) -> None:
    """What the point was, what came of it, and the picture drawn from its samples."""
    watched.finish_run()
    attributes = [
        "method moc_reference",
        "selection topk:0.25",
        "k 96",
        "preset 1m",
        "seq_len 32",
        "status ok",
    ]
    measured = ["tokens_per_s", "perplexity", "tokens/s"]
    page("/dashboard/studies/0/trials?numbers=1", [*attributes, *measured, "Artifacts"])
    assert pictures(browser) == {"loss_curves.png": 1350}


def test_the_study_shows_objectives_by_name_and_the_plots_of_the_report(
    watched: Watched, page: Page, browser: webdriver.Chrome
) -> None:
    """The Pareto view names what is on its axes, and every plot of the report is an artifact that loads."""
    watched.finish_run()
    plots = {plot.name for plot in (watched.results / "watched/plots").glob("*.png")}
    assert len(plots) >= 4
    page("/dashboard/studies/0", ["Pareto Front", "tokens_per_s", "peak_rss_over_start_bytes", *plots])
    shown = pictures(browser)
    assert shown.keys() == plots
    assert min(shown.values()) > 500
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_note_of_the_study_is_the_sweep_file(page: Page) -> None:
    """Somebody who only has the dashboard knows what was run."""
    page(
        "/dashboard/studies/0/note",
        ["A sweep that is looked at while it runs.", "name: watched", "topk:0.25"],
    )


def test_only_this_machine_and_this_page_are_answered(watched: Watched) -> None:
    """A name that a web page gave this address is refused, and so is a deletion sent from another site."""
    assert _status(watched.url, "GET", {}) == 200
    assert _status(watched.url, "GET", {"Host": "evil.example"}) == 403
    assert _status(f"{watched.url}/api/studies/0", "DELETE", {"Origin": "http://evil.example"}) == 403
    assert _status(f"{watched.url}/api/studies/0", "GET", {}) == 200


def test_only_loopback_is_listened_on_by_default(watched: Watched) -> None:
    """Without --host the socket is bound to 127.0.0.1."""
    assert watched.url.startswith("http://127.0.0.1:")
    assert listens(watched.dashboard, watched.url, "0100007F")


def test_an_interrupt_ends_the_dashboard_without_a_trace(watched: Watched) -> None:
    """Ctrl-C is how one leaves: no traceback, exit code 0."""
    watched.dashboard.send_signal(signal.SIGINT)
    output, _ = watched.dashboard.communicate(timeout=20)
    assert (watched.dashboard.returncode, output) == (0, "dashboard ended\n")


def listens(dashboard: subprocess.Popen[str], url: str, address: str) -> bool:
    """Whether a socket of the dashboard's host listens at the address, in hexadecimal, and the URL's port."""
    port = int(url.split(":")[2].split("/")[0])
    sockets = Path(f"/proc/{dashboard.pid}/net/tcp").read_text()
    return f" {address}:{port:04X} 00000000:0000 0A" in sockets  # 0A: listening


def serve(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A dashboard on the grid of one FFN point, results under `folder`."""
    sweep = folder / "small.yaml"
    sweep.write_text(SMALL)
    results = ("--device", "cpu", "--results", str(folder / "results"), "--port", "0")
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "dashboard", str(sweep), *results, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def add_study(folder: Path, url: str | None = None) -> None:
    """Its study, with the point measured, in the journal or a database."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep = parse_sweep(SMALL, "small.yaml")
    point = Point("ffn_train", "dense", None, "1m", 128, 384, 1, 2, 64, "fp32", 0)
    storage = open_storage(folder, url)
    study = GridStudy(sweep, sweep.parts[0], storage, "cpu", [point])
    job = Job("small", "r1", 1, (point,), Measure(), "cpu", "work")
    values = {"saved_activation_bytes_per_token": 6656.0, "step_ms": 2.0}
    rows = [
        {**make_row(job, point, metric, "ok", "", device_name="D", env_id="e"), "value": value}
        for metric, value in values.items()
    ]
    study.complete(study.begin(point), point, rows)
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def test_other_machines_are_let_in_when_asked_after_a_warning(tmp_path: Path) -> None:
    """With --host 0.0.0.0 all interfaces are listened on, and one line warns beforehand."""
    add_study(tmp_path / "results/small")
    dashboard = serve(tmp_path, "--host", "0.0.0.0")
    try:
        assert dashboard.stdout is not None
        warning, url = dashboard.stdout.readline(), dashboard.stdout.readline()
        assert url.startswith("Optuna dashboard on http://0.0.0.0:")
        assert warning == (
            "warning: 0.0.0.0 is not loopback; whoever reaches this port can change and delete the studies\n"
        )
        assert listens(dashboard, url, "00000000")
    finally:
        dashboard.kill()
        dashboard.communicate()


def test_a_study_in_postgresql_is_served(tmp_path: Path) -> None:
    """The same dashboard over a real server: study, trial, its attributes and a plot of the report."""
    plots = tmp_path / "results/small/plots"
    board = Board([""], columns=1, subject=Subject(("ffn_train",)))
    board.save(plots / "ffn_speedup.png", "message", "caption")
    with private_postgres() as server:
        add_study(tmp_path / "results/small", server.url)
        dashboard = serve(tmp_path, "--storage", server.url)
        try:
            line = _read_until(dashboard, "http://")
            url = line[line.index("http://") :].split("/ ")[0]
            (summary,) = _json(f"{url}/api/studies")["study_summaries"]
            detail = _json(f"{url}/api/studies/{summary['study_id']}")
            assert summary["study_name"].startswith("small.ffn_train.")
            assert detail["objective_names"] == ["step_ms", "saved_activation_bytes_per_token"]
            assert "name: small" in detail["note"]["body"]
            (trial,) = detail["trials"]
            assert {"key": "method", "value": "dense"} in trial["user_attrs"]
            (artifact,) = detail["artifacts"]
            picture = f"{url}/artifacts/{summary['study_id']}/{artifact['artifact_id']}"
            with urllib.request.urlopen(picture, timeout=20) as answer:
                assert answer.read() == (plots / "ffn_speedup.png").read_bytes()
        finally:
            dashboard.kill()
            dashboard.communicate()


@contextlib.contextmanager
def private_postgres() -> Iterator[PrivatePostgres]:
    """A server in a short path (a socket's name is at most 107 bytes); skipped where none is installed."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)  # root starts it as another user
        try:
            server = PrivatePostgres(Path(folder) / "server")
        except NoPostgresError as error:
            if "CI" in os.environ:
                raise
            pytest.skip(str(error))
        with server:
            yield server


def _json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _status(url: str, method: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
