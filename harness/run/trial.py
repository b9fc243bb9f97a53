"""One job in one process: JSON in, JSON lines out.

The runner starts `python -m harness.run.trial JOB.json`, so the only argument is read without a parser of
options; people type `mocbench trial JOB.json`. Either reads the job, runs its workload, and appends events to
the same path with the ending `.out.jsonl`.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import IO

from harness.run import guard
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter

# What starts the process of a trial; it gets the path of its job file.
TRIAL_COMMAND = (sys.executable, "-m", "harness.run.trial")
EXIT_OOM = 17
RECOMPILE_LIMIT = 1024  # of one function, and of all


def output_path(job_path: Path) -> Path:
    """Where the events of a job go."""
    return job_path.with_suffix(".out.jsonl")


def set_process_options(device: str) -> None:
    """Set what holds for the whole process of a trial. Called once, before any work.

    Every method, rule and shape of a group compiles the same few functions anew. Past its limit PyTorch runs
    the rest eagerly and says nothing. Nothing is compiled on the CPU, where loading the compiler would only
    cost time and memory.
    """
    if device == "cuda":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT


def measure_job(job: Job, stream: IO[str]) -> int:
    """Run a job's workload and write its events; returns the process exit code.

    Out of memory is reported for the point at work and ends the process with `EXIT_OOM`, so the rest of a
    group runs in a fresh one. Any other exception is a crash: its traceback goes to the log.
    """
    import torch

    from harness.measure.environment import device_name, environment_record

    set_process_options(job.device)
    record = environment_record(job.device)
    reporter = EventReporter(job, stream, device_name(job.device), record["env_id"])
    reporter.environment(record)
    workload = importlib.import_module(f"harness.workloads.{job.points[0].workload}")
    try:
        workload.run(job, reporter)
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.print_exc()
        if reporter.current is not None:
            reporter.finish(reporter.current, "oom", str(error).split("\n")[0])
        return EXIT_OOM
    except Exception as error:  # the process boundary: a typed row for the sweep, the traceback for the log
        traceback.print_exc()
        blamed = reporter.current or job.points[0]
        reporter.finish(blamed, "crashed", f"{type(error).__name__}: {str(error).split(chr(10))[0]}")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the only argument is the path of the job file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m harness.run.trial JOB.json", file=sys.stderr)
        return 2
    guard.enter()
    path = Path(arguments[0])
    try:
        job = Job.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path}: not a job: {error}", file=sys.stderr)
        return 2
    with output_path(path).open("a", encoding="utf-8") as stream:
        return measure_job(job, stream)


if __name__ == "__main__":
    sys.exit(main())
