"""FFNs from outside the project: one that is good, and ones that take their process down in every way."""

import ctypes
import os
import signal
import subprocess
import sys

import torch
from torch import nn

from moc.config import FfnShape
from moc.layers.dense import DenseFFN
from moc.selection import Selection


def good(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """A correct dense FFN under another name."""
    return DenseFFN(shape)


class _Fails(DenseFFN):
    def __init__(self, shape: FfnShape, how: str) -> None:
        super().__init__(shape)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Do the named harm instead of computing."""
        if self.how == "segfault":
            ctypes.string_at(0)
        elif self.how == "exit":
            sys.exit(0)
        elif self.how == "hard_exit":
            os._exit(3)
        elif self.how == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "hang":
            signal.pause()
        elif self.how == "orphan":
            subprocess.Popen(["sleep", "1000"])
            signal.pause()
        elif self.how == "memory":
            raise MemoryError("no more")
        elif self.how == "cuda_error":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")
        raise RuntimeError("this FFN always fails")


def segfault(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Reads address 0."""
    return _Fails(shape, "segfault")


def exits(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Calls sys.exit(0) as if all were well."""
    return _Fails(shape, "exit")


def hard_exit(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Ends the process without a word."""
    return _Fails(shape, "hard_exit")


def sigkill(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Is killed from outside, as by an out-of-memory killer."""
    return _Fails(shape, "sigkill")


def hang(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Never returns."""
    return _Fails(shape, "hang")


def orphan(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Starts a process of its own and never returns."""
    return _Fails(shape, "orphan")


def memory(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Runs out of memory."""
    return _Fails(shape, "memory")


def cuda_error(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Fails as a kernel that wrote where it should not: nothing on the device can be trusted after that."""
    return _Fails(shape, "cuda_error")


def raises(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Raises an ordinary error."""
    return _Fails(shape, "raises")
