"""Make each region conditional: the pass that the package is named after.

Before, for an attention of any number of nodes:

    %x   : placeholder
    %out : call_function[attention](%x, ...)
    %y   : call_function[operator.add](%x, %out)

After, with the state in buffers of the module and standard nodes only:

    %x         : placeholder
    %timestep  : placeholder
    %compute   : not (0 < calls and calls mod N != 0 and lo < timestep < hi)      # the schedule, from %calls
    %cache     : get_attr[pab_cache_0]
    %cond      : call_function[cond](%compute, pab_compute_0, pab_read_0, (%cache, %x))
    %out       : call_function[operator.getitem](%cond, 0)
    %write     : call_function[aten.copy_](%cache, %out)
    %y         : call_function[operator.add](%x, %out)
    %count     : call_function[aten.copy_](%calls, calls + 1)

`pab_compute_0` holds the attention and everything that only fed it (its norm, modulation and projections);
`pab_read_0` returns a copy of the cache. A timestep that rises starts a new generation: the count is 0 again.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule

from .._torch import cond_op, keep_persistence, keep_sources, symbol_of, symbols_inside
from ..diffusers import hooks as _diffusers
from ..graph import effects
from ..graph.dataflow import is_number, is_sizes, is_tensor, is_tuple, value
from ..graph.modules import ModuleNames
from ..policy.when import Rule
from ..select.region import Assign, Region
from ..select.tag import tag
from .predicates import InGraphSchedule, Plan

logger = logging.getLogger(__name__)

aten = torch.ops.aten
CONDITIONAL = "pab_conditional"
"""Key in a `cond` node's meta under which its `Conditional` stands; it survives copies of the graph."""


@dataclass(frozen=True)
class Conditional:
    """What a rewritten graph's `cond` node broadcasts.

    Args:
        index: number of the conditional in the graph.
        name: qualified name of the attention or feed-forward.
        module_id: the same for all calls of one module; they share counter and caches.
        role: "spatial", "temporal", "cross" or "mlp".
        rule: when it reuses.
        call: which of the module's calls in this graph it is.
        calls: how often the graph calls the module.
        caches: names of the buffers that hold its outputs.
        assign: role, rule and reason for a qualified name, where several blocks run this graph.
        relative: the name within such a block, `None` where the graph is the model's own.
    """

    index: int
    name: str
    module_id: str
    role: str
    rule: Rule
    call: int
    calls: int
    caches: tuple[str, ...]
    assign: Assign | None = None
    relative: str | None = None


def rewrite(
    gm: fx.GraphModule,
    config: Any = None,
    *,
    model: nn.Module | None = None,
) -> fx.GraphModule:
    """The graph with conditional cache reads and writes in place of its attentions.

    The result is called like `gm` and broadcasts by itself: counter, last timestep and caches are buffers
    of it. A graph without attention comes back as an equal copy.

    Args:
        gm: a graph from Dynamo, `torch.export` (`exported.module()`) or `torch.fx.symbolic_trace`; it is not
            changed. Its timestep is the input called `timestep`, a number or a tensor of any shape, of
            which the largest element counts; unless `config` has a `current_timestep_callback`.
        config: a `PABConfig` (default: spatial attention every 2nd step) or diffusers'
            `PyramidAttentionBroadcastConfig`.
        model: the model that `gm` was traced from, for its modules' `is_cross_attention` flags.

    Returns:
        A new GraphModule that shares its parameters with `gm`. `print(result.graph)` reads as above.

    Raises:
        ValueError: if the graph has been rewritten before, or has attentions to broadcast but neither a
            timestep input nor a callback.

    Example:
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x, timestep):
        ...         return x + torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> gm = rewrite(torch.fx.symbolic_trace(Attention()))
        >>> [node.meta["pab_conditional"].role for node in gm.graph.nodes if node.target is cond_op]
        ['spatial']
    """
    config = _diffusers.checked_config(config)
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"rewrite takes a torch.fx.GraphModule, got {type(gm).__name__}: trace the model first.")
    if conditionals(gm) or _has_state(gm):
        raise ValueError("the graph already broadcasts attention; rewrite the original graph instead.")
    names = ModuleNames.of(model) if model is not None else ModuleNames.of_graph(gm)
    result = copy_of(gm)
    regions = tag(result, config, names)
    return insert_conditions(result, regions, config.current_timestep_callback)


