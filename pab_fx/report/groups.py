"""Attentions that are alike in one line: forty blocks of a transformer are no forty things to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .data import RegionReport


@dataclass(frozen=True)
class Group:
    """Attentions or feed-forwards that differ in nothing but the numbers in their names.

    Args:
        regions: these, in order.
    """

    regions: tuple[RegionReport, ...]

    @property
    def first(self) -> RegionReport:
        """The first of them; what is said of it holds for all but their names, shares and times."""
        return self.regions[0]

    @property
    def name(self) -> str:
        """The names of all."""
        return joined_names([region.name for region in self.regions])

    @property
    def why(self) -> str:
        """Why they have their role."""
        return joined_names([region.why for region in self.regions])

    @property
    def left_alone(self) -> str | None:
        """Why they are computed in every step."""
        reasons = [region.left_alone for region in self.regions if region.left_alone]
        return joined_names(reasons) if reasons else None

    def total(self, name: str) -> Any:
        """What they have together of something; `None` where it is not known of any."""
        numbers = [found for region in self.regions if (found := getattr(region, name)) is not None]
        return sum(numbers) if numbers else None


def grouped(regions: Iterable[RegionReport]) -> tuple[Group, ...]:
    """Attentions and feed-forwards that are alike together, in the order of the first of each."""
    alike: dict[object, list[RegionReport]] = {}
    for region in regions:
        costs = (region.operations, region.spared, region.flops, region.cache_bytes)
        texts = map(without_numbers, (region.name, region.why, region.left_alone or "", region.note or ""))
        alike.setdefault((region.role, region.rule, *costs, *texts), []).append(region)
    return tuple(Group(tuple(each)) for each in alike.values())


def joined_names(names: Sequence[str]) -> str:
    """Names that differ in numbers as one.

    Example:
        >>> joined_names([f"blocks.{i}.attn1" for i in range(28)])
        'blocks.{0-27}.attn1'
        >>> joined_names(["down.0.attn", "down.2.attn", "up.1.attn"])
        'down.0.attn, down.2.attn, up.1.attn'
    """
    unique = list(dict.fromkeys(names))
    if len(set(map(without_numbers, unique))) > 1:
        return ", ".join(unique)
    parts = zip(*(re.split(r"(\d+)", name) for name in unique), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else _numbers(sorted(set(map(int, part)))) for part in parts)


def _numbers(found: Sequence[int]) -> str:
    """Runs of numbers, two of them or more, in braces."""
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) + "}"


def without_numbers(text: str) -> str:
    """A text with a mark in place of each number."""
    return re.sub(r"\d+", "#", text)
