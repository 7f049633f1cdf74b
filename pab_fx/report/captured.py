"""What Dynamo captured, as it was before anything of it was rewritten: kept for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ..compile.variants import ORIGIN
from ..policy.when import Rule
from ..run.call import BroadcastGraph
from ..run.holding import addresses
from ..run.measuring import keeper_of
from ..run.pieces import PieceGraph
from ..select.region import Region
from .costs import flops, spared_by


class Plain:
    """A compiled graph in which nothing is broadcast, which counts its calls.

    Args:
        compiled: what the inner compiler made of it.
        has_cuda_graphs: whether that overwrites what it returned.

    Attributes:
        runs: how often it was called.
        overwrites: where the outputs of its last call lie, if its next one overwrites them.
    """

    def __init__(self, compiled: Callable[..., Any], has_cuda_graphs: bool) -> None:
        self._compiled, self._has_cuda_graphs, self.runs = compiled, has_cuda_graphs, 0
        self.overwrites: frozenset[int] = frozenset()

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        outputs = self._compiled(*args)
        if self._has_cuda_graphs:
            self.overwrites = addresses(outputs)
        return outputs


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured graph, what was found in it, and what runs in its place. What it costs is counted when asked for.

    Args:
        gm: the graph; it is not changed.
        regions: what was found in it, in graph order.
        frame: qualified name of the module whose code it is; "" for the model itself.
        model: tells the outermost model from others.
        run: what Dynamo calls in its place; it counts its calls.
    """

    gm: fx.GraphModule
    regions: tuple[Region, ...]
    frame: str
    model: int
    run: BroadcastGraph | PieceGraph | Plain

    @property
    def runs(self) -> int:
        """How often the graph was called."""
        return self.run.runs

    def runs_of(self, region: Region) -> int:
        """How often it was called for that region: blocks of one class may be in a range, and in none."""
        return self.run.visits if region.piece is not None and isinstance(self.run, PieceGraph) else self.runs

    @property
    def graph(self) -> BroadcastGraph | None:
        """What runs it if something of it is broadcast; of a piece of a range of blocks what says most about it."""
        return next(iter(self.all_graphs), None)

    @property
    def all_graphs(self) -> list[BroadcastGraph]:
        """What runs it if something of it is broadcast: of a piece one for each kind of place in its range."""
        if isinstance(self.run, Plain):
            return []
        return [self.run] if isinstance(self.run, BroadcastGraph) else self.run.graphs

    @property
    def instances(self) -> dict[Region, dict[str, tuple[str, Rule | None]]]:
        """For each region, role and rule of the modules that it has run as, by their qualified names."""
        if self.graph is None:
            return {}
        by_id: dict[str, dict[str, tuple[str, Rule | None]]] = {}
        for graph in self.all_graphs:
            for m, anchor in enumerate(graph.anchors):
                by_id.setdefault(anchor.module_id, {}).update(graph.instances.get(m, {}))
        return {region: by_id[region.module_id] for region in self.regions if region.module_id in by_id}

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Bytes that each module holds when kept, by its `module_id`: its slots, and a signal that lies beside it."""
        if self.graph is None:
            return {}
        lowerings = self.graph.lowerings
        sizes = [sum(each) for each in lowerings.slot_bytes]
        whens = [calls[0].policy.when for calls in lowerings.modules]
        for i, size in enumerate(lowerings.signal_bytes):
            sizes[keeper_of(i, lowerings.rules, whens)] += size
        return {anchor.module_id: each for anchor, each in zip(self.graph.anchors, sizes, strict=True)}

    @cached_property
    def spared(self) -> Mapping[Region, tuple[fx.Node, ...]]:
        """For each region the nodes that a step which reuses it runs without."""
        owned = {node for region in self.regions for node in region.nodes}
        return {region: spared_by(region, owned) for region in self.regions}

    @cached_property
    def _flops(self) -> Mapping[fx.Node, int]:
        counted = {node: flops(node) for node in self.gm.graph.nodes}
        return {node: count for node, count in counted.items() if count}

    @property
    def flops(self) -> Mapping[fx.Node, int]:
        """The floating-point operations of the nodes that have some, without what is computed once a generation."""
        if self.graph is None or self.graph.once is None:
            return self._flops
        modules = self.graph.lowerings.conditional.modules()
        graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
        in_step = {node.meta[ORIGIN] for graph in graphs for node in graph.nodes if ORIGIN in node.meta}
        return {node: count for node, count in self._flops.items() if node.meta[ORIGIN] in in_step}
