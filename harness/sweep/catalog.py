"""What a sweep can be made of: the fields of a point and the workloads, each defined once.

`FIELDS` says what a point consists of. The columns of rows and tables, the axes of sweep files, the cells in
which points are compared, and the headings and titles of reports follow from it. `WORKLOADS` says what is
known of a workload: its axes, its metrics, and how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AxisValue = str | int | float


@dataclass(frozen=True)
class Field:
    """One field of a point: a column of every row, and an axis of the workloads that list it.

    `form` is how people read a value: `text`, a `count` (65,536), `tokens` (40M), a `number` (0.001) or a
    `hash` (its first eight characters). `phrase` names the value in a title.
    """

    name: str
    type: type[int] | type[float] | type[str]
    heading: str  # of its column in tables for people
    default: AxisValue | None = None  # of an axis that a sweep does not give
    form: Literal["text", "count", "tokens", "number", "hash"] = "text"
    phrase: str = "{}"
    in_cell: bool = True  # points are compared only where it is equal
    in_title: bool = False  # named in the title of a panel where panels differ in it
    choices: tuple[str, ...] = ()  # of a name; empty: checked elsewhere


FIELDS: tuple[Field, ...] = (
    Field("seed", int, "seed", form="count", in_cell=False),
    Field("workload", str, "workload"),
    Field("method", str, "method", in_cell=False),
    Field("selection", str, "selection", in_cell=False),
    Field("preset", str, "model"),
    Field("d_model", int, "d", form="count"),
    Field("d_ffn", int, "d_ffn", form="count"),
    Field("n_layers", int, "layers", form="count"),
    Field("n_heads", int, "heads", form="count"),
    Field("k", int, "K", form="count", in_cell=False),
    Field("k_frac", float, "K share", form="number", in_cell=False),
    Field("batch", int, "batch", form="number", phrase="batch {}", in_title=True),
    Field("seq_len", int, "seq_len", form="number", phrase="seq {}", in_title=True),
    Field("tokens", int, "tokens/step", form="count", phrase="{} tokens"),
    Field("train_tokens", int, "trained on", form="tokens", phrase="trained on {}", in_title=True),
    Field("eval_tokens", int, "evaluated on", 262_144, form="tokens"),
    Field("vocab_size", int, "vocabulary", 32_000, form="count", phrase="vocabulary {}", in_title=True),
    Field("lr", float, "lr", 1e-3, form="number", phrase="lr {}", in_title=True),
    Field("data_id", str, "data", form="hash", in_title=True),
    Field("dtype", str, "dtype", "bf16", in_title=True, choices=("bf16", "fp16", "fp32", "fp64")),
    Field("timing_mode", str, "timing", "auto", choices=("auto", "graph_cold", "launch_cold", "graph_hot")),
)
FIELD: dict[str, Field] = {field.name: field for field in FIELDS}


@dataclass(frozen=True)
class Workload:
    """One kind of work that a point can be."""

    name: str  # also of its module in `harness.workloads`
    axes: tuple[str, ...]
    primary_metric: str  # a failed point is reported under it, and people look at it first
    step_metric: str  # the duration of one step, from which the duration of a point is forecast
    objectives: tuple[str, ...]  # of the study of a grid; PEAK stands for the device's peak metric
    does: str  # verb of a sentence about it
    grouped: bool = True  # the methods of a group run in one process on the same weights and inputs: paired
    whole_model: bool = False  # all layers, so it needs the depth and the heads of the model; else one FFN
    decodes: bool = False  # one token of each sequence in a step, forward only; else a training step
    reads_text: bool = False  # trains on tokenised text and is evaluated on held-out text
    # For the forecast: timing loops of a point, and the steps of one sample of all of them.
    loops: int = 0
    steps_per_sample: int = 0
    required: tuple[str, ...] = ()  # axes without a default


PEAK = "PEAK"
# Axes that a point does not take over as they are: together they give its shape, and its method, rule and
# batch.
SHAPE_AXES = ("preset", "d_model", "d_ffn", "n_layers", "n_heads")
STEP_AXES = ("method", "selection", "k_frac", "batch", "seq_len", "tokens")

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "pretrain",
            axes=(*SHAPE_AXES, *STEP_AXES, "dtype", "train_tokens", "eval_tokens", "vocab_size", "lr"),
            primary_metric="tokens_per_s",
            step_metric="step_ms",
            objectives=("tokens_per_s", PEAK, "perplexity"),
            does="trains",
            grouped=False,
            whole_model=True,
            reads_text=True,
            required=("train_tokens",),
        ),
        Workload(
            "generate",
            axes=(*SHAPE_AXES, *STEP_AXES, "dtype", "vocab_size", "timing_mode"),
            primary_metric="tokens_per_s",
            step_metric="latency_ms",
            objectives=("latency_ms", "time_to_first_token_ms"),
            does="generates",
            whole_model=True,
            decodes=True,
            loops=2,
            steps_per_sample=64,  # 32 decoding steps and a prompt, which takes about as long
        ),
        Workload(
            "ffn_train",
            axes=(*SHAPE_AXES, *STEP_AXES, "dtype", "timing_mode"),
            primary_metric="step_ms",
            step_metric="step_ms",
            objectives=("step_ms", "saved_activation_bytes_per_token"),
            does="runs one FFN training step",
            loops=3,
            steps_per_sample=2,  # forward, backward, and both
        ),
        Workload(
            "ffn_decode",
            axes=(*SHAPE_AXES, *STEP_AXES, "dtype", "timing_mode"),
            primary_metric="latency_us",
            step_metric="latency_us",
            objectives=("latency_us",),
            does="runs",
            decodes=True,
            loops=1,
            steps_per_sample=1,
        ),
    )
}

PEAK_METRIC = {"cuda": "peak_allocated_bytes", "cpu": "peak_rss_over_start_bytes"}
TRAINING_DTYPES = ("bf16", "fp32")  # of autocast in `pretrain`; weights and optimizer are fp32 in both
MIN_STEPS = 4  # of a training; with fewer, nothing is left to time after warm-up and the memory pass
# Metrics that a training reports while it runs, so that a pruner can end it early.
PRUNABLE = ("eval_loss_nats", "perplexity", "bits_per_byte")
# cuBLAS leaves its fast path where a width is no multiple of so many elements (16-byte rows of two-byte
# elements).
ALIGNMENT = 8


def workloads_where(**facts: bool) -> tuple[str, ...]:
    """Names of the workloads of which all the given facts hold: `workloads_where(decodes=True)`."""
    wanted = facts.items()
    return tuple(name for name, workload in WORKLOADS.items() if wanted <= vars(workload).items())
