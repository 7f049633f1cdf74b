"""Rules that go by a list, fixed before the run, of which steps compute; for other numbers of steps it is scaled."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .checks import check_integer, is_iterable, is_number
from .when import Progress, Rule, Step


class Listed(Rule):
    """A rule with a list of the steps that reuse, for each number of steps that a generation may have."""

    @property
    @abstractmethod
    def listed(self) -> int:
        """The number of steps that the list is for."""

    @abstractmethod
    def reusing(self, of: int) -> tuple[int, ...]:
        """The steps that reuse in a generation of that many steps."""

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """At the steps that are listed."""
        reusing = self.reusing(self.listed if step.of == math.inf else int(step.of))
        return sum(step.n == n for n in reusing) > 0

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """As `Rule.mismatch`: the number of steps is asked for, and is not known."""
        if timesteps:
            return None
        return (
            f"{self!r} lists {self.listed} steps, and how many steps the generation has is not known: that many are "
            "assumed. Pass timesteps=, such as scheduler.timesteps."
        )


@dataclass(frozen=True)
class Steps(Listed):
    """Compute at the listed steps and reuse at all others (cache-dit's step masks, BudCache's lists, arXiv 2606.13496).

    A generation of another number of steps computes the same share of them: step `i` of `s` does what step
    `round(i * (of - 1) / (s - 1))` of `of` does.

    Args:
        compute: numbers of the steps that compute, from 0; the first step computes anyway.
        of: how many steps the generation has that the list is for.

    Raises:
        ValueError: for steps that are none of `range(of)`.

    Example:
        >>> from pab_fx.policy.when import reused_calls
        >>> reused_calls(Steps((0, 1, 4), of=6), range(6, 0, -1))
        (False, False, True, True, False, True)
        >>> reused_calls(Steps((0, 1, 4), of=6), range(3, 0, -1))
        (False, True, True)
    """

    compute: tuple[int, ...]
    of: int

    def __post_init__(self) -> None:
        check_integer("Steps: of", self.of)
        given = tuple(self.compute) if is_iterable(self.compute) else (self.compute,)
        for step in given:
            check_integer("Steps: a step of compute", step, least=0, most=self.of - 1)
        object.__setattr__(self, "compute", tuple(sorted(set(given))))

    @property
    def listed(self) -> int:
        """The number of steps that the list is for."""
        return self.of

    def reusing(self, of: int) -> tuple[int, ...]:
        """The steps that reuse in a generation of that many steps."""
        return tuple(n for n, listed in enumerate(_nearest(self.of, of)) if n and listed not in self.compute)

    def describe(self) -> str:
        """The rule in words."""
        return f"computed in {len({0, *self.compute})} listed steps of {self.of}"


@dataclass(frozen=True)
class Magnitude(Listed):
    """Reuse while what is left out is small, by the known ratios of residuals from step to step (MagCache).

    From step `int(retention * steps + 0.5)` on, each step multiplies a product by its ratio and adds the product's
    distance from 1 to an error; it reuses while the error is at most `threshold` and at most `max_skips` steps in a row
    have reused. Otherwise it computes, and product, error and count start over
    (`diffusers/hooks/mag_cache.py`, arXiv 2506.09045). Nothing is measured in the run.

    Args:
        ratios: of the residuals' magnitudes, one for each step, of one checkpoint and sampler. A generation of another
            number of steps takes the nearest.
        threshold: of the error.
        max_skips: how many steps in a row reuse.
        retention: the share of steps at the beginning that compute.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> from pab_fx.policy.when import reused_calls
        >>> reused_calls(Magnitude((1.0, 1.0, 0.99, 0.98, 0.9, 0.9), 0.05, max_skips=2), range(6, 0, -1))
        (False, True, True, False, False, False)
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skips: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        given: Any = self.ratios
        given = given.tolist() if hasattr(given, "tolist") else given
        ratios = tuple(given) if is_iterable(given) else ()
        if not ratios or not all(is_number(ratio) and ratio >= 0 for ratio in ratios):
            raise ValueError(f"Magnitude: ratios must be numbers >= 0, one for each step, got {self.ratios!r}.")
        object.__setattr__(self, "ratios", ratios)
        if not is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"Magnitude: threshold must be a number >= 0, got {self.threshold!r}.")
        check_integer("Magnitude: max_skips", self.max_skips, least=0)
        if not is_number(self.retention) or not 0 <= self.retention <= 1:
            raise ValueError(f"Magnitude: retention must be a number from 0 to 1, got {self.retention!r}.")

    @property
    def listed(self) -> int:
        """The number of steps that the ratios are for."""
        return len(self.ratios)

    def reusing(self, of: int) -> tuple[int, ...]:
        """The steps that reuse in a generation of that many steps."""
        return _reusing_by_magnitude(self, of)

    def describe(self) -> str:
        """The rule in words."""
        return f"reused up to {self.max_skips} steps in a row, by {len(self.ratios)} ratios up to {self.threshold:g}"


def _nearest(listed: int, of: int) -> list[int]:
    """For each of `of` steps the nearest of `listed` ones, as `nearest_interp` in `diffusers/hooks/mag_cache.py`."""
    if of == 1:
        return [listed - 1]
    return torch.round(torch.arange(of, dtype=torch.float32) * ((listed - 1) / (of - 1))).long().tolist()


@lru_cache(maxsize=64)
def _reusing_by_magnitude(rule: Magnitude, of: int) -> tuple[int, ...]:
    """In float32, as the hooks accumulate: a threshold may lie on either side of a rounding."""
    given = torch.tensor(rule.ratios)
    ratios = given if of == rule.listed else given[_nearest(rule.listed, of)]
    return steps_of_small_change(ratios, rule.threshold, rule.max_skips, rule.retention)


def steps_of_small_change(ratios: torch.Tensor, threshold: float, max_skips: int, retention: float) -> tuple[int, ...]:
    """The steps that reuse by `Magnitude`'s rule, with a ratio for each; accumulated in the ratios' dtype.

    Example:
        >>> steps_of_small_change(torch.tensor([1.0, 1.0, 1.0, 0.5]), 0.1, max_skips=3, retention=0.25)
        (1, 2)
    """
    product: Any
    error: Any
    product, error, skips = 1.0, 0.0, 0
    reusing = []
    for n in range(int(retention * len(ratios) + 0.5), len(ratios)):
        product, skips = product * ratios[n], skips + 1
        error = error + abs(1.0 - product)
        if n and error <= threshold and skips <= max_skips:
            reusing.append(n)
        else:
            product, error, skips = 1.0, 0.0, 0
    return tuple(reusing)
