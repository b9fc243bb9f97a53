"""Products of a 2:4 sparse and a dense matrix by NVIDIA's cuSPARSELt, written into a given tensor.

PyTorch's own call (`torch._cslt_sparse_mm`) makes a plan each time, 0.5 to 0.9 ms on the host, and allocates
its result. Here a plan is made once per shape, with the library that PyTorch has loaded. The C interface:
docs.nvidia.com/cuda/cusparselt, versions 0.8 to 0.10.

On the first use on a device (`usable`) a product is compared with cuBLAS, so that a version or GPU for which
the assumptions of this file do not hold is detected.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from moc.kernels.sparse24 import TILE_COLUMNS, TILE_ROWS, Sparse24, compressed_bytes, metadata_pass
from moc.ops.compact import pack_bitmask

_DATA_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType
_ROW_MAJOR, _PLAIN, _COMPUTE_FLOAT, _HALF, _DEFAULT, _CONFIG_ID = 2, 0, 2, 0, 0, 0
_ALIGNMENT = 16  # bytes
# Of the algorithms the fastest at every shape of docs/measured.md from 2048 channels on (2026-11-26).
_ALGORITHM = 3


def usable(device: torch.device) -> bool:
    """Whether 2:4 sparse products work on this device; tried once per device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _usable(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _usable(index: int) -> bool:
    if torch.cuda.get_device_capability(index) != (9, 0) or not torch.backends.cusparselt.is_available():
        return False
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first 2:4 sparse product cannot be inside a CUDA graph; run the layer before")
    device = torch.device("cuda", index)
    rows, width, columns = 2 * TILE_ROWS, 4 * TILE_COLUMNS, 64
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(rows, width // 4, 4, generator=generator).argsort(2).argsort(2) < 2).flatten(1)
    dense = torch.randn(rows, width, generator=generator).to(torch.bfloat16) * kept
    right = torch.randn(width, columns, generator=generator).to(device, torch.bfloat16)
    buffer = torch.zeros(compressed_bytes(rows, width), dtype=torch.uint8, device=device)
    sparse = Sparse24(buffer, rows, width, torch.bfloat16)
    sparse.values.copy_(dense[kept].view(rows, -1))
    result = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    try:
        metadata_pass(pack_bitmask(kept).to(device), sparse)
        sparse_mm(sparse, right, result)
        expected = dense.to(device).float() @ right.float()
        error = float((result.float() - expected).norm() / expected.norm())
    except (OSError, RuntimeError) as problem:
        warnings.warn(f"2:4 sparse products are not used: {problem}", stacklevel=2)
        return False
    if not error < 0.01:
        warnings.warn(f"2:4 sparse products are not used: relative error {error:.2g}", stacklevel=2)
        return False
    return True


def sparse_mm(sparse: Sparse24, right: Tensor, out: Tensor) -> None:
    """out [n_rows, n] = sparse [n_rows, width] @ right [width, n], summed in float32.

    `right` and `out` are row-major, of the sparse matrix's dtype, bfloat16 or float16, n a multiple of 16.
    Raises ValueError for what does not fit and RuntimeError for what the library refuses.
    """
    width, n = right.shape
    if width != sparse.width or out.shape != (sparse.n_rows, n):
        raise ValueError(
            f"[{sparse.n_rows}, {sparse.width}] x {list(right.shape)} does not give {list(out.shape)}"
        )
    if not (right.dtype == out.dtype == sparse.dtype and sparse.dtype in _DATA_TYPES):
        raise ValueError(f"dtypes {sparse.dtype}, {right.dtype}, {out.dtype}: expected bf16 or fp16 alike")
    if right.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"strides {right.stride()}, {out.stride()}: expected row-major matrices")
    plan = _plan(
        sparse.buffer.device.index, sparse.dtype, sparse.n_rows, width, n, right.stride(0), out.stride(0)
    )
    plan.run(sparse.buffer, right, out)


class _Library:
    """The library and one handle per device."""

    def __init__(self) -> None:
        self.calls = ctypes.CDLL("libcusparseLt.so.0")  # already loaded by PyTorch
        self.calls.cusparseLtGetErrorString.restype = ctypes.c_char_p
        self.handles: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def handle(self, index: int) -> ctypes.Array[ctypes.c_char]:
        if index not in self.handles:
            handle = _opaque()
            self.call("cusparseLtInit", handle)
            self.handles[index] = handle
        return self.handles[index]

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.calls, name)(*arguments)
        if status:
            text = self.calls.cusparseLtGetErrorString(status).decode()
            raise RuntimeError(f"{name}: {text}")


