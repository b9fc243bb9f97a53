"""Sweep files: good ones load, bad ones say in one line what is wrong."""

from pathlib import Path

import pytest

from harness.errors import SpecError
from harness.sweep.load import MAX_FILE_BYTES, load_sweep, parse_sweep
from harness.sweep.model import Range, sweep_text

SWEEPS = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))
GOOD = """\
version: 1
name: demo
workload: ffn_train
axes:
  preset: [60m]
  method: [dense, moc_reference]
  selection: ["topk:0.25"]
fixed: {tokens: 256, seq_len: 128}
"""

BAD = [
    ("preset: [60m]", "preset: [60mm]", "s.yaml: axes.preset has '60mm'; did you mean 60m?"),
    (
        "seq_len: 128",
        "seqlen: 128",
        "s.yaml: fixed.seqlen is not an axis of ffn_train; did you mean seq_len?",
    ),
    ("version: 1", "version: 2", "s.yaml: version is 2; valid: 1"),
    ("version: 1\n", "", "s.yaml: version is missing; a sweep needs it"),
    ("name: demo", "name: ../up", "s.yaml: name is '../up'; it names a folder under results/"),
    ("topk:0.25", "topq:0.25", "s.yaml: axes.selection has 'topq:0.25': selection 'topq:0.25'"),
    ("[dense,", "[dnse,", "s.yaml: axes.method has 'dnse': unknown method 'dnse'; did you mean dense?"),
    ("[dense,", "['no_such.mod:f',", "s.yaml: axes.method has 'no_such.mod:f'"),
    ("tokens: 256", "tokens: -1", "s.yaml: fixed.tokens has -1; it should be a whole number of at least 1"),
    ("tokens: 256", "tokens: [256]", "s.yaml: fixed.tokens is [256]; it should be a name or a number"),
    ("fixed:", "meassure: {}\nfixed:", "s.yaml: meassure is not a field; did you mean measure?"),
    (
        "fixed:",
        "measure: {timing: {rel_cl: 1}}\nfixed:",
        "s.yaml: measure.timing.rel_cl is not a field; did you mean rel_ci?",
    ),
    ("ffn_train", "ffn_trian", "s.yaml: workload is 'ffn_trian'; did you mean ffn_train?"),
    ("fixed:", "seeds: []\nfixed:", "s.yaml: seeds is []; it should have at least 1 item"),
    ("preset: [60m]", "preset: 60m", "s.yaml: axes.preset is '60m'; it should be a list, such as [60m]"),
    ("fixed:", "name: again\nfixed:", "s.yaml: line 8 not YAML: the key 'name' is repeated"),
    ("fixed:", "axis: [1\nfixed:", "s.yaml: line 9 not YAML"),
    ("[60m]", "&p [60m]\n  dtype: *p", "s.yaml: line 6 not YAML: aliases (*name) are not allowed in a sweep"),
    ("fixed:", "mode: optimize\nfixed:", "s.yaml: optimize is missing; mode: optimize needs objectives"),
    ("tokens: 256, ", "", "s.yaml: axes needs seq_len and one of batch or tokens; it has ['seq_len']"),
    (
        "fixed:",
        "exclude: [{preset: 60m, seq: 3}]\nfixed:",
        "s.yaml: exclude[0].seq is not an axis of this part",
    ),
    (
        '  selection: ["topk:0.25"]\n',
        "",
        "s.yaml: axes.selection is missing; the method moc_reference needs one",
    ),
    ("tokens: 256", "tokens: 256, dtype: bf17", "s.yaml: fixed.dtype has 'bf17'; did you mean bf16?"),
    ("tokens: 256", "tokens: 256, preset: 1b", "s.yaml: fixed.preset is also an axis; keep one of the two"),
    ("preset: [60m]", "preset: {low: 1, high: 2}", "s.yaml: axes.preset is a range; a grid needs a list"),
]

