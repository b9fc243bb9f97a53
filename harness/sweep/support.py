"""Whether a point can be measured on a kind of device, and why not."""

from __future__ import annotations

from typing import Any

from harness.sweep.catalog import TRAINING_DTYPES, WORKLOADS
from harness.sweep.point import Point
from moc.config import FfnShape, LlamaConfig
from moc.methods import get_method


def unsupported_reason(point: Point, device: str) -> str | None:
    """Why a point cannot be measured on a kind of device (`cpu`, `cuda`), in one line; None if it can.

    Known before a process is started: the plan, the runner and the workloads ask here.
    """
    workload = WORKLOADS[point.workload]
    try:
        method = get_method(point.method)
        if workload.whole_model:
            model_config(point)
        rule = point.rule if method.takes_selection else None
    except ValueError as error:  # an unknown name, a malformed rule, a field that the model lacks
        return str(error)
    if workload.decodes and not method.decode:
        return f"method {method.name} does not decode"
    if workload.decodes and workload.whole_model and method.generate_refusal is not None:
        return f"method {method.name} does not generate: {method.generate_refusal}"
    if not workload.decodes and not method.backward:
        return f"method {method.name} has no backward pass"
    if workload.decodes and not workload.whole_model and point.n_layers != 1:
        return f"{point.workload} measures one layer, not n_layers={point.n_layers}"
    if workload.reads_text and point.dtype not in TRAINING_DTYPES:
        return f"dtype {point.dtype} cannot be trained; choose one of {', '.join(TRAINING_DTYPES)}"
    return method.unsupported_reason(FfnShape(point.d_model, point.d_ffn), rule, point.dtype, device)


def model_config(point: Point) -> LlamaConfig:
    """The model of a `pretrain` or `generate` point. Raises ValueError naming a field that it lacks."""
    return LlamaConfig(
        name=point.preset or f"{point.d_model}x{point.d_ffn}",
        d_model=point.d_model,
        d_ffn=point.d_ffn,
        n_layers=point.n_layers,
        n_heads=_given(point, "n_heads"),
        vocab_size=_given(point, "vocab_size"),
        max_seq_len=point.seq_len,
    )


def _given(point: Point, name: str) -> Any:
    """A field that other workloads leave out."""
    value = getattr(point, name)
    if value is None:
        raise ValueError(f"{point.workload}: {name} is missing from the point")
    return value
