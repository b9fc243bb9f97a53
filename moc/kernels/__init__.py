"""Triton kernels of Mixture-of-Channels for training: the passes between the GEMMs, a family a file, with
`budget.py` (what they compile to, checked without a GPU) and `tune.py` (which variant is fastest on one)."""
