"""Step invariants: what depends only on what does not change from step to step is computed once a generation.

Before:

    %x    : placeholder                                             # changes
    %text : placeholder                                             # does not
    %w    : placeholder                                             # a parameter
    %h    : call_function[linear](%text, %w)
    %k    : call_method[unflatten](%h, 2, (2, -1))
    %y    : call_function[scaled_dot_product_attention](%x, %k, %k)
    return (%y,)

After, `once`:                                      and `rest`:

    %x    : placeholder                                 %x               : placeholder
    %text : placeholder                                 %text            : placeholder
    %w    : placeholder                                 %w               : placeholder
    %h    : call_function[linear](%text, %w)            %pab_invariant_0 : placeholder
    return (%h,)                                        %k    : call_method[unflatten](%pab_invariant_0, 2, (2, -1))
                                                        %y    : call_function[scaled_dot_product_attention](%x, %k, %k)
                                                        return (%y,)

That is found by dataflow: the projections of a text, its keys and values in cross-attentions, rotary tables, embeddings
of positions and of a guidance. The same operations run on the same operands in the same order as before, so that
with an eager inner compiler the outputs are the same to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .._torch import HigherOrderOperator, size_hint
from ..graph import effects
from ..graph.copies import copy_of
from ..graph.dataflow import backward, is_state, is_tensor, is_tuple, op_name, value
from .form import noise_level

logger = logging.getLogger(__name__)

INVARIANT = "pab_invariant"
"""Key in the meta of an input that is computed once a generation."""

FACTORIES = {"arange", "empty", "full", "linspace", "ones", "scalar_tensor", "tensor", "zeros"}
MOVES = effects.VIEWS | effects.MAYBE_VIEWS | FACTORIES | {f"new_{name}" for name in FACTORIES}
MOVES |= {f"{name}_like" for name in FACTORIES} | {"clone", "double", "int", "long", "bool", "as_tensor"}
"""Operations that compute nothing: what only they made is made again in each step."""

RESHAPES = {"resize_", "resize_as_", "set_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
"""Updates of a tensor's shape, which its views do not share."""
RETURNS_OPERAND = effects.MAYBE_VIEWS | {"cpu", "cuda", "double", "int", "long", "bool", "as_tensor"}
"""Operations that may return the very tensor they are given, though the recorded value may be another one."""

Storages = frozenset[Any]


@dataclass(frozen=True)
class Invariants:
    """A graph in two: what is computed once, and what is computed in each step.

    `rest(*args, *once(*args))` is what the graph itself returns for `args`, and `rest(*others, *once(*args))` what it
    returns for others that differ in changing inputs only.

    Args:
        once: takes the inputs of the graph; returns the kept tensors. To be called without gradients, and where the
            graph would be called: an autocast around the graph governs it too.
        rest: takes the inputs of the graph, then the kept tensors; returns the outputs of the graph.
        names: the inputs of `rest` that the kept tensors are, "pab_invariant_0" and so on.
        reads: positions of all inputs that `once` reads, among them parameters and sizes: as long as these are the
            same tensors at the same versions, and the same numbers, the kept tensors are what they would be.
    """

    once: fx.GraphModule
    rest: fx.GraphModule
    names: tuple[str, ...]
    reads: tuple[int, ...]


