"""Every metric a row may carry: its unit, which direction is better, and what it means.

A name that is not here is refused by the store, so tables never hold a number nobody can explain.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric. `higher_is_better` is None where neither direction is (a count, a size of a run)."""

    unit: str
    higher_is_better: bool | None
    description: str


METRICS: dict[str, Metric] = {
    # time
    "forward_ms": Metric("ms", False, "device time of the forward pass, kept for backward"),
    "backward_ms": Metric("ms", False, "device time of the backward pass"),
    "step_ms": Metric("ms", False, "device time of one training step of the workload"),
    "latency_us": Metric("us", False, "device time of one decoding step of the FFN"),
    "latency_ms": Metric("ms", False, "time of one decoding step of the whole model, mean after the prompt"),
    "time_to_first_token_ms": Metric("ms", False, "time to read the prompts and choose the first token"),
    "compile_s": Metric("s", False, "first call minus a steady call: compilation and autotuning"),
    "tokens_per_s": Metric("tokens/s", True, "real tokens trained or generated per second, no padding"),
    "speedup_vs_best_dense": Metric("x", True, "paired ratio to the fastest dense method of the point"),
    # memory
    "peak_allocated_bytes": Metric("bytes", False, "CUDA allocator peak over what stood before the run"),
    "peak_rss_over_start_bytes": Metric("bytes", False, "CPU only: peak resident set over the child's start"),
    "transient_peak_bytes": Metric(
        "bytes", False, "peak over weights, gradients, inputs, outputs and what is saved"
    ),
    "saved_activation_bytes_per_token": Metric(
        "bytes/token", False, "what one FFN layer keeps for backward, counted by storage, its input included"
    ),
    "memory_formula_error": Metric("fraction", None, "predicted whole-model peak over measured, minus one"),
    # counts
    "flops": Metric("flop", None, "floating-point operations of one step"),
    "min_bytes": Metric("bytes", None, "fewest bytes one step must move through device memory"),
    "pct_of_roofline": Metric("%", True, "floor time by the measured ceilings over measured time"),
    "parameters": Metric("count", None, "parameters of the whole model"),
    "train_tokens_seen": Metric("tokens", None, "tokens the model was trained on"),
    # correctness and quality
    "max_rel_err": Metric("ratio", False, "largest relative Frobenius error of the correctness gate"),
    "logits_rel_err": Metric(
        "ratio", False, "decoded logits against the float32 reference, relative: median over tokens"
    ),
    "overflow_fraction": Metric("fraction", False, "channels above the threshold that the cap left out"),
    "union_share": Metric(
        "fraction", False, "channels that 16 tokens of different texts keep together, of d_ffn, over layers"
    ),
    "untrained_loss_nats": Metric("nats/token", None, "validation loss before the first step"),
    "untrained_perplexity": Metric("ratio", None, "validation perplexity before the first step"),
    "eval_loss_nats": Metric("nats/token", False, "validation loss after training"),
    "perplexity": Metric("ratio", False, "exp of eval_loss_nats"),
    "bits_per_byte": Metric("bits/byte", False, "evaluation loss per byte: comparable over tokenizers"),
}


STATUSES: tuple[str, ...] = ("ok", "oom", "unsupported", "wrong", "timeout", "crashed", "unstable")
