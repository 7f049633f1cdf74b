"""`rewrite`: a traced graph becomes a module that broadcasts by itself."""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from ..diffusers.configs import callback_of, policies_of
from ..graph.copies import copy_of
from ..graph.modules import ModuleNames
from ..passes.conditions import insert_conditions
from ..passes.counting import CALLS
from ..passes.cut import tag_with_signals
from ..passes.form import conditionals
from ..passes.sink import sink_state
from ..passes.strides import fix_branch_strides


def rewrite(
    gm: fx.GraphModule,
    config: Any = None,
    *,
    model: nn.Module | None = None,
) -> fx.GraphModule:
    """The graph with conditional cache reads and writes in place of its attentions.

    The result is called like `gm` and broadcasts by itself: counter, last timestep and what is kept are buffers
    of it. A graph without attention comes back as an equal copy.

    Args:
        gm: a graph from Dynamo, `torch.export` (`exported.module()`) or `torch.fx.symbolic_trace`; it is not
            changed. Its timestep is the input called `timestep`, a number or a tensor of any shape, of
            which the largest element counts; unless `config` has a `current_timestep_callback`.
        config: a `PABConfig` (default: spatial attention every 2nd step), diffusers'
            `PyramidAttentionBroadcastConfig`, `TaylorSeerCacheConfig`, `MagCacheConfig`, `FirstBlockCacheConfig` or
            `SeaCacheConfig`, a `Policy`, or a list. None whose how reads `scalars.weight`: there is no host to
            ask.
        model: the model that `gm` was traced from, for its modules' `is_cross_attention` flags.

    Returns:
        A new GraphModule that shares its parameters with `gm`.

    Raises:
        ValueError: if the graph has been rewritten before, has attentions to broadcast but neither a timestep input
            nor a callback, or if a rule has to know the number of steps.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x, timestep):
        ...         return x + torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> gm = rewrite(torch.fx.symbolic_trace(Attention()))
        >>> [str(node.target) for node in gm.graph.nodes if "cond" in str(node.target)]
        ['cond']
    """
    policies = policies_of(config)
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"rewrite takes a torch.fx.GraphModule, got {type(gm).__name__}: trace the model first.")
    if conditionals(gm) or hasattr(gm, CALLS):
        raise ValueError("the graph already broadcasts attention; rewrite the original graph instead.")
    for policy in policies:
        why = None if policy.when is None else policy.when.mismatch(math.inf, None)
        if why is not None:
            raise ValueError(f"{why} rewrite takes none: use pab_fx.export, or a rule without it.")
    names = ModuleNames.of(model) if model is not None else ModuleNames.of_graph(gm)
    result = copy_of(gm)
    sink_state(
        fix_branch_strides(insert_conditions(result, tag_with_signals(result, policies, names))), callback_of(config)
    )
    result.graph.lint()
    result.recompile()
    return result
