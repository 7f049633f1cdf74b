"""When to reuse: pure functions of a rule, the call counter and the timestep. Nothing here knows a graph.

One rule governs one attention or feed-forward. Of the state it is given, `n` is the number of calls of the
module since the last reset, `t` the current timestep on the scheduler's scale, and `until` the last call
that may reuse what is kept (`NEVER` where nothing is).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

NEVER = -math.inf
"""`until` of a module that keeps nothing."""

END = -math.inf
"""The timestep that follows the last one of a generation."""


@dataclass(frozen=True)
class SkipRange:
    """Compute every `skip_range`-th call and reuse between, inside the open timestep window `(low, high)`.

    The rule of the paper's section 3.2 as `diffusers/hooks/pyramid_attention_broadcast.py` spells it.
    """

    skip_range: int
    low: float
    high: float

    def reuses(self, n: int, t: float, until: float) -> bool:
        """Whether call `n` at timestep `t` reuses the kept output.

        Example:
            >>> [SkipRange(2, 100, 800).reuses(n, t, math.inf) for n, t in enumerate((700, 600, 500, 50))]
            [False, True, False, False]
        """
        return 0 < n <= until and self.low < t < self.high and n % self.skip_range != 0

    def lifetime(self, t: float) -> float:
        """For how many calls an output computed at timestep `t` may be reused."""
        return math.inf

    def keeps(self, n: int, t: float, until: float, next_t: float | None) -> bool:
        """Whether call `n + 1` may reuse what call `n` leaves, which therefore has to be kept.

        Args:
            next_t: timestep of the next call, `END` after the last one, `None` where it is not known:
                timesteps never rise within a generation, so it is then taken to be at most `t`.
        """
        if (n + 1) % self.skip_range == 0:
            return False
        if next_t is None:
            return t > self.low
        return self.low < next_t < self.high


@dataclass(frozen=True)
class ComputeAndKeep(SkipRange):
    """Compute in every call and hand on what it leaves, for somebody to compare it with what other calls leave."""

    skip_range: int = 1
    low: float = 0.0
    high: float = 0.0

    def keeps(self, n: int, t: float, until: float, next_t: float | None) -> bool:
        """Always, also after the last call; arguments as for `SkipRange.keeps`."""
        return True


@dataclass(frozen=True)
class AfterTimesteps:
    """Compute at each listed timestep and reuse for the given number of calls after it: `((720.0, 2), ...)`.

    The rule of VideoSys' `mlp_broadcast` for feed-forwards.
    """

    skip_counts: tuple[tuple[float, int], ...]

    def reuses(self, n: int, t: float, until: float) -> bool:
        """Whether call `n` at timestep `t` reuses the kept output.

        Example:
            >>> rule = AfterTimesteps(((700.0, 2),))
            >>> [rule.reuses(n, t, 0 + rule.lifetime(700)) for n, t in enumerate((700, 600, 500, 400))]
            [False, True, True, False]
        """
        return 0 < n <= until and not self.lifetime(t)

    def lifetime(self, t: float) -> float:
        """For how many calls an output computed at timestep `t` may be reused: 0 unless `t` is listed."""
        return max((count for listed, count in self.skip_counts if listed == t), default=0)

    def keeps(self, n: int, t: float, until: float, next_t: float | None) -> bool:
        """Whether call `n + 1` may reuse what call `n` leaves; arguments as for `SkipRange.keeps`."""
        return n < until and (next_t is None or (next_t != END and not self.lifetime(next_t)))


Rule = SkipRange | AfterTimesteps


def checked_timesteps(timesteps: Any) -> tuple[float, ...]:
    """The timesteps of a whole generation, as they were given.

    Args:
        timesteps: numbers on the scheduler's scale, or tensors, in the order of the steps.

    Raises:
        ValueError: if they are no such numbers.

    Example:
        >>> checked_timesteps([900, 600, 300])
        (900.0, 600.0, 300.0)
    """
    listed = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise ValueError(
            f"timesteps must be those of a whole generation, such as scheduler.timesteps, got {timesteps!r}."
        )
    listed = [t.item() if hasattr(t, "item") else t for t in listed]
    for t in listed:
        if not isinstance(t, Real) or isinstance(t, bool) or not math.isfinite(t):
            raise ValueError(f"timesteps must be numbers on the scheduler's scale, 0 to 1000, got {t!r}.")
    return tuple(map(float, listed))


def reused_calls(rule: Rule, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """The plan of a whole generation: for each timestep, whether the rule reuses there.

    Args:
        timesteps: one per call of the module, in the order of the generation.

    Example:
        >>> reused_calls(SkipRange(3, 100, 800), (900, 700, 600, 500, 400, 50))
        (False, True, True, False, True, False)
    """
    plan, until = [], NEVER
    for n, t in enumerate(timesteps):
        reuse = rule.reuses(n, t, until)
        if not reuse:
            until = n + rule.lifetime(t)
        plan.append(reuse)
    return tuple(plan)
