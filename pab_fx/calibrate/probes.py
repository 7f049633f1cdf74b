"""Settings that show how much errors matter: one kind of part reuses in one stretch of steps alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..policy.how import Last, Residual, Taylor
from ..policy.where import ATTENTION_ROLES, BLOCKS, MLP, MODEL, Attentions, Blocks, FeedForwards, Model, Where
from .setting import Method, Part, Setting


@dataclass(frozen=True)
class Effort:
    """How much a calibration may generate.

    Args:
        generations: of each prompt, at most.
        stretches: in how many stretches of steps each kind of part is probed.
        kinds: how many kinds are probed, blocks first.
        thresholds: how many thresholds are tried of each method with a signal.
    """

    generations: int
    stretches: int
    kinds: int
    thresholds: int


EFFORTS = {"low": Effort(15, 2, 1, 0), "medium": Effort(40, 3, 3, 4), "high": Effort(150, 5, 3, 8)}


def probes(roles: Collection[str], of: int, effort: Effort) -> list[Setting]:
    """The settings of the probes.

    Args:
        roles: of the parts that were found.
        of: how many steps a generation has.
        effort: how many are wanted.
    """
    has_attentions = any(role in roles for role in ATTENTION_ROLES)
    kinds: list[Where] = [Blocks()] if BLOCKS in roles else []
    kinds += [Attentions()] if has_attentions else []
    kinds += [Model()] if MODEL in roles else []
    found = []
    for where, stretch in itertools.product(kinds[: effort.kinds], stretches(of, effort.stretches)):
        how = Taylor(1, of=Last() if isinstance(where, Attentions) else Residual())
        inside = (Part(FeedForwards(), how),) if isinstance(where, Attentions) and MLP in roles else ()
        found.append(Setting(Method("probe", (Part(where, how), *inside)), _computing(stretch, of), of))
    return found


def stretches(of: int, count: int) -> Sequence[tuple[int, int]]:
    """The steps from the third on, in up to `count` stretches `(begin, end)` of two steps at least.

    Example:
        >>> stretches(50, 3)
        [(2, 18), (18, 34), (34, 50)]
    """
    count = max(1, min(count, (of - 2) // 2))
    edges = [2 + round(i * (of - 2) / count) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _computing(stretch: tuple[int, int], of: int) -> tuple[int, ...]:
    """All steps but those of a stretch, and every third one of these."""
    begin, end = stretch
    return tuple(step for step in range(of) if not begin <= step < end or (step - begin) % 3 == 0)
