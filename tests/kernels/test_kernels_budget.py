"""What the kernels compile to, and how often, found without a GPU."""

import json
import os
import subprocess
import sys

from moc.kernels.budget import BUDGET, excesses, in_subprocess

# Compiles as launches would, for a GPU that need not be there: the launches themselves are left out.
COUNT_VARIANTS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
run = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)

import moc.ffn_ops as ffn_ops
from moc.kernels import between
between._check = lambda **rows: None
between._compares_pairs = lambda device: True

for n_tokens in (1, 2, 7, 16, 127, 128, 300, 4096):
    x = torch.zeros(n_tokens, 16, dtype=torch.bfloat16)
    weights = [torch.zeros(320, 16, dtype=torch.bfloat16) for _ in range(3)]
    outputs = torch.ops.moc.triton_ffn_forward(x, *weights, "RULE", False, True)
    torch.ops.moc.triton_ffn_backward(x, x, *outputs[1:4], *weights)
kernels = (between.select_fwd_kernel, between.expand_bwd_kernel)
print([len(kernel.device_caches[0][0]) for kernel in kernels])
"""


def test_registers_spills_and_shared_memory_are_within_budget() -> None:
    """Every kernel, compiled for sm_80 and sm_90, stays within the committed budget, which spills nothing."""
    budget = json.loads(BUDGET.read_text())
    assert all(limits["spill_bytes"] == 0 for limits in budget.values())
    assert excesses(in_subprocess(), budget) == []


def test_an_excess_is_named() -> None:
    """A number above its limit, a variant without one, and a limit without a number each give a line."""
    rows = {"a": {"registers": 65}, "b": {"registers": 1}}
    assert excesses(rows, {"a": {"registers": 64}, "c": {"registers": 8}}) == [
        "b: not in budget.json; run with --update",
        "a: registers 65 exceeds 64",
        "c: registers has a limit but was not measured",
    ]


def test_one_compilation_for_every_number_of_tokens() -> None:
    """A sweep over the number of tokens compiles each kernel once."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_VARIANTS.replace("RULE", "topk:0.1875")],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["[1,", "1]"], done.stderr
