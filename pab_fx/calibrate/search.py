"""Which setting to generate with next: the fastest that is expected to keep the budget, after what was found so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .forecasts import Errors, Forecasts
from .lists import best_list
from .prediction import Costs, Sensitivity
from .setting import Method, Setting


@dataclass(frozen=True)
class Run:
    """What was found of a setting.

    Args:
        label: of its method; "" for a probe.
        errors: what its reads are off by.
        operations: the share that is left.
        psnr: of the prompts that are searched with, in dB.
        room: by how much it keeps the budget, in dB; see `Tried`.
    """

    label: str
    errors: Errors
    operations: float
    psnr: float
    room: float


DOUBT = 4.0
"""By how many dB a setting may be nearer than expected, if none like it was tried."""


class Predictions:
    """Settings with the least predicted error, and what is expected of them.

    Args:
        forecasts: the errors of any setting.
        costs: what each role costs.
        of: how many steps a generation has.
        sensitivity: how much errors matter.
    """

    def __init__(self, forecasts: Forecasts, costs: Costs, of: int, sensitivity: Sensitivity) -> None:
        self._forecasts, self._costs, self._of, self._sensitivity = forecasts, costs, of, sensitivity
        self._best: dict[tuple[Method, int], Setting | None] = {}

    def best(self, method: Method, count: int) -> Setting | None:
        """The method with the list of so many steps that has the least predicted error."""
        if (method, count) not in self._best:
            compute = best_list(count, self._of, lambda lists: self._errors(method, lists))
            self._best[method, count] = None if compute is None else Setting(method, compute, self._of)
        return self._best[method, count]

    def psnr(self, setting: Setting) -> float:
        """In dB, from the trajectories and what settings have done to samples."""
        return self._sensitivity.psnr(self._forecasts.errors(setting))

    def operations(self, setting: Setting) -> float:
        """The share of operations that is left."""
        return self._costs.predicted(setting, self._forecasts.parts)

    def room(self, setting: Setting, runs: Iterable[Run]) -> tuple[float, float]:
        """By how much it is expected to keep the budget, in dB, and how much more it may be.

        A prediction is off by about as much as those were that are near it: of the same method, with about as many
        operations. Where none is near, it is the more in doubt.
        """
        operations = self.operations(setting)
        weights = off = near = 0.0
        for run in runs:
            predicted = self._sensitivity.psnr(run.errors)
            if math.isinf(predicted):
                continue
            likeness = 0.02 if not run.label else 1.0 if run.label == setting.method.label else 0.1
            weight = likeness * math.exp(-abs(run.operations - operations) / 0.05) + 1e-6
            weights, off = weights + weight, off + weight * (run.room - predicted)
            near += weight if run.label == setting.method.label else 0.0
        expected = self.psnr(setting) + (off / weights if weights else 0.0)
        return expected, DOUBT / (1 + 2 * near)

    def _errors(self, method: Method, lists: Sequence[tuple[int, ...]]) -> list[float]:
        settings = [Setting(method, each, self._of) for each in lists]
        self._forecasts.prepare(settings)
        return [-self.psnr(each) for each in settings]


def fastest(
    predictions: Predictions,
    methods: Sequence[Method],
    of: int,
    runs: Sequence[Run],
    tried: Mapping[Setting, float],
    hope: float = 1.0,
) -> Setting | None:
    """The setting of the fewest operations that is expected to keep the budget, and was not tried yet.

    It has fewer than the best of those that were tried and keep it; `None` if there is none such.

    Args:
        predictions: of this calibration.
        methods: to choose from.
        of: how many steps a generation has.
        runs: what was found so far.
        tried: the room that settings have left.
        hope: how much of the doubt about a setting counts in its favour.
    """
    known = [predictions.operations(each) for each, room in tried.items() if room >= 0]
    most = min(known, default=1.0)

    def keeps(setting: Setting) -> bool:
        expected, doubt = predictions.room(setting, runs)
        return expected + hope * doubt >= 0

    found: list[tuple[float, Setting]] = []
    for method in methods:
        setting = _least(lambda count, m=method: predictions.best(m, count), keeps, of)  # type: ignore[misc]
        while setting is not None and setting in tried:
            setting = predictions.best(method, len(setting.compute) + 1)
        if setting is not None and predictions.operations(setting) < most - 1e-9:
            found.append((predictions.operations(setting), setting))
    return min(found, key=lambda each: each[0])[1] if found else None


def _least(setting_of: Callable[[int], Setting | None], keeps: Callable[[Setting], bool], of: int) -> Setting | None:
    """The setting of the fewest steps that keeps a budget, by bisection: more steps are taken to be nearer."""
    low, high, found = 1, of, None
    while high - low > 1:
        middle = (low + high) // 2
        setting = setting_of(middle)
        if setting is not None and keeps(setting):
            high, found = middle, setting
        else:
            low = middle
    return found


def nearest(
    predictions: Predictions,
    methods: Sequence[Method],
    of: int,
    operations: float,
    runs: Sequence[Run],
    tried: Mapping[Setting, float],
) -> Setting | None:
    """The setting that is expected to be nearest, of those with at most so many operations that were not tried yet.

    Args:
        operations: the share that may be left.
        predictions, methods, of, runs, tried: as for `fastest`.
    """
    found: list[tuple[float, Setting]] = []
    for method in methods:
        setting = predictions.best(method, _most_steps(predictions, method, of, operations))
        if setting is not None and setting not in tried:
            found.append((sum(predictions.room(setting, runs)), setting))
    best = max(tried.values(), default=-math.inf)
    expected, setting = max(found, key=lambda each: each[0], default=(-math.inf, None))
    return setting if expected > best else None


def _most_steps(predictions: Predictions, method: Method, of: int, operations: float) -> int:
    """The most steps that may compute: of lists as long as each other, as many operations are left."""
    for count in range(of - 1, 0, -1):
        if predictions.operations(Setting(method, tuple(range(count)), of)) <= operations:
            return count
    return 0
