"""Generate with the most promising settings until the best one that keeps the budget is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..policy.policy import Policy
from .budget import Budget
from .forecasts import Forecasts
from .laboratory import Laboratory
from .lists import regular
from .prediction import fitted
from .result import Outcome, Tried
from .search import Predictions, Run, fastest, nearest
from .setting import Method, Setting
from .signals import Signalled, Threshold

DOUBTFUL = 2.0
"""By how many dB a setting may miss the budget on the prompts that are searched with, and the others yet decide."""

REFIT = 4
"""After how many tries it is fitted anew how much errors matter."""


@dataclass
class Judge:
    """Tells of settings whether they keep the budget, and remembers what was found.

    Args:
        laboratory: generates.
        budget: what is to be kept on the prompts that are searched with.
        on_held: what is to be kept on those held out.
        peak: the largest difference that two elements of a sample can have.
        margin: standard errors of the mean that are kept in reserve.
        forecasts: the errors of any setting.
        of: how many steps a generation has.

    Attributes:
        runs: what was found so far.
        tried: lists of steps among it, in order.
        signals: settings with a signal among it.
    """

    laboratory: Laboratory
    budget: Budget
    on_held: Budget
    peak: float
    margin: float
    forecasts: Forecasts
    of: int
    runs: list[Run] = field(default_factory=list)
    tried: dict[Setting, Tried] = field(default_factory=dict)
    signals: list[Tried] = field(default_factory=list)

    def probe(self, setting: Setting) -> None:
        """Generate with a setting to learn how much its errors matter."""
        self._remember("", setting, self.laboratory.outcome("probing", setting.policies))

    def try_(self, setting: Setting) -> Tried:
        """Generate with a setting, and learn from what is found."""
        found = self.tried[setting] = self._tried(setting.label, setting.policies)
        self._remember(setting.method.label, setting, found.searched, found.room)
        return found

    def try_signals(self, methods: Sequence[Signalled], tries: int) -> None:
        """Generate with methods that have a signal, so many thresholds of each, to be faster than the best list."""
        known = self._best_of(self.tried.values())
        if known is None:
            return
        most = 1 / self.budget.speedup if self.budget.speedup else known.searched.operations
        for method in methods:
            threshold = Threshold()
            for _ in range(tries):
                label, policies = f"{method.label}, threshold {threshold.next:.3g}", method.policies(threshold.next)
                found = self._tried(label, policies)
                self.signals.append(found)
                threshold.narrow(larger=found.searched.operations > most)

    def _tried(self, label: str, policies: tuple[Policy, ...]) -> Tried:
        """Generate; with the prompts held out too, if the budget is kept, or all but kept, with the others."""
        name = f"try {len(self.tried) + len(self.signals) + 1}"
        searched = replace(self.laboratory.outcome(name, policies), label=label)
        room = self._room(searched)
        if room < -DOUBTFUL:
            return Tried(searched, None, room)
        held = replace(self.laboratory.outcome(name, policies, on_held=True), label=label)
        return Tried(searched, held, self._room(held, self.on_held))

    def search(self, methods: Sequence[Method], tries: int) -> None:
        """Generate with settings, at most so many, until none is likely to be better than the best that is known."""
        for number in range(tries):
            if number % REFIT == 0:
                predictions = self.predictions()
            setting = self._next(predictions, methods)
            if setting is None:
                return
            self.try_(setting)

    def _next(self, predictions: Predictions, methods: Sequence[Method]) -> Setting | None:
        rooms = {setting: each.room for setting, each in self.tried.items()}
        if self.budget.speedup is not None:
            return nearest(predictions, methods, self.of, 1 / self.budget.speedup, self.runs, rooms)
        return fastest(predictions, methods, self.of, self.runs, rooms)

    def predictions(self) -> Predictions:
        """What is predicted of all settings, after what was found so far."""
        runs = [(run.errors, run.psnr) for run in self.runs if run.errors]
        return Predictions(self.forecasts, self.laboratory.costs, self.of, fitted(runs))

    def best(self) -> Tried:
        """The fastest setting that keeps the budget, or the nearest that is as fast as it says.

        Raises:
            RuntimeError: if none does, saying how near the most careful one was.
        """
        every = (*self.tried.values(), *self.signals)
        found = self._best_of(every)
        if found is not None:
            return found
        if self.budget.speedup is not None:
            raise RuntimeError(f"no setting leaves out so many operations, {self.budget}: ask for less.")
        if not every:
            raise RuntimeError(f"no setting is expected to keep the budget, {self.budget}: allow more.")
        nearest_ = max(every, key=lambda each: each.room)
        outcome = nearest_.held or nearest_.searched
        raise RuntimeError(
            f"no setting keeps the budget, {self.budget}, with {self.margin:g} standard errors in reserve. The "
            f"nearest has {outcome.psnr(self.peak):.2f} dB and a relative L2 of {outcome.relative_l2:.3g}: allow more, "
            "give more prompts, so that their mean is better known, or more effort."
        )

    def _best_of(self, every: Iterable[Tried]) -> Tried | None:
        keeping = [each for each in every if each.held is not None and each.room >= 0]
        if self.budget.speedup is None:
            return min(keeping, key=lambda each: (each.searched.operations, -each.room), default=None)
        fast = [each for each in keeping if each.searched.speedup >= self.budget.speedup - 1e-6]
        return max(fast, key=lambda each: each.room, default=None)

    def _room(self, outcome: Outcome, budget: Budget | None = None) -> float:
        return (budget or self.budget).room(outcome.differences, self.peak, self.margin)

    def _remember(self, label: str, setting: Setting, searched: Outcome, room: float | None = None) -> None:
        found = self._room(searched) if room is None else room
        errors = self.forecasts.errors(setting)
        self.runs.append(Run(label, errors, searched.operations, searched.psnr(self.peak), found))


def curves(predictions: Predictions, methods: Sequence[Method], of: int) -> dict[str, tuple[tuple[float, float], ...]]:
    """For each method what is predicted of its regular lists, the nearest of each length: speed-up and PSNR in dB."""
    found: dict[str, tuple[tuple[float, float], ...]] = {}
    for method in methods:
        points = []
        for lists in regular(of).values():
            setting = max((Setting(method, each, of) for each in lists), key=predictions.psnr)
            points.append((1 / predictions.operations(setting), predictions.psnr(setting)))
        found[method.label] = tuple(sorted(point for point in points if not math.isinf(point[1])))
    return found