def _has_state(gm: fx.GraphModule) -> bool:
    """Whether a graph counts and keeps by itself; also one that `specialize` has decided, or was exported again."""
    return any(str(node.target).split(".")[-1].startswith("pab_") for node in gm.graph.find_nodes(op="get_attr"))


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own that shares parameters, buffers and submodules with `gm`."""
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    result.meta.update(gm.meta)
    keep_sources(gm, result)
    keep_persistence(gm, result)
    return result


def conditionals(gm: fx.GraphModule) -> dict[fx.Node, Conditional]:
    """The conditional nodes of a rewritten graph, in graph order."""
    return {node: node.meta[CONDITIONAL] for node in gm.graph.nodes if CONDITIONAL in node.meta}


def operands_of(cond: fx.Node) -> tuple[Any, ...]:
    """What a `cond` node hands to its branches: the caches first, then what the computing one reads."""
    return cond.args[3]  # type: ignore[return-value]


def insert_conditions(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    timestep_callback: Callable[[], Any] | None = None,
    allocate: bool = True,
    plan: Plan | None = None,
) -> fx.GraphModule:
    """Rewrite `gm`, in place, as the module's docstring shows.

    Args:
        regions: from `tag(gm, ...)`.
        timestep_callback: yields the timestep in place of the graph's input.
        allocate: give the cache buffers their real size. `False` where they are to be lifted anyway.
        plan: the timesteps of a generation, which take the place of both: the graph counts through them.
    """
    broadcast = [region for region in regions if region.is_broadcast]
    if not broadcast:
        return gm
    unused = [node for region in broadcast for node in _use_outputs(gm.graph, region)]
    for region in broadcast:
        _replay_outside(gm.graph, region)
    bodies = _bodies(gm.graph, regions)
    schedule = InGraphSchedule(gm, timestep_callback, plan)
    calls = Counter(region.module_id for region in broadcast)
    seen: Counter[str] = Counter()
    caches: dict[str, tuple[str, ...]] = {}
    for index, region in enumerate(broadcast):
        body = _with_own_views(gm.graph, bodies[region])
        branch, operands, outputs = fuse_as_graphmodule(gm, body, f"pab_compute_{index}", always_return_tuple=True)
        operands = (*operands, *_hand_over_sizes(branch, operands, outputs))
        if region.module_id not in caches:
            caches[region.module_id] = _add_caches(gm, index, outputs, allocate)
        conditional = Conditional(
            index=index,
            name=region.name,
            module_id=region.module_id,
            role=region.role,
            rule=region.rule,  # type: ignore[arg-type]
            call=seen[region.module_id],
            calls=calls[region.module_id],
            caches=caches[region.module_id],
            assign=region.assign,
            relative=region.relative,
        )
        seen[region.module_id] += 1
        _replace(
            gm,
            body,
            branch,
            operands,
            outputs,
            conditional,
            schedule.compute(conditional.rule, conditional.role, conditional.call, conditional.calls),
        )
    schedule.count()
    for node in unused:
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    logger.debug("made %d regions conditional", len(broadcast))
    return gm


def _use_outputs(graph: fx.Graph, region: Region) -> list[fx.Node]:
    """Give each output of a region a user outside, for as long as the rewrite takes; return those made for it.

    A call of a module keeps what any call of that module needs.
    """
    inside = set(region.nodes)
    made = []
    for output in region.outputs:
        if inside.issuperset(output.users):
            with graph.inserting_before(region.nodes[-1].next):
                made.append(graph.call_function(torch.clone, (output,)))
    return made


def _replay_outside(graph: fx.Graph, region: Region) -> None:
    """Give the users outside of a region their own copy of a view that is used inside as well.

    %view = view(%out)                      %view = view(%out)
    %a    = add(%view, 1)    # inside  ->   %a    = add(%view, 1)
    %b    = add(%view, 2)    # outside      %copy = view(%out)
                                            %b    = add(%copy, 2)
    """
    inside = set(region.nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(region.replayed):
        with graph.inserting_before(node.next):
            copies[node] = graph.node_copy(node, lambda source: copies.get(source, source))
        node.replace_all_uses_with(copies[node], delete_user_cb=lambda user: user not in inside)


def _bodies(graph: fx.Graph, regions: Sequence[Region]) -> dict[Region, list[fx.Node]]:
    """For each broadcast region its nodes and those that only feed it, in graph order.

        %n = norm(%x)           # only %a uses it                       %n = norm(%x)  \
        %a = attention(%n)      # the region                     ->     %a = attention(%n)  / the body

    A node is left where it is if moving it down to the region could move it past an update in place, or into or
    out of an autocast. What waits for a collective goes where that goes.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    updates = [order[node] for node in graph.nodes if effects.updated(node) or effects.sets_ambient_state(node)]
    owned = {node for region in regions for node in region.nodes}
    bodies: dict[Region, list[fx.Node]] = {}
    for region in regions:
        if not region.is_broadcast:
            continue
        body = set(region.nodes)
        end = order[region.nodes[-1]]
        for node in sorted(order, key=order.__getitem__, reverse=True)[len(order) - end :]:
            movable = (
                node.op in ("call_function", "call_method", "call_module")
                and node not in owned
                and node.users
                and all(user in body for user in node.users)
                and is_tensor(node)
                and not any(is_tuple(source) or is_number(source) for source in node.all_input_nodes)
                and (effects.is_removable(node) or effects.collective_of(node))
                and not any(
                    _since(order, node) < update < end for update in updates if update not in _own(order, region)
                )
            )
            if movable:
                body.add(node)
        bodies[region] = sorted(body, key=order.__getitem__)
    return bodies


