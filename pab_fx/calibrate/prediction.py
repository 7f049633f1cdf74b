"""How far samples of a setting will be from those without a cache, and what it costs.

How much an error in a step matters for the sample is fitted to what settings have done to samples:

    PSNR of the samples  =  -10 log10(squared error) * slope
    squared error        =  sum over parts and pairs of steps (i, j) of  w[i] * w[j] * (error[i] . error[j])
    w[i]                 =  exp(a + b * step + c), a and b for each kind of part, c in the last step alone

What is wrong in the last step is in the sample as it is, where a model corrects what was wrong in others. The slope is
above 1 where a large error grows on its way through the steps that follow: a sample becomes another one. A line, not a
polynomial of a higher degree: that explains better what was found, and predicts worse what was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from .forecasts import Errors, plans
from .setting import Setting
from .trajectory import Trajectory


@dataclass(frozen=True)
class Sensitivity:
    """How much errors matter, by the kind of part and the step; fitted to what settings have done.

    Args:
        weights: for each kind the coefficients of the polynomial, the highest power first.
        level: the polynomial of a kind of which nothing is known, a constant.
        last: what the logarithm of the weight is greater by in the last step.
        slope: by how many dB samples are worse where errors are worse by one.
    """

    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    level: float = 0.0
    last: float = 0.0
    slope: float = 1.0

    def psnr(self, errors: Errors) -> float:
        """The predicted mean over prompts, in dB; infinite where nothing reuses."""
        squared = 0.0
        for kind, places, products in errors:
            weights = np.exp(np.polyval(self.weights.get(kind, (self.level,)), places) + self.last * (places == 1))
            squared += float(weights @ products @ weights)
        return -10 * math.log10(squared) * self.slope if squared > 0 else math.inf


def fitted(runs: Sequence[tuple[Errors, float]]) -> Sensitivity:
    """What explains best what was found, in dB; where little was found, all steps matter alike.

    Args:
        runs: the errors of settings, and the PSNR of their samples in dB.
    """
    kinds = sorted({kind for errors, _ in runs for kind, _, _ in errors})
    if not kinds:
        return Sensitivity()

    def sensitivity(numbers: np.ndarray) -> Sensitivity:
        (level, last), slope, lines = numbers[:2], math.exp(numbers[2]), numbers[3:].reshape(len(kinds), 2)
        weights = {kind: (line[0], level + line[1]) for kind, line in zip(kinds, lines, strict=True)}
        return Sensitivity(weights, level, last, slope)

    def residuals(numbers: np.ndarray) -> np.ndarray:
        model = sensitivity(numbers)
        off = [model.psnr(errors) - psnr for errors, psnr in runs]
        return np.concatenate([off, np.array([*UNLIKELY, *LINE * len(kinds)]) * numbers[1:]])

    start = np.zeros(3 + 2 * len(kinds))
    flat = Sensitivity()
    start[0] = float(np.mean([flat.psnr(errors) - psnr for errors, psnr in runs])) * math.log(10) / 20
    return sensitivity(least_squares(residuals, start, loss="soft_l1", f_scale=3.0, max_nfev=60).x)


UNLIKELY, LINE = (0.1, 3.0), (1.0, 0.1)
"""How many dB speak against a last step of weight e and a slope of e; a line that rises by 2, and one higher by 1."""


@dataclass(frozen=True)
class Costs:
    """What share of a generation's floating-point operations is left.

    Args:
        shares: of each role, of a step that reuses nothing; of parts that lie in others too.
        calls: of each role, how many calls a generation makes.
    """

    shares: Mapping[str, float]
    calls: Mapping[str, int]

    def left(self, reused: Mapping[str, int]) -> float:
        """The share that is left where so many calls of each role reuse.

        Example:
            >>> Costs({"blocks": 0.9}, {"blocks": 50}).left({"blocks": 25})
            0.55
        """
        spared = sum(self.shares.get(role, 0.0) * count / self.calls[role] for role, count in reused.items() if count)
        return max(1 - spared, 1e-3)

    def predicted(self, setting: Setting, parts: Sequence[Trajectory]) -> float:
        """The share that is left under a setting, of these pooled parts."""
        of_role: dict[str, list[bool | None]] = {}
        for part, planned in zip(parts, plans(setting, parts), strict=True):
            of_role.setdefault(part.role, []).extend(planned[1] if planned else (False,) * len(part.timesteps))
        return max(
            1 - sum(self.shares.get(role, 0.0) * plan.count(True) / len(plan) for role, plan in of_role.items()), 1e-3
        )