OPTIMIZE = """\
version: 1
name: tuned
workload: pretrain
mode: optimize
axes:
  k_frac: {low: 0.05, high: 0.5}
  lr: {low: 1.0e-4, high: 1e-2, log: true}
  method: [moc_reference]
fixed: {preset: 1m, tokens: 256, seq_len: 128, train_tokens: 1024}
optimize:
  sampler: nsga2
  objectives: [{metric: tokens_per_s, direction: maximize}, {metric: perplexity, direction: minimize}]
"""


def test_a_good_sweep_loads_and_survives_being_written_out() -> None:
    """What was loaded, written as YAML and loaded again is the same sweep."""
    sweep = parse_sweep(GOOD, "s.yaml")
    assert sweep.parts[0].axes["method"] == ["dense", "moc_reference"]
    assert parse_sweep(sweep_text(sweep), "again.yaml") == sweep


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[f"{i:02d}" for i in range(len(BAD))])
def test_a_mistake_is_one_line_that_names_file_field_and_value(old: str, new: str, message: str) -> None:
    """Each kind of bad YAML gives exactly one line that begins with the file and says what is wrong."""
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse_sweep(GOOD.replace(old, new, 1), "s.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_two_mistakes_are_two_lines() -> None:
    """A file with two wrong fields names both at once."""
    text = GOOD.replace("version: 1", "version: 3") + "sedes: [0]\n"
    with pytest.raises(SpecError) as caught:
        parse_sweep(text, "s.yaml")
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        "s.yaml: version is 3",
        "s.yaml: sedes is not a field",
    ]


def test_parts_carry_their_index_in_messages() -> None:
    """In a file with several parts the message names the part."""
    text = (
        "version: 1\nname: two\nparts:\n"
        "  - {workload: ffn_train, axes: {preset: [1m], method: [dense]}, fixed: {batch: 1, seq_len: 8}}\n"
        "  - {workload: pretrain, axes: {preset: [9m], method: [dense]}}\n"
    )
    with pytest.raises(SpecError, match=r"^s.yaml: parts\[1\]\.axes\.preset has '9m'; valid: 1m"):
        parse_sweep(text, "s.yaml")


def test_a_missing_or_huge_file_is_one_line(tmp_path: Path) -> None:
    """A file that is not there, or is no sweep by its size, is named with the reason."""
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read: No such file"):
        load_sweep(tmp_path / "none.yaml")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(SpecError, match=r"huge\.yaml: \d+ bytes; a sweep file is at most"):
        load_sweep(huge)


def test_an_optimisation_takes_ranges_and_numbers_with_bare_exponents() -> None:
    """`1e-2` is a number, and a range of an optimisation is read as one."""
    part = parse_sweep(OPTIMIZE, "o.yaml").parts[0]
    assert part.axes["lr"] == Range(low=1e-4, high=1e-2, log=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "metric: perplexity",
            "metric: perplexitty",
            "optimize.objectives[1].metric is 'perplexitty'; did you mean",
        ),
        (
            "sampler: nsga2",
            "pruner: median",
            "optimize.pruner is 'median' with 2 objectives; only a study with one",
        ),
        ("low: 0.05", "low: 0.7", "axes.k_frac.low is 0.7; it must be below high, 0.5"),
        (
            "k_frac: {low: 0.05, high: 0.5}",
            "dtype: {low: 1, high: 2}",
            "axes.dtype is a range, but dtype takes names",
        ),
        ("sampler: nsga2", "constraints: {peak: 1.0}", "optimize.constraints.peak is not a metric"),
    ],
)
def test_a_bad_optimisation_is_refused(old: str, new: str, message: str) -> None:
    """Objectives, pruning, ranges and constraints are checked when the file is read."""
    with pytest.raises(SpecError) as caught:
        parse_sweep(OPTIMIZE.replace(old, new, 1), "o.yaml")
    assert str(caught.value).startswith("o.yaml: " + message)


def test_there_are_committed_sweeps() -> None:
    """The folder of sweeps is found from wherever the tests are started."""
    assert SWEEPS


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_committed_sweep_is_valid(path: Path) -> None:
    """The sweeps in the repository load, and each is named like its file."""
    assert load_sweep(path).name == path.stem
