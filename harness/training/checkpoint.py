"""Checkpoints of a training run: weights and optimizer state as safetensors, everything else as JSON.

A checkpoint is a folder that is written under another name and renamed when whole, so a process killed at
any moment leaves either the old one or the new one. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its checkpoints and how often it writes one.

    `identity` says what the run is; a checkpoint of another identity is refused, since continuing it would
    give a result under the wrong name.
    """

    folder: Path
    every_seconds: float
    identity: str

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, state: dict[str, Any]
    ) -> None:
        """Write the state after `step` steps, then drop the older checkpoint. `state` must be JSON values."""
        writing = self.folder / "writing"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        save_file(_copies(model.state_dict()), writing / "model.safetensors")
        save_file(_optimizer_tensors(optimizer) | _generator_states(), writing / "optimizer.safetensors")
        record = {"identity": self.identity, "step": step, "state": state}
        (writing / "state.json").write_text(json.dumps(record), encoding="utf-8")
        older = self._finished()
        target = self.folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)  # the same step again, after a resume from it
        writing.replace(target)
        for path in older:
            if path != target:
                shutil.rmtree(path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint into the model, the optimizer and PyTorch's generators.

        Returns the number of steps done and the state given to `save`, or None if there is no checkpoint.
        Raises ValueError if the checkpoint belongs to another run.
        """
        finished = self._finished()
        if not finished:
            return None
        folder = finished[-1]
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if record["identity"] != self.identity:
            raise ValueError(
                f"{folder}: checkpoint of run {record['identity']!r}, expected {self.identity!r};"
                " remove the folder to start anew"
            )
        model.load_state_dict(load_file(folder / "model.safetensors"))
        _restore_optimizer(optimizer, load_file(folder / "optimizer.safetensors"))
        return int(record["step"]), dict(record["state"])

    def remove(self) -> None:
        """Delete all checkpoints: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: the format refuses tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors by `state.PARAMETER_INDEX.NAME`."""
    state = optimizer.state_dict()["state"]
    return _copies(
        {f"state.{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    )


def _generator_states() -> dict[str, Tensor]:
    """States of the global generators: a method may draw random numbers even if training does not."""
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of the two functions above; options of the optimizer stay as they were constructed."""
    torch.set_rng_state(tensors.pop("generator.cpu"))
    if (cuda_state := tensors.pop("generator.cuda", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_state)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, field = name.split(".")
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
