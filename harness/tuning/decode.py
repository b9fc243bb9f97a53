"""Which layout of the decoding kernels is fastest on this GPU, and up to how many tokens they win.

    python -m harness.tuning.decode OUT.jsonl [--shapes 1b,7b,70b] [--tokens 1,4,16] [--seconds 120]

Every candidate is compiled and checked against the reference in parallel processes; those that are right are
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
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from harness.measure.launch import rotated_copies
from harness.tuning.layouts import layouts
from harness.tuning.trials import DEVICE, DTYPE, Row, check_all, compiled_to, failure, milliseconds, written
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
RULES = ("nm:2:8", "nm:12:64", "topk:0.1875", "dense")
CHECKED_D = 2048  # width the candidates are checked at; they are not compiled for it


@dataclass(frozen=True)
class Candidate:
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


def check(candidate: Candidate) -> Row:
    """Compile a candidate and compare it with the reference, on gates that are exact and full of ties."""
    torch.manual_seed(0)
    size = (candidate.d_ffn, CHECKED_D)
    w_gate = torch.randint(-1, 2, size, device=DEVICE).to(DTYPE) / 32
    w_up, w_down = (torch.randn(size, device=DEVICE, dtype=DTYPE) / size[1] ** 0.5 for _ in range(2))
    rows = Rows(w_gate, w_up, w_down)
    if candidate.int8:
        rows = int8_rows((w_gate, w_up, w_down))
        w_gate, w_up, w_down = (dequantize_rows(*quantize_rows(w)) for w in (w_gate, w_up, w_down))
    errors = [0.0]
    for tokens in (2, 5, 16) if candidate.several else (1,):
        x = torch.randint(-1, 2, (tokens, CHECKED_D), device=DEVICE).to(DTYPE)
        selection = candidate.selection
        y, overflow = torch.full_like(x, math.nan), torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(2):
            decode_pass(x, rows, selection, y, overflow if selection else None, candidate.tiling)
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

    def microseconds(self, step: Callable[[Rows], object], step_bytes: float) -> float:
        """Median time of a step."""
        used = self.rows[: rotated_copies(step_bytes, DEVICE)]

        def steps() -> None:
            for rows in used:
                step(rows)

        return 1e3 * milliseconds(steps, "graph_rotated", len(used))


def dense_step(x: Tensor, joined: bool) -> Callable[[Rows], Tensor]:
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

    def candidate(self, tiling: DecodeTiling) -> Candidate:
        """One of them."""
        return Candidate(self.rule, SHAPES[self.shape][1], self.tokens > 1, self.int8, tiling)

    def row(self, kind: str, **values: Any) -> Row:
        """A row of results."""
        weights = "int8" if self.int8 else "bf16"
        return {
            "shape": self.shape, "weights": weights, "rule": self.rule, "tokens": self.tokens,
            "kind": kind, **values,
        }  # fmt: skip


Tilings = dict[Group, list[DecodeTiling]]


def time_all(tilings: Tilings, checked: dict[Candidate, Any], kind: str, end: float) -> Iterator[Row]:
    """A row for each layout, shape by shape, until the time `end`; wrong ones are rows without a time."""
    for shape, int8 in dict.fromkeys((group.shape, group.int8) for group in tilings):
        copies = Copies(*SHAPES[shape], int8)
        for group in (g for g in tilings if (g.shape, g.int8) == (shape, int8)):
            if time.monotonic() > end:
                print(f"out of time for {group}", flush=True)
                continue
            candidates = [group.candidate(tiling) for tiling in tilings[group]]
            x = torch.randn(group.tokens, copies.d, device=DEVICE, dtype=DTYPE)
            selection = candidates[0].selection if candidates else None
            step_bytes = copies.step_bytes(x, selection)
            for candidate in candidates:
                row = group.row(kind, tiling=asdict(candidate.tiling), **checked[candidate])
                if row["error"] < 6e-3:
                    row |= _timed(copies, rows_step(x, candidate), step_bytes)
                yield row
            if kind == "rows" and not int8:
                yield from time_others(copies, group, x)
        del copies
        torch.cuda.empty_cache()


def rows_step(x: Tensor, candidate: Candidate) -> Callable[[Rows], object]:
    """A step of the decoding kernels."""
    y, overflow = torch.empty_like(x), torch.zeros((), dtype=torch.int64, device=DEVICE)
    selection = candidate.selection
    given = overflow if selection else None
    return lambda rows: decode_pass(x, rows, selection, y, given, candidate.tiling)


def time_others(copies: Copies, group: Group, x: Tensor) -> Iterator[Row]:
    """Rows of what is not a layout: the dense network by cuBLAS, and what a layer runs for more tokens."""
    step_bytes = 6.0 * copies.d * copies.d_ffn
    if group.rule == "dense":
        for joined in (False, True):
            yield group.row("cublas", **_timed(copies, dense_step(x, joined), step_bytes))
        return
    rule = parse_selection(group.rule)

    def gemm(rows: Rows) -> object:
        with torch.no_grad():
            return triton_moc_ffn(x, rows.gate, rows.up, rows.down, rule)

    yield group.row("gemm", **_timed(copies, gemm, step_bytes))


def _timed(copies: Copies, step: Callable[[Rows], object], step_bytes: float) -> Row:
    try:
        us = copies.microseconds(step, step_bytes)
    except Exception as error:  # whatever a variant raises, see `failure`
        return {"message": failure(error)}
    return {"us": us, "gb_s": step_bytes / us / 1e3}


def combined(tilings: Tilings, rows: list[Row]) -> Tilings:
    """Today's layouts with what helped alone by 1 % or more: the best two changes, the best three, all."""
    found: Tilings = {}
    for group, tried in tilings.items():
        key = group.row("rows")
        known = [asdict(tiling) for tiling in tried]
        times = {
            known.index(row["tiling"]): row["us"]
            for row in rows
            if "us" in row and "tiling" in row and key.items() <= row.items()
        }
        if 0 not in times:
            continue
        better = sorted((us, i) for i, us in times.items() if us < 0.99 * times[0])
        merged_all = []
        for count in (2, 3, len(better)):
            merged = tried[0]
            for _us, i in reversed(better[:count]):  # the best last: it has the last word
                changed = {k: v for k, v in vars(tried[i]).items() if v != getattr(tried[0], k)}
                merged = replace(merged, **changed)
            merged_all.append(merged)
        found[group] = [tiling for tiling in dict.fromkeys(merged_all) if tiling not in tried]
    return found


