"""Feed-forward operators on tensors. Order of calls: a layer of `moc.layers` calls an operator here, which
checks and casts its arguments (`inputs`), registers the autograd function and launches `moc.kernels`."""

from moc.ops.torch_ffn import act_prune_ffn, dense_gu_ffn, moc_ffn

__all__ = ["act_prune_ffn", "dense_gu_ffn", "moc_ffn"]
