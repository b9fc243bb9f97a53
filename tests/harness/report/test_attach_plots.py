"""Which plots of a report are attached to which studies of its sweep."""

from pathlib import Path

import optuna
from optuna.artifacts import get_all_artifact_meta

from harness.dashboard import attach_plots
from harness.report.plots.style import Board, Subject, plot_subject
from harness.search.proposals import SearchStudy
from harness.search.storage import open_storage
from harness.search.study import PartStudy
from harness.sweep.load import parse_sweep

SWEEP = """\
version: 1
name: mixed
parts:
  - workload: ffn_decode
    axes: {preset: [1m], method: [dense]}
    fixed: {batch: 2, dtype: fp32}
  - workload: pretrain
    axes: {preset: [1m], method: [dense]}
    fixed: {batch: 2, seq_len: 64, train_tokens: 8192, eval_tokens: 1024, vocab_size: 512, dtype: fp32}
  - workload: ffn_train
    mode: optimize
    axes: {preset: [1m], k_frac: {low: 0.1, high: 0.5}, method: [moc_reference]}
    fixed: {batch: 2, seq_len: 64, dtype: fp32}
    optimize: {n_trials: 2, objectives: [{metric: step_ms, direction: minimize}]}
"""


def write(folder: Path, name: str, subject: Subject) -> None:
    """A plot of a report."""
    Board([""], columns=1, subject=subject).save(folder / "plots" / f"{name}.png", "message", "caption")


def test_a_plot_says_what_it_is_of(tmp_path: Path) -> None:
    """The subject is read back from the PNG; a picture of other origin has none."""
    for subject in (Subject(("ffn_decode", "generate")), Subject(search="pretrain"), Subject()):
        write(tmp_path, "x", subject)
        assert plot_subject(tmp_path / "plots/x.png") == subject
    (tmp_path / "y.png").write_bytes(b"no picture")
    assert plot_subject(tmp_path / "y.png") is None


def test_each_study_has_the_plots_that_are_of_it(tmp_path: Path) -> None:
    """A plot of two workloads belongs to the studies of both, a search's plot to that search alone."""
    sweep = parse_sweep(SWEEP, "mixed.yaml")
    storage = open_storage(tmp_path, None)
    for part in sweep.parts[:2]:
        PartStudy(sweep, part, storage, "cpu", [])
    SearchStudy(sweep, sweep.parts[2], storage, "cpu", [])
    write(tmp_path, "batch_crossover", Subject(("ffn_decode", "generate")))
    write(tmp_path, "ffn_speedup", Subject(("ffn_train",)))
    write(tmp_path, "perplexity_vs_k", Subject(("pretrain",)))
    write(tmp_path, "optimization_progress", Subject(search="ffn_train"))
    (tmp_path / "plots/foreign.png").write_bytes(b"no picture")
    gallery = attach_plots(tmp_path, "mixed")
    attached = {
        about["workload"]: {
            item.filename
            for item in get_all_artifact_meta(optuna.load_study(study_name=name, storage=gallery.storage))
        }
        for name, about in gallery.studies().items()
    }
    assert attached == {
        "ffn_decode": {"batch_crossover.png"},
        "pretrain": {"perplexity_vs_k.png"},
        "ffn_train": {"optimization_progress.png"},
    }
