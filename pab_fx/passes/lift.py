"""Turn the state of a rewritten graph from buffers into inputs and outputs, for a runtime that owns it.

Before:

    %x       : placeholder
    %compute : ... nodes that count and compare ...
    %cache   : get_attr[pab_cache_0]
    %cond    : call_function[cond](%compute, pab_compute_0, pab_read_0, (%cache, %x))
    %out     : call_function[operator.getitem](%cond, 0)
    %write   : call_function[aten.copy_](%cache, %out)
    return (%y,)

After:

    %x             : placeholder
    %pab_compute_0 : placeholder        # a bool on the CPU
    %pab_cache_0   : placeholder
    %cond          : call_function[cond](%pab_compute_0, pab_compute_0, pab_read_0, (%pab_cache_0, %x))
    %out           : call_function[operator.getitem](%cond, 0)
    return (%y, %out)

A module that is called several times hands its cache from call to call. Counters go: the runtime counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .._torch import cond_op, hold_strides, size_hint
from ..graph import effects
from ..graph.dataflow import value
from .rewrite import aten, conditionals, operands_of


@dataclass(frozen=True)
class Lifted:
    """A graph whose state is explicit, and what its further inputs and outputs are.

    Args:
        gm: takes the original inputs, then `predicates`, then `reads`; returns the original outputs, then
            `writes`.
        predicates: index of the conditional that each predicate input belongs to; it computes when it is true.
        reads: names of the caches that are read, each an input.
        writes: names of the caches that are written, each an output.
    """

    gm: fx.GraphModule
    predicates: tuple[int, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def lift(gm: fx.GraphModule) -> Lifted:
    """Lift the state of `gm`, in place. Its output must be a flat tuple, as Dynamo makes it."""
    graph = gm.graph
    predicates = _lift_predicates(graph)
    reads, written = _lift_caches(graph)
    output = graph.output_node()
    output.args = ((*output.args[0], *written.values()),)  # type: ignore[misc]
    effects.eliminate_dead_code(graph)
    for name in [name for name, _ in gm.named_buffers() if name.startswith("pab_")]:
        delattr(gm, name)
    graph.lint()
    gm.recompile()
    return Lifted(gm, predicates, reads, tuple(written))


def fix_operand_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Hold the operands of each `cond` to the strides that they were traced with, in place.

        %cond = cond(%compute, ..., (%cache, %x))    ->    %c    = hold_strides(%x)
                                                           %cond = cond(%compute, ..., (%cache, %c))

    Inductor compiles a branch for those strides, but is free to choose others for what the surrounding
    graph computes; the branch then refuses its operand at run time, and in a package of AOTInductor reads it wrongly
    (seen in 2.13).
    """
    for cond in conditionals(gm):
        operands = list(operands_of(cond))
        for i, operand in enumerate(operands):
            recorded = value(operand)
            if operand.op in ("placeholder", "get_attr") or not isinstance(recorded, torch.Tensor):
                continue
            with gm.graph.inserting_before(cond):
                operands[i] = gm.graph.call_function(hold_strides, (operand,))
            # a part of the module that attends
            operands[i].meta = {"nn_module_stack": cond.meta.get("nn_module_stack", {}), "example_value": recorded}
        cond.args = (*cond.args[:3], tuple(operands))
    gm.recompile()
    return gm


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


def fix_cache_strides(lifted: Lifted) -> Lifted:
    """Hold what is kept to one layout, in place: the one it was traced with, without gaps.

        return (%y, %out)    ->    %kept = in_order(%out, (0, 2, 1, 3))
                                   return (%y, %kept)

    A graph that is compiled for the strides of a cache refuses others at run time, and what one graph keeps
    another one reads.
    """
    graph = lifted.gm.graph
    for node in graph.find_nodes(op="placeholder"):
        if node.target in lifted.reads:
            node.meta["example_value"] = in_order(value(node), stride_order(value(node)))
    output = graph.output_node()
    outputs, written = list(output.args[0]), len(lifted.writes)  # type: ignore[arg-type]
    for i in range(len(outputs) - written, len(outputs)):
        found = outputs[i]
        recorded = value(found)
        with graph.inserting_before(effects.end_of_updates(graph, found)):
            kept = graph.call_function(in_order, (found, stride_order(recorded)))
        # a part of the module that it is computed in: `regional` keeps the two together
        kept.meta = {**found.meta, "example_value": in_order(recorded, stride_order(recorded))}
        outputs[i] = kept
    output.args = (tuple(outputs),)
    lifted.gm.recompile()
    return lifted


def _lift_predicates(graph: fx.Graph) -> tuple[int, ...]:
    """Give each conditional a predicate input of its own; return the conditionals' indices in that order."""
    found = conditionals(_owner(graph))
    for cond, conditional in found.items():
        predicate = _placeholder(graph, f"pab_compute_{conditional.index}", torch.tensor(True))
        cond.args = (predicate, *cond.args[1:])
    return tuple(conditional.index for conditional in found.values())


def _lift_caches(graph: fx.Graph) -> tuple[tuple[str, ...], dict[str, fx.Node]]:
    """Replace reads by inputs, or by what the graph wrote before; return the reads and the values written."""
    reads: dict[str, fx.Node] = {}
    written: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.copy_.default and _state_name(node.args[0]):
            name = _state_name(node.args[0])
            if name.startswith("pab_cache_"):
                written[name] = node.args[1]
            target = node.args[0]
            graph.erase_node(node)
            if _is_resize(target):
                graph.erase_node(target)
        elif node.op == "get_attr" and str(node.target).startswith("pab_cache_"):
            readers = [user for user in node.users if user.target is not aten.copy_.default and not _is_resize(user)]
            if not readers:
                continue
            name = str(node.target)
            current = written.get(name) or reads.get(name)
            if current is None:
                current = reads[name] = _placeholder(graph, name, _recorded(node))
            node.replace_all_uses_with(current, delete_user_cb=lambda user: user in readers)  # noqa: B023
    return tuple(reads), written


def _state_name(target: object) -> str:
    """Name of the buffer that a write goes to, "" if it is none of the rewrite's."""
    if isinstance(target, fx.Node) and _is_resize(target):
        target = target.args[0]
    if isinstance(target, fx.Node) and target.op == "get_attr" and str(target.target).startswith("pab_"):
        return str(target.target)
    return ""


def _is_resize(node: fx.Node) -> bool:
    return node.target is aten.resize_as_.default


def _recorded(cache: fx.Node) -> object:
    """The value recorded for what a cache holds: that of the output it is read in place of."""
    if value(cache) is not None:
        return value(cache)
    for user in cache.users:
        if user.target is cond_op:
            items = {item.args[1]: item for item in user.users}
            item = items.get(operands_of(user).index(cache))
            return value(item) if item is not None else None
    return None


def _placeholder(graph: fx.Graph, name: str, recorded: object) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(last.next):
        node = graph.placeholder(name)
    node.meta["example_value"] = recorded
    return node


def _owner(graph: fx.Graph) -> fx.GraphModule:
    assert graph.owning_module is not None
    return graph.owning_module
