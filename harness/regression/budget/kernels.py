"""What the kernels compile to, found without a GPU.

For sm_80 and sm_90 each kernel at its tuned shapes is compiled as a launch would, and the machine code is
read with the tools that come with Triton: registers per thread, bytes of spilled registers per thread, bytes
of shared memory, instructions, tensor-core instructions. What they should be is in the budget.json of the
repository, by version of Triton: `make bench-check` compares, `make bench-update` accepts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.regression.budget.check import Fact, Facts


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch would compile it."""

    # select, expand, loss, attend, select_few (few tokens, nothing kept), select_sparse and expand_sparse
    # (2:4 sparse results), metadata, or a decoding kernel and for how many tokens: gate/1
    kind: str
    rule: str
    d_ffn: int
    dtype: str
    fp8: bool = False

    def name(self, capability: int) -> str:
        """As it stands in budget.json."""
        parts = [self.kind, self.rule, f"f{self.d_ffn}", self.dtype, *(["fp8"] if self.fp8 else [])]
        return f"sm_{capability} " + " ".join(parts)


VARIANTS = (
    *(Variant("select", "topk:0.1875", d_ffn, "bf16") for d_ffn in (5504, 384, 2048, 11008)),
    *(Variant("select", rule, 5504, "bf16") for rule in ("nm:2:8", "nm:12:64", "nm:6:7")),
    *(Variant("select", rule, 5504, "bf16") for rule in ("topk_abs:0.1875", "threshold:0.5:0.25")),
    *(Variant("select", "topk:0.1875", 5504, dtype) for dtype in ("fp16", "fp32")),
    Variant("select", "topk:0.1875", 5504, "bf16", fp8=True),
    *(Variant("expand", "any", 5504, dtype) for dtype in ("bf16", "fp32")),
    Variant("expand", "any", 5504, "bf16", fp8=True),
    *(Variant(kind, "nm:2:8", 5504, "bf16") for kind in ("select_sparse", "expand_sparse", "metadata")),
    Variant("loss", "any", 0, "bf16"),  # of any vocabulary
    *(Variant("select_few", rule, 5504, "bf16") for rule in ("topk:0.1875", "nm:2:8", "nm:12:64")),
    Variant("attend", "any", 0, "bf16"),  # of any model whose heads are 128 wide
    *(Variant(kind, "topk:0.1875", 5504, "bf16") for kind in ("gate/1", "gate/16", "cut/1", "down/16")),
    Variant("clear/1", "nm:2:8", 5504, "bf16"),
    *(Variant("channels/1", rule, 5504, "bf16") for rule in ("nm:2:8", "nm:12:64", "topk:0.1875")),
    *(Variant("channels/16", rule, 5504, "bf16") for rule in ("nm:12:64", "topk:0.1875")),
    *(Variant(kind, "dense", 5504, "i8") for kind in ("channels/1", "down/1", "channels/16", "down/16")),
    *(Variant("channels/1", rule, 11008, "i8") for rule in ("nm:2:8", "topk:0.1875")),
)
# sm_80 cannot compare bf16 in pairs and has no fp8: one variant of each way through the code.
_SM_80 = (
    *(Variant("select", rule, 5504, "bf16") for rule in ("topk:0.1875", "nm:2:8", "nm:6:7")),
    Variant("select", "topk:0.1875", 5504, "fp32"),
    Variant("expand", "any", 5504, "bf16"),
    Variant("loss", "any", 0, "bf16"),
)
WORK = [(variant, 90) for variant in VARIANTS] + [(variant, 80) for variant in _SM_80]


