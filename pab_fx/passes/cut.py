"""Add what rules look at to a graph's outputs, and cut the graph there: a head that measures, and the rest.

Before, as captured:

    %x : placeholder
    %y : blocks.0(%x)
    %z : blocks.1(%y)
    return (%z,)

After `add_signals`:                                 and after `cut`, the head

    %x   : placeholder                                   %x       : placeholder
    %y   : blocks.0(%x)                                  %before  : placeholder                # the signal kept
    %now : sub(%y, %x)                                   %y       : blocks.0(%x)
    %z   : blocks.1(%y)                                  %now     : sub(%y, %x)
    return (%z, %now)                                    %change  : mean(abs(%now - %before)) / mean(abs(%before))
                                                         return (%change, %now, %y)

and the rest:

    %x   : placeholder
    %y   : placeholder
    %z   : blocks.1(%y)
    return (%z,)

The graph is cut behind the last signal, in the order in which it was captured: nothing is moved. What is cheap is
computed on both sides (views, sizes, numbers, items of tuples); what the head computes besides goes to the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from .._torch import mean_over_ranks
from ..graph import effects
from ..graph.copies import copy_of, record, traced_into
from ..graph.dataflow import backward, is_tensor, value
from ..graph.modules import ModuleNames
from ..policy.policy import Policy
from ..policy.when import Rule
from ..select.region import Region
from ..select.signals import Signal, Source, signals, with_signals
from ..select.tag import tag
from .form import noise_level
from .pieces import prepared

RULES = "pab_rules"
"""Key in the output's meta: the rules whose signals a graph returns behind what it returned."""

SINGLE = "pab_single"
"""Key there: whether it returned a single value."""


@dataclass(frozen=True)
class Cut:
    """A graph in two.

    Args:
        head: takes the graph's inputs, for each rule its signal in an earlier step, for each that goes by a rate
            (`Rule.by_rate`) that rate, and the noise level if `takes_sigma`. Returns for each rule the number that is
            measured, then for each its signal now, then what the rest takes.
        rest: takes the graph's inputs and what the head returns in the end. Returns what the graph returned.
        rules: whose signals they are.
        takes_sigma: whether a signal is made of the noise level too.
    """

    head: fx.GraphModule
    rest: fx.GraphModule
    rules: tuple[Rule, ...]
    takes_sigma: bool


def tag_with_signals(
    gm: fx.GraphModule, policies: Sequence[Policy], names: ModuleNames | None = None
) -> tuple[Region, ...]:
    """The regions of a graph, as `tag` finds them; the graph returns the signals of their rules too, from now on."""
    names = names or ModuleNames()
    regions = prepared(gm, tag(gm, policies, names))
    alone = [region for region in regions if region.is_broadcast and region.piece is None]
    wanted = {region.policy.when for region in alone if region.policy is not None}
    found = signals(gm, [policy for policy in policies if policy.when in wanted], names)
    is_whole = names.begins and names.ends and not names.frame
    return with_signals(regions, found, add_signals(gm, found), is_whole)


def add_signals(gm: fx.GraphModule, found: Sequence[Signal]) -> fx.Node | None:
    """Let a graph return signals too, in place; the last of their nodes, `None` if there are none."""
    if not found:
        return None
    graph = gm.graph
    nows = [_added(graph, signal) for signal in found]
    output = graph.output_node()
    own: Any = output.args[0]
    output.args = ((*(own if isinstance(own, (tuple, list)) else (own,)), *nows),)
    output.meta[RULES] = tuple(signal.rule for signal in found)
    output.meta[SINGLE] = not isinstance(own, (tuple, list))
    return max(nows)


def _added(graph: fx.Graph, signal: Signal) -> fx.Node:
    """The node of a signal, added to a graph behind all that it is made of."""
    nodes = [_added_source(graph, source) for source in signal.sources if source is not None]
    if signal.function is None:
        return nodes[0]
    with graph.inserting_before(_behind(graph, nodes)):
        following = iter(nodes)
        given = [next(following) if source else _noise_level(graph, nodes[0]) for source in signal.sources]
        function: Any = signal.function  # a call in a graph is of something that has a name
        made = graph.call_function(function if hasattr(function, "__name__") else function.__call__, tuple(given))
    try:
        record(made)
        _check_signal(value(made))
    except Exception as error:
        raise ValueError(
            f"{signal.rule.signal!r} cannot be computed, {type(error).__name__}: {error}. It is given tensors of the "
            f"shapes {[tuple(value(node).shape) for node in given if value(node) is not None]}."
        ) from error
    return made


