"""Bytes saved for backward, to the byte; peaks; the whole-model formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.measure import memory
from harness.measure.memory import PeakBytes, SavedBytes
from moc.config import FfnShape
from moc.layers.dense import DenseFFN

T, D, D_FFN = 48, 16, 40


def dense_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_eager_saves_exactly_its_input_and_four_wide_tensors(dtype: torch.dtype) -> None:
    """x + 4 * T * d_ffn elements, to the byte, with no weight among them."""
    layer = DenseFFN(FfnShape(D, D_FFN)).to(dtype)
    x = dense_input(dtype)
    saved = memory.saved_bytes(lambda: layer(x), layer.parameters(), [x])
    assert saved.activation_bytes == (T * D + 4 * T * D_FFN) * dtype.itemsize
    assert saved.input_bytes == T * D * dtype.itemsize
    assert saved.parameter_cast_bytes == 0


def test_views_of_one_storage_count_once_and_whole() -> None:
    """Two saved halves of one tensor cost that tensor, not two halves and not twice."""
    base = torch.randn(10, 8)
    left = torch.randn(10, 4, requires_grad=True)

    def forward() -> Tensor:
        return (left * base[:, :4]).sum() + (left * base[:, 4:]).sum()

    saved = memory.saved_bytes(forward, [left])
    assert saved.activation_bytes == 10 * 8 * 4


def test_a_tensor_saved_by_several_operations_counts_once() -> None:
    """A product that saves both factors and another that saves one of them again cost two tensors."""
    a, b = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    saved = memory.saved_bytes(lambda: (a * b).sum() + (b * b).sum(), [])
    assert saved.activation_bytes == 2 * 10 * 8 * 4


def test_transposed_and_sliced_parameters_are_not_activations() -> None:
    """A view of a parameter is no Parameter, but it is the parameter's storage."""
    w = nn.Parameter(torch.randn(D, 2 * D))
    x = dense_input()
    saved = memory.saved_bytes(lambda: (x @ w[:, :D].T) @ w[:, D:], [w], [x])
    assert saved.activation_bytes == 2 * T * D * 4  # x and the first product


def test_casts_of_parameters_under_autocast_are_told_apart_by_value() -> None:
    """bf16 copies of fp32 weights are not counted as activations, an activation of a weight's shape is."""
    layer = DenseFFN(FfnShape(D, D_FFN))
    x = torch.randn(D_FFN, D, requires_grad=True)  # as many tokens as channels: x is shaped like a weight
    with torch.autocast("cpu", torch.bfloat16):
        saved = memory.saved_bytes(lambda: layer(x), layer.parameters())
    assert saved.activation_bytes == (D_FFN * D + 4 * D_FFN * D_FFN) * 2
    assert saved.parameter_cast_bytes == 3 * D_FFN * D * 2


@pytest.mark.parametrize("save_halves", [False, True])
def test_joined_casts_of_parameters_are_casts(save_halves: bool) -> None:
    """A bf16 copy of two weights in one tensor is no activation, saved whole or as its two halves."""
    gate, up = nn.Parameter(torch.randn(D_FFN, D)), nn.Parameter(torch.randn(D_FFN, D))
    x = dense_input(torch.bfloat16)

    def forward() -> Tensor:
        joined = torch.cat([gate, up]).to(torch.bfloat16)
        return x @ joined[:D_FFN].T + x @ joined[D_FFN:].T if save_halves else x @ joined.T

    saved = memory.saved_bytes(forward, [gate, up], [x])
    assert saved == SavedBytes(T * D * 2, 2 * D_FFN * D * 2, T * D * 2)


def test_a_weight_in_a_longer_buffer_is_no_reason_to_leave_the_buffer_out() -> None:
    """Where an activation shares the storage of a cast weight, all of it counts."""
    weight = nn.Parameter(torch.randn(D, D))
    x = dense_input()

    def forward() -> Tensor:
        buffer = torch.cat([weight.detach(), x.detach()]).to(torch.bfloat16)
        return (x.to(torch.bfloat16) @ buffer[:D].requires_grad_()).float() * buffer[D:]

    assert memory.saved_bytes(forward, [weight], []).parameter_cast_bytes == 0


