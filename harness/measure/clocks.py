"""Conditions under which a block of samples was taken: clocks, temperature, power, throttle reasons.

Only ever read. A sample taken under throttling is labelled, not dropped: both methods of a round suffered it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# NVML's bits (nvml.h, nvmlClocksEventReasons) that mean "slower than asked for". Left out: idle (1), an
# application clock somebody set (2), sync boost (0x10), display clock (0x100): none is a fault of the moment.
_THROTTLE_REASONS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
}


@dataclass(frozen=True)
class Conditions:
    """One reading of the card."""

    sm_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_w: float | None  # None where the card does not tell
    throttle_reasons: tuple[str, ...]


class ClockReader:
    """Reads the conditions of one device; None where there is nothing to ask (no CUDA, no NVML)."""

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle = _open(device)

    def read(self) -> Conditions | None:
        """The card's conditions now, or None. Costs well under a millisecond."""
        nvml = self._nvml
        if nvml is None:
            return None
        try:
            power = nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000.0
        except nvml.NVMLError:
            power = None
        try:
            return Conditions(
                float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
                float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_MEM)),
                float(nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)),
                power,
                throttle_names(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)),
            )
        except nvml.NVMLError:
            return None


def throttle_names(bits: int) -> tuple[str, ...]:
    """Names of the reasons set in NVML's bit field, less those that do not slow the card."""
    return tuple(name for bit, name in _THROTTLE_REASONS.items() if bits & bit)


@dataclass(frozen=True)
class TimingConditions:
    """Under what conditions a timed number was taken, over all readings; None where nothing was read."""

    mode: str  # how the work was launched
    sm_clock_mhz: float | None
    throttled: bool | None

    @classmethod
    def of(cls, mode: str, readings: Sequence[Conditions | None]) -> TimingConditions:
        """From readings of the card."""
        return cls(mode, median_sm_clock(readings), any_throttled(readings))


def median_sm_clock(blocks: Sequence[Conditions | None]) -> float | None:
    """Median SM clock of the blocks in MHz (the upper one of an even number); None if nothing was read."""
    clocks = sorted(block.sm_clock_mhz for block in blocks if block is not None)
    return clocks[len(clocks) // 2] if clocks else None


def any_throttled(blocks: Sequence[Conditions | None]) -> bool | None:
    """Whether any block was throttled; None if nothing was read."""
    known = [block for block in blocks if block is not None]
    return any(block.throttle_reasons for block in known) if known else None


def _open(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda":
        return None, None
    nvml = open_nvml()
    if nvml is None:
        return None, None
    import torch

    # By UUID: NVML's own numbering ignores CUDA_VISIBLE_DEVICES.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError:
        return None, None


def open_nvml() -> Any:
    """The initialised `pynvml` module, or None where the library or the driver is missing."""
    try:
        with warnings.catch_warnings():
            # An old package of the same name warns that it is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