def _check_signal(found: Any) -> None:
    """Raise `TypeError` for what a function made, if it is no tensor that can change."""
    if found is None:  # the tracer recorded no values
        return
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        raise TypeError(f"it yields {getattr(found, 'dtype', type(found).__name__)}, not a floating-point tensor")
    if any(isinstance(size, int) and size == 0 for size in found.shape):
        raise TypeError(f"it yields a tensor without elements, {list(found.shape)}")


def _added_source(graph: fx.Graph, source: Source) -> fx.Node:
    through = source.through
    if source.ahead is not None:
        return _computed_ahead(graph, source.now, source.ahead)
    with graph.inserting_before(_behind(graph, [source.now, *(through.way(source.now) if through else ())])):
        if through is None:  # the caller may update its tensor in place
            return traced_into(graph, lambda given: (given.clone(),), source.now)[0]
        entering = through.entering(source.now, graph, lambda node: node)
        return traced_into(graph, lambda leaves, enters: (leaves - enters,), source.now, entering)[0]


def _noise_level(graph: fx.Graph, like: fx.Node) -> fx.Node:
    made = graph.call_function(noise_level, (like,))
    if value(like) is not None:
        made.meta["example_value"] = value(like).new_empty((), dtype=torch.float32)
    return made


def _computed_ahead(graph: fx.Graph, node: fx.Node, ahead: fx.Node) -> fx.Node:
    """Compute a node a second time, before another one; what it needs of what comes after that too.

    %y : blocks.0.norm(%x)               %n : blocks.0.norm(%x)
    %z : blocks.0.attn(%y)       ->      %y : blocks.0.norm(%x)
                                         %z : blocks.0.attn(%y)
    """
    needed = [each for each in backward([node]) if each >= ahead and each.op != "placeholder"]
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(ahead):
        for each in sorted(needed):
            copies[each] = graph.node_copy(each, lambda source: copies.get(source, source))
    return copies[node]


def rules_of(gm: fx.GraphModule) -> tuple[Rule, ...]:
    """The rules whose signals a graph returns."""
    return gm.graph.output_node().meta.get(RULES, ())


def take_signals(gm: fx.GraphModule) -> dict[Rule, fx.Node]:
    """Let a graph return what it did before `add_signals`, in place, and give the signals."""
    rules, output = rules_of(gm), gm.graph.output_node()
    if not rules:
        return {}
    returned: Any = output.args[0]
    own, nows = returned[: -len(rules)], returned[-len(rules) :]
    output.args = (own[0] if output.meta[SINGLE] else own,)
    del output.meta[RULES]
    return dict(zip(rules, nows, strict=True))


def cut(gm: fx.GraphModule) -> Cut:
    """Cut a graph with signals, which is not changed, behind the last of them."""
    rules = rules_of(gm)
    returned: Any = gm.graph.output_node().args[0]
    nows = returned[-len(rules) :]
    last = max(nows)
    inside = [node for node in gm.graph.nodes if node <= last or node.op == "placeholder"]
    crossing = _crossing(gm.graph, set(inside))
    head, rest = _head(gm, rules, nows, crossing, set(inside)), _rest(gm, crossing, set(inside))
    return Cut(head, rest, rules, bool(noise_levels(gm.graph)))


def noise_levels(graph: fx.Graph) -> list[fx.Node]:
    """What stands for the noise level in a graph."""
    return graph.find_nodes(op="call_function", target=noise_level)


def _behind(graph: fx.Graph, nodes: Iterable[fx.Node]) -> fx.Node:
    """The node before which all of these are there."""
    following = max(nodes).next
    while following.op == "placeholder":
        following = following.next
    return following


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _is_repeated(node: fx.Node) -> bool:
    """Whether a node is computed on both sides: it is no tensor in a place of its own, or enters an autocast."""
    return not is_tensor(node) or effects.is_view(node) or effects.sets_ambient_state(node)