def _since(order: dict[fx.Node, int], node: fx.Node) -> int:
    return order[effects.collective_of(node) or node]


def _own(order: dict[fx.Node, int], region: Region) -> set[int]:
    return {order[node] for node in region.nodes}


def _with_own_views(graph: fx.Graph, body: list[fx.Node]) -> list[fx.Node]:
    """The body with copies of what it reads but no `cond` takes: modules, tuples, sizes, views that share storage.

        %a, %b = chunk(%base, 2)                             %a, %b = chunk(%base, 2)   # for others
        %o     = attention(%x, %a, %b)   # the body    ->    %c, %d = chunk(%base, 2)   \
                                                             %o     = attention(%x, %c, %d)  / the body
    """
    inside = set(body)
    while True:
        operands = dict.fromkeys(s for node in inside for s in node.all_input_nodes if s not in inside)
        shared = [
            view
            for view in operands
            if is_tuple(view)
            or is_sizes(view)
            or _is_module(view)
            or (effects.is_view(view) and any(view is not o and effects.may_alias(view, o) for o in operands))
        ]
        if not shared:
            return sorted(inside)
        for view in shared:
            with graph.inserting_before(view.next):
                own = graph.node_copy(view)
            view.replace_all_uses_with(own, delete_user_cb=lambda user: user in inside)
            inside.add(own)


