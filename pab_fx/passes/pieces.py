"""Prepare graphs that hold only some blocks of a range: what a graph returns, and what its region is where it runs.

Where a graph computes what enters its blocks, it returns that too, for the graph that ends the range:

    %x : proj_in(%latents)            %x : proj_in(%latents)
    %y : blocks.0(%x)          ->     %y : blocks.0(%x)
    return (%y,)                      return (%y, %x)

One that ends a range has the range's policy, and any other one hands its streams on (`Handed`); see `conditions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..graph.dataflow import activations
from ..policy.change import named
from ..policy.how import Handed
from ..policy.policy import Policy
from ..policy.where import Blocks
from ..select.region import Region
from ..select.streams import streams
from .reads import reads_of


@dataclass(frozen=True)
class Place:
    """Where in a range the blocks of a graph are that runs.

    Args:
        policy: the range's; `None` where they are in no range.
        begins, ends: whether the range begins, and ends, with them.
    """

    policy: Policy | None = None
    begins: bool = False
    ends: bool = False


def prepared(gm: fx.GraphModule, regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions; pieces are unsafe that cannot be decided together. The graph returns what enters them, in place."""
    pieces = [region for region in regions if region.piece is not None and region.is_broadcast]
    checked = []
    for region in regions:
        unsafe = _unsafe(gm, region, pieces) if region in pieces else None
        checked.append(replace(region, unsafe=unsafe) if unsafe else region)
        if region in pieces and unsafe is None:
            _return_entering(gm, region)
    return tuple(checked)


def _unsafe(gm: fx.GraphModule, region: Region, pieces: Sequence[Region]) -> str | None:
    """Why a piece of ranges is computed in every step; `None` if it need not be."""
    assert region.piece is not None
    several = "its model is captured in several graphs, and "
    if len(pieces) > 1:
        return f"{several}one of them holds blocks of two ranges"
    for where in region.piece.ranges:
        policy = region.assign(f":{where.label}")[1]
        rule = None if policy is None else policy.when
        if rule is not None and rule.signal is not None and not isinstance(rule.signal, Blocks):
            known = named(rule.signal)
            return f"{several}{known}, which decides, is not followed from one to another: Blocks(0, n) is"
        if rule is not None and rule.by_rate:
            return f"{several}a rate is not followed from one to another"
        if (
            policy is not None
            and not policy.how.reads_streams
            and reads_of(gm.graph, replace(region, policy=policy)).inputs
        ):
            return f"{several}{policy.how!r} reads what the blocks read, in all of them"
    return None


def _return_entering(gm: fx.GraphModule, region: Region) -> None:
    assert region.piece is not None
    sources = streams(region.nodes, region.outputs, activations(gm.graph)).sources(region.outputs)
    output = gm.graph.output_node()
    own = output.args[0]
    further = [source for source, i in zip(sources, region.piece.enters, strict=True) if i is None]
    output.args = ((*(own if isinstance(own, (tuple, list)) else (own,)), *further),)


def placed(regions: Sequence[Region], place: Place) -> tuple[Region, ...]:
    """The regions of a graph that holds a piece of a range, as they are where its blocks run."""
    return tuple(
        region if region.piece is None or region.policy is None else _placed(region, region.policy, place)
        for region in regions
    )


def _placed(region: Region, policy: Policy, place: Place) -> Region:
    if place.policy is None or not place.ends:
        return replace(region, policy=replace(policy, how=Handed()))
    return replace(region, policy=place.policy, begins=place.begins)
