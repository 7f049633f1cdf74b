"""Run generations and time them; statistics of what was timed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .contenders import Contender
from .timing import Timing


@dataclass(frozen=True)
class Spread:
    """A median, and the lowest and highest value.

    Example:
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def ratios(of: Sequence[float], to: Sequence[float]) -> tuple[float, ...]:
    """`of / to`, round by round: a machine that slows down slows both.

    Example:
        >>> ratios([2.0, 6.0], [1.0, 2.0])
        (2.0, 3.0)
    """
    return tuple(a / b for a, b in zip(of, to, strict=True))


def by_kind(kinds: Sequence[str], rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median time of the steps of each kind, over all rounds.

    Args:
        kinds: of each step of a generation.
        rounds: of each generation, the time of each step.

    Example:
        >>> by_kind(["computing", "reusing"], [[3.0, 1.0], [5.0, 1.0], [4.0, 2.0]])
        {'computing': 4.0, 'reusing': 1.0}
    """
    times: dict[str, list[float]] = {}
    for steps in rounds:
        for kind, time_ in zip(kinds, steps, strict=True):
            times.setdefault(kind, []).append(time_)
    return {kind: statistics.median(found) for kind, found in times.items()}


def distance(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Relative L2 distance of all outputs of a generation from those of another."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, reference, strict=True))
    norm = sum(float(b.double().square().sum()) for b in reference)
    return float((difference / norm) ** 0.5)


class Clock:
    """The scheduler's timestep of the running step, for a config's `current_timestep_callback`."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t


@dataclass(frozen=True)
class Generation:
    """One run through all timesteps.

    Args:
        steps: seconds of each step.
        outputs: of each step; empty where they were not to be kept.
        reused: of each step, the calls of parts that were answered from a cache; empty where outputs are.
    """

    steps: tuple[float, ...]
    outputs: tuple[torch.Tensor, ...] = ()
    reused: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.steps)


@dataclass(frozen=True)
class Trajectory:
    """What every contender runs: the same inputs at the same timesteps.

    Args:
        timesteps: on the scheduler's scale.
        inputs: arguments of the model for each of them.
        clock: is set to the timestep before each step.
        timing: of the device that the model is on.
    """

    timesteps: Sequence[float]
    inputs: Sequence[Mapping[str, Any]]
    clock: Clock
    timing: Timing

    @torch.no_grad()
    def step(self, contender: Contender, i: int) -> float:
        """Run one step, and tell its seconds; only where its timing can pause."""
        self.clock.t = self.timesteps[i]
        start = self.timing.mark()
        contender.at(i)(**self.inputs[i])
        return self.timing.seconds(start, self.timing.mark())

    @torch.no_grad()
    def run(self, contender: Contender, watch: bool = False) -> Generation:
        """One generation, which starts afresh and leaves no cache behind.

        Args:
            contender: what runs.
            watch: whether to keep outputs and to count what is reused, between the steps.
        """
        spans, outputs, reused = [], [], [contender.reused]
        contender.reset()
        self.timing.wait()
        for i, (t, inputs) in enumerate(zip(self.timesteps, self.inputs, strict=True)):
            self.clock.t = t
            start = self.timing.mark()
            output = contender.at(i)(**inputs)[0]
            spans.append((start, self.timing.mark()))
            if watch:
                outputs.append(output.clone())
                contender.after_step()
                reused.append(contender.reused)
            del output
        self.timing.wait()
        steps = tuple(self.timing.seconds(*span) for span in spans)
        contender.reset()
        return Generation(steps, tuple(outputs), tuple(after - before for before, after in itertools.pairwise(reused)))

    def peak_bytes(self, contender: Contender) -> int:
        """The most memory that a generation holds at once, less the weights and what others hold."""
        contender.reset()
        return self.timing.peak_bytes(lambda: self.run(contender)) + contender.held_bytes
