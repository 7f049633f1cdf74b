"""What selectors look at: a graph and what is read off it once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ..graph.dataflow import Core, activations, attention_cores, op_name
from ..graph.modules import ModuleCall, ModuleNames, call_sites, entries_around, list_of
from .frames import video_axes
from .streams import SUMS

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
    def entries(self) -> dict[ModuleCall, list[fx.Node]]:
        """Entries of lists with their nodes, in the order in which they run.

        Those are calls of modules with a number for a name. Where an entry is no call but holds what is called
        (`layers.0`, of `layers.0.0` and `layers.0.1`), it is what runs of it until the next entry's turn, and the sum
        of what that yields and what it is given.
        """
        found = {call: nodes for call, nodes in self.sites.items() if call.name.rpartition(".")[2].isdigit()}
        called = {call.name for call in self.sites}
        running: dict[str, ModuleCall] = {}
        for node in [node for node in self.graph.nodes if node.op.startswith("call")]:
            around = {entry for call in self.names.stack(node) for entry in entries_around(call.name)}
            for entry in around - called:
                container = list_of(entry)
                if container not in running or running[container].name != entry:
                    running[container] = ModuleCall(f"{entry} {node.name}", entry, entry, None)
                found.setdefault(running[container], []).append(node)
        for call in [call for call in found if call not in self.sites]:
            found[call] += _up_to_residual(found[call])
        return dict(sorted(found.items(), key=lambda item: item[1][0]))

    @cached_property
    def attending_lists(self) -> set[str]:
        """The lists of which an entry attends."""
        return {list_of(call.name) for call, nodes in self.entries.items() if not self.cores.keys().isdisjoint(nodes)}

    @cached_property
    def video_axes(self) -> dict[fx.Node, Any]:
        """Which axes of a tensor are those of a video."""
        return video_axes(self.graph, self.acts)


def _up_to_residual(nodes: list[fx.Node]) -> list[fx.Node]:
    """What alone follows nodes up to a sum with something that they read; nothing if there is no such sum."""
    inside, following = set(nodes), list[fx.Node]()
    leaving = [node for node in nodes if not inside.issuperset(node.users)]
    given = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    node = leaving[-1] if len(leaving) == 1 else None
    while node is not None and len(node.users) == 1:
        (node,) = node.users
        following.append(node)
        if op_name(node) in SUMS and not given.isdisjoint(node.all_input_nodes):
            return following
        if len(node.all_input_nodes) > 1:
            break
    return []


def uncallable(call: ModuleCall, names: ModuleNames) -> str | None:
    """Why a module's call in this graph is not to be broadcast, `None` if it is."""
    if "pyramid_attention_broadcast" in getattr(getattr(call.module, "_diffusers_hook", None), "hooks", {}):
        return "diffusers' hooks broadcast it: disable_cache() takes them off"
    return None if names.yields_output_of(call) else BREAKS_INSIDE
