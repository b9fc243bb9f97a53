"""Training: the schedule, paired data and weights, learning, divergence, and resuming to the bit."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.training.checkpoint import Checkpoints
from harness.training.data import TokenDataset, prepare
from harness.training.data.batches import TrainingBatches, evaluation_text
from harness.training.trainer import DivergedError, TrainConfig, Trainer, evaluate, make_optimizer
from moc.config import LlamaConfig
from moc.llama import Llama
from moc.methods import get_method
from moc.selection import parse_selection

CPU = torch.device("cpu")
VOCAB = 300
MODEL = LlamaConfig("tiny", d_model=32, d_ffn=64, n_layers=1, n_heads=2, vocab_size=VOCAB, max_seq_len=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """A corpus that says the same few sentences over and over, in documents that differ by a number."""
    folder = tmp_path_factory.mktemp("data")
    sentence = "the gate keeps the largest channels and the rest of the channels are dropped. "
    lines = [json.dumps({"text": f"{number}: " + sentence * 6}) for number in range(120)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return prepare(f"files:{folder}/a.jsonl", VOCAB, cache_root=folder / "cache")


def make_config(**values: object) -> TrainConfig:
    """A run of 16 steps of 64 tokens unless said otherwise."""
    defaults: dict[str, object] = {
        "tokens_per_step": 64,
        "seq_len": 16,
        "train_tokens": 1024,
        "eval_tokens": 256,
        "seed": 0,
        "dtype": "fp32",
        "lr": 3e-3,
    }
    return TrainConfig(**(defaults | values))  # type: ignore[arg-type]


def make_model(method: str = "dense", selection: str | None = None, seed: int = 0) -> Llama:
    """A model of one small layer, as a sweep would make it."""
    rule = None if selection is None else parse_selection(selection)
    return Llama(MODEL, lambda: get_method(method).make(MODEL.ffn, rule), seed=seed)


# --- configuration ---------------------------------------------------------------------------------------


def test_learning_rate_schedule_ends() -> None:
    """The rate rises in equal parts to lr, never exceeds it, falls all the way, and ends at its least."""
    config = make_config(train_tokens=64 * 100, lr=2.0, warmup_fraction=0.1, min_lr_fraction=0.05)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)], rel=1e-12)
    assert max(rates) == rates[9] == 2.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1, rel=1e-12)
    middle = rates[9 + 45]  # halfway through the cosine
    assert middle == pytest.approx((2.0 + 0.1) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "fp16"}, "dtype fp16 cannot be trained; choose one of bf16, fp32"),
        ({"seq_len": 24}, "tokens_per_step 64 is not a multiple of seq_len 24"),
        ({"train_tokens": 200}, "train_tokens 200 is 3 steps of 64 tokens; at least 4"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    """A value that cannot be trained with is named, with what would do."""
    with pytest.raises(ValueError, match=message):
        make_config(**values)


def test_weight_decay_is_for_matrices_only() -> None:
    """Norm weights are in a group without decay, every matrix in the group with it, none in both."""
    model = make_model()
    decayed, free = make_optimizer(model, make_config()).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in free["params"])
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


# --- comparability ---------------------------------------------------------------------------------------


class Spy:
    """Records the batches a model is trained on."""

    def __init__(self, model: Llama) -> None:
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._loss = model.loss
        model.loss = self.loss  # type: ignore[method-assign]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The model's loss, after noting its arguments."""
        self.batches.append((tokens.numpy().copy(), targets.numpy().copy()))
        return self._loss(tokens, targets)


def test_methods_start_from_the_same_weights_and_see_the_same_batches(dataset: TokenDataset) -> None:
    """Two methods of one seed differ in nothing but the method; another seed changes weights and batches."""
    runs = []
    for method, rule, seed in (("dense", None, 0), ("moc_reference", "topk:0.25", 0), ("dense", None, 1)):
        model = make_model(method, rule, seed)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        spy = Spy(model)
        Trainer(model, dataset, make_config(seed=seed), CPU).run()
        runs.append((weights, spy.batches))
    (weights, batches), (other_weights, other_batches), (new_weights, new_batches) = runs
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert len(batches) == len(other_batches) == 16
    np.testing.assert_array_equal(batches, other_batches)
    assert not torch.equal(weights["head"], new_weights["head"])
    assert not np.array_equal(batches, new_batches)


