"""Time and loss of every training step, read without making the device wait for the host.

A step's time runs from the end of the step before it to its own end, so it holds everything that keeps the
next step from ending earlier: data loading, launches, the optimizer. On CUDA the ends are events; the host
reads an event only once it is `LAG` steps old, which also keeps the host from running far ahead. Between a
pause (evaluation, checkpoint) and the next step the clock is restarted, so pauses are in no step.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

LAG = 4  # steps in flight: enough to hide data loading, few enough to notice a bad loss soon


class StepClock:
    """Call `restart` before a run of steps, `finish_step` after each one, `drain` at the end of the run."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last: torch.cuda.Event | float = 0.0
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def restart(self) -> None:
        """The next step begins now."""
        self._last = _event() if self._cuda else time.perf_counter()

    def finish_step(self, loss: Tensor) -> list[tuple[float, float]]:
        """The step that gave this loss has been launched; returns (ms, loss) of steps known by now."""
        if not self._cuda:
            value = loss.item()
            now = time.perf_counter()
            milliseconds = (now - float(self._last)) * 1e3  # type: ignore[arg-type]
            self._last = now
            return [(milliseconds, value)]
        on_host = torch.empty((), dtype=torch.float32, pin_memory=True)
        on_host.copy_(loss.detach(), non_blocking=True)
        self._waiting.append((_event(), on_host))
        return self._read(down_to=LAG)

    def drain(self) -> list[tuple[float, float]]:
        """Wait for all launched steps; returns (ms, loss) of those not returned before."""
        return self._read(down_to=0)

    def _read(self, down_to: int) -> list[tuple[float, float]]:
        done = []
        while len(self._waiting) > down_to:
            event, loss = self._waiting.popleft()
            event.synchronize()
            done.append((self._last.elapsed_time(event), loss.item()))  # type: ignore[union-attr]
            self._last = event
        return done


def _event() -> torch.cuda.Event:
    """An event recorded now on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
