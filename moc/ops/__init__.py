"""Operators on tensors, opaque to torch.compile.

Order of calls, in one direction only:

1. a layer of `moc.layers` calls a function here, such as `triton_ffn.triton_moc_ffn`;
2. the function casts and checks its arguments (`inputs`) and calls its custom operator (`torch.ops.moc`);
3. the operator computes in PyTorch (`torch_ffn`, `compact`, `gather`), or launches `moc.kernels`
   (`triton_ffn`, `decode`, `attention`, `loss`) and calls cuSPARSELt (`cusparselt`);
4. backward, registered with the operator, calls a second operator in the same file.
"""

from moc.ops.torch_ffn import act_prune_ffn, dense_gu_ffn, moc_ffn

__all__ = ["act_prune_ffn", "dense_gu_ffn", "moc_ffn"]
