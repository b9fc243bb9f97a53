"""Which variant of each pass is fastest on this GPU, and how long the chunks should be.

    python -m harness.tuning.passes OUT.jsonl [--shapes 1b,130m] [--seconds 240]

Every variant is compiled and checked against the reference in parallel processes; those that are right are
timed. With the fastest ones a whole forward and backward is timed for several chunk lengths, beside its GEMMs
alone and the compiled method `dense_fused`. One line of JSON per measurement goes to OUT.jsonl, a table to
the terminal. Times are medians, each call a CUDA graph that finds the L2 cache flushed.

It decides: `select_tiling` and `EXPAND_TILING` of moc/kernels/passes.py; the chunk bytes of
moc/ops/triton_ffn.py; and from the rows "gemm" what joining w_gate and w_up is worth.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from harness.measure.ffn import FfnTensors, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.roofline import ensure_ceilings
from harness.tuning.trials import DEVICE, DTYPE, Row, check_all, compiled_to, print_groups, timed, write_rows
from moc.config import FfnShape
from moc.kernels import passes
from moc.kernels.passes import EXPAND_TILING, Kept, Tiling, expand_pass, select_pass, select_tiling
from moc.layers.dense import FusedFFN
from moc.ops.compact import unpack_bitmask
from moc.ops.inputs import place_side_by_side
from moc.ops.triton_ffn import Chunking, Layout, backward_in_chunks, forward_in_chunks
from moc.reference import select_mask
from moc.selection import n_words, parse_selection

SHAPES = {  # tokens, d, d_ffn
    "60m": (65536, 512, 1408),
    "130m": (65536, 768, 2048),
    "1b": (16384, 2048, 5504),
    "7b": (16384, 4096, 11008),
}
RULES = ("topk:0.1875", "nm:2:8", "nm:12:64")
CHUNK_MB = (32, 64, 96, 192, 4096)  # the last: one chunk


@dataclass(frozen=True)
class Variant:
    """One variant of a pass at one row length."""

    kind: str  # select or expand
    rule: str
    d_ffn: int
    tiling: Tiling
    fp8: bool = False

    @property
    def group(self) -> tuple[str, str, int, bool]:
        """What it is compared with."""
        return self.kind, self.rule, self.d_ffn, self.fp8


def variants(d_ffn: int) -> Iterator[Variant]:
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
        yield from (Variant("select", rule, d_ffn, tiling) for tiling in dict.fromkeys(tilings))
    yield Variant("select", RULES[0], d_ffn, select_tiling(d_ffn, parse_selection(RULES[0]), True), fp8=True)
    tilings = [EXPAND_TILING]
    for warps, rows in itertools.product((1, 2, 4), (8, 16)):
        tilings.append(Tiling(warps, rows * warps, 8))
    yield from (Variant("expand", RULES[0], d_ffn, tiling) for tiling in dict.fromkeys(tilings))
    yield Variant("expand", RULES[0], d_ffn, EXPAND_TILING, fp8=True)


class Rows:
    """Buffers of a variant for some tokens, and its launch."""

    def __init__(self, variant: Variant, n_tokens: int) -> None:
        self.variant, self.rule = variant, parse_selection(variant.rule)
        d_ffn, k = variant.d_ffn, self.rule.k(variant.d_ffn)
        dtype = torch.float8_e4m3fn if variant.fp8 else DTYPE
        self.g, self.u = torch.randn(n_tokens, 2 * d_ffn, device=DEVICE, dtype=DTYPE).split(d_ffn, dim=1)
        self.z = torch.randn(n_tokens, d_ffn, device=DEVICE, dtype=DTYPE)
        self.kept = Kept(
            torch.zeros(n_tokens, k, 2, device=DEVICE, dtype=dtype),
            torch.zeros(n_tokens, n_words(d_ffn), device=DEVICE, dtype=torch.int32),
            torch.zeros(n_tokens, 2, device=DEVICE) if variant.fp8 else None,
        )
        self.overflow = torch.zeros((), device=DEVICE, dtype=torch.int64)
        if variant.kind == "expand":
            select_pass(self.g, self.u, self.z, self.rule, self.kept, self.overflow)
            self.dz = torch.randn(n_tokens, d_ffn, device=DEVICE, dtype=DTYPE)

    def launch(self) -> None:
        """The pass, once."""
        tiling = self.variant.tiling
        if self.variant.kind == "select":
            select_pass(self.g, self.u, self.z, self.rule, self.kept, self.overflow, tiling)
        else:
            expand_pass(self.dz, self.kept, self.g, self.u, self.z, tiling)

    def kept_pairs(self) -> Tensor:
        """Gate and up as backward sees them: float64 [T * K, 2]."""
        pairs = self.kept.pairs.double()
        if self.kept.scales is not None:
            pairs *= self.kept.scales[:, None, :].double()
        return pairs.flatten(0, 1)

    def least_bytes(self) -> int:
        """What a launch must read and write."""
        kept = (t.nbytes for t in (self.kept.pairs, self.kept.bitmask, self.kept.scales) if t is not None)
        full = (3 if self.variant.kind == "select" else 4) * self.z.nbytes
        return sum(kept) + full


def check(variant: Variant, n_tokens: int = 200) -> Row:
    """Compile a variant, compare some rows of it with the reference, and say what it compiled to."""
    torch.manual_seed(0)
    rows = Rows(variant, n_tokens)
    if variant.kind == "select":
        mask = select_mask(rows.g, rows.rule)
        rows.launch()
        kept = torch.stack((rows.g[mask], rows.u[mask]), dim=1)
        errors = [
            float(not torch.equal(unpack_bitmask(rows.kept.bitmask, variant.d_ffn), mask)),
            _error(rows.z, mask * F.silu(rows.g.double()) * rows.u.double()),
            _error(rows.kept_pairs(), kept) / (10 if variant.fp8 else 1),
        ]
    else:
        mask = unpack_bitmask(rows.kept.bitmask, variant.d_ffn)
        gate, up = torch.zeros_like(rows.dz).double(), torch.zeros_like(rows.dz).double()
        gate[mask], up[mask] = rows.kept_pairs().T
        gate.requires_grad_()
        up.requires_grad_()
        z = F.silu(gate) * up
        dg, du = torch.autograd.grad(z, (gate, up), rows.dz.double() * mask)
        rows.launch()
        errors = [_error(rows.z, z), _error(rows.g, dg), _error(rows.u, du)]
    kernel = passes.select_fwd_kernel if variant.kind == "select" else passes.expand_bwd_kernel
    return {"error": max(errors), **compiled_to(kernel)}


def _error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.double() - expected).norm() / expected.norm())


def gemms(n_tokens: int, d: int, d_ffn: int) -> dict[str, Row]:
    """Times of the layer's GEMMs over all tokens, with gate and up joined and not."""
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
    return {name: timed(launch) for name, launch in launches.items()}