def split_invariants(gm: fx.GraphModule, unchanging: Collection[int]) -> Invariants | None:
    """Split what does not change between the steps of a generation off a graph that Dynamo captured.

    A node is invariant if all it reads is: parameters and buffers, inputs that are said not to change, sizes, other
    invariant nodes. It may not draw random numbers, carry gradients, have a size that only the data tell, be a
    collective, nor stand inside of an autocast or another context. A tensor that is updated in place is invariant if
    it is made in the graph, if all its updates are invariant, and if nothing reads it before the last of them.

    Of the invariant tensors that other nodes read, those are kept that a computation led to, be it a concatenation;
    views, casts and new tensors of constants are made again in each step. Views are taken of the one tensor that
    is kept, and what every block computes alike, such as a mask, is kept once. Not kept is

    - what shares storage with an input, or with an output of the graph, whose caller may update it;
    - what is made of parameters alone and has no fewer elements than the largest of them, or as many as a buffer that
      it is made of: merged or dequantised weights would be held twice.

    Args:
        gm: a graph with parameters as inputs, recorded values, and a flat tuple of outputs; it is not changed.
        unchanging: positions of the inputs that stay the same from step to step; parameters and buffers do anyway.

    Returns:
        Both parts, or `None` if nothing is worth keeping.

    Example:
        >>> def model(x, text):
        ...     return (x + text.sin(),)
        >>> gm = fx.symbolic_trace(model)
        >>> for node in gm.graph.nodes:
        ...     node.meta["example_value"] = torch.ones(2)
        >>> split = split_invariants(gm, {1})
        >>> split.names, split.reads
        (('pab_invariant_0',), (1,))
        >>> x, text = torch.ones(2), torch.zeros(2)
        >>> split.once(x, text), split.rest(x, text, *split.once(x, text))
        ((tensor([0., 0.]),), (tensor([1., 1.]),))
    """
    memory = _memory(gm.graph)
    if memory is None:
        return None
    invariant = _invariant_nodes(gm.graph, frozenset(unchanging), memory)
    kept, provided = _kept(gm.graph, invariant, memory)
    if not kept:
        return None
    firsts = _firsts(gm.graph, invariant, memory)
    names = {first: f"pab_invariant_{i}" for i, first in enumerate(dict.fromkeys(firsts[node] for node in kept))}
    needed = set(backward(names, follow=memory.sources))
    inputs = gm.graph.find_nodes(op="placeholder")
    logger.debug("%d tensors are kept for a generation, %d operations run once", len(names), len(needed))
    return Invariants(
        _once(gm, names, needed),
        _rest(gm, {node: names[firsts[node]] for node in kept}, invariant - provided),
        tuple(names.values()),
        tuple(i for i, node in enumerate(inputs) if node in needed),
    )


# ------------------------------------------------------------------------------------------ what lies where


