"""Memory in a pass of its own: what is saved for backward, the peak of a step, and a formula to check both.

Nothing is timed here and nothing measured here runs during timing, so neither disturbs the other.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps between forward and backward, counted by storage."""

    activation_bytes: int  # all that is neither a parameter nor a parameter's cast; the input included
    parameter_cast_bytes: int  # copies of parameters in another dtype or layout, such as autocast makes
    input_bytes: int  # the part of activation_bytes that is the storage of the given inputs


@dataclass(frozen=True)
class PeakBytes:
    """The allocator's peak during one call."""

    start_bytes: int  # what stood before
    peak_bytes: int  # absolute
    over_start_bytes: int
    left_bytes: int  # what the result still holds, over the start


def saved_bytes(
    forward: Callable[[], object], parameters: Iterable[Tensor], inputs: Iterable[Tensor] = ()
) -> SavedBytes:
    """Run `forward` once and count the storages that autograd saves for backward.

    Each storage counts once and whole, however many saved tensors are views of it. Left out are storages of
    `parameters`, found by pointer, since `w.T` is not a Parameter but shares its storage; and casts of
    parameters, which grow with the model and not with the tokens. A storage holds casts exactly if saved
    tensors that equal parameters cast to their dtype (or transposed, or several joined row after row) cover
    all of it: by value, so an activation that happens to have a weight's shape is not mistaken for one.

    Works through custom ops, autocast, torch.compile and non-reentrant checkpointing, which all save by
    autograd. What a method hides from autograd (an attribute of its context) is not seen here; on CUDA
    compare with `PeakBytes.left_bytes` of the forward.
    """
    weights = list(parameters)
    saved: list[Tensor] = []  # holds every storage alive, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    weight_pointers = {weight.untyped_storage().data_ptr() for weight in weights}
    input_pointers = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes: dict[int, int] = {}
    cast_extents: dict[int, set[tuple[int, int]]] = {}  # [start, end) in bytes of what equals a cast
    for tensor in saved:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer in weight_pointers or storage.nbytes() == 0:
            continue
        sizes[pointer] = storage.nbytes()
        extents = cast_extents.setdefault(pointer, set())
        extent = _extent(tensor)
        if extent is not None and extent not in extents and _holds_parameters(tensor, weights):
            extents.add(extent)
    casts = {pointer for pointer, extents in cast_extents.items() if _covers(extents, sizes[pointer])}
    del result
    return SavedBytes(
        activation_bytes=sum(size for pointer, size in sizes.items() if pointer not in casts),
        parameter_cast_bytes=sum(sizes[pointer] for pointer in casts),
        input_bytes=sum(size for pointer, size in sizes.items() if pointer in input_pointers),
    )


def _extent(tensor: Tensor) -> tuple[int, int] | None:
    """The bytes [start, end) of its storage that a matrix without gaps fills; None of any other tensor."""
    if tensor.dim() != 2 or not (tensor.is_contiguous() or tensor.T.is_contiguous()):
        return None
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + tensor.numel() * tensor.element_size()


def _covers(extents: Iterable[tuple[int, int]], size: int) -> bool:
    end = 0
    for start, stop in sorted(extents):
        if start > end:
            return False
        end = max(end, stop)
    return end == size


def _holds_parameters(tensor: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether the matrix, or its transpose, is parameters cast to its dtype, one below the other."""
    matrices = [weight.detach() for weight in weights if weight.dim() == 2]
    candidates = [*matrices, *(matrix.T for matrix in matrices)]
    return any(_stacked(rows, candidates) for rows in (tensor, tensor.T))


def _stacked(tensor: Tensor, matrices: Iterable[Tensor]) -> bool:
    done = 0
    while done < len(tensor):
        for matrix in matrices:
            part = tensor[done : done + len(matrix)]
            if part.shape == matrix.shape and torch.equal(matrix.to(tensor.dtype), part):
                done += len(matrix)
                break
        else:
            return False
    return True


def peak_bytes(call: Callable[[], object]) -> PeakBytes:
    """The CUDA allocator's peak while `call` runs once.

    Everything that can be freed is freed first, and the device is idle, *before* the peak is reset: otherwise
    leftovers of an earlier method would be charged to this one.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return PeakBytes(start, peak, peak - start, left - start)


def transient_peak_bytes(peak: PeakBytes, made_bytes: int, saved: SavedBytes) -> int:
    """Peak of a step over everything that has to exist at some time, in bytes; never below zero.

    Weights, inputs and the gradient of the output stood before the step, so they are in `peak.start_bytes`.
    Subtracted from the rest are `made_bytes` (the output and all gradients) and what is saved, less the
    input, which stood before. What remains is scratch: full-width temporaries, copies, buffers held twice.
    Zero where saved tensors are freed early enough to make room for the gradients.
    """
    return max(0, peak.over_start_bytes - made_bytes - kept_bytes(saved))


def hidden_bytes(forward: PeakBytes, output_bytes: int, saved: SavedBytes) -> int:
    """What a forward pass left allocated that neither its output nor autograd's saved tensors explain.

    Not zero for a method that keeps tensors where `saved_bytes` cannot see them. The allocator rounds each
    block up to 512 bytes, so a few KiB are nothing.
    """
    return max(0, forward.left_bytes - output_bytes - kept_bytes(saved))


def kept_bytes(saved: SavedBytes) -> int:
    """What stays allocated between forward and backward beside the input, which the caller owns."""
    return saved.activation_bytes + saved.parameter_cast_bytes - saved.input_bytes


def peak_rss_over_start_bytes(call: Callable[[], object]) -> int:
    """CPU: by how much the process's resident set peaked over its size before `call`, in bytes.

    Linux only counts it when told to start anew (writing 5 to clear_refs); elsewhere the peak of the whole
    process life is the only figure, and the result is a lower bound, zero if an earlier call used more.
    Caveats that make it a coarse number: memory that the C library kept from earlier calls is reused without
    a trace (`malloc_trim` gives most of it back first), pages count only once touched, and threads' stacks
    count.
    """
    gc.collect()
    _trim_heap()
    if _reset_peak_rss():
        start = resident_bytes()
        result = call()
        peak = _high_water_bytes()
    else:
        start = _lifetime_peak_rss()
        result = call()
        peak = _lifetime_peak_rss()
    del result
    return max(0, peak - start)


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: a type of its own on CUDA, a RuntimeError on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int:
    """Peak resident set since the last reset, which psutil does not tell."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def _lifetime_peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim_heap() -> None:
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
