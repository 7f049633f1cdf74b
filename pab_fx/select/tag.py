"""Find what policies are for in a traced graph, and give each part its role. No graph is changed here.

Each part becomes a `Region`; what of it is kept, and whether that is safe, is for `bounds` to say.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

from torch import fx

from ..graph.dataflow import activations, shape
from ..graph.modules import ModuleNames
from ..policy.policy import Policy, assigned
from ..policy.where import Attentions, Blocks, FeedForwards, NamedModules
from .attentions import attentions
from .blocks import ranges_of_blocks
from .bounds import bounded_alike
from .feed_forwards import feed_forwards
from .gates import with_gate
from .region import Region
from .streams import streams
from .view import View
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
    taken: set[fx.Node] = set()
    calls: dict[str, list[Region]] = {}
    view = View(gm.graph, names)
    found = [_for_all_blocks(region, names) for region in _found(view, policies)]
    owned = {node for region in found for node in region.nodes}
    for region in found:
        if taken.isdisjoint(region.nodes):
            region = with_gate(region, view, owned)
            owned.update(region.nodes)
            taken.update(region.nodes)
            calls.setdefault(region.module_id, []).append(region)
    parts = [part for alike in calls.values() for part in _parts(sorted(alike, key=lambda each: each.nodes[0]))]
    acts = activations(gm.graph)
    regions = [_with_streams_checked(region, acts) for part in parts for region in bounded_alike(gm.graph, part)]
    return tuple(sorted(regions, key=lambda region: position[region.nodes[0]]))


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
    found = ranges_of_blocks(view, assign, ranges)
    found += named_modules(view, assign, [each.where for each in policies if isinstance(each.where, NamedModules)])
    found += [region for are in classes_of(policies) for region in whole_modules(view, assign, are)]
    if Attentions in kinds:
        found += attentions(view, assign)
    if FeedForwards in kinds:
        found += feed_forwards(view, assign)
    return found


def _with_streams_checked(region: Region, acts: Collection[fx.Node]) -> Region:
    """The region, unsafe if its how reads what enters where an output leaves, and nothing does."""
    if region.policy is None or not region.is_broadcast or not region.policy.how.reads_streams:
        return region
    found = streams(region.nodes, region.outputs, acts)
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
