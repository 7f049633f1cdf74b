"""Decide the conditions of a rewritten graph: partial evaluation with known predicates.

Before:

    %cond : call_function[cond](%computes_0, compute_0, read_0, (%slot_0_0, %x))
    %out  : call_function[operator.getitem](%cond, 0)
    %y    : call_function[operator.add](%x, %out)
    return ((%y,), %out)

After, where it is known to compute:                    and where it is known to reuse:

    %norm : call_function[layer_norm](%x)                   %y : call_function[operator.add](%x, %slot_0_0)
    %out  : call_function[attention](%norm)                 return ((%y,),)
    %y    : call_function[operator.add](%x, %out)
    return ((%y,), %out)

Conditions that are not decided stay (the residual), with those inside of them. Where state was sunk into buffers, a
write of a slot that is left as it was goes in the same way.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..graph.copies import copy_of
from ..policy.where import ROLES
from .form import (
    COPY,
    Conditional,
    all_conditionals,
    branches_of,
    conditionals,
    mark_of,
    operands_of,
    set_slots_returned,
    slots_returned,
)


def specialize(
    gm: fx.GraphModule, reuse: Collection[str] = (), compute: Collection[str] | None = None
) -> fx.GraphModule:
    """The rewritten graph with its conditions decided, and without what is dead then.

    Args:
        gm: from `rewrite`; it is not changed.
        reuse: what reuses, one or several: roles ("spatial") or names of regions ("blocks.0.attn1"); a name
            stands for all calls of that module, `name#1` for its second.
        compute: what computes; `None` for everything that is not in `reuse`. What is in neither stays
            conditional.

    Returns:
        A new GraphModule with the buffers of `gm`: it goes on counting and writing what it computes.

    Raises:
        TypeError: if `gm` is no graph.
        ValueError: for a name that is neither a role nor a region of the graph, or that is in both.

    Example:
        >>> import torch
        >>> from pab_fx import rewrite
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x, timestep):
        ...         return x + torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> reusing = specialize(rewrite(torch.fx.symbolic_trace(Attention())), reuse={"spatial"})
        >>> any("attention" in str(node.target) for node in reusing.graph.nodes)
        False
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"specialize takes a graph from rewrite, got {type(gm).__name__}.")
    reuse = {reuse} if isinstance(reuse, str) else reuse
    compute = {compute} if isinstance(compute, str) else compute
    result = copy_of(gm)
    found = all_conditionals(result)
    names = {name for conditional in found for name in _names(conditional)}
    for name in (*reuse, *(compute or ())):
        if name not in names and name not in ROLES:
            raise ValueError(f"{name!r} is neither a role nor a region of this graph; it has {sorted(names)}.")
    decisions: dict[int, bool] = {}
    for conditional in found:
        reused = any(name in reuse for name in _names(conditional))
        computed = not reused if compute is None else any(name in compute for name in _names(conditional))
        if reused and computed:
            raise ValueError(f"{conditional.name} is in both reuse={reuse!r} and compute={compute!r}.")
        if reused or computed:
            decisions[conditional.index] = reused
    decided = decide(result, decisions, writes_in_place=True)
    decided.graph.lint()
    return copy_of(decided)  # the copy holds only what the graph still refers to


def _names(conditional: Conditional) -> tuple[str, ...]:
    return (conditional.role, conditional.name, conditional.label)


