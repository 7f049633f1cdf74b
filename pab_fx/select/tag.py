"""Find what can be broadcast in a traced graph and give each its role. No graph is changed here.

Each attention and each feed-forward becomes a `Region`; what of it is kept, and whether that is safe, is for
`bounds` to say. Given diffusers' config, regions are the modules that its hooks would wrap, with the roles the
hooks would give. Given a `PABConfig`, they are found in the dataflow (see `dataflow`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from ..diffusers import hooks as _diffusers
from ..graph import effects
from ..graph.dataflow import (
    Core,
    activations,
    attention_cores,
    backward,
    is_nonlinear,
    is_projection,
    is_state,
    is_tuple,
    op_name,
    shape,
    takes_item,
)
from ..graph.modules import ModuleCall, ModuleNames, call_sites
from ..policy.config import ATTENTION_ROLES, PABConfig
from ..policy.when import AfterTimesteps, Rule, SkipRange
from .bounds import bounded_alike
from .frames import attends_frames, video_axes
from .region import Region
from .sequences import reads_another_sequence

BREAKS_INSIDE = (
    "the graph breaks inside of it, and this part does not yield its output; "
    "torch._dynamo.config.capture_dynamic_output_shape_ops or capture_scalar_outputs may avoid the break"
)


def tag(gm: fx.GraphModule, config: Any, names: ModuleNames | None = None) -> tuple[Region, ...]:
    """The regions of a graph, in graph order; those that are left alone are listed too, with the reason.

    Args:
        gm: a graph from Dynamo, `torch.export` or `torch.fx.symbolic_trace`.
        config: a `PABConfig` or diffusers' `PyramidAttentionBroadcastConfig`.
        names: qualified names and modules, where the graph itself does not tell.
    """
    names = names or ModuleNames()
    found = _by_dataflow(gm, config, names) if isinstance(config, PABConfig) else _by_module(gm, config, names)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    taken: set[fx.Node] = set()
    calls: dict[str, list[Region]] = {}
    for region in map(partial(_for_all_blocks, names=names), found):
        if taken.isdisjoint(region.nodes):
            taken.update(region.nodes)
            calls.setdefault(region.module_id, []).append(region)
    regions = [region for alike in calls.values() for region in bounded_alike(gm.graph, alike)]
    return tuple(sorted(regions, key=lambda region: position[region.nodes[0]]))


def _for_all_blocks(region: Region, names: ModuleNames) -> Region:
    """The region of a block's frame, with a rule if the same part of any other such block has one."""
    relative, others = names.siblings(region.name)
    if relative is None or region.assign is None:
        return region
    rules = [rule for _, rule, _ in map(region.assign, others) if rule is not None]
    return replace(region, relative=relative, rule=region.rule or next(iter(rules), None))


# ------------------------------------------------------------------------------------ as diffusers' hooks


def _by_module(gm: fx.GraphModule, config: Any, names: ModuleNames) -> list[Region]:
    """The modules that diffusers would hook, the outermost of nested ones first."""
    acts = activations(gm.graph)
    cores = {core.node: core for core in attention_cores(gm.graph, acts)}
    regions = []
    for call, nodes in call_sites(gm.graph, names).items():
        if not _diffusers.is_attention(call.cls):
            continue
        if call.module is not None:
            is_cross = bool(getattr(call.module, "is_cross_attention", False))
            why = f"is_cross_attention is {is_cross}"
        else:
            inside = [cores[node] for node in nodes if node in cores]
            is_cross = bool(inside) and all(reads_another_sequence(core, acts, cores) for core in inside)
            why = "keys and values come from " + ("another sequence" if is_cross else "the queries' sequence")
        assign = partial(_assigned_as_hooks, config, is_cross, why)
        role, rule, why = assign(call.name)
        unsafe = _uncallable(call, names)
        regions.append(Region(call.name, call.module_id, role, rule, why, tuple(nodes), unsafe=unsafe, assign=assign))
    return sorted(regions, key=lambda region: region.rule is None)


def _assigned_as_hooks(config: Any, is_cross: bool, why: str, name: str) -> tuple[str, Rule | None, str]:
    role = _diffusers.role_of(name, is_cross, config)
    if role is not None:
        return role, _role_rule(config, role), why
    return "cross" if is_cross else "spatial", None, f"{why}; no identifier with a skip range matches"


def _uncallable(call: ModuleCall, names: ModuleNames) -> str | None:
    """Why a module's call in this graph is not to be broadcast, `None` if it is."""
    if _diffusers.has_hooks(call.module):
        return "diffusers' hooks broadcast it: disable_cache() takes them off"
    return None if names.yields_output_of(call) else BREAKS_INSIDE


