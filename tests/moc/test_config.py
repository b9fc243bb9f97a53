"""Shapes and presets."""

import pytest

from moc import PRESETS, FfnShape, LlamaConfig, get_preset


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("1m", (128, 384, 4, 4)),
        ("4m", (256, 704, 4, 4)),
        ("60m", (512, 1408, 8, 8)),
        ("130m", (768, 2048, 12, 12)),
        ("350m", (1024, 2752, 24, 16)),
        ("1b", (2048, 5504, 24, 32)),
        ("7b", (4096, 11008, 32, 32)),
        ("paper-60m", (512, 1376, 8, 8)),
        ("paper-130m", (768, 2048, 12, 12)),
        ("paper-350m", (1024, 2736, 24, 16)),
        ("paper-1b", (2048, 5461, 24, 32)),
    ],
)
def test_presets_have_the_published_shapes(name: str, shape: tuple[int, int, int, int]) -> None:
    """Every preset has the d, d_ffn, layers and heads that the design names."""
    config = get_preset(name)
    assert (config.d_model, config.d_ffn, config.n_layers, config.n_heads) == shape
    assert config.name == name


def test_no_other_presets() -> None:
    """The registry holds the eleven presets and nothing else."""
    assert len(PRESETS) == 11


def test_plain_presets_stay_on_the_fast_path_of_cublas() -> None:
    """Presets other than the paper's have d_ffn a multiple of 64."""
    assert all(config.d_ffn % 64 == 0 for name, config in PRESETS.items() if not name.startswith("paper-"))


def test_derived_shapes() -> None:
    """ffn, head_dim and with_ follow from the configuration and leave the rest alone."""
    config = get_preset("60m").with_(vocab_size=1000, max_seq_len=64)
    assert config.ffn == FfnShape(512, 1408)
    assert config.head_dim == 64
    assert (config.vocab_size, config.max_seq_len, config.n_layers) == (1000, 64, 8)
    assert get_preset("60m").with_() == get_preset("60m")


def test_unknown_preset_names_the_nearest() -> None:
    """A misspelt preset is answered with the nearest name and all valid ones."""
    with pytest.raises(ValueError, match=r"unknown preset '60'; did you mean 60m\? valid: .*paper-1b"):
        get_preset("60")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "n_heads=3 does not divide d_model=32"),
        ({"d_ffn": 0}, "d_ffn=0 must be a positive integer"),
        ({"d_model": 32.0}, "d_model=32.0 must be a positive integer"),
        ({"n_heads": 32}, "= 1 is odd; RoPE needs an even head width"),
    ],
    ids=["heads", "zero", "float", "odd-head"],
)
def test_impossible_models_are_refused(change: dict[str, float], message: str) -> None:
    """A decoder shape that cannot exist is refused, naming field and value."""
    fields = {"d_model": 32, "d_ffn": 64, "n_layers": 2, "n_heads": 2, **change}
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        LlamaConfig("tiny", **fields)  # type: ignore[arg-type]


def test_impossible_ffn_is_refused() -> None:
    """A feed-forward shape that cannot exist is refused, naming field and value."""
    with pytest.raises(ValueError, match="d_model=-1 must be a positive integer"):
        FfnShape(-1, 8)