def test_training_follows_the_order_of_the_batches(dataset: TokenDataset) -> None:
    """Step n trains on batch n of the training text: inputs and the tokens that follow them."""
    model = make_model()
    spy = Spy(model)
    Trainer(model, dataset, make_config(seed=5), CPU).run()
    batches = TrainingBatches(dataset.train, seq_len=16, batch=4, seed=5)
    for step, (inputs, targets) in enumerate(spy.batches):
        np.testing.assert_array_equal(inputs, batches.at(step)[:, :-1])
        np.testing.assert_array_equal(targets, batches.at(step)[:, 1:])


def test_a_step_is_clipped_adamw(dataset: TokenDataset) -> None:
    """Weights after four steps equal those of AdamW written out by hand, clipping and schedule included."""
    config = make_config(train_tokens=256, grad_clip=0.05, lr=1e-2)
    trained, expected = make_model(), make_model()
    Trainer(trained, dataset, config, CPU).run()
    batches = TrainingBatches(dataset.train, seq_len=16, batch=4, seed=0)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.named_parameters()}
    for step in range(4):
        batch = torch.from_numpy(batches.at(step))
        names, parameters = zip(*expected.named_parameters(), strict=True)
        grads = torch.autograd.grad(expected.loss(batch[:, :-1], batch[:, 1:]), parameters)
        norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))
        assert norm > 0.05
        with torch.no_grad():
            for name, parameter, grad in zip(names, parameters, grads, strict=True):
                grad = grad * (0.05 / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(grad, alpha=0.1)
                second.mul_(0.95).add_(grad**2, alpha=0.05)
                rate = config.lr_at(step)
                parameter.mul_(1 - rate * (0.1 if parameter.dim() > 1 else 0.0))
                unbiased = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                parameter.sub_(rate * (first / (1 - 0.9 ** (step + 1))) / unbiased)
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_mean_over_the_first_validation_tokens(dataset: TokenDataset) -> None:
    """Window losses are cross-entropies of the model's logits, however the windows are batched."""
    model = make_model()
    text = evaluation_text(dataset.validation, dataset.token_bytes, 16, 256)
    losses = evaluate(model, text, CPU, "fp32", tokens_per_batch=64)
    windows = torch.from_numpy(text.windows)
    with torch.no_grad():
        logits = model(windows[:, :-1]).double() @ model.head.double().T
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(losses, evaluate(model, text, CPU, "fp32", tokens_per_batch=10**6), rtol=1e-6)
    assert model.training


# --- a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rule", "dtype"),
    [("dense", None, "fp32"), ("moc_reference", "topk:0.25", "fp32"), ("dense", None, "bf16")],
)
def test_training_lowers_the_loss(dataset: TokenDataset, method: str, rule: str | None, dtype: str) -> None:
    """On a repetitive text the validation loss falls from that of a uniform guess to far below it."""
    config = make_config(train_tokens=64 * 120, lr=1e-2, dtype=dtype)
    result = Trainer(make_model(method, rule), dataset, config, CPU).run()
    trend = [evaluation.loss for evaluation in result.evaluations]
    assert trend[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert trend[-1] < 1.5
    assert trend == sorted(trend, reverse=True)
    assert np.mean(result.losses[-5:]) < 1.5


def test_result_says_what_was_run(dataset: TokenDataset) -> None:
    """Each step has a loss, each after warm-up and memory pass a time, each of five evaluations its place."""
    memory_passes: list[int] = []

    def measure_peak(run_steps: object) -> int:
        before = len(trainer.result.losses)
        run_steps()  # type: ignore[operator]
        memory_passes.append(len(trainer.result.losses) - before)
        return 123

    seen: list[int] = []
    trainer = Trainer(
        make_model(),
        dataset,
        make_config(),
        CPU,
        measure_peak=measure_peak,
        on_step=lambda step, loss: seen.append(step),
    )
    result = trainer.run()
    assert len(result.losses) == 16
    assert len(result.step_ms) == 16 - 3 - sum(memory_passes)
    assert len(memory_passes) == 1
    assert memory_passes[0] >= 1
    assert result.peak_bytes == 123
    assert min(result.step_ms) > 0
    assert result.first_step_s is not None
    assert result.first_step_s > 0
    assert [evaluation.tokens_seen for evaluation in result.evaluations] == [0, 256, 512, 768, 1024]
    assert all(len(evaluation.window_losses) == 16 for evaluation in result.evaluations)
    assert seen == list(range(1, 17))


class Exploding(nn.Module):
    """A language model whose loss is not a number from some step on."""

    def __init__(self, bad_step: int, bad_evaluation: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self._calls = 0
        self._bad_step = bad_step
        self._bad_evaluation = bad_evaluation

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One, then infinite."""
        self._calls += 1
        return self.weight.mean() * (math.inf if self._calls >= self._bad_step else 1.0)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One, or not a number."""
        return torch.full(targets.shape, math.nan if self._bad_evaluation else 1.0)


def test_a_loss_that_is_not_finite_ends_the_run(dataset: TokenDataset) -> None:
    """The first bad step is named; a bad evaluation is, too."""
    with pytest.raises(DivergedError, match=r"^loss is not finite at step 7$"):
        Trainer(Exploding(7), dataset, make_config(), CPU).run()
    with pytest.raises(DivergedError, match=r"^validation loss is not finite after step 0$"):
        Trainer(Exploding(99, bad_evaluation=True), dataset, make_config(), CPU).run()


# --- checkpoints -----------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("stop_at", [5, 8, 13])
@pytest.mark.parametrize(("method", "rule"), [("dense", None), ("moc_reference", "nm:2:8")])
def test_resumed_run_is_identical(
    dataset: TokenDataset, tmp_path: Path, method: str, rule: str | None, stop_at: int
) -> None:
    """A run killed between two steps and started again gives the losses and weights of an unbroken one."""
    whole_model = make_model(method, rule)
    whole = Trainer(whole_model, dataset, make_config(), CPU).run()

    def stop(step: int, loss: float) -> None:
        if step == stop_at:
            raise Killed

    checkpoints = Checkpoints(tmp_path / "run", 0.0, "this run")
    with pytest.raises(Killed):
        Trainer(
            make_model(method, rule), dataset, make_config(), CPU, checkpoints=checkpoints, on_step=stop
        ).run()
    torch.manual_seed(99)  # a new process
    resumed_model = make_model(method, rule, seed=3)  # its weights come from the checkpoint
    seen: list[int] = []
    resumed = Trainer(
        resumed_model,
        dataset,
        make_config(),
        CPU,
        checkpoints=checkpoints,
        on_step=lambda step, loss: seen.append(step),
    ).run()
    assert seen[0] == stop_at
    assert resumed.losses == whole.losses
    assert [e.window_losses for e in resumed.evaluations] == [e.window_losses for e in whole.evaluations]
    assert all(
        torch.equal(tensor, whole_model.state_dict()[name])
        for name, tensor in resumed_model.state_dict().items()
    )
    assert not checkpoints.folder.exists()


def saved(folder: Path, identity: str = "this run", step: int = 3) -> tuple[Checkpoints, nn.Module]:
    """A checkpoint of a model after one optimizer step."""
    checkpoints = Checkpoints(folder, 0.0, identity)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints.save(model, optimizer, step, {"losses": [0.1, 1 / 3]})
    return checkpoints, model


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and optimizer to load into."""
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def test_checkpoint_restores_everything(tmp_path: Path) -> None:
    """Weights, moments, step count, state and the global generator come back as they were."""
    torch.manual_seed(5)
    checkpoints, model = saved(tmp_path)
    expected = torch.rand(3)
    restored, optimizer = fresh()
    assert checkpoints.load(restored, optimizer) == (3, {"losses": [0.1, 1 / 3]})
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(restored.weight, model.weight)  # type: ignore[arg-type]
    state = optimizer.state_dict()["state"]
    assert set(state[0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state[0]["step"] == 1
    assert torch.allclose(state[0]["exp_avg"], torch.full((2, 3), 0.1))


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    """Saving drops the one before; the newest is what is loaded."""
    saved(tmp_path, step=3)
    checkpoints, _ = saved(tmp_path, step=12)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000012"]
    loaded = checkpoints.load(*fresh())
    assert loaded is not None
    assert loaded[0] == 12


def test_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    """What a killed process left of the next checkpoint does not hide the finished one."""
    checkpoints, _ = saved(tmp_path, step=3)
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / "model.safetensors").write_bytes(b"half")
    loaded = checkpoints.load(*fresh())
    assert loaded is not None
    assert loaded[0] == 3
    checkpoints, _ = saved(tmp_path, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Continuing under another name would give a wrong result: the message names both and the folder."""
    saved(tmp_path, identity="other run")
    with pytest.raises(
        ValueError, match="checkpoint of run 'other run', expected 'this run'; remove the folder"
    ):
        Checkpoints(tmp_path, 0.0, "this run").load(*fresh())


def test_without_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    """A folder that is not there means a fresh start."""
    assert Checkpoints(tmp_path / "none", 0.0, "this run").load(*fresh()) is None
