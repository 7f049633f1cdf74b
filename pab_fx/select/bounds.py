"""Where a region ends: which of its tensors are kept, and why it is computed in every step where that is not safe.

A region is made smaller until its outputs are tensors that share no storage; see `bounded`. It is unsafe to skip
what draws random numbers or updates a tensor from outside, and to move to one place what reads a tensor that is
updated meanwhile. No graph is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..graph.dataflow import is_tensor, is_tuple, op_name, shape, takes_item, tells_dtype, value
from ..graph.parts import stands_alone
from ..policy.where import BLOCKS, MODEL
from .region import Region

UNUSED = "none of its tensors is used outside of it"
UPDATED_LATER = "the module is called several times, and what a call yields is updated in place afterwards"
UPDATES_KEPT = "its output is updated in place afterwards; what is kept is the updated value, as with hooks"
UPDATES_NOT_KEPT = "its output is updated in place afterwards; what is kept is a copy from before"
NOT_ALIKE = "the module is called several times, and its calls are not alike"


def bounded_alike(graph: fx.Graph, calls: list[Region]) -> list[Region]:
    """The calls of one module with their outputs; the same ones for each, since they share caches.

    An output that only some calls use is kept by all. Calls that are not alike are computed every time.
    """
    bounded = [_bounded(graph, call) for call in calls]
    if len(calls) == 1 or calls[0].policy is None:
        return [
            replace(region, unsafe=UNUSED) if not region.outputs and region.is_broadcast else region
            for region in bounded
        ]
    places = [_places(dict.fromkeys((*call.nodes, *b.nodes))) for call, b in zip(calls, bounded, strict=True)]
    place_of = [{node: place for place, node in places_of_call.items()} for places_of_call in places]
    kept = dict.fromkeys(of[output] for of, region in zip(place_of, bounded, strict=True) for output in region.outputs)
    alike = len({tuple(map(op_name, _skeleton(call.nodes))) for call in calls}) == 1
    if not kept or not alike or any(region.unsafe for region in bounded):
        return [replace(region, unsafe=region.unsafe or NOT_ALIKE) for region in bounded]
    # what one call keeps, the next one reads before it is updated
    if any(UPDATES_KEPT in (region.note or "") for region in bounded):
        return [replace(region, unsafe=UPDATED_LATER) for region in bounded]
    if any(place not in at for at in places for place in kept):
        return [replace(region, unsafe=NOT_ALIKE) for region in bounded]
    regions = [
        replace(region, outputs=tuple(at[place] for place in kept)) for at, region in zip(places, bounded, strict=True)
    ]
    alike = len({tuple(map(_spec, region.outputs)) for region in regions}) == 1
    has_outputs = all(set(region.outputs) <= set(region.nodes) for region in regions)
    return regions if alike and has_outputs else [replace(region, unsafe=NOT_ALIKE) for region in regions]


def _skeleton(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """A call's nodes without items and slices: Dynamo drops those that nobody uses, call by call."""
    return [node for node in nodes if not takes_item(node)]


def _places(nodes: Iterable[fx.Node]) -> dict[Any, fx.Node]:
    """A call's nodes by what is the same in every call of the module: a position, or an item of one."""
    place_of: dict[fx.Node, Any] = {node: i for i, node in enumerate(_skeleton(nodes))}
    for node in nodes:
        if takes_item(node):
            place_of[node] = repr(fx.map_arg(node.args, lambda source: place_of.get(source, source)))
    return {place: node for node, place in place_of.items()}


def _spec(output: fx.Node) -> object:
    recorded = value(output)
    return (shape(output), recorded.dtype) if isinstance(recorded, torch.Tensor) else None


def _bounded(graph: fx.Graph, region: Region) -> Region:
    """The region with its outputs, or with the reason why it cannot be broadcast."""
    policy = region.policy
    if policy is None or region.unsafe:
        return region
    region = replace(region, nodes=_with_own_contexts(graph, region.nodes))
    unsafe = _unsafe(graph, region.nodes)
    if unsafe:
        return replace(region, unsafe=unsafe)
    # a residual is of all that the part yields
    may_be_view = MAY_BE_VIEWS.get(region.role, _never)
    may_be_product = region.role == MODEL or policy.how.reads_streams
    nodes, outputs, replayed = bounded(region.nodes, may_be_view, may_be_product)
    note, inside = region.note, set(nodes)
    if any(not inside.issuperset(effects.later_updates(graph, output)) for output in outputs):
        updates = UPDATES_KEPT if policy.how.keeps_updates else UPDATES_NOT_KEPT
        note = f"{note}; {updates}" if note else updates
    return replace(region, nodes=nodes, outputs=outputs, replayed=replayed, note=note)


