"""The settings that are fastest for their predicted error, and which of them to try next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Choice = tuple[int, ...]
"""For each group the number of its option."""


def front(
    products: np.ndarray, scales: Sequence[np.ndarray], saved: Sequence[np.ndarray], count: int = 200
) -> list[Choice]:
    """Choices along the front of time saved against predicted error, from the most careful to the fastest.

    Minimises `weight * error - saved` for many weights: one group after the other takes its best option given those
    of the others, until none changes (coordinate descent). That finds the corners of the front's convex hull; what lies
    between them is found among the choices that differ from a corner in one group.

    Args:
        products: inner products of the probes, [P, P].
        scales: for each group how much of its probes is in each of its options, [options, probes of the group]; option
            0 is to reuse nothing.
        saved: for each group the share of time that each of its options saves, [options].
        count: how many weights.

    Example:
        >>> front(np.eye(1), [np.array([[0.0], [1.0], [2.0]])], [np.array([0.0, 0.2, 0.3])])
        [(0,), (1,), (2,)]
    """
    problem = _Problem(products, scales, saved)
    worst = max(float(np.trace(products)) * max(float(each.max(initial=0.0)) for each in scales) ** 2, 1e-30)
    found: dict[Choice, tuple[float, float]] = {}
    choice = tuple(0 for _ in scales)
    for weight in np.geomspace(1e6, 1e-4, count) / worst:
        choice = problem.descended(choice, weight)
        if choice not in found:
            found.update(problem.neighbours(choice))
    return undominated(found)


class _Problem:
    """What `front` is given, as what each option of a group comes to, given the options of the others."""

    def __init__(self, products: np.ndarray, scales: Sequence[np.ndarray], saved: Sequence[np.ndarray]) -> None:
        self._products, self._scales, self._saved = products, scales, saved
        ends = np.cumsum([0, *(each.shape[1] for each in scales)])
        self._parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._alone = [
            np.einsum("oi,ij,oj->o", each, products[part, part], each)
            for each, part in zip(scales, self._parts, strict=True)
        ]

    def descended(self, choice: Choice, weight: float) -> Choice:
        """The choice in which no group alone can do better, from another one on."""
        chosen = list(choice)
        for _ in range(50):
            before = tuple(chosen)
            for group in range(len(chosen)):
                saved, error = self._options(tuple(chosen), group)
                chosen[group] = int(np.argmin(weight * error - saved))
            if tuple(chosen) == before:
                break
        return tuple(chosen)

    def neighbours(self, choice: Choice) -> dict[Choice, tuple[float, float]]:
        """The choice and those that differ from it in one group: what each saves, and its error."""
        found = {}
        for group in range(len(choice)):
            saved, error = self._options(choice, group)
            for option in range(len(saved)):
                neighbour = (*choice[:group], option, *choice[group + 1 :])
                found[neighbour] = (float(saved[option]), float(error[option]))
        return found

    def _options(self, choice: Choice, group: int) -> tuple[np.ndarray, np.ndarray]:
        """What each option of a group comes to beside those of the others: what is saved, and the error."""
        scale = np.concatenate([each[option] for each, option in zip(self._scales, choice, strict=True)])
        scale[self._parts[group]] = 0.0
        saved = sum(each[option] for each, option in zip(self._saved, choice, strict=True))
        saved -= self._saved[group][choice[group]]
        mixed = 2 * self._scales[group] @ (self._products[self._parts[group]] @ scale)
        return saved + self._saved[group], self._alone[group] + mixed + scale @ self._products @ scale


def undominated(found: dict[Choice, tuple[float, float]]) -> list[Choice]:
    """Those than which none saves as much at less error, by what they save.

    Args:
        found: what each choice saves, and its error.

    Example:
        >>> undominated({(0,): (0.0, 0.0), (1,): (0.2, 0.5), (2,): (0.1, 0.6)})
        [(0,), (1,)]
    """
    kept: list[Choice] = []
    least = float("inf")
    for choice in sorted(found, key=lambda each: (-found[each][0], found[each][1])):
        if found[choice][1] < least:
            least = found[choice][1]
            kept.append(choice)
    return kept[::-1]


def next_try(predicted: Sequence[float], tried: dict[int, float]) -> int | None:
    """Which setting of the front to generate with next: the fastest that may hold the budget.

    Predictions are off by about the same for settings that are near each other. So each is corrected by what was found
    for the two nearest ones that were tried (a secant), and the fastest that is then expected to hold is tried, between
    the fastest that does and the next one that does not, until there is none between.

    Args:
        predicted: the room that each setting leaves in the budget, in dB, from the most careful to the fastest.
        tried: the room that those have left that were tried.

    Returns:
        Its position, `None` if the fastest that holds the budget is known.

    Example:
        >>> next_try([9.0, 5.0, 2.0, -1.0], {})
        2
        >>> next_try([9.0, 5.0, 2.0, -1.0], {2: -1.0})
        1
    """
    holding = max((i for i, room in tried.items() if room >= 0), default=-1)
    failing = min((i for i, room in tried.items() if room < 0 and i > holding), default=len(predicted))
    between = [i for i in range(holding + 1, failing) if i not in tried]
    if not between:
        return None

    return max((i for i in between if _expected(i, predicted, tried) >= 0), default=between[0])


def _expected(i: int, predicted: Sequence[float], tried: dict[int, float]) -> float:
    """The room that a setting is expected to leave, after those that were tried."""
    nearest = sorted(tried, key=lambda j: abs(i - j))[:2]
    if not nearest:
        return predicted[i]
    slope, j = 1.0, nearest[0]
    if len(nearest) == 2 and predicted[nearest[1]] != predicted[j]:
        slope = (tried[nearest[1]] - tried[j]) / (predicted[nearest[1]] - predicted[j])
    return tried[j] + min(max(slope, 0.1), 2.0) * (predicted[i] - predicted[j])