@dataclass(frozen=True)
class _Memory:
    """The storages of a graph.

    Args:
        of: where each node's value lies; nothing for numbers.
        views: the nodes whose value lies in their first operand's storage.
        updates: the nodes that update something in place, and where that lies.
        updating: the same by storage.
        inputs: where inputs and attributes lie.
        outputs: where outputs lie.
    """

    of: dict[fx.Node, Storages]
    views: frozenset[fx.Node]
    updates: dict[fx.Node, Storages]
    updating: dict[Any, list[fx.Node]]
    inputs: Storages
    outputs: Storages

    def updates_of(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that update what a node's value lies in."""
        return [update for storage in self.of[node] for update in self.updating.get(storage, ())]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What has to run for a node's value to be what it is in the end."""
        return [*node.all_input_nodes, *self.updates_of(node)]


def _memory(graph: fx.Graph) -> _Memory | None:
    """Where everything lies; `None` if that is not recorded of something that is updated in place, or returned."""
    of: dict[fx.Node, Storages] = {}
    same: dict[Any, Storages] = {}  # a storage that was recorded, but that may be another one
    views: set[fx.Node] = set()
    updates: dict[fx.Node, Storages] = {}
    for node in graph.nodes:
        recorded = effects.storages(node) or frozenset()
        if _may_return_operand(node):
            same.update((storage, of[node.all_input_nodes[0]]) for storage in recorded)
        of[node] = _union(same.get(storage, frozenset([storage])) for storage in recorded)
        if effects.is_view(node) or _may_return_operand(node):
            views.add(node)
        if targets := _updated(node):
            updates[node] = _union(of[target] for target in targets)
    output = graph.output_node()
    demanded = [*output.all_input_nodes, *(target for node in updates for target in _updated(node))]
    if any(is_tensor(node) and not of[node] for node in demanded):
        return None
    updating: dict[Any, list[fx.Node]] = {}
    for node, touched in updates.items():
        for storage in touched:
            updating.setdefault(storage, []).append(node)
    inputs = _union(of[node] for node in graph.nodes if _is_input(node))
    return _Memory(of, frozenset(views), updates, updating, inputs, _union(of[node] for node in output.all_input_nodes))


def _may_return_operand(node: fx.Node) -> bool:
    """Whether a node may return its first operand, as `to` and `contiguous` do where there is nothing to do."""
    if op_name(node) not in RETURNS_OPERAND or not node.all_input_nodes:
        return False
    mine, given = value(node), value(node.all_input_nodes[0])
    tensors = isinstance(mine, torch.Tensor) and isinstance(given, torch.Tensor)
    # strides are compared as text: as symbols it would add a guard
    return (
        tensors
        and (mine.dtype, mine.device) == (given.dtype, given.device)
        and str(mine.stride()) == str(given.stride())
    )


def _is_one_tensor(node: fx.Node) -> bool:
    """Whether it is known if a node returns its operand: a cast that is told to copy does not."""
    is_known = not node.kwargs.get("copy") and True not in node.args
    return is_known or not _may_return_operand(node)


def _updated(node: fx.Node) -> Sequence[fx.Node]:
    """What a node updates in place; a kernel of the user's own may update whatever it is given."""
    return node.all_input_nodes if "wrapper_mutation" in op_name(node) else effects.updated(node)


def _union(each: Iterable[Storages]) -> Storages:
    return frozenset().union(*each)


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


# ----------------------------------------------------------------------------------------- what is invariant


def _invariant_nodes(graph: fx.Graph, unchanging: frozenset[int], memory: _Memory) -> set[fx.Node]:
    """The invariant nodes of a graph, its inputs and numbers among them."""
    inputs = graph.find_nodes(op="placeholder")
    sizes = {str(extent) for node in inputs for extent in getattr(value(node), "shape", ())}
    # a number that is no size may be a timestep; symbols are told apart by name, as to compare them would add a guard
    given = {
        node
        for i, node in enumerate(inputs)
        if i in unchanging or is_state(node) or (isinstance(value(node), torch.SymInt) and str(value(node)) in sizes)
    }
    movable = {node for node in graph.nodes if _is_movable(node, memory)} - _governed(graph)
    changing: Storages = frozenset()
    while True:
        found: set[fx.Node] = set()
        for node in graph.nodes:
            fits = node in given or (node in movable and found.issuperset(node.all_input_nodes))
            touched = memory.of[node] | memory.updates.get(node, frozenset())
            if fits and not touched & changing:
                found.add(node)
        unsafe = changing | _unsafe(graph, found, memory)
        if unsafe == changing:
            return found
        changing = unsafe


def _is_movable(node: fx.Node, memory: _Memory) -> bool:
    """Whether a node can run in another graph: all that it does is to yield a value, or to update what it is given."""
    if node.op == "get_attr":
        return bool(memory.of[node])
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
        return False
    if effects.draws_random_numbers(node) or "generator" in node.kwargs or "unbacked_bindings" in node.meta:
        return False
    if node.target is noise_level:
        return False
    if effects.is_collective(node):  # whether an input is still the same each rank finds out for itself
        return False
    recorded = value(node)
    leaves = recorded if isinstance(recorded, (tuple, list)) else (recorded,)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        return False
    if node in memory.updates:
        return len(_updated(node)) == 1 and op_name(node) not in RESHAPES
    is_known = recorded is not None and bool(memory.of[node] or not is_tensor(node))
    return is_known and (node.op == "call_method" or not node.is_impure())


def _governed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes inside of a context, such as an autocast; with those that enter and leave one."""
    pairs = dict(effects.contexts(graph))
    leaves = set(pairs.values())
    depth, found = 0, set()
    for node in graph.nodes:
        is_ambient = effects.sets_ambient_state(node)
        if is_ambient and node not in leaves:
            depth += 1  # without a counterpart it holds to the end
        if depth or is_ambient:
            found.add(node)
        if node in leaves:
            depth -= 1
    return found


def _unsafe(graph: fx.Graph, invariant: set[fx.Node], memory: _Memory) -> Storages:
    """What an update that is not invariant changes, or one of an input, or what is read before its last update."""
    unsafe: set[Any] = set()
    later: set[Any] = set()  # what is still updated behind a node
    for node in reversed(graph.nodes):
        touched = memory.updates.get(node, frozenset())
        if touched:
            later |= touched
            if node not in invariant or touched & memory.inputs:
                unsafe |= touched
        own = memory.of[node] | touched if _is_one_tensor(node) else frozenset()
        unsafe |= (_union(memory.of[source] for source in node.all_input_nodes) - own) & later
    return frozenset(unsafe)


# ---------------------------------------------------------------------------------------------- what is kept


def _kept(graph: fx.Graph, invariant: set[fx.Node], memory: _Memory) -> tuple[list[fx.Node], set[fx.Node]]:
    """The tensors to keep, and the invariant nodes that are run in each step all the same.

    Of both, with the inputs, all that is not invariant can be computed.
    """
    makers = {storage: node for node in reversed(graph.nodes) for storage in memory.of[node]}
    worthy = _Worthy(memory)
    kept: dict[fx.Node, None] = {}
    provided: set[fx.Node] = set()

    def provide(node: fx.Node) -> None:
        """See to it that each step has a node's value: kept, or made of what is."""
        if node in provided or node in kept or _is_input(node):
            return
        sources = memory.sources(node)
        lies = memory.of[node] | memory.updates.get(node, frozenset())
        if any(storage in memory.updating for storage in lies):
            made = {makers[storage] for storage in lies}
            if all(map(worthy, made)):  # it is kept as it is after its updates, which need not run in each step then
                kept.update(dict.fromkeys(made))
                sources = list(_updated(node)) or node.all_input_nodes
        elif worthy(node) and not (_moves(node) and all(s in provided or s in kept or _is_input(s) for s in sources)):
            kept[node] = None
        if node in kept:
            return
        if not _updated(node) or not kept.keys() & {makers[storage] for storage in lies}:
            provided.add(node)
        for source in sources:
            provide(source)

    for node in graph.nodes:
        if node in invariant and any(user not in invariant for user in node.users):
            provide(node)
    return list(kept), provided


def _firsts(graph: fx.Graph, invariant: set[fx.Node], memory: _Memory) -> dict[fx.Node, fx.Node]:
    """For each node the first that computes the same of the same: itself for most."""
    first: dict[Any, fx.Node] = {}
    firsts: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        firsts[node] = node
        if node in invariant and not _is_input(node) and not _updated(node) and not memory.updates_of(node):
            operands = fx.node.map_arg((node.args, node.kwargs), firsts.__getitem__)
            firsts[node] = first.setdefault((node.op, node.target, repr(operands)), node)
    return firsts


@dataclass(frozen=True)
class _Worthy:
    """Tells which tensors are worth keeping, and can be."""

    memory: _Memory

    def __call__(self, node: fx.Node) -> bool:
        lies = self.memory.of[node]
        if _is_input(node) or not is_tensor(node) or node in self.memory.views or node in self.memory.updates:
            return False
        if not lies or lies & (self.memory.inputs | self.memory.outputs):
            return False
        closure = list(backward([node], follow=self.memory.sources))
        return not all(map(_moves, closure)) and not _doubles_weights(node, closure)


def _moves(node: fx.Node) -> bool:
    """Whether a node computes nothing: an input, a number, a view, a cast or a copy, a new tensor of a constant."""
    if _is_input(node) or effects.is_view(node) or effects.sets_ambient_state(node):
        return True
    if not is_tensor(node) and not is_tuple(node):
        return not _updated(node)
    return op_name(node) in MOVES


def _doubles_weights(node: fx.Node, closure: Iterable[fx.Node]) -> bool:
    """Whether a tensor depends on state alone and is as large."""
    inputs = [source for source in closure if _is_input(source) and is_tensor(source)]
    if not inputs or not all(map(is_state, inputs)):
        return False
    parameters = [_elements(source) for source in inputs if _is_parameter(source)]
    buffers = [_elements(source) for source in inputs if not _is_parameter(source)]
    # tables of positions are larger than the buffer of frequencies that they are made of
    return bool(parameters and _elements(node) >= max(parameters)) or _elements(node) in buffers


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(value(node), nn.Parameter) or "_parameters_" in node.name


def _elements(node: fx.Node) -> int:
    return size_hint(value(node).numel())


# ----------------------------------------------------------------------------------------------- both graphs


def _once(gm: fx.GraphModule, kept: Iterable[fx.Node], needed: set[fx.Node]) -> fx.GraphModule:
    """The graph that computes what is kept."""
    result = copy_of(gm)
    copies = dict(zip(gm.graph.nodes, result.graph.nodes, strict=True))
    output = result.graph.output_node()
    output.args = (tuple(copies[node] for node in kept),)
    output.meta = {}
    for node in reversed(gm.graph.nodes):
        if node not in needed and node.op not in ("placeholder", "output"):
            result.graph.erase_node(copies[node])
    return _finished(result)


def _rest(gm: fx.GraphModule, kept: dict[fx.Node, str], done: set[fx.Node]) -> fx.GraphModule:
    """The graph that takes what is kept, without what is done then."""
    result = copy_of(gm)
    copies = dict(zip(gm.graph.nodes, result.graph.nodes, strict=True))
    inputs = result.graph.find_nodes(op="placeholder")
    with result.graph.inserting_before(inputs[-1].next if inputs else next(iter(result.graph.nodes))):
        further = {name: result.graph.placeholder(name) for name in dict.fromkeys(kept.values())}
    for node, name in kept.items():
        further[name].meta.setdefault("example_value", value(node))
        further[name].meta[INVARIANT] = True
        copies[node].replace_all_uses_with(further[name])
    over = [copies[node] for node in gm.graph.nodes if node in done and not _is_input(node)]
    for node in over:
        if targets := _updated(node):
            node.replace_all_uses_with(targets[0])
    for node in reversed(over):
        result.graph.erase_node(node)
    effects.eliminate_dead_code(result.graph)
    return _finished(result)


def _finished(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with no more attributes than it refers to."""
    gm.graph.lint()
    return copy_of(gm)
