"""What rules measure in a call: numbers that the host reads where a rule asks for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from ..policy.when import Rule


class Measured:
    """The numbers of one call of a graph. One is read when it is asked for: the host waits for it then.

    Args:
        rules: the rules of which there are numbers.
        numbers: for each the number, a tensor of shape [], `None` where there was no signal before.
        t: the timestep of the call.
        n: how many calls there were before it in its cache context.
        on_read: is told a number that was read.
        first: what the first of the cache contexts measured that are called in this step, `None` if this is the first.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        numbers: Sequence[torch.Tensor | None],
        t: float,
        n: int,
        on_read: Callable[[Rule, float], None],
        first: Measured | None = None,
    ) -> None:
        self.t, self.n, self._first = t, n, first
        self._numbers = {measure_of(rule): number for rule, number in zip(rules, numbers, strict=True)}
        self._read: dict[Hashable, float] = {}
        self._on_read = on_read

    def __call__(self, rule: Rule) -> float | None:
        """The number that a rule measures, `None` where there is none; the first context's where a rule shares that."""
        if rule.share_decision and self._first is not None:
            return self._first(rule)
        key = measure_of(rule)
        number = self._numbers.get(key)
        if number is None:
            return None
        if key not in self._read:
            self._read[key] = float(number)
            self._on_read(rule, self._read[key])
        return self._read[key]


def measure_of(rule: Rule) -> Hashable:
    """What a rule measures: the same for those that differ in what they make of it."""
    return type(rule), rule.signal, rule.accumulates
