"""A region: nodes of a graph whose outputs are kept and reused, one call of a part of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from ..policy.policy import Policy
from ..policy.where import Blocks
from .streams import Source

Assign = Callable[..., tuple[str, "Policy | None", str]]
"""Role, policy (`None` to leave alone) and reason for a role, a name and a reason that the graph tells."""


@dataclass(frozen=True)
class Passing:
    """How a stream passes blocks that hand on what they are given.

    Args:
        between: what lies between the blocks.
        entering: where the first block reads the stream.
        leaving: where the stream leaves the last block.
        part: a view outside that takes the stream out of that, where others are joined with it.
    """

    between: frozenset[fx.Node]
    entering: Source
    leaving: fx.Node
    part: fx.Node | None

    def carried_over(self, there: Callable[[Sequence[fx.Node]], tuple[fx.Node, ...]]) -> Passing:
        """The same in a copy of the graph; see `Region.carried_over`."""
        reader, i = self.entering
        (reader, leaving), part = there((reader, self.leaving)), there((self.part,) if self.part else ())
        return Passing(frozenset(there(tuple(self.between))), (reader, i), leaving, *(part or (None,)))


@dataclass(frozen=True)
class Piece:
    """What a captured graph holds of ranges that span several graphs.

    Args:
        ranges: the ranges that are asked for.
        order: names of all blocks of the model, in the order in which it lists them.
        own: names of those that the graph holds; of the one that was captured, where `is_shared`.
        is_shared: whether the graph is a block's, and others of its class run it too.
        enters: for each stream, its position among the graph's inputs; `None` where the graph computes it, and returns
            it behind what it returned.
        leaves: where streams leave: (position among the graph's outputs, number of the stream).
        sample: number of the stream that the block takes first, as diffusion models take the sample.
    """

    ranges: tuple[Blocks, ...]
    order: tuple[str, ...]
    own: tuple[str, ...]
    is_shared: bool
    enters: tuple[int | None, ...] = ()
    leaves: tuple[tuple[int, int], ...] = ()
    sample: int = 0

    def range_of(self, block: str) -> Blocks | None:
        """The range that a block is in."""
        return next((where for where in self.ranges if block in self.blocks_of(where)), None)

    def blocks_of(self, where: Blocks) -> tuple[str, ...]:
        """The blocks of a range."""
        return self.order[where.first : where.last]

    @property
    def returned(self) -> int:
        """How many streams the graph returns as they enter."""
        return self.enters.count(None)


@dataclass(frozen=True)
class Region:
    """Nodes whose outputs are broadcast together.

    Args:
        name: qualified name of the part; for one that is no module, of its core node.
        module_id: of the module; the same for those of its calls in this graph that share a cache, see `tag`.
        role: "spatial", "temporal", "cross", "mlp", "blocks", "model" or "modules".
        policy: when it reuses and how; `None` if the policies leave it alone.
        why: why it has that role.
        nodes: the region's nodes in graph order.
        outputs: those of them whose tensors are kept.
        replayed: views of the outputs that are used inside and outside; outside they are to be taken again.
        unsafe: why it is computed in every step although it has a policy; `None` if it can be broadcast.
        note: something a user should know of it.
        assign: role, policy and reason for a name: where the frame is one of several blocks of a class, each of
            them may run this graph, and has a role of its own.
        relative: the name within that block, `None` where the frame is the model's own.
        passing: how a stream passes, where what is kept is read at the beginning of the region; see `passing`.
        piece: what it is of ranges that span several graphs; `None` where one graph holds all of it.
        begins: whether its streams enter here, and not in another graph that holds the beginning of its range.
    """

    name: str
    module_id: str
    role: str
    policy: Policy | None
    why: str
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...] = ()
    replayed: tuple[fx.Node, ...] = ()
    unsafe: str | None = None
    note: str | None = None
    assign: Any = None
    relative: str | None = None
    passing: Passing | None = None
    piece: Piece | None = None
    begins: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        module_id: str,
        assign: Assign,
        role: str,
        why: str,
        nodes: Sequence[fx.Node],
        unsafe: str | None = None,
    ) -> Region:
        """A region with the role and the policy that `assign` gives for what the graph tells."""
        by_name = partial(_assigned, assign, role, why)
        role, policy, why = by_name(name)
        return cls(name, module_id, role, policy, why, tuple(nodes), unsafe=unsafe, assign=by_name)

    def holds(self, other: Region) -> bool:
        """Whether another region lies in this one."""
        return len(self.nodes) > len(other.nodes) and set(self.nodes).issuperset(other.nodes)

    def overlaps(self, smaller: Region) -> bool:
        """Whether a smaller region lies partly in this one."""
        is_smaller = len(self.nodes) > len(smaller.nodes)
        return is_smaller and not self.holds(smaller) and not set(self.nodes).isdisjoint(smaller.nodes)

    @property
    def kept(self) -> tuple[fx.Node, ...]:
        """What the how is given as outputs, or what looks like it."""
        return self.outputs if self.passing is None else (self.passing.part or self.passing.leaving,)

    @property
    def yielded(self) -> tuple[fx.Node, ...]:
        """The outputs, and a view that takes out of one what is kept."""
        part = None if self.passing is None else self.passing.part
        return self.outputs if part is None else (*self.outputs, part)

    def carried_over(self, there: Callable[[Sequence[fx.Node]], tuple[fx.Node, ...]]) -> Region:
        """The region in a copy of its graph, which has the nodes of these that `there` yields, and all of `yielded`."""
        nodes, outputs, replayed = map(there, (self.nodes, self.outputs, self.replayed))
        return replace(
            self,
            nodes=nodes,
            outputs=outputs,
            replayed=replayed,
            passing=self.passing and self.passing.carried_over(there),
        )

    @property
    def is_broadcast(self) -> bool:
        """Whether the rewrite makes this region conditional."""
        return self.policy is not None and self.unsafe is None


def _assigned(assign: Assign, role: str, why: str, name: str) -> tuple[str, Policy | None, str]:
    return assign(role, name, why)


def around(region: Region, regions: Sequence[Region]) -> list[Region]:
    """Those of some regions in which a region lies, the outermost first."""
    return sorted((each for each in regions if each.holds(region)), key=lambda each: -len(each.nodes))


def enclosing(regions: Sequence[Region]) -> list[int | None]:
    """For each of these regions the position of the innermost one that it lies in, `None` if it lies in none."""
    position = {region: i for i, region in enumerate(regions)}
    return [position[outer[-1]] if (outer := around(region, regions)) else None for region in regions]
