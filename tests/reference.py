"""What a policy says about one part of a model, in plain eager Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pab_fx import Policy, Progress, Scalars, Step

Tensors = Sequence[Tensor]


class Part:
    """A part that computes, or reads what was kept, as the three functions of its policy say.

    Args:
        policy: when and how.
        of: how many steps a generation has.
    """

    def __init__(self, policy: Policy, of: float = math.inf) -> None:
        self._policy, self._of, self.reused = policy, of, 0
        self.reset()

    def reset(self) -> None:
        """Start a generation."""
        self._kept: dict[str, Any] = {}

    def __call__(self, n: int, t: float, inputs: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """The outputs of step `n` at timestep `t`."""
        rule, how, kept = self._policy.when, self._policy.how, self._kept
        assert rule is not None
        filled, distance = kept.get("filled", 0), n - kept.get("n", n - 1)
        far = Scalars(torch.tensor(float(distance)), torch.tensor(float(filled)))
        if kept and rule.decide(Step(n, t, self._of), Progress(distance, kept["t"])):
            self.reused += 1
            return [each.clone() for each in how.read(kept["slots"], inputs, far)]
        outputs = compute()
        slots = kept.get("slots") or [torch.full_like(each, math.nan) for each in how.slots(outputs)]
        updated = [each.clone() for each in how.update(slots, inputs, outputs, far)]
        self._kept = {"n": n, "t": t, "filled": filled + 1, "slots": updated}
        return outputs


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
