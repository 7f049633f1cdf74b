"""Decide the conditions of a rewritten graph: partial evaluation with known predicates.

Before:

    %cond  : call_function[cond](%compute, pab_compute_0, pab_read_0, (%cache, %x))
    %out   : call_function[operator.getitem](%cond, 0)
    %write : call_function[aten.copy_](%cache, %out)
    %y     : call_function[operator.add](%x, %out)

After, where it is known to compute:                    and where it is known to reuse:

    %norm  : call_function[layer_norm](%x)                  %cache : get_attr[pab_cache_0]
    %out   : call_function[attention](%norm)                %y     : call_function[operator.add](%x, %cache)
    %write : call_function[aten.copy_](%cache, %out)
    %y     : call_function[operator.add](%x, %out)

Conditions that are not decided stay (the residual).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..policy.config import ROLES
from .rewrite import Conditional, aten, conditionals, copy_of, operands_of


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
        ValueError: for a role or name that is none of the graph's, or that is in both.

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
    found = conditionals(result)
    names = {name for conditional in found.values() for name in _names(conditional)}
    for name in (*reuse, *(compute or ())):
        if name not in names and name not in ROLES:
            raise ValueError(f"{name!r} is neither a role nor a region of this graph; it has {sorted(names)}.")
    decisions: dict[int, bool] = {}
    for conditional in found.values():
        reused = any(name in reuse for name in _names(conditional))
        computed = not reused if compute is None else any(name in compute for name in _names(conditional))
        if reused and computed:
            raise ValueError(f"{conditional.name} is in both reuse={reuse!r} and compute={compute!r}.")
        if reused or computed:
            decisions[conditional.index] = reused
    decided = decide(result, decisions, writes_in_place=True)
    return copy_of(decided)  # the copy holds only what the graph still refers to


def _names(conditional: Conditional) -> tuple[str, ...]:
    return (conditional.role, conditional.name, f"{conditional.name}#{conditional.call}")


def decide(gm: fx.GraphModule, reuse: dict[int, bool], writes_in_place: bool = False) -> fx.GraphModule:
    """Decide conditionals of `gm`, in place.

    Args:
        gm: is changed.
        reuse: index of the conditional to whether it reuses.
        writes_in_place: whether caches are tensors that the graph writes to. Then what one call of a module reuses is
            copied if there is a later one, whose output may be kept before this one's is read for the last time.
    """
    unused = effects.unused(gm.graph)
    for cond, conditional in conditionals(gm).items():
        if conditional.index not in reuse:
            continue
        items = _items(cond)
        caches = operands_of(cond)[: len(conditional.caches)]
        if reuse[conditional.index] and writes_in_place and conditional.call + 1 < conditional.calls:
            with gm.graph.inserting_before(cond):
                caches = tuple(gm.graph.call_function(torch.clone, (cache,)) for cache in caches)
        results = caches if reuse[conditional.index] else _inline(gm, cond)
        for i, item in items.items():
            if reuse[conditional.index]:
                _erase_writes(gm.graph, item)
            item.replace_all_uses_with(results[i], propagate_meta=False)
            results[i].meta.update(item.meta)
            gm.graph.erase_node(item)
        branches: Any = cond.args[1:3]
        gm.graph.erase_node(cond)
        for branch in branches:
            gm.graph.erase_node(branch)
            gm.delete_submodule(str(branch.target))
    effects.eliminate_dead_code(gm.graph, unused)
    gm.graph.lint()
    gm.recompile()
    return gm


def _items(cond: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in cond.users if user.target is operator.getitem}  # type: ignore[misc]


def _erase_writes(graph: fx.Graph, item: fx.Node) -> None:
    """Take out the writes of a reused output: they would copy a cache onto itself."""
    for write in [user for user in item.users if user.target is aten.copy_.default and user.args[1] is item]:
        graph.erase_node(write)
    for resize in [user for user in item.users if user.target is aten.resize_as_.default and not user.users]:
        graph.erase_node(resize)


def _adopt(gm: fx.GraphModule, branch: fx.GraphModule, path: str) -> None:
    """Give `gm` the module that its branch calls, at the same path, unless it still has it."""
    try:
        gm.get_submodule(path)
    except AttributeError:
        gm.add_submodule(path, branch.get_submodule(path))


def _inline(gm: fx.GraphModule, cond: fx.Node) -> Sequence[fx.Node]:
    """Copy the computing branch before `cond` and return what it yields."""
    prefix = str(cond.args[1].target)  # type: ignore[union-attr]
    branch: fx.GraphModule = gm.get_submodule(prefix)  # type: ignore[assignment]
    inputs = branch.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(inputs, operands_of(cond), strict=True))
    with gm.graph.inserting_before(cond):
        for node in branch.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                _adopt(gm, branch, str(node.target))
    results: Any = branch.graph.output_node().args[0]
    return [copies[result] for result in results]
