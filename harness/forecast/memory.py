"""How much memory a point will take, by formula, before anything runs.

A training step peaks at one of three moments, all of which hold the weights and Adam's two moments (12 bytes
a parameter, fp32):

- in the loss: what every layer saved for backward, and the buffers of the chunked cross-entropy;
- in the backward pass of the last layer: what every layer saved, and that layer's working tensors;
- at the end of backward: all gradients (4 bytes a parameter), and one layer's working tensors.

What a layer saves per token, with item size s of the dtype of training:

    feed-forward network   the method's own formula (`Method.saved_bytes_per_token`), x included
    two residual streams   2 * 4 d     fp32, kept by the two norms, and 4 bytes each for the norms' scales
    attention              5 s d + 4 heads    its input, q, k, v, its output, and log-sum-exp
    on the CPU             2 * 4 d     there a norm also keeps its normalised input

The working tensors of a layer are full-width tensors [T, d_ffn]: six are alive at once in the eager backward
pass of a SwiGLU, those that it saved included (measured: exactly six for dense, recomputed dense and MoC in
PyTorch), and four where torch.compile may fuse a dense one. Leaner methods stay below it.

How far it is off where points are measured stands in `docs/plan.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from harness.sweep.catalog import WORKLOADS
from harness.sweep.point import Point
from harness.sweep.support import model_config
from moc.config import FfnShape
from moc.methods import Method, get_method

ITEM_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_STATE_BYTES = 12  # per parameter: the weight and Adam's two moments, fp32
_WORKING = 6  # full-width tensors alive in an eager backward pass of one layer
_WORKING_COMPILED = 4  # ... and where the elementwise work between products is fused
_CPU_SLACK = 1.8  # resident over counted bytes, the most seen: pages malloc keeps, buffers of libraries
_CUBLAS_BYTES = 64 * 2**20  # workspaces of cuBLAS on Hopper, one each for forward and backward thread


@dataclass(frozen=True)
class Peak:
    """Predicted bytes of a point."""

    row_bytes: float  # what the peak-memory row of the point will say
    other_bytes: float  # what the process holds beyond the row
    slack: float  # how much more the device gives out than is counted
    assumed: bool  # the method has no formula for what it saves; dense SwiGLU is assumed in its place

    @property
    def process_bytes(self) -> float:
        """What has to fit on the device."""
        return (self.row_bytes + self.other_bytes) * self.slack

    def corrected_by(self, other: Peak, measured: float) -> Peak:
        """The prediction corrected by the measured peak of another method, which the formula puts at `other`.

        Two methods of one setting differ in what they save alone, so the rest of the formula cancels.
        """
        corrected = max(0.0, measured + self.row_bytes - other.row_bytes)
        return replace(self, row_bytes=corrected, slack=1.0)


def predict_peak(point: Point, device: str, saved_bytes: float | None = None) -> Peak | None:
    """Predicted peak memory of a point on a kind of device (`cpu`, `cuda`); None for other workloads.

    `saved_bytes` is what one layer of the method saves per token where that was measured; it is used if the
    method has no formula. Of a `pretrain` point the whole process counts; of an `ffn_train` point the row is
    one step over weights and inputs, and the process also holds those, and more of them for the gate.
    """
    workload = WORKLOADS[point.workload]
    if workload.decodes:
        return None
    method = get_method(point.method)
    by_formula = saved_by_formula(method, point)
    saved = by_formula if by_formula is not None else saved_bytes
    assumed = saved is None
    if saved is None:
        saved = _saved_by_dense(method, point, device)
    working = _working_bytes(method, point, device, saved)
    slack = _CPU_SLACK if device == "cpu" else 1.0
    if workload.whole_model:
        total = _training_bytes(method, point, device, saved, working)
        return Peak(total, 0.0, slack, assumed)
    row = _layer_step_bytes(point, saved, working)
    weights = 3 * point.d_model * point.d_ffn * ITEM_SIZE[point.dtype] * point.n_layers
    inputs = 2 * point.tokens * point.d_model * ITEM_SIZE[point.dtype]
    return Peak(row, 3 * weights + 2 * inputs, slack, assumed)


def saved_by_formula(method: Method, point: Point) -> float | None:
    """Bytes per token that one layer saves by the method's own formula; None if it has none."""
    if method.saved_bytes_per_token is None:
        return None
    k = point.k if method.takes_selection and point.k is not None else point.d_ffn
    shape = FfnShape(point.d_model, point.d_ffn)
    return float(method.saved_bytes_per_token(shape, k, ITEM_SIZE[point.dtype]))