def dense_step(tensors: FfnTensors, shape: FfnShape) -> Callable[[], object]:
    """Forward and backward of the method `dense_fused`, compiled."""
    layer = FusedFFN(shape).to(DEVICE, DTYPE)
    weights = ffn_weights(layer, shape)
    for name, weight in weights.items():
        weight.data = getattr(tensors, name)
    layer.compile()
    return TrainingCalls(layer, list(weights.values()), tensors.x.requires_grad_(), tensors.dy).step


def moc_step(tensors: FfnTensors, rule: str, layout: Layout) -> Callable[[], object]:
    """Forward and backward of the operator in a layout."""
    selection = parse_selection(rule)
    x, dy = tensors.x, tensors.dy
    weights = tensors.w_gate, tensors.w_up, tensors.w_down

    def step() -> object:
        _y, pairs, scales, bitmask, _overflow = forward_in_chunks(x, weights, selection, False, True, layout)
        return backward_in_chunks(dy, x, (pairs, scales, bitmask), weights, selection.two_of_four, layout)

    return step


def gemm_step(tensors: FfnTensors, chunks: Sequence[slice]) -> Callable[[], object]:
    """The GEMMs of a step chunk by chunk, on random numbers in place of what the passes would write."""
    x, dy, w_down = tensors.x, tensors.dy, tensors.w_down
    w_gu = torch.cat((tensors.w_gate, tensors.w_up))
    longest = max(chunk.stop - chunk.start for chunk in chunks)
    gu, z = (torch.randn(longest, n, device=DEVICE, dtype=DTYPE) for n in (len(w_gu), len(w_down)))
    dx, dw_gu, dw_down = torch.empty_like(x), torch.zeros_like(w_gu), torch.zeros_like(w_down)

    def step() -> None:
        for chunk in chunks:
            length = chunk.stop - chunk.start
            torch.mm(x[chunk], w_gu.T, out=gu[:length])
            torch.mm(z[:length], w_down, out=dx[chunk])
        for chunk in chunks:
            length = chunk.stop - chunk.start
            torch.mm(dy[chunk], w_down.T, out=z[:length])
            torch.mm(gu[:length], w_gu, out=dx[chunk])
            dw_gu.addmm_(gu[:length].T, x[chunk])
            dw_down.addmm_(z[:length].T, dy[chunk])

    return step


