"""Signals: the tensors that rules look at, found in a graph.

    %x : patch embedding
    %y : blocks.0(%x, %temb)    # the signal of Blocks(0, 1): %y - %x, of the stream that the sample goes through

No graph is changed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph.dataflow import backward, is_tensor, value
from ..graph.modules import ModuleNames, argument_of
from ..graph.parts import sizes
from ..policy.change import Computed, ModulatedInput, Output, Sigma, named
from ..policy.policy import Policy
from ..policy.when import Rule
from ..policy.where import BLOCKS, Blocks
from .blocks import between_blocks, blocks, nodes_between
from .bounds import bounded
from .passing import passing
from .region import Region
from .sequences import projected
from .streams import Streams, operand, streams
from .view import View


@dataclass(frozen=True)
class Source:
    """A tensor of a graph that a rule looks at.

    Args:
        now: the tensor, or what leaves the blocks of which it is the residual.
        through: the streams through those blocks; `None` for the tensor itself.
        ahead: the node before which the tensor is computed a second time, since it lies in what may be skipped; `None`
            where it is taken as it is.
    """

    now: fx.Node
    through: Streams | None = None
    ahead: fx.Node | None = None


@dataclass(frozen=True)
class Signal:
    """What a rule looks at, in a graph.

    Args:
        rule: the rule.
        sources: the tensors; `None` stands for the noise level, which no graph has.
        function: makes one tensor of them; `None` where there is one.
    """

    rule: Rule
    sources: tuple[Source | None, ...]
    function: Callable[..., Any] | None = None


def signals(gm: fx.GraphModule, policies: Iterable[Policy], names: ModuleNames | None = None) -> tuple[Signal, ...]:
    """The signals of these policies' rules that a graph has.

    Args:
        gm: a captured graph.
        policies: where, when and how.
        names: as for `tag`.
    """
    rules = dict.fromkeys(each.when for each in policies if each.when is not None and each.when.signal is not None)
    if not rules:
        return ()
    view = View(gm.graph, names or ModuleNames())
    found = []
    for rule in rules:
        of = rule.signal
        wanted, function = (of.of, of.function) if isinstance(of, Computed) else ((of,), None)
        sources = [None if isinstance(each, Sigma) else _source(view, each) for each in wanted]
        if all(source or isinstance(each, Sigma) for source, each in zip(sources, wanted, strict=True)):
            found.append(Signal(rule, tuple(sources), function))
    return tuple(found)


def _source(view: View, of: Any) -> Source | None:
    """A tensor that a rule looks at, `None` if the graph has none."""
    finders: dict[type, Callable[[View, Any], Source | None]] = {
        Blocks: _of_blocks,
        ModulatedInput: _modulated_input,
        Output: _of_module,
    }
    return finders.get(type(of), _sample)(view, of)


def _of_blocks(view: View, of: Blocks) -> Source | None:
    """The residual of a range of blocks, on the stream that becomes the output of the model."""
    every = blocks(view, replace(of, first=0, last=None))
    chosen = every[of.first : of.last]
    if not chosen or (of.last is not None and of.last > len(every)):
        return None
    nodes, outputs, _ = bounded(nodes_between(view, chosen), may_be_product=True)
    through = streams(nodes, outputs, view.acts)
    carried = [output for output in outputs if output in through.carried]
    entering = _entering(view, replace(of, first=0, last=None))
    if entering is not None and len(carried) > 1:
        carried = [output for output in carried if through.sources([output]) == [entering]]
    entered = {tuple(through.sources([output])) for output in carried}
    # the same stream may leave twice, as before and after a sum: where the blocks end is the last of them
    return Source(max(carried), through) if len(entered) == 1 else None


def _entering(view: View, where: Blocks) -> fx.Node | None:
    """Where the stream that becomes the output of the model enters the blocks, `None` where that is not known."""
    every = blocks(view, where)
    nodes, outputs, _ = bounded(nodes_between(view, every), may_be_product=True)
    whole = Region("", "", BLOCKS, None, "", nodes, outputs)
    way = passing(view, whole, between_blocks(view, where, nodes))
    return None if way is None else operand(way.entering)


def _modulated_input(view: View, of: ModulatedInput) -> Source | None:
    """What the first attention of the first block projects to its queries."""
    every = blocks(view, Blocks())
    core = next((view.cores[node] for node in (view.entries[every[0]] if every else ()) if node in view.cores), None)
    if core is None:
        return None
    read = sorted(projected(core.query, view.acts))
    entering = _entering(view, Blocks())
    if entering is not None and len(read) > 1:
        read = [node for node in read if entering in backward([node])]
    return Source(read[-1], ahead=min(nodes_between(view, every))) if read else None


def _sample(view: View, of: Any) -> Source | None:
    """The sample, which diffusion models take first; where that holds no floats, what looks like a prediction."""
    if view.names.frame or not view.names.begins:
        return None
    given = [node for node in view.graph.find_nodes(op="placeholder") if node in view.acts]
    model = view.names.model
    if model is not None:
        parameters = list(inspect.signature(model.forward).parameters)
        first = [node for node in given if argument_of(node, parameters) == parameters[0]]
        looks = (
            [] if any(map(_is_floating, first)) else [sizes(node) for node in view.graph.output_node().all_input_nodes]
        )
        given = [node for node in given if _is_floating(node) and sizes(node) in looks] or first
    return Source(given[0]) if given else None


def _is_floating(node: fx.Node) -> bool:
    recorded = value(node)
    return isinstance(recorded, torch.Tensor) and recorded.is_floating_point()


def _of_module(view: View, of: Output) -> Source | None:
    """The first tensor that a module of that name yields, computed ahead where it lies in blocks."""
    nodes = next((nodes for call, nodes in view.sites.items() if call.name == of.name), ())
    inside = set(nodes)
    yielded = [node for node in nodes if is_tensor(node) and (not node.users or not inside.issuperset(node.users))]
    if not yielded:
        return None
    every = nodes_between(view, blocks(view, Blocks()))
    return Source(yielded[0], ahead=min(every) if yielded[0] in every else None)


def with_signals(
    regions: Sequence[Region], found: Sequence[Signal], last: fx.Node | None, is_whole: bool
) -> tuple[Region, ...]:
    """The regions; unsafe is one of which nothing can be decided where it begins.

    Args:
        regions: those of a graph.
        found: its signals.
        last: the last node that they need, `None` for none.
        is_whole: whether the graph is the whole model: what it does not have is nowhere else.
    """
    rules = {signal.rule for signal in found}
    checked = []
    for region in regions:
        rule = region.policy.when if region.policy is not None and region.is_broadcast else None
        if is_whole and rule is not None and rule.signal is not None and rule not in rules:
            why = f"the model has nothing that its rule could look at ({rule.signal!r})"
            if isinstance(rule.signal, Blocks):
                why = f"{why}: there are no such blocks, or they update the tensor that they are given in place"
            region = replace(region, unsafe=why)
        elif rule is not None and last is not None and region.nodes[0] < last:
            known = " and ".join(dict.fromkeys(named(signal.rule.signal) for signal in found))
            region = replace(
                region, unsafe=f"it begins before {known}, which decides, is known: choose a part behind it"
            )
        checked.append(region)
    return tuple(checked)
