"""Part `methods` of the budget: what every method of the registry saves, computes and must move.

Saved bytes are counted by storage through autograd's hooks, products by PyTorch's counter; Triton kernels run
in its interpreter. Methods that are compiled on CUDA are measured uncompiled. A method that needs another
package is taken at its own formula, so that the facts do not depend on what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness.measure import memory, roofline
from harness.measure.ffn import DTYPES, ffn_weights, natural_tensors
from harness.regression.budget.check import Fact, Facts
from moc.config import FfnShape, get_preset
from moc.methods import METHODS, Method
from moc.reference import dense_forward_backward
from moc.selection import Selection, parse_selection

PRESET = "1m"
DTYPE = "bf16"
TOKENS = (1, 2)  # that are run: the difference is what a token adds, the rest does not grow with them
STEP_TOKENS = 65536  # of the step whose minimal traffic is given
RULES = ("topk:0.1875", "nm:2:8")


def collect() -> Facts:
    """Facts of every method and, where it takes one, selection rule."""
    return {f"methods {PRESET} {DTYPE}": dict(_facts())}


def _facts() -> Iterator[tuple[str, Fact]]:
    shape = get_preset(PRESET).ffn
    for method in METHODS.values():
        for rule in RULES if method.takes_selection else (None,):
            name = f"{method.name} {rule}" if rule else method.name
            selection = parse_selection(rule) if rule else None
            for quantity, value in _of_method(method, selection, shape).items():
                yield f"{name}: {quantity}", value


def _of_method(method: Method, selection: Selection | None, shape: FfnShape) -> dict[str, Fact]:
    size = DTYPES[DTYPE].itemsize
    kept = shape.d_ffn if selection is None else selection.k(shape.d_ffn)
    facts: dict[str, Fact] = {}
    if method.saved_bytes_per_token is not None:
        formula = method.saved_bytes_per_token(shape, kept, size)
        facts["saved bytes per token by its formula"] = _exact(formula)
    if method.requires is None:
        try:
            facts |= _measured(method, selection, shape)
        except Exception as error:  # whatever a method raises is a fact about it, and a change of it is told
            first_line = str(error).partition("\n")[0]
            facts["cannot be measured here"] = f"{type(error).__name__}: {first_line}"
    saved = facts.get("saved bytes per token", facts.get("saved bytes per token by its formula"))
    if method.backward and isinstance(saved, int):
        traffic = roofline.train_min_bytes(shape, STEP_TOKENS, size, saved)
        assert traffic is not None  # it is what is saved that may be unknown
        facts[f"fewest bytes of a step of {STEP_TOKENS} tokens"] = _exact(traffic.step)
    if method.decode and method.backward:  # one that only decodes keeps its weights in a format of its own
        channels = shape.d_ffn if _is_dense_output(method, selection) else kept
        needed = roofline.decode_min_bytes(shape, 1, size, channels)
        facts["fewest bytes of decoding a token"] = _exact(needed)
    return facts


def _measured(method: Method, selection: Selection | None, shape: FfnShape) -> dict[str, Fact]:
    """Of a layer and, where the method can be trained, its passes on natural data."""
    dtype = DTYPES[DTYPE]
    few, more = (natural_tensors(shape, tokens, dtype, torch.device("cpu"), seed=0) for tokens in TOKENS)
    layer = method.make(shape, selection).to(dtype)
    for name, weight in ffn_weights(layer, shape).items():
        weight.data = getattr(few, name)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*layer.parameters(), *layer.buffers())
    }
    facts: dict[str, Fact] = {"bytes a layer holds": sum(storage.nbytes() for storage in held.values())}
    if not method.backward:
        return facts
    for tensors in (few, more):
        tensors.x.requires_grad_()
    saved_by_few = memory.saved_bytes(lambda: layer(few.x), layer.parameters(), [few.x])
    saved_by_more = memory.saved_bytes(lambda: layer(more.x), layer.parameters(), [more.x])
    fewer, bytes_of_more = saved_by_few.activation_bytes, saved_by_more.activation_bytes
    per_token = (bytes_of_more - fewer) / (TOKENS[1] - TOKENS[0])
    flops = roofline.count_flops(lambda: layer(few.x).backward(few.dy))
    return facts | {
        "saved bytes per token": _exact(per_token),
        "saved bytes whatever the tokens": _exact(fewer - per_token * TOKENS[0]),
        "saved casts of weights in bytes": saved_by_few.parameter_cast_bytes,
        "flops of a step per token": "unknown" if flops is None else _exact(flops / TOKENS[0]),
    }


def _is_dense_output(method: Method, selection: Selection | None) -> bool:
    """Whether the output needs every channel, as that of `act_prune` does although it takes a selection."""
    tensors = natural_tensors(FfnShape(16, 64), 1, torch.float64, torch.device("cpu"), seed=0)
    inputs = tensors.x, tensors.w_gate, tensors.w_up, tensors.w_down, tensors.dy
    return torch.equal(method.reference(*inputs, selection).y, dense_forward_backward(*inputs).y)


def _exact(value: float) -> Fact:
    """A whole number as such; a fraction, which a formula may give, as text."""
    return int(value) if value == int(value) else repr(value)
