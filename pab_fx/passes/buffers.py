"""Buffers that a graph reads and writes, one copy for each cache context where there are several.

    %calls : get_attr[pab_calls]                                       # []
    ...
    %count : call_function[aten.copy_](%calls, %n_next)

For two contexts, of which an input of the graph says which:

    %pab_context : placeholder                                         # an integer tensor: 0 or 1
    %index       : call_function[torch.reshape](%pab_context, (1,))
    %stack       : get_attr[pab_calls]                                 # [2]
    %calls       : call_function[torch.index_select](%stack, 0, %index), squeezed to []
    ...
    %count       : call_function[aten.index_copy_](%stack, 0, %index, unsqueeze(%n_next, 0))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .._torch import add_keyword

aten = torch.ops.aten

CONTEXT = "pab_context"
"""Name of the input that says whose state a call reads and writes."""


class Buffers:
    """Registers buffers with a graph, and makes nodes that read and write them.

    Args:
        gm: the graph.
        contexts: how many copies of each buffer there are; 0 for one without an input that tells.

    Attributes:
        index: the context as an index [1] on the CPU, `None` where there are none.
    """

    def __init__(self, gm: fx.GraphModule, contexts: int = 0) -> None:
        self.gm, self._contexts = gm, contexts
        self.index: fx.Node | None = None
        if contexts:
            given = add_keyword(gm, CONTEXT)
            with gm.graph.inserting_after(given):
                self.index = gm.graph.call_function(torch.reshape, (given, (1,)))

    def register(self, name: str, initial: torch.Tensor) -> None:
        """Give the graph a buffer."""
        stacked = torch.stack([initial] * self._contexts) if self._contexts else initial
        self.gm.register_buffer(name, stacked, persistent=False)

    def read(self, name: str) -> fx.Node:
        """What a buffer holds, for the context that runs."""
        held = self.gm.graph.get_attr(name)
        return held if self.index is None else self.chosen(self.gm.graph, held, self.index)

    def chosen(self, graph: fx.Graph, stack: fx.Node, index: fx.Node) -> fx.Node:
        """The entry of a stack."""
        entry = graph.call_function(torch.index_select, (stack, 0, index))
        return graph.call_function(torch.squeeze, (entry, 0))

    def write(self, name: str, written: Any, sizes: bool = False) -> None:
        """Replace what a buffer holds, for the context that runs; with `sizes` it gets the size of that."""
        graph = self.gm.graph
        target = graph.get_attr(name)
        if self.index is not None:
            index, entry = self.index_for(name), graph.call_function(torch.unsqueeze, (written, 0))
            graph.call_function(aten.index_copy_.default, (target, 0, index, entry))
            return
        if sizes:
            target = graph.call_function(aten.resize_as_.default, (target, written))
        graph.call_function(aten.copy_.default, (target, written))

    def index_for(self, name: str) -> fx.Node:
        """The index where a buffer lies; counters and the index itself are on the CPU."""
        assert self.index is not None
        device = self.gm.get_buffer(name).device
        return self.index if device.type == "cpu" else self.gm.graph.call_method("to", (self.index, device))
