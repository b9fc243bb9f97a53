"""What there is to choose from: workloads, their axes, and the defaults and limits of both."""

from __future__ import annotations

_SHAPE_AXES = ("preset", "d_model", "d_ffn", "n_layers", "n_heads")
_STEP_AXES = ("method", "selection", "k_frac", "batch", "seq_len", "tokens", "dtype")
_TRAINING_AXES = ("train_tokens", "eval_tokens", "vocab_size", "lr")
AXES: dict[str, tuple[str, ...]] = {
    "ffn_train": (*_SHAPE_AXES, *_STEP_AXES, "timing_mode"),
    "ffn_decode": (*_SHAPE_AXES, *_STEP_AXES, "timing_mode"),
    "generate": (*_SHAPE_AXES, *_STEP_AXES, "vocab_size", "timing_mode"),
    "pretrain": (*_SHAPE_AXES, *_STEP_AXES, *_TRAINING_AXES),
}
WHOLE_MODEL = ("pretrain", "generate")  # workloads of all layers, which need the model's depth and heads
INTEGER_AXES = frozenset(
    (*_SHAPE_AXES[1:], "batch", "seq_len", "tokens", "train_tokens", "eval_tokens", "vocab_size")
)
FLOAT_AXES = frozenset(("lr", "k_frac"))
TRAINING_DTYPES = ("bf16", "fp32")  # of autocast in `pretrain`; weights and optimizer are fp32 in both
DTYPES = ("bf16", "fp16", "fp32", "fp64")
TIMING_MODES = ("auto", "graph_cold", "launch_cold", "graph_hot")
_GRID_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "ffn_train": ("step_ms", "saved_activation_bytes_per_token"),
    "ffn_decode": ("latency_us",),
    "generate": ("latency_ms", "time_to_first_token_ms"),
    "pretrain": ("tokens_per_s", "PEAK", "perplexity"),
}
# The metric a failed point of a workload is reported under, and the first one people look at.
PRIMARY_METRIC: dict[str, str] = {
    "ffn_train": "step_ms",
    "ffn_decode": "latency_us",
    "pretrain": "tokens_per_s",
    "generate": "tokens_per_s",
}
_TIMED = {
    "ffn_train": "step_ms",
    "ffn_decode": "latency_us",
    "generate": "latency_ms",
    "pretrain": "step_ms",
}
PRETRAIN_DEFAULTS: dict[str, int | float] = {"vocab_size": 32000, "eval_tokens": 262_144, "lr": 1e-3}
# Rivals of these workloads run in one process, on the same weights and inputs, so that they are paired.
GROUPED_WORKLOADS = ("ffn_train", "ffn_decode", "generate")
DECODING = ("ffn_decode", "generate")
# cuBLAS leaves its fast path where a width is not a multiple of this many elements.
ALIGNMENT = 8
_WORKLOADS = ("pretrain", "generate", "ffn_train", "ffn_decode")
# What a training tells while it runs, so that a pruner can judge it before its end.
PRUNABLE = ("eval_loss_nats", "perplexity", "bits_per_byte")
MIN_STEPS = 4  # below, nothing is left to time after warm-up and the memory pass
