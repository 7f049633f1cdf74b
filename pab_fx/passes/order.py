"""The way of a graph from its conditional form to what a compiler is given: one ordered list of named passes.

    decide             the conditions that are known are decided, what is dead goes         lowering="specialize"
    flatten            the output is one flat tuple
    fix_slot_strides   what is kept has one layout                                          not with inner="eager"
    compress           what is kept takes fewer bytes                                       cache_dtype=...
    fix_operand_strides  what conditions take has the layout that was traced                not with inner="eager"
    declare_addresses  what is kept lies at a fixed address                                 CUDA graphs

Each takes a graph and returns it, changed in place; it is linted after each, and shown to `TORCH_LOGS="+pab_fx"` and
to `TORCH_TRACE` (for tlparse) as it was before the first and as it is after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from .._torch import declare_static, show_graph
from .._torch.dynamo import keep_sources
from ..graph.copies import copy_of
from .compress import compress
from .flatten import flatten
from .form import Slot, inputs_of
from .invariants import INVARIANT
from .specialize import decide
from .strides import fix_branch_strides, fix_operand_strides, fix_slot_strides

Pass = Callable[[fx.GraphModule], fx.GraphModule]


@dataclass(frozen=True)
class Lowering:
    """How a conditional graph is lowered.

    Args:
        fix_strides: hold slots and operands of conditions to one layout, as a compiler needs that is free to choose.
        cache_dtype: what slots are held in, `None` for what they are computed in.
        static_slots: whether slots have a fixed address.
    """

    fix_strides: bool = False
    cache_dtype: torch.dtype | None = None
    static_slots: bool = False


def lowering_passes(key: Any, lowering: Lowering) -> tuple[tuple[str, Pass], ...]:
    """The passes for a key, in the order in which they run.

    Args:
        key: for each conditional whether it reuses, or "cond" to leave all conditions.
        lowering: what else is asked for.

    Example:
        >>> [name for name, _ in lowering_passes((True, False), Lowering(fix_strides=True))]
        ['decide', 'flatten', 'fix_slot_strides', 'fix_operand_strides']
    """
    dtype = lowering.cache_dtype
    passes: list[tuple[bool, str, Pass]] = [
        (key != "cond", "decide", lambda gm: decide(gm, dict(enumerate(key)))),
        (True, "flatten", flatten),
        (lowering.fix_strides, "fix_slot_strides", fix_slot_strides),
        (dtype is not None, "compress", partial(compress, dtype=dtype)),  # type: ignore[arg-type]
        (lowering.fix_strides and key == "cond", "fix_branch_strides", fix_branch_strides),
        (lowering.fix_strides, "fix_operand_strides", fix_operand_strides),
        (lowering.static_slots, "declare_addresses", declare_addresses),
    ]
    return tuple((name, each) for is_wanted, name, each in passes if is_wanted)


def lowered(conditional: fx.GraphModule, key: Any, lowering: Lowering) -> fx.GraphModule:
    """A conditional graph, which is not changed, lowered for a key."""
    gm = run_passes(copy_of(conditional), lowering_passes(key, lowering))
    keep_sources(conditional, gm)  # of the inputs that it has now
    return gm


def run_passes(gm: fx.GraphModule, passes: Sequence[tuple[str, Pass]]) -> fx.GraphModule:
    """A graph after these passes; each is linted and shown."""
    show_graph("pab_fx_conditional", gm)
    for name, each in passes:
        gm = each(gm)
        gm.graph.lint()
        show_graph(f"pab_fx_after_{name}", gm)
    gm.recompile()
    return gm


def declare_addresses(gm: fx.GraphModule) -> fx.GraphModule:
    """Tell compilers that what is held from step to step keeps its address, in place."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if node in inputs_of(gm, Slot).values() or INVARIANT in node.meta:
            declare_static(node)
    return gm
