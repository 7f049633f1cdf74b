"""The whole call of a model: everything that its graph computes.

    %e : embed(%x)          \\
    %y : blocks.0(%e)        | the region
    %p : proj_out(%y)       /
    return (%p,)
"""

from __future__ import annotations

from ..policy.where import MODEL
from .region import Assign, Region
from .view import View


def whole_model(view: View, assign: Assign) -> list[Region]:
    """A region of all that a graph calls."""
    nodes = [node for node in view.graph.nodes if node.op.startswith("call")]
    if not nodes:
        return []
    unsafe = None
    if view.names.frame:
        unsafe = "its blocks are captured one by one, where it has to be all"
    elif not (view.names.begins and view.names.ends):
        unsafe = "the graph breaks inside of it"
    return [Region.of(MODEL, MODEL, assign, MODEL, "all that the graph computes", nodes, unsafe)]
