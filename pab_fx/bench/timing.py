"""When a step began and ended, and what a generation held, on each kind of device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ._torch import peak_of_live_bytes


class Timing(Protocol):
    """What a device has for that."""

    can_pause: bool
    """Whether a generation can be stopped between two steps without changing how long they take."""

    def wait(self) -> None:
        """Until the device has done what it was given."""

    def mark(self) -> Any:
        """A point in time."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two points, behind which `wait` was called."""

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The most that is held at once while something runs, beside what was held before."""


class WallClock:
    """Of the host, for devices that it waits for; memory by the profiler's events."""

    can_pause = True

    def wait(self) -> None:
        """There is nothing to wait for."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Between two times."""
        return end - start

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Of CPU memory, allocated by PyTorch."""
        return peak_of_live_bytes(run)


class CudaEvents:
    """Of a GPU, which is given many steps before the first has run; memory by its allocator.

    Args:
        device: the GPU.
    """

    can_pause = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait(self) -> None:
        """Until all that it was given has run."""
        torch.cuda.synchronize(self._device)

    def mark(self) -> Any:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events."""
        return float(start.elapsed_time(end)) / 1000

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """As the allocator counts."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        return torch.cuda.max_memory_allocated(self._device) - before


def timing_of(device: torch.device) -> Timing:
    """What a device is timed by.

    Example:
        >>> timing_of(torch.device("cpu")).can_pause
        True
    """
    return CudaEvents(device) if device.type == "cuda" else WallClock()
