"""Lists of steps that compute: smooth ones, of a few numbers each, so that they do not follow single prompts.

A list is dense where its density is high. The density over a generation, from 0 to 1, is

    exp(late * (2 x - 1) + ends * cos(2 pi x))

so `late` above 0 computes more in late steps, and `ends` above 0 more at both ends than in the middle. A few steps at
the beginning, and the last one, may compute besides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..policy.when import Every, evenly_spaced, reused_calls

GRID = np.linspace(0, 1, 1001)


@dataclass(frozen=True)
class Shape:
    """The shape of a list; see the module."""

    warmup: int = 2
    cooldown: int = 0
    late: float = 0.0
    ends: float = 0.0

    def steps(self, count: int, of: int) -> tuple[int, ...] | None:
        """Those that compute, `count` of `of`; `None` where the shape has not that many.

        Example:
            >>> Shape().steps(5, of=14)
            (0, 1, 3, 7, 11)
        """
        inner, free = count - self.warmup - self.cooldown, of - self.warmup - self.cooldown
        if not 0 <= inner <= free:
            return None
        places = np.interp((np.arange(inner) + 0.5) / max(inner, 1), _quantiles(self.late, self.ends), GRID)
        between = {min(of - self.cooldown - 1, int(self.warmup + place * free)) for place in places}
        found = {*range(self.warmup), *between, *range(of - self.cooldown, of)}
        return tuple(sorted(found)) if len(found) == count else None

    def neighbours(self) -> Iterator[Shape]:
        """Shapes that differ from it in one number."""
        for name, least, most, by in (
            ("warmup", 1, 6, 1),
            ("cooldown", 0, 2, 1),
            ("late", -2, 2, 0.25),
            ("ends", -2, 2, 0.25),
        ):
            for change in (-by, by):
                value = getattr(self, name) + change
                if least <= value <= most:
                    yield replace(self, **{name: value})


@functools.lru_cache(maxsize=1024)
def _quantiles(late: float, ends: float) -> np.ndarray:
    density = np.exp(late * (2 * GRID - 1) + ends * np.cos(2 * np.pi * GRID))
    cumulated = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    found: np.ndarray = cumulated / cumulated[-1]
    return found


STARTS = tuple(itertools.starmap(Shape, itertools.product((1, 2, 4), (0, 1), (-0.5, 0.0, 0.5), (-0.5, 0.0, 0.5))))


@functools.lru_cache(maxsize=64)
def regular(of: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The lists of `Every(n, warmup, cooldown)`, by how many steps compute."""
    found: dict[int, dict[tuple[int, ...], None]] = {}
    for n, warmup, cooldown in itertools.product(range(2, of), (1, 2, 3), (0, 1)):
        plan = reused_calls(Every(n, warmup, cooldown), evenly_spaced(of))
        compute = tuple(step for step, reuse in enumerate(plan) if not reuse)
        found.setdefault(len(compute), {})[compute] = None
    return {count: tuple(lists) for count, lists in found.items()}


def best_list(
    count: int, of: int, errors: Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
) -> tuple[int, ...] | None:
    """The list of so many steps with the least error, among regular ones and smooth ones; `None` if there is none.

    Smooth ones are improved one number at a time, from the best of a coarse grid on.

    Args:
        count: how many steps compute.
        of: of how many.
        errors: for each list what is to be small.
    """
    known: dict[tuple[int, ...] | None, float] = {None: math.inf}

    def cost(shape: Shape) -> float:
        return known[shape.steps(count, of)]

    def find(lists: Iterable[tuple[int, ...] | None]) -> None:
        new = [each for each in dict.fromkeys(lists) if each is not None and each not in known]
        known.update(zip(new, errors(new), strict=True))

    find((*regular(of).get(count, ()), *(shape.steps(count, of) for shape in STARTS)))
    shape = min(STARTS, key=cost)
    for _ in range(12):
        neighbours = list(shape.neighbours())
        find(each.steps(count, of) for each in neighbours)
        nearest = min(neighbours, key=cost)
        if cost(nearest) >= cost(shape):
            break
        shape = nearest
    return min(known, key=known.__getitem__)
