"""Counters and caches, each with one owner: a module instance in a cache context.

A compiled graph is code; one graph may serve many blocks, and many graphs (another batch size, another
resolution) may serve one block. What tells instances apart at a call is a parameter that is passed to the
graph: its identity names the module it belongs to. State hangs on that parameter and goes with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .schedule import END, NEVER, Rule


@dataclass
class Cell:
    """State of one attention or feed-forward in one cache context.

    Args:
        role: the role it has.
        rule: when it reuses; `None` for never.
        n: calls since the last reset.
        t: timestep of the last call.
        until: last call that may reuse what is kept.
        caches: what is kept, one tensor per output; `None` for nothing.
        generation: number of the generation it is in, `None` where the timesteps alone tell.
    """

    role: str
    rule: Rule | None
    n: int = 0
    t: float = NEVER
    until: float = NEVER
    caches: tuple[torch.Tensor, ...] | None = None
    generation: int | None = None

    def reset(self) -> None:
        """Forget the generation: the next call is the first of a new one."""
        self.n, self.t, self.until, self.caches = 0, NEVER, NEVER, None

    def begin(
        self,
        t: float,
        step: int,
        timesteps: Sequence[float] | None,
        expected: Sequence[TensorSpec],
        generation: int | None = None,
    ) -> None:
        """Reset if a call at timestep `t`, for outputs like `expected`, starts a new generation.

        Where no pipeline tells the `generation`: timesteps never rise within one, and its tensors keep shape,
        dtype and device. Where all timesteps are known, one that is not due at this `step`, but is the first,
        starts over too.
        """
        if generation is not None or self.generation is not None:  # a loop of one's own may follow a pipeline's
            rises = generation != self.generation
            self.generation = generation
        else:
            rises = self.n > 0 and t > self.t
            if timesteps and step > 0 and t == timesteps[0]:
                rises |= not (step < len(timesteps) and timesteps[step] == t)
        changed = self.caches is not None and any(
            not spec.matches(cache) for spec, cache in zip(expected, self.caches, strict=True)
        )
        if rises or changed:
            self.reset()

    def advance(self, t: float, has_cache: bool, next_t: float | None) -> tuple[bool, bool]:
        """Count one call and decide it: (whether it reuses, whether what it leaves may be reused)."""
        rule = self.rule
        if rule is None:
            return False, False
        reuse = has_cache and rule.reuses(self.n, t, self.until)
        if not reuse:
            self.until = self.n + rule.lifetime(t)
        keep = rule.keeps(self.n, t, self.until, next_t)
        self.n, self.t = self.n + 1, t
        return reuse, keep


@dataclass(frozen=True)
class TensorSpec:
    """Shape (-1: any), dtype and device of a cache, and its dimensions as they lie in memory, outermost first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    def matches(self, tensor: torch.Tensor) -> bool:
        sizes = len(tensor.shape) == len(self.shape) and all(
            size in (-1, found) for size, found in zip(self.shape, tensor.shape, strict=True)
        )
        return sizes and tensor.dtype == self.dtype and tensor.device == self.device

    def empty(self) -> torch.Tensor:
        """Such a tensor, with arbitrary values."""
        shape = [max(size, 1) for size in self.shape]
        return torch.empty_permuted(shape, self.order, dtype=self.dtype, device=self.device)


@dataclass
class StateStore:
    """All cells of a backend, by owner: a parameter or a module, held weakly."""

    _cells: Any = field(default_factory=WeakIdKeyDictionary)

    def find(self, owner: Any, occurrence: Hashable, context: Hashable) -> Cell | None:
        """The cell of an owner's `occurrence`-th module in a cache context, if there is one yet."""
        return self._cells.get(owner, {}).get((occurrence, context))

    def add(self, owner: Any, occurrence: Hashable, context: Hashable, cell: Cell) -> Cell:
        """Add such a cell."""
        self._cells.setdefault(owner, {})[occurrence, context] = cell
        return cell

    def cells(self) -> Iterator[tuple[Hashable, Cell]]:
        """Every cell, with a key that tells its module from others."""
        for owner, cells in self._owned():
            for (occurrence, _), cell in list(cells.items()):
                yield (id(owner), occurrence), cell

    def reset(self, owners: Iterable[Any] | None = None) -> None:
        """Reset every cell, or those of the given owners."""
        if owners is None:
            owners = [owner for owner, _ in self._owned()]
        for owner in owners:
            for cell in list(self._cells.get(owner, {}).values()):
                cell.reset()

    def _owned(self) -> list[tuple[Any, Any]]:
        """Owners and their cells at this moment, though other threads add to them: a report needs no lock."""
        items = [(reference(), cells) for reference, cells in self._cells.data.copy().items()]
        return [(owner, cells) for owner, cells in items if owner is not None]


def next_timestep(timesteps: Sequence[float] | None, n: int, t: float) -> float | None:
    """The timestep after call `n` at `t`: `END` after the last one, `None` if the timesteps do not tell.

    Example:
        >>> next_timestep((900.0, 500.0, 100.0), 1, 500.0)
        100.0
    """
    if not timesteps:
        return None
    if not (n < len(timesteps) and timesteps[n] == t):
        if timesteps.count(t) != 1:
            return None
        n = timesteps.index(t)
    return timesteps[n + 1] if n + 1 < len(timesteps) else END