@functools.cache
def _library() -> _Library:
    return _Library()


def _opaque() -> ctypes.Array[ctypes.c_char]:
    """Room for one of the library's structs: 512 bytes, aligned to 16."""
    room = ctypes.create_string_buffer(512 + 16)
    return (ctypes.c_char * 512).from_buffer(room, -ctypes.addressof(room) % 16)


class _Plan:
    """How one product is computed; made once per shape."""

    def __init__(
        self, index: int, dtype: torch.dtype, rows: int, width: int, n: int, right_stride: int, stride: int
    ) -> None:
        self.library = _library()
        call, handle = self.library.call, self.library.handle(index)
        self.handle, self.plan = handle, _opaque()
        data_type, int64 = _DATA_TYPES[dtype], ctypes.c_int64
        left, right, result, product, choice = (_opaque() for _ in range(5))
        self.structs = left, right, result, product, choice  # the plan refers to them
        shape = int64(rows), int64(width), int64(width)
        call(
            "cusparseLtStructuredDescriptorInit",
            *(handle, left, *shape, _ALIGNMENT, data_type, _ROW_MAJOR, _HALF),
        )
        for struct, height, stride_of in ((right, width, right_stride), (result, rows, stride)):
            shape = int64(height), int64(n), int64(stride_of)
            call("cusparseLtDenseDescriptorInit", handle, struct, *shape, _ALIGNMENT, data_type, _ROW_MAJOR)
        call(
            "cusparseLtMatmulDescriptorInit",
            *(handle, product, _PLAIN, _PLAIN, left, right, result, result, _COMPUTE_FLOAT),
        )
        call("cusparseLtMatmulAlgSelectionInit", handle, choice, product, _DEFAULT)
        algorithm = ctypes.c_int(_ALGORITHM)
        call(
            "cusparseLtMatmulAlgSetAttribute",
            *(handle, choice, _CONFIG_ID, ctypes.byref(algorithm), ctypes.c_size_t(4)),
        )
        call("cusparseLtMatmulPlanInit", handle, self.plan, product, choice)
        workspace = ctypes.c_size_t()
        call("cusparseLtMatmulGetWorkspace", handle, self.plan, ctypes.byref(workspace))
        self.workspace = workspace.value
        destroy: Callable[..., object] = self.library.calls.cusparseLtMatmulPlanDestroy
        weakref.finalize(self, destroy, self.plan).atexit = False  # CUDA may be gone by then

    def run(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=out.device)
        one, zero, stream = ctypes.c_float(1), ctypes.c_float(0), torch.cuda.current_stream(out.device)
        pointer = ctypes.c_void_p
        streams = (ctypes.c_void_p * 1)(stream.cuda_stream)
        with torch.cuda.device(out.device):
            self.library.call(
                "cusparseLtMatmul",
                *(self.handle, self.plan, ctypes.byref(one), pointer(left.data_ptr())),
                *(pointer(right.data_ptr()), ctypes.byref(zero), pointer(out.data_ptr())),
                *(pointer(out.data_ptr()), pointer(workspace.data_ptr()), streams, 1),
            )


@functools.lru_cache(maxsize=256)
def _plan(
    index: int, dtype: torch.dtype, rows: int, width: int, n: int, right_stride: int, stride: int
) -> _Plan:
    with torch.cuda.device(index):
        return _Plan(index, dtype, rows, width, n, right_stride, stride)