def measure(variant: Variant, capability: int) -> dict[str, int]:
    """What a variant is for sm_`capability`: registers and spilled bytes of a thread, shared bytes of a
    program, instructions, and how many of them use tensor cores."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = _LAUNCHES[variant.kind](variant, capability)
    kernel = launch.kernel
    fixed = {name: value for name, value in launch.constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else launch.types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in launch.aligned
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps},
    )
    return {**_read(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


@dataclass(frozen=True)
class _Launch:
    """A kernel, the constants it is compiled for, the types of its other arguments, and its warps."""

    kernel: Any
    constants: dict[str, Any]  # those that the kernel does not take are left out
    types: dict[str, str]
    num_warps: int
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16, beside pointers


def _pass(variant: Variant, capability: int) -> _Launch:
    """A pass between the GEMMs, as `moc.kernels.passes` launches it."""
    from moc.kernels import passes
    from moc.selection import parse_selection

    narrow = variant.dtype != "fp32"
    packed = narrow and capability >= 90
    few, sparse = variant.kind == "select_few", variant.kind.endswith("_sparse")
    if variant.kind.startswith("select"):
        kernel, rule = passes.select_fwd_kernel, parse_selection(variant.rule)
        tiling = passes.select_tiling(variant.d_ffn, rule, packed, few)
        constants = passes.select_constants(
            variant.d_ffn, rule, 2 if narrow else 4, packed, 8, not few, variant.fp8, tiling, sparse
        )
    else:
        kernel, tiling = passes.expand_bwd_kernel, passes.EXPAND_TILING
        constants = passes.expand_constants(variant.d_ffn, variant.d_ffn, 8, variant.fp8, tiling, sparse)
    types = dict.fromkeys(kernel.arg_names, "i32") | {"quantile": "fp32"}
    types |= {name: f"*{variant.dtype}" for name in types if name.endswith("_ptr")}
    types |= {"bitmask_ptr": "*i32", "overflow_ptr": "*i64", "scales_ptr": "*fp32"}
    if variant.fp8:
        types["pairs_ptr"] = "*fp8e4nv"
    absent = [*([] if variant.fp8 else ["scales_ptr"]), *(["pairs_ptr", "bitmask_ptr"] if few else [])]
    absent += [] if sparse else ["sparse_ptr"]
    fixed = {**constants, "ASM": True, **dict.fromkeys(absent)}
    return _Launch(kernel, fixed, types, tiling.num_warps)


def _metadata(_variant: Variant, _capability: int) -> _Launch:
    """The metadata of a sparse [dg du], as `moc.kernels.sparse24` launches it."""
    from moc.kernels import sparse24

    types = {"bitmask_ptr": "*i32", "metadata_ptr": "*i32", "words": "i32"}
    constants = {"COPIES": 2, "BLOCK": sparse24.BLOCK}
    return _Launch(sparse24.metadata_kernel, constants, types, sparse24.NUM_WARPS)


def _attend(variant: Variant, _capability: int) -> _Launch:
    """A step of attention, as `moc.kernels.attend` launches it."""
    from moc.kernels import attend

    kernel = attend.attend_step_kernel
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    types |= {name: f"*{variant.dtype}" for name in types if name.endswith("_ptr")}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64"}
    return _Launch(kernel, {"D": 128, "BLOCK": attend.BLOCK}, types, 4)


def _loss(variant: Variant, _capability: int) -> _Launch:
    """The loss, as `moc.kernels.cross_entropy` launches it in training."""
    from moc.kernels import cross_entropy

    kernel = cross_entropy.cross_entropy_kernel
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"logits_ptr": f"*{variant.dtype}", "targets_ptr": "*i64", "nats_ptr": "*fp32"}
    return _Launch(kernel, {"GRADIENT": True, "BLOCK": cross_entropy.BLOCK}, types, 8)


def _decode(variant: Variant, capability: int) -> _Launch:
    """A decoding kernel, as `moc.kernels.decode_launch` launches it for d 2048."""
    from moc.kernels import decode, decode_launch
    from moc.selection import parse_selection

    kind, _, count = variant.kind.partition("/")
    d, d_ffn, tokens = 2048, variant.d_ffn, int(count)
    rule = None if variant.rule == "dense" else parse_selection(variant.rule)
    tiling = decode_launch.decode_tiling(d_ffn, rule, tokens)
    packed = capability >= 90
    narrow = variant.dtype == "i8"
    absent = [] if narrow else ["scale_ptr", "gate_scale_ptr", "up_scale_ptr", "down_scale_ptr"]
    if kind == "gate":
        assert tiling.gate is not None
        kernel, num_warps = decode.decode_gate_kernel, tiling.gate.num_warps
        constants = decode_launch.gate_constants(d, tokens, tiling)
    elif kind == "clear":
        kernel, num_warps, constants = decode.decode_clear_kernel, 4, {"PDL": tiling.pdl}
    elif kind == "cut":
        assert rule is not None
        kernel, num_warps = decode.decode_cut_kernel, decode_launch.cut_warps(d_ffn)
        constants = decode_launch.cut_constants(d_ffn, rule, packed, tiling)
    elif kind == "channels":
        kernel, num_warps = decode.decode_channels_kernel, tiling.num_warps
        constants = decode_launch.channels_constants(d, d_ffn, rule, tokens, packed, tiling)
        absent += ["g_ptr", "cut_ptr"] if tiling.gate is None else ["gate_ptr", "gate_scale_ptr"]
        absent += ["z_ptr"] if tiling.down is None else ["down_ptr", "sum_ptr", "ticket_ptr", "y_ptr"]
        absent += [] if tiling.cut_apart else ["cut_ptr"]
    else:
        assert tiling.down is not None
        kernel, num_warps = decode.decode_down_kernel, tiling.down.num_warps
        constants = decode_launch.down_constants(rule, tokens, tiling)
    types = dict.fromkeys(kernel.arg_names, "i32") | {"quantile": "fp32", "overflow_ptr": "*i64"}
    types |= dict.fromkeys(("x_ptr", "g_ptr", "y_ptr"), "*bf16")
    types |= dict.fromkeys(("gate_ptr", "up_ptr", "down_ptr"), f"*{variant.dtype}")
    types |= {name: "*fp32" for name in types if "scale" in name}
    types |= dict.fromkeys(("z_ptr", "sum_ptr", "parts_ptr"), "*fp32")
    types |= dict.fromkeys(("cut_ptr", "zeros_ptr", "ticket_ptr", "tickets_ptr"), "*i32")
    fixed = {**constants, "ASM": True, **dict.fromkeys(absent)}
    return _Launch(kernel, fixed, types, num_warps, ("D",))


_LAUNCHES: dict[str, Callable[[Variant, int], _Launch]] = {
    "select": _pass,
    "select_few": _pass,
    "select_sparse": _pass,
    "expand": _pass,
    "expand_sparse": _pass,
    "metadata": _metadata,
    "loss": _loss,
    "attend": _attend,
}
_LAUNCHES.update({variant.kind: _decode for variant in VARIANTS if "/" in variant.kind})


def _read(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    # One a line behind its address; NOP fills the end up to a multiple of 128 bytes.
    instructions = [line for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S.*)", code) if "NOP" not in line]
    return {
        "registers": int(found[1]),
        "spill_bytes": int(found[2]),
        "instructions": len(instructions),
        "tensor_core_instructions": len(re.findall(r"\b(?:[HIQ]G?MMA)\.", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def collect() -> Facts:
    """Registers, spills, shared bytes, instructions and tensor-core instructions; kernels left out."""
    version = importlib.metadata.version("triton").partition("+")[0]
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(measure, *zip(*WORK, strict=True)))
    facts: dict[str, Fact] = {
        f"{variant.name(capability)}: {quantity}": value
        for (variant, capability), row in zip(WORK, rows, strict=True)
        for quantity, value in row.items()
    }
    compiled = {_LAUNCHES[variant.kind](variant, capability).kernel.__name__ for variant, capability in WORK}
    missing = " ".join(sorted(_kernels() - compiled))
    return {f"kernels triton {version}": facts, "kernels": {"not compiled by the gate": missing}}


def _kernels() -> set[str]:
    """Names of everything in `moc` that can be launched; helpers that kernels call are not."""
    import triton

    import moc

    found = set()
    for info in pkgutil.walk_packages(moc.__path__, "moc."):
        module = importlib.import_module(info.name)
        found |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and name.endswith("kernel")
        }
    return found
