"""One layout in memory for what is kept, and for what conditions take and yield.

    return ((%y,), %out)         ->    %kept = in_order(%out, (0, 2, 1, 3))
                                       return ((%y,), %kept)

    %cond = cond(..., (%x,))     ->    %c    = hold_strides(%x)
                                       %cond = cond(..., (%c,))

    read(%slot, %x)              ->    read(%slot, %x)
        return (%x + %slot,)               return (in_order(%x + %slot, (0, 1, 2)),)

A compiler is free to lay out what it computes, and a graph that is compiled for the strides of an input refuses others
at run time: what one graph keeps another one reads.
"""

from __future__ import annotations

import torch
from torch import fx

from .._torch import size_hint
from .._torch.inductor import hold_strides
from ..graph import effects
from ..graph.dataflow import value
from ..graph.parts import taken
from .form import (
    Slot,
    branches_of,
    conditionals,
    inputs_of,
    operands_of,
    set_slots_returned,
    slots_returned,
    with_branches,
)


def fix_slot_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Hold what is kept to the layout that it was traced with, without gaps, in place."""
    for node in inputs_of(gm, Slot).values():
        node.meta["example_value"] = in_order(value(node), stride_order(value(node)))
    kept = {}
    for slot, found in slots_returned(gm).items():
        with gm.graph.inserting_before(effects.end_of_updates(gm.graph, found)):
            kept[slot] = _laid_out(found, stride_order(value(found)))
    set_slots_returned(gm, kept)
    return gm


def fix_operand_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Hold the operands of each `cond` to the strides that they were traced with, in place.

    Inductor compiles a branch for those strides, but is free to choose others for what the surrounding
    graph computes; the branch then refuses its operand at run time, and in a package of AOTInductor reads it wrongly
    (seen in 2.13).
    """
    for graph in with_branches(gm):
        for cond in conditionals(graph):
            operands = tuple(_held(operand, cond) for operand in operands_of(cond))
            cond.args = (*cond.args[:3], operands)
        graph.recompile()
    return gm


def _held(operand: fx.Node, cond: fx.Node) -> fx.Node:
    recorded = value(operand)
    if operand.op in ("placeholder", "get_attr") or not isinstance(recorded, torch.Tensor):
        return operand
    with cond.graph.inserting_before(cond):
        held = cond.graph.call_function(hold_strides, (operand,))
    # a part of the module that attends
    held.meta = {"nn_module_stack": cond.meta.get("nn_module_stack", {}), "example_value": recorded}
    return held


def fix_branch_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Let the branch of each `cond` that reads yield what lies in memory as what the other one yields, in place.

    Compilers and `torch.export` refuse others. A stream may enter a block by columns, from a patch embedding, and leave
    it by rows. What is a part of another tensor gets memory of its own: where it begins is compared too.
    """
    for computing, reading in [branches_of(graph, cond) for graph in with_branches(gm) for cond in conditionals(graph)]:
        output = computing.graph.output_node()
        with computing.graph.inserting_before(output):
            output.args = (tuple(map(_by_itself, output.args[0])),)  # type: ignore[arg-type]
        computing.recompile()
        output = reading.graph.output_node()
        pairs = zip(output.args[0], computing.graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
        with reading.graph.inserting_before(output):
            output.args = (tuple(_like(node, value(look)) for node, look in pairs),)
        reading.recompile()
    return gm


def _by_itself(node: fx.Node) -> fx.Node:
    """The node, copied where it is a part of another one."""
    return node if taken(node) is None else _laid_out(node, stride_order(value(node)))


def _laid_out(node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """The node with its dimensions in an order, where nodes are inserted now; a part of another one is copied."""
    layout = in_order if taken(node) is None else copied_in_order
    laid_out = node.graph.call_function(layout, (node, order))
    # a part of the module that it is computed in: `regional` keeps the two together
    laid_out.meta = {**node.meta, "example_value": layout(value(node), order)}
    return laid_out


def _like(node: fx.Node, look: object) -> fx.Node:
    """The node, laid out as a tensor looks."""
    made = value(node)
    if not isinstance(made, torch.Tensor) or not isinstance(look, torch.Tensor):
        return node
    order = stride_order(look)
    return node if stride_order(made) == order else _laid_out(node, order)


def stride_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor, outermost in memory first.

    Example:
        >>> stride_order(torch.empty(2, 3, 5).transpose(1, 2))
        (0, 2, 1)
    """
    strides = list(map(size_hint, tensor.stride()))
    return tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))


def in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, dense in memory with its dimensions in that order; itself if it is so already."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def copied_in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same in memory of its own: a part that has no gaps would stay where it is by `in_order`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)
