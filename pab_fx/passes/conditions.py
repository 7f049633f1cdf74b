"""Make each region conditional: the pass that the package is named after.

Before, for an attention of any number of nodes:

    %x   : placeholder
    %out : call_function[attention](%x, ...)
    %y   : call_function[operator.add](%x, %out)
    return (%y,)

After, in functional form (see `form`), with `Last`:

    %x        : placeholder
    %compute_0: placeholder                                              # a bool
    %slot_0_0 : placeholder                                              # what was kept
    %cond     : call_function[cond](%compute_0, compute_0, read_0, (%slot_0_0, %x))
    %out      : call_function[operator.getitem](%cond, 0)
    %y        : call_function[operator.add](%x, %out)
    return ((%y,), %out)                                                 # what is to be kept

`compute_0` holds the attention and everything that only fed it (its norm, modulation and projections); `read_0` returns
a copy of the slot. With a how that computes, as `Taylor(1)`, both branches hold more:

    compute_0(%slot_0, %slot_1, %distance, %filled, %x):      read_0(%slot_0, %slot_1, %distance, %filled, %x):
        %out  : attention(norm(%x))                               %out : %slot_0 + %slot_1 * %distance
        %d    : where(%filled > 0, (%out - %slot_0) / %distance, 0.0)
        return (%out, clone(%out), %d)                            return (%out, clone(%slot_0), clone(%slot_1))

Where a range of blocks spans several graphs, the one that ends it takes what entered the range as an input, and the
ones before it hand their streams on (`Handed`). With `Residual`:

    compute_0(%x, %entering_0):                               read_0(%slot_0, %x):
        %out  : blocks.2(%x)                                      %out : add(%x, %slot_0)
        %r    : sub(%out, %entering_0)
        return (%out, %r)                                         return (%out, clone(%slot_0))
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule

from .._torch import cond_op, symbol_of, symbols_inside
from ..graph.copies import record
from ..graph.dataflow import value
from ..policy.how import Scalars
from ..policy.policy import Policy
from ..select.region import Region, enclosing
from .bodies import bodies_of, hand_out_copies, replay_outside, spell_out_dtypes, use_outputs, with_own_views
from .form import (
    COPY,
    MARK,
    Conditional,
    Entering,
    Predicate,
    Scalar,
    Slot,
    add_input,
    device_of,
    fake_like,
    mark_of,
    set_slots_returned,
)
from .hows import looks_of_slots, traced_how
from .reads import Reads, reads_of

logger = logging.getLogger(__name__)


def insert_conditions(gm: fx.GraphModule, regions: Sequence[Region]) -> fx.GraphModule:
    """Rewrite `gm`, in place, as the module's docstring shows.

    Args:
        gm: a captured graph.
        regions: from `tag(gm, ...)`.
    """
    broadcast = [region for region in regions if region.is_broadcast]
    if not broadcast:
        return gm
    output = gm.graph.output_node()
    output.args = ((output.args[0],),)
    numbered = _numbered(broadcast)
    for region in broadcast:
        for node in region.nodes:
            node.meta[PLACE] = node.name
    nest = {made.index: (region, made) for region, made in zip(broadcast, numbered, strict=True)}
    kept = _insert(gm, regions, _inside(nest, None), nest)
    set_slots_returned(gm, kept)
    logger.debug("made %d regions conditional", len(broadcast))
    return gm


Nest = Mapping[int, "tuple[Region, Conditional]"]
"""Regions and what they become, by index; those inside of others among them."""

PLACE = "pab_place"
"""Key in a node's meta that tells it in a branch that it is copied to."""


def _inside(nest: Nest, outer: int | None) -> list[tuple[Region, Conditional]]:
    return [(region, made) for region, made in nest.values() if made.outer == outer]


