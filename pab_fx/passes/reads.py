"""What the how of a region reads where it reuses: slots, scalars, and activations that the region reads too.

A step that reuses computes nothing of the region, so what its how reads besides has to be at hand outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..graph.dataflow import activations, is_tensor
from ..policy.how import Scalars
from ..select.region import Region
from ..select.streams import Streams, operand, streams
from .hows import looks_of_slots, traced_how

At = Callable[[fx.Node], fx.Node]
"""A node from outside of a region, as another graph has it."""


@dataclass(frozen=True)
class Reads:
    """What the how of a region reads where it reuses.

    Args:
        inputs: the activations that the region reads, or its streams are made of, if they are read then; else none.
        streams: the streams through the region, if it is those which the how reads.
        scalars: names of the scalars that are read then.
        whole: for each output, the number of the slot that it is, as it is and stays; `None` where it is computed.
    """

    inputs: tuple[fx.Node, ...]
    streams: Streams | None
    scalars: frozenset[str]
    whole: tuple[int | None, ...]

    def is_kept(self, output: fx.Node, region: Region, slot: int) -> bool:
        """Whether a slot is read as that output, and is nothing else."""
        return self.whole[region.outputs.index(output)] == slot and self.whole.count(slot) == 1

    def within(self, body: Sequence[fx.Node], region: Region) -> Reads:
        """The same, once the region is a body: views among its inputs are the body's own then."""
        if self.streams is None:
            return self
        within = replace(self.streams, inside=frozenset(body))
        return replace(self, streams=within, inputs=tuple(_sources(within, region)) if self.inputs else ())

    def given(self, region: Region, graph: fx.Graph, at: At) -> list[fx.Node]:
        """The inputs that the how is given, made in a graph that has those above as `at` says."""
        if self.streams is None:
            return [at(node) for node in self.inputs]
        return [self.streams.entering(node, graph, at) for node in _entering(region)] if self.inputs else []

    def outputs(self, region: Region, graph: fx.Graph, read: Sequence[fx.Node], at: At) -> list[fx.Node]:
        """The outputs of the region, from what the how has read; the same where nothing is passed on."""
        if self.streams is None or region.passing is None:
            return list(read)
        instead = dict(zip(_entering(region), read, strict=True))
        return [self.streams.entering(output, graph, at, instead) for output in region.outputs]


def reads_of(graph: fx.Graph, region: Region) -> Reads:
    """Trace the reading of a region's slots into a graph that nobody keeps."""
    assert region.policy is not None
    how, acts = region.policy.how, activations(graph)
    found = None
    if how.reads_streams:
        found = streams(region.nodes, region.outputs, acts, region.passing.between if region.passing else ())
        inputs = _sources(found, region)
    else:
        inside = set(region.nodes)
        sources = dict.fromkeys(s for node in region.nodes for s in node.all_input_nodes if s not in inside)
        inputs = [source for source in sources if source in acts and is_tensor(source)]
    scratch = fx.Graph()
    slots = [scratch.placeholder("slot") for _ in looks_of_slots(how, region.kept)]
    given = [scratch.placeholder("input") for _ in (inputs if found is None else region.kept)]
    scalars = Scalars(*map(scratch.placeholder, Scalars._fields))
    read = traced_how(how, "read", [None] * len(region.kept), scratch, slots, given, scalars)
    carried = traced_how(how, "carry", [None] * len(slots), scratch, slots, given, read, scalars)
    stays = [slot for slot, node in zip(slots, carried, strict=True) if slot is node]
    whole = [slots.index(node) if node in stays else None for node in read]
    return Reads(
        inputs=tuple(inputs) if region.passing or any(node.users or node in read for node in given) else (),
        streams=found,
        scalars=frozenset(name for name in Scalars._fields if getattr(scalars, name).users),
        whole=tuple(whole) if region.passing is None else (None,) * len(region.outputs),
    )


def _entering(region: Region) -> list[fx.Node]:
    """For each tensor that the how is given as an output, the node that stands for what enters there."""
    return list(region.outputs) if region.passing is None else [operand(region.passing.entering)]


def _sources(found: Streams, region: Region) -> list[fx.Node]:
    return found.sources([*_entering(region), *region.outputs])
