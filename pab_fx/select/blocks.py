"""Ranges of a model's repeated blocks, found by dataflow: what is in them, and what lies between them on their streams.

    %x : patch embedding        # leads up
    %y : blocks.0(%x, %temb)    \\
    %z : view(%y)                | the region: the blocks, and what is both downstream and upstream of one
    %w : blocks.1(%z, %temb)    /
    %p : proj_out(%w)           # follows
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..graph import effects
from ..graph.dataflow import is_projection, is_tensor
from ..graph.modules import ModuleCall, list_of
from ..policy.where import BLOCKS, Blocks
from .region import Assign, Region
from .streams import streams
from .view import View


def ranges_of_blocks(view: View, assign: Assign, wanted: Iterable[Blocks]) -> list[Region]:
    """A region for each range of blocks that is asked for.

    Args:
        view: the graph.
        assign: gives role, policy and reason for what the graph says.
        wanted: the ranges.

    Raises:
        ValueError: for ranges that overlap.
    """
    frame = view.names.frame
    regions: list[Region] = []
    taken: dict[ModuleCall, Blocks] = {}
    for where in wanted:
        found = blocks(view, where)
        are_alone = any(call.module is outer for call in found for outer in view.names.enclosing)
        if not found:
            continue
        name = f"{frame}:{where.label}".removeprefix(":")
        chosen = found[where.first : where.last]
        for call in chosen:
            if taken.setdefault(call, where) is not where:
                raise ValueError(f"{taken[call]!r} and {where!r} overlap: both have the block {call.name}.")
        unsafe = None if chosen else f"the model has {len(found)} blocks, and none of them is in the range"
        if are_alone and where.label != BLOCKS:
            unsafe = "the blocks are captured one by one, where a range of them has to be all"
        first, last = (call.name for call in ((chosen or found)[0], (chosen or found)[-1]))
        why = f"{len(chosen)} of {len(found)} blocks, {first} to {last}" if len(chosen) > 1 else f"the block {first}"
        nodes = nodes_between(view, chosen or found[:1])
        unsafe = unsafe or _interrupted(view, chosen, nodes)
        regions.append(Region.of(name, name, assign, BLOCKS, why, nodes, unsafe))
    return regions


def blocks(view: View, where: Blocks) -> list[ModuleCall]:
    """The repeated blocks in the order in which they run, entries of lists.

    Of their list an entry attends and adds to a stream that goes through it. If there is no such list, an entry counts
    that yields a tensor like one that it is given, of a list of which one attends. Of nested ones, and of those in
    parts of the model, the outermost count. Where lists are asked for by name, theirs count, if there are any.
    """
    listed = [call for call in view.entries if where.lists and list_of(call.name) in where.lists]
    if listed:
        return listed
    numbered = [call for call in view.entries if list_of(call.name) in view.attending_lists]
    attend = [call for call in numbered if not view.cores.keys().isdisjoint(view.entries[call])]
    lists = {list_of(call.name) for call in attend if _has_stream(view, call, by_sums=True)}
    found = [
        call for call in numbered if (list_of(call.name) in lists if lists else _has_stream(view, call, by_sums=False))
    ]
    least = min((call.name.count(".") for call in found), default=0)
    return [call for call in found if call.name.count(".") == least]


def _has_stream(view: View, call: ModuleCall, by_sums: bool) -> bool:
    """Whether something that enters a module's call leaves it again, with what is added to it."""
    nodes = view.entries[call]
    inside = set(nodes)
    leaving = [node for node in nodes if is_tensor(node) and not inside.issuperset(node.users)]
    found = streams(nodes, () if by_sums else leaving, view.acts).carried
    return any(node in found for node in leaving)


def between_blocks(view: View, where: Blocks, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of a region's nodes that are in none of its blocks."""
    own = {node for call in blocks(view, where) for node in view.entries[call]}
    return [node for node in nodes if node not in own]


def _interrupted(view: View, calls: Iterable[ModuleCall], nodes: Iterable[fx.Node]) -> str | None:
    """Why no stream goes through all of these blocks, as in a U-Net; `None` if one may."""
    own = {node for call in calls for node in view.entries[call]}
    between = next((node for node in nodes if node not in own and is_projection(node, view.acts)), None)
    if between is not None and any(between in effects.updated(node) for node in own):
        return f"a block updates the tensor that it is given in place ({between.name}): let it add to a new one"
    return None if between is None else f"no stream goes through all blocks: {between.name} lies between two of them"


def nodes_between(view: View, calls: Iterable[ModuleCall]) -> list[fx.Node]:
    """What these calls compute, and what is both downstream of one and upstream of one."""
    own = {node for call in calls for node in view.entries[call]}
    nodes = [node for node in view.graph.nodes if node.op.startswith("call")]
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:  # what updates a tensor in place is upstream of what reads it afterwards
        for target in effects.updated(node):
            readers.setdefault(node, []).extend(user for user in target.users if user > node)
    down, up = set(own), set(own)
    for node in nodes:
        if not down.isdisjoint(node.all_input_nodes):
            down.add(node)
        if node in down:
            down.update(effects.updated(node))
    for node in reversed(nodes):
        if not up.isdisjoint(node.users) or not up.isdisjoint(readers.get(node, ())):
            up.add(node)
    return sorted((down & up).intersection(nodes))
