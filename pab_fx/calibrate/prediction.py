"""What a setting will cost and save, to first order, from what probes have shown.

A probe is a generation in which one group of modules reuses every second step within one stretch of steps. What it
changes in the sample is a vector; what a setting changes is, to first order, the sum of the vectors of its groups and
stretches, each as much longer as the outputs are older that it reuses:

    sample(setting) - sample  =  sum over probes p of  scale[p] * (sample(p) - sample)

    scale[p] = (sum of changes since the last computed step, over the steps of p that reuse under the setting)
             / (the same sum under the probe)

So the squared error is a quadratic form of the scales, and all that it takes of the probes are inner products of what
they have changed. Errors of stretches that undo or add to each other are seen as that; a sum of sizes would miss it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .changes import ModuleChanges
from .samples import Difference
from .settings import Group, Option, Setting

Segments = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ErrorModel:
    """Predicts how far samples are from those without PAB.

    Args:
        products: inner products of what the probes change, for each prompt: [N, P, P], where the P probes are those of
            the first group in each segment, then of the second, and so on.
        norms: squared norm of the sample of each prompt: [N].
        size: elements of a sample.
        segments: the stretches of steps of the probes.
        groups: the groups.
    """

    products: np.ndarray
    norms: np.ndarray
    size: int
    segments: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]

    def differences(self, setting: Setting) -> list[Difference]:
        """What the samples of a setting are predicted to be, prompt by prompt."""
        scale = np.concatenate([scales(g, o, self.segments) for g, o in zip(self.groups, setting, strict=True)])
        squared = np.einsum("i,nij,j->n", scale, self.products, scale).clip(min=0.0)
        return self._differences(squared)

    def _differences(self, squared: np.ndarray) -> list[Difference]:
        return [Difference(float(s), float(n), self.size) for s, n in zip(squared, self.norms, strict=True)]

    def probes(self, group: int) -> list[list[Difference]]:
        """What each probe of a group made of the samples: for each segment, prompt by prompt."""
        count = len(self.segments)
        squared = np.diagonal(self.products, axis1=1, axis2=2)[:, group * count : (group + 1) * count]  # [N, segments]
        return list(map(self._differences, squared.T))

    @property
    def balanced(self) -> np.ndarray:
        """The inner products, in the mean over prompts of which each counts alike: [P, P]."""
        traces = np.trace(self.products, axis1=1, axis2=2)  # [N]
        return (self.products / np.where(traces > 0, traces, 1.0)[:, None, None]).mean(0)


def scales(group: Group, option: Option | None, segments: Segments) -> np.ndarray:
    """How much of each of a group's probes is in an option: [segments]."""
    own = ages(group.reuses(option))
    probe = ages(tuple(step % 2 == 1 for step in range(len(own))))
    return np.array([_changed(group, own, segment) / (_changed(group, probe, segment) or 1.0) for segment in segments])


def ages(reuses: Sequence[bool]) -> tuple[int, ...]:
    """For each step how many steps old the output is that it uses.

    Example:
        >>> ages([False, True, True, False])
        (0, 1, 2, 0)
    """
    return tuple(itertools.accumulate(reuses, lambda age, reuse: age + 1 if reuse else 0, initial=0))[1:]


def _changed(group: Group, ages_: Sequence[int], segment: tuple[int, int]) -> float:
    """By how much the outputs that the steps of a segment use have changed meanwhile, summed over these steps."""
    return sum(group.change(step, ages_[step]) for step in range(*segment) if ages_[step])


@dataclass(frozen=True)
class CostModel:
    """Predicts how much faster a generation is.

    Args:
        shares: for each group the share of a step's time that is saved where it reuses, 0 to 1.
        groups: the groups.
    """

    shares: tuple[float, ...]
    groups: tuple[Group, ...]

    def saved(self, group: int, option: Option | None) -> float:
        """The share of a generation's time that an option saves."""
        reuses = self.groups[group].reuses(option)
        return self.shares[group] * sum(reuses) / len(reuses)

    def speedup(self, setting: Setting) -> float:
        """How many times faster a generation is."""
        return 1 / max(1 - sum(self.saved(i, option) for i, option in enumerate(setting)), 0.01)

    def speedup_of(self, reuses: Mapping[ModuleChanges, Sequence[bool]]) -> float:
        """The same for any config: of each module whether it reuses, step by step."""
        saved = 0.0
        for share, group in zip(self.shares, self.groups, strict=True):
            plans = [reuses[module] for module in group.modules]
            saved += share * sum(map(sum, plans)) / sum(map(len, plans))
        return 1 / max(1 - saved, 0.01)


def step_seconds(seconds: Sequence[float], steps: int) -> list[float]:
    """The seconds of each step, of those of each run of a graph: every step runs as many.

    Example:
        >>> step_seconds([1.0, 2.0, 3.0, 4.0], steps=2)
        [3.0, 7.0]
    """
    summed = [0.0] * steps
    for i, each in enumerate(seconds):
        summed[i * steps // len(seconds)] += each
    return summed


def share_of_step(seconds: Sequence[float], reuses: Sequence[bool]) -> list[float]:
    """The shares of a step's time that reusing steps save: each against each computing step next to it.

    A machine that is slow now and then is as often slow in one of two neighbours as in the other: the median of these
    is right however large the outliers are.

    Args:
        seconds: of each step.
        reuses: whether it reuses.

    Example:
        >>> share_of_step([2.0, 1.5, 3.0, 4.0], [False, True, False, False])
        [0.25, 0.5]
    """
    return [
        1 - seconds[i] / seconds[j]
        for i, reuse in enumerate(reuses)
        for j in (i - 1, i + 1)
        if reuse and 0 <= j < len(seconds) and not reuses[j]
    ]
