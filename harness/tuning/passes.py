"""Which variant of each pass is fastest on this GPU, and how long the chunks should be.

    python -m harness.tuning.passes OUT.jsonl [--shapes 1b,130m] [--seconds 240]

Every candidate is compiled and checked against the reference in parallel processes; those that are right are
timed. With the fastest ones a whole forward and backward is timed for several chunk lengths, beside its GEMMs
alone and a compiled dense network. One line of JSON per measurement goes to OUT.jsonl, a table to the
terminal.

It decides: `select_tiling` and `EXPAND_TILING` of passes.py; the chunk bytes of moc/ops/triton_ffn.py; and
from the rows "gemms" what joining w_gate and w_up is worth.

A pass is timed over buffers several times the L2 cache, a step as the replay of a CUDA graph; both are
medians of CUDA-event times of launches in a row.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc.config import FfnShape
from moc.kernels import passes
from moc.kernels.passes import EXPAND_TILING, Kept, Tiling, expand_pass, select_pass, select_tiling
from moc.layers.moc import TritonMoCFFN
from moc.ops import triton_ffn as ffn_ops
from moc.ops.compact import n_words, unpack_bitmask
from moc.reference import select_mask
from moc.selection import parse_selection

SHAPES = {  # tokens, d, d_ffn
    "60m": (65536, 512, 1408),
    "130m": (65536, 768, 2048),
    "1b": (16384, 2048, 5504),
    "7b": (16384, 4096, 11008),
}
RULES = ("topk:0.1875", "nm:2:8", "nm:12:64")
CHUNK_MB = (32, 64, 96, 192, 4096)  # the last: one chunk
DTYPE, DEVICE = torch.bfloat16, "cuda"
COPY_BYTES_PER_MS = 3.0e9  # read plus written, of one H100: the floor printed beside each pass


@dataclass(frozen=True)
class Candidate:
    """One variant of a pass at one row length."""

    kind: str  # select or expand
    rule: str
    d_ffn: int
    tiling: Tiling
    fp8: bool = False

    @property
    def group(self) -> tuple[str, str, int, bool]:
        """What it competes with."""
        return self.kind, self.rule, self.d_ffn, self.fp8


def candidates(d_ffn: int) -> Iterator[Candidate]:
    """What is tried at a row length; the first of each group is what runs today."""
    for rule in RULES:
        today = select_tiling(d_ffn, parse_selection(rule), packed=True)
        tilings = [today]
        for factor, rows in itertools.product((1, 2), (8, 16)):
            warps = today.num_warps * factor
            tilings.append(replace(today, num_warps=warps, rows=rows * warps))
        if rule.startswith("topk"):
            tilings += [replace(today, guess=False), replace(today, rows=today.rows // 2, vector=1)]
            if today.num_warps > 1:
                tilings.append(replace(today, num_warps=today.num_warps // 2, rows=today.rows // 2))
        yield from (Candidate("select", rule, d_ffn, tiling) for tiling in dict.fromkeys(tilings))
    yield Candidate(
        "select", RULES[0], d_ffn, select_tiling(d_ffn, parse_selection(RULES[0]), True), fp8=True
    )
    tilings = [EXPAND_TILING]
    for warps, rows in itertools.product((1, 2, 4), (8, 16)):
        tilings.append(Tiling(warps, rows * warps, 8))
    yield from (Candidate("expand", RULES[0], d_ffn, tiling) for tiling in dict.fromkeys(tilings))
    yield Candidate("expand", RULES[0], d_ffn, EXPAND_TILING, fp8=True)


class Rows:
    """Buffers of a candidate for some tokens, and its launch."""

    def __init__(self, candidate: Candidate, n_tokens: int) -> None:
        self.candidate, self.rule = candidate, parse_selection(candidate.rule)
        d_ffn, k = candidate.d_ffn, self.rule.k(candidate.d_ffn)
        dtype = torch.float8_e4m3fn if candidate.fp8 else DTYPE
        self.g, self.u = torch.randn(n_tokens, 2 * d_ffn, device=DEVICE, dtype=DTYPE).split(d_ffn, dim=1)
        self.z = torch.randn(n_tokens, d_ffn, device=DEVICE, dtype=DTYPE)
        self.kept = Kept(
            torch.zeros(n_tokens, k, 2, device=DEVICE, dtype=dtype),
            torch.zeros(n_tokens, n_words(d_ffn), device=DEVICE, dtype=torch.int32),
            torch.zeros(n_tokens, 2, device=DEVICE) if candidate.fp8 else None,
        )
        self.overflow = torch.zeros((), device=DEVICE, dtype=torch.int64)
        if candidate.kind == "expand":
            select_pass(self.g, self.u, self.z, self.rule, self.kept, self.overflow)
            self.dz = torch.randn(n_tokens, d_ffn, device=DEVICE, dtype=DTYPE)

    def launch(self) -> None:
        """The pass, once."""
        tiling = self.candidate.tiling
        if self.candidate.kind == "select":
            select_pass(self.g, self.u, self.z, self.rule, self.kept, self.overflow, tiling)
        else:
            expand_pass(self.dz, self.kept, self.g, self.u, self.z, tiling)

    def kept_pairs(self) -> Tensor:
        """Gate and up as backward sees them: float64 [T * K, 2]."""
        pairs = self.kept.pairs.double()
        if self.kept.scales is not None:
            pairs *= self.kept.scales[:, None, :].double()
        return pairs.flatten(0, 1)

    def floor_ms(self) -> float:
        """Time of a copy that moves the bytes that a launch must read and write."""
        kept = (t.nbytes for t in (self.kept.pairs, self.kept.bitmask, self.kept.scales) if t is not None)
        full = (3 if self.candidate.kind == "select" else 4) * self.z.nbytes
        return (sum(kept) + full) / COPY_BYTES_PER_MS


def check(candidate: Candidate, n_tokens: int = 200) -> dict[str, Any]:
    """Compile a candidate, compare some rows of it with the reference, and say what it compiled to."""
    torch.manual_seed(0)
    rows = Rows(candidate, n_tokens)
    if candidate.kind == "select":
        mask = select_mask(rows.g, rows.rule)
        rows.launch()
        kept = torch.stack((rows.g[mask], rows.u[mask]), dim=1)
        errors = [
            float(not torch.equal(unpack_bitmask(rows.kept.bitmask, candidate.d_ffn), mask)),
            _error(rows.z, mask * F.silu(rows.g.double()) * rows.u.double()),
            _error(rows.kept_pairs(), kept) / (10 if candidate.fp8 else 1),
        ]
    else:
        mask = unpack_bitmask(rows.kept.bitmask, candidate.d_ffn)
        gate, up = torch.zeros_like(rows.dz).double(), torch.zeros_like(rows.dz).double()
        gate[mask], up[mask] = rows.kept_pairs().T
        gate.requires_grad_()
        up.requires_grad_()
        z = F.silu(gate) * up
        dg, du = torch.autograd.grad(z, (gate, up), rows.dz.double() * mask)
        rows.launch()
        errors = [_error(rows.z, z), _error(rows.g, dg), _error(rows.u, du)]
    kernel = passes.select_fwd_kernel if candidate.kind == "select" else passes.expand_bwd_kernel
    compiled = next(reversed(kernel.device_caches[torch.cuda.current_device()][0].values()))
    return {"error": max(errors), "registers": compiled.n_regs, "spills": compiled.n_spills}


def _error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.double() - expected).norm() / expected.norm())


def _checked(candidate: Candidate) -> dict[str, Any]:
    try:
        return check(candidate)
    except Exception as error:  # that a variant does not compile or run is a result
        return {"error": math.inf, "message": f"{type(error).__name__}: {error}"[-400:]}


def milliseconds(launch: Callable[[], object], repeats: int = 25) -> float:
    """Median time of one launch on the device."""
    for _ in range(3):
        launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        launch()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def graphed(launch: Callable[[], object]) -> Callable[[], None]:
    """The launch as the replay of a CUDA graph, so that the CPU's part costs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def gemms(n_tokens: int, d: int, d_ffn: int) -> dict[str, float]:
    """Milliseconds of the layer's GEMMs over all tokens, with gate and up joined and not."""
    x, dx, dy = (torch.randn(n_tokens, d, device=DEVICE, dtype=DTYPE) for _ in range(3))
    w_gu, w, dw = (
        torch.randn(n, d, device=DEVICE, dtype=DTYPE) / d**0.5 for n in (2 * d_ffn, d_ffn, 2 * d_ffn)
    )
    gu, z = (torch.randn(n_tokens, n, device=DEVICE, dtype=DTYPE) for n in (2 * d_ffn, d_ffn))
    (g, u), (w_gate, w_up) = gu.split(d_ffn, dim=1), w_gu.split(d_ffn)
    launches: dict[str, Callable[[], object]] = {
        "gate_up_joined": lambda: torch.mm(x, w_gu.T, out=gu),
        "gate_up_apart": lambda: (torch.mm(x, w_gate.T, out=g), torch.mm(x, w_up.T, out=u)),
        "down": lambda: torch.mm(z, w, out=dx),
        "dz": lambda: torch.mm(dy, w.T, out=z),
        "dx_joined": lambda: torch.mm(gu, w_gu, out=dx),
        "dx_apart": lambda: (torch.mm(g, w_gate, out=dx), dx.addmm_(u, w_up)),
        "dw_gate_up": lambda: torch.mm(gu.T, x, out=dw),
        "dw_gate_up_added": lambda: dw.addmm_(gu.T, x),
        "dw_down": lambda: torch.mm(z.T, dy, out=dw[:d_ffn]),
        "join_weights": lambda: torch.cat((w_gate, w_up)),
    }
    return {name: milliseconds(launch, 15) for name, launch in launches.items()}


