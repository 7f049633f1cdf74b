"""Streams: for what leaves a region, the tensor that enters where it leaves.

A block adds to what it is given, so its output is its input and what the block adds. That input is found by following
sums, views, casts and concatenations against the dataflow:

    %n : norm(%x)                                 what leaves is %z, of two streams joined in one sequence;
    %y : add(%x, linear(%n))                      what enters there is cat(%text, %x), which is made anew
    %j : cat(%text, %y)                  ->       from %text and %x, by the nodes on the way without what they add:
    %z : add(%j, attention(%j))                       %j : cat(%text, %x)

What is taken out of a sequence again, as it was joined into it, is followed to what was joined. What is added to a
stream that was scaled (`0.9 * %y + %hint`) is not taken for the stream. Where no sum leads back (a block that ends in a
norm, or joins by a projection), it is the first tensor of the same shape and dtype that enters. No graph is changed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import effects
from ..graph.dataflow import is_tensor, is_tuple, op_name, value
from ..graph.parts import JOINS, joined, sizes, taken

Source = tuple[fx.Node, int]
"""An operand: the node that reads it, and which of its `all_input_nodes` it is."""

SUMS = {"add", "add_", "__add__", "iadd", "__iadd__"}
DIFFERENCES = {"sub", "sub_", "__sub__", "isub", "__isub__", "addcmul", "addcmul_"}
"""What adds to its first operand only."""
MULTIPLICATIONS = {"mul", "multiply", "__mul__", "__rmul__"}
SCALES = {*MULTIPLICATIONS, "mul_", "imul", "div", "div_", "truediv", "__truediv__", "itruediv"}
FRESH = {"new_zeros", "new_empty", "new_full", "new_ones", "zeros", "empty", "full", "ones", "zeros_like", "empty_like"}
"""What makes a tensor, for others to be written into."""
CONCATENATIONS = {*JOINS, "stack", "pad_sequence"}
SAME = {*CONCATENATIONS, *effects.VIEWS, *effects.MAYBE_VIEWS, "clone", "_to_copy", "getitem"}
"""What hands on its operands, in another form."""


@dataclass(frozen=True)
class Streams:
    """The streams through some nodes of a graph.

    Args:
        inside: the nodes.
        carried: those that streams come by; where one is to be left out, the operand in its place.
        written: for a tensor that streams are written into, the nodes that do so.
    """

    inside: frozenset[fx.Node]
    carried: Mapping[fx.Node, Source | None]
    written: Mapping[fx.Node, Sequence[fx.Node]]

    def way(self, output: fx.Node) -> list[fx.Node]:
        """The nodes that what enters at an output is made by, in graph order; the first ones come from outside."""
        pending, found = [output], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                source = self.carried.get(node)
                if source is not None:
                    pending.append(operand(source))
                elif node in self.inside:
                    pending += (*node.all_input_nodes, *self.written.get(node, ()))
        return sorted(found)

    def sources(self, outputs: Sequence[fx.Node]) -> list[fx.Node]:
        """What that is made of: nodes from outside."""
        return list(dict.fromkeys(n for output in outputs for n in self.way(output) if n not in self.inside))

    def entering(
        self,
        output: fx.Node,
        graph: fx.Graph,
        given: Callable[[fx.Node], fx.Node],
        instead: Mapping[fx.Node, fx.Node] | None = None,
    ) -> fx.Node:
        """Make in a graph, where it inserts nodes now, what enters at an output.

        Args:
            output: a node that a stream comes by.
            graph: the nodes' own, or another one.
            given: a node from outside, as that graph has it.
            instead: nodes on the way, and what goes on in their place.
        """
        made: dict[fx.Node, fx.Node] = dict(instead or {})
        for node in self.way(output):
            source = self.carried.get(node)
            if node in made:
                continue
            if source is not None:
                made[node] = made[operand(source)]
            elif node in self.inside:
                made[node] = graph.node_copy(node, made.__getitem__)
            else:
                made[node] = given(node)
        return made[output]


def streams(
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    acts: Collection[fx.Node],
    between: Collection[fx.Node] = (),
) -> Streams:
    """The streams through a region.

    Args:
        nodes: the region's, in graph order.
        outputs: those that leave it; one that no sum leads back from has what looks like it.
        acts: the tensors of the graph that depend on data of the call.
        between: those of the nodes that streams go through as they are computed, whatever they add.
    """
    inside = frozenset(nodes)
    carried: dict[fx.Node, Source | None] = {}
    written: dict[fx.Node, list[fx.Node]] = {}
    spoiled: set[fx.Node] = set()  # into which something else is written as well
    summed: set[fx.Node] = set()  # streams that something was added to inside
    scaled: set[fx.Node] = set()  # those, times a number or a weight

    def carries(source: fx.Node) -> bool:
        return source in carried or (source in acts and source not in inside)

    def begins(source: fx.Node, others: Sequence[fx.Node]) -> bool:
        """Whether an operand of a sum may be a stream: from outside not if it is added to one (`0.9 * %h + %hint`)."""
        return source in inside or scaled.isdisjoint(others)

    for node in nodes:
        factors = [each for each in node.all_input_nodes if each in acts]
        if op_name(node) in SCALES and factors and all(each in summed or each in scaled for each in factors):
            scaled.add(node)
        if node in between:
            own = [each for each in node.all_input_nodes if each in inside and (is_tensor(each) or is_tuple(each))]
            if not effects.updated(node) and all(each in carried for each in own):
                carried[node] = None
            continue
        found = _carried(node, carries, begins, inside)
        if found is not None:
            carried[node] = taken_back(node, carried) if found < 0 else (node, found)
            if found >= 0 or not summed.isdisjoint(node.all_input_nodes):
                summed.add(node)
        for target in effects.updated(node):
            if op_name(target) not in FRESH or target not in inside:
                continue
            written.setdefault(target, []).append(node)
            if all(carries(each) for each in node.all_input_nodes if is_tensor(each) and each is not target):
                carried[target] = None
            else:
                spoiled.add(target)
        for target in spoiled:
            carried.pop(target, None)
    for output in outputs:
        if output not in carried:
            like = _alike(output, nodes, inside, acts)
            if like is not None:
                carried[output] = like
    return Streams(inside, carried, written)


def operand(source: Source) -> fx.Node:
    """The node that is read there."""
    reader, i = source
    return reader.all_input_nodes[i]


def taken_back(node: fx.Node, carried: Mapping[fx.Node, Source | None]) -> Source | None:
    """Where a node takes out of a sequence what was joined into it, that operand of the join; else `None`.

    %j : cat(%text, %x)
    %z : add(%j, attention(%j))    # a stream comes by the sum
    %o : getitem(%z, 7:)           ->    %x, if %text has 7 tokens
    """
    part = taken(node)
    if part is None:
        return None
    whole = part.of
    while carried.get(whole) is not None or (whole in carried and _keeps_values(whole)):
        source = carried[whole]
        before = whole.all_input_nodes[0] if source is None else operand(source)
        if _look(before) != _look(whole):
            return None
        whole = before
    found = next((each for each, at in joined(whole) if at.is_at(part)), None)
    return None if found is None else (whole, whole.all_input_nodes.index(found))


def _keeps_values(node: fx.Node) -> bool:
    return op_name(node) in ("clone", "contiguous", "to", "_to_copy") or effects.returns_operand(node)


def _look(node: fx.Node) -> object:
    recorded = value(node)
    return (sizes(node), recorded.dtype) if isinstance(recorded, torch.Tensor) else node


def _carried(
    node: fx.Node,
    carries: Callable[[fx.Node], bool],
    begins: Callable[[fx.Node, Sequence[fx.Node]], bool],
    inside: Collection[fx.Node],
) -> int | None:
    """Which operand of a sum a stream comes by, -1 for a node that hands its operands on, `None` if none comes."""
    sources, name = node.all_input_nodes, op_name(node)
    if name in SUMS | DIFFERENCES:
        augends = sources if name in SUMS else sources[:1]
        fit = [
            i
            for i, each in enumerate(augends)
            if carries(each) and sizes(each) == sizes(node) and begins(each, sources[:i] + sources[i + 1 :])
        ]
        return next((i for i in fit if sources[i] in inside), fit[0] if fit else None)
    if effects.updated(node) or not (name in SAME or effects.is_view(node) or effects.returns_operand(node)):
        return None
    tensors = [source for source in sources if is_tensor(source) or is_tuple(source)]
    return -1 if tensors and all(map(carries, tensors)) else None


def _alike(
    output: fx.Node, nodes: Sequence[fx.Node], inside: Collection[fx.Node], acts: Collection[fx.Node]
) -> Source | None:
    """The first operand from outside of a region that looks like an output."""
    look = value(output)
    for node in nodes:
        for i, source in enumerate(node.all_input_nodes):
            given = value(source)
            if source in inside or source not in acts or not isinstance(given, torch.Tensor):
                continue
            if isinstance(look, torch.Tensor) and sizes(source) == sizes(output) and given.dtype == look.dtype:
                return node, i
    return None
