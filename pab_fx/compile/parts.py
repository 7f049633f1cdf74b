"""Which part of a model each node of a graph belongs to: one of its blocks, or what lies between them.

%a = ... embeddings ...                 # part 0
%b = ... block 0 on %a ...              # part 1
%c = ... block 1 on %b ...              # part 3
return (... projection of %c ...,)      # part 4
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..graph.dataflow import is_number, op_name, value

CARRIED = {"_enter_autocast", "_enter_inference_mode"}
"""Contexts that may be around blocks: `split_module` enters autocast in each, inference mode changes no value."""


def parts(graph: fx.Graph, classes: Collection[str]) -> dict[fx.Node, int]:
    """The number of the part that each node belongs to, in graph order: odd for a block, even for what lies between.

    Args:
        graph: a graph whose nodes know what module emitted them.
        classes: names of the blocks' classes.

    Example:
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def forward(self, x):
        ...         return x.sin() + 1
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList([Block(), Block()])
        ...     def forward(self, x):
        ...         return self.blocks[1](self.blocks[0](x.cos()))
        >>> class Tracer(fx.Tracer):
        ...     def is_leaf_module(self, module, name):
        ...         return False
        >>> parts(Tracer().trace(Model()), {"Block"})
        {cos: 0, sin: 1, add: 1, sin_1: 3, add_1: 3}
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    block_of = {node: _block(node, classes) for node in nodes}
    _take_contexts_in(graph, block_of)
    last = {block: node for node, block in block_of.items() if block is not None}
    part_of: dict[fx.Node, int] = {}
    current, number = None, 0
    for node in nodes:
        # what a rewrite put between a block's nodes is part of it, and so are views of what it computes
        is_inside = current is not None and (last[current] not in part_of or _is_view_of(node, part_of, number))
        following = current if block_of[node] is None and is_inside else block_of[node]
        if following != current:
            number += 1 if current is None or following is None else 2
        current = following
        part_of[node] = number
    return part_of


def _take_contexts_in(graph: fx.Graph, block_of: dict[fx.Node, str | None]) -> None:
    """Let what enters and leaves a context in a block belong to it, in place: no module is recorded for that."""
    nodes = list(block_of)
    position = {node: i for i, node in enumerate(nodes)}
    for enter, leave in effects.contexts(graph):
        inside = {block_of[node] for node in nodes[position[enter] : position[leave]]} - {None}
        if len(inside) == 1:
            (block,) = inside
            for node in (enter, leave, *enter.all_input_nodes, *leave.all_input_nodes):
                block_of[node] = block_of[node] or block


def is_block(part: int) -> bool:
    """Whether the part of that number is a block, not what lies between two."""
    return part % 2 == 1


def repeat_numbers(graph: fx.Graph, part_of: dict[fx.Node, int]) -> None:
    """Compute the numbers of a call anew in each part that reads them, in place.

        %scale = item(%scale_tensor)    # read in parts 1 and 3    ->    one of it in part 1, one in part 3

    A compiler takes a float that it is handed for a constant, and one that it finds in a tensor for an input.
    """
    repeated: dict[tuple[fx.Node, int], fx.Node] = {}

    def own(source: fx.Node, reader: fx.Node) -> fx.Node:
        part = part_of[reader]
        if part_of.get(source, part) == part or not _is_number_of_the_call(source):
            return source
        if (source, part) not in repeated:
            with graph.inserting_before(reader):
                repeated[source, part] = graph.node_copy(source, lambda operand: own(operand, reader))
            part_of[repeated[source, part]] = part
        return repeated[source, part]

    for reader in list(part_of):
        reader.args = fx.map_arg(reader.args, lambda source: own(source, reader))  # noqa: B023
        reader.kwargs = fx.map_arg(reader.kwargs, lambda source: own(source, reader))  # noqa: B023


def why_whole(graph: fx.Graph, part_of: dict[fx.Node, int]) -> str | None:
    """Why the blocks of a graph cannot be compiled apart from each other, `None` if they can."""
    for enter, leave in effects.contexts(graph):
        if part_of[enter] != part_of[leave] and op_name(enter) not in CARRIED:
            return f"{op_name(enter)} holds for several blocks"
    taken = {part: _taken(part, part_of) for part in set(part_of.values()) if is_block(part)}
    updates = [(target, part) for node, part in part_of.items() for target in effects.updated(node)]
    for part, sources in taken.items():
        given = [node for node in part_of if part_of[node] == part and _is_read_outside(node, part_of)]
        for node in (*sources, *given):
            if not _can_be_handed_over(value(node)):
                return f"a block takes or returns {node.name}, which is no integer and no tensor in memory"
        # a compiled block knows its operands and results as tensors of their own
        own = [node for node in given if not _is_of_operand(node, part, part_of)]
        inside = [target for target, of in updates if of == part]
        outside = [target for target, of in updates if of != part]
        for nodes, targets in ((sources, inside), (own, outside)):
            shared = _shared(nodes, targets)
            if shared:
                return f"{' and '.join(shared)} go into or come out of a block, share memory and are updated in place"
    return None


def _taken(part: int, part_of: dict[fx.Node, int]) -> list[fx.Node]:
    """What a part reads of others, and of the graph's inputs."""
    sources = (source for node in part_of if part_of[node] == part for source in node.all_input_nodes)
    found = dict.fromkeys(source for source in sources if part_of.get(source) != part)
    return [source for source in found if not (source.op == "get_attr" and _is_graph(source))]


def _can_be_handed_over(recorded: Any) -> bool:
    """Whether compilers take and return such a value; a conjugate that is not computed yet they do not."""
    if isinstance(recorded, torch.Tensor):
        return not recorded.is_conj() and not recorded.is_neg()
    return isinstance(recorded, (int, torch.SymInt))


def _is_graph(node: fx.Node) -> bool:
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return isinstance(owner, fx.GraphModule)


def _is_read_outside(node: fx.Node, part_of: dict[fx.Node, int]) -> bool:
    return any(part_of.get(user) != part_of[node] for user in node.users)


def _is_of_operand(node: fx.Node, part: int, part_of: dict[fx.Node, int]) -> bool:
    """Whether what a part returns is a view of what it takes, or that itself after an update in place."""
    while part_of.get(node) == part and (effects.is_view(node) or effects.updated(node)):
        node = (*effects.updated(node), *node.all_input_nodes)[0]
    return part_of.get(node) != part


def _shared(nodes: Iterable[fx.Node], updated: Iterable[fx.Node]) -> list[str]:
    """Names of those that share a storage which is updated, if there are two."""
    for target in updated:
        found = [
            node.name for node in nodes if isinstance(value(node), torch.Tensor) and effects.may_alias(node, target)
        ]
        if len(found) > 1:
            return found
    return []


def _is_number_of_the_call(node: fx.Node) -> bool:
    """Whether a node is a number that was passed as such, or made of some; they reach a graph as tensors."""
    if not is_number(node):
        return False
    return all(source.op == "placeholder" or _is_number_of_the_call(source) for source in node.all_input_nodes)


def _is_view_of(node: fx.Node, part_of: dict[fx.Node, int], part: int) -> bool:
    """Whether a node is a view of what a part computes."""
    return effects.is_view(node) and part_of.get(node.all_input_nodes[0]) == part


def _block(node: fx.Node, classes: Collection[str]) -> str | None:
    """The outermost call of a module of these classes that a node was emitted in."""
    for key, (_, cls) in (node.meta.get("nn_module_stack") or {}).items():
        name = cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
        if name in classes:
            return str(key)
    return None
