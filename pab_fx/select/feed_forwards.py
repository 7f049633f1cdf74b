"""Feed-forwards found by dataflow: what stands beside an attention in a block, and projects, bends, projects back."""

from __future__ import annotations

from ..graph.dataflow import is_nonlinear, is_projection, shape
from ..graph.modules import ModuleCall, entries_around, list_of
from ..policy.where import MLP, block_index
from .region import Assign, Region
from .view import View


def feed_forwards(view: View, assign: Assign) -> list[Region]:
    """A region for each feed-forward of a graph; arguments as for `attentions`."""
    attends = {call for call, nodes in view.sites.items() if not view.cores.keys().isdisjoint(nodes)}
    regions = []
    for call, nodes in view.sites.items():
        stack = view.names.stack(nodes[0])
        depth = next(i for i, outer in enumerate(stack) if outer.key == call.key)
        parent = stack[depth - 1] if depth else None
        if call in attends or parent is None or parent not in attends:
            continue
        projections = [i for i, node in enumerate(nodes) if is_projection(node, view.acts)]
        if len(projections) < 2 or not _is_in_block(call, parent, view):
            continue
        if not any(is_nonlinear(node) for node in nodes[projections[0] : projections[-1]]):
            continue
        if shape(nodes[projections[0]].all_input_nodes[0]) != shape(nodes[projections[-1]]):
            continue
        beside = "the attention of block" if block_index(parent.name) is not None else "attentions, in entry"
        why = f"projects, bends and projects back beside {beside} {block_index(call.name)}"
        regions.append(Region.of(call.name, call.module_id, assign, MLP, why, nodes))
    return regions


def _is_in_block(call: ModuleCall, parent: ModuleCall, view: View) -> bool:
    """Whether the module around a call is in a numbered block, or the call is in an entry of a list of attentions."""
    own = (list_of(entry) for entry in entries_around(call.name))
    return block_index(parent.name) is not None or not view.attending_lists.isdisjoint(own)