class DenseFused(nn.Module):
    """Dense SwiGLU with gate and up in one GEMM: the rival."""

    def __init__(self, d: int, d_ffn: int) -> None:
        super().__init__()
        self.w_gu = nn.Parameter(torch.randn(2 * d_ffn, d) / d**0.5)
        self.w_down = nn.Parameter(torch.randn(d_ffn, d) / d**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        g, u = F.linear(x, self.w_gu).chunk(2, dim=-1)
        return (F.silu(g) * u) @ self.w_down


def step(layer: nn.Module, n_tokens: int, d: int) -> Callable[[], object]:
    """Forward and backward of a layer on random tokens, as a launch."""
    x = torch.randn(n_tokens, d, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(n_tokens, d, device=DEVICE, dtype=DTYPE)
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


def steps(name: str, rule: str, select: Tiling, expand: Tiling) -> Iterator[dict[str, Any]]:
    """Step times of a shape by chunk length, of its GEMMs alone in the same chunks, and peak memory."""
    n_tokens, d, d_ffn = SHAPES[name]
    layer = TritonMoCFFN(FfnShape(d, d_ffn), parse_selection(rule)).to(DEVICE, DTYPE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / d**0.5)
    launch = step(layer, n_tokens, d)
    originals = passes.select_pass, passes.expand_pass
    tuned = (
        functools.partial(originals[0], tiling=select),
        functools.partial(originals[1], tiling=expand),
    )
    nothing: tuple[Callable[..., None], ...] = (lambda *_: None,) * 2
    kept = ffn_ops.CHUNK_BYTES, ffn_ops.MIN_CHUNKS
    try:
        for chunk in CHUNK_MB:
            ffn_ops.CHUNK_BYTES, ffn_ops.MIN_CHUNKS = chunk << 20, 1
            row: dict[str, Any] = {"kind": "step", "shape": name, "rule": rule, "chunk_mb": chunk}
            for key, functions in (("step_ms", tuned), ("step_ms_gemms", nothing)):
                passes.select_pass, passes.expand_pass = functions
                if key == "step_ms":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    launch()
                    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
                row[key] = milliseconds(graphed(launch), 12)
            yield row
    finally:
        passes.select_pass, passes.expand_pass = originals
        ffn_ops.CHUNK_BYTES, ffn_ops.MIN_CHUNKS = kept


def measure(names: list[str], seconds: float, processes: int) -> Iterator[dict[str, Any]]:
    """Everything, shape by shape; steps only while there is time."""
    start = time.monotonic()
    every = list(dict.fromkeys(c for name in names for c in candidates(SHAPES[name][2])))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        checked = dict(zip(every, pool.map(_checked, every), strict=True))
    print(f"{len(every)} variants compiled and checked in {time.monotonic() - start:.0f} s", flush=True)
    fastest: dict[tuple[str, str, int, bool], tuple[float, Tiling]] = {}
    for name in names:
        n_tokens, d, d_ffn = SHAPES[name]
        for candidate in candidates(d_ffn):
            row = {**asdict(candidate), "shape": name, **checked[candidate]}
            if row["error"] < 5e-3:
                rows = Rows(candidate, n_tokens)
                row |= {"ms": milliseconds(rows.launch), "floor_ms": rows.floor_ms()}
                if row["ms"] < fastest.get(candidate.group, (math.inf,))[0]:
                    fastest[candidate.group] = row["ms"], candidate.tiling
                del rows
            yield row
        yield {"kind": "gemms", "shape": name, **gemms(n_tokens, d, d_ffn)}
        torch.cuda.empty_cache()
    for name, rule in itertools.product(names, RULES):
        n_tokens, d, d_ffn = SHAPES[name]
        select = fastest.get(("select", rule, d_ffn, False))
        expand = fastest.get(("expand", RULES[0], d_ffn, False))
        if time.monotonic() - start > seconds or select is None or expand is None:
            print(f"no steps of {name} {rule}: {seconds:.0f} s are over or no variant is right", flush=True)
            continue
        if rule == RULES[0]:
            dense = DenseFused(d, d_ffn).to(DEVICE, DTYPE)
            dense.compile()
            launch = graphed(step(dense, n_tokens, d))
            yield {"kind": "dense", "shape": name, "step_ms": milliseconds(launch, 12)}
        yield from steps(name, rule, select[1], expand[1])
        torch.cuda.empty_cache()


def report(results: list[dict[str, Any]]) -> None:
    """Print what matters: today's variant beside the fastest three, wrong ones, GEMMs, and the best steps."""
    passes = [row for row in results if row["kind"] in ("select", "expand")]
    for key in dict.fromkeys((row["shape"], row["kind"], row["rule"], row["fp8"]) for row in passes):
        group = [row for row in passes if (row["shape"], row["kind"], row["rule"], row["fp8"]) == key]
        timed = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])
        shown = [row for row in group if row is group[0] or row in timed[:3] or "ms" not in row]
        for row in shown:
            tiling = " ".join(f"{name} {int(value)}" for name, value in row["tiling"].items())
            numbers = (
                f"{row['ms']:.3f} ms (floor {row['floor_ms']:.3f})"
                if "ms" in row
                else f"WRONG {row['error']:.3g} {row.get('message', '')}"
            )
            print(
                f"{key[0]:5}{key[1]} {key[2]:12}{'fp8 ' if key[3] else '    '}{numbers} {tiling} registers"
                f" {row.get('registers')} spills {row.get('spills')}{' <- today' if row is group[0] else ''}"
            )
    for row in results:
        if row["kind"] == "gemms":
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    dense = {row["shape"]: row["step_ms"] for row in results if row["kind"] == "dense"}
    for shape, rule in dict.fromkeys((row["shape"], row["rule"]) for row in results if row["kind"] == "step"):
        group = [r for r in results if r["kind"] == "step" and (r["shape"], r["rule"]) == (shape, rule)]
        for row in sorted(group, key=lambda row: row["step_ms"])[:5]:
            print(
                f"{shape:5}{rule:12} chunks of {row['chunk_mb']:4} MB: step"
                f" {row['step_ms']:.3f} ms, its GEMMs {row['step_ms_gemms']:.3f}, dense {dense[shape]:.3f}:"
                f" {dense[shape] / row['step_ms']:.3f} x; peak {row['peak_bytes'] / 1e6:.0f} MB"
            )


def main() -> None:
    """Run everything and write it down as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=240.0, help="time no step after this long")
    parser.add_argument("--processes", type=int, default=12, help="that compile and check")
    options = parser.parse_args()
    results = []
    with options.out.open("w") as out:
        for row in measure(options.shapes.split(","), options.seconds, options.processes):
            results.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
    report(results)


if __name__ == "__main__":
    main()
