"""Training on a CUDA device: the step clock, compilation, and the memory pass."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.training.checkpoint import Checkpoints
from harness.training.data import TokenDataset, prepare
from harness.training.step_clock import LAG, StepClock
from harness.training.trainer import DivergedError, TrainConfig, Trainer, TrainResult
from harness.workloads.pretrain import PeakMeter
from moc.config import LlamaConfig
from moc.llama import Llama
from moc.methods import get_method
from moc.selection import parse_selection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
VOCAB = 512
MODEL = LlamaConfig("small", d_model=256, d_ffn=704, n_layers=2, n_heads=4, vocab_size=VOCAB, max_seq_len=128)
CONFIG = TrainConfig(
    tokens_per_step=2048, seq_len=128, train_tokens=2048 * 40, eval_tokens=1024, seed=0, lr=3e-3
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """A corpus of a few thousand short sentences."""
    folder = tmp_path_factory.mktemp("data")
    words = ["gate", "channel", "token", "largest", "kept", "dropped", "row", "model", "text", "value"]
    lines = [
        json.dumps({"text": " ".join(words[(number * k) % 10] for k in range(1, 60)) + f" {number}"})
        for number in range(400)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return prepare(f"files:{folder}/a.jsonl", VOCAB, cache_root=folder / "cache")


def train(dataset: TokenDataset, method: str, rule: str | None = None, **options: Any) -> TrainResult:
    """A short bf16 run of one method."""
    chosen = get_method(method)
    selection = None if rule is None else parse_selection(rule)
    model = Llama(MODEL, lambda: chosen.make(MODEL.ffn, selection))
    return Trainer(model, dataset, CONFIG, CUDA, compile_loss=chosen.compile, **options).run()


def test_clock_counts_device_time_and_no_pause() -> None:
    """Steps of known device work take that long, in order; a pause before a restart is in none of them."""
    loss = torch.ones((), device=CUDA)
    torch.cuda._sleep(1000)
    _ = loss * 1  # loads the kernel, which a step would otherwise wait for
    torch.cuda.synchronize()
    clock = StepClock(CUDA)
    clock.restart()
    cycles = [10_000_000, 40_000_000, 10_000_000]
    known: list[tuple[float, float]] = []
    for number, count in enumerate(cycles):
        torch.cuda._sleep(count)
        known += clock.finish_step(loss * number)
    assert known == []  # younger than the lag: nothing waited
    known += clock.drain()
    torch.cuda._sleep(400_000_000)
    torch.cuda.synchronize()
    clock.restart()
    for number in range(3, 3 + 2 * LAG):
        torch.cuda._sleep(10_000_000)
        known += clock.finish_step(loss * number)
    known += clock.drain()
    times, losses = zip(*known, strict=True)
    assert losses == tuple(range(3 + 2 * LAG))
    assert times[1] / times[0] == pytest.approx(4.0, rel=0.2)
    assert all(time == pytest.approx(times[0], rel=0.3) for time in (times[2], *times[4:]))


def test_compiled_and_eager_training_agree(dataset: TokenDataset) -> None:
    """The compiled dense model learns what the eager one does, and its first step holds the compilation."""
    eager, compiled = train(dataset, "dense"), train(dataset, "dense_compiled")
    assert eager.losses[0] == pytest.approx(compiled.losses[0], rel=2e-3)
    assert eager.evaluations[-1].loss == pytest.approx(compiled.evaluations[-1].loss, rel=0.03)
    assert eager.evaluations[-1].loss < 0.6 * eager.evaluations[0].loss
    assert compiled.first_step_s is not None
    assert compiled.first_step_s > 10 * max(compiled.step_ms) / 1e3
    assert len(compiled.step_ms) == len(eager.step_ms) == 37


def test_compiling_happens_once(dataset: TokenDataset) -> None:
    """Evaluations between the steps make torch.compile compile nothing again."""
    torch._dynamo.reset()  # what other tests compiled of the same function would count
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(dataset, "moc_reference", "nm:2:8")


def test_peak_counts_weights_optimizer_and_activations(dataset: TokenDataset) -> None:
    """The peak is more than weights, moments and gradients, and the standing part is named."""
    train(dataset, "dense")  # allocates what a process allocates once, such as cuBLAS workspaces
    gc.collect()
    meter = PeakMeter(CUDA)
    result = train(dataset, "dense", measure_peak=meter.measure)
    fixed = 4 * 4 * MODEL.n_params()  # weights, two moments, gradients, all fp32
    assert result.peak_bytes is not None
    activations = 2 * MODEL.n_layers * 2048 * (256 + 4 * 704)  # of the FFN alone, in bf16
    assert result.peak_bytes > fixed * 0.75 + activations
    standing = int(meter.detail.split()[2])
    assert standing == pytest.approx(fixed * 0.75, rel=0.05)


def test_divergence_names_the_step_it_happened_in(dataset: TokenDataset) -> None:
    """Though losses are read some steps late, the first bad one is named."""

    class Exploding(Llama):
        calls = 0

        def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().loss(tokens, targets) * (float("nan") if self.calls >= 7 else 1.0)

    model = Exploding(MODEL, lambda: get_method("dense").make(MODEL.ffn, None))
    with pytest.raises(DivergedError, match=r"^loss is not finite at step 7$"):
        Trainer(model, dataset, CONFIG, CUDA).run()


def test_resumed_run_continues(dataset: TokenDataset, tmp_path: Path) -> None:
    """On CUDA a resumed run follows the unbroken one closely; sums on a GPU are not promised to the bit."""
    whole = train(dataset, "dense")

    class Killed(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 20:
            raise Killed

    checkpoints = Checkpoints(tmp_path / "run", 0.0, "this run")
    with pytest.raises(Killed):
        train(dataset, "dense", checkpoints=checkpoints, on_step=stop)
    resumed = train(dataset, "dense", checkpoints=checkpoints)
    assert resumed.losses == pytest.approx(whole.losses, rel=0.02)