def _crossing(graph: fx.Graph, inside: set[fx.Node]) -> list[fx.Node]:
    """The tensors that the head hands to the rest."""
    pending = [n for node in graph.nodes if node not in inside for n in node.all_input_nodes if n in inside]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen and not _is_input(node):
            seen.add(node)
            pending += node.all_input_nodes if _is_repeated(node) else ()
    return sorted(node for node in seen if not _is_repeated(node))


def _copies(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    made = copy_of(gm)
    return made, dict(zip(gm.graph.nodes, made.graph.nodes, strict=True))


def _add_inputs(graph: fx.Graph, names: Iterable[str], looks: Iterable[Any]) -> list[fx.Node]:
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(inputs[-1].next if inputs else next(iter(graph.nodes))):
        made = [graph.placeholder(name) for name in names]
    for node, look in zip(made, looks, strict=True):
        if look is not None:
            node.meta = {"example_value": look}
    return made


def _head(
    gm: fx.GraphModule,
    rules: Sequence[Rule],
    nows: Sequence[fx.Node],
    crossing: Sequence[fx.Node],
    inside: set[fx.Node],
) -> fx.GraphModule:
    head, copies = _copies(gm)
    graph, output = head.graph, head.graph.output_node()
    with graph.inserting_before(output):
        for enter, leave in effects.contexts(gm.graph):
            if enter in inside and leave not in inside:
                graph.node_copy(leave, copies.__getitem__)
    befores = _add_inputs(graph, [f"pab_before_{i}" for i in range(len(rules))], map(value, nows))
    rated = [i for i, rule in enumerate(rules) if rule.by_rate]
    known = [value(nows[i]) for i in rated]
    looks = [None if now is None else now.new_empty((), dtype=torch.float32) for now in known]
    rates = dict(zip(rated, _add_inputs(graph, [f"pab_rate_{i}" for i in rated], looks), strict=True))
    for told in noise_levels(graph):
        if not (given := graph.find_nodes(op="placeholder", target="pab_sigma")):
            given = _add_inputs(graph, ["pab_sigma"], [value(told)])
        told.replace_all_uses_with(given[0])
        graph.erase_node(told)
    with graph.inserting_before(output):
        own = [copies[now] for now in nows]
        numbers = measure(graph, rules, own, befores, effects.process_groups(gm.graph), rates)
    output.args = ((*numbers, *own, *(copies[node] for node in crossing)),)
    output.meta = {}
    for node in reversed(gm.graph.nodes):
        if node not in inside and node.op != "output":
            graph.erase_node(copies[node])
    return _finished(head)


def measure(
    graph: fx.Graph,
    rules: Sequence[Rule],
    nows: Sequence[fx.Node],
    befores: Sequence[fx.Node],
    groups: Sequence[str],
    rates: Mapping[int, fx.Node],
) -> list[fx.Node]:
    """The numbers that rules measure, made where a graph inserts nodes now: shape [].

    Args:
        graph: the graph.
        rules: the rules.
        nows, befores: for each its signal in this step and in an earlier one.
        groups: names of the process groups among whose ranks the model is spread. Each measures a part of the signal;
            of these numbers the mean counts, so that all ranks decide alike.
        rates: by position of a rule that goes by one.
    """

    def measured(rule: Rule, now: Any, before: Any, *rate: Any) -> tuple[Any]:
        number = rule.measured(now, before)
        for each in rate:
            number = number * each
        for group in groups:
            number = mean_over_ranks(number, group)
        return (number,)

    numbers: list[fx.Node] = []
    for i, (rule, *given) in enumerate(zip(rules, nows, befores, strict=True)):
        rate = (rates[i],) if i in rates else ()
        numbers += traced_into(graph, partial(measured, rule), *given, *rate)
    return numbers


def _rest(gm: fx.GraphModule, crossing: Sequence[fx.Node], inside: set[fx.Node]) -> fx.GraphModule:
    rest, copies = _copies(gm)
    graph = rest.graph
    take_signals(rest)
    given = _add_inputs(graph, [f"pab_crossing_{i}" for i in range(len(crossing))], map(value, crossing))
    for node, instead in zip(crossing, given, strict=True):
        copies[node].replace_all_uses_with(instead)
    for node in reversed(gm.graph.nodes):
        if node in inside and node.op != "placeholder" and not copies[node].users:
            graph.erase_node(copies[node])
    return _finished(rest)


def _finished(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with no more attributes than it refers to."""
    gm.graph.lint()
    return copy_of(gm)