def steps(name: str, rule: str, select: Tiling, expand: Tiling, dense_ms: float) -> Iterator[Row]:
    """Step times of a shape by chunk length, of its GEMMs alone in the same chunks, and peak memory."""
    tensors = step_tensors(name)
    for megabytes in CHUNK_MB:
        chunking = Chunking(chunk_bytes=megabytes << 20, fewest=1)
        step = moc_step(tensors, rule, Layout(chunking, select, expand))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        ms = timed(step)["ms"]
        chunks = chunking.chunks(len(tensors.x), len(tensors.w_gate) * DTYPE.itemsize)
        yield {
            "kind": "step", "shape": name, "rule": rule, "chunk_mb": megabytes, "peak_bytes": peak,
            "ms": ms, "over_dense": dense_ms / ms, "gemms_ms": timed(gemm_step(tensors, chunks))["ms"],
        }  # fmt: skip


def step_tensors(name: str) -> FfnTensors:
    """Inputs and weights of a shape, w_gate and w_up side by side as a layer has them."""
    n_tokens, d, d_ffn = SHAPES[name]
    tensors = natural_tensors(FfnShape(d, d_ffn), n_tokens, DTYPE, DEVICE, seed=0)
    place_side_by_side(tensors.w_gate, tensors.w_up)
    return tensors


def measure(names: Sequence[str], seconds: float) -> Iterator[Row]:
    """Everything, shape by shape; steps only while there is time."""
    start = time.monotonic()
    every = list(dict.fromkeys(c for name in names for c in variants(SHAPES[name][2])))
    checked = check_all(check, every)
    print(f"{len(every)} variants compiled and checked in {time.monotonic() - start:.0f} s", flush=True)
    fastest: dict[tuple[str, str, int, bool], tuple[float, Tiling]] = {}
    dense: dict[str, Row] = {}
    for name in names:
        for row, variant in time_passes(name, checked):
            if row.get("ms", math.inf) < fastest.get(variant.group, (math.inf,))[0]:
                fastest[variant.group] = row["ms"], variant.tiling
            yield row
        for part, row in gemms(*SHAPES[name]).items():
            yield {"kind": "gemm", "shape": name, "of": part, **row}
        torch.cuda.empty_cache()
    for name, rule in itertools.product(names, RULES):
        _n_tokens, d, d_ffn = SHAPES[name]
        select = fastest.get(("select", rule, d_ffn, False))
        expand = fastest.get(("expand", RULES[0], d_ffn, False))
        if time.monotonic() - start > seconds or select is None or expand is None:
            print(f"no steps of {name} {rule}: {seconds:.0f} s are over or no variant is right", flush=True)
            continue
        if name not in dense:
            dense[name] = timed(dense_step(step_tensors(name), FfnShape(d, d_ffn)))
            yield {"kind": "dense", "shape": name, **dense[name]}
        yield from steps(name, rule, select[1], expand[1], dense[name]["ms"])
        torch.cuda.empty_cache()


def time_passes(name: str, checked: dict[Variant, Row]) -> Iterator[tuple[Row, Variant]]:
    """A row for each variant of a shape's passes; wrong ones are rows without a time."""
    n_tokens, _d, d_ffn = SHAPES[name]
    bytes_per_ms = ensure_ceilings(DEVICE).copy_bytes_per_s / 1e3
    for variant in variants(d_ffn):
        row = {**asdict(variant), "shape": name, **checked[variant]}
        if row["error"] < 5e-3:
            rows = Rows(variant, n_tokens)
            row |= {**timed(rows.launch), "floor_ms": rows.least_bytes() / bytes_per_ms}
            del rows
        yield row, variant


def report(rows: list[Row]) -> None:
    """Print today's variant, the fastest and wrong ones, GEMMs, and steps by length of the chunks."""
    print_groups(rows, ("shape", "kind", "rule", "fp8"), shown=3)


def main(
    out: Annotated[Path, typer.Argument(help="where the measurements go, a line of JSON each")],
    shapes: Annotated[str, typer.Option(help="of " + ", ".join(SHAPES))] = ",".join(SHAPES),
    seconds: Annotated[float, typer.Option(help="time no step after this long")] = 240.0,
) -> None:
    """Which variant of each pass is fastest on this GPU, and how long the chunks should be."""
    write_rows(measure(shapes.split(","), seconds), out, report)


if __name__ == "__main__":
    typer.run(main)
