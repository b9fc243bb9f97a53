"""The `mocbench` command: run, plan, status, report, dashboard, data, doctor, trial.

Exit codes: 0 done, 1 some points failed, 2 bad configuration, 130 interrupted.
"""

from __future__ import annotations

import enum
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.spec import SpecError, Sweep, load_sweep

app = typer.Typer(
    help="Benchmark and ablation harness: Mixture-of-Channels against dense SwiGLU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Text sources: look at one, or tokenise it before a sweep.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RESULTS = Path("results")
QUICK, FIRST_GPU = Path("sweeps/quick.yaml"), Path("sweeps/h100_first.yaml")


class Device(enum.StrEnum):
    """Where to measure."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Retry(enum.StrEnum):
    """Which failed points to measure again."""

    none = "none"
    failed = "failed"
    oom = "oom"
    all = "all"


SweepArgument = Annotated[
    Path | None,
    typer.Argument(help=f"Sweep file; without one, {QUICK}, or {FIRST_GPU} on a machine with a GPU."),
]
ResultsOption = Annotated[Path, typer.Option("--results", help="Folder the results folders lie in.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Text in place of the sweep's: stdlib, files:GLOB or hf:NAME[:CONFIG][:SPLIT]."
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to measure.")]
RetryOption = Annotated[Retry, typer.Option("--retry", help="Measure failed points again.")]


@app.command()
def run(
    sweep: SweepArgument = None,
    data: DataOption = None,
    device: DeviceOption = Device.auto,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one a GPU, one on a CPU.")] = None,
    retry: RetryOption = Retry.none,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; default: a journal file.")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure what is missing, then write tables, plots and the report."""
    from harness.report import write_report
    from harness.runner import RunOptions, run_sweep

    console = Console()
    chosen = _device(device)
    path, model = _load(sweep, chosen, data)
    options = RunOptions(
        results=results,
        device=chosen,
        workers=workers,
        retry=retry,
        storage=storage,
        command=_command(path, data),
    )
    summary = run_sweep(model, options, console)
    for line in write_report(summary.folder):
        console.print(f"wrote {line}", highlight=False, soft_wrap=True)
    _print_findings(console, summary.folder)
    if summary.failed:
        console.print(f"{summary.failed} points failed: mocbench status {path} says why", highlight=False)
        raise typer.Exit(1)


@app.command()
def plan(
    sweep: SweepArgument = None,
    data: DataOption = None,
    device: DeviceOption = Device.auto,
    retry: RetryOption = Retry.none,
    results: ResultsOption = RESULTS,
) -> None:
    """Print what `run` would measure; nothing runs."""
    from harness.measure.environment import device_name
    from harness.plan import grid_points, is_missing, prepare_data, unsupported_reason
    from harness.store import Store

    console = Console()
    chosen = _device(device)
    path, model = _load(sweep, chosen, data)
    ids = prepare_data(model, lambda text: console.print(text, highlight=False))
    folder = results / model.name
    known = Store(folder).finished() if folder.exists() else {}
    table = Table("workload", "point", "status", title=f"{path} on {device_name(chosen)}")
    missing = total = 0
    for part, points in grid_points(model, ids):
        if part.optimize is not None:
            table.add_row(
                part.workload, f"{part.optimize.n_trials} trials by {part.optimize.sampler}", "sampled"
            )
        for point in points:
            reason = unsupported_reason(point, chosen)
            fresh = is_missing(point, known, device_name(chosen), retry)
            missing += fresh
            total += 1
            status = known.get((device_name(chosen), point.key), "missing")
            table.add_row(part.workload, point.label, f"unsupported: {reason}" if reason else status)
    console.print(table)
    console.print(f"{total} points, {missing} to measure", highlight=False)


@app.command()
def status(
    sweep: SweepArgument = None, device: DeviceOption = Device.auto, results: ResultsOption = RESULTS
) -> None:
    """What is measured and what failed, by device."""
    from harness.store import read_rows, wide

    console = Console()
    _, model = _load(sweep, _device(device), None)
    folder = results / model.name
    if not (folder / "rows.jsonl").exists():
        raise SpecError(f"{folder}: nothing is measured yet; run the sweep first")
    points = wide(read_rows(folder))
    table = Table("device", "workload", "status", "points", title=str(folder))
    for key, count in points.groupby(["device_name", "workload", "status"]).size().items():
        table.add_row(*key, str(count))  # type: ignore[misc]
    console.print(table)
    for _, point in points[~points["status"].isin(["ok"])].iterrows():
        who = " ".join(str(point[name]) for name in ("workload", "preset", "seq_len", "method"))
        rule = "" if point["selection"] is None else f" {point['selection']}"
        console.print(f"{point['status']}: {who}{rule}: {point['detail']}", highlight=False)


@app.command()
def report(
    sweep: SweepArgument = None, device: DeviceOption = Device.auto, results: ResultsOption = RESULTS
) -> None:
    """Write tables, plots and report again from the rows; `sweep` is a sweep file or a results folder."""
    from harness.report import write_report
    from harness.store import export

    console = Console()
    folder = (
        sweep
        if sweep is not None and sweep.is_dir()
        else results / _load(sweep, _device(device), None)[1].name
    )
    if (folder / "rows.jsonl").exists():
        export(folder)
    elif not (folder / "rows.parquet").exists():
        raise SpecError(f"{folder}: has neither rows.jsonl nor rows.parquet; run the sweep first")
    for line in write_report(folder):
        console.print(f"wrote {line}", highlight=False, soft_wrap=True)
    _print_findings(console, folder)


@app.command()
def dashboard(
    sweep: SweepArgument = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL; default: the journal file.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    device: DeviceOption = Device.auto,
    results: ResultsOption = RESULTS,
) -> None:
    """Open the Optuna dashboard on the sweep's study."""
    from harness.study import JOURNAL_NAME, serve_dashboard

    _, model = _load(sweep, _device(device), None)
    folder = results / model.name
    if storage is None and not (folder / JOURNAL_NAME).exists():
        raise SpecError(f"{folder / JOURNAL_NAME}: there is no study yet; run the sweep first")
    Console().print(f"Optuna dashboard on http://{host}:{port}/ (Ctrl-C ends it)", highlight=False)
    serve_dashboard(folder, storage, host, port)


@app.command()
def doctor(device: DeviceOption = Device.auto) -> None:
    """Say what this machine is and what can be measured on it."""
    from harness.measure.environment import environment_record

    table = Table("what", "value", title="environment")
    for name, value in environment_record(_device(device)).items():
        table.add_row(name, "unknown" if value is None else str(value))
    Console().print(table)


@app.command()
def trial(job: Annotated[Path, typer.Argument(help="A job file (results/SWEEP/jobs/*.json).")]) -> None:
    """Run one job by hand in this process."""
    from harness.trial import main as trial_main

    raise typer.Exit(trial_main([str(job)]))


@data_app.command("stats")
def data_stats(source: str = "stdlib", vocab_size: Annotated[int, typer.Option(min=257)] = 2048) -> None:
    """Documents, bytes and tokens of a text source."""
    from harness.data import stats

    table = Table("what", "value", title=source)
    for name, value in stats(source, vocab_size).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


@data_app.command("prepare")
def data_prepare(source: str = "stdlib", vocab_size: Annotated[int, typer.Option(min=257)] = 2048) -> None:
    """Train the tokenizer and tokenise a text source into the cache."""
    from harness.data import prepare

    dataset = prepare(source, vocab_size)
    Console().print(f"data_id {dataset.data_id}: {len(dataset.train):,} training tokens", highlight=False)


def _device(device: Device) -> str:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise SpecError("--device cuda: PyTorch sees no CUDA device here; valid: cpu")
    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)


def _load(sweep: Path | None, device: str, data: str | None) -> tuple[Path, Sweep]:
    path = sweep or (FIRST_GPU if device == "cuda" else QUICK)
    model = load_sweep(path)
    return path, model if data is None else model.model_copy(update={"data": data})


def _command(path: Path, data: str | None) -> str:
    """The command as others would type it: no path of this machine."""
    from harness.plan import describe_source

    shown = path if not path.is_absolute() else Path(path.name)
    return f"make sweep SWEEP={shown}" + (f" DATA={shlex.quote(describe_source(data))}" if data else "")


def _print_findings(console: Console, folder: Path) -> None:
    from harness.findings import findings
    from harness.store import read_rows

    for sentence in findings(read_rows(folder)):
        console.print(sentence, highlight=False)


def main() -> None:
    """Console entry point: a mistake of the user is one line on standard error and exit code 2."""
    try:
        app()
    except SpecError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished points are kept, the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
