"""One layout in memory for what the parts of a graph hand to each other, so that alike blocks are compiled once.

    %b = permute(%a, ...)      # another part reads it    ->    %b = permute(%a, ...)
                                                                %c = contiguous(%b)

A block is compiled for the strides of its inputs. Those of the first block are often others than those of the
blocks after it, as an image that was cut in patches comes out transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graph import effects
from ..graph.copies import evaluated
from ..graph.dataflow import value


class _Impossible(Exception):
    """Other layouts would change what a graph computes, or they cannot be known."""


def fix_layouts(graph: fx.Graph, part_of: dict[fx.Node, int]) -> None:
    """Hold what is computed in one part and read in another to the dense layout, in place.

    The layout of what follows may become another one: it is recorded anew. Where that is not possible, as where a
    view can be taken only of the layout that was, the graph is left as it is, and more blocks are told apart.
    """
    metas = {node: dict(node.meta) for node in graph.nodes}
    aliases = {node for node in part_of if effects.is_view(node)}
    updated = [target for node in part_of for target in effects.updated(node)]
    held: list[fx.Node] = []
    changed: set[fx.Node] = set()
    try:
        for node, part in list(part_of.items()):
            if any(source in changed for source in node.all_input_nodes):
                _record_anew(node, changed, node in aliases)
            readers = [user for user in node.users if part_of.get(user, part) != part]
            if readers and not _is_dense(value(node)) and not any(effects.may_alias(node, each) for each in updated):
                held.append(_hold(node, readers, part_of))
                changed.add(held[-1])
    except Exception:  # which one it is depends on the operation that refuses the layout
        for dense in held:
            dense.replace_all_uses_with(dense.all_input_nodes[0])
            graph.erase_node(dense)
            del part_of[dense]
        for node, meta in metas.items():
            node.meta = meta


def _is_dense(recorded: Any) -> bool:
    is_strided = isinstance(recorded, torch.Tensor) and recorded.layout is torch.strided
    return not is_strided or recorded.is_contiguous()


def _hold(node: fx.Node, readers: list[fx.Node], part_of: dict[fx.Node, int]) -> fx.Node:
    """Hand a dense copy of a node's tensor to its readers."""
    with node.graph.inserting_after(node):
        dense = node.graph.call_method("contiguous", (node,))
    dense.meta = {**node.meta, "example_value": value(node).contiguous()}
    part_of[dense] = part_of[node]
    node.replace_all_uses_with(dense, delete_user_cb=lambda user: user in readers)
    return dense


def _record_anew(node: fx.Node, changed: set[fx.Node], was_alias: bool) -> None:
    """Record what a node yields for operands of another layout; note it as changed if that has another layout, too."""
    if any(target in changed for target in effects.updated(node)) or node.meta.get("unbacked_bindings"):
        raise _Impossible  # a copy may be a view now, and a size that only the data tell has a name already
    before, result = value(node), evaluated(node, _operand)
    leaves, others = pytree.tree_leaves(before), pytree.tree_leaves(result)
    if len(leaves) != len(others) or any(_kind(a) != _kind(b) for a, b in zip(leaves, others, strict=True)):
        raise _Impossible
    node.meta["example_value"] = result
    if was_alias or effects.is_view(node) or list(map(_strides, leaves)) != list(map(_strides, others)):
        changed.add(node)
    else:
        node.meta["example_value"] = before  # whose storage is that of its views


def _operand(source: fx.Node) -> Any:
    """The recorded value of an operand; a nested graph as it is."""
    if source.op == "get_attr":
        held: Any = source.graph.owning_module
        for name in str(source.target).split("."):
            held = getattr(held, name)
        return held if isinstance(held, fx.GraphModule) else value(source)
    return value(source)


def _kind(given: Any) -> Any:
    """What a value is, up to its layout; sizes as text, since to compare symbolic ones would guard them."""
    if isinstance(given, torch.Tensor):
        return type(given), str(tuple(given.shape)), given.dtype, given.device, given.requires_grad
    return str(given)


def _strides(given: Any) -> str:
    return str(given.stride()) if isinstance(given, torch.Tensor) and given.layout is torch.strided else ""