def decide(gm: fx.GraphModule, reuse: Mapping[int, bool], writes_in_place: bool = False) -> fx.GraphModule:
    """Decide conditionals of `gm`, in place; what lies inside of one that stays is not decided.

    Args:
        gm: is changed.
        reuse: index of the conditional to whether it reuses.
        writes_in_place: whether slots are buffers that the graph writes to. Then what one call of a module reuses is
            copied if there is a later one, whose output may be kept before this one's is read for the last time.
    """
    unused = effects.unused(gm.graph)
    while (known := _next_known(gm, reuse)) is not None:  # what lies inside of one comes to light where that computes
        cond, conditional = known
        reused = reuse[conditional.index]
        results = _inlined(gm, cond, reused)
        if reused and writes_in_place:
            _spare_moved(gm, cond, conditional, results)
        if reused and writes_in_place and conditional.call + 1 < conditional.calls:
            with gm.graph.inserting_before(cond):
                results[: conditional.outputs] = [
                    gm.graph.call_function(torch.clone, (each,)) for each in results[: conditional.outputs]
                ]
        for i, item in _items(cond).items():
            item.replace_all_uses_with(results[i], propagate_meta=False)
            results[i].meta.update(item.meta)
            gm.graph.erase_node(item)
        branches: Any = cond.args[1:3]
        gm.graph.erase_node(cond)
        for branch in branches:
            gm.graph.erase_node(branch)
            gm.delete_submodule(str(branch.target))
    _drop_unchanged(gm)
    effects.eliminate_dead_code(gm.graph, unused)
    return gm


def _spare_moved(gm: fx.GraphModule, cond: fx.Node, conditional: Conditional, results: list[fx.Node]) -> None:
    """Copy what an output or a slot becomes if that is what a slot was that changes: it may be written to before.

    write(%slot_0, %slot_1)           %was_1 = clone(%slot_1)
    write(%slot_1, %slot_0)    ->     %was_0 = clone(%slot_0)
                                      write(%slot_0, %was_1)
                                      write(%slot_1, %was_0)
    """
    own = operands_of(cond)[: len(conditional.slots)]
    changed = {slot for slot, item in zip(own, conditional.items, strict=True) if results[item] is not slot}
    for i, result in enumerate(results):
        if result in changed:
            with gm.graph.inserting_before(cond):
                results[i] = gm.graph.call_function(torch.clone, (result,))


def _next_known(gm: fx.GraphModule, reuse: Mapping[int, bool]) -> tuple[fx.Node, Conditional] | None:
    return next((each for each in conditionals(gm).items() if each[1].index in reuse), None)


def _items(cond: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in cond.users if user.target is operator.getitem}  # type: ignore[misc]


def _drop_unchanged(gm: fx.GraphModule) -> None:
    """Neither return nor write a slot that is as it was, nor take one that nothing reads."""
    if mark_of(gm.graph.output_node()) is not None:
        set_slots_returned(gm, {slot: node for slot, node in slots_returned(gm).items() if mark_of(node) != slot})
        for node in gm.graph.find_nodes(op="placeholder"):
            if mark_of(node) is not None and not node.users:
                gm.graph.erase_node(node)
    for write in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target, source = write.args
        sized = target if target.target is torch.ops.aten.resize_as_.default else None
        buffer = target if sized is None else sized.args[0]
        if buffer.op == "get_attr" and source.op == "get_attr" and buffer.target == source.target:
            gm.graph.erase_node(write)
            if sized is not None:
                gm.graph.erase_node(sized)


def _adopt(gm: fx.GraphModule, branch: fx.GraphModule, path: str) -> None:
    """Give `gm` the module that its branch calls, at the same path, unless it still has it."""
    try:
        gm.get_submodule(path)
    except AttributeError:
        gm.add_submodule(path, branch.get_submodule(path))


def _inlined(gm: fx.GraphModule, cond: fx.Node, reused: bool) -> list[fx.Node]:
    """Copy a branch before `cond` and return what it yields, without the copies that only a branch needs."""
    branch = branches_of(gm, cond)[reused]
    inputs = branch.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(inputs, operands_of(cond), strict=True))
    with gm.graph.inserting_before(cond):
        for node in branch.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if mark_of(node) == COPY:
                copies[node] = copies[node.args[0]]
                continue
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                _adopt(gm, branch, str(node.target))
    results: Any = branch.graph.output_node().args[0]
    return [copies[result] for result in results]