def _insert(
    gm: fx.GraphModule, regions: Sequence[Region], wanted: Sequence[tuple[Region, Conditional]], nest: Nest
) -> dict[Slot, fx.Node]:
    """Make the wanted regions of a graph or a branch conditional; return what is in their slots afterwards."""
    reads = {region: reads_of(gm.graph, region) for region, _ in wanted}
    unused = [node for region, _ in wanted for node in use_outputs(gm.graph, region)]
    for region, _ in wanted:
        replay_outside(gm.graph, region)
        spell_out_dtypes(region)
        hand_out_copies(gm.graph, region)
    pinned = {node for each in reads.values() for node in each.inputs}
    bodies = bodies_of(gm.graph, regions, [region for region, _ in wanted], pinned)
    kept: dict[Slot, fx.Node] = {}
    for region, made in wanted:
        body = with_own_views(gm.graph, bodies[region])
        _made_conditional(gm, region, body, reads[region].within(body, region), made, kept, nest)
    for node in unused:
        gm.graph.erase_node(node)
    return kept


def _numbered(broadcast: Sequence[Region]) -> list[Conditional]:
    """The conditionals of these regions, by their modules and calls."""
    calls, seen, labels = Counter(region.module_id for region in broadcast), Counter[str](), Counter[str]()
    modules = {module_id: number for number, module_id in enumerate(calls)}
    around = enclosing(broadcast)
    found = []
    for index, region in enumerate(broadcast):
        module = modules[region.module_id]
        slots = range(len(looks_of_slots(_policy(region).how, region.kept)))
        found.append(
            Conditional(
                index=index,
                name=region.name,
                label=f"{region.name}#{labels[region.name]}",
                module=module,
                role=region.role,
                policy=_policy(region),
                call=seen[region.module_id],
                calls=calls[region.module_id],
                outputs=len(region.outputs),
                slots=tuple(Slot(module, i) for i in slots),
                items=(),
                assign=region.assign,
                relative=region.relative,
                outer=around[index],
            )
        )
        seen[region.module_id] += 1
        labels[region.name] += 1
    return found


def _policy(region: Region) -> Policy:
    assert region.policy is not None
    return region.policy


def _made_conditional(
    gm: fx.GraphModule,
    region: Region,
    body: list[fx.Node],
    reads: Reads,
    made: Conditional,
    kept: dict[Slot, fx.Node],
    nest: Nest,
) -> None:
    """Put a `cond` node in the place of a body, and what is in its module's slots then into `kept`."""
    graph, how = gm.graph, _policy(region).how
    looks = looks_of_slots(how, region.kept)
    slots = _slot_inputs(gm, made, looks, kept)
    scalars = Scalars(*(_scalar_input(gm, made.index, name, region.outputs[0]) for name in Scalars._fields))
    place = {"nn_module_stack": region.outputs[-1].meta.get("nn_module_stack", {})}  # `regional` keeps them together
    end = body[-1].next
    entering = {} if region.begins else _entering_inputs(gm, made, reads.inputs)
    with graph.inserting_before(end):
        inputs = reads.given(region, graph, lambda node: entering.get(node, node))
        yielded = _yielded(graph, region)
        updated = traced_how(how, "update", looks, graph, slots, inputs, yielded, scalars, meta=place)
        given = {*slots, *scalars, *reads.inputs, *entering.values()}
        values = [
            node
            if node not in given
            and node not in updated[:i]
            and (node not in region.outputs or reads.is_kept(node, region, i))
            else _apart(node)
            for i, node in enumerate(updated)
        ]
    while body[-1].next is not end:
        body.append(body[-1].next)
    remembers = any(source in slots for node in body for source in node.all_input_nodes)
    returned = {**kept, **dict(zip(made.slots, values, strict=True))}
    set_slots_returned(gm, returned)
    compute, operands, outputs = fuse_as_graphmodule(gm, body, f"pab_compute_{made.index}", always_return_tuple=True)
    within = _conditions_within(gm, compute, _inside(nest, made.index), nest)
    used = [node for node, name in zip(scalars, Scalars._fields, strict=True) if node.users or name in reads.scalars]
    further = (*_sizes_inside(graph, operands, outputs, has_branches=bool(within.inputs)), *reads.inputs)
    operands = tuple(dict.fromkeys((*slots, *used, *operands, *further, *within.inputs)))
    _take(compute, operands)
    conditional = replace(made, items=tuple(outputs.index(node) for node in values), remembers=remembers)
    read = _reader(region, operands, slots, scalars, reads, outputs, conditional, within)
    items = _replaced(gm, body, (compute, read), operands, outputs, conditional, within)
    kept.update(dict(zip(made.slots, (items[i] for i in conditional.items), strict=True)))
    kept.update(dict(zip(within.slots, items[len(outputs) :], strict=True)))
    for node in scalars:
        if not node.users:
            graph.erase_node(node)


