"""Which layout of the decoding kernels is fastest on this GPU, and up to how many tokens they win.

    python -m harness.tuning.decode OUT.jsonl [--shapes 1b,7b,70b] [--tokens 1,4,16] [--seconds 120]

Every layout is compiled and checked against the reference in parallel processes; those that are right are
timed, then the changes to today's layout that helped alone are tried together. Weights rotate: a call is one
step with each of so many copies that what a step reads is four times the L2 cache in all. Times are medians,
per step. The dense network by cuBLAS, gate and up in one product or two, is timed in the same way. One line
of JSON per measurement goes to OUT.jsonl, a table to the terminal.

It decides: `decode_tiling` of moc/kernels/decode_launch.py, and `most_tokens` of moc/ops/decode.py: the rows
"gemm" are what a layer runs for more tokens.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from harness.measure.launch import rotated_copies
from harness.tuning.layouts import layouts
from harness.tuning.trials import DEVICE, DTYPE, Row, check_all, compiled_to, print_groups, timed, write_rows
from moc.kernels import decode
from moc.kernels.decode_launch import DecodeTiling, Rows, decode_pass
from moc.layers.int8 import dequantize_rows, quantize_rows
from moc.ops.triton_ffn import triton_moc_ffn
from moc.reference import dense_forward, moc_forward, select_mask
from moc.selection import Selection, parse_selection

SHAPES = {  # d, d_ffn
    "130m": (768, 2048),
    "1b": (2048, 5504),
    "7b": (4096, 11008),
    "70b": (8192, 28672),
}
Step = Callable[[Rows], object]  # of decoding, with these weights
RULES = ("nm:2:8", "nm:12:64", "topk:0.1875", "dense")
CHECKED_D = 2048  # width the layouts are checked at; they are not compiled for it


@dataclass(frozen=True)
class Variant:
    """One layout at one width, for one token or several."""

    rule: str
    d_ffn: int
    several: bool
    int8: bool
    tiling: DecodeTiling

    @property
    def selection(self) -> Selection | None:
        """None: dense."""
        return None if self.rule == "dense" else parse_selection(self.rule)


def check(variant: Variant) -> Row:
    """Compile a layout and compare it with the reference, on gates that are exact and full of ties."""
    torch.manual_seed(0)
    size = (variant.d_ffn, CHECKED_D)
    w_gate = torch.randint(-1, 2, size, device=DEVICE).to(DTYPE) / 32
    w_up, w_down = (torch.randn(size, device=DEVICE, dtype=DTYPE) / size[1] ** 0.5 for _ in range(2))
    rows = Rows(w_gate, w_up, w_down)
    if variant.int8:
        rows = int8_rows((w_gate, w_up, w_down))
        w_gate, w_up, w_down = (dequantize_rows(*quantize_rows(w)) for w in (w_gate, w_up, w_down))
    errors = [0.0]
    for tokens in (2, 5, 16) if variant.several else (1,):
        x = torch.randint(-1, 2, (tokens, CHECKED_D), device=DEVICE).to(DTYPE)
        selection = variant.selection
        y, overflow = torch.full_like(x, math.nan), torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(2):
            decode_pass(x, rows, selection, y, overflow if selection else None, variant.tiling)
        if selection is None:
            expected = dense_forward(x, w_gate, w_up, w_down)
        else:
            expected = moc_forward(x, w_gate, w_up, w_down, selection)
        errors.append(float((y.double() - expected).norm() / expected.norm()))
    worst = max(errors) if all(error == error for error in errors) else math.inf
    return {"error": worst, **compiled_to(decode.decode_channels_kernel)}


def int8_rows(weights: Sequence[Tensor]) -> Rows:
    """w_gate, w_up and w_down quantised."""
    pairs = [quantize_rows(weight) for weight in weights]
    gate, up, down = (rows for rows, _ in pairs)
    return Rows(gate, up, down, torch.stack([scales for _, scales in pairs]))


class Copies:
    """Copies of a shape's weights, enough for every step to read rows that are in no cache."""

    def __init__(self, d: int, d_ffn: int, int8: bool) -> None:
        bytes_each = 3 * d * d_ffn * (1 if int8 else 2)
        self.d, self.d_ffn, self.int8 = d, d_ffn, int8
        self.rows = []
        for _ in range(1 + rotated_copies(0.4 * bytes_each, DEVICE)):
            size = (d_ffn, d)
            weights = [torch.randn(size, device=DEVICE, dtype=DTYPE) / d**0.5 for _ in range(3)]
            if int8:
                self.rows.append(int8_rows(weights))
            else:
                joined = torch.cat(weights[:2])  # as the layer has them
                self.rows.append(Rows(joined[:d_ffn], joined[d_ffn:], weights[2]))

    def step_bytes(self, x: Tensor, selection: Selection | None) -> float:
        """What a step with these tokens must read of the weights: rows that some token keeps, on average."""
        kept = float(self.d_ffn)
        if selection is not None:
            wide = [r.gate if r.scales is None else r.gate * r.scales[0][:, None] for r in self.rows[:3]]
            gates = [x @ w_gate.to(DTYPE).T for w_gate in wide]
            kept = statistics.mean(float(select_mask(g, selection).any(dim=0).sum()) for g in gates)
        return (self.d_ffn + 2 * kept) * self.d * (1 if self.int8 else 2)

    def timed(self, step: Step, step_bytes: float) -> Row:
        """Median time of a step, and the rate at which it reads so many bytes."""
        used = self.rows[: rotated_copies(step_bytes, DEVICE)]

        def steps() -> None:
            for rows in used:
                step(rows)

        row = timed(steps, "graph_rotated", len(used))
        return row | {"gb_s": step_bytes / row["ms"] / 1e6} if "ms" in row else row


