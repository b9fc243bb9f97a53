"""Workers as actors of a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from rich.console import Console

from harness.errors import UserError
from harness.run.local import run_worker
from harness.run.options import MEANWHILE_SECONDS, RunOptions
from harness.sweep.model import Sweep

# Once one worker finds nothing left, the others find the same when they look next.
LAST_SECONDS = 60.0


def run_on_ray(sweep: Sweep, options: RunOptions, console: Console, meanwhile: Callable[[], object]) -> None:
    """Work a sweep off with one worker per GPU of a Ray cluster, or per CPU of one without GPUs in use.

    The cluster is the one that RAY_ADDRESS or `ray start` on this host names; without one, this host alone.
    Ray places the workers and restarts those that die; leases decide who measures which point, as always.
    `options.workers` caps their number; `meanwhile` is called again and again until the end. Raises UserError
    if Ray is not installed or the cluster has no such device.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray: Ray is not installed; pip install 'mocbench[ray]'") from error

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=True)
    try:
        kind = "GPU" if options.device == "cuda" else "CPU"
        slots = int(ray.cluster_resources().get(kind, 0))
        count = min(slots, options.workers or slots)
        if count == 0:
            raise UserError(f"--executor ray: the cluster has no {kind}; valid with --device cpu or cuda")
        console.print(f"{count} workers on {len(ray.nodes())} Ray nodes, one per {kind}", highlight=False)
        actor = cast(Any, ray.remote(_RayWorker)).options(
            **{f"num_{kind.lower()}s": 1},
            max_restarts=-1,  # killed, out of memory, or its node is gone: again, elsewhere if need be
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )
        workers = [actor.remote() for _ in range(count)]
        running = [worker.work.remote(sweep, options) for worker in workers]
        done: list[Any] = []
        while not done:
            done, running = ray.wait(running, timeout=MEANWHILE_SECONDS)
            meanwhile()
        if running:
            more, _ = ray.wait(running, num_returns=len(running), timeout=LAST_SECONDS)
            done += more
        ray.get(done)  # raises what a worker raised
        for worker in workers:
            ray.kill(worker)
    finally:
        if ours:
            ray.shutdown()


class _RayWorker:
    """What runs in a Ray actor: one worker with what Ray gave it, one GPU or one CPU."""

    def work(self, sweep: Sweep, options: Any) -> None:
        """Work the sweep off together with the others."""
        run_worker(sweep, dataclasses.replace(options, workers=1, executor="local"), Console())
