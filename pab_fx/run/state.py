"""Counters and caches, each with one owner: a module instance in a cache context.

A compiled graph is code; one graph may serve many blocks, and many graphs (another batch size, another
resolution) may serve one block. What tells instances apart at a call is a parameter that is passed to the
graph: its identity names the module it belongs to. State hangs on that parameter and goes with it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..policy.when import END, NEVER, Rule


class Count(NamedTuple):
    """How far a module is in a generation. Those that go through it together share one.

    Args:
        n: calls since the last reset.
        t: timestep of the last call.
        until: last call that may reuse what is kept.
        generation: number of the generation it is in, `None` where the timesteps alone tell.
    """

    n: int = 0
    t: float = NEVER
    until: float = NEVER
    generation: int | None = None

    def begun(self, t: float, step: int, timesteps: Sequence[float] | None, generation: int | None) -> Count:
        """The count at the begin of a call at timestep `t`: a new one if that starts a new generation.

        Where no pipeline tells the `generation`: timesteps never rise within one. Where all timesteps are known, one
        that is not due at this `step`, but is the first, starts over too.
        """
        if generation is not None or self.generation is not None:  # a loop of one's own may follow a pipeline's
            return self if generation == self.generation else Count(generation=generation)
        starts = self.n > 0 and t > self.t
        if timesteps and step > 0 and t == timesteps[0]:
            starts |= not (step < len(timesteps) and timesteps[step] == t)
        return FRESH if starts else self

    def advanced(self, rule: Rule, t: float, has_cache: bool, next_t: float | None) -> tuple[Count, bool, bool]:
        """The count after one call, whether that call reuses, and whether what it leaves may be reused."""
        reuse = has_cache and rule.reuses(self.n, t, self.until)
        until = self.until if reuse else self.n + rule.lifetime(t)
        return Count(self.n + 1, t, until, self.generation), reuse, rule.keeps(self.n, t, until, next_t)


FRESH = Count()


@dataclass(slots=True, eq=False)
class Cell:
    """State of one attention or feed-forward in one cache context.

    Args:
        role: the role it has.
        rule: when it reuses; `None` for never.
        count: how far it is in the generation.
        caches: what is kept; `None` for nothing.
        specs: what `caches` look like, or looked like last, as the graph that kept them has it.
        buffers: where what is kept is copied to, where that has to be at one address.
        name: qualified name of the attention or feed-forward.
    """

    role: str
    rule: Rule | None
    count: Count = FRESH
    caches: tuple[Any, ...] | None = None
    specs: Sequence[TensorSpec] = ()
    buffers: tuple[torch.Tensor, ...] | None = None
    name: str = ""

    def reset(self) -> None:
        """Forget the generation: the next call is the first of a new one."""
        self.count, self.caches = FRESH, None

    def fits(self, expected: Sequence[TensorSpec]) -> bool:
        """Whether what is kept, if anything is, has that shape, dtype and device: within a generation it does."""
        if self.caches is None or self.specs is expected:
            return True
        return all(spec.matches(kept) for spec, kept in zip(expected, self.specs, strict=True))


@dataclass(frozen=True)
class TensorSpec:
    """Shape (-1: any), dtype and device of a cache, and its dimensions as they lie in memory, outermost first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    def matches(self, other: TensorSpec) -> bool:
        """Whether a tensor of one may be read in place of one of the other, apart from its strides."""
        sizes = len(other.shape) == len(self.shape) and all(
            size == found or -1 in (size, found) for size, found in zip(self.shape, other.shape, strict=True)
        )
        return sizes and other.dtype == self.dtype and other.device == self.device

    def fits(self, tensor: Any) -> bool:
        """Whether that is such a tensor, apart from its strides."""
        return isinstance(tensor, torch.Tensor) and self.matches(
            TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, ())
        )

    @property
    def size(self) -> int:
        """In bytes; 0 where only the data tell."""
        return 0 if -1 in self.shape else math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Such a tensor, with arbitrary values."""
        shape = [max(size, 1) for size in self.shape]
        return torch.empty_permuted(shape, self.order, dtype=self.dtype, device=self.device)


@dataclass(eq=False)
class StateStore:
    """All cells of a backend in one request, by owner: a parameter or a module, held weakly.

    Args:
        found: for each graph, the cells that its modules had, by cache context, to spare the look-up.
        kept: for each graph, what it computed once in the generation, by cache context.
        buffers: for each graph, where that lies, where it has to be at one address, by cache context.
    """

    _cells: Any = field(default_factory=WeakIdKeyDictionary)
    found: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)
    kept: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)
    buffers: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)

    def find(self, owner: Any, occurrence: Hashable, context: Hashable) -> Cell | None:
        """The cell of an owner's `occurrence`-th module in a cache context, if there is one yet."""
        return self._cells.get(owner, {}).get((occurrence, context))

    def add(self, owner: Any, occurrence: Hashable, context: Hashable, cell: Cell) -> Cell:
        """Add such a cell."""
        self._cells.setdefault(owner, {})[occurrence, context] = cell
        return cell

    def cells(self) -> Iterator[tuple[Hashable, Hashable, Cell]]:
        """Every cell, with a key that tells its module from others, and its cache context."""
        for owner, cells in self._owned():
            for (occurrence, context), cell in list(cells.items()):
                yield (id(owner), occurrence), context, cell

    def reset(self, owners: Iterable[Any] | None = None) -> None:
        """Reset every cell, or those of the given owners; what graphs computed once goes either way."""
        self.kept.clear()
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
