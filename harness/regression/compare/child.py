"""One side of a comparison: a process that keeps the benchmarks of a checkout ready and times them when told.

    python -m harness.regression.compare.child CHECKOUT DEVICE

Only `harness.regression.compare.checkouts` starts it, so its arguments are read without a parser. A
line of JSON on standard input is a request, a line on standard output the answer. `moc` and the definitions
of the benchmarks are the checkout's; everything else of `harness` is the judge's own, on both sides, so that
a change of how things are measured is never taken for a change of speed.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from harness.measure.launch import Sampler

# Where a checkout defines its benchmarks: today, and before the modules moved into folders.
DEFINITIONS = ("harness/regression/benchmarks.py", "harness/benchmarks.py")
# Definitions of older checkouts run on today's harness: what they import by a name that has changed since.
OLD_NAMES = (("harness.measure.launch", "Contender", "TimedMethod"),)  # module, name then, name now
# A block of samples is what alternates. On a GPU it is long enough for the other process's turn, and the
# switch between the two, not to matter; its median goes on.
_BLOCK_MS = 4.0
_LEAST_BLOCK, _MOST_BLOCK = 3, 15
_OWN_TIME_SAMPLES = 9  # from which the length of injected work follows
_SHIFT_BYTES = 1_300_000  # times the attempt: by so much memory lies elsewhere when opened again


def main() -> int:
    """Answer requests until standard input ends."""
    root, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    # Whatever prints must not print into the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(root))
    gc.disable()  # a pause would hit whoever is being timed; what is opened anew is collected before
    try:
        side = _Checkout(root, device)
    except Exception as error:  # the checkout may hold anything; the judge says what was wrong with it
        _answer(answers, {"error": _one_line(error)})
        return 1
    _answer(answers, {"benchmarks": side.names, "environment": side.environment()})
    for line in sys.stdin:
        request = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(side, request.pop("do"))
        try:
            answer = command(**request)
        except Exception as error:  # whatever the code under test raises; the point fails, the rest goes on
            answer = {"error": _one_line(error)}
        _answer(answers, answer)
    return 0


class _Checkout:
    """The benchmarks of a checkout, those that are open with their samplers."""

    def __init__(self, root: Path, device: str) -> None:
        path = next((root / place for place in DEFINITIONS if (root / place).exists()), None)
        if path is None:
            raise ImportError(f"it has no {DEFINITIONS[0]}, so it is older than these benchmarks")
        _check_origin(importlib.import_module("moc"), root)
        import torch

        from harness.measure.clocks import ClockReader

        definitions = _load(path)
        self._device = torch.device(device)
        if device == "cpu":
            torch.set_num_threads(1)
        self._benchmarks = definitions.benchmarks(device)
        self._clocks = ClockReader(self._device)
        self._open: dict[str, _Open] = {}
        self.names = list(self._benchmarks)

    def environment(self) -> dict[str, Any]:
        """What both sides share."""
        from harness.measure.environment import environment_record

        return environment_record(self._device.type)

    def open(self, name: str, inject: float, attempt: int) -> dict[str, Any]:
        """Get a benchmark ready, elsewhere in memory each attempt; `inject` adds that share of its time."""
        import torch

        from harness.measure.launch import load_libraries
        from harness.measure.timing import open_sampler

        self._open.pop(name, None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        load_libraries(self._device, torch.float32)
        benchmark = self._benchmarks[name]
        shift = torch.empty(attempt * _SHIFT_BYTES, dtype=torch.uint8, device=self._device)
        method = benchmark.open(self._device)
        sampler, notes = open_sampler([method], self._device, benchmark.mode)
        if inject:
            from harness.measure.selftest import slowed

            samples = [sampler.sample(method.name) for _ in range(_OWN_TIME_SAMPLES)]
            own_ms = statistics.median(samples) * method.units
            call = slowed(method.call, inject, own_ms, self._device)
            method = dataclasses.replace(method, call=call)
            sampler, notes = open_sampler([method], self._device, benchmark.mode)
        begin = time.perf_counter()
        ms = sampler.sample(method.name)
        wall_ms = 1e3 * (time.perf_counter() - begin)
        block = 1
        if self._device.type == "cuda":
            block = max(_LEAST_BLOCK, min(_MOST_BLOCK, round(_BLOCK_MS / wall_ms)))
        self._open[name] = _Open(method.name, sampler, block, shift)
        units = method.units
        return {"mode": sampler.mode, "notes": notes, "units": units, "ms": ms, "tokens": benchmark.tokens}

    def sample(self, name: str) -> dict[str, Any]:
        """Milliseconds of a unit of work: the median of a block of samples."""
        return {"ms": self._open[name].sample()}

    def close(self, name: str) -> dict[str, Any]:
        """Give back what an open benchmark holds."""
        del self._open[name]
        return {}

    def conditions(self) -> dict[str, Any]:
        """Clock and throttling of the device now."""
        read = self._clocks.read()
        return {"conditions": None if read is None else dataclasses.asdict(read)}


@dataclasses.dataclass(frozen=True)
class _Open:
    """A benchmark that is ready; `shift` is the memory that moves it."""

    method: str
    sampler: Sampler
    block: int
    shift: torch.Tensor

    def sample(self) -> float:
        return statistics.median(self.sampler.sample(self.method) for _ in range(self.block))


def _check_origin(module: ModuleType, root: Path) -> None:
    if not Path(str(module.__file__)).resolve().is_relative_to(root):
        raise ImportError(f"it has no package {module.__name__}")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness.regression.benchmarks", path)
    assert spec is not None
    assert spec.loader is not None
    for name, then, now in OLD_NAMES:
        setattr(importlib.import_module(name), then, getattr(importlib.import_module(name), now))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _answer(stream: IO[str], answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


if __name__ == "__main__":
    sys.exit(main())
