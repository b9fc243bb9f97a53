"""One sample: run a method's work once and say how long the device took, with no launch cost in it.

Each choice of measurement is argued where it is made: `CudaSampler`, `L2Flush`, `CpuSampler`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.measure.memory import is_out_of_memory

FLUSH_FACTOR = 4  # times the last-level cache: replacement is not strictly by age, so 1x leaves lines behind
MAX_CPU_FLUSH_BYTES = 128 * 1024 * 1024
WARMUP_CALLS = 3  # of every method, before its first sample
CPU_WARMUP_CALLS = 1  # there are no clocks to raise and no streams to fill, and calls are long
_CPU_COPIES = 8
_BACKLOG_MS = 0.1  # first length of the spin; it doubles until it is enough
_BACKLOG_TRIES = 9  # so the longest is 25 ms; no host needs that long to queue a call that does not wait


@dataclass(frozen=True)
class TimedMethod:
    """One method of a paired timing.

    `call` does the work to be timed, always on the same tensors. `prepare`, if given, runs untimed before
    each call (a forward pass before a timed backward). `anchor` marks a method that others are compared with
    (a dense method). `calls` is how many units of work one call does: times are per unit. `repeats` is how
    often `call` runs in a row in one sample, after one `prepare`, as a decoding step does in its loop: it is
    captured once and replayed; times are per run.
    """

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    anchor: bool = False
    calls: int = 1
    repeats: int = 1

    @property
    def units(self) -> int:
        """Units of work of one sample."""
        return self.calls * self.repeats


class CaptureError(RuntimeError):
    """A method that cannot run inside a CUDA graph; `name` says which."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be captured in a CUDA graph: {reason}")
        self.name = name


class Sampler(Protocol):
    """What paired timing needs of a way to launch."""

    mode: str

    def add(self, method: TimedMethod) -> None:
        """Warm the method up and get it ready to be sampled; the same calls for every method."""

    def sample(self, name: str) -> float:
        """Milliseconds of one unit of an added method's work."""

    def host_bound(self) -> list[str]:
        """Methods that made the device wait for the host, so that their times hold launch gaps."""


class CpuSampler:
    """Wall-clock time of one call after the caches were filled with something else.

    The flush touches twice the last-level cache, but at most 128 MiB: a virtual machine reports the
    host's whole cache (hundreds of MiB) while it owns a slice of it, and a longer flush would cost more
    than the work.
    """

    mode = "cpu"

    def __init__(self) -> None:
        self._flush_buffer = torch.zeros(cpu_flush_bytes() // 4, dtype=torch.float32)
        self._methods: dict[str, TimedMethod] = {}

    def add(self, method: TimedMethod) -> None:
        """See `Sampler`."""
        self._methods[method.name] = method
        for _ in range(CPU_WARMUP_CALLS):
            self.sample(method.name)

    def sample(self, name: str) -> float:
        """See `Sampler`; wall clock."""
        method = self._methods[name]
        if method.prepare is not None:
            method.prepare()
        self._flush_buffer.add_(1.0)
        begin = time.perf_counter_ns()
        for _ in range(method.repeats):
            result = method.call()
        elapsed = time.perf_counter_ns() - begin
        del result  # not before: giving memory back is not part of the work
        return elapsed / 1e6 / method.units

    def host_bound(self) -> list[str]:
        """See `Sampler`; the host is the device."""
        return []


class CudaSampler:
    """Device time between two events around one call, with the launches hidden and the caches known.

    `mode` is made of two words. How the work is launched:

    - `graph`: every method is its own CUDA graph, and a sample is one replay. Warm-up runs on a side
      stream before capture, as PyTorch's notes on CUDA graphs ask. All graphs share one memory pool. No graph
      reads what another wrote: inputs and weights live outside the pool, and a graph writes each temporary
      before it reads it, so they may use the same memory in turn; without this the temporaries of all methods
      would be held at once. What a call returns is dropped at capture, so it goes back to the pool; what
      `prepare` leaves for `call` (an output with its saved tensors) is held until `call` is captured, and
      `prepare` is replayed before every replay of `call`, which may have overwritten it.
    - `launch`: eager calls.

    And what the caches hold when the first event is recorded:

    - `cold`: the L2 is flushed, see `L2Flush`.
    - `hot`: the same work ran just before, untimed.
    - `rotated`: nothing is done; the call itself goes over so many copies of its weights that each is evicted
      before its turn comes again.

    In every mode the GPU is first given a spin kernel long enough for the host to queue everything behind it,
    so the time between the events holds no launch gap. That is checked for every sample, not assumed: if the
    GPU has already passed the first event when the last launch is queued, the sample is thrown away and the
    spin doubled. Work that waits for the device in its middle (a `.item()`, a `nonzero`) can never be queued
    whole; after several doublings its samples are taken as they are, and `host_bound` names the method.
    """

    def __init__(self, device: torch.device, mode: str) -> None:
        self.mode = mode
        how, self._caches = mode.split("_")
        self._pool = torch.cuda.graph_pool_handle() if how == "graph" else None
        self._flush = L2Flush(device) if self._caches == "cold" else None
        self._cycles_per_ms = spin_cycles_per_ms()
        self._timers: dict[str, _EventTimer] = {}
        self._methods: list[TimedMethod] = []  # a graph does not keep the tensors that it reads

    def add(self, method: TimedMethod) -> None:
        """See `Sampler`. Raises CaptureError if it cannot be captured; out of memory is passed on."""
        self._methods.append(method)
        prepare, call = method.prepare, method.call
        if self._pool is not None:
            _warm_up_on_side_stream(method)
            if prepare is not None:
                prepare = _capture(method.name, prepare, self._pool).replay
            call = _capture(method.name, call, self._pool).replay
        if method.repeats > 1:
            call = _in_a_row(call, method.repeats)
        before = [step for step in (prepare,) if step is not None]
        if self._caches == "hot":
            before = [*before, call, *before]
        if self._flush is not None:
            before.append(self._flush)
        timer = _EventTimer(before, call, method.units, self._cycles_per_ms)
        for _ in range(WARMUP_CALLS):
            timer.sample()
        self._timers[method.name] = timer

    def sample(self, name: str) -> float:
        """See `Sampler`."""
        return self._timers[name].sample()

    def host_bound(self) -> list[str]:
        """See `Sampler`."""
        return [name for name, timer in self._timers.items() if timer.host_bound]


class L2Flush:
    """Fills the L2 with clean lines of unrelated data.

    A write pass over four times the L2 (its size is the device's own figure) evicts everything. It leaves the
    cache full of *dirty* lines, whose write-back would be charged to the work that follows (50 MB at 3 TB/s
    are 17 us on an H100); so a read pass over the same buffer follows, which replaces them by clean ones.
    """

    def __init__(self, device: torch.device) -> None:
        size = FLUSH_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()
        torch.sum(self._buffer, dim=0, out=self._sum)


class _EventTimer:
    """Times `call` with CUDA events behind a backlog that is long enough, see `CudaSampler`."""

    def __init__(
        self, before: list[Callable[[], object]], call: Callable[[], object], units: int, cycles_per_ms: float
    ) -> None:
        self._before = before
        self._call = call
        self._units = units
        self._cycles = int(_BACKLOG_MS * cycles_per_ms)
        self._most_cycles = self._cycles << (_BACKLOG_TRIES - 1)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self.host_bound = False

    def sample(self) -> float:
        for _ in range(1 if self.host_bound else _BACKLOG_TRIES):
            torch.cuda._sleep(self._cycles)
            for step in self._before:
                step()
            self._start.record()
            self._call()
            self._end.record()
            too_late = self._start.query()  # true: the GPU was there before the host had queued it all
            self._end.synchronize()
            if not too_late:
                return self._start.elapsed_time(self._end) / self._units
            self._cycles = min(2 * self._cycles, self._most_cycles)
        self.host_bound = True
        return self._start.elapsed_time(self._end) / self._units


def _in_a_row(call: Callable[[], object], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run


def rotated_copies(read_bytes: float, device: torch.device) -> int:
    """How many copies of weights a `rotated` call must go over so that each is cold at its turn.

    `read_bytes` is what the call surely reads of each copy: what it leaves alone evicts nothing. On CUDA one
    more than fill four times the L2. On the CPU, where a flush precedes every sample, all are cold however
    few they are; a handful makes the call longer than the clock's grain.
    """
    if device.type != "cuda":
        return _CPU_COPIES
    cache = FLUSH_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + math.ceil(cache / read_bytes)


def cpu_flush_bytes() -> int:
    """Twice the largest cache of core 0, taken to be at least 32 MiB; at most 128 MiB in all."""
    sizes = [32 * 1024**2]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1))
    return min(2 * max(sizes), MAX_CPU_FLUSH_BYTES)


