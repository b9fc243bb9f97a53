"""How many channels the tokens of a decoding batch need together, measured on a trained model.

A batch of B tokens reads the rows of every channel that at least one of them keeps. Were the choices
independent, that would be a share 1 - (1 - K / d_ffn)^B; where many tokens want the same channels the union
is smaller. The tokens of a decoding batch belong to different texts: here they are the tokens at one place of
windows that lie far apart in the validation text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moc.llama import Block, Llama
from moc.ops.compact import keep_mask
from moc.ops.inputs import autocast_cast
from moc.selection import Selection

LARGEST_BATCH = 16
MAX_SETS = 16  # of so many windows each; more move the mean by less than a percent


def union_counts(masks: Tensor) -> Tensor:
    """Channels that the first 1, 2, ... B tokens keep together: bool [B, ..., d_ffn] to int64 [B, ...]."""
    union = torch.zeros_like(masks[0])
    counts = []
    for mask in masks:
        union |= mask
        counts.append(union.sum(dim=-1))
    return torch.stack(counts)


def spread_windows(windows: NDArray[np.int64], batch: int) -> list[NDArray[np.int64]]:
    """Sets of `batch` windows each, those of a set as far apart in the text as may be.

    Raises ValueError if there are fewer windows than one set takes.
    """
    sets = min(MAX_SETS, len(windows) // batch)
    if sets == 0:
        raise ValueError(f"a batch of {batch} texts needs {batch} windows of text, not {len(windows)}")
    apart = len(windows) // batch
    starts = np.arange(sets) * (apart // sets)
    return [windows[start + np.arange(batch) * apart] for start in starts]


@torch.no_grad()
def union_shares(
    model: Llama, windows: NDArray[np.int64], selection: Selection, batch: int = LARGEST_BATCH
) -> NDArray[np.float64]:
    """Share of the channels that 1, 2, ... `batch` tokens of different texts keep together: [sets, batch].

    Means over the layers and over all places of the windows [n, S]. Gates are those the model computes, in
    the dtype of the torch.autocast in force. Raises ValueError as `spread_windows`.
    """
    shares = []
    for rows in spread_windows(windows, batch):
        counts: list[Tensor] = []

        def count(ffn: nn.Module, inputs: Sequence[Tensor], counts: list[Tensor] = counts) -> None:
            x, w_gate = autocast_cast(inputs[0], cast(Tensor, ffn.w_gate))
            gates = F.linear(x, w_gate)
            mask, _overflow = keep_mask(gates.flatten(0, 1), selection)
            counts.append(union_counts(mask.view(gates.shape)).double().mean(dim=1) / gates.shape[-1])

        hooks = [cast(Block, block).ffn.register_forward_pre_hook(count) for block in model.layers]
        try:
            model(torch.from_numpy(rows).to(model.head.device))
        finally:
            for hook in hooks:
                hook.remove()
        shares.append(torch.stack(counts).mean(dim=0).cpu().numpy())
    return np.stack(shares)
