"""Checks and casts of inputs that all operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from moc.dtypes import BYTES, torch_dtypes

_DTYPES = torch_dtypes(BYTES)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype F.linear would compute in with `tensor` as its input, given the torch.autocast in force."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their `compute_dtype`: themselves without torch.autocast, else what F.linear casts to.

    Casting once, before several uses, also keeps one low-precision copy of an activation instead of one per
    use.
    """
    return tuple(t.to(compute_dtype(t)) for t in tensors)


def side_by_side(*matrices: Tensor) -> Tensor | None:
    """Matrices [rows, d] as one [count * rows, d] that shares their memory, or None if they do not lie so."""
    first, (rows, d) = matrices[0], matrices[0].shape
    adjacent = all(
        matrix.is_contiguous()
        and matrix.shape == first.shape
        and matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and matrix.storage_offset() == first.storage_offset() + place * rows * d
        for place, matrix in enumerate(matrices)
    )
    return first.as_strided((len(matrices) * rows, d), (d, 1)) if adjacent else None


def place_side_by_side(*parameters: Tensor) -> Tensor:
    """Place parameters [rows, d] side by side in memory, with a copy only if they do not lie so yet.

    Returns all of them as one [count * rows, d] without gradient, of which the parameters are views.
    """
    joined = side_by_side(*(parameter.detach() for parameter in parameters))
    if joined is None:
        joined = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, view in zip(parameters, joined.split(len(parameters[0])), strict=True):
            parameter.data = view
    return joined


def check_ffn_inputs(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless x [..., d] and three weights [d_ffn, d] fit together."""
    if w_gate.dim() != 2:
        raise ValueError(f"w_gate must be [d_ffn, d], got shape {tuple(w_gate.shape)}")
    for name, weight in (("w_up", w_up), ("w_down", w_down)):
        if weight.shape != w_gate.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, w_gate {tuple(w_gate.shape)}: all three are "
                "[d_ffn, d], channel-major"
            )
    if x.dim() < 1 or x.shape[-1] != w_gate.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be d = {w_gate.shape[1]}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; supported: {', '.join(map(str, _DTYPES))}")
    for name, tensor in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        if compute_dtype(tensor) != compute_dtype(x):
            raise ValueError(f"{name} has dtype {tensor.dtype}, x {x.dtype}: they must be the same")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must be on one device")