def first_call_seconds(method: TimedMethod, device: torch.device) -> tuple[float, float]:
    """Wall time of a first call and of a steady one (the faster of two more), in seconds, device included.

    Their difference is what compilation and autotuning cost. Libraries must have been loaded before, see
    `load_libraries`, or the first method pays for all.
    """

    def wall() -> float:
        begin = time.perf_counter()
        if method.prepare is not None:
            method.prepare()
        method.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return wall(), min(wall(), wall())


def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Run a small product and its gradients, so that no method's first call pays for what all share.

    That is cuBLAS, the kernels' module, threads, and what autograd imports when it is first given a gradient.
    The gradient of silu comes first: autograd's thread must have launched a kernel before it may call cuBLAS,
    or PyTorch warns that the thread has no CUDA context.
    """
    a = torch.randn(64, 64, device=device).to(dtype).requires_grad_()
    y = torch.nn.functional.silu(torch.nn.functional.linear(a @ a.T, a))
    torch.autograd.grad(y, [a], torch.ones_like(y))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up_on_side_stream(method: TimedMethod) -> None:
    """Call it a few times where a capture would, the last time refusing to wait for the device.

    Raises CaptureError if it waits. Most work that cannot be captured is found out here, before a capture is
    begun: one that fails midway leaves PyTorch's allocator in a state that is hard to mend.
    """
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in range(WARMUP_CALLS):
            _on_wait("error" if call == WARMUP_CALLS - 1 else "default")
            try:
                if method.prepare is not None:
                    method.prepare()
                method.call()
            except RuntimeError as error:
                if "synchronizing CUDA operation" not in str(error):
                    raise
                raise CaptureError(method.name, "it waits for the device") from error
            finally:
                _on_wait("default")
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@functools.cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """One for all, since memory that the allocator keeps for a stream serves no other."""
    return torch.cuda.Stream()


def _on_wait(mode: str) -> None:
    """What happens when work waits for the device: "default" (nothing) or "error"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mode announces itself as a prototype
        torch.cuda.set_sync_debug_mode(mode)


def _capture(name: str, work: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # an end of capture that fails leaves the capture's stream current
        # PyTorch 2.11 leaves its allocator recording after a failed end (pytorch/pytorch#180395), and then
        # `empty_cache` frees nothing. Versions that mend it themselves refuse a second end.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        if is_out_of_memory(error):
            raise
        raise CaptureError(name, str(error).partition("\n")[0]) from error
    return graph


def spin_cycles_per_ms() -> float:
    """How many cycles of `torch.cuda._sleep` last a millisecond, measured (the second of two: warm)."""
    cycles = 10_000_000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return cycles / start.elapsed_time(end)
