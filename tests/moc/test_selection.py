"""Selection rules as text and as numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc import Selection, parse_selection

budgets = st.one_of(
    st.floats(0, 1, exclude_min=True).map(lambda f: {"fraction": f}),
    st.integers(1, 10**6).map(lambda c: {"count": c}),
)
selections = st.one_of(
    st.builds(lambda rule, b: Selection(rule, **b), st.sampled_from(["topk", "topk_abs"]), budgets),
    st.integers(2, 64).flatmap(
        lambda m: st.builds(Selection, st.just("nm"), n=st.integers(1, m - 1), m=st.just(m))
    ),
    st.builds(lambda t, b: Selection("threshold", threshold=t, **b), st.floats(-1e30, 1e30), budgets),
)


@given(selections)
def test_text_and_value_are_the_same_thing(selection: Selection) -> None:
    """Parsing what a selection prints gives it back, and prints the same again."""
    again = parse_selection(str(selection))
    assert again == selection or selection.threshold == 0
    assert parse_selection(str(again)) == again
    assert str(parse_selection(str(again))) == str(again)


@pytest.mark.parametrize(
    ("text", "d_ffn", "k"),
    [
        ("topk:0.1875", 2048, 384),
        ("topk:384", 2048, 384),
        ("topk:1.0", 200, 200),
        ("topk:1", 200, 1),
        ("topk:0.1875", 5461, 1024),
        ("topk_abs:0.001", 200, 1),
        ("nm:2:8", 200, 50),
        ("nm:2:8", 203, 52),
        ("nm:2:8", 201, 51),
        ("nm:12:64", 2048, 384),
        ("nm:12:64", 5461, 85 * 12 + 12),
        ("nm:2:8", 1, 1),
        ("threshold:0.5:0.25", 200, 50),
        ("threshold:-1.5:12", 200, 12),
    ],
)
def test_k_for_a_shape(text: str, d_ffn: int, k: int) -> None:
    """K is the count, the rounded fraction (at least one), the banks' sum with its tail, or the cap."""
    selection = parse_selection(text)
    assert selection.k(d_ffn) == k
    assert selection.k_frac(d_ffn) == k / d_ffn


def test_count_and_fraction_of_one_differ() -> None:
    """`topk:1` is one channel and `topk:1.0` all of them, and they are not equal."""
    assert parse_selection("topk:1") != parse_selection("topk:1.0")


def test_zero_thresholds_are_written_alike() -> None:
    """Thresholds -0.0 and 0.0 mean the same and have one canonical text."""
    assert (
        str(parse_selection("threshold:-0.0:8")) == str(parse_selection("threshold:0:8")) == "threshold:0.0:8"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topkk:3", "unknown rule 'topkk'; did you mean topk\\? valid: nm, threshold, topk, topk_abs"),
        ("top_k_abs:0.5", "did you mean topk_abs"),
        ("", "unknown rule ''; valid: nm"),
        ("topk", "expected topk:FRACTION or topk:COUNT"),
        ("topk:0", "expected topk:FRACTION"),
        ("topk:0.0", "expected topk:FRACTION"),
        ("topk:1.5", "expected topk:FRACTION"),
        ("topk:nan", "expected topk:FRACTION"),
        ("topk:-3", "expected topk:FRACTION"),
        ("topk:3:4", "expected topk:FRACTION"),
        ("nm:8:8", "expected nm:N:M with 1 <= N < M <= 64"),
        ("nm:0:8", "expected nm:N:M"),
        ("nm:2:65", "expected nm:N:M"),
        ("nm:2.0:8", "expected nm:N:M"),
        ("nm: 2:8", "expected nm:N:M"),
        ("threshold:0.5", "the cap bounds what a row may store"),
        ("threshold:inf:8", "expected threshold:T:CAP"),
        ("threshold:1e39:8", "expected threshold:T:CAP"),
        ("threshold:0.5:1.5", "expected threshold:T:CAP"),
    ],
)
def test_bad_text_is_answered_in_one_line(text: str, message: str) -> None:
    """A wrong selection raises one line that names the text and what is accepted."""
    with pytest.raises(ValueError, match=message) as caught:
        parse_selection(text)
    assert str(caught.value).startswith(f"selection {text!r}: ")
    assert "\n" not in str(caught.value)


def test_numbers_of_another_rule_are_refused() -> None:
    """A rule built with numbers that belong to another one is refused, naming them."""
    with pytest.raises(ValueError, match=r"selection topk \(count=3, n=2\): expected topk:FRACTION"):
        Selection("topk", count=3, n=2)
    with pytest.raises(ValueError, match="unknown selection rule 'Topk'; did you mean topk"):
        Selection("Topk", count=3)


def test_k_beyond_the_channels_is_refused() -> None:
    """A count larger than d_ffn is refused, naming both."""
    with pytest.raises(ValueError, match="selection topk:201: K=201 exceeds d_ffn=200"):
        parse_selection("topk:201").k(200)
    with pytest.raises(ValueError, match="d_ffn=0 must be positive"):
        parse_selection("nm:2:8").k(0)


def test_two_of_four() -> None:
    """At most two of any four neighbours: n:m with n at most 2 and banks of whole fours, and nothing else."""
    assert all(parse_selection(rule).two_of_four for rule in ("nm:2:8", "nm:1:4", "nm:2:4", "nm:2:64"))
    others = ("nm:3:8", "nm:2:6", "nm:2:7", "nm:12:64", "topk:1", "topk_abs:0.1", "threshold:0.5:2")
    assert not any(parse_selection(rule).two_of_four for rule in others)
