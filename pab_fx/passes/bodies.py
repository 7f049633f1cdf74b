"""What goes into the branches of a condition with a region: the region, what only feeds it, and views of its own.

Each function changes a graph, or says what of it a body is; `conditions` puts bodies into branches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..graph import effects
from ..graph.copies import record
from ..graph.dataflow import is_number, is_sizes, is_tensor, is_tuple, tells_dtype, value
from ..select.region import Region


def use_outputs(graph: fx.Graph, region: Region) -> list[fx.Node]:
    """Give each output of a region a user outside, for as long as the rewrite takes; return those made for it.

    A call of a module keeps what any call of that module needs.
    """
    inside = set(region.nodes)
    made = []
    for output in region.outputs:
        if inside.issuperset(output.users):
            with graph.inserting_before(region.nodes[-1].next):
                made.append(graph.call_function(torch.clone, (output,)))
    return made


def replay_outside(graph: fx.Graph, region: Region) -> None:
    """Give the users outside of a region their own copy of a view that is used inside as well.

    %view = view(%out)                      %view = view(%out)
    %a    = add(%view, 1)    # inside  ->   %a    = add(%view, 1)
    %b    = add(%view, 2)    # outside      %copy = view(%out)
                                            %b    = add(%copy, 2)
    """
    inside = set(region.nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(region.replayed):
        with graph.inserting_before(node.next):
            copies[node] = graph.node_copy(node, lambda source: copies.get(source, source))
        node.replace_all_uses_with(copies[node], delete_user_cb=lambda user: user not in inside)


def spell_out_dtypes(region: Region) -> None:
    """Let nodes outside of a region do without tensors of it that only tell them a dtype.

    %z = type_as(%y, %inside)    ->    %z = to(%y, torch.float16)
    """
    inside = set(region.nodes)
    for node in region.nodes:
        for user in list(node.users):
            if user not in inside and node not in region.outputs and tells_dtype(node, user):
                user.target, user.args = "to", (user.args[0], value(node).dtype)


def hand_out_copies(graph: fx.Graph, region: Region) -> None:
    """Let a model update a copy of an output in place, so that what is kept stays as the region left it.

    %out = attention(%x)                    %out = attention(%x)
    %y   = iadd(%out, %x)    # outside  ->  %own = clone(%out)
                                            %y   = iadd(%own, %x)
    """
    inside = set(region.nodes)
    for output in region.outputs if region.policy is not None and not region.policy.how.keeps_updates else ():
        updates = effects.later_updates(graph, output)
        if inside.issuperset(updates):
            continue
        aliases = [n for n in graph.nodes if n > output and n not in inside and effects.may_alias(n, output)]
        with graph.inserting_after([output, *filter(inside.__contains__, updates)][-1]):
            own = graph.call_function(torch.clone, (output,))
        own.meta = dict(output.meta)
        output.replace_all_uses_with(own, delete_user_cb=lambda user: user not in inside and user is not own)  # noqa: B023
        if value(own) is not None:
            for node in (own, *aliases):
                record(node)


def bodies_of(
    graph: fx.Graph, regions: Sequence[Region], wanted: Sequence[Region], pinned: Collection[fx.Node]
) -> dict[Region, list[fx.Node]]:
    """For each wanted region its nodes and those that only feed it, in graph order.

        %n = norm(%x)           # only %a uses it                       %n = norm(%x)  \\
        %a = attention(%n)      # the region                     ->     %a = attention(%n)  / the body

    A node is left where it is if moving it down to the region could move it past an update in place, or into or
    out of an autocast, and if it is pinned, since a step that reuses reads it too. What waits for a collective goes
    where that goes.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    updates = [order[node] for node in graph.nodes if effects.updated(node) or effects.sets_ambient_state(node)]
    owned = {node for region in regions for node in region.nodes}.union(pinned)
    bodies: dict[Region, list[fx.Node]] = {}
    for region in wanted:
        body = set(region.nodes)
        end = order[region.nodes[-1]]
        for node in sorted(order, key=order.__getitem__, reverse=True)[len(order) - end :]:
            movable = (
                node.op in ("call_function", "call_method", "call_module")
                and node not in owned
                and node.users
                and all(user in body for user in node.users)
                and is_tensor(node)
                and not any(is_tuple(source) or is_number(source) for source in node.all_input_nodes)
                and (effects.is_removable(node) or effects.collective_of(node))
                and not any(
                    _since(order, node) < update < end for update in updates if update not in _own(order, region)
                )
            )
            if movable:
                body.add(node)
        bodies[region] = sorted(body, key=order.__getitem__)
    return bodies


def _since(order: dict[fx.Node, int], node: fx.Node) -> int:
    return order[effects.collective_of(node) or node]


def _own(order: dict[fx.Node, int], region: Region) -> set[int]:
    return {order[node] for node in region.nodes}


def with_own_views(graph: fx.Graph, body: list[fx.Node]) -> list[fx.Node]:
    """The body with copies of what it reads but no `cond` takes: modules, tuples, sizes, views that share storage.

        %a, %b = chunk(%base, 2)                             %a, %b = chunk(%base, 2)   # for others
        %o     = attention(%x, %a, %b)   # the body    ->    %c, %d = chunk(%base, 2)   \\
                                                             %o     = attention(%x, %c, %d)  / the body
    """
    inside = set(body)
    while True:
        operands = dict.fromkeys(s for node in inside for s in node.all_input_nodes if s not in inside)
        shared = [
            view
            for view in operands
            if is_tuple(view)
            or is_sizes(view)
            or _is_module(view)
            or (effects.is_view(view) and any(view is not o and effects.may_alias(view, o) for o in operands))
        ]
        if not shared:
            return sorted(inside)
        for view in shared:
            with graph.inserting_before(view.next):
                own = graph.node_copy(view)
            view.replace_all_uses_with(own, delete_user_cb=lambda user: user in inside)
            inside.add(own)


def _is_module(node: fx.Node) -> bool:
    """Whether a node is a module handed to a higher-order operator, such as flex_attention's `score_mod`."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and owner is not None and isinstance(_attribute(owner, str(node.target)), nn.Module)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