@dataclass(frozen=True)
class Within:
    """The state of the conditions in a branch, which goes through the condition that the branch is of.

    Args:
        inputs: predicates, slots and scalars, as the graph around has them.
        slots: for each slot what the branch yields for it, and the input that it was given.
    """

    inputs: tuple[fx.Node, ...] = ()
    slots: Mapping[Slot, tuple[fx.Node, fx.Node]] = field(default_factory=dict)


def _conditions_within(
    gm: fx.GraphModule,
    branch: fx.GraphModule,
    wanted: Sequence[tuple[Region, Conditional]],
    nest: Nest,
) -> Within:
    """Make regions in a computing branch conditional.

    compute_0(%x)                          compute_0(%x, %computes_1, %slot_1_0)
    %a = attention(%x)                     %c = cond(%computes_1, compute_1, read_1, (%slot_1_0, %x))
    %o = linear(%a)                  ->    %a = getitem(%c, 0)
    return (%o,)                           %o = linear(%a)
                                           return (%o, %a)
    """
    if not wanted:
        return Within()
    copies = {node.meta[PLACE]: node for node in branch.graph.nodes if PLACE in node.meta}

    def there(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(copies[node.meta[PLACE]] for node in nodes if node.meta.get(PLACE) in copies)

    for node in branch.graph.find_nodes(op="placeholder"):
        node.meta = {key: each for key, each in node.meta.items() if key != MARK}  # of the condition around
    inside = [(region.carried_over(there), made) for region, made in wanted]
    found = _insert(branch, [region for region, _ in inside], inside, nest)
    set_slots_returned(branch, found)
    branch.graph.output_node().meta.pop(MARK)
    given: dict[Any, fx.Node] = {}
    for node in branch.graph.find_nodes(op="placeholder"):
        mark = mark_of(node)
        if mark is not None:
            given[mark] = add_input(gm, str(node.target), mark, value(node))
    slots = {slot: (node, given[slot]) for slot, node in found.items()}
    return Within(tuple(given.values()), slots)


def _yielded(graph: fx.Graph, region: Region) -> list[fx.Node]:
    """What the how is given as outputs, made where a graph inserts nodes now."""
    if region.passing is None:
        return list(region.outputs)
    part = region.passing.part
    return [region.passing.leaving if part is None else graph.node_copy(part)]


def _slot_inputs(
    gm: fx.GraphModule, made: Conditional, looks: Sequence[Any], kept: dict[Slot, fx.Node]
) -> list[fx.Node]:
    """What is in the slots before the conditional: what an earlier call of the module has left, or an input."""
    return [
        kept[slot] if slot in kept else add_input(gm, f"pab_slot_{slot.module}_{slot.index}", slot, recorded)
        for slot, recorded in zip(made.slots, looks, strict=True)
    ]


def _entering_inputs(gm: fx.GraphModule, made: Conditional, own: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For what enters here, what entered the range of blocks in another graph."""
    return {
        node: add_input(gm, f"pab_entering_{made.index}_{i}", Entering(made.index, i), value(node))
        for i, node in enumerate(own)
    }


def _scalar_input(gm: fx.GraphModule, index: int, name: str, output: fx.Node) -> fx.Node:
    one = torch.ones((), dtype=torch.float32, device=device_of(output))
    recorded = None if value(output) is None else fake_like(value(output), one)
    return add_input(gm, f"pab_{name}_{index}", Scalar(index, name), recorded)


def _apart(node: fx.Node) -> fx.Node:
    """A copy for a branch to yield: its results may alias neither each other nor what it takes."""
    copied = node.graph.call_function(torch.clone, (node,))
    copied.meta = {key: each for key, each in node.meta.items() if key != "val"}
    copied.meta[MARK] = COPY
    record(copied)
    return copied


def _sizes_inside(
    graph: fx.Graph, operands: Sequence[fx.Node], outputs: Sequence[fx.Node], has_branches: bool
) -> list[fx.Node]:
    """The sizes that a branch is given, since its operands' shapes are computed from them.

        branch(%x)    # %x: [2, (h // 2) * (w // 2), 32]    ->    branch(%x, %h, %w)

    Inductor's code of a branch knows only symbols that are operands, or a whole dimension of one (seen in 2.13).
    """
    inside = symbols_inside(map(value, (*operands, *outputs)))
    sizes = [node for node in graph.find_nodes(op="placeholder") if isinstance(value(node), torch.SymInt)]
    return [node for node in sizes if has_branches or symbol_of(value(node)) in inside]


def _take(branch: fx.GraphModule, operands: Sequence[fx.Node]) -> None:
    """Let a branch take these operands, in this order: both branches of a `cond` take the same ones."""
    taken = {str(node.target): node for node in branch.graph.find_nodes(op="placeholder")}
    first = next(node for node in branch.graph.nodes if node.op != "placeholder")
    for operand in operands:
        with branch.graph.inserting_before(first):
            node = taken.get(operand.name) or branch.graph.placeholder(operand.name)
        node.meta = {key: each for key, each in operand.meta.items() if key != MARK}
        first.prepend(node)
    branch.recompile()


def _reader(
    region: Region,
    operands: Sequence[fx.Node],
    slots: Sequence[fx.Node],
    scalars: Scalars,
    reads: Reads,
    outputs: Sequence[fx.Node],
    conditional: Conditional,
    within: Within,
) -> fx.GraphModule:
    """The branch that reads; what it yields is none of its operands, which a branch may not return."""
    graph = fx.Graph()
    given: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        given[operand] = graph.placeholder(operand.name)
        given[operand].meta = {key: each for key, each in operand.meta.items() if key != MARK}
    taken = Scalars(*(given.get(node) for node in scalars))
    own = [given[slot] for slot in slots]
    looks = list(map(value, region.kept))
    inputs = reads.given(region, graph, given.__getitem__)
    read = traced_how(_policy(region).how, "read", looks, graph, own, inputs, taken)
    kept = list(map(value, own))
    carried = traced_how(_policy(region).how, "carry", kept, graph, own, inputs, read, taken)
    found = reads.outputs(region, graph, read, given.__getitem__)
    found += [carried[conditional.items.index(i)] for i in range(len(found), len(outputs))]
    found += [given[slot] for _, slot in within.slots.values()]
    graph.output(tuple(_apart(n) if n.op == "placeholder" or n in found[:i] else n for i, n in enumerate(found)))
    return fx.GraphModule(
        region.nodes[0].graph.owning_module or nn.Module(), graph, class_name=f"pab_read_{conditional.index}"
    )


def _replaced(
    gm: fx.GraphModule,
    body: list[fx.Node],
    branches: Sequence[fx.GraphModule],
    operands: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    conditional: Conditional,
    within: Within,
) -> list[fx.Node]:
    """Put a `cond` node in the place of a body; return its items: outputs, slots, and slots of conditions within."""
    graph = gm.graph
    names = [f"pab_{kind}_{conditional.index}" for kind in ("compute", "read")]
    for name, module in zip(names, branches, strict=True):
        gm.add_submodule(name, module)
    predicate = add_input(gm, f"pab_computes_{conditional.index}", Predicate(conditional.index), torch.tensor(True))
    with graph.inserting_before(body[-1].next):
        cond = graph.call_function(cond_op, (predicate, *map(graph.get_attr, names), operands))
        yielded = (*outputs, *(node for node, _ in within.slots.values()))
        items = [graph.call_function(operator.getitem, (cond, i)) for i in range(len(yielded))]
    cond.meta = {MARK: conditional, "nn_module_stack": outputs[-1].meta.get("nn_module_stack", {})}
    for item, output in zip(items, yielded, strict=True):
        item.meta = {key: each for key, each in output.meta.items() if key != MARK}
    for item, output in zip(items, outputs, strict=False):
        output.replace_all_uses_with(item, delete_user_cb=lambda user: user not in body)
    _sink_users(body[0], items)
    erase_nodes(gm, body)
    return items


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