def dense_step(x: Tensor, joined: bool) -> Step:
    """A dense step by cuBLAS, gate and up in one product or two."""

    def step(rows: Rows) -> Tensor:
        if joined:
            both = rows.gate.as_strided((2 * rows.gate.shape[0], x.shape[1]), (x.shape[1], 1))
            g, u = F.linear(x, both).chunk(2, dim=-1)
        else:
            g, u = F.linear(x, rows.gate), F.linear(x, rows.up)
        return (F.silu(g) * u) @ rows.down

    return step


@dataclass(frozen=True)
class Group:
    """What is compared: layouts for one shape, kind of weights, rule and number of tokens."""

    shape: str
    int8: bool
    rule: str
    tokens: int

    def variant(self, tiling: DecodeTiling) -> Variant:
        """One of them."""
        return Variant(self.rule, SHAPES[self.shape][1], self.tokens > 1, self.int8, tiling)


Tilings = dict[Group, list[DecodeTiling]]
Place = tuple[Group, DecodeTiling | None]  # where a row belongs; None: what is compared with the layouts


def time_all(
    tilings: Tilings, checked: dict[Variant, Row], kind: str, end: float
) -> Iterator[tuple[Row, Place]]:
    """A row for each layout, shape by shape, until the time `end`; wrong ones are rows without a time."""
    for shape, int8 in dict.fromkeys((group.shape, group.int8) for group in tilings):
        copies = Copies(*SHAPES[shape], int8)
        for group in (g for g in tilings if (g.shape, g.int8) == (shape, int8)):
            if time.monotonic() > end:
                print(f"out of time for {group}", flush=True)
                continue
            x = torch.randn(group.tokens, copies.d, device=DEVICE, dtype=DTYPE)
            variants = [group.variant(tiling) for tiling in tilings[group]]
            step_bytes = copies.step_bytes(x, variants[0].selection) if variants else 0.0
            for variant in variants:
                row = {**asdict(group), "kind": kind, "tiling": asdict(variant.tiling), **checked[variant]}
                if row["error"] < 6e-3:
                    row |= copies.timed(rows_step(x, variant), step_bytes)
                yield row, (group, variant.tiling)
            if kind == "rows" and not int8:
                for name, step in other_steps(group, x).items():
                    found = copies.timed(step, 6.0 * copies.d * copies.d_ffn)
                    yield {**asdict(group), "kind": name, **found}, (group, None)
        del copies
        torch.cuda.empty_cache()


