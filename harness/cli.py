"""The `mocbench` command: run, worker, plan, status, report, crossover, compare, history, dashboard, data,
doctor, trial.

Exit codes: 0 done, 1 some points failed, 2 bad configuration, 3 regression, 130 interrupted.
"""

from __future__ import annotations

import enum
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.sweep.model import Sweep

app = typer.Typer(
    help="Benchmark and ablation harness: Mixture-of-Channels against dense SwiGLU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Text sources: look at one, or tokenise it before a sweep.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RESULTS, BENCHES = Path("results"), Path(".benchmarks")
QUICK, FIRST_GPU = Path("sweeps/quick.yaml"), Path("sweeps/h100_first.yaml")


Device = enum.StrEnum("Device", ["auto", "cpu", "cuda"])  # where to measure
Executor = enum.StrEnum("Executor", ["local", "ray"])  # where workers run
Retry = enum.StrEnum("Retry", ["none", "failed", "oom", "all"])  # which failed points to measure again

SweepArgument = Annotated[
    Path | None,
    typer.Argument(help=f"Sweep file; without one, {QUICK}, or {FIRST_GPU} on a machine with a GPU."),
]
ResultsOption = Annotated[Path, typer.Option(help="Folder the results folders lie in.")]
DataOption = Annotated[
    str | None,
    typer.Option(help="Text in place of the sweep's: stdlib, files:GLOB or hf:NAME[:CONFIG][:SPLIT]."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to measure.")]
StorageOption = Annotated[
    str | None,
    typer.Option(help="Where workers meet: postgresql+psycopg://USER@HOST/DB; default: the results folder."),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Default: one a GPU, one on a CPU.")]
RetryOption = Annotated[Retry, typer.Option(help="Measure failed points again.")]
VocabOption = Annotated[int, typer.Option(min=257)]


@app.command()
def run(
    sweep: SweepArgument = None,
    data: DataOption = None,
    device: DeviceOption = Device.auto,
    workers: WorkersOption = None,
    retry: RetryOption = Retry.none,
    storage: StorageOption = None,
    executor: Annotated[
        Executor,
        typer.Option(help="local: threads here, one GPU each; ray: a worker per GPU or CPU of a cluster."),
    ] = Executor.local,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure what is missing, then write tables, plots and the report."""
    from harness.dashboard import attach_plots
    from harness.run.options import RunOptions
    from harness.run.runner import run_sweep

    console = Console()
    path, model = _load(sweep, device, data)
    options = RunOptions(
        results=results,
        device=_device(device),
        workers=workers,
        retry=retry,
        storage=storage,
        executor=executor,
        command=_command(path, data),
    )
    summary = run_sweep(model, options, console)
    _report(console, summary.folder)
    attach_plots(summary.folder, model.name, storage)
    if summary.failed:
        console.print(f"{summary.failed} points failed: mocbench status {path} says why", highlight=False)
        raise typer.Exit(1)


@app.command()
def worker(
    sweep: SweepArgument = None,
    data: DataOption = None,
    device: DeviceOption = Device.auto,
    workers: WorkersOption = None,
    storage: StorageOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Help to measure a sweep until nothing of it is left; start any number, on any host, at any time."""
    from harness.run.local import run_worker
    from harness.run.options import RunOptions

    _, model = _load(sweep, device, data)
    options = RunOptions(results=results, device=_device(device), workers=workers, storage=storage)
    run_worker(model, options, Console())


@app.command()
def plan(
    sweep: SweepArgument = None,
    data: DataOption = None,
    device: DeviceOption = Device.auto,
    retry: RetryOption = Retry.none,
    results: ResultsOption = RESULTS,
) -> None:
    """Print what `run` would measure, how much memory and how long it takes; nothing runs."""
    from harness.forecast.view import Plan, print_plan

    path, model = _load(sweep, device, data)
    plan = Plan(model, results, _device(device), retry)
    print_plan(model, plan, f"{path} on {plan.device_name}", _wide_console())


@app.command()
def status(
    sweep: SweepArgument = None, device: DeviceOption = Device.auto, results: ResultsOption = RESULTS
) -> None:
    """What is measured, what is missing and what failed, by device; failures with the end of their log."""
    from harness.run.status import print_status

    _, model = _load(sweep, device, None)
    print_status(model, results / model.name, Console(markup=False))  # what rows say is text, not markup


@app.command()
def report(
    sweep: SweepArgument = None, device: DeviceOption = Device.auto, results: ResultsOption = RESULTS
) -> None:
    """Write tables, plots and report again from the rows; `sweep` is a sweep file or a results folder."""
    from harness.search.storage import JOURNAL_NAME
    from harness.store.folders import refuse_links
    from harness.store.frames import export

    console = Console(markup=False)
    folder = sweep if sweep and sweep.is_dir() else results / _load(sweep, device, None)[1].name
    refuse_links(folder)
    if (folder / "rows.jsonl").exists():
        export(folder)
    elif not (folder / "rows.parquet").exists():
        raise UserError(f"{folder}: has neither rows.jsonl nor rows.parquet; run the sweep first")
    _report(console, folder)
    if (folder / JOURNAL_NAME).exists():
        from harness.dashboard import attach_plots

        attach_plots(folder, folder.resolve().name)


@app.command()
def crossover(
    folders: Annotated[list[Path], typer.Argument(help="Results folders; they are read together.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it, to this PNG file.")] = None,
) -> None:
    """Print up to which batch each sparse method decodes faster than the fastest dense one.

    Folders are read together, so that the channels a batch needs, measured where a model was trained, stand
    next to speeds measured elsewhere.
    """
    import pandas as pd

    from harness.report.crossover import crossover_table
    from harness.report.plots.crossover import crossover_plot
    from harness.report.tables import tables_of
    from harness.store.frames import read_rows, read_samples
    from harness.sweep.catalog import workloads_where

    console = _wide_console()
    for folder in folders:
        if not any((folder / name).exists() for name in ("rows.jsonl", "rows.parquet")):
            raise UserError(f"{folder}: has no rows; give a folder of `mocbench run`, such as results/x")
    rows = pd.concat([read_rows(folder) for folder in folders], ignore_index=True)
    samples = pd.concat([read_samples(folder) for folder in folders], ignore_index=True)
    tables = tables_of(rows, samples)
    found = tables.crossovers
    if found.empty:
        raise UserError(
            f"{', '.join(map(str, folders))}: no sparse method was decoded at two batches or more beside a"
            " dense one; sweeps/ffn_decode_h100.yaml and sweeps/generate_h100.yaml do that"
        )
    shown = crossover_table(found)
    table = Table(*shown.columns)
    for line in shown.itertuples(index=False):
        table.add_row(*map(str, line))
    console.print(table)
    if plot is None:
        return
    devices = list(dict.fromkeys(found["device_name"]))
    if len(devices) > 1:
        raise UserError(f"--plot: the rows are of {', '.join(devices)}; a plot shows one device")
    own = rows[rows["workload"].isin(workloads_where(decodes=True))]
    dates = sorted({str(value)[:10] for value in own["started_at"].dropna()})
    when, names = (
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        (folder.resolve().name for folder in folders),
    )
    caption = f"{devices[0]} · {when} · crossover {' '.join(names)}"
    drawn = crossover_plot(tables, caption, plot, of_report=False)
    if drawn is not None:
        console.print(f"wrote {drawn.path}", highlight=False, soft_wrap=True)


@app.command()
def dashboard(
    sweep: SweepArgument = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL; default: the journal file.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    device: DeviceOption = Device.auto,
    results: ResultsOption = RESULTS,
) -> None:
    """Open the Optuna dashboard on the sweep's studies, with its plots beside them."""
    from harness.dashboard import serve
    from harness.store.folders import results_folder

    _, model = _load(sweep, device, None)
    serve(results_folder(results, model.name), model.name, storage, host, port, _say)


@app.command()
def doctor(
    device: DeviceOption = Device.auto,
    aa: Annotated[int, typer.Option(min=0, help="Trials of a method against itself; 100 take minutes.")] = 0,
    profiler: Annotated[
        bool, typer.Option("--profiler", help="Compare decode times with the profiler's kernel times (CUDA).")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write all of it as JSON.")] = None,
) -> None:
    """Say what this machine is, how fast it can be, and whether measurements on it can be trusted."""
    from harness.doctor import examine

    try:
        good = examine(Console(), _device(device), trials=aa, profiler=profiler, output=output)
    except ValueError as error:
        raise UserError(f"--profiler: {error}") from error
    if not good:
        raise typer.Exit(1)


@app.command()
def compare(
    base: Annotated[
        str, typer.Argument(help="A git revision, a checkout, a results folder or a .json file.")
    ],
    head: Annotated[str, typer.Argument(help="The same for what may have become slower.")],
    device: DeviceOption = Device.auto,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One benchmark.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Compare so often; tests the judge.")] = 1,
    inject: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SHARE", help="More work in head; tests the judge.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for summary.md and its plot.")] = RESULTS / "compare",
) -> None:
    """Say of each benchmark or point whether HEAD became slower than BASE; exit code 3 if one did."""
    from harness.regression.compare.compare import compare as compare_sides
    from harness.regression.compare.compare import parse_injections

    injections = parse_injections(inject or [])
    code = compare_sides(
        base, head, _device(device), output=output, inject=injections, runs=runs, only=only or [], say=_say
    )
    if code:
        raise typer.Exit(code)


@app.command()
def history(
    storage: Annotated[Path, typer.Argument(help="Folder in which `make bench` keeps its files.")] = BENCHES,
    output: Annotated[Path, typer.Option(help="Folder for history.md and its plots.")] = RESULTS / "history",
) -> None:
    """Draw every benchmark over the runs of `make bench` and say where it changed for good."""
    from harness.regression.history import write_history

    for line in write_history(storage, output):
        _say(line)


@app.command()
def trial(job: Annotated[Path, typer.Argument(help="A job file (results/SWEEP/jobs/*.json).")]) -> None:
    """Run one job by hand in this process."""
    from harness.run.trial import main as trial_main

    raise typer.Exit(trial_main([str(job)]))


@data_app.command("stats")
def data_stats(source: str = "stdlib", vocab_size: VocabOption = 2048) -> None:
    """Documents, bytes and tokens of a text source."""
    from harness.training.data import stats

    table = Table("what", "value", title=source)
    for name, value in stats(source, vocab_size).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


@data_app.command("prepare")
def data_prepare(source: str = "stdlib", vocab_size: VocabOption = 2048) -> None:
    """Train the tokenizer and tokenise a text source into the cache."""
    from harness.training.data import prepare

    dataset = prepare(source, vocab_size)
    Console().print(f"data_id {dataset.data_id}: {len(dataset.train):,} training tokens", highlight=False)


def _say(line: str) -> None:
    print(line, flush=True)  # at once, also into a pipe: somebody waits for the address


def _wide_console() -> Console:
    # A pipe has no width; a line that is cut in two is no use to grep.
    return Console(width=None if sys.stdout.isatty() else 180, markup=False)


def _device(device: Device) -> str:
    if device is Device.cpu:
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device is Device.cuda:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; valid: cpu")
    return "cpu"


def _load(sweep: Path | None, device: Device, data: str | None) -> tuple[Path, Sweep]:
    from harness.sweep.load import load_sweep

    path = sweep or (FIRST_GPU if _device(device) == "cuda" else QUICK)
    model = load_sweep(path)
    return path, model if data is None else model.model_copy(update={"data": data})


def _command(path: Path, data: str | None) -> str:
    """The command as others would type it: no path of this machine."""
    from harness.run.text import describe_source

    shown = path if not path.is_absolute() else Path(path.name)
    return f"make sweep SWEEP={shown}" + (f" DATA={shlex.quote(describe_source(data))}" if data else "")


def _report(console: Console, folder: Path) -> None:
    """Write the report of a results folder; print the files written and what the numbers say."""
    from harness.report.build import conclusions, read_results, write_report

    results = read_results(folder)
    for path in write_report(results):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    for sentence in conclusions(results):
        console.print(sentence, highlight=False)


def main() -> None:
    """Console entry point: a mistake of the user is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a database that stays away
        print(f"stopped: {error}; finished points are kept; run the same command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; finished points are kept, the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
