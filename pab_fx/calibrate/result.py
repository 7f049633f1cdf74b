"""What a calibration has found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..policy.files import as_json
from ..policy.policy import Policy
from .budget import MOST_PSNR, Budget
from .samples import Difference
from .trajectory import Trajectory


def mean_psnr(differences: Sequence[Difference], peak: float) -> float:
    """Mean over prompts, in dB, of which none counts for more than `MOST_PSNR`."""
    return statistics.fmean(min(each.psnr(peak), MOST_PSNR) for each in differences)


@dataclass(frozen=True)
class Outcome:
    """A setting that was generated with: what it does to samples.

    Args:
        label: what it is called.
        config: policies, or another config that `enable` takes.
        differences: of each prompt's sample from the one without a cache.
        operations: the share of the model's floating-point operations that is left.
    """

    label: str
    config: Any
    differences: tuple[Difference, ...]
    operations: float

    @property
    def speedup(self) -> float:
        """How many times fewer floating-point operations that are."""
        return 1 / self.operations

    def psnr(self, peak: float = 1.0) -> float:
        """Mean over prompts, in dB."""
        return mean_psnr(self.differences, peak)

    @property
    def relative_l2(self) -> float:
        """Mean over prompts."""
        return statistics.fmean(each.relative_l2 for each in self.differences)


@dataclass(frozen=True)
class Tried:
    """A setting, on the prompts that were searched with, and on those held out.

    Args:
        searched: what it does to the samples of the former.
        held: to those of the latter; `None` where it was not worth a generation.
        room: by how much it keeps the budget on the prompts held out, in dB, standard errors taken off; below 0 it does
            not. On those that were searched with, if the others were not generated.
    """

    searched: Outcome
    held: Outcome | None
    room: float


@dataclass(frozen=True)
class Calibration:
    """The proposed setting, and all that led to it.

    Args:
        policies: the proposal, for `enable`.
        proposal: what it does to the samples of prompts that the search did not see.
        searched: to those that it was searched with.
        budget: what it had to keep.
        measured_speedup: of denoising, with the proposal against without: the median of ratios of generations in turns;
            `None` if it was not measured.
        tried: the settings that were generated with, in that order.
        compared: other settings, such as presets, on the prompts held out.
        curves: for each method what was predicted of its best lists: pairs of speed-up and PSNR in dB.
        trajectories: what each part left in each step without a cache.
        peak: the largest difference that two elements of a sample can have.
        folder: where the files are.
    """

    policies: tuple[Policy, ...]
    proposal: Outcome
    searched: Outcome
    budget: Budget
    measured_speedup: float | None
    tried: tuple[Tried, ...]
    compared: tuple[Outcome, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    trajectories: tuple[Trajectory, ...]
    peak: float
    folder: Path

    @property
    def lost(self) -> float:
        """By how many dB prompts that the search did not see are worse in the mean than those that it saw."""
        return self.searched.psnr(self.peak) - self.proposal.psnr(self.peak)

    def as_json(self) -> dict[str, Any]:
        """All of it but the trajectories, as JSON has it."""
        return {
            "policies": as_json(self.policies),
            "budget": str(self.budget),
            "measured_speedup": self.measured_speedup,
            "proposal": self._outcome(self.proposal),
            "searched": self._outcome(self.searched),
            "tried": [
                {
                    "searched": self._outcome(each.searched),
                    "held": None if each.held is None else self._outcome(each.held),
                    "room": each.room,
                }
                for each in self.tried
            ],
            "compared": [self._outcome(each) for each in self.compared],
            "curves": self.curves,
            "folder": str(self.folder),
        }

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "label": outcome.label,
            "psnr": outcome.psnr(self.peak),
            "relative_l2": outcome.relative_l2,
            "operations": outcome.operations,
        }