def _is_module(node: fx.Node) -> bool:
    """Whether a node is a module handed to a higher-order operator, such as flex_attention's `score_mod`."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and owner is not None and isinstance(_attribute(owner, str(node.target)), nn.Module)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _add_caches(gm: fx.GraphModule, index: int, outputs: tuple[fx.Node, ...], allocate: bool) -> tuple[str, ...]:
    """Register a buffer for each output of a region and return their names."""
    names = []
    for i, output in enumerate(outputs):
        name = f"pab_cache_{index}" + (f"_{i}" if len(outputs) > 1 else "")
        recorded = value(output)
        if allocate and isinstance(recorded, torch.Tensor) and all(isinstance(s, int) for s in recorded.shape):
            strides = torch.empty_like(recorded).stride()  # both branches of a cond must yield the same
            buffer = torch.empty_strided(recorded.shape, strides, dtype=recorded.dtype, device=recorded.device).zero_()
        else:  # sized by the first write
            like = next((p for p in gm.parameters() if p.is_floating_point()), torch.empty(0))
            buffer = torch.empty(0, dtype=like.dtype, device=like.device)
        gm.register_buffer(name, buffer, persistent=False)
        names.append(name)
    return tuple(names)


def _replace(
    gm: fx.GraphModule,
    body: list[fx.Node],
    branch: fx.GraphModule,
    operands: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    conditional: Conditional,
    compute: fx.Node,
) -> None:
    """Put a `cond` node, its items and the cache writes in the place of a body."""
    graph, count = gm.graph, len(conditional.caches)
    _add_cache_inputs(branch, count)
    branches = {f"pab_compute_{conditional.index}": branch, f"pab_read_{conditional.index}": _reader(branch, count)}
    for name, module in branches.items():
        gm.add_submodule(name, module)
    with graph.inserting_before(body[-1].next):
        caches = [graph.get_attr(name) for name in conditional.caches]
        arguments: tuple[Any, ...] = (compute, *map(graph.get_attr, branches), (*caches, *operands))
        cond = graph.call_function(cond_op, arguments)
        items = [graph.call_function(operator.getitem, (cond, i)) for i in range(len(outputs))]
    cond.meta[CONDITIONAL] = conditional
    cond.meta["nn_module_stack"] = outputs[-1].meta.get("nn_module_stack", {})
    for item, output in zip(items, outputs, strict=True):
        item.meta = dict(output.meta)
        output.replace_all_uses_with(item, delete_user_cb=lambda user: user not in body)
    _sink_users(body[0], items)
    erase_nodes(gm, body)
    for cache, item in zip(caches, items, strict=True):
        _write(graph, cache, item)


def _sink_users(first: fx.Node, items: list[fx.Node]) -> None:
    """Move what reads the items, but stands before them, behind them; the order among it is kept."""
    late, anchor, node = set(items), items[-1], first
    while node is not items[0]:
        following = node.next
        if not late.isdisjoint(node.all_input_nodes):
            anchor.append(node)
            late.add(node)
            anchor = node
        node = following


def _write(graph: fx.Graph, cache: fx.Node, item: fx.Node) -> None:
    """Copy an output into its cache, after the last update in place that it undergoes.

    The hooks of diffusers keep the very tensor that the model goes on to update; so does this.
    """
    after = item
    for node in graph.nodes:
        if any(effects.may_alias(target, item) for target in effects.updated(node)) and node > item:
            after = node
    with graph.inserting_before(after.next):
        target = graph.get_attr(str(cache.target))
        if graph.owning_module.get_buffer(str(cache.target)).numel() == 0:  # type: ignore[union-attr]
            target = graph.call_function(aten.resize_as_.default, (target, item))
        graph.call_function(aten.copy_.default, (target, item))


def _hand_over_sizes(
    branch: fx.GraphModule, operands: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]
) -> list[fx.Node]:
    """Give a branch the sizes that its operands' shapes are computed from; return them.

        branch(%x)    # %x: [2, (h // 2) * (w // 2), 32]    ->    branch(%x, %h, %w)

    Inductor's code of a branch knows only symbols that are operands, or a whole dimension of one (seen in 2.13).
    """
    inside = symbols_inside(map(value, (*operands, *outputs)))
    graph = outputs[0].graph
    sizes = [node for node in graph.find_nodes(op="placeholder") if symbol_of(value(node)) in inside] if inside else []
    for size in sizes:
        with branch.graph.inserting_after(branch.graph.find_nodes(op="placeholder")[-1]):
            branch.graph.placeholder(size.name).meta = dict(size.meta)
    branch.recompile()
    return sizes


def _add_cache_inputs(branch: fx.GraphModule, count: int) -> None:
    """Give a branch the caches as its first operands: both branches of a `cond` take the same ones."""
    for placeholder in reversed(branch.graph.find_nodes(op="placeholder")):
        first = next(iter(branch.graph.nodes))
        if placeholder is not first:
            first.prepend(placeholder)  # inputs come first, as everywhere
    first = next(iter(branch.graph.nodes))
    with branch.graph.inserting_before(first):
        for i in range(count):
            branch.graph.placeholder(f"pab_cache_{i}")
    branch.recompile()


def _reader(branch: fx.GraphModule, count: int) -> fx.GraphModule:
    """The branch that reads: copies of the caches, since a branch may not return its operands."""
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in branch.graph.nodes if node.op == "placeholder"]
    graph.output(tuple(graph.call_function(torch.clone, (cache,)) for cache in inputs[:count]))
    return fx.GraphModule(nn.Module(), graph, class_name=branch._get_name().replace("compute", "read"))
