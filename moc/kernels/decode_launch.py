"""Which decoding kernels compute a layer, their tilings, and their launch.

A layer is the channels kernel and up to three others, depending on its `DecodeTiling`:

    gate None, down None     clear, channels           needs a rule that is local, `nm`; float atomics
    gate None, down          channels, down            `nm` and dense; the same sum in every run
    gate, down None          gate[, cut], channels     any rule; float atomics
    gate, down               gate[, cut], channels, down

With `cut_apart` a separate kernel, one program per token, finds the K-th largest gate. Otherwise every
program of the channels kernel finds it, which is possible for one token only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor
from triton import next_power_of_2

from moc.dtypes import DECODE_DTYPES, torch_dtypes
from moc.kernels.decode import (
    ALL,
    decode_channels_kernel,
    decode_clear_kernel,
    decode_cut_kernel,
    decode_down_kernel,
    decode_gate_kernel,
)
from moc.kernels.primitives import INTERPRETED, capability_of, check_device, launching_on
from moc.kernels.selection import RULE_NUMBERS, first_key
from moc.selection import Selection

MAX_TOKENS = 16
_DTYPES = torch_dtypes(DECODE_DTYPES)


@dataclass(frozen=True)
class Tile:
    """How the gate kernel is laid out: a program's tile of w_gate."""

    rows: int
    columns: int
    num_warps: int = 4
    stages: int = 1  # tiles on their way through shared memory; 1: straight into registers
    unroll: int = 1


@dataclass(frozen=True)
class DownTile:
    """How the down kernel is laid out: `blocks` times `rows` channels a program, some columns of each."""

    rows: int
    columns: int
    slots: int  # as in DecodeTiling
    blocks: int = 1
    num_warps: int = 4
    stages: int = 1  # as in Tile; with slots = rows only


@dataclass(frozen=True)
class DecodeTiling:
    """How a layer is laid out; see the module."""

    channels: int  # of a program of the channels kernel
    columns: int  # of w_gate, at a time
    slots: int  # kept channels at a time, gathered; if as many as channels: not gathered, but masked
    up_columns: int  # of their rows of w_up, at a time
    down_columns: int  # and of w_down
    parts: int = 1  # programs that share a block of channels, if gates are computed before
    num_warps: int = 4
    stages: int = 1  # as in Tile
    unroll: int = 1
    gate: Tile | None = None
    down: DownTile | None = None
    cut_apart: bool = False
    ahead: bool = False  # ask for whole kept rows of w_up and w_down as soon as it is known which they are
    registers: int = 0  # the most a thread of the channels kernel may have; 0: the compiler decides
    pdl: bool = False  # programmatic dependent launch: begin while the layer's kernel before is running out

    @property
    def deterministic(self) -> bool:
        """Whether sums are taken in the same order in every run."""
        return self.down is not None


