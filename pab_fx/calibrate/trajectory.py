"""What each part of a model leaves in each step of a generation in which everything is computed.

Of outputs nothing is kept but inner products of every two steps. They say how much an output changes over any number of
steps (the paper's figure 3), and how far any forecast of it is from it that is linear in what was computed before: all
that `Last`, `Residual`, `Taylor` and `Hermite` read is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..run.state import Cell
from .sketch import Sketcher


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One part of the model over the steps of a generation.

    Args:
        name: its qualified name.
        role: "spatial", "temporal", "cross", "mlp", "blocks" or "model".
        timesteps: those of its calls, on the scheduler's scale, S of them.
        products: inner products of what it leaves in every two steps, [S, S] float64: of outputs for attentions and
            feed-forwards, of residuals for blocks and the model.
    """

    name: str
    role: str
    timesteps: tuple[float, ...]
    products: np.ndarray

    def change(self, step: int, lag: int = 1) -> float:
        """How much a step's output differs from the one `lag` steps before, relative to its own size.

        Example:
            >>> outputs = np.array([[1.0], [2.0]])
            >>> Trajectory("attn", "spatial", (900.0, 500.0), outputs @ outputs.T).change(1)
            0.5
        """
        here, there = self.products[step, step], self.products[step - lag, step - lag]
        squared = here + there - 2 * self.products[step, step - lag]
        return math.sqrt(max(squared, 0.0) / here) if here > 0 else 0.0

    @property
    def mean_change(self) -> float:
        """The change from step to step, mean over a generation."""
        changes = [self.change(step) for step in range(1, len(self.timesteps))]
        return sum(changes) / len(changes) if changes else 0.0


@dataclass
class _History:
    """What one cell has left so far: timesteps, and sketches of what it left."""

    timesteps: list[float] = field(default_factory=list)
    sketches: list[torch.Tensor] = field(default_factory=list)


class Observer:
    """Stands where caches are taken over (see `holding`), and keeps sketches of what comes."""

    at_one_address = False

    def __init__(self) -> None:
        self._sketch = Sketcher()
        self._histories: dict[Cell, _History] = {}

    def hold(self, cell: Cell, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Sketch what a step has left; nothing else of it is kept."""
        history = self._histories.setdefault(cell, _History())
        history.timesteps.append(cell.count.t)
        history.sketches.append(torch.cat([self._sketch(tensor) for tensor in tensors]))
        return ()

    def lend(self, held: Any) -> torch.Tensor:
        """Nothing is reused while a model is observed."""
        raise AssertionError("a part that is observed reads no cache")

    def trajectories(self) -> tuple[Trajectory, ...]:
        """What was observed in one generation; afterwards another may begin."""
        found = []
        for cell, history in self._histories.items():
            sketches = torch.stack(history.sketches).double()  # [S, sketch]
            products = (sketches @ sketches.T).numpy()
            found.append(Trajectory(cell.name, cell.role, tuple(history.timesteps), products))
        self._histories.clear()
        return summed(found)


def summed(found: Iterable[Trajectory]) -> tuple[Trajectory, ...]:
    """One for each part: the sum over cache contexts and prompts.

    Where a branch of guidance leaves steps out, the one with all steps counts. Parts of one name in two models that
    take turns stay two.

    Example:
        >>> one = Trajectory("attn", "spatial", (900.0,), np.array([[1.0]]))
        >>> summed([one, one])[0].products
        array([[2.]])
    """
    alike: dict[tuple[str, str, tuple[float, ...]], list[Trajectory]] = {}
    for each in found:
        alike.setdefault((each.name, each.role, each.timesteps), []).append(each)
    for name, role, timesteps in list(alike):
        others = [plan for own, _, plan in alike if own == name and plan != timesteps]
        if any(set(timesteps) <= set(plan) and len(timesteps) < len(plan) for plan in others):
            del alike[name, role, timesteps]
    return tuple(
        Trajectory(*key, np.sum([each.products for each in several], axis=0)) for key, several in alike.items()
    )


def pooled(trajectories: Iterable[Trajectory]) -> tuple[Trajectory, ...]:
    """One for each role and plan of timesteps, in which every part counts alike, whatever its size."""
    alike: dict[tuple[str, tuple[float, ...]], list[np.ndarray]] = {}
    for each in trajectories:
        scale = float(np.trace(each.products)) or 1.0
        alike.setdefault((each.role, each.timesteps), []).append(each.products / scale)
    return tuple(
        Trajectory(role, role, timesteps, np.mean(several, axis=0)) for (role, timesteps), several in alike.items()
    )
