"""The dashboard of a sweep: optuna-dashboard on its studies, with the plots beside them.

It listens on loopback unless asked otherwise, and there it answers only to loopback names, so that a web page
open in the same browser cannot reach it through a name of its own. It can change and delete studies, which
loses nothing measured: the rows are the truth.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from socketserver import ThreadingMixIn
from types import FrameType
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pandas as pd
from optuna_dashboard import wsgi

from harness.errors import UserError
from harness.report.plots.curves import draw_trial
from harness.report.plots.style import Subject, plot_subject
from harness.search.artifacts import Gallery
from harness.search.storage import JOURNAL_NAME, open_storage
from harness.store.folders import refuse_links
from harness.store.frames import read_rows, read_samples

ARTIFACTS = "artifacts"
CURVES = "loss_curves.png"

_Environ = dict[str, Any]
_Application = Callable[[_Environ, Callable[..., Any]], Iterable[bytes]]


def attach_plots(folder: Path, sweep_name: str, url: str | None = None) -> Gallery:
    """Attach the plots of a report to the studies of its sweep, and loss curves to every finished training.

    `folder` is the sweep's results folder and `url` its storage if that is not the journal file there. Curves
    that are attached already are not drawn again. Raises UserError if there is no study or the folder holds
    links.
    """
    if url is None and not (folder / JOURNAL_NAME).exists():
        raise UserError(f"{folder / JOURNAL_NAME}: there is no study yet; run the sweep first")
    refuse_links(folder)
    gallery = Gallery(open_storage(folder, url), sweep_name, folder / ARTIFACTS)
    plots = {path: plot_subject(path) for path in sorted((folder / "plots").glob("*.png"))}
    for study, about in gallery.studies().items():
        for path, subject in plots.items():
            if subject is not None and _is_of(subject, about):
                gallery.hang(study, path)
        if about["workload"] == "pretrain":
            _attach_curves(folder, gallery, study)
    return gallery


def _is_of(subject: Subject, study: Mapping[str, str]) -> bool:
    """Whether a plot of this subject belongs to a study: to the search it is of, or to a grid's workload."""
    if study["mode"] == "optimize":
        return subject.search == study["part"]
    return study["workload"] in subject.workloads


def _attach_curves(folder: Path, gallery: Gallery, study: str) -> None:
    wanted = gallery.trials_without(study, CURVES)
    if not wanted:
        return
    rows, samples = read_rows(folder), read_samples(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for number, key in wanted.items():
            own = rows[(rows["point_key"] == key) & (rows["metric"] == "tokens_per_s")]
            run = samples[(samples["point_key"] == key) & samples["run_id"].isin(own["run_id"].tail(1))]
            if own.empty:
                continue
            plot = draw_trial(run, *_title_and_caption(own.iloc[-1]), Path(scratch) / CURVES)
            if plot is not None:
                gallery.hang(study, plot.path, number)


def _title_and_caption(row: pd.Series) -> tuple[str, str]:
    """Title and caption of a plot of one training."""
    size = row["preset"] if isinstance(row["preset"], str) else f"{row['d_model']}x{row['d_ffn']}"
    rule = f" {row['selection']}" if isinstance(row["selection"], str) else ""
    title = f"{row['method']}{rule}, {size}, sequences of {row['seq_len']}, seed {row['seed']}"
    return title, f"{row['device_name']} · {str(row['started_at'])[:10]} · run {row['run_id']}"


def serve(
    folder: Path, sweep_name: str, url: str | None, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve the dashboard of a sweep until interrupted; `port` 0 takes any free one.

    Plots are attached first (`attach_plots`, which says what `folder` and `url` are). Raises UserError if
    there is no study yet or the address cannot be listened on.
    """
    gallery = attach_plots(folder, sweep_name, url)
    app: _Application = wsgi(gallery.storage, artifact_store=gallery.store)
    try:
        server = make_server(host, port, guarded(app, host), _server_class(host), _QuietHandler)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from error
    if not is_loopback(host):
        say(f"warning: {host} is not loopback; whoever reaches this port can change and delete the studies")
    shown = f"[{host}]" if ":" in host else host
    say(f"Optuna dashboard on http://{shown}:{server.server_port}/ (Ctrl-C ends it)")

    def end(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    with server:
        # Not by KeyboardInterrupt, which is lost if it is raised while Python runs a finalizer.
        before = signal.signal(signal.SIGINT, end)
        try:
            server.serve_forever()
        finally:
            signal.signal(signal.SIGINT, before)
    say("dashboard ended")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name is loopback only if it is `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def guarded(app: _Application, host: str) -> _Application:
    """The application, closed to what other web pages of the user's browser could send it.

    On loopback the request must name a loopback host (a page could give its own name this address: DNS
    rebinding); anywhere, a request that changes something must not come from a page of another origin.
    """

    def answer(environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ.get("HTTP_HOST", "")
        name = urlsplit(f"//{asked}").hostname or ""
        origin = environ.get("HTTP_ORIGIN")
        changes = environ["REQUEST_METHOD"] not in ("GET", "HEAD")
        if is_loopback(host) and not is_loopback(name):
            reason = f"host {name!r} is not a loopback name"
        elif changes and origin is not None and urlsplit(origin).netloc != asked:
            reason = f"origin {origin!r} is another site"
        else:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"mocbench dashboard: refused, {reason}\n".encode()]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a browser opens spare connections, and one at a time would wait for them."""

    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _server_class(host: str) -> type[_Server]:
    return _ServerV6 if ":" in host else _Server


class _QuietHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A page asks every few seconds; only errors are worth a line."""
