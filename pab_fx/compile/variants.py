"""The variants of a captured graph, by which of its inputs stay the same from step to step: a guess, at first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..graph.copies import copy_of
from ..graph.dataflow import is_state, value
from ..graph.modules import argument_of
from ..passes.conditions import insert_conditions
from ..passes.counting import TIMESTEP_NAMES
from ..passes.cut import Cut, cut, rules_of
from ..passes.invariants import Invariants, split_invariants
from ..select.region import Region
from .lowering import Lowerings

ORIGIN = "pab_origin"
"""The number of a node in the captured graph, under which its copies find it: names are given anew in a copy."""


@dataclass(frozen=True)
class Once:
    """What computes the kept tensors of a graph.

    Args:
        run: takes the graph's inputs, returns the kept tensors.
        reads: positions of the inputs that it reads.
        operations: how many operations it spares in every other step.
    """

    run: Callable[..., Sequence[torch.Tensor]]
    reads: tuple[int, ...]
    operations: int


@dataclass(frozen=True)
class Variant:
    """A captured graph, lowered without what is computed once a generation.

    Args:
        lowerings: what is left, with its conditionals, and what measures signals.
        split: the graph in two, `None` if nothing is computed once.
    """

    lowerings: Lowerings
    split: Invariants | None


class Variants:
    """Makes the variants of a captured graph, by which of its inputs stay the same.

    Args:
        gm: the captured graph; it is not changed.
        regions: its regions.
        lowered: makes lowerings of a rewritten graph, and of what measures signals before it, if there are any.
        finished: runs passes on what is computed once.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        regions: Sequence[Region],
        lowered: Callable[[fx.GraphModule, Cut | None], Lowerings],
        finished: Callable[[fx.GraphModule], fx.GraphModule],
    ) -> None:
        self._gm, self._regions, self._lowered, self._finished = gm, regions, lowered, finished
        for number, node in enumerate(gm.graph.nodes):
            node.meta[ORIGIN] = number

    def variant(self, unchanging: frozenset[int] | None) -> Variant:
        """The variant for inputs at these positions that stay the same; `None` for one that keeps nothing.

        A graph of which a region itself would be computed once is left whole.
        """
        split = None if unchanging is None else split_invariants(self._gm, unchanging)
        rest = None if split is None else _carried_over(self._regions, split.rest)
        if split is None or rest is None:
            gm, split = copy_of(self._gm), None
            rest = _carried_over(self._regions, gm) or []
        else:
            gm = split.rest
        parts = cut(gm) if rules_of(gm) else None
        if parts is not None:
            gm = parts.rest
            rest = _carried_over(rest, gm) or []
        insert_conditions(gm, rest)
        gm.graph.lint()
        return Variant(self._lowered(gm, parts), split)

    def once(self, split: Invariants) -> Once:
        """What is computed once, as it is: to compile what runs once a generation takes longer than it saves."""
        spared = sum(node.op.startswith("call") for node in split.once.graph.nodes)
        return Once(self._finished(split.once).forward, split.reads, spared)


def _carried_over(regions: Sequence[Region], gm: fx.GraphModule) -> list[Region] | None:
    """The regions of a graph in a copy of it that lacks some nodes, `None` if it lacks what one of them yields."""
    copies = {node.meta[ORIGIN]: node for node in gm.graph.nodes if ORIGIN in node.meta}

    def there(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(copies[node.meta[ORIGIN]] for node in nodes if node.meta[ORIGIN] in copies)

    broadcast = [region for region in regions if region.is_broadcast]
    if any(node.meta[ORIGIN] not in copies for region in broadcast for node in region.yielded):
        return None
    return [region.carried_over(there) for region in regions]


def likely_unchanging(gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module) -> frozenset[int]:
    """Positions of the inputs of a model's graph that are likely the same in each step of a generation.

    These are the tensors but for the sample, which diffusers' models take first, and the timestep. What was made under
    `torch.inference_mode` has no version to tell an update by, and a number that is passed comes in a new tensor.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    changing = {*parameters[:1], *TIMESTEP_NAMES}
    found = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        given, recorded = example_inputs[i], value(node)
        if not isinstance(recorded, torch.Tensor) or is_state(node) or isinstance(given, nn.Parameter):
            continue
        if given.is_inference():
            continue
        is_number = all(user.op == "call_method" and user.target == "item" for user in node.users)
        name = argument_of(node, parameters)
        if name is not None and name not in changing and not is_number:
            found.append(i)
    return frozenset(found)
