"""Triton kernels and the functions that launch them, one family per file.

Training: `passes` (select and expand, between the GEMMs), `selection` and `banks` (which channels are kept),
`sparse24` (2:4 sparse results), `cross_entropy`. Decoding: `decode`, `decode_launch`, `attend`. `pass_parts`,
`decode_parts` and `primitives` hold the device functions that they share.
"""
