"""Ranges of a model's repeated blocks, found by dataflow: what is in them, and what lies between them on their streams.

    %x : patch embedding        # leads up
    %y : blocks.0(%x, %temb)    \\
    %z : view(%y)                | the region: the blocks, and what is both downstream and upstream of one
    %w : blocks.1(%z, %temb)    /
    %p : proj_out(%w)           # follows
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from ..graph import effects
from ..graph.dataflow import is_projection, is_tensor
from ..graph.modules import ModuleCall, list_of
from ..graph.parts import stands_alone
from ..policy.where import BLOCKS, Blocks
from .pieces import broken_block, every_block, is_piece, piece_of
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
    regions: list[Region] = []
    taken: dict[str, Blocks] = {}
    order: tuple[str, ...]
    shared: list[Blocks] = list(wanted)
    for where in shared:
        found, order = blocks(view, where), ()
        is_whole = view.names.begins and view.names.ends and not view.names.frame
        if view.names.model is not None and not is_whole:
            order = every_block(view, where, found)
            found = [call for call in found if call.name in order]
            order = order if is_piece(view, order, found) else ()
        if not found:
            continue
        names = order or tuple(dict.fromkeys(call.name for call in found))
        for name in names[where.first : where.last]:
            if taken.setdefault(name, where) is not where:
                raise ValueError(f"{taken[name]!r} and {where!r} overlap: both have the block {name}.")
        regions += _piece(view, assign, where, shared, order, found) if order else [_range(view, assign, where, found)]
    return regions


def _range(view: View, assign: Assign, where: Blocks, found: Sequence[ModuleCall]) -> Region:
    """The region of a range in a graph that holds all blocks."""
    chosen = found[where.first : where.last]
    unsafe = None if chosen else f"the model has {len(found)} blocks, and none of them is in the range"
    first, last = (call.name for call in ((chosen or found)[0], (chosen or found)[-1]))
    why = f"{len(chosen)} of {len(found)} blocks, {first} to {last}" if len(chosen) > 1 else f"the block {first}"
    nodes = nodes_between(view, chosen or found[:1])
    unsafe = unsafe or _interrupted(view, chosen, nodes)
    nodes += _parts_read(nodes)
    name = f"{view.names.frame}:{where.label}".removeprefix(":")
    return Region.of(name, name, assign, BLOCKS, why, nodes, unsafe)


def _piece(
    view: View,
    assign: Assign,
    where: Blocks,
    ranges: Sequence[Blocks],
    order: Sequence[str],
    found: Sequence[ModuleCall],
) -> list[Region]:
    """The region of a range in a graph that holds some of the model's blocks.

    One that all blocks of a class run is a piece of any of the ranges. One of blocks in no range is a piece too: their
    streams are followed.
    """
    in_range, piece = order[where.first : where.last], piece_of(view, ranges, order, found)
    if piece.is_shared or len({piece.range_of(call.name) for call in found}) == 1:
        chosen = list(found) if where is ranges[0] else []
    else:
        piece = replace(piece, ranges=(where,))
        chosen = [call for call in found if call.name in in_range]
    if not chosen:
        return []
    own = tuple(call.name for call in chosen)
    piece = replace(piece, own=own)
    unsafe = None if in_range else f"the model has {len(order)} blocks, and none of them is in the range"
    nodes = nodes_between(view, chosen)
    unsafe = unsafe or broken_block(view, chosen) or _interrupted(view, chosen, nodes)
    ends = f"{in_range[0]} to {in_range[-1]}, " if len(in_range) > 1 else ""
    why = f"{len(in_range)} of {len(order)} blocks, {ends}in several graphs" if in_range else "no block"
    region = Region.of(where.label, where.label, assign, BLOCKS, why, nodes, unsafe)
    signal = None if region.policy is None or region.policy.when is None else region.policy.when.signal
    watched = order[signal.first : signal.last] if isinstance(signal, Blocks) else ()
    if any(call.name in watched for call in found if call not in chosen) and not unsafe:
        unsafe = "a graph that holds a part of its blocks holds blocks that its rule looks at, too"
    return [replace(region, piece=piece, unsafe=unsafe)]


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


def _parts_read(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What takes a part of what leaves a range, where that is all that is read of it: no more than that is kept.

    %z : blocks.1(%joined)          # of text and image
    %o : getitem(%z, 7:)            # the image, which alone goes on
    """
    inside = set(nodes)
    outer = ([user for user in node.users if user not in inside] for node in nodes)
    return [users[0] for users in outer if len(users) == 1 and stands_alone(users[0])]


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