def rule_of(config: PABConfig, role: str, name: str) -> Rule | None:
    """When an attention or feed-forward of that role and qualified name reuses; `None` if the config leaves it alone.

    Example:
        >>> rule_of(PABConfig.preset("cogvideox"), "spatial", "transformer_blocks.0.attn1")
        SkipRange(skip_range=2, low=100, high=850)
    """
    return _assigned_by_block(config, name)[1] if role == "mlp" else _rule(config, role, name)


def _role_rule(config: Any, role: str) -> SkipRange | None:
    is_own = isinstance(config, PABConfig)
    skip_range = config.skip_range(role) if is_own else _diffusers.skip_range(config, role)
    window = getattr(config, f"{role}_attention_timestep_skip_range")
    return None if skip_range is None else SkipRange(skip_range, *window)


# -------------------------------------------------------------------------------------------- by dataflow


def _by_dataflow(gm: fx.GraphModule, config: PABConfig, names: ModuleNames) -> list[Region]:
    """Attentions around their cores; feed-forwards of the blocks that hold attentions."""
    graph = gm.graph
    acts = activations(graph)
    cores = {core.node: core for core in attention_cores(graph, acts)}
    sites = call_sites(graph, names)
    axes = video_axes(graph, acts)
    grouped: dict[str, tuple[ModuleCall | None, list[fx.Node], list[Core]]] = {}
    for core in cores.values():
        call = _attention_module(core, sites, names, acts, cores)
        key = call.key if call else core.node.name
        nodes = sites[call] if call else _around(core, acts)
        grouped.setdefault(key, (call, nodes, []))[2].append(core)
    regions = []
    for key, (call, nodes, inside) in grouped.items():
        name, module_id = (call.name, call.module_id) if call else (_unnamed(key, inside, names), key)
        assign = partial(_assigned_by_dataflow, config, *_role_by_dataflow(inside, acts, cores, axes))
        role, rule, why = assign(name)
        unsafe = _uncallable(call, names) if call is not None else None
        if len(names.enclosing) > 1 and not any(_has_projections(core, acts) for core in inside):
            unsafe = BREAKS_INSIDE  # a frame inside the model that gets queries and keys ready-made
        regions.append(Region(name, module_id, role, rule, why, tuple(nodes), unsafe=unsafe, assign=assign))
    return regions + (_feed_forwards(sites, names, config, acts, set(cores)) if config.mlp else [])


def _role_by_dataflow(
    inside: list[Core], acts: set[fx.Node], cores: dict[fx.Node, Core], axes: dict[fx.Node, Any]
) -> tuple[str, str]:
    if all(reads_another_sequence(core, acts, cores) for core in inside):
        return "cross", "keys and values come from another sequence than the queries"
    if all(attends_frames(core, axes) for core in inside):
        return "temporal", "the attended axis is the frames of the video"
    return "spatial", "queries, keys and values come from one sequence"


def _assigned_by_dataflow(config: PABConfig, role: str, why: str, name: str) -> tuple[str, Rule | None, str]:
    """The role that the dataflow gives, unless an identifier matches the name."""
    for other in ATTENTION_ROLES:
        for identifier in config.identifiers(other):
            if re.search(identifier, name):
                return other, _rule(config, other, name), f"its name matches {identifier!r}"
    return role, _rule(config, role, name), why


def _rule(config: PABConfig, role: str, name: str) -> SkipRange | None:
    """When an attention of that role and name reuses: as its layer says, else as its role."""
    layer = config.layer(name)
    if layer is None:
        return _role_rule(config, role)
    return None if layer.skip_range is None else SkipRange(layer.skip_range, *layer.timestep_skip_range)


def _unnamed(key: str, inside: list[Core], names: ModuleNames) -> str:
    """A name for an attention that is no module of its own: the innermost module around it, and the node."""
    stack = names.stack(inside[0].node)
    return f"{stack[-1].name}:{key}".lstrip(":") if stack else key


