"""The schedule as people read it: a letter per step, for each rule that something goes by.

timestep   1000 900 ...
spatial    C    C   R C R ...      # C computes, R reuses, P does both: of several calls in a step some reuse
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from ..policy.config import ROLES
from ..policy.when import Rule, SkipRange, reused_calls

COMPUTE, REUSE, PARTLY = "C", "R", "P"

Source = Literal["known", "seen", "assumed"]
SOURCES = {
    "known": "the timesteps of the generation",
    "seen": "the timesteps seen so far",
    "assumed": "timesteps are not known: evenly spaced ones are assumed",
}


@dataclass(frozen=True)
class Strip:
    """What attentions or feed-forwards of one role and one rule do in each step.

    Args:
        role: their role.
        rule: the rule in words.
        modules: how many there are.
        steps: a letter per step: "C" computes, "R" reuses, "P" reuses in some of several calls in the step.
        computed: how many calls of each of them compute in all.
        reused: how many reuse.
    """

    role: str
    rule: str
    modules: int
    steps: str
    computed: int
    reused: int


@dataclass(frozen=True)
class Schedule:
    """What a generation computes and reuses.

    Args:
        timesteps: those of its steps.
        source: "known" if they were told, "seen" if they are those that were seen so far, "assumed" otherwise.
        strips: one for each role and rule.
    """

    timesteps: tuple[float, ...]
    source: Source
    strips: tuple[Strip, ...] = ()


@dataclass(frozen=True)
class Scheduled:
    """An attention or feed-forward that is broadcast, as far as the schedule goes.

    Args:
        name: its qualified name.
        role: its role.
        rule: when it reuses.
        calls: how often it is called in a step.
    """

    name: str
    role: str
    rule: Rule
    calls: int = 1


def schedule_of(modules: Iterable[Scheduled], timesteps: Sequence[float], source: Source) -> Schedule:
    """The schedule of these modules over these timesteps.

    Example:
        >>> modules = [Scheduled(f"blocks.{i}.attn", "spatial", SkipRange(2, 100, 800)) for i in range(3)]
        >>> schedule_of(modules, (900, 700, 600, 500), "known").strips[0].steps
        'CRCR'
    """
    names: dict[tuple[str, Rule, int], set[str]] = {}
    for each in modules:
        names.setdefault((each.role, each.rule, each.calls), set()).add(each.name)
    keys = sorted(names, key=lambda key: (ROLES.index(key[0]), in_words(key[1]), key[2]))
    return Schedule(tuple(timesteps), source, tuple(_strip(*key, len(names[key]), timesteps) for key in keys))


def _strip(role: str, rule: Rule, calls: int, modules: int, timesteps: Sequence[float]) -> Strip:
    reused = reused_calls(rule, [t for t in timesteps for _ in range(calls)])
    of_steps = [reused[i : i + calls] for i in range(0, len(reused), calls)]
    steps = "".join(REUSE if all(step) else PARTLY if any(step) else COMPUTE for step in of_steps)
    return Strip(role, in_words(rule), modules, steps, reused.count(False), reused.count(True))


def in_words(rule: Rule) -> str:
    """A rule for people; outside of the timesteps in brackets, every step computes.

    Example:
        >>> from pab_fx.policy.when import AfterTimesteps
        >>> in_words(SkipRange(3, 100, 800)), in_words(AfterTimesteps(((720.0, 2), (640.0, 2))))
        ('computed every 3rd step in (100, 800)', 'reused up to 2 steps after 720, 640')
    """
    if isinstance(rule, SkipRange):
        if rule.skip_range == 1:
            return "computed every step"
        return f"computed every {_ordinal(rule.skip_range)} step in ({rule.low:g}, {rule.high:g})"
    after: dict[int, list[str]] = {}
    for timestep, count in rule.skip_counts:
        after.setdefault(count, []).append(f"{timestep:g}")
    # up to: the next listed timestep computes anew
    said = (
        f"{'1 step' if count == 1 else f'up to {count} steps'} after {', '.join(listed)}"
        for count, listed in after.items()
    )
    return f"reused {'; '.join(said)}"


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def evenly_spaced(steps: int) -> tuple[float, ...]:
    """Timesteps for a generation of which none are known, from 1000 down.

    Example:
        >>> evenly_spaced(4)
        (1000.0, 750.0, 500.0, 250.0)
    """
    return tuple(1000.0 * (steps - i) / steps for i in range(steps))


class SeenTimesteps:
    """The timesteps of the generation that ran last: all of them where they are known, else those seen so far."""

    def __init__(self) -> None:
        self._known: tuple[float, ...] = ()
        self._seen: list[float] = []

    def see(self, t: float, known: Sequence[float] | None, is_first: bool) -> None:
        """Take note of a call of a graph at timestep `t`; `is_first` if a generation begins with it.

        Branches of guidance, and parts of a model that was captured in pieces, are called at one timestep.
        """
        if known is not self._known:
            self._known = tuple(known or ())
        if is_first and t not in self._seen[-1:]:
            self._seen.clear()
        if not self._seen or t < self._seen[-1]:
            self._seen.append(t)

    def timesteps(self, assumed: Sequence[float] = ()) -> tuple[tuple[float, ...], Source]:
        """The timesteps, and how they are known.

        Args:
            assumed: what to take where not all are known; default: those seen, or evenly spaced ones.
        """
        if self._known:
            return self._known, "known"
        seen = tuple(filter(isfinite, self._seen))
        return (seen, "seen") if seen and not assumed else (tuple(assumed) or evenly_spaced(20), "assumed")


def ruler(timesteps: Sequence[float], width: int) -> str:
    """The timesteps above a strip whose steps are `width` characters wide, as many as there is room for.

    Example:
        >>> print(ruler((900, 700, 500, 300), 2))
        900 500
    """
    line = ""
    for i, timestep in enumerate(timesteps):
        if not line or len(line) < i * width:
            line = line.ljust(i * width) + f"{timestep:.0f}"
    return line
