"""How near a measured time is to the floor: work and bytes that must be, over ceilings this device was seen
to reach.

A ceiling is never a datasheet figure: copy bandwidth and GEMM rates are measured once per device and PyTorch
version and kept in the cache folder. What is not known (a count, a ceiling) is None, and so is all that
follows.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from harness.measure.cache import cache_folder
from harness.measure.environment import device_name, environment_record, gpu_identity
from harness.measure.ffn import DTYPES
from harness.measure.timing import TimingSettings, median_ms
from moc.config import FfnShape
from moc.methods import Method
from moc.selection import Selection

_CEILING_TIMING = {
    "cuda": TimingSettings(rel_ci=0.005, max_seconds=3.0),
    "cpu": TimingSettings(rel_ci=0.02, max_seconds=0.5),
}
_COPY_BYTES = {"cuda": 2 * 1024**3, "cpu": 128 * 1024**2}
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """What the device reached: bytes read plus written per second of a copy, and GEMM rates by dtype."""

    copy_bytes_per_s: float
    gemm_flop_per_s: dict[str, float]  # by "bf16", "fp32", ...; square product of random data


@dataclass(frozen=True)
class MinBytes:
    """Fewest bytes through device memory, each input read once and each output written once."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        """Forward and backward apart, as in training: other layers run between them."""
        return self.forward + self.backward


def train_min_bytes(
    shape: FfnShape, tokens: int, itemsize: int, saved_bytes_per_token: float | None
) -> MinBytes | None:
    """Minimal traffic of a training step of one FFN that saves so much per token (x included); None if
    unknown.

    Forward reads x and the weights, writes y and what is saved beside x. Backward reads dy, the weights and
    all that was saved, writes dx and the gradients of the weights.
    """
    if saved_bytes_per_token is None:
        return None
    weights = shape.n_params() * itemsize
    activation = tokens * shape.d_model * itemsize
    saved = tokens * saved_bytes_per_token
    return MinBytes(
        forward=weights + activation + activation + (saved - activation),
        backward=weights + activation + saved + activation + weights,
    )


def decode_min_bytes(
    shape: FfnShape, batch: int, itemsize: int, channels_read: int, row_bytes: int | None = None
) -> float:
    """Minimal traffic of one decoding step: all of w_gate, `channels_read` rows of w_up and w_down, x and y.

    `channels_read` is d_ffn for a dense method, else the number of channels that any token of the batch
    keeps. `itemsize` is that of x and y, and of the weights unless `row_bytes` says what a row of theirs
    takes.
    """
    activation = shape.d_model * itemsize
    row = activation if row_bytes is None else row_bytes
    return float((shape.d_ffn + 2 * channels_read) * row + 2 * batch * activation)


def decode_least_bytes(method: Method, selection: Selection | None, shape: FfnShape, itemsize: int) -> float:
    """Bytes of the weights that a decoding step of one token surely reads.

    Of a `threshold` that is w_gate alone, since its K is a cap.
    """
    if selection is None:
        channels = shape.d_ffn
    else:
        channels = 0 if selection.rule == "threshold" else selection.k(shape.d_ffn)
    return decode_min_bytes(shape, 0, itemsize, channels, method.row_bytes(shape.d_model, itemsize))


def count_flops(call: Callable[[], object]) -> int | None:
    """Floating-point operations of the matrix products in one call, by PyTorch's counter.

    None if the call runs a custom op that has registered no formula (`torch.utils.flop_counter.
    register_flop_formula`): the counter would take it for free. A call that runs backward must do so by
    `y.backward`, since the counter follows modules by hooks that `torch.autograd.grad` refuses.
    """
    unknown: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace not in ("aten", "prim", "prims") and func._overloadpacket not in flop_registry:
                unknown.add(func.name())
            return func(*args, **(kwargs or {}))

    counter = FlopCounterMode(display=False)
    with counter, Watch():
        call()
    return None if unknown else counter.get_total_flops()


def floor_ms(
    flops: float | None, min_bytes: float | None, ceilings: Ceilings | None, dtype: str
) -> float | None:
    """The longer of compute time and traffic time at the ceilings, in ms; None if anything is unknown."""
    if flops is None or min_bytes is None or ceilings is None or dtype not in ceilings.gemm_flop_per_s:
        return None
    return 1e3 * max(flops / ceilings.gemm_flop_per_s[dtype], min_bytes / ceilings.copy_bytes_per_s)


def pct_of_roofline(floor: float | None, measured_ms: float) -> float | None:
    """Floor over measured time in percent; None if the floor is unknown."""
    return None if floor is None else 100.0 * floor / measured_ms


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure copy bandwidth and GEMM rates (random data) now; some seconds on a GPU, one or two on a CPU."""
    generator = torch.Generator(device).manual_seed(0)

    def milliseconds(call: Callable[[], object]) -> float:
        return median_ms(call, device, _CEILING_TIMING[device.type], "launch_cold")

    def copy_rate(size: int) -> float:
        source = torch.randn(size // 4, device=device, generator=generator)
        target = torch.empty_like(source)
        return 2.0 * size / (milliseconds(lambda: target.copy_(source)) / 1e3)

    def gemm_rate(n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        return 2.0 * n**3 / (milliseconds(lambda: torch.mm(a, b, out=out)) / 1e3)

    return Ceilings(
        copy_bytes_per_s=copy_rate(_COPY_BYTES[device.type]),
        gemm_flop_per_s={name: gemm_rate(_GEMM_SIZE[device.type], dtype) for name, dtype in DTYPES.items()},
    )


def stored_ceilings(device: torch.device) -> Ceilings | None:
    """The ceilings measured earlier on this device with this PyTorch, or None."""
    try:
        values = json.loads(_ceilings_path(device).read_text(encoding="utf-8"))
        return Ceilings(float(values["copy_bytes_per_s"]), dict(values["gemm_flop_per_s"]))
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not what was written here: measure anew
        return None


def ensure_ceilings(device: torch.device) -> Ceilings:
    """The stored ceilings, measured and stored first if there are none.

    Where the cache folder cannot be written they are measured each time.
    """
    known = stored_ceilings(device)
    if known is None:
        known = measure_ceilings(device)
        with contextlib.suppress(OSError):
            store_ceilings(device, known)
    return known


def store_ceilings(device: torch.device, ceilings: Ceilings) -> None:
    """Keep them, with the environment, in the cache folder. Raises OSError where it cannot be written."""
    path = _ceilings_path(device)
    record = {
        **asdict(ceilings),
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment_record(device.type),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _ceilings_path(device: torch.device) -> Path:
    identity = f"-{gpu_identity()}" if device.type == "cuda" else ""
    name = f"{device_name(device.type)}{identity}-torch-{torch.__version__}"
    file = "".join(c if c.isalnum() or c in ".-+" else "_" for c in name)
    return cache_folder() / "ceilings" / f"{file}.json"