def _with_own_contexts(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The nodes with those that enter and leave an autocast, or a choice of kernel, among them.

    No module is recorded for these. They are left out where they govern other nodes too.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    first, last, inside = order[nodes[0]], order[nodes[-1]], set(nodes)
    pairs = [pair for pair in effects.contexts(graph) if any(first < order[end] < last for end in pair)]
    switches = {end for pair in pairs for end in pair}
    own = {*switches, *(source for end in switches for source in end.all_input_nodes)}
    for enter, leave in pairs:
        governed = list(order)[order[enter] : order[leave]]
        if any(is_tensor(n) and not effects.is_view(n) for n in governed if n not in inside and n not in own):
            return nodes
    if any(user not in own for node in own for user in node.users):
        return nodes
    return tuple(sorted(inside | own))


def _never(node: fx.Node) -> bool:
    return False


def _always(node: fx.Node) -> bool:
    return True


MAY_BE_VIEWS: Mapping[str, Callable[[fx.Node], bool]] = {MODEL: _always, BLOCKS: stands_alone}
"""Which views may be outputs of a region, by role.

A whole model's prediction has to look like its sample. Where blocks have joined the text with the image, and only the
image goes on, neither is the text kept nor computed for what is added to it.
"""


def bounded(
    nodes: Iterable[fx.Node], may_be_view: Callable[[fx.Node], bool] = _never, may_be_product: bool = False
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Shrink a region to where its outputs are tensors that share no storage: its nodes, outputs, replayed nodes.

        %whole = linear(%x)                               %whole = linear(%x)           (output)
        %text  = getitem(%whole, 0:4)    (output)   ->    ---------------------------------------
        %image = getitem(%whole, 4:)     (output)         %text, %image as before, outside

    Views, sizes and items of tuples are cheap to take again from what is kept. So is a product with a number, such as
    the `hidden_states / attn.rescale_output_factor` at the end of diffusers' attentions: outside, a compiler fuses it
    with what follows, and inside, it would make one more tensor of what the last projection yields.

    Args:
        nodes: the region's.
        may_be_view: whether a view may be an output, if it is the only one of its tensor.
        may_be_product: whether an output may be a product with a number.
    """
    inside = dict.fromkeys(nodes)
    replayed: dict[fx.Node, None] = {}
    for node in list(inside):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is not None and source not in inside and is_tuple(source):
            del inside[node]  # an item of a tuple made outside: operands are tensors

    def is_used_outside(node: fx.Node) -> bool:
        outside = (user for user in node.users if user not in inside or user in replayed)
        return not all(tells_dtype(node, user) for user in outside)

    while True:
        outputs = [node for node in inside if node not in replayed and is_used_outside(node)]
        outer = next((node for node in outputs if not is_tensor(node) or _shares(node, outputs, may_be_view)), None)
        outer = outer or next((node for node in outputs if not may_be_product and _is_rescaled(node, inside)), None)
        if outer is None:
            return tuple(inside), tuple(outputs), tuple(replayed)
        items = [user for user in outer.users if user not in inside]
        if is_tuple(outer) and not effects.is_view(outer) and all(takes_item(user) for user in items):
            inside = {n: None for node in inside for n in ((node, *items) if node is outer else (node,))}
        elif any(user in inside for user in outer.users):
            replayed[outer] = None
        else:
            del inside[outer]


def _shares(node: fx.Node, outputs: Iterable[fx.Node], may_be_view: Callable[[fx.Node], bool]) -> bool:
    """Whether a node is a view, and no output as such."""
    others = any(output is not node and effects.may_alias(output, node) for output in outputs)
    return effects.is_view(node) and (others or not may_be_view(node))


def _is_rescaled(node: fx.Node, inside: Container[fx.Node]) -> bool:
    """Whether a tensor is another one of the region times a number, used only outside and never updated."""
    if op_name(node) not in ("mul", "div", "truediv") or len(node.all_input_nodes) != 1 or node.kwargs:
        return False
    (source,) = node.all_input_nodes
    kept = value(source)
    return (
        source in inside
        and node.args[0] is source
        and isinstance(kept, torch.Tensor)
        and kept.is_floating_point()
        and _spec(node) == _spec(source)
        and not any(user in inside for user in node.users)
        and not effects.updated(node)
        and not effects.later_updates(node.graph, node)
    )


def _unsafe(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> str | None:
    """Why these nodes cannot be skipped in a step, or cannot be moved to one place; `None` if they can."""
    inside = set(nodes)
    outside = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    for node in nodes:
        if effects.draws_random_numbers(node):
            return f"it draws random numbers ({node.name})"
        for target in effects.updated(node):
            if any(effects.may_alias(target, source) for source in outside):
                return f"it updates a tensor from outside in place ({node.name})"
    order = list(graph.nodes)
    first, last = order.index(nodes[0]), order.index(nodes[-1])
    for node in order[first:last]:
        if node not in inside and effects.sets_ambient_state(node):
            return f"autocast, or the choice of a kernel, changes while it runs ({node.name})"
        if node not in inside and any(
            effects.may_alias(target, source) for target in effects.updated(node) for source in outside
        ):
            return f"a tensor it reads is updated in place while it runs ({node.name})"
    return None
