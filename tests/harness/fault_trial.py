"""A trial without PyTorch that does to itself what the file in FAULTS says for its point's batch.

Before it does, it starts three processes that want to stay: one in its group, one in a session of its own,
one whose parent has ended. The file in PIDS gets their ids, and those of the trial and its guard.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.run import guard
from harness.run.trial import EXIT_OOM, output_path
from harness.sweep.catalog import WORKLOADS
from harness.sweep.point import Point
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter

SLEEP = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
]


def start_helpers() -> list[int]:
    """Processes that nobody waits for and that ignore a polite request to end."""
    helpers = [subprocess.Popen(SLEEP).pid, subprocess.Popen(SLEEP, start_new_session=True).pid]
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(subprocess.Popen(SLEEP, start_new_session=True).pid).encode())
        os._exit(0)
    os.close(write)
    helpers.append(int(os.read(read, 20)))
    os.wait()
    return helpers


def harm(fault: str, report: EventReporter, point: Point) -> None:
    """Do it; most of these do not return."""
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "abort":
        os.abort()
    elif fault == "exit":
        sys.exit(0)
    elif fault == "hard_exit":
        os._exit(3)
    elif fault == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "kills_its_guard":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    elif fault == "signals_its_group":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.killpg(0, signal.SIGTERM)
    elif fault == "loop":
        while True:
            pass
    elif fault == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    elif fault == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "memory":
        hoard = bytearray(b"x") * 2_000_000_000  # written, not only promised
        time.sleep(600 + len(hoard))
    elif fault == "babble":
        print("\n".join(f"line {number}" for number in range(100_000)), flush=True)
        os._exit(1)
    elif fault == "oom":
        print("out of memory, says the trial", flush=True)
        report.finish(point, "oom", "no more")
        os._exit(EXIT_OOM)
    elif fault == "dies_when_done":
        report.measure(point, WORKLOADS[point.workload].primary_metric, 1.0)
        report.finish(point)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "half_a_line":
        report._stream.write('{"event": "prog\n')
    elif fault == "slow":
        time.sleep(0.3)


def main() -> None:
    """Run the job in the first argument."""
    guard.enter()
    path = Path(sys.argv[1])
    job = Job.from_json(path.read_text(encoding="utf-8"))
    faults = json.loads(Path(os.environ["FAULTS"]).read_text())
    with output_path(path).open("a", encoding="utf-8") as stream:
        report = EventReporter(job, stream, os.environ["DEVICE"], "e")
        for point in job.points:
            report.start(point)
            fault = faults.get(str(point.batch), "")
            if "PIDS" in os.environ:
                pids = [os.getpid(), os.getppid(), *start_helpers()]
                Path(os.environ["PIDS"]).write_text(json.dumps(pids))
            harm(fault, report, point)
            metric = WORKLOADS[point.workload].primary_metric
            report.samples(point, metric, [float(point.batch)])
            report.measure(point, metric, float(point.batch))
            report.finish(point)


if __name__ == "__main__":
    main()
