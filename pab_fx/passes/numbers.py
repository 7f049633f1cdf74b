"""Make numbers of the model's own constants again, where an attention or a dropout takes them.

With `dynamic=True` Dynamo traces every float as an input, also a dropout's 0.0 and the scale of an attention:

    %p_tensor : placeholder                                 # a default argument, a module's attribute
    %p        : call_method[item](%p_tensor)
    %out      : scaled_dot_product_attention(%q, %k, %v, None, %p)
    ->
    %out      : scaled_dot_product_attention(%q, %k, %v, None, 0.0)

A dropout by an unknown probability would be one that draws, and a `cond` takes no floats. Dynamo's guards come to
hold the value, so that another one is traced anew. What the caller passes stays an input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from .._torch import belongs_to_model
from ..graph.dataflow import is_number, op_name, value
from ..select.region import Region

TAKERS = {"scaled_dot_product_attention", "dropout", "dropout_", "native_dropout"}


def fix_numbers(gm: fx.GraphModule, everywhere: bool = False) -> fx.GraphModule:
    """Rewrite `gm`, in place, as the module's docstring shows.

    Args:
        gm: a captured graph.
        everywhere: for whatever takes a number of the model's own. A branch of a `cond` cannot read one: that would be
            a value that only the data tell.
    """
    for node in gm.graph.nodes:
        if not everywhere and op_name(node) not in TAKERS:
            continue
        known = {source: float(value(source)) for source in node.all_input_nodes if _is_the_models(source)}

        def constant(source: fx.Node, known: dict[fx.Node, float] = known) -> fx.Node | float:
            return known.get(source, source)

        if known:
            node.args, node.kwargs = fx.map_arg(node.args, constant), fx.map_arg(node.kwargs, constant)
    for node in reversed(gm.graph.find_nodes(op="call_method", target="item")):
        if not node.users and _is_the_models(node):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _is_the_models(node: fx.Node) -> bool:
    """Whether a node is a float that the code or a module holds, and not an argument of the call."""
    if not isinstance(value(node), torch.SymFloat) or op_name(node) != "item":
        return False
    (source,) = node.all_input_nodes
    return source.op == "placeholder" and belongs_to_model(source)


def without_numbers(region: Region) -> Region:
    """The region, unsafe if it reads a number that is no constant: a `cond` takes tensors and integers."""
    inside = set(region.nodes)
    outside = {source for node in region.nodes for source in node.all_input_nodes if source not in inside}
    numbers = [source.name for source in outside if is_number(source)]
    if region.is_broadcast and numbers:
        return replace(region, unsafe=f"lowering='cond' cannot hand it the number {numbers[0]}")
    return region
