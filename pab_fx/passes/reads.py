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
from ..select.streams import Streams, streams
from .hows import looks_of_slots, traced_how


@dataclass(frozen=True)
class Reads:
    """What the how of a region reads where it reuses.

    Args:
        inputs: the activations that the region reads, or its streams are made of, if they are read then; else none.
        streams: what enters where its outputs leave, if it is that which the how reads.
        scalars: names of the scalars that are read then.
        whole: for each output, the number of the slot that it is, as it is; `None` where it is computed.
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
        return replace(self, streams=within, inputs=tuple(within.sources(region.outputs)) if self.inputs else ())

    def given(self, region: Region, graph: fx.Graph, at: Callable[[fx.Node], fx.Node]) -> list[fx.Node]:
        """The inputs that the how is given, made in a graph that has those above as `at` says."""
        if self.streams is None:
            return [at(node) for node in self.inputs]
        return [self.streams.entering(output, graph, at) for output in region.outputs] if self.inputs else []


def reads_of(graph: fx.Graph, region: Region) -> Reads:
    """Trace the reading of a region's slots into a graph that nobody keeps."""
    assert region.policy is not None
    how, acts = region.policy.how, activations(graph)
    found = streams(region.nodes, region.outputs, acts) if how.reads_streams else None
    if found is None:
        inside = set(region.nodes)
        sources = dict.fromkeys(s for node in region.nodes for s in node.all_input_nodes if s not in inside)
        inputs = [source for source in sources if source in acts and is_tensor(source)]
    else:
        inputs = found.sources(region.outputs)
    scratch = fx.Graph()
    slots = [scratch.placeholder("slot") for _ in looks_of_slots(how, region.outputs)]
    given = [scratch.placeholder("input") for _ in (inputs if found is None else region.outputs)]
    scalars = Scalars(*map(scratch.placeholder, Scalars._fields))
    read = traced_how(how, "read", [None] * len(region.outputs), scratch, slots, given, scalars)
    return Reads(
        inputs=tuple(inputs) if any(node.users for node in given) else (),
        streams=found,
        scalars=frozenset(name for name in Scalars._fields if getattr(scalars, name).users),
        whole=tuple(slots.index(node) if node in slots else None for node in read),
    )
