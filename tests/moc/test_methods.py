"""The registry of methods and methods from outside."""

import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moc
from moc import METHODS, DenseFFN, FfnShape, Method, MoCFFN, get_method, parse_selection
from moc.reference import dense_forward_backward, moc_forward_backward

SHAPE, TOPK = FfnShape(8, 40), parse_selection("topk:0.25")


def test_registry_of_the_first_release() -> None:
    """The six methods are there under their own names, and the dense ones are marked as such."""
    assert set(METHODS) >= {
        "dense",
        "dense_compiled",
        "dense_recompute",
        "dense_gu",
        "moc_reference",
        "act_prune",
    }
    for name, method in METHODS.items():
        assert get_method(name) is method
        assert method.name == name
        # dense_fp8 rounds its gradients and dense_int8 its weights, so they are no exact baselines
        assert method.is_dense == (name.startswith("dense") and name not in ("dense_fp8", "dense_int8"))
        assert method.takes_selection == (not name.startswith("dense"))


def test_state_dicts_are_interchangeable() -> None:
    """Every method's layer has w_gate, w_up, w_down in this order, loads any other's, and starts like it."""
    reference = DenseFFN(SHAPE).state_dict()
    for method in METHODS.values():
        layer = method.make(SHAPE, TOPK)
        assert [name for name, _ in layer.named_parameters()] == ["w_gate", "w_up", "w_down"]
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in reference.items())
        layer.load_state_dict(reference, strict=True)


def test_only_cuda_compiles() -> None:
    """Nothing is compiled on a CPU; on CUDA all but eager dense, Liger's kernel and int8 weights is."""
    assert not any(method.compiles_on("cpu") for method in METHODS.values())
    assert [name for name, method in METHODS.items() if not method.compiles_on("cuda")] == [
        "dense",
        "dense_liger",
        "dense_int8",
        "moc_int8",
    ]


@pytest.mark.parametrize(
    ("name", "selection", "dtype", "device", "reason"),
    [
        ("dense", None, "bf16", "cpu", None),
        ("dense", TOPK, "fp64", "cuda", None),
        ("moc_reference", TOPK, "fp32", "cpu", None),
        ("moc_reference", None, "fp32", "cpu", "needs a selection, such as topk:0.1875"),
        ("act_prune", parse_selection("topk:41"), "fp32", "cpu", "K=41 exceeds d_ffn=40"),
        ("dense_compiled", None, "fp32", "cpu", "method dense_compiled does not run on cpu; valid: cuda"),
        ("dense", None, "fp8", "cpu", "does not support dtype fp8; valid: bf16, fp16, fp32, fp64"),
    ],
)
def test_unsupported_reason(
    name: str, selection: moc.Selection | None, dtype: str, device: str, reason: str | None
) -> None:
    """A point a method cannot run is answered with one line saying why, one it can run with None."""
    actual = METHODS[name].unsupported_reason(SHAPE, selection, dtype, device)
    assert (
        (actual is None)
        if reason is None
        else (actual is not None and reason in actual and "\n" not in actual)
    )


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module of somebody else, `rival.ffn`."""
    module = types.ModuleType("rival.ffn")
    monkeypatch.setitem(sys.modules, "rival", types.ModuleType("rival"))
    monkeypatch.setitem(sys.modules, "rival.ffn", module)

    def dense(shape: FfnShape, selection: moc.Selection | None) -> DenseFFN:
        return DenseFFN(shape)

    def sparse(shape: FfnShape, selection: moc.Selection | None) -> MoCFFN:
        assert selection is not None
        return MoCFFN(shape, selection)

    for factory in (dense, sparse):
        factory.__module__ = "rival.ffn"
        setattr(module, factory.__name__, factory)
    dense.is_dense = dense.compile = True  # type: ignore[attr-defined]
    sparse.takes_selection = True  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    module.whole = METHODS["dense_gu"]  # type: ignore[attr-defined]
    return module


def test_factory_from_outside(outside: types.ModuleType) -> None:
    """`package.module:factory` becomes a method whose attributes come from the factory's."""
    dense, sparse = get_method("rival.ffn:dense"), get_method("rival.ffn:sparse")
    assert isinstance(dense, Method)
    assert (dense.name, dense.is_dense, dense.takes_selection, dense.compile) == (
        "rival.ffn:dense",
        True,
        False,
        True,
    )
    assert (sparse.is_dense, sparse.takes_selection, sparse.compile) == (False, True, False)
    assert isinstance(sparse.make(SHAPE, TOPK), MoCFFN)
    x, dy = torch.randn(3, 8), torch.randn(3, 8)
    weights = [torch.randn(40, 8) for _ in range(3)]
    assert torch.equal(dense.reference(x, *weights, dy, None).dx, dense_forward_backward(x, *weights, dy).dx)
    assert torch.equal(
        sparse.reference(x, *weights, dy, TOPK).dx, moc_forward_backward(x, *weights, dy, TOPK).dx
    )
    assert get_method("rival.ffn:whole") is METHODS["dense_gu"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "dens",
            r"unknown method 'dens'; did you mean dense\? valid: act_prune, dense, .*package\.module:factory",
        ),
        ("moc_referense", r"did you mean moc_reference\?"),
        ("rival.ffn:", r"'rival\.ffn:': expected package\.module:factory"),
        ("no_such_package.x:f", r"cannot import no_such_package\.x: No module named 'no_such_package'"),
        (
            "rival.ffn:sparze",
            r"rival\.ffn has no 'sparze'; did you mean sparse\? valid: dense, sparse, whole",
        ),
        ("rival.ffn:number", r"number is a int, expected a Method or a callable"),
    ],
)
def test_wrong_names_are_answered_in_one_line(outside: types.ModuleType, name: str, message: str) -> None:
    """A name that leads nowhere raises one line with what went wrong and the nearest valid name."""
    with pytest.raises(ValueError, match=message) as caught:
        get_method(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dense", "dense_gu", "moc_reference", "act_prune"])
def test_the_flop_counter_sees_nine_matrix_products(name: str) -> None:
    """Forward has three products of 2 T d d_ffn operations, backward six, opaque op or not."""
    method, shape = get_method(name), FfnShape(16, 64)
    ffn = method.make(shape, parse_selection("topk:0.25") if method.takes_selection else None)
    x = torch.randn(2, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ffn(x).sum().backward()
    assert counter.get_total_flops() == 9 * 2 * 10 * 16 * 64


def test_a_method_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optional extra, Liger is unsupported and names what is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = get_method("dense_liger").unsupported_reason(SHAPE, None, "bf16", "cuda")
    assert reason == "method dense_liger needs the package liger_kernel, which is not installed"
