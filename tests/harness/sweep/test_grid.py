"""Points and grids: what a sweep expands to and what names a point."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from harness.sweep.grid import expand
from harness.sweep.load import parse_sweep
from harness.sweep.model import Part
from harness.sweep.point import Point, group_points


def part(text: str) -> Part:
    """The only part of a sweep."""
    return parse_sweep(f"version: 1\nname: t\n{text}", "t.yaml").parts[0]


TRAIN = """\
workload: ffn_train
axes:
  preset: [1m, 4m]
  seq_len: [64, 128]
  method: [dense, dense_gu, moc_reference]
  selection: ["topk:0.25", "nm:2:8"]
fixed: {tokens: 256, dtype: fp32}
"""


def test_dense_methods_are_measured_once_per_shape() -> None:
    """Dense methods ignore the selection axis: 2 sizes x 2 lengths x (2 dense + 1 MoC x 2 rules)."""
    points = expand(part(TRAIN))
    assert len(points) == 2 * 2 * (2 + 2)
    assert {p.selection for p in points if p.method != "moc_reference"} == {None}
    assert len({p.key for p in points}) == len(points)


def test_rivals_share_a_group_and_shapes_do_not() -> None:
    """A group holds every method of one shape and length."""
    groups = group_points(expand(part(TRAIN)))
    assert [len(group) for group in groups] == [4] * 4
    assert all(len({(p.d_model, p.seq_len) for p in group}) == 1 for group in groups)


def test_tokens_set_the_batch_and_the_preset_sets_the_shape() -> None:
    """tokens / seq_len is the batch; widths come from the preset."""
    point = expand(part(TRAIN))[0]
    assert (point.batch, point.seq_len, point.tokens) == (4, 64, 256)
    assert (point.d_model, point.d_ffn) == (128, 384)


def test_excluded_combinations_are_left_out() -> None:
    """An exclude rule removes just the points that match all of it."""
    text = TRAIN + "exclude: [{preset: 4m, seq_len: 128}]\n"
    points = expand(part(text))
    assert len(points) == 3 * 4
    assert not [p for p in points if p.preset == "4m" and p.seq_len == 128]


def test_seeds_multiply_points_and_k_frac_means_topk() -> None:
    """Each seed is its own point; k_frac is spelled as a topk rule."""
    text = (
        "workload: ffn_train\naxes: {method: [moc_reference], k_frac: [0.125]}\n"
        "fixed: {d_model: 64, d_ffn: 160, batch: 2, seq_len: 8}\nseeds: [3, 4]\n"
    )
    points = expand(part(text))
    assert [(p.seed, p.selection, p.d_ffn, p.preset) for p in points] == [
        (3, "topk:0.125", 160, None),
        (4, "topk:0.125", 160, None),
    ]


def test_two_spellings_of_a_selection_are_one_point() -> None:
    """The canonical rule is what counts, so `topk:0.250` is `topk:0.25`."""
    spelled = TRAIN.replace('"topk:0.25", "nm:2:8"', '"topk:0.25", "topk:0.250"')
    assert len(expand(part(spelled))) == 2 * 2 * (2 + 1)


def test_every_field_is_part_of_the_key() -> None:
    """Changing any one field of a point changes its key."""
    shape = {"preset": "1m", "d_model": 128, "d_ffn": 384, "n_layers": 4, "n_heads": 4, "vocab_size": 300}
    budget = {"batch": 2, "seq_len": 64, "train_tokens": 10, "eval_tokens": 5, "lr": 1e-3, "data_id": "abc"}
    base = Point("pretrain", "moc_reference", "topk:0.25", dtype="fp32", seed=0, **shape, **budget)
    keys = {base.key}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        changed = value + 1 if isinstance(value, int | float) else f"{value}x"
        keys.add(dataclasses.replace(base, **{field.name: changed}).key)
    assert len(keys) == 1 + len(dataclasses.fields(base))


@given(st.integers(1, 64), st.integers(1, 4096), st.sampled_from([None, "1m"]), st.floats(1e-5, 1e-1))
def test_a_point_survives_json(batch: int, seq_len: int, preset: str | None, lr: float) -> None:
    """to_dict and from_dict are inverse, and the key stays."""
    point = Point("pretrain", "dense", None, preset, 128, 384, 4, batch, seq_len, "fp32", 0, lr=lr)
    assert Point.from_dict(point.to_dict()) == point
    assert Point.from_dict(point.to_dict()).key == point.key
