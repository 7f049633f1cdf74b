"""What a calibration has found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..policy.config import PABConfig
from .budget import MOST_PSNR, Budget
from .changes import ModuleChanges
from .samples import Difference


def mean_psnr(differences: Sequence[Difference], peak: float) -> float:
    """Mean over prompts, in dB, of which none counts for more than `MOST_PSNR`."""
    return statistics.fmean(min(each.psnr(peak), MOST_PSNR) for each in differences)


@dataclass(frozen=True)
class Outcome:
    """A setting that was generated with: what it does to the samples of the calibration's prompts.

    Args:
        label: what it is called.
        config: the setting.
        differences: of each prompt's sample from the one without PAB.
        speedup: predicted from what reusing steps save.
        graphs: how many sets of reusing modules occur: as many graphs are compiled.
        room: by how much it keeps the budget, in dB, standard errors taken off; below 0 it does not.
    """

    label: str
    config: PABConfig
    differences: tuple[Difference, ...]
    speedup: float
    graphs: int
    room: float

    def psnr(self, peak: float = 1.0) -> float:
        """Mean over prompts, in dB."""
        return mean_psnr(self.differences, peak)

    @property
    def relative_l2(self) -> float:
        """Mean over prompts."""
        return statistics.fmean(each.relative_l2 for each in self.differences)


@dataclass(frozen=True)
class Predicted:
    """A setting on the front of speed-up against error, as predicted; both means over prompts are."""

    speedup: float
    psnr: float
    relative_l2: float


@dataclass(frozen=True)
class Calibration:
    """The proposed setting, and all that led to it.

    Args:
        config: the proposal.
        proposal: what was found for it.
        budget: what it had to keep.
        measured_speedup: of denoising, with the proposal against without: the median of ratios of generations in turns;
            `None` if it was not.
        tried: the settings of the front that were generated with, in that order.
        compared: other settings, such as the presets.
        front: what was predicted, from the most careful setting to the fastest.
        shares: for each group the share of a step's time that it saves where it reuses.
        probes: for each group the PSNR in dB where it alone reuses every second step, in each of `windows`.
        windows: the stretches of steps of the probes, as windows of timesteps.
        changes: how much each output changes, mean over prompts.
        peak: the largest difference that two elements of a sample can have.
        folder: where the files are.
    """

    config: PABConfig
    proposal: Outcome
    budget: Budget
    measured_speedup: float | None
    tried: tuple[Outcome, ...]
    compared: tuple[Outcome, ...]
    front: tuple[Predicted, ...]
    shares: dict[str, float]
    probes: dict[str, tuple[float, ...]]
    windows: tuple[tuple[float, float], ...]
    changes: tuple[ModuleChanges, ...]
    peak: float
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """All of it but the changes, as JSON has it."""
        return {
            "config": self.config.as_json(),
            "budget": str(self.budget),
            "measured_speedup": self.measured_speedup,
            "proposal": self._outcome(self.proposal),
            "tried": [self._outcome(each) for each in self.tried],
            "compared": [self._outcome(each) for each in self.compared],
            "front": [[each.speedup, each.psnr, each.relative_l2] for each in self.front],
            "shares": self.shares,
            "probes": self.probes,
            "windows": self.windows,
            "folder": str(self.folder),
        }

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "label": outcome.label,
            "config": outcome.config.as_json(),
            "psnr": outcome.psnr(self.peak),
            "relative_l2": outcome.relative_l2,
            "speedup": outcome.speedup,
            "graphs": outcome.graphs,
            "room": outcome.room,
        }
