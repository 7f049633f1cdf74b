"""Signals: the tensors that rules look at, found in a graph.

    %x : patch embedding
    %y : blocks.0(%x, %temb)    # the signal of Blocks(0, 1): %y - %x, of the stream that the sample goes through

No graph is changed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..graph.modules import ModuleNames, argument_of
from ..policy.policy import Policy
from ..policy.when import Rule
from ..policy.where import BLOCKS, Blocks
from .blocks import between_blocks, blocks, nodes_between
from .bounds import bounded
from .passing import passing
from .region import Region
from .streams import Streams, operand, streams
from .view import View


@dataclass(frozen=True)
class Signal:
    """What a rule looks at, in a graph.

    Args:
        rule: the rule.
        now: the tensor, or what leaves the blocks of which it is the residual.
        through: the streams through those blocks; `None` for the tensor itself.
    """

    rule: Rule
    now: fx.Node
    through: Streams | None = None


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
    found = {rule: _of_blocks(view, rule) if isinstance(rule.signal, Blocks) else _sample(view, rule) for rule in rules}
    return tuple(signal for signal in found.values() if signal is not None)


def _of_blocks(view: View, rule: Rule) -> Signal | None:
    """The residual of a range of blocks, on the stream that becomes the output of the model."""
    all_blocks = replace(rule.signal, first=0, last=None)
    every = blocks(view, all_blocks)
    chosen = every[rule.signal.first : rule.signal.last]
    if not chosen:
        return None
    nodes, outputs, _ = bounded(nodes_between(view, every), may_be_view=False, may_be_product=True)
    whole = Region("", "", BLOCKS, None, "", nodes, outputs)
    way = passing(view, whole, between_blocks(view, all_blocks, nodes))
    nodes, outputs, _ = bounded(nodes_between(view, chosen), may_be_view=False, may_be_product=True)
    through = streams(nodes, outputs, view.acts)
    carried = [output for output in outputs if output in through.carried]
    if way is not None and len(carried) > 1:
        entering = operand(way.entering)
        carried = [output for output in carried if through.sources([output]) == [entering]]
    entered = {tuple(through.sources([output])) for output in carried}
    # the same stream may leave twice, as before and after a sum: where the blocks end is the last of them
    return Signal(rule, max(carried), through) if len(entered) == 1 else None


def _sample(view: View, rule: Rule) -> Signal | None:
    """The sample, which diffusion models take first."""
    if view.names.frame or not view.names.begins:
        return None
    given = [node for node in view.graph.find_nodes(op="placeholder") if node in view.acts]
    model = view.names.model
    if model is not None:
        parameters = list(inspect.signature(model.forward).parameters)
        given = [node for node in given if argument_of(node, parameters) == parameters[0]]
    return Signal(rule, given[0]) if given else None


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
            region = replace(region, unsafe=f"the model has nothing that its rule could look at ({rule.signal!r})")
        elif rule is not None and last is not None and region.nodes[0] < last:
            region = replace(region, unsafe=f"it begins before what a rule looks at is computed ({last.name})")
        checked.append(region)
    return tuple(checked)
