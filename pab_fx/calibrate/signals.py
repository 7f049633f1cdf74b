"""Settings that go by a signal, tried beside the best list of steps: thresholds by bisection.

What a signal decides differs from prompt to prompt, so it is not predicted. It is proposed only where it beats the
best list that was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..policy.change import Change
from ..policy.how import RatedResidual, Residual, Taylor
from ..policy.policy import Policy
from ..policy.where import BLOCKS, MODEL, Blocks, Model

BOUNDS = (0.003, 1.0)
"""Between which thresholds one is looked for."""


@dataclass(frozen=True)
class Signalled:
    """A method with a signal.

    Args:
        label: what it is called.
        policies: with a threshold.
    """

    label: str
    policies: Callable[[float], tuple[Policy, ...]]


def signalled(roles: Collection[str]) -> Sequence[Signalled]:
    """The methods with a signal that suit a model in which parts of these roles were found."""

    def first_block(threshold: float) -> tuple[Policy, ...]:
        rule = Change(Blocks(0, 1), threshold, warmup=2)
        return (Policy(Blocks(first=1), rule, Taylor(1, of=Residual())),)

    def easy_cache(threshold: float) -> tuple[Policy, ...]:
        rule = Change(Model(), threshold, accumulate=True, by_rate=True, warmup=2)
        return (Policy(Model(), rule, RatedResidual()),)

    known = {BLOCKS: Signalled("first block, order 1", first_block), MODEL: Signalled("EasyCache", easy_cache)}
    return [method for role, method in known.items() if role in roles]


class Threshold:
    """The largest threshold that keeps a limit, by bisection of its logarithm.

    Example:
        >>> threshold = Threshold()
        >>> for _ in range(20):
        ...     threshold.narrow(threshold.next <= 0.1)
        >>> round(threshold.next, 3)
        0.1
    """

    def __init__(self) -> None:
        self._low, self._high = BOUNDS

    @property
    def next(self) -> float:
        """What to try."""
        return math.sqrt(self._low * self._high)

    def narrow(self, larger: bool) -> None:
        """Go on with larger ones, or with smaller ones."""
        self._low, self._high = (self.next, self._high) if larger else (self._low, self.next)
