"""One set of weights, many models: how the methods of a `generate` group share every parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.measure.ffn import FfnTensors, normal
from moc.config import LlamaConfig
from moc.layers.dense import DenseFFN
from moc.llama import Llama

# Products of the same input, whose weights lie side by side in memory so that one product can take all.
_NEIGHBOURS = (("attention.wq", "attention.wk", "attention.wv"), ("ffn.w_gate", "ffn.w_up"))


def random_weights(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Every parameter of the model by name: norms one, matrices normal and scaled by what they are fed.

    So gates, up projections and what each layer adds are of order one at any width, as in
    `harness.measure.ffn.natural_tensors`. Drawn on the device: on the CPU seven billion values take minutes.
    """
    with torch.device("meta"):
        shapes = {
            name: parameter.shape
            for name, parameter in Llama(config, lambda: DenseFFN(config.ffn)).named_parameters()
        }
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            weights[name] = torch.ones(shape, dtype=dtype, device=device)
        elif name not in weights:
            names = [name]
            for group in _NEIGHBOURS:
                prefix = name.removesuffix(group[0])
                if prefix != name:
                    names = [prefix + neighbour for neighbour in group]
            joined = torch.empty(len(names), *shape, dtype=dtype, device=device)
            for name, weight in zip(names, joined, strict=True):
                weight.copy_(normal(tuple(shape), _std(name, config), generator, dtype))
                weights[name] = weight
    return weights


def _std(name: str, config: LlamaConfig) -> float:
    if name == "embedding":
        return 1.0
    return float((config.d_ffn if name.endswith("w_down") else config.d_model) ** -0.5)


def ffn_tensors(weights: dict[str, Tensor], layer: int) -> FfnTensors:
    """The feed-forward weights of one layer; there is no input."""
    w_gate, w_up, w_down = (weights[f"layers.{layer}.ffn.{name}"] for name in ("w_gate", "w_up", "w_down"))
    nothing = w_gate.new_empty(0, w_gate.shape[1])
    return FfnTensors(w_gate, w_up, w_down, nothing, nothing)


def model_on(config: LlamaConfig, weights: dict[str, Tensor], ffns: Sequence[nn.Module]) -> Llama:
    """A model whose parameters are `weights` themselves, with these feed-forward layers, which hold theirs.

    Nothing is copied and nothing needs gradients.
    """
    with torch.device("meta"):
        model = Llama(config, nn.Identity)
    rest = {name: weight for name, weight in weights.items() if ".ffn." not in name}
    model.load_state_dict(rest, assign=True)
    # Moves the tables of positions. The feed-forward layers come later: some copy their weights when moved.
    model.to(weights["head"].device)
    for block, ffn in zip(model.layers, ffns, strict=True):
        block.ffn = ffn
    return model.requires_grad_(False).eval()
