"""How much each attention's output changes from step to step: the paper's figure 3, for every layer and every lag."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..run.state import Cell
from .sketch import Sketcher


@dataclass(frozen=True)
class ModuleChanges:
    """How much the output of one attention or feed-forward changes, relative to its own size.

    Args:
        name: its qualified name.
        role: "spatial", "temporal", "cross" or "mlp".
        timesteps: those of its calls, on the scheduler's scale, S of them.
        by_lag: for each call i and each lag k from 1 on, `norm(out[i] - out[i - k]) / norm(out[i])`; S rows, of which
            the i-th has at most i numbers.
    """

    name: str
    role: str
    timesteps: tuple[float, ...]
    by_lag: tuple[tuple[float, ...], ...]

    def at(self, step: int, lag: int) -> float:
        """The change of a step against the one `lag` steps before, or over the longest lag that was measured."""
        row = self.by_lag[step]
        return row[min(lag, len(row)) - 1] if row and lag > 0 else 0.0

    @property
    def mean(self) -> float:
        """The change from step to step, mean over a generation."""
        return statistics.fmean([row[0] for row in self.by_lag if row] or [0.0])

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        by_lag = [[float(f"{value:.4g}") for value in row] for row in self.by_lag]
        return {"name": self.name, "role": self.role, "timesteps": list(self.timesteps), "by_lag": by_lag}

    @classmethod
    def from_json(cls, fields: Any) -> ModuleChanges:
        """The inverse of `as_json`."""
        by_lag = tuple(map(tuple, fields["by_lag"]))
        return cls(fields["name"], fields["role"], tuple(fields["timesteps"]), by_lag)


@dataclass
class _History:
    """What one cell has left so far: its timesteps, changes by lag, and sketches of the last outputs."""

    timesteps: list[float] = field(default_factory=list)
    by_lag: list[tuple[float, ...]] = field(default_factory=list)
    last: deque[torch.Tensor] = field(default_factory=deque)


class Observer:
    """Stands where caches are taken over (see `holding`), compares what comes with what came before, and keeps nothing.

    Args:
        lags: over how many steps outputs are compared.
    """

    def __init__(self, lags: int) -> None:
        self._lags, self._sketch = lags, Sketcher()
        self._histories: dict[Cell, _History] = {}

    at_one_address = False

    def hold(self, cell: Cell, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Compare; of the outputs themselves nothing is kept."""
        history = self._histories.setdefault(cell, _History())
        sketch = torch.cat([self._sketch(tensor) for tensor in tensors])
        norm = float(sketch.norm()) or 1.0
        history.by_lag.append(tuple(float((sketch - before).norm()) / norm for before in history.last))
        history.timesteps.append(cell.count.t)
        history.last.appendleft(sketch)
        if len(history.last) > self._lags:
            history.last.pop()
        return ()

    def lend(self, held: Any) -> torch.Tensor:
        """Nothing is reused while changes are measured."""
        raise AssertionError("an observed attention reads no cache")

    def changes(self) -> tuple[ModuleChanges, ...]:
        """What was observed in one generation; afterwards another may begin."""
        found = [
            ModuleChanges(cell.name, cell.role, tuple(history.timesteps), tuple(history.by_lag))
            for cell, history in self._histories.items()
        ]
        self._histories.clear()
        return mean_changes(found)


def mean_changes(found: Iterable[ModuleChanges]) -> tuple[ModuleChanges, ...]:
    """One for each module: the mean over cache contexts and prompts.

    Where a branch of guidance leaves steps out, the one with all steps counts. Modules of one name in two models that
    take turns stay two.

    Example:
        >>> def changes(value):
        ...     return ModuleChanges("attn", "spatial", (900.0, 500.0), ((), (value,)))
        >>> mean_changes([changes(0.1), changes(0.3)])[0].by_lag
        ((), (0.2,))
    """
    alike: dict[tuple[str, str, tuple[float, ...]], list[ModuleChanges]] = {}
    for each in found:
        alike.setdefault((each.name, each.role, each.timesteps), []).append(each)
    for name, role, timesteps in list(alike):
        others = [plan for own, _, plan in alike if own == name and plan != timesteps]
        if any(set(timesteps) <= set(plan) and len(timesteps) < len(plan) for plan in others):
            del alike[name, role, timesteps]
    return tuple(
        ModuleChanges(name, role, timesteps, tuple(map(_mean_row, *(each.by_lag for each in several))))
        for (name, role, timesteps), several in alike.items()
    )


def _mean_row(*rows: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(statistics.fmean, zip(*rows, strict=True)))