def rows_step(x: Tensor, variant: Variant) -> Step:
    """A step of the decoding kernels."""
    y, overflow = torch.empty_like(x), torch.zeros((), dtype=torch.int64, device=DEVICE)
    selection = variant.selection
    given = overflow if selection else None
    return lambda rows: decode_pass(x, rows, selection, y, given, variant.tiling)


def other_steps(group: Group, x: Tensor) -> dict[str, Step]:
    """What is not a layout: the dense network by cuBLAS, or what a layer runs for more tokens."""
    if group.rule == "dense":
        return {"cublas": dense_step(x, joined=False), "cublas_joined": dense_step(x, joined=True)}
    rule = parse_selection(group.rule)

    def gemm(rows: Rows) -> object:
        with torch.no_grad():
            return triton_moc_ffn(x, rows.gate, rows.up, rows.down, rule)

    return {"gemm": gemm}


def combined(tilings: Tilings, times: dict[Place, float]) -> Tilings:
    """Today's layouts with what helped alone by 1 % or more: the best two changes, the best three, all."""
    found: Tilings = {}
    for group, tried in tilings.items():
        known = {tiling: times[group, tiling] for tiling in tried if (group, tiling) in times}
        today = tried[0]
        if today not in known:
            continue
        better = sorted((t for t in known if known[t] < 0.99 * known[today]), key=known.__getitem__)
        merged_all = []
        for count in (2, 3, len(better)):
            merged = today
            for tiling in reversed(better[:count]):  # the best last: its changes take precedence
                merged = replace(merged, **{k: v for k, v in vars(tiling).items() if v != getattr(today, k)})
            merged_all.append(merged)
        found[group] = [tiling for tiling in dict.fromkeys(merged_all) if tiling not in tried]
    return found


def measure(groups: Sequence[Group], seconds: float) -> Iterator[Row]:
    """Everything, while there is time."""
    start = time.monotonic()
    tilings = {group: layouts(group.rule, SHAPES[group.shape][1], group.tokens > 1) for group in groups}
    times: dict[Place, float] = {}
    for kind in ("rows", "combined"):
        if kind == "combined":
            tilings = combined(tilings, times)
        variants = list(dict.fromkeys(g.variant(t) for g, found in tilings.items() for t in found))
        if not variants or time.monotonic() > start + seconds:
            return
        checked = check_all(check, variants)
        passed = time.monotonic() - start
        print(f"{len(variants)} layouts ({kind}) compiled and checked by {passed:.0f} s", flush=True)
        for row, place in time_all(tilings, checked, kind, start + seconds):
            if "ms" in row:
                times[place] = row["ms"]
            yield row


def report(rows: list[Row]) -> None:
    """Print each group's fastest layouts, today's and wrong ones, each with its speed-up over dense bf16."""
    dense: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["kind"].startswith("cublas") and "ms" in row:
            case = row["shape"], row["tokens"]
            dense[case] = min(dense.get(case, math.inf), row["ms"])
    for row in rows:
        if "ms" in row and (row["shape"], row["tokens"]) in dense:
            row["over_dense"] = dense[row["shape"], row["tokens"]] / row["ms"]
    print_groups(rows, ("shape", "int8", "rule", "tokens"))


def main(
    out: Annotated[Path, typer.Argument(help="where the measurements go, a line of JSON each")],
    shapes: Annotated[str, typer.Option(help="of " + ", ".join(SHAPES))] = "1b,7b,70b",
    rules: str = ",".join(RULES),
    tokens: str = "1,4,16",
    seconds: Annotated[float, typer.Option(help="start nothing after this long")] = 180.0,
) -> None:
    """Which layout of the decoding kernels is fastest on this GPU, and for up to how many tokens."""
    groups = [
        Group(shape, int8, rule, int(count))
        for shape, int8, count, rule in itertools.product(
            shapes.split(","), (False, True), tokens.split(","), rules.split(",")
        )
        if not (int8 and rule == "nm:12:64")
    ]
    write_rows(measure(groups, seconds), out, report)


if __name__ == "__main__":
    typer.run(main)
