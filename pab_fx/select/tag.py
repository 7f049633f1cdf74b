"""Find what policies are for in a traced graph, and give each part its role. No graph is changed here.

Each part becomes a `Region`; what of it is kept, and whether that is safe, is for `bounds` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from ..graph.dataflow import shape
from ..graph.modules import ModuleNames
from ..policy.policy import Policy, assigned
from ..policy.where import BLOCKS, MODEL, Attentions, Blocks, FeedForwards, Model, NamedModules, PassedBlocks
from .attentions import attentions
from .blocks import between_blocks, ranges_of_blocks
from .bounds import bounded_alike
from .feed_forwards import feed_forwards
from .gates import with_gate
from .passing import passing
from .pieces import with_ends
from .region import Region, enclosing
from .streams import streams
from .view import View
from .whole_model import whole_model
from .whole_modules import classes_of, named_modules, whole_modules


def tag(gm: fx.GraphModule, policies: Sequence[Policy], names: ModuleNames | None = None) -> tuple[Region, ...]:
    """The regions of a graph, in graph order; those that are left alone are listed too, with the reason.

    Args:
        gm: a graph from Dynamo, `torch.export` or `torch.fx.symbolic_trace`.
        policies: where, when and how; the first that is for a part governs it.
        names: qualified names and modules, where the graph itself does not tell.
    """
    names = names or ModuleNames()
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    view = View(gm.graph, names)
    found = [_for_all_blocks(region, names) for region in _found(view, policies)]
    calls: dict[str, list[Region]] = {}
    for role in (MODEL, BLOCKS, None):  # regions of one level do not overlap; they lie in those of the ones above
        level = [region for region in found if (region.role if region.role in (MODEL, BLOCKS) else None) == role]
        owned, taken = {node for region in level for node in region.nodes}, set[fx.Node]()
        for region in level:
            if taken.isdisjoint(region.nodes):
                region = with_gate(region, view, owned)
                owned.update(region.nodes)
                taken.update(region.nodes)
                calls.setdefault(region.module_id, []).append(region)
    parts = [part for alike in calls.values() for part in _parts(sorted(alike, key=lambda each: each.nodes[0]))]
    regions = [_with_streams(view, region) for part in parts for region in bounded_alike(gm.graph, part)]
    regions = _nested(regions)
    return tuple(sorted(regions, key=lambda region: (position[region.nodes[0]], -len(region.nodes))))


def _nested(regions: list[Region]) -> list[Region]:
    """The regions; unsafe is one that lies partly in another, or whose module is called in one and outside of it."""
    broadcast = [region for region in regions if region.is_broadcast]
    around = dict(zip(broadcast, enclosing(broadcast), strict=True))
    outer: dict[str, set[Any]] = {}
    for region, i in around.items():
        outer.setdefault(region.module_id, set()).add(i)
    checked = []
    for region in regions:
        partly = next((other for other in broadcast if region.is_broadcast and other.overlaps(region)), None)
        if partly is not None:
            region = replace(region, unsafe=f"it lies partly in another region ({partly.name})")
        elif len(outer.get(region.module_id, ())) > 1:
            region = replace(
                region, unsafe="only some of its module's calls lie in another region, and they share a cache"
            )
        checked.append(region)
    return checked


def _parts(calls: list[Region]) -> list[list[Region]]:
    """The calls of a module by whose cache they have: all one, as with hooks, or each one of its own."""
    if any(call.policy is not None and call.policy.where.shares_calls for call in calls):
        return [calls]
    return [[call if not k else replace(call, module_id=f"{call.module_id}@{k}")] for k, call in enumerate(calls)]


def _found(view: View, policies: Sequence[Policy]) -> list[Region]:
    """What each kind of selector finds that some policy asks for; the first to find a node has it."""
    assign = partial(assigned, tuple(policies))
    kinds = {type(policy.where) for policy in policies}
    ranges = dict.fromkeys(policy.where for policy in policies if isinstance(policy.where, Blocks))
    found = whole_model(view, assign) if Model in kinds else []
    found += ranges_of_blocks(view, assign, ranges)
    found += named_modules(view, assign, [each.where for each in policies if isinstance(each.where, NamedModules)])
    found += [region for are in classes_of(policies) for region in whole_modules(view, assign, are)]
    if Attentions in kinds:
        found += attentions(view, assign)
    if FeedForwards in kinds:
        found += feed_forwards(view, assign)
    return found


def _with_streams(view: View, region: Region) -> Region:
    """The region, unsafe if its how reads what enters where an output leaves, and nothing does."""
    if region.piece is not None and region.is_broadcast:
        return with_ends(view, region)
    if region.policy is None or not region.is_broadcast or not region.policy.how.reads_streams:
        return region
    where = region.policy.where
    if isinstance(where, PassedBlocks):
        way = passing(view, region, between_blocks(view, where, region.nodes))
        if way is not None:
            return replace(region, passing=way)
    found = streams(region.nodes, region.outputs, view.acts)
    missing = [output for output in region.outputs if output not in found.carried]
    if missing:
        looks = f"{missing[0].name}, {list(shape(missing[0]) or ())}"
        return replace(region, unsafe=f"nothing enters it that looks like what leaves it ({looks}): no residual")
    return region


def _for_all_blocks(region: Region, names: ModuleNames) -> Region:
    """The region of a block's frame, with a policy if the same part of any other such block has one."""
    relative, others = names.siblings(region.name)
    if relative is None:
        return region
    policies = [policy for _, policy, _ in map(region.assign, others) if policy is not None]
    return replace(region, relative=relative, policy=region.policy or next(iter(policies), None))
