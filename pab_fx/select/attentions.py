"""Attentions found by dataflow: regions around what attends, and the role that their operands give them.

A region is the innermost module around the attending node and a projection of it, if that module does nothing but
attend; else the node and what alone follows it up to the output projection.
"""

from __future__ import annotations

from torch import fx

from ..graph import effects
from ..graph.dataflow import Core, backward, is_nonlinear, is_projection, is_state, is_tuple, op_name, takes_item
from ..graph.modules import ModuleCall, ModuleNames
from .frames import attends_frames
from .region import Assign, Region
from .sequences import reads_another_sequence
from .view import BREAKS_INSIDE, View, uncallable


def attentions(view: View, assign: Assign) -> list[Region]:
    """A region for each attention of a graph.

    Args:
        view: the graph.
        assign: gives role, policy and reason for what the dataflow says.
    """
    names = view.names
    grouped: dict[str, tuple[ModuleCall | None, list[fx.Node], list[Core]]] = {}
    for core in view.cores.values():
        call = _attention_module(core, view)
        key = call.key if call else core.node.name
        nodes = view.sites[call] if call else _around(core, view.acts)
        grouped.setdefault(key, (call, nodes, []))[2].append(core)
    regions = []
    for key, (call, nodes, inside) in grouped.items():
        name, module_id = (call.name, call.module_id) if call else (_unnamed(key, inside, names), key)
        unsafe = uncallable(call, names) if call is not None else None
        if len(names.enclosing) > 1 and not any(_has_projections(core, view.acts) for core in inside):
            unsafe = BREAKS_INSIDE  # a frame inside the model that gets queries and keys ready-made
        regions.append(Region.of(name, module_id, assign, *_role(inside, view), nodes, unsafe))
    return regions


def _role(inside: list[Core], view: View) -> tuple[str, str]:
    if all(reads_another_sequence(core, view.acts, view.cores) for core in inside):
        return "cross", "keys and values come from another sequence than the queries"
    if all(attends_frames(core, view.video_axes) for core in inside):
        return "temporal", "the attended axis is the frames of the video"
    return "spatial", "queries, keys and values come from one sequence"


def _unnamed(key: str, inside: list[Core], names: ModuleNames) -> str:
    """A name for an attention that is no module of its own: the innermost module around it, and the node."""
    stack = names.stack(inside[0].node)
    return f"{stack[-1].name}:{key}".lstrip(":") if stack else key


def _attention_module(core: Core, view: View) -> ModuleCall | None:
    """The module call that is this attention: the innermost one around its core and a projection of it.

    An operator that brings its projections (`nn.MultiheadAttention`'s) is all of it. `None` if that module
    does more than attend, such as a block with the attention written out in it.
    """
    operands = list(backward([core.query, *core.keys], until=lambda n: is_projection(n, view.acts)))
    projections = {node for node in operands if is_projection(node, view.acts)}
    brings_projections = any(is_state(source) for source in core.node.all_input_nodes)
    for call in reversed(view.names.stack(core.node)):
        nodes = view.sites[call]
        if brings_projections or not projections.isdisjoint(nodes):
            return call if _only_attends(core, nodes, view.acts, view.cores) else None
    return None


def _has_projections(core: Core, acts: set[fx.Node]) -> bool:
    brought = any(is_state(source) for source in core.node.all_input_nodes)
    return brought or any(is_projection(node, acts) for node in backward([core.query, *core.keys]))


SUMS = {"add", "iadd", "add_", "__add__", "__iadd__", "sub", "isub", "sub_", "__sub__", "__isub__"}


def _only_attends(core: Core, nodes: list[fx.Node], acts: set[fx.Node], cores: dict[fx.Node, Core]) -> bool:
    """Whether all that comes between an attention's core and the module's end is an output projection.

    A residual that is added, or another attention that follows, makes the module more than that.
    """
    inside = [node for node in nodes if node in cores]
    attended = set(inside)
    downstream: dict[fx.Node, int] = {core.node: 0}  # node -> projections since the core
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source in acts]
        if not attended.isdisjoint(sources):
            attended.add(node)
            if op_name(node) in SUMS and not attended.issuperset(sources):
                return False
        depths = [downstream[source] for source in sources if source in downstream]
        if depths and node is not core.node:
            downstream[node] = max(depths) + is_projection(node, acts)
    return max(downstream.values()) <= 1 and not any(other in downstream for other in inside if other is not core.node)


def _around(core: Core, acts: set[fx.Node]) -> list[fx.Node]:
    """The nodes of an attention that is no module: its core and what alone follows it up to the projection.

    Followed are operations with one activation operand; a second projection, a sum with the residual or a
    gate ends the attention. What leads up to the core needs no listing: nobody uses it once the core is gone.
    """
    nodes, last = [core.node], core.node
    if is_tuple(last):  # values and weights: the values are what goes on
        items = sorted(user for user in last.users if takes_item(user))
        nodes += items
        last = next((item for item in items if item.args[1] == 0), last)
    while len(last.users) == 1:
        (following,) = last.users
        sources = [source for source in following.all_input_nodes if source in acts]
        projected = any(is_projection(node, acts) for node in nodes)
        if following.op == "output" or len(sources) != 1 or (projected and is_projection(following, acts)):
            break
        if is_nonlinear(following) or "norm" in op_name(following) or effects.updated(following):
            break
        nodes.append(following)
        last = following
    return nodes
