"""Decide one call for all modules of a graph: those that are in the same state are decided once.

The attentions of a transformer go through a generation together. What is counted for them is one `Count`, which
their cells share; so a call of sixty of them costs one decision, and sixty comparisons by identity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compile.specs import TensorSpec
from ..policy.when import END, Rule
from .state import Cell, next_timestep

UNKNOWN = (1.0, 0.0)
"""`Scalars` of a module that keeps nothing."""


@dataclass(frozen=True)
class Call:
    """One call of a graph, as far as decisions go.

    Args:
        t: its timestep.
        next_t: the next one's, `None` where a pipeline does not tell.
        timesteps: those of the generation, if they are known.
        generation: its number, where a pipeline tells it.
        steps: how many steps the generation has, where only that is known.
    """

    t: float
    next_t: float | None
    timesteps: Sequence[float] | None
    generation: int | None
    steps: int | None = None


@dataclass(frozen=True)
class Group:
    """Modules that go by one rule and are called equally often in a step.

    Args:
        role: their role.
        rule: when they reuse; `None` for never.
        calls: how often each of them is called.
        remembers: whether what is kept of them is read also where they compute.
        is_read: whether what is kept of them is read in this graph; see `How`.
        outer: number of the module in which they lie, `None` for none: where it reuses they rest.
        modules: their numbers in the graph.
        cells: their cells.
    """

    role: str
    rule: Rule | None
    calls: int
    remembers: bool
    is_read: bool
    outer: int | None
    modules: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def is_together(self) -> bool:
        """Whether all of them are in the same state: they share a count, and each keeps something or none does."""
        count, has_cache = self.cells[0].count, self.cells[0].caches is not None
        return all(cell.count is count and (cell.caches is not None) is has_cache for cell in self.cells)

    def parts(self) -> list[Group]:
        """The group, split into those that are in the same state."""
        states: dict[Hashable, list[int]] = {}
        for i, cell in enumerate(self.cells):
            states.setdefault((cell.count, cell.caches is not None), []).append(i)
        groups = []
        for alike in states.values():
            cells, modules = tuple(self.cells[i] for i in alike), tuple(self.modules[i] for i in alike)
            for cell in cells:
                cell.count = cells[0].count
            groups.append(replace(self, modules=modules, cells=cells))
        return groups


@dataclass(frozen=True)
class Decision:
    """What a call does with the modules of a group.

    Args:
        group: the group.
        reuses: whether it reuses, for each call of a module in the step.
        reads: whether what is kept is read before a call has replaced it.
        keeps: whether what is left after the step has to be kept.
        scalars: `Scalars` as numbers, for each call of a module in the step.
        rests: whether it is neither run nor read, since what it lies in reuses.
        decided_by: what was measured for it, `None` where nothing had to be.
    """

    group: Group
    reuses: tuple[bool, ...]
    reads: bool
    keeps: bool
    scalars: tuple[tuple[float, float], ...]
    rests: bool = False
    decided_by: float | None = None

    def record(self, counts: Counter[tuple[str, bool]]) -> None:
        """Count the calls of each role that compute and that reuse."""
        if self.group.rule is not None and not self.rests:
            for reuse in self.reuses:
                counts[self.group.role, reuse] += len(self.group.cells)


NOTHING: Mapping[int, Decision] = {}


class Lockstep:
    """The modules of a graph in one cache context of one request.

    Args:
        cells: the modules' cells.
        calls: how often each module is called in a step.
        remembers: for each module whether what is kept of it is read also where it computes.
        outers: for each module the number of the one in which it lies, `None` for none.
        owners: for each module, yields what its cell hangs on, `None` once that is gone.
        signals: for each rule that looks at a signal, where that is kept.
        unread: numbers of the modules of which nothing is read in this graph.
        piece: number of the module that is a piece of a range of blocks, `None` for none: it is decided by itself.

    Attributes:
        plans: what the decisions of a call came to, by whether each group reuses and keeps.
        nows: the signals of the call that runs, each with what it looks like.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        calls: Sequence[int],
        remembers: Sequence[bool],
        outers: Sequence[int | None],
        owners: Sequence[Callable[[], object | None]],
        signals: Sequence[Cell] = (),
        unread: Collection[int] = (),
        piece: int | None = None,
    ) -> None:
        self.cells, self.owners, self.signals = tuple(cells), tuple(owners), tuple(signals)
        self.first = next((cell for cell in cells if cell.rule is not None), cells[0])
        self.plans: dict[Hashable, Any] = {}
        self.nows: tuple[Any, ...] = ()
        alike: dict[tuple[str, Rule | None, int, bool, bool, int | None, bool], list[int]] = {}
        for m, cell in enumerate(cells):
            key = (cell.role, cell.rule, calls[m], remembers[m], m not in unread, outers[m], m == piece)
            alike.setdefault(key, []).append(m)
        self._groups = [
            Group(*key[:-1], modules=tuple(ms), cells=tuple(cells[m] for m in ms)) for key, ms in alike.items()
        ]

    def begin(
        self, call: Call, expected: Sequence[Sequence[TensorSpec]], decided: Mapping[int, Decision] = NOTHING
    ) -> bool:
        """Start a new generation where a call is its first, for slots like `expected` of each module.

        Args:
            call: the call.
            decided: what another graph has decided in this step, by module.

        Returns:
            Whether a generation began in the middle of another, because a timestep rose a little.
        """
        if not all(group.is_together for group in self._groups):
            self._groups, self.plans = [part for group in self._groups for part in group.parts()], {}
        rose = False
        for group in self._groups:
            if group.modules[0] in decided:
                continue
            if not all(cell.fits(expected[m]) for m, cell in zip(group.modules, group.cells, strict=True)):
                for cell in group.cells:
                    cell.reset()
            count = group.cells[0].count
            begun = count.begun(call.t, count.n // group.calls, call.timesteps, call.generation)
            if begun is not count:
                rose |= call.generation is None and count.rises_within(call.t)
                for cell in group.cells:
                    cell.count, cell.caches = begun, None
                for cell in self.signals:
                    cell.reset()
        return rose

    def advance(
        self, call: Call, number_of: Callable[[Rule], float | None], decided: Mapping[int, Decision] = NOTHING
    ) -> list[Decision]:
        """Count the call, and decide it. What lies in another module has a higher number, so it comes after that.

        Args:
            call: the call.
            number_of: as for `Count.advanced`.
            decided: as for `begin`.
        """
        of_module: dict[int, Decision] = {}
        decisions = []
        for group in self._groups:
            around = None if group.outer is None else of_module[group.outer]
            rests = around is not None and (around.rests or any(around.reuses))
            made = decided.get(group.modules[0])
            decision = self._advance(group, call, rests, number_of) if made is None else replace(made, group=group)
            of_module.update(dict.fromkeys(group.modules, decision))
            decisions.append(decision)
        return decisions

    def _advance(self, group: Group, call: Call, rests: bool, number_of: Callable[[Rule], float | None]) -> Decision:
        rule, first = group.rule, group.cells[0]
        if rests:
            count = first.count.rested(call.t)
            for cell in group.cells:
                cell.count = count
        if rule is None or rests:
            return Decision(group, (False,) * group.calls, False, rests, (UNKNOWN,) * group.calls, rests)
        count, has_cache, keeps = first.count, first.caches is not None, False
        if not has_cache and count.filled:  # what was kept was let go: no later step was to read it
            count = count._replace(filled=0)
        of = (len(call.timesteps) if call.timesteps else call.steps or math.inf) * group.calls
        next_t = call.next_t
        if next_t is None:
            next_t = next_timestep(call.timesteps, count.n // group.calls, call.t)
        reuses, scalars = [], []
        had_cache = has_cache
        for following in (*[call.t] * (group.calls - 1), next_t):
            scalars.append(count.scalars())
            count, reuse, keeps = count.advanced(
                rule, call.t, has_cache, following, of, group.remembers, number_of, group.is_read
            )
            reuses.append(reuse)
            has_cache = True
        if group.outer is not None:  # it may rest until what is kept is read
            keeps |= next_t != END and not rule.is_over(call.t)
        for cell in group.cells:
            cell.count = count
        reads = had_cache and (reuses[0] or group.remembers)
        return Decision(group, tuple(reuses), reads, keeps, tuple(scalars), decided_by=count.decided_by)

    def reset(self) -> None:
        """Forget the generation."""
        for cell in (*self.cells, *self.signals):
            cell.reset()
