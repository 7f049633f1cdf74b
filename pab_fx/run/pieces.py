"""A range of blocks that spans several graphs: one decision and one residual, while its graphs run one after another.

    graph of blocks.0    the range begins: it is decided, and what enters is noted
    graph of blocks.1    it goes on: where it reuses, the streams are handed on as they are
    graph of blocks.2    it ends: what was added since it began is kept, or what was kept is added

What a rule looks at (`Blocks(0, n)`) is measured in the same way, between the graphs. Where a stream does not go on
from graph to graph, nothing is kept: every step computes, and the report says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import mean_over_ranks
from ..passes.pieces import Place
from ..policy.policy import Policy
from ..policy.when import Rule
from ..policy.where import BLOCKS, Blocks
from ..select.region import Piece, Region
from .call import BroadcastGraph, step_of
from .contexts import current_cache_context
from .deciding import UNKNOWN, Decision, Group
from .measuring import note_numbers
from .passages import Chain, Given, Passage, Range, Seen, Visit, spec_of
from .running import caller
from .runtime import Runtime
from .state import Cell, StateStore

COMPUTED = Decision(Group(BLOCKS, None, 1, False, True, None, (), ()), (False,), False, False, (UNKNOWN,))
"""Of blocks in no range, and of those of which nobody has decided where their range begins."""


@dataclass(frozen=True)
class Here:
    """Where a call of a graph is.

    Args:
        store, context: its request and cache context.
        model: the model that runs.
        own: names of the blocks that the graph is of in this call.
        passage: how far the model has come.
        streams: numbers of the streams that enter.
    """

    store: StateStore
    context: Hashable
    model: nn.Module
    own: tuple[str, ...]
    passage: Passage
    streams: list[int]

    @property
    def chain(self) -> Chain:
        """The streams of the model."""
        return self.passage.chain

    def range_of(self, where: Blocks, policy: Policy) -> Range:
        """A range of the model."""
        found = self.passage.ranges.get(where)
        if found is None:
            cell = self._cell(where, Cell(BLOCKS, policy.when, name=where.label))
            signal = self._cell(where, Cell(BLOCKS, None, name=where.label, is_signal=True))
            found = self.passage.ranges[where] = Range(policy, cell, signal)
        return found

    def _cell(self, where: Blocks, made: Cell) -> Cell:
        key = (where, made.is_signal)
        found = self.store.find(self.model, key, self.context)
        return found or self.store.add(self.model, key, self.context, made)


class PieceGraph:
    """Runs a graph that holds a piece of a range of blocks, by where in the range its blocks are; called by Dynamo.

    Args:
        runtime: owner of the state.
        region: the piece.
        made: makes what runs the graph at a place; whether Dynamo captures the graph now.
        groups: names of the process groups among whose ranks the model is spread.

    Attributes:
        runs: how often it was called.
        visits: how often as a part of a range.
    """

    def __init__(
        self, runtime: Runtime, region: Region, made: Callable[[Place, bool], BroadcastGraph], groups: Sequence[str]
    ) -> None:
        assert region.piece is not None
        self._runtime, self._region, self._made, self._groups = runtime, region, made, groups
        self._piece: Piece = region.piece
        self.runs = self.visits = 0
        self._graphs: dict[Place, BroadcastGraph] = {}
        self._known: Any = WeakIdKeyDictionary()  # by a parameter of a block, its model and its name
        first = self._graph(self._place(self._piece.range_of(self._piece.own[0]), self._piece.own), is_captured=True)
        self._module = next(m for m, each in enumerate(first.anchors) if each.module_id == region.module_id)
        self._owner = next(iter(first.anchors[self._module].positions), None)

    @property
    def graphs(self) -> list[BroadcastGraph]:
        """What runs the graph, first where a range ends: what is kept is seen there."""
        return [self._graphs[place] for place in sorted(self._graphs, key=lambda place: not place.ends)]

    @property
    def overwrites(self) -> frozenset[int]:
        """As of `BroadcastGraph`."""
        return frozenset().union(*(graph.overwrites for graph in self.graphs))

    def __call__(self, *args: Any) -> Any:
        piece, step = self._piece, step_of(self._runtime)
        given: list[Any] = [None if i is None else args[i] for i in piece.enters]
        store, context = self._runtime.store(step.request), (current_cache_context.get(), step.branch)
        model, own = self._blocks(args)
        passage = store.passages.setdefault((id(model), context), Passage())
        here = Here(store, context, model, own, passage, passage.chain.enter(given, own[0]))
        where = piece.range_of(own[0])
        place = self._place(where, own)
        found = None if where is None or place.policy is None else here.range_of(where, place.policy)
        self.runs += 1
        self.visits += found is not None
        graph, visit = self._graph(place), self._visit(here, place, found, given)
        outputs = graph.run(args, step, visit)
        further = iter(outputs[len(outputs) - piece.returned :])
        given = [next(further) if each is None else each for each in given]
        here.chain.leave({here.streams[j]: outputs[i] for i, j in piece.leaves})
        if found is not None:
            self._note(here, place, found, visit, given)
        for measured, rule in self._watching(here):
            t = graph.timestep(args) if step.t is None else step.t
            self._measure(here, measured, rule, given, outputs, t)
        return outputs[: len(outputs) - piece.returned]

    # ------------------------------------------------------------------------------------------- where

    def _blocks(self, args: Sequence[Any]) -> tuple[nn.Module, tuple[str, ...]]:
        """The model that runs, and the blocks that the graph is of in this call."""
        owner = None if self._owner is None or args[self._owner] in self._runtime.tied else args[self._owner]
        known = None if owner is None else self._known.get(owner)
        model = None if known is None else known[0]()
        if known is not None and model is not None:
            return model, known[1]
        running = caller(tuple(self._runtime.roots))
        assert running is not None, "a piece of a model runs in the model"
        model, name = running
        own = self._piece.own
        if self._piece.is_shared:
            own = tuple(each for each in self._piece.order if each == name or name.startswith(f"{each}."))
        if owner is not None:
            self._known[owner] = weakref.ref(model), own
        return model, own

    def _policy(self, where: Blocks) -> Policy | None:
        """The policy of a range, with the rule that it goes by now."""
        _, policy, _ = self._region.assign(f":{where.label}")
        rule_of = self._runtime.rule_of
        rule = None if policy is None else policy.when if rule_of is None else rule_of(BLOCKS, f":{where.label}")
        return None if policy is None or rule is None else replace(policy, when=rule)

    def _place(self, where: Blocks | None, own: Sequence[str]) -> Place:
        policy = None if where is None else self._policy(where)
        if where is None or policy is None:
            return Place()
        blocks = self._piece.blocks_of(where)
        return Place(policy, begins=own[0] == blocks[0], ends=own[-1] == blocks[-1])

    def _graph(self, place: Place, is_captured: bool = False) -> BroadcastGraph:
        """What runs the graph at a place: where no range ends, its streams are handed on."""
        key = place if place.ends else Place()
        if key not in self._graphs:
            self._graphs[key] = self._made(key, is_captured)
        return self._graphs[key]

    # ------------------------------------------------------------------------------------------- decide

    def _visit(self, here: Here, place: Place, found: Range | None, given: Given) -> Visit:
        """What the run of a graph is told of the range, and what it is to decide."""
        if found is None:
            return Visit(self._module, Cell(BLOCKS, None), False, COMPUTED, given)
        if place.begins:
            found.prepare(given)
            return Visit(self._module, found.cell, place.ends, None, given)
        decision, entering, name = found.decision or COMPUTED, given, found.cell.name
        why = found.broken(here.chain, here.streams) if place.ends else None
        if why is not None:
            self._runtime.leave_alone(name, why)
            decision = replace(decision, keeps=False)
        elif place.ends:
            self._runtime.left_alone.pop(name, None)
            entering = [found.entering[k].of() for k in here.streams] if found.computes else given
        return Visit(self._module, found.cell, place.ends, decision, entering)

    def _note(self, here: Here, place: Place, found: Range, visit: Visit, given: Given) -> None:
        """Note what a range begins with, or that it is over."""
        assert visit.decision is not None
        if place.begins:
            streams = {k: each for k, each in zip(here.streams, given, strict=True) if each is not None}
            found.begin(visit.decision, here.chain, streams)
            self._keep_signal(found)
        if place.ends:
            found.end()

    # ------------------------------------------------------------------------------------------- measure

    def _watching(self, here: Here) -> list[tuple[Range, Rule]]:
        """The ranges whose rules look at blocks, with these rules."""
        policies = {where: self._policy(where) for where in self._piece.ranges}
        return [
            (here.range_of(where, policy), policy.when)
            for where, policy in policies.items()
            if policy is not None and policy.when is not None and isinstance(policy.when.signal, Blocks)
        ]

    def _measure(self, here: Here, found: Range, rule: Rule, given: Given, outputs: Sequence[Any], t: float) -> None:
        """Measure what a rule looks at, where the blocks that it looks at have run: what they add to the sample."""
        blocks, sample = self._piece.blocks_of(rule.signal), given[self._piece.sample]
        if blocks and here.own[0] == blocks[0] and sample is not None:
            found.watched = here.chain.number, here.streams[self._piece.sample], Seen.held(sample)
        if not blocks or here.own[-1] != blocks[-1] or found.watched is None:
            return
        (chain, stream, entered), found.watched = found.watched, None
        left = next((outputs[i] for i, j in self._piece.leaves if here.streams[j] == stream), None)
        if chain != here.chain.number or left is None or not entered.is_still(entered.of()):
            return
        found.measured = left - entered.of()
        number, kept = None, found.signal
        if kept.caches is not None and kept.fits((spec_of(found.measured),)):
            number = rule.measured(found.measured, self._runtime.lend(kept, 0))
            for group in self._groups:
                number = mean_over_ranks(number, group)
        note_numbers(self._runtime, here.store, here.context, (t, found.cell.count.n), [rule], [number])

    def _keep_signal(self, found: Range) -> None:
        """Keep what later steps are measured against, as `keep_signals`."""
        now, decision, rule = found.measured, found.decision, found.policy.when
        found.measured = None
        if now is None or decision is None or rule is None:
            return
        if not decision.keeps:
            found.signal.caches = None
        elif rule.accumulates or found.computes:
            found.signal.caches = self._runtime.hold(found.signal, (now,))
            found.signal.specs = (spec_of(now),)
