"""Counters and caches, each with one owner: a module instance in a cache context.

A compiled graph is code; one graph may serve many blocks, and many graphs (another batch size, another
resolution) may serve one block. What tells instances apart at a call is a parameter that is passed to the
graph: its identity names the module it belongs to. State hangs on that parameter and goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..compile.specs import TensorSpec
from ..policy.when import END, NEVER, Progress, Rule, Step, decided


class Count(NamedTuple):
    """How far a module is in a generation. Those that go through it together share one.

    Args:
        n: calls since the last reset.
        t: timestep of the last call.
        computed: number of the last call that computed.
        computed_t: timestep of that one.
        filled: how many calls have computed and updated what is kept, since something is.
        first_t: timestep of the first call.
        change: what its rule's signal has changed by, added up since the last call that computed.
        generation: number of the generation it is in, `None` where the timesteps alone tell.
        decided_by: what the last call was decided by, `None` where nothing had to be measured.
    """

    n: int = 0
    t: float = NEVER
    computed: int = -1
    computed_t: float = NEVER
    filled: int = 0
    first_t: float = NEVER
    generation: int | None = None
    change: float = 0.0
    decided_by: float | None = None

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

    def rises_within(self, t: float) -> bool:
        """Whether a timestep rises by so little that it is hardly the first one of another generation.

        Example:
            >>> Count(n=3, t=700.0, first_t=900.0).rises_within(701.0)
            True
            >>> Count(n=50, t=20.0, first_t=980.0).rises_within(980.0)
            False
        """
        return self.n > 0 and self.t < t and (self.n == 1 or 4 * (t - self.t) < self.first_t - self.t)

    def scalars(self) -> tuple[float, float]:
        """`Scalars` of the call that comes: its distance and how often the slots were filled."""
        return (float(self.n - self.computed) if self.filled else 1.0), float(self.filled)

    def rested(self, t: float) -> Count:
        """The count after a step in which the module was neither run nor read: a part around it reused."""
        return self._replace(n=self.n + 1, t=t, decided_by=None)

    def advanced(
        self,
        rule: Rule,
        t: float,
        has_cache: bool,
        next_t: float | None,
        of: float,
        remembers: bool,
        number_of: Callable[[Rule], float | None] = lambda rule: None,
        is_read: bool = True,
    ) -> tuple[Count, bool, bool]:
        """The count after one call, whether that call reuses, and whether what is there then has to be kept.

        Args:
            rule: when the module reuses.
            t: timestep of the call.
            has_cache: whether something is kept.
            next_t: as for `Rule.keeps`.
            of: how many calls the generation has.
            remembers: whether what is kept is read also where a call computes.
            number_of: reads what a rule measures in this call, `None` if there is nothing to read; asked for only
                where the call may reuse.
            is_read: whether the call may reuse at all.
        """
        step, progress, change = Step(self.n, t, of), Progress(self.n - self.computed, self.computed_t), 0.0
        decided_by = None
        reuse = is_read and has_cache and self.n > 0 and decided(rule, step, progress)
        if reuse and rule.signal is not None:
            number = number_of(rule)
            if number is not None:
                decided_by = change = rule.weighed(number) + (self.change if rule.accumulates else 0.0)
            reuse = number is not None and decided(rule, step, progress, change)
        computed, computed_t = (self.computed, self.computed_t) if reuse else (self.n, t)
        filled = self.filled if reuse else 1 + (self.filled if has_cache else 0)
        first_t, change = self.first_t if self.n else t, change if reuse else 0.0
        after = Count(self.n + 1, t, computed, computed_t, filled, first_t, self.generation, change, decided_by)
        keeps = rule.keeps(step, Progress(after.n - computed, computed_t), next_t)
        return after, reuse, keeps or (remembers and next_t != END and not rule.is_over(t))


FRESH = Count()


@dataclass(slots=True, eq=False)
class Cell:
    """State of one part of a model in one cache context of one request.

    Args:
        role: the role it has.
        rule: when it reuses; `None` for never.
        count: how far it is in the generation.
        caches: what is in its slots; `None` for nothing.
        specs: what `caches` look like, or looked like last, as the graph that kept them has it.
        buffers: where what is kept is copied to, where that has to be at one address; empty where it has not.
        name: qualified name of the part.
        is_signal: whether it is what is kept of a signal, for parts that go by it, and no part itself.
    """

    role: str
    rule: Rule | None
    count: Count = FRESH
    caches: tuple[Any, ...] | None = None
    specs: Sequence[TensorSpec] = ()
    buffers: list[torch.Tensor] = field(default_factory=list)
    name: str = ""
    is_signal: bool = False

    def reset(self) -> None:
        """Forget the generation: the next call is the first of a new one."""
        self.count, self.caches = FRESH, None

    def fits(self, expected: Sequence[TensorSpec]) -> bool:
        """Whether what is kept, if anything is, has that shape, dtype and device: within a generation it does."""
        if self.caches is None or self.specs is expected:
            return True
        return all(spec.matches(kept) for spec, kept in zip(expected, self.specs, strict=True))


class ConcurrentCallError(RuntimeError):
    """Two threads call a model in one request at once: their steps cannot be told apart."""


@dataclass(eq=False)
class StateStore:
    """All cells of a backend in one request, by owner: a parameter or a module, held weakly.

    Args:
        running: what is called at this moment, and reads and writes cells.
        found: for each graph, the cells that its modules had, by cache context, to spare the look-up.
        kept: for each graph, what it computed once in the generation, by cache context.
        buffers: for each graph, where that lies, where it has to be at one address, by cache context.
        measured: what rules measured last, by cache context, for the pieces of a model whose graph breaks.
        passages: how far such pieces have come in a step, by model and cache context.
    """

    _cells: Any = field(default_factory=WeakIdKeyDictionary)
    running: dict[Hashable, object] = field(default_factory=dict)
    found: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)
    kept: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)
    buffers: WeakKeyDictionary[Any, dict[Hashable, Any]] = field(default_factory=WeakKeyDictionary)
    measured: dict[Hashable, Any] = field(default_factory=dict)
    passages: dict[Hashable, Any] = field(default_factory=dict)

    def enter(self, called: Hashable) -> None:
        """Note that a call begins; `leave` notes its end.

        Raises:
            ConcurrentCallError: if another call of the same goes on.
        """
        token = object()
        if self.running.setdefault(called, token) is not token:  # one step of the interpreter: no thread comes between
            raise ConcurrentCallError(
                "two threads call one model at once, and both would count and keep for the same request. Give each a "
                "request of its own: with pab.session(): ..., or a pipeline of its own."
            )

    def leave(self, called: Hashable) -> None:
        """Note that a call is over."""
        self.running.pop(called, None)

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

    def forget_once(self, context: Hashable) -> None:
        """Forget what graphs computed once in a generation, in one cache context."""
        for of_contexts in list(self.kept.values()):
            of_contexts.pop(context, None)

    def reset(self, owners: Iterable[Any] | None = None) -> None:
        """Reset every cell, or those of the given owners; what graphs computed once goes either way."""
        self.kept.clear()
        self.measured.clear()
        self.passages.clear()
        self.found.clear()  # with what stands in for slots that are not read
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
