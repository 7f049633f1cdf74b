"""Give the state of a rewritten graph one copy for each cache context, and the graph an input that says which.

Before:

    %x       : placeholder
    %calls   : get_attr[pab_calls]                                             # []
    %compute : ... nodes that read %calls ...
    %cache   : get_attr[pab_cache_0]                                           # [B, S, D]
    %cond    : call_function[cond](%compute, pab_compute_0, pab_read_0, (%cache, %x))
    %out     : call_function[operator.getitem](%cond, 0)
    %write   : call_function[aten.copy_](%cache, %out)
    %count   : call_function[aten.copy_](%calls, %n_next)

After, for two contexts:

    %x           : placeholder
    %pab_context : placeholder                                                 # an integer tensor: 0 or 1
    %index       : call_function[torch.reshape](%pab_context, (1,))
    %stack       : get_attr[pab_calls]                                         # [2]
    %calls       : call_function[torch.index_select](%stack, 0, %index), reshaped to []
    %compute     : ... nodes that read %calls ...
    %cache       : get_attr[pab_cache_0]                                       # [2, B, S, D]
    %cond        : call_function[cond](%compute, pab_compute_0, pab_read_0, (%cache, %x, %index))
    %out         : call_function[operator.getitem](%cond, 0)
    %write       : call_function[aten.index_copy_](%cache, 0, %index, unsqueeze(%out, 0))
    %count       : call_function[aten.index_copy_](%stack, 0, %index, unsqueeze(%n_next, 0))

The branch that reads takes its context's entry of the cache: where the attention is computed, none is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .._torch import add_keyword
from ..passes.lift import in_order, stride_order
from ..passes.rewrite import aten, conditionals, operands_of

CONTEXT = "pab_context"
"""Name of the input that says whose state a call reads and writes."""


def stack_contexts(gm: fx.GraphModule, count: int) -> fx.GraphModule:
    """Stack the state of `gm`, in place, as the module's docstring shows.

    Args:
        gm: a rewritten graph of `torch.export`.
        count: how many contexts there are.
    """
    index = _index(gm)
    for cond, conditional in conditionals(gm).items():
        caches = [gm.get_buffer(name) for name in conditional.caches]
        _read_inside(gm, cond, caches, index)
    writes = list(_writes(gm.graph))
    for name in dict.fromkeys(str(write.args[0].target) for write in writes):  # type: ignore[union-attr]
        gm.register_buffer(name, torch.stack([gm.get_buffer(name)] * count), persistent=False)
        for read in gm.graph.find_nodes(op="get_attr", target=name):
            _read_outside(gm.graph, read, index)
    for write in writes:
        _write_entry(gm.graph, write, index)
    gm.graph.lint()
    gm.recompile()
    return gm


def _index(gm: fx.GraphModule) -> fx.Node:
    """The context as an index [1], on the CPU."""
    context = add_keyword(gm, CONTEXT)
    with gm.graph.inserting_after(context):
        return gm.graph.call_function(torch.reshape, (context, (1,)))


def _writes(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        target = node.args[0]
        if isinstance(target, fx.Node) and target.op == "get_attr" and str(target.target).startswith("pab_"):
            yield node


def _read_inside(gm: fx.GraphModule, cond: fx.Node, caches: list[torch.Tensor], index: fx.Node) -> None:
    """Hand a `cond` the context, and let the branch that reads take that entry of each cache, laid out as it was."""
    with gm.graph.inserting_before(cond):
        index = _on_device_of(caches[0], index)
    cond.args = (*cond.args[:3], (*operands_of(cond), index))
    branches: list[Any] = [gm.get_submodule(str(branch.target)) for branch in cond.args[1:3]]  # type: ignore[union-attr]
    compute, read = branches
    for branch in (compute, read):
        last = branch.graph.find_nodes(op="placeholder")[-1]
        with branch.graph.inserting_after(last):
            entry = branch.graph.placeholder("pab_index")
    for clone, cache in zip(read.graph.find_nodes(op="call_function", target=torch.clone), caches, strict=True):
        with read.graph.inserting_before(clone):
            chosen = read.graph.call_function(torch.index_select, (clone.args[0], 0, entry))
            chosen = read.graph.call_function(torch.squeeze, (chosen, 0))
            clone.replace_all_uses_with(read.graph.call_function(in_order, (chosen, stride_order(cache))))
        read.graph.erase_node(clone)
    compute.recompile()
    read.recompile()


def _read_outside(graph: fx.Graph, read: fx.Node, index: fx.Node) -> None:
    """Take the context's entry of a counter; what goes into a `cond` or is written to is the stack."""
    readers = [user for user in read.users if user.target is not aten.copy_.default and user not in _conds(graph)]
    if readers:
        with graph.inserting_after(read):
            chosen = graph.call_function(torch.index_select, (read, 0, index))
        with graph.inserting_after(chosen):
            entry = graph.call_function(torch.squeeze, (chosen, 0))
        read.replace_all_uses_with(entry, delete_user_cb=lambda user: user in readers)


def _conds(graph: fx.Graph) -> set[fx.Node]:
    return set(conditionals(graph.owning_module))  # type: ignore[arg-type]


def _write_entry(graph: fx.Graph, write: fx.Node, index: fx.Node) -> None:
    stack, written = write.args
    assert isinstance(stack, fx.Node)
    with graph.inserting_before(write):
        index = _on_device_of(graph.owning_module.get_buffer(str(stack.target)), index)  # type: ignore[union-attr]
        entry = graph.call_function(torch.unsqueeze, (written, 0))
        graph.call_function(aten.index_copy_.default, (stack, 0, index, entry))
    graph.erase_node(write)


def _on_device_of(buffer: torch.Tensor, index: fx.Node) -> fx.Node:
    """The index where the caches are; counters and the index itself are on the CPU."""
    return index if buffer.device.type == "cpu" else index.graph.call_method("to", (index, buffer.device))
