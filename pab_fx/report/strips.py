"""The schedule as people read it: a letter per step, for each rule that something goes by.

timestep   1000 900 ...
spatial    C    C   R C R ...      # C computes, R reuses, P does both: of several calls in a step some reuse;
                                   # S is skipped with the part that it lies in
blocks     C    ?   ? ? ? ...      # ? does either, as what its rule looks at has changed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..policy.when import Rule, reused_calls
from ..policy.where import ROLES
from ..run.clock import Source

COMPUTE, REUSE, PARTLY, SKIPPED, EITHER = "C", "R", "P", "S", "?"

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
        steps: a letter per step: "C" computes, "R" reuses, "P" reuses in some of several calls in the step, "S" is
            skipped with the part that it lies in, "?" computes or reuses by what its rule looks at.
        computed: how many calls of each of them compute in all, at least.
        reused: how many reuse, at most.
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
        how: how it is read, in words; "" for as it was kept.
        outer: the rules of the parts in which it lies, the outermost first.
    """

    name: str
    role: str
    rule: Rule
    calls: int = 1
    how: str = ""
    outer: tuple[Rule, ...] = ()


def schedule_of(modules: Iterable[Scheduled], timesteps: Sequence[float], source: Source) -> Schedule:
    """The schedule of these modules over these timesteps.

    Example:
        >>> modules = [Scheduled(f"blocks.{i}.attn", "spatial", SkipRange(2, 100, 800)) for i in range(3)]
        >>> schedule_of(modules, (900, 700, 600, 500), "known").strips[0].steps
        'CRCR'
    """
    names: dict[tuple[str, Rule, int, str, tuple[Rule, ...]], set[str]] = {}
    for each in modules:
        names.setdefault((each.role, each.rule, each.calls, each.how, each.outer), set()).add(each.name)
    keys = sorted(names, key=lambda key: (ROLES.index(key[0]), key[1].describe(), key[2], key[3]))
    return Schedule(tuple(timesteps), source, tuple(_strip(*key, len(names[key]), timesteps) for key in keys))


def _strip(
    role: str,
    rule: Rule,
    calls: int,
    how: str,
    outer: tuple[Rule, ...],
    modules: int,
    timesteps: Sequence[float],
) -> Strip:
    rests = (False,) * len(timesteps)
    for each in outer:
        around = reused_calls(each, timesteps, rests=rests)
        rests = tuple(a or b for a, b in zip(rests, around, strict=True))
    reused = reused_calls(rule, timesteps, calls, rests)
    letters = []
    for i, is_skipped in enumerate(rests):
        step = reused[i * calls : (i + 1) * calls]
        known = REUSE if rule.signal is None else EITHER
        letters.append(SKIPPED if is_skipped else known if all(step) else PARTLY if any(step) else COMPUTE)
    words = ", ".join(filter(None, (rule.describe(), how)))
    computed = len(reused) - sum(reused) - calls * sum(rests)
    return Strip(role, words, modules, "".join(letters), computed, sum(reused))


def ruler(timesteps: Sequence[float], width: int) -> str:
    """The timesteps above a strip whose steps are `width` characters wide, as many as there is room for.

    Example:
        >>> print(ruler((900, 700, 500, 300), 2))
        900 500
        >>> print(ruler((1.0, 0.9, 0.7, 0.3), 3))
        1.00  0.70
    """
    line = ""
    digits = 2 if max(map(abs, timesteps), default=0) <= 1 else 0  # of models whose timesteps are the noise level
    for i, timestep in enumerate(timesteps):
        if not line or len(line) < i * width:
            line = line.ljust(i * width) + f"{timestep:.{digits}f}"
    return line
