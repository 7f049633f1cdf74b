"""Blocks that hand on what they are given, as diffusers' hooks let them where a step reuses.

What is kept is read where the first block begins. The other blocks, and those of other streams, pass on what comes to
them, and what lies between two blocks runs in every step:

    %y : blocks.0(%x, %text)                        %h : what is read for %x and what is kept
    %p : add(%y, %positions)    # between    ->     %p : add(%h, %positions)
    %z : blocks.1(%p, %text)

What is kept is of the one stream whose tokens become the output of the model: the image's. No graph is changed here.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ..graph.parts import sizes, taken
from .region import Passing, Region
from .sequences import Span, token_sources
from .streams import Source, Streams, operand, streams, taken_back
from .view import View


def passing(view: View, region: Region, between: Collection[fx.Node]) -> Passing | None:
    """How the stream that becomes the model's output passes a region; `None` if not all of it hands on streams.

    Args:
        view: the graph.
        region: blocks, with their outputs.
        between: those of its nodes that are in none of the blocks.
    """
    found = streams(region.nodes, region.outputs, view.acts, between)
    if any(output not in found.carried for output in region.outputs):
        return None
    ways: dict[fx.Node, Passing] = {}
    for output, span in _read_in_the_end(view, region):
        part = next((user for user in output.users if _takes(user, span, region)), None)
        within = None if part is None else taken_back(part, found.carried)
        entering = _entering(found, output if within is None else operand(within), between)
        if len(entering) != 1 or sizes(operand(entering[0])) != sizes(part or output):
            return None
        ways.setdefault(operand(entering[0]), Passing(frozenset(between), entering[0], output, part))
    return next(iter(ways.values())) if len(ways) == 1 else None


def _read_in_the_end(view: View, region: Region) -> list[tuple[fx.Node, Span | None]]:
    """The outputs of a region whose tokens the model's output is made of, with where in them; the last ones first."""
    pending: list[tuple[fx.Node, Span | None]]
    pending = [(node, None) for node in view.graph.output_node().all_input_nodes if node in view.acts]
    seen: dict[tuple[fx.Node, Span | None], None] = {}
    while pending:
        step = pending.pop()
        if step not in seen:
            seen[step] = None
            pending += [] if step[0] in region.outputs else token_sources(*step, view.acts, view.cores)
    found = [step for step in seen if step[0] in region.outputs]
    whole = {node for node, span in found if span is None}
    return sorted((step for step in found if step[1] is None or step[0] not in whole), key=lambda s: s[0], reverse=True)


def _takes(user: fx.Node, span: Span | None, region: Region) -> bool:
    """Whether a view outside of a region takes that span out of an output, and can do so where the region ends."""
    part = taken(user)
    at_hand = all(source <= region.nodes[-1] or source.op == "placeholder" for source in user.all_input_nodes)
    return part is not None and part.span == span and at_hand and user not in region.nodes


def _entering(found: Streams, node: fx.Node, between: Collection[fx.Node]) -> list[Source]:
    """Where blocks first read the streams that come by a node."""
    way = set(found.way(node))
    places: dict[fx.Node, Source] = {}
    for reader in sorted(way & found.inside - set(between)):
        source = found.carried.get(reader)
        read = [source] if source is not None else [(reader, i) for i in range(len(reader.all_input_nodes))]
        for each in read:
            if operand(each) in way - found.inside:
                places.setdefault(operand(each), each)
    return list(places.values())