def measure(groups: Sequence[Group], processes: int, seconds: float) -> Iterator[Row]:
    """Everything, while there is time."""
    start = time.monotonic()
    end = start + seconds
    tilings = {group: layouts(group.rule, SHAPES[group.shape][1], group.tokens > 1) for group in groups}
    rows = []
    for row in _phase("rows", tilings, processes, start, end):
        rows.append(row)
        yield row
    yield from _phase("combined", combined(tilings, rows), processes, start, end)


def _phase(kind: str, tilings: Tilings, processes: int, start: float, end: float) -> Iterator[Row]:
    candidates = list(dict.fromkeys(g.candidate(t) for g, found in tilings.items() for t in found))
    if candidates and time.monotonic() < end:
        checked = check_all(check, candidates, processes)
        seconds = time.monotonic() - start
        print(f"{len(candidates)} layouts ({kind}) compiled and checked by {seconds:.0f} s", flush=True)
        yield from time_all(tilings, checked, kind, end)


def report(rows: list[Row], shown: int) -> None:
    """Print each group's fastest layouts, today's, wrong ones, and what the dense network takes."""
    dense: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["kind"] == "cublas":
            case = row["shape"], row["tokens"]
            dense[case] = min(dense.get(case, math.inf), row.get("us", math.inf))
    for key in dict.fromkeys((r["shape"], r["weights"], r["rule"], r["tokens"]) for r in rows):
        group = [r for r in rows if (r["shape"], r["weights"], r["rule"], r["tokens"]) == key]
        best_dense = dense.get((key[0], key[3]), math.nan)
        print(f"== {' '.join(map(str, key))}: dense bf16 {best_dense:.1f} us")
        layouts_ = [r for r in group if "tiling" in r]
        today = layouts_[0]["tiling"] if layouts_ else {}
        timed = sorted((r for r in group if "us" in r), key=lambda r: r["us"])
        for row in group:
            is_today = row.get("tiling") == today and row["kind"] == "rows"
            if row in timed[:shown] or is_today or row["kind"] in ("gemm", "cublas") or "us" not in row:
                changed = {k: v for k, v in row.get("tiling", {}).items() if v != today.get(k)}
                text = " ".join(f"{name} {_short(value)}" for name, value in changed.items())
                numbers = f"WRONG {row.get('error', math.nan):.3g} {row.get('message', '')}"
                if "us" in row:
                    numbers = f"{row['us']:8.2f} us {row['gb_s']:6.0f} GB/s {best_dense / row['us']:5.2f} x"
                print(
                    f"  {row['kind']:8} {numbers} regs {row.get('registers')} spills {row.get('spills')}"
                    f" {'<- today ' + str(today) if is_today else text}"
                )


def _short(value: object) -> str:
    return ",".join(str(int(v)) for v in value.values()) if isinstance(value, dict) else str(value)


def main(
    out: Annotated[Path, typer.Argument(help="where the measurements go, a line of JSON each")],
    shapes: Annotated[str, typer.Option(help="of " + ", ".join(SHAPES))] = "1b,7b,70b",
    rules: str = ",".join(RULES),
    tokens: str = "1,4,16",
    int8: Annotated[bool, typer.Option(help="also int8 weights, of every rule but nm:12:64")] = True,
    seconds: Annotated[float, typer.Option(help="start nothing after this long")] = 180.0,
    processes: Annotated[int, typer.Option(help="that compile and check")] = 16,
    shown: Annotated[int, typer.Option(help="layouts of each group that are printed")] = 5,
) -> None:
    """Which layout of the decoding kernels is fastest on this GPU, and for up to how many tokens."""
    groups = [
        Group(shape, narrow, rule, int(count))
        for shape, narrow, count, rule in itertools.product(
            shapes.split(","), (False, True), tokens.split(","), rules.split(",")
        )
        if not narrow or (int8 and rule != "nm:12:64")
    ]
    rows: list[Row] = []
    try:
        rows.extend(written(measure(groups, processes, seconds), out))
    finally:
        report(rows, shown)


if __name__ == "__main__":
    typer.run(main)
