"""Which setting to generate with next: the one that is expected to gain most, after what was found so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

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


DOUBT, LEAST_DOUBT = 6.0, 2.0
"""The standard error of what is expected, in dB: of a setting like which none was tried, and of one like many."""

LEAST_GAIN = 0.004
"""A setting that is expected to save a smaller share of the operations is not worth a generation."""


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
        """By how much it is expected to keep the budget, and the standard error of that, in dB.

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
        return expected, LEAST_DOUBT + (DOUBT - LEAST_DOUBT) / (1 + 2 * near)

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
) -> Setting | None:
    """The setting that is expected to gain most: what it saves beyond the best one known, if it keeps the budget.

    So a setting that saves much is tried although it may not keep the budget, and one that saves little if it is likely
    to. `None` if none is worth a generation.

    Args:
        predictions: of this calibration.
        methods: to choose from.
        of: how many steps a generation has.
        runs: what was found so far.
        tried: the room that settings have left.
    """
    known = [predictions.operations(each) for each, room in tried.items() if room >= 0]
    most = min(known, default=1.0)

    def gain(setting: Setting) -> float:
        likely = NormalDist(*predictions.room(setting, runs))
        return (most - predictions.operations(setting)) * (1 - likely.cdf(0))

    def keeps(setting: Setting, reserve: int) -> bool:
        expected, standard_error = predictions.room(setting, runs)
        return expected >= reserve * standard_error

    found: dict[Setting, float] = {}
    for method, reserve in itertools.product(methods, (-1, 0, 1)):
        setting = _least(partial(predictions.best, method), partial(keeps, reserve=reserve), of)
        while setting is not None and setting in tried:
            setting = predictions.best(method, len(setting.compute) + 1)
        if setting is not None:
            found[setting] = gain(setting)
    best = max(found, key=found.__getitem__, default=None)
    return None if best is None or found[best] < LEAST_GAIN else best


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