def layer_saved_bytes(point: Point, device: str, ffn_saved: float) -> float:
    """Bytes per token that one whole layer of a `pretrain` point saves; see the module."""
    size, heads = ITEM_SIZE[point.dtype], point.n_heads or 0
    norms = 2 * (4 * point.d_model + 4) + (8 * point.d_model if device == "cpu" else 0)
    return norms + 5 * size * point.d_model + 4 * heads + ffn_saved


def head_saved_bytes(point: Point, device: str) -> float:
    """Bytes per token saved once for the whole model: the token, the last norm, the loss's d_hidden."""
    norm = 4 * point.d_model + 4 + (4 * point.d_model if device == "cpu" else 0)
    return 8 + norm + ITEM_SIZE[point.dtype] * point.d_model


def _training_bytes(method: Method, point: Point, device: str, ffn_saved: float, working: float) -> float:
    config = model_config(point)
    size, tokens = ITEM_SIZE[point.dtype], point.tokens
    embedding = config.vocab_size * config.d_model
    # Autocast keeps a cast of every matrix that is multiplied, until backward has used it. Of a method that
    # casts for itself there are those of one layer at a time; two of the three are counted as working memory.
    ffn_casts = config.ffn.n_params() * (config.n_layers if method.keeps_casts else 1 / 3)
    matrices = config.n_layers * 4 * config.d_model**2 + ffn_casts + embedding
    casts = size * matrices if size < 4 else 0
    saved = tokens * (
        config.n_layers * layer_saved_bytes(point, device, ffn_saved) + head_saved_bytes(point, device)
    )
    from moc.ops.loss import CHUNK_TOKENS

    chunk = min(CHUNK_TOKENS, tokens) * config.vocab_size
    # The sum of d_weight in fp32 and one chunk's share of it, one chunk's logits (and, on the CPU, their
    # log-softmax in fp32), and the hidden states in the dtype of training.
    loss = embedding * (4 + size) + chunk * (size + (4 if device == "cpu" else 0))
    loss += tokens * size * config.d_model
    last_layer = 4 * embedding + tokens * size * config.d_model + working
    standing = _STATE_BYTES * config.n_params() + (_CUBLAS_BYTES if device == "cuda" else 0)
    return standing + max(casts + saved + max(loss, last_layer), 4 * config.n_params() + working)


def _layer_step_bytes(point: Point, ffn_saved: float, working: float) -> float:
    size, tokens = ITEM_SIZE[point.dtype], point.tokens
    x = tokens * point.d_model * size
    own = tokens * ffn_saved - x  # of one layer: its input is somebody else's
    one_gradient = point.d_model * point.d_ffn * size
    backward = (point.n_layers - 1) * (own + x) + own + working + x + one_gradient
    return max(backward, 2 * x + 3 * one_gradient * point.n_layers)


def _working_bytes(method: Method, point: Point, device: str, ffn_saved: float) -> float:
    """Full-width tensors of one layer's backward pass beside those that it saved."""
    size = ITEM_SIZE[point.dtype]
    if method.scratch_bytes is not None:
        shape = FfnShape(point.d_model, point.d_ffn)
        scratch = method.scratch_bytes(shape, point.rule, point.tokens, size)
        return scratch + point.tokens * point.d_model * size  # and y, which the other figures include
    width = point.d_ffn * size
    fused = method.compiles_on(device) and method.saved_bytes_per_token is None
    alive = (_WORKING_COMPILED if fused else _WORKING) * width
    return point.tokens * max(width, alive - (ffn_saved - point.d_model * size))


def _saved_by_dense(method: Method, point: Point, device: str) -> float:
    """What dense SwiGLU saves: x and four full-width tensors, or three where torch.compile chooses."""
    kept = 3 if method.compiles_on(device) else 4
    return float((point.d_model + kept * point.d_ffn) * ITEM_SIZE[point.dtype])


def device_bytes(device: str) -> int:
    """Memory of the device: the GPU's, or what the machine and its control group let this process use."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
