"""The loss curves of one training run: what the dashboard shows beside a trial."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.ticker import FuncFormatter

from harness import text
from harness.plot_style import Board, Plot

_TRAIN, _EVAL = "train_loss_nats", "eval_loss_nats"


def draw_trial(samples: pd.DataFrame, title: str, caption: str, path: Path) -> Plot | None:
    """Training and validation loss over tokens seen, of one run, as a PNG at `path`.

    `samples` are the run's raw samples as `harness.store.frames.read_samples` gives them. None, and no file,
    if it has no training loss.
    """
    curves = {name: samples[samples["metric"] == name].dropna(subset=["value"]) for name in (_TRAIN, _EVAL)}
    if curves[_TRAIN].empty:
        return None
    board = Board([""], columns=1)
    axes = board.axes[0]
    (line,) = axes.plot(curves[_TRAIN]["x"], curves[_TRAIN]["value"], color="#8C8C8C", linewidth=1.0)
    board.legend(line, "training batches")
    (marks,) = axes.plot(
        curves[_EVAL]["x"], curves[_EVAL]["value"], color="black", marker="o", linewidth=1.4, clip_on=False
    )
    board.legend(marks, "held-out text")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.tokens(max(value, 0))))
    axes.set_xlim(left=0)
    return board.save(path, title, caption, x="tokens seen in training", y="loss (nats/token)")