@dataclass(frozen=True)
class Rows:
    """The weights as the kernels read them: three [d_ffn, d], rows contiguous, of the dtype of x or int8.

    `scales` [3, d_ffn] float32: what the rows of int8 w_gate, w_up and w_down are multiplied by.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    scales: Tensor | None = None


def decode_tiling(d_ffn: int, selection: Selection | None, tokens: int, int8: bool = False) -> DecodeTiling:
    """The tiling for a width, a rule (None: dense) and a number of tokens, and whether weights are int8.

    Measured by harness/tuning/decode.py on an H100 (docs/measured.md, 2026-11-26).
    """
    local = selection is not None and selection.rule == "nm"
    bank = 1 if selection is None else _bank_width(selection)
    if tokens > 1:
        return DecodeTiling(
            max(16, bank), 128, max(16, bank), 128, 128, stages=4, cut_apart=True,
            gate=None if local or selection is None else Tile(16, 128, stages=4),
            down=_down_of_many(d_ffn, selection, tokens),
        )  # fmt: skip
    if selection is None and int8:
        return DecodeTiling(4, 1024, 4, 1024, 1024, down=DownTile(32, 256, 32, blocks=4))
    if selection is None:
        blocks = max(1, d_ffn // 1376)
        return DecodeTiling(16, 512, 16, 512, 512, down=DownTile(8, 1024, 8, blocks))
    if local and bank <= 16:
        slots = min(16, next_power_of_2(32 // bank * (selection.n or 1)))
        if int8:
            return DecodeTiling(32, 256, slots, 1024, 2048, stages=3, registers=168, pdl=True)
        return DecodeTiling(32, 256, slots, 1024, 1024, registers=168, pdl=True)
    if local:  # too few banks to occupy the GPU, each too large for one program
        parts = -(-(selection.n or 1) // 4)
        return DecodeTiling(bank, 256, 4, 2048, 2048, parts, gate=Tile(4, 2048), registers=168, pdl=True)
    return DecodeTiling(
        32, 512, 8, 1024, 2048 if int8 else 1024, registers=168, gate=Tile(4, 2048),
        cut_apart=selection.rule == "topk_abs" or d_ffn > 16384, pdl=True,
    )  # fmt: skip


def _down_of_many(d_ffn: int, selection: Selection | None, tokens: int) -> DownTile | None:
    """For more than one token: None where float atomics into y are faster than a kernel of its own."""
    if selection is None:
        return DownTile(32, 128, 32, blocks=max(1, d_ffn // 384), stages=4)
    if tokens <= 4 and (d_ffn <= 8192 or _bank_width(selection) > 16):
        return None
    return DownTile(32, 256, 32, blocks=16, stages=3)


def decode_pass(
    x: Tensor,
    rows: Rows,
    selection: Selection | None,
    y: Tensor,
    overflow: Tensor | None,
    tiling: DecodeTiling | None = None,
) -> Tensor | None:
    """Write y [T, d] for x [T, d] of bfloat16 or float16, both contiguous, 1 <= T <= MAX_TOKENS.

    selection None: the dense network. `overflow`, an int64 scalar, is set to the channels that the cap of a
    `threshold` rule left out, 0 for other rules; None where selection is. Returns z [T, d_ffn] float32, what
    w_down was multiplied by, if the tiling lets it exist. A NaN gate ranks as plus infinity. Raises
    ValueError for what the kernels cannot do.
    """
    _check_tensors(x, rows)
    tokens, d = x.shape
    d_ffn = rows.gate.shape[0]
    if tiling is None:
        tiling = decode_tiling(d_ffn, selection, tokens, int8=rows.scales is not None)
        if torch.are_deterministic_algorithms_enabled() and not tiling.deterministic:
            tiling = replace(tiling, down=DownTile(64, 256, 16))
    _check_tiling(selection, tokens, tiling)
    hopper = capability_of(x.device) >= (9, 0)
    if not hopper:
        tiling = replace(tiling, ahead=False, pdl=False)
    gate, down = tiling.gate, tiling.down
    n_tickets = 1 if down is None else -(-d // down.columns)
    n_zeros = n_tickets + (tokens * d if down is None else 0)
    zeros = x.new_empty(n_zeros, dtype=torch.int32)
    tickets = zeros[:n_tickets]
    sums = zeros[n_tickets:].view(torch.float32) if down is None else None
    z = None if down is None else x.new_empty(tokens, d_ffn, dtype=torch.float32)
    gates = cut = None
    scales = (None, None, None) if rows.scales is None else rows.scales.unbind()
    later = {"launch_pdl": True} if tiling.pdl and not INTERPRETED else {}
    channels_launch = {} if gate is None and down is not None else later
    values = search_values(d_ffn, selection, x.dtype)
    with launching_on(x):
        if gate is None and down is None:
            decode_clear_kernel[(-(-n_zeros // 1024),)](zeros, n_zeros, PDL=bool(later))
        if gate is not None:
            gates = x.new_empty(tokens, -(-d_ffn // 16) * 16)
            decode_gate_kernel[(-(-d_ffn // gate.rows),)](
                x, rows.gate, scales[0], gates, zeros, overflow, tokens, d, d_ffn, gates.stride(0), n_zeros,
                **gate_constants(d, tokens, tiling), **_options(gate.num_warps),
            )  # fmt: skip
            if tiling.cut_apart and selection is not None and selection.rule != "nm":
                cut = x.new_empty(tokens, 2, dtype=torch.int32)
                decode_cut_kernel[(tokens,)](
                    gates, cut, overflow, gates.stride(0), *values,
                    **cut_constants(d_ffn, selection, hopper, tiling), **_options(cut_warps(d_ffn)), **later,
                )  # fmt: skip
        constants = channels_constants(d, d_ffn, selection, tokens, hopper, tiling)
        programs = -(-d_ffn // (constants["BANKS"] * constants["M"]))
        decode_channels_kernel[(programs, tiling.parts)](
            x, rows.gate if gate is None else None, rows.up, rows.down if down is None else None, *scales,
            gates, cut, overflow, z, sums, None if down else tickets, zeros, y if down is None else None,
            tokens, d, 0 if gates is None else gates.stride(0), *values, 0 if gate else n_zeros, d_ffn,
            **constants, **_options(tiling.num_warps), **channels_launch,
            **({"maxnreg": tiling.registers} if tiling.registers else {}),
        )  # fmt: skip
        if down is not None:
            splits = -(-d_ffn // (down.rows * down.blocks))
            parts = x.new_empty(splits, tokens, d, dtype=torch.float32)
            decode_down_kernel[(splits, n_tickets)](
                z, rows.down, scales[2], parts, tickets, y, tokens, d, d_ffn, down.blocks,
                **down_constants(selection, tokens, tiling), **_options(down.num_warps), **later,
            )  # fmt: skip
    return z


def _options(num_warps: int) -> dict[str, int]:
    return {"num_warps": num_warps, "ASM": not INTERPRETED}


def gate_constants(d: int, tokens: int, tiling: DecodeTiling) -> dict[str, int]:
    """What the gate kernel is compiled for."""
    gate = tiling.gate
    assert gate is not None
    return {
        "TOKENS": 1 if tokens == 1 else MAX_TOKENS,
        "ROWS": gate.rows,
        "COLUMNS": gate.columns,
        "EVEN": d % gate.columns == 0,
        "STAGES": gate.stages,
        "UNROLL": gate.unroll,
        "PDL": tiling.pdl and not INTERPRETED,
    }


def cut_constants(d_ffn: int, selection: Selection, packed: bool, tiling: DecodeTiling) -> dict[str, int]:
    """What the cut kernel is compiled for; `packed`: gates can be compared in pairs."""
    return {
        "F": d_ffn,
        "RULE": RULE_NUMBERS[selection.rule],
        "PACKED": packed and selection.rule != "topk_abs",
        "PIECE": 512 * cut_warps(d_ffn),
        "PDL": tiling.pdl and not INTERPRETED,
    }


def channels_constants(
    d: int, d_ffn: int, selection: Selection | None, tokens: int, packed: bool, tiling: DecodeTiling
) -> dict[str, int]:
    """What the channels kernel is compiled for; `packed` as in `cut_constants`."""
    width = m = tiling.channels
    n = 0
    if selection is not None and selection.m is not None:
        width, m, n = _bank_width(selection), selection.m, selection.n or 0
    searches = selection is not None and selection.rule != "nm" and not tiling.cut_apart
    return {
        "ROW": d_ffn if searches else 0,
        "RULE": ALL.value if selection is None else RULE_NUMBERS[selection.rule],
        "N": n,
        "M": m,
        "PACKED": packed,
        "PIECE": 512 * tiling.num_warps,
        "TOKENS": 1 if tokens == 1 else MAX_TOKENS,
        "BANKS": tiling.channels // width,
        "WIDTH": width,
        "SLOTS": tiling.slots,
        "COLUMNS": tiling.columns,
        "UP_COLUMNS": tiling.up_columns,
        "DOWN_COLUMNS": tiling.down_columns,
        "EVEN": d % tiling.columns == 0 == d % tiling.up_columns,
        "STAGES": tiling.stages,
        "UNROLL": tiling.unroll,
        "AHEAD": max(1, 32 * tiling.num_warps // tiling.slots) if tiling.ahead else 0,
        "PDL": tiling.pdl and not INTERPRETED,
    }


def down_constants(selection: Selection | None, tokens: int, tiling: DecodeTiling) -> dict[str, int]:
    """What the down kernel is compiled for."""
    down = tiling.down
    assert down is not None
    return {
        "DENSE": selection is None,
        "TOKENS": 1 if tokens == 1 else MAX_TOKENS,
        "ROWS": down.rows,
        "SLOTS": down.slots,
        "COLUMNS": down.columns,
        "STAGES": down.stages,
        "PDL": tiling.pdl and not INTERPRETED,
    }


def search_values(d_ffn: int, selection: Selection | None, dtype: torch.dtype) -> tuple[int, int, float]:
    """K, the key of the least score that may be kept, and the quantile of a normal distribution at K."""
    if selection is None:
        return d_ffn, 0, 0.0
    k = selection.k(d_ffn)
    first = 0 if selection.rule == "topk_abs" else first_key(selection.threshold, dtype)
    return k, first, NormalDist().inv_cdf(1 - (k - 0.5) / d_ffn)


def cut_warps(d_ffn: int) -> int:
    """Warps of the kernel that searches a token's K-th largest: 1024 to 2048 channels each."""
    return max(1, min(16, next_power_of_2(-(-d_ffn // 2048))))


def _bank_width(selection: Selection) -> int:
    return next_power_of_2(selection.m or 1)


def _check_tensors(x: Tensor, rows: Rows) -> None:
    """Raise ValueError unless the kernels can take them."""
    check_device("x", x)
    if x.dtype not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; the decoding kernels take {', '.join(map(str, _DTYPES))}")
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        raise ValueError(f"{x.shape[0]} tokens; the decoding kernels take 1 to {MAX_TOKENS}")
    wanted = x.dtype if rows.scales is None else torch.int8
    for name, weight in (("w_gate", rows.gate), ("w_up", rows.up), ("w_down", rows.down)):
        if weight.dtype != wanted:
            raise ValueError(f"{name} has dtype {weight.dtype}, expected {wanted}")
        if not weight.is_contiguous():
            raise ValueError(f"{name} has strides {weight.stride()}: its rows must follow each other")


def _check_tiling(selection: Selection | None, tokens: int, tiling: DecodeTiling) -> None:
    """Raise ValueError for what cannot be launched."""
    if selection is None and tiling.down is None:
        raise ValueError("the dense network needs the down kernel")
    if tiling.parts > 1 and (tiling.gate is None or tiling.slots >= tiling.channels):
        raise ValueError(f"parts={tiling.parts} share gathered channels of gates that were computed before")
    if selection is None or selection.rule == "nm":
        return
    if tiling.gate is None:
        raise ValueError(f"{selection} ranks all gates of a token, so they need a kernel of their own")
    if not tiling.cut_apart and (tokens > 1 or selection.rule == "topk_abs"):
        raise ValueError(f"{selection} of {tokens} tokens needs cut_apart")