def test_checkpointing_saves_the_input_alone() -> None:
    """What a checkpoint recomputes is not saved; its input is."""
    layer = DenseFFN(FfnShape(D, D_FFN))
    x = dense_input()
    saved = memory.saved_bytes(lambda: checkpoint(layer, x, use_reentrant=False), layer.parameters(), [x])
    assert saved.activation_bytes == saved.input_bytes == T * D * 4


def test_a_custom_autograd_function_counts_what_it_saves() -> None:
    """Tensors of any dtype that a custom Function saves are seen."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x.half(), torch.ones(7, dtype=torch.int32))
            return x * x

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return 2 * ctx.saved_tensors[0].float() * dy

    x = dense_input()
    saved = memory.saved_bytes(lambda: Square.apply(x), [], [x])
    assert saved.activation_bytes == T * D * 2 + 7 * 4
    assert saved.input_bytes == 0


def test_a_compiled_layer_is_counted_too() -> None:
    """Hooks see what a torch.compile'd function saves (here by its tracing backend, without a compiler)."""
    layer = DenseFFN(FfnShape(D, D_FFN))
    x = dense_input()
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    compiled(x)
    saved = memory.saved_bytes(lambda: compiled(x), layer.parameters(), [x])
    assert saved.input_bytes == T * D * 4
    wide = (saved.activation_bytes - saved.input_bytes) / (T * D_FFN * 4)
    assert wide in (2.0, 3.0, 4.0)  # its partitioner decides how many, but whole tensors and no weight


def test_nothing_is_saved_without_gradients() -> None:
    """Under no_grad there is no backward to save for."""
    layer = DenseFFN(FfnShape(D, D_FFN))
    with torch.no_grad():
        saved = memory.saved_bytes(lambda: layer(torch.randn(T, D)), layer.parameters())
    assert saved == SavedBytes(0, 0, 0)


def test_transient_and_hidden_bytes_are_what_nothing_else_explains() -> None:
    """Scratch is the peak less all that must be; hidden is what forward left beyond output and saved."""
    saved = SavedBytes(activation_bytes=500, parameter_cast_bytes=30, input_bytes=100)
    peak = PeakBytes(start_bytes=1000, peak_bytes=2000, over_start_bytes=1000, left_bytes=0)
    assert memory.transient_peak_bytes(peak, made_bytes=200, saved=saved) == 1000 - 200 - 430
    assert memory.transient_peak_bytes(peak, made_bytes=900, saved=saved) == 0
    forward = PeakBytes(start_bytes=1000, peak_bytes=2000, over_start_bytes=1000, left_bytes=600)
    assert memory.hidden_bytes(forward, output_bytes=100, saved=saved) == 600 - 100 - 430


def test_resident_peak_sees_memory_that_was_touched_and_given_back() -> None:
    """A temporary of 64 MiB shows in the peak of its own call and not in that of the next."""
    memory.peak_rss_over_start_bytes(lambda: torch.ones(1))

    def temporary() -> float:
        return float(torch.ones(16 * 1024**2).sum())

    peak = memory.peak_rss_over_start_bytes(temporary)
    assert 60 * 1024**2 < peak < 90 * 1024**2
    assert memory.peak_rss_over_start_bytes(lambda: torch.ones(1)) < 8 * 1024**2


def test_resident_peak_falls_back_to_the_lifetime_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the counter cannot be reset, only growth beyond the highest point so far can be seen."""
    monkeypatch.setattr(memory, "_reset_peak_rss", lambda: False)
    size = memory._lifetime_peak_rss() // 4 + 16 * 1024**2  # elements: more bytes than the process ever held
    grown = memory.peak_rss_over_start_bytes(lambda: torch.ones(size))
    assert grown > 32 * 1024**2
    assert memory.peak_rss_over_start_bytes(lambda: torch.ones(1024)) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    """PyTorch says it by a type on CUDA and by words on the CPU."""
    assert memory.is_out_of_memory(error) is expected


def test_the_cpu_allocator_really_says_so() -> None:
    """The words matched above are the ones this PyTorch uses."""
    with pytest.raises(RuntimeError) as caught:
        F.relu(torch.empty(2**58, dtype=torch.float64))
    assert memory.is_out_of_memory(caught.value)
