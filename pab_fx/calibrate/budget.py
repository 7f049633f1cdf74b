"""How much a setting may change the samples, and whether what was measured holds that for prompts yet to come."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .samples import Difference

MOST_PSNR = 100.0
"""In dB; samples that are equal, or all but equal, are taken to have that much."""

FORMS = "'psnr>=35' (dB), 'relative_l2<=0.05', or both, 'psnr>=35, relative_l2<=0.05'; or 'speedup>=3'"


@dataclass(frozen=True)
class Budget:
    """The most that samples may differ from those without a cache, in the mean over prompts; or the least speed-up.

    Args:
        psnr: the least peak signal-to-noise ratio, in dB; a number, or one for each prompt of the calibration.
        relative_l2: the largest `norm(sample - reference) / norm(reference)`; likewise.
        speedup: how many times fewer floating-point operations, above 1: then the nearest such setting is looked for,
            and there is no other limit.

    Raises:
        ValueError: if none is given, one is no number above 0, or a speed-up comes with another limit or is at most 1.

    Example:
        >>> Budget.of("psnr>=35")
        Budget(psnr=35.0, relative_l2=None, speedup=None)
    """

    psnr: float | tuple[float, ...] | None = None
    relative_l2: float | tuple[float, ...] | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.psnr is None and self.relative_l2 is None and self.speedup is None:
            raise ValueError(f"a budget needs a limit: {FORMS}.")
        if self.speedup is not None and (self.psnr is not None or self.relative_l2 is not None):
            raise ValueError(f"a budget is a limit of the error, or of the speed-up, and not of both: {FORMS}.")
        for name in ("psnr", "relative_l2", "speedup"):
            limit = getattr(self, name)
            for value in limit if isinstance(limit, tuple) else () if limit is None else (limit,):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise ValueError(f"budget: {name} must be a number above 0, got {value!r}.")
        if self.speedup is not None and self.speedup <= 1:
            raise ValueError(f"budget: speedup must be above 1, got {self.speedup!r}.")

    @classmethod
    def of(cls, given: Any) -> Budget:
        """A budget as it is, or from text such as `"psnr>=35"`.

        Raises:
            ValueError: for anything else, with the forms there are.
        """
        if isinstance(given, cls):
            return given
        limits: dict[str, float] = {}
        for part in given.split(",") if isinstance(given, str) else [""]:
            found = re.fullmatch(
                r"\s*(?:(psnr|speedup)\s*>=|(relative_l2)\s*<=)\s*([0-9.]+(?:e-?\d+)?)\s*(?:dB|x)?\s*", part
            )
            if found is None or (found[1] or found[2]) in limits:
                raise ValueError(f"budget={given!r}: cannot read {part.strip()!r}; write {FORMS}.")
            limits[found[1] or found[2]] = float(found[3])
        return cls(**limits)

    @classmethod
    def like(cls, differences: Sequence[Difference], peak: float = 1.0) -> Budget:
        """What a setting has used, prompt by prompt: for one that is to be no worse."""
        return cls(
            tuple(min(each.psnr(peak), MOST_PSNR) for each in differences),
            tuple(max(each.relative_l2, 1e-12) for each in differences),
        )

    def room(self, differences: Sequence[Difference], peak: float = 1.0, margin: float = 0.0) -> float:
        """How much worse the samples might be, in dB; below 0 if it is not kept. The PSNR if it has no limit.

        Args:
            differences: of the samples of a setting, one for each prompt.
            peak: the largest difference that two elements of a sample can have.
            margin: standard errors of the mean by which it is made worse. The prompts of a calibration are some of
                many, and with others the mean is another: beyond 2 standard errors for one choice in 40.

        Example:
            >>> samples = [Difference(squared=0.0001, norm=1.0, size=1)]
            >>> round(Budget(psnr=35.0).room(samples), 6)
            5.0
        """
        rooms = []
        if self.speedup is not None:
            rooms.append(statistics.fmean(min(each.psnr(peak), MOST_PSNR) for each in differences))
        if self.psnr is not None:
            found = [min(each.psnr(peak), MOST_PSNR) for each in differences]
            above = [a - b for a, b in zip(found, _each(self.psnr, found), strict=True)]
            rooms.append(statistics.fmean(above) - margin * _standard_error(above))
        if self.relative_l2 is not None:
            found = [each.relative_l2 for each in differences]
            rooms.append(-20 * math.log10(max(_ratio(found, _each(self.relative_l2, found), margin), 1e-9)))
        return min(rooms)

    def mean(self, name: str) -> float | None:
        """A limit by its name; the mean, if each prompt has its own."""
        limit = getattr(self, name)
        return statistics.fmean(limit) if isinstance(limit, tuple) else limit

    def __str__(self) -> str:
        psnr, relative_l2 = self.mean("psnr"), self.mean("relative_l2")
        if self.speedup is not None:
            return f"speed-up >= {self.speedup:g}x"
        parts = [] if psnr is None else [f"PSNR >= {psnr:.2f} dB"]
        parts += [] if relative_l2 is None else [f"relative L2 <= {relative_l2:.4g}"]
        return " and ".join(parts)


def _each(limit: float | tuple[float, ...], found: Sequence[float]) -> tuple[float, ...]:
    """The limit of each prompt."""
    return limit if isinstance(limit, tuple) else (limit,) * max(len(found), 1)


def _ratio(found: Sequence[float], limits: Sequence[float], margin: float) -> float:
    """The ratio of two means, and standard errors on top: of what is left once each limit is taken times that ratio.

    So what is difficult for any setting, a prompt with large errors under both, makes nothing uncertain.
    """
    limit = statistics.fmean(limits)
    ratio = statistics.fmean(found) / limit
    return ratio + margin * _standard_error([a - ratio * b for a, b in zip(found, limits, strict=True)]) / limit


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
