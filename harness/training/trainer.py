"""Pre-training of a LLaMA model on packed tokens: one loop for every method, device and dtype.

What makes methods comparable: the batches depend on the seed and the step alone, the schedule and the
optimizer are the same, and every model is evaluated on the same windows. What makes times comparable: each
step is timed from end to end while nothing else happens; warm-up, compilation, the memory pass, evaluation
and checkpoints are in no step time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.sweep.catalog import MIN_STEPS, TRAINING_DTYPES
from harness.training.checkpoint import Checkpoints
from harness.training.data.batches import EvaluationText, TrainingBatches, evaluation_text
from harness.training.data.dataset import TokenDataset
from harness.training.step_clock import StepClock
from moc.llama import Llama

WARM_UP_STEPS = 3  # compilation, cuBLAS and allocator set-up; not the warm-up of the learning rate
MEMORY_STEPS = 2  # a step's peak repeats exactly, a second one catches what only a filled cache needs


class DivergedError(RuntimeError):
    """The loss is infinite or not a number: the run has no result."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults are those of the usual LLaMA recipe."""

    tokens_per_step: int  # a multiple of seq_len
    seq_len: int
    train_tokens: int  # rounded down to whole steps
    eval_tokens: int  # of the validation split, at every evaluation
    seed: int  # of the order of the batches
    lr: float = 1e-3  # at the end of warm-up
    dtype: str = "bf16"  # bf16: autocast with fp32 weights; fp32: everything
    warmup_fraction: float = 0.1  # of the steps
    min_lr_fraction: float = 0.1  # of lr, at the last step
    weight_decay: float = 0.1  # of matrices; vectors (norms) have none
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # of the global gradient norm
    eval_fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the steps, for the trend

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        if self.dtype not in TRAINING_DTYPES:
            raise ValueError(
                f"dtype {self.dtype} cannot be trained; choose one of {', '.join(TRAINING_DTYPES)}"
            )
        if self.seq_len < 1 or self.tokens_per_step < 1 or self.tokens_per_step % self.seq_len:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a multiple of seq_len {self.seq_len}"
            )
        if self.n_steps < MIN_STEPS:
            raise ValueError(
                f"train_tokens {self.train_tokens} is {self.n_steps} steps of {self.tokens_per_step} tokens;"
                f" at least {MIN_STEPS} are needed"
            )
        if not self.lr > 0.0:
            raise ValueError(f"lr must be above 0, not {self.lr}")

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train_tokens // self.tokens_per_step

    @property
    def eval_steps(self) -> list[int]:
        """Numbers of steps done at which the model is evaluated; 0 is untrained."""
        return sorted({round(fraction * self.n_steps) for fraction in self.eval_fractions})

    @property
    def eval_percents(self) -> dict[int, int]:
        """Percent of the training that each of `eval_steps` stands for, before rounding to whole steps."""
        return {round(fraction * self.n_steps): round(100 * fraction) for fraction in self.eval_fractions}

    def lr_at(self, step: int) -> float:
        """Learning rate of one step: linear up to `lr`, then half a cosine down to its least."""
        warmup = max(1, round(self.warmup_fraction * self.n_steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup + 1) / (self.n_steps - warmup)
        least = self.min_lr_fraction
        return self.lr * (least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Evaluation:
    """Validation loss at one moment of training."""

    tokens_seen: int
    window_losses: list[float]  # mean nats of each window, in the order of the validation text

    @property
    def loss(self) -> float:
        """Mean nats per token: all windows have the same length."""
        return float(np.mean(self.window_losses))


@dataclass
class TrainResult:
    """What a run measured. A resumed run carries on the lists of the run it continues."""

    step_ms: list[float] = field(default_factory=list)  # timed steps only
    losses: list[float] = field(default_factory=list)  # training loss of every step
    evaluations: list[Evaluation] = field(default_factory=list)
    first_step_s: float | None = None  # wall time of the very first step: compilation included
    peak_bytes: int | None = None  # as `measure_peak` gave it

    def to_state(self) -> dict[str, Any]:
        """JSON values; floats survive exactly."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TrainResult:
        """Inverse of `to_state`."""
        return cls(**{**state, "evaluations": [Evaluation(**item) for item in state["evaluations"]]})


class Trainer:
    """One run: the model, its optimizer, its batches and what was measured so far.

    `compile_loss` puts the loss, that is the whole model, through torch.compile. Evaluation always runs the
    uncompiled model: compiling it as well would cost more than it saves. `measure_peak` is given a function
    that runs a few ordinary training steps and returns their peak memory in bytes. `on_evaluation` is called
    after each evaluation with the percent of the training it stands for.
    """

    def __init__(
        self,
        model: Llama,
        dataset: TokenDataset,
        config: TrainConfig,
        device: torch.device,
        *,
        compile_loss: bool = False,
        compile_mode: str | None = None,
        measure_peak: Callable[[Callable[[], None]], int] | None = None,
        checkpoints: Checkpoints | None = None,
        on_step: Callable[[int, float], None] | None = None,
        on_evaluation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        self.config = config
        self.result = TrainResult()
        self._model = model.to(device)
        self._device = device
        self._loss = torch.compile(model.loss, mode=compile_mode) if compile_loss else model.loss
        self._optimizer = make_optimizer(model, config)
        self._batches = TrainingBatches(
            dataset.train, config.seq_len, config.tokens_per_step // config.seq_len, config.seed
        )
        self.text = evaluation_text(
            dataset.validation, dataset.token_bytes, config.seq_len, config.eval_tokens
        )
        self._clock = StepClock(device)
        self._measure_peak = measure_peak
        self._checkpoints = checkpoints
        self._on_step = on_step
        self._on_evaluation = on_evaluation
        self._step = 0  # steps launched
        self._saved_at = time.monotonic()

    def run(self) -> TrainResult:
        """Train to the end, from the newest checkpoint if there is one; checkpoints are removed at the end.

        Raises DivergedError at the first step, or evaluation, whose loss is not finite, and ValueError for a
        checkpoint of another run.
        """
        config, result = self.config, self.result
        if self._checkpoints is not None:
            restored = self._checkpoints.load(self._model, self._optimizer)
            if restored is not None:
                self._step, state = restored
                self.result = result = TrainResult.from_state(state)
        warm_at = self._step + min(WARM_UP_STEPS, config.n_steps // 4)
        memory_steps = min(MEMORY_STEPS, config.n_steps // 4)
        while True:
            if self._step in config.eval_steps and self._evaluated() < self._step * config.tokens_per_step:
                self._evaluate()
            if self._step >= config.n_steps:
                break
            pause = min((step for step in config.eval_steps if step > self._step), default=config.n_steps)
            if self._step < warm_at:
                self._run_untimed(min(warm_at, pause))
            elif self._measure_peak is not None and result.peak_bytes is None:
                end = min(self._step + memory_steps, pause)
                result.peak_bytes = self._measure_peak(partial(self._run_untimed, end))
            else:
                self._run_timed(pause)
        if self._checkpoints is not None:
            self._checkpoints.remove()
        return result

    def _evaluated(self) -> int:
        """Tokens seen at the last evaluation; -1 before the first."""
        return self.result.evaluations[-1].tokens_seen if self.result.evaluations else -1

    def _evaluate(self) -> None:
        losses = evaluate(
            self._model, self.text, self._device, self.config.dtype, self.config.tokens_per_step
        )
        if not np.isfinite(losses).all():
            raise DivergedError(f"validation loss is not finite after step {self._step}")
        seen = self._step * self.config.tokens_per_step
        self.result.evaluations.append(Evaluation(seen, losses.tolist()))
        if self._on_evaluation is not None:
            self._on_evaluation(self.config.eval_percents[self._step], self.result.evaluations[-1])

    def _run_untimed(self, end: int) -> None:
        """Steps whose time is not kept, except that of the very first."""
        self._clock.restart()
        while self._step < end:
            started = time.perf_counter()
            first = self.result.first_step_s is None
            known = self._launch_step()
            if first:
                known += self._clock.drain()
                self.result.first_step_s = time.perf_counter() - started
            self._record(known, timed=False)
        self._record(self._clock.drain(), timed=False)

    def _run_timed(self, end: int) -> None:
        """Steps whose time is kept, with checkpoints between them when it is time for one."""
        checkpoints = self._checkpoints
        self._clock.restart()
        while self._step < end:
            self._record(self._launch_step(), timed=True)
            if checkpoints is not None and time.monotonic() - self._saved_at >= checkpoints.every_seconds:
                self._record(self._clock.drain(), timed=True)
                checkpoints.save(self._model, self._optimizer, self._step, self.result.to_state())
                self._saved_at = time.monotonic()
                self._clock.restart()
        self._record(self._clock.drain(), timed=True)

    def _launch_step(self) -> list[tuple[float, float]]:
        """One optimizer step; returns the (ms, loss) of steps that are known by now."""
        inputs, targets = _to_device(self._batches.at(self._step), self._device)
        with autocast(self._device, self.config.dtype):
            loss = self._loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self.config.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.lr_at(self._step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return self._clock.finish_step(loss)

    def _record(self, known: list[tuple[float, float]], timed: bool) -> None:
        """Keep what finished steps measured. Raises DivergedError for a loss that is not finite."""
        for milliseconds, loss in known:
            self.result.losses.append(loss)
            number = len(self.result.losses)
            if not math.isfinite(loss):
                raise DivergedError(f"loss is not finite at step {number}")
            if timed:
                self.result.step_ms.append(milliseconds)
            if self._on_step is not None:
                self._on_step(number, loss)


def evaluate(
    model: Llama, text: EvaluationText, device: torch.device, dtype: str, tokens_per_batch: int
) -> NDArray[np.float64]:
    """Mean nats per token of each window of the evaluation text, [n], computed without gradient."""
    count, length = text.windows.shape[0], text.windows.shape[1] - 1
    rows = max(1, tokens_per_batch // length)
    losses = []
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        for start in range(0, count, rows):
            inputs, targets = _to_device(text.windows[start : start + rows], device)
            losses.append(model.token_losses(inputs, targets).double().mean(dim=1).cpu())
    model.train(training)
    return torch.cat(losses).numpy()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; one fused kernel for all parameters."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a model of fp32 weights computes in `dtype`."""
    low = torch.bfloat16 if dtype == "bf16" else None
    return torch.autocast(device.type, dtype=low, enabled=low is not None)


def _to_device(windows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, S] of a batch of windows; the copy to CUDA does not wait for the device."""
    batch = torch.from_numpy(windows)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
