"""Attentions with their gate: the region goes on to where what the block gives multiplies the attention's output.

    %g : getitem(%modulation, 2)    # of the timestep
    %a : attention(%n)              # the region                         # the region,
    %t : transpose(%a, 1, 2)                                    ->       # and this too,
    %p : mul(%g, %t)                                                     # up to here: %p is what is kept
    %y : add(%x, %p)

No graph is changed here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import fx

from ..graph import effects
from ..graph.dataflow import backward, is_nonlinear, is_projection, op_name, shape, tells_dtype
from .region import Region
from .streams import MULTIPLICATIONS, SUMS
from .view import View

GATED = "what is kept is its product with the gate"
FUSED = "its product with the gate is one operation with a sum (addcmul), so it is kept without the gate"
UNGATED = "no product with a gate is the only use of its output, so it is kept as it is"

FUSED_PRODUCTS = {"addcmul", "addcmul_"}


def with_gate(region: Region, view: View, taken: Collection[fx.Node]) -> Region:
    """The region up to the product with its gate, if its policy asks for that and there is one.

    Args:
        region: of an attention.
        view: its graph.
        taken: the nodes of other regions.
    """
    if region.policy is None or region.unsafe or not region.policy.where.gated:
        return region
    inside = frozenset(region.nodes)
    way, products, fused = _downstream(inside, view, taken)
    products = _only_uses(products, way, inside)
    if not products:
        return replace(region, note=FUSED if fused else UNGATED)
    nodes = inside.union(_leading_to(products, way, inside))
    return replace(region, nodes=tuple(sorted(nodes)), note=GATED)


def _downstream(
    inside: Collection[fx.Node], view: View, taken: Collection[fx.Node]
) -> tuple[set[fx.Node], list[fx.Node], bool]:
    """A region and what is made of it alone, but for gates; the products with these that are added to something else;
    and whether there is one that is fused with its sum.
    """
    way, products, added, is_fused = set(inside), set[fx.Node](), list[fx.Node](), False
    further: set[fx.Node] = set()  # what else depends on the region: as a gate, it would be before and after it
    for node in view.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in view.acts]
        own = [source for source in sources if source in way]
        if node in inside or (not own and further.isdisjoint(sources)):
            continue
        if not further.isdisjoint(sources) or node in taken or node in view.cores:
            further.add(node)
        elif len(own) == len(sources) and _hands_on(node, view.acts):
            way.add(node)
        elif op_name(node) in MULTIPLICATIONS and len(sources) == 2 and shape(node) == shape(own[0]):
            way.add(node)
            products.add(node)
        else:
            further.add(node)
            added += own if op_name(node) in SUMS and len(own) < len(sources) else ()
            is_fused = is_fused or (op_name(node) in FUSED_PRODUCTS and sources[0] not in own)
    ends = products.intersection(_leading_to(added, way, products))
    return way, sorted(ends), is_fused


def _hands_on(node: fx.Node, acts: set[fx.Node]) -> bool:
    """Whether a node may lie between an attention, its gate and a sum: a view, a cast, a norm, a weight."""
    does_more = is_projection(node, acts) or is_nonlinear(node) or node.op == "output"
    return not (does_more or effects.updated(node) or effects.draws_random_numbers(node))


def _only_uses(products: list[fx.Node], way: Collection[fx.Node], inside: Collection[fx.Node]) -> list[fx.Node]:
    """Those of the products that have to themselves what leads from the region to them."""
    while products:
        led = set(_leading_to(products, way, inside))

        def has_other_uses(node: fx.Node, led: set[fx.Node] = led, ends: Collection[fx.Node] = products) -> bool:
            other = [user for user in node.users if user not in led and user not in inside]
            return not all(tells_dtype(node, user) for user in other) or sum(user in ends for user in node.users) > 1

        shared = set(filter(has_other_uses, led.difference(products)))
        if not shared:
            break
        products = [node for node in products if shared.isdisjoint(_leading_to([node], way, inside))]
    return products


def _leading_to(nodes: Iterable[fx.Node], way: Collection[fx.Node], start: Collection[fx.Node]) -> Iterable[fx.Node]:
    """Nodes and what leads to them on the way, back to where it starts."""
    return backward(nodes, start.__contains__, lambda node: [each for each in node.all_input_nodes if each in way])
