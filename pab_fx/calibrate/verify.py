"""Generate with the most promising settings until the fastest one that keeps the budget is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..policy.config import PABConfig
from .budget import Budget
from .changes import ModuleChanges
from .laboratory import Laboratory
from .prediction import CostModel, ErrorModel
from .result import Outcome
from .search import next_try
from .settings import Setting, config_of, graphs_of, reused_modules


@dataclass(frozen=True)
class Judge:
    """Tells of settings what they do to the samples, how fast they are, and whether they keep the budget.

    Args:
        laboratory: generates.
        budget: what is to be kept.
        peak: the largest difference that two elements of a sample can have.
        margin: standard errors of the mean that are kept in reserve.
        costs: predicts speed-ups.
        changes: the modules that there are.
    """

    laboratory: Laboratory
    budget: Budget
    peak: float
    margin: float
    costs: CostModel
    changes: Sequence[ModuleChanges]

    def outcome(self, label: str, config: PABConfig) -> Outcome:
        """Generate with a setting."""
        differences = self.laboratory.differences(config, label)
        return Outcome(
            label=label,
            config=config,
            differences=differences,
            speedup=self.costs.speedup_of(reused_modules(config, self.changes)),
            graphs=graphs_of(config, self.changes),
            room=self.budget.room(differences, self.peak, self.margin),
        )

    def search(
        self, settings: Sequence[Setting], errors: ErrorModel, base: PABConfig, tries: int
    ) -> tuple[Outcome, ...]:
        """Generate with settings of the front, at most so many, until the fastest that keeps the budget is known."""
        predicted = [self.budget.room(errors.differences(each), self.peak, self.margin) for each in settings]
        tried: dict[int, Outcome] = {}
        for number in range(1, tries + 1):
            i = next_try(predicted, {i: outcome.room for i, outcome in tried.items()})
            if i is None:
                break
            tried[i] = self.outcome(f"try {number}", config_of(errors.groups, settings[i], base))
        return tuple(tried.values())

    def best(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The fastest that keeps the budget.

        Raises:
            RuntimeError: if none does, saying how near the most careful one was.
        """
        keeping = [outcome for outcome in outcomes if outcome.room >= 0]
        if keeping:
            return max(keeping, key=lambda outcome: outcome.speedup)
        nearest = max(outcomes, key=lambda outcome: outcome.room, default=None)
        told = ""
        if nearest is not None:
            psnr, relative_l2 = nearest.psnr(self.peak), nearest.relative_l2
            told = f" the nearest of {len(outcomes)} has {psnr:.2f} dB and a relative L2 of {relative_l2:.3g};"
        raise RuntimeError(
            f"no setting keeps the budget, {self.budget}, with {self.margin:g} standard errors in reserve:{told} "
            "allow more, give more prompts (their mean is then better known), or more tries."
        )
