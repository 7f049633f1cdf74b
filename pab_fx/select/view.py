"""What selectors look at: a graph and what is read off it once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ..graph.dataflow import Core, activations, attention_cores
from ..graph.modules import ModuleCall, ModuleNames, call_sites
from .frames import video_axes

BREAKS_INSIDE = (
    "the graph breaks inside of it, and this part does not yield its output; "
    "torch._dynamo.config.capture_dynamic_output_shape_ops or capture_scalar_outputs may avoid the break"
)


@dataclass(frozen=True)
class View:
    """A graph as selectors see it.

    Args:
        graph: the graph; it is not changed.
        names: qualified names and modules.
    """

    graph: fx.Graph
    names: ModuleNames

    @cached_property
    def acts(self) -> set[fx.Node]:
        """The tensors that depend on data of the call."""
        return activations(self.graph)

    @cached_property
    def cores(self) -> dict[fx.Node, Core]:
        """What attends, by its node."""
        return {core.node: core for core in attention_cores(self.graph, self.acts)}

    @cached_property
    def sites(self) -> dict[ModuleCall, list[fx.Node]]:
        """The calls of modules with their nodes."""
        return call_sites(self.graph, self.names)

    @cached_property
    def video_axes(self) -> dict[fx.Node, Any]:
        """Which axes of a tensor are those of a video."""
        return video_axes(self.graph, self.acts)


def uncallable(call: ModuleCall, names: ModuleNames) -> str | None:
    """Why a module's call in this graph is not to be broadcast, `None` if it is."""
    if "pyramid_attention_broadcast" in getattr(getattr(call.module, "_diffusers_hook", None), "hooks", {}):
        return "diffusers' hooks broadcast it: disable_cache() takes them off"
    return None if names.yields_output_of(call) else BREAKS_INSIDE