def _attention_module(
    core: Core,
    sites: dict[ModuleCall, list[fx.Node]],
    names: ModuleNames,
    acts: set[fx.Node],
    cores: dict[fx.Node, Core],
) -> ModuleCall | None:
    """The module call that is this attention: the innermost one around its core and a projection of it.

    An operator that brings its projections (`nn.MultiheadAttention`'s) is all of it. `None` if that module
    does more than attend, such as a block with the attention written out in it.
    """
    operands = list(backward([core.query, *core.keys], until=lambda n: is_projection(n, acts)))
    projections = {node for node in operands if is_projection(node, acts)}
    brings_projections = any(is_state(source) for source in core.node.all_input_nodes)
    for call in reversed(names.stack(core.node)):
        nodes = sites[call]
        if brings_projections or not projections.isdisjoint(nodes):
            return call if _only_attends(core, nodes, acts, cores) else None
    return None


def _has_projections(core: Core, acts: set[fx.Node]) -> bool:
    brought = any(is_state(source) for source in core.node.all_input_nodes)
    return brought or any(is_projection(node, acts) for node in backward([core.query, *core.keys]))


SUMS = {"add", "iadd", "add_", "__add__", "__iadd__", "sub", "isub", "sub_", "__sub__", "__isub__"}


def _only_attends(core: Core, nodes: list[fx.Node], acts: set[fx.Node], cores: dict[fx.Node, Core]) -> bool:
    """Whether all that comes between an attention's core and the module's end is an output projection.

    A residual that is added, or another attention that follows, makes the module more than that.
    """
    inside = [node for node in nodes if node in cores]
    attended = set(inside)
    downstream: dict[fx.Node, int] = {core.node: 0}  # node -> projections since the core
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source in acts]
        if not attended.isdisjoint(sources):
            attended.add(node)
            if op_name(node) in SUMS and not attended.issuperset(sources):
                return False
        depths = [downstream[source] for source in sources if source in downstream]
        if depths and node is not core.node:
            downstream[node] = max(depths) + is_projection(node, acts)
    return max(downstream.values()) <= 1 and not any(other in downstream for other in inside if other is not core.node)


def _around(core: Core, acts: set[fx.Node]) -> list[fx.Node]:
    """The nodes of an attention that is no module: its core and what alone follows it up to the projection.

    Followed are operations with one activation operand; a second projection, a sum with the residual or a
    gate ends the attention. What leads up to the core needs no listing: nobody uses it once the core is gone.
    """
    nodes, last = [core.node], core.node
    if is_tuple(last):  # values and weights: the values are what goes on
        items = sorted(user for user in last.users if takes_item(user))
        nodes += items
        last = next((item for item in items if item.args[1] == 0), last)
    while len(last.users) == 1:
        (following,) = last.users
        sources = [source for source in following.all_input_nodes if source in acts]
        projected = any(is_projection(node, acts) for node in nodes)
        if following.op == "output" or len(sources) != 1 or (projected and is_projection(following, acts)):
            break
        if is_nonlinear(following) or "norm" in op_name(following) or effects.updated(following):
            break
        nodes.append(following)
        last = following
    return nodes


def _feed_forwards(
    sites: dict[ModuleCall, list[fx.Node]],
    names: ModuleNames,
    config: PABConfig,
    acts: set[fx.Node],
    cores: set[fx.Node],
) -> list[Region]:
    """Modules beside an attention in a numbered block that project, bend and project back."""
    attends = {call for call, nodes in sites.items() if not cores.isdisjoint(nodes)}
    regions = []
    for call, nodes in sites.items():
        stack = names.stack(nodes[0])
        depth = next(i for i, outer in enumerate(stack) if outer.key == call.key)
        parent = stack[depth - 1] if depth else None
        if call in attends or parent is None or parent not in attends:
            continue
        projections = [i for i, node in enumerate(nodes) if is_projection(node, acts)]
        if block_index(parent.name) is None or len(projections) < 2:
            continue
        if not any(is_nonlinear(node) for node in nodes[projections[0] : projections[-1]]):
            continue
        if shape(nodes[projections[0]].all_input_nodes[0]) != shape(nodes[projections[-1]]):
            continue
        assign = partial(_assigned_by_block, config)
        role, rule, why = assign(call.name)
        regions.append(Region(call.name, call.module_id, role, rule, why, tuple(nodes), assign=assign))
    return regions


def block_index(name: str) -> int | None:
    """The number of the block that a feed-forward of that qualified name is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _assigned_by_block(config: PABConfig, name: str) -> tuple[str, Rule | None, str]:
    block = block_index(name)
    skip_counts = tuple(
        (timestep, entry.skip_count)
        for entry in config.mlp
        if entry.blocks is None or block in entry.blocks
        for timestep in entry.timesteps
    )
    why = f"projects, bends and projects back beside the attention of block {block}"
    return "mlp", AfterTimesteps(skip_counts) if skip_counts else None, why
