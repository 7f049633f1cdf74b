"""Number what the nodes of a graph compute: names and order play no part, and equal numbers mean equal values.

    %a = add(%x, 1)         # number 3: (add, number of x, 1)
    %b = add(%x, 1)         # number 3
    %c = mul_(%a, 2)        # number 4; from here on what %a holds is "3 after 4"
    %d = relu(%a)           # number 5: (relu, 3 after 4)
    %e = relu(%b)           # number 6: (relu, 3)

What a node finds in memory is a part of its number: tensors that were updated in place, the random numbers drawn so
far, the autocast around it, the collectives before it. So the order of nodes shows where it matters, and only there.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import has_storage
from ..graph import effects
from ..graph.dataflow import is_tuple, leaf_module, op_name, takes_item, value
from ..graph.structure import Same, constant

Tensors = Literal["identity", "value"]
RANDOM, OUTSIDE = "random numbers", "the outside"
"""What nodes read and change beside tensors: the generator; other ranks, assertions, whatever is impure."""


class Numbers(dict[Hashable, int]):
    """The numbers given so far, to one graph or to several that are to be compared."""

    def of(self, key: Hashable) -> int:
        """The number of a key, the next one if it is new."""
        return self.setdefault(key, len(self))


@dataclass
class Numbered:
    """A numbered graph. Two graphs that share their `Numbers` compute the same if their `signature`s are equal.

    Args:
        gm: the graph.
        numbers: may have been used for other graphs.
        tensors: whether parameters, buffers and modules count by identity or by value.
        private: a pattern of names of buffers whose last value nobody outside reads.
        dead: whether what nobody reads counts as well.
    """

    gm: fx.GraphModule
    numbers: Numbers
    tensors: Tensors = "identity"
    private: re.Pattern[str] | None = None
    dead: bool = False

    number: dict[fx.Node, int] = field(default_factory=dict, init=False)
    stores: dict[fx.Node, frozenset[Hashable]] = field(default_factory=dict, init=False)
    needs: dict[fx.Node, list[fx.Node]] = field(default_factory=dict, init=False)
    seen: dict[fx.Node, dict[Hashable, fx.Node]] = field(default_factory=dict, init=False)
    held: dict[fx.Node, int] = field(default_factory=dict, init=False)
    nested: dict[fx.Node, Numbered] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        graph = self.gm.graph
        self.inputs, self.output = graph.find_nodes(op="placeholder"), graph.output_node()
        self._position = {node: i for i, node in enumerate(self.inputs)}
        self._symbols = _symbols(self.inputs)
        self._same: dict[Hashable, Hashable] = {}
        self._last: dict[Hashable, fx.Node] = {}  # what was updated -> the last node that did
        self._around: list[fx.Node] = []  # the contexts that are entered now
        self._exits = {leave: enter for enter, leave in effects.contexts(graph)}
        self._exits |= {node: node.args[0] for node in graph.nodes if _is_exit(node)}
        for node in graph.nodes:
            self.stores[node] = self._stores(node)
        for node in graph.nodes:
            self._visit(node)
        self.live = self._live()
        self.signature = self._signature()

    # ------------------------------------------------------------------------------------------ memory

    def _stores(self, node: fx.Node) -> frozenset[Hashable]:
        """What a node's value lies in: its storages, where they were recorded, else those of what it is a view of."""
        recorded = effects.storages(node)
        if node.op == "get_attr":
            held = attrgetter(str(node.target))(self.gm)
            own = _storage(held) or (node.op, str(node.target))
            self._same |= {("storage", each): own for each in recorded or ()}
            return frozenset((own,))
        if recorded is not None:
            return frozenset(("storage", each) for each in recorded)
        source = next(iter(node.all_input_nodes), None)
        may_view = effects.is_view(node) or op_name_or_none(node) in effects.MAYBE_VIEWS or effects.updated(node)
        return self.stores[source] if source is not None and may_view else frozenset((node,))

    def holds(self, node: fx.Node) -> frozenset[Hashable]:
        """The stores of a node, each by one name: a parameter and what was recorded of it are the same."""
        return frozenset(self._same.get(store, store) for store in self.stores[node])

    def updates(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that were the last to update what a node's value lies in."""
        found = [self._last[store] for store in self.holds(node) if store in self._last]
        return sorted(dict.fromkeys(found), key=self.number.__getitem__)

    # ------------------------------------------------------------------------------------------ numbers

    def _visit(self, node: fx.Node) -> None:
        """Number a node by what it calls, its operands and what it finds in memory; then note what it updates."""
        self.needs[node], self.seen[node] = list(node.all_input_nodes), {}
        if node.op == "placeholder":
            self.number[node] = self.numbers.of(("input", self._position[node], constant(node.args, self._leaf)))
        elif node.op == "get_attr":
            self.number[node] = self.numbers.of(("get_attr", self._held(node)))
        elif node.op == "output":
            self.needs[node] += [last for each in node.all_input_nodes for last in self.updates(each)]
            self.seen[node] = {each: self.updates(each)[-1] for each in node.all_input_nodes if self.updates(each)}
        elif node in self._exits and self._exits[node] in self._around:
            self._around.remove(self._exits[node])
            self.number[node] = self.numbers.of(("leaves", self.number[self._exits[node]]))
        else:
            self._visit_call(node)

    def _visit_call(self, node: fx.Node) -> None:
        target = self._held(node) if node.op == "call_module" else constant(node.target, self._leaf)
        points = is_pointer(node)
        found = {each: self.updates(each) for each in node.all_input_nodes[int(points) :]}
        held = [store for store in self._held_stores(node) if store in self._last]
        ambient = [] if points else list(self._around)
        state = [kind for kind in self._kinds(node) if kind in self._last]
        key = (
            node.op,
            target,
            self._arguments(node, {each: tuple(map(self.number.__getitem__, last)) for each, last in found.items()}),
            tuple(self.number[each] for each in ambient),
            tuple((str(kind), self.number[self._last[kind]]) for kind in state),
            tuple(sorted(self.number[self._last[store]] for store in held)),
        )
        self.number[node] = self.numbers.of(key)
        self.seen[node] = {each: last[-1] for each, last in found.items() if last}
        self.seen[node] |= {kind: self._last[kind] for kind in (*state, *held)}
        if ambient:
            self.seen[node]["inside"] = ambient[-1]
        self.needs[node] += [last for each in found.values() for last in each] + ambient
        self.needs[node] += [self._last[kind] for kind in (*state, *held)]
        for store in self._updated(node):
            self._last[store] = node
        if _enters(node):
            if op_name(node) == "_set_grad_enabled":  # takes the place of the last one
                self._around = [each for each in self._around if op_name(each) != "_set_grad_enabled"]
            self._around.append(node)

    def _updated(self, node: fx.Node) -> Iterator[Hashable]:
        targets = list(effects.updated(node))
        if any(nested.left for nested in self._nested(node)):
            targets += node.all_input_nodes
        for target in targets:
            yield from self.holds(target)
        yield from self._kinds(node)

    def _kinds(self, node: fx.Node) -> list[str]:
        """What beside tensors a node reads and changes."""
        nested = [nested.kinds for nested in self._nested(node)]
        draws = effects.draws_random_numbers(node) or any(RANDOM in kinds for kinds in nested)
        is_pure = effects.updated(node) or draws or _enters(node) or effects.is_removable(node)
        reaches_out = not is_pure or any(OUTSIDE in kinds for kinds in nested)
        if effects.is_collective(node):
            reaches_out = not effects.is_wait(node)
        return [RANDOM] * draws + [OUTSIDE] * reaches_out

    def _nested(self, node: fx.Node) -> list[Numbered]:
        """The graphs that a node calls."""
        return [self.nested[each] for each in (node, *node.all_input_nodes) if each in self.nested]

    def _held(self, node: fx.Node) -> Hashable:
        """What tells a tensor, module or graph that a graph holds from others."""
        held = attrgetter(str(node.target))(self.gm)
        if isinstance(held, fx.GraphModule):
            self.nested[node] = Numbered(held, self.numbers, self.tensors, self.private, self.dead)
            return self.numbers.of(("graph", self.nested[node].signature))
        self.held[node] = self.numbers.of(("held", _identity(held, self.tensors)))
        return self.held[node]

    def _held_stores(self, node: fx.Node) -> list[Hashable]:
        """Where the parameters and buffers of a module lie that a node calls."""
        if node.op != "call_module" or not self._last:
            return []
        module = leaf_module(node)
        assert module is not None
        return [store for each in (*module.parameters(), *module.buffers()) if (store := _storage(each)) is not None]

    def _arguments(self, node: fx.Node, found: dict[fx.Node, tuple[int, ...]]) -> Hashable:
        """The arguments by name where a signature tells the names, with its defaults."""

        def leaf(given: Any) -> Hashable:
            if not isinstance(given, fx.Node):
                return self._leaf(given)
            return ("node", self.number[given], found.get(given, ()))

        named, is_operator = bound_arguments(self.gm, node)
        return constant(_tuples(named) if is_operator else named, leaf)  # to an operator, [1, 2] is (1, 2)

    def _leaf(self, given: Any) -> Hashable:
        """A symbolic number by the size of an input that its symbols are, a tensor as one that a graph holds."""
        if isinstance(given, torch.Tensor):
            return _identity(given, self.tensors)
        named = re.sub(r"\b[a-z]+\d+\b", lambda symbol: self._symbols.get(symbol[0], symbol[0]), str(given))
        return (type(given).__name__, named)

    # ------------------------------------------------------------------------------------------ the whole

    @cached_property
    def left(self) -> dict[fx.Node, fx.Node]:
        """Inputs, parameters and buffers that hold something else at the end, and the nodes that updated them last."""
        found = {}
        for node in self.gm.graph.nodes:
            is_seen = node.op == "get_attr" and not (self.private and self.private.search(str(node.target)))
            if (node.op == "placeholder" or is_seen) and self.updates(node):
                found[node] = self.updates(node)[-1]
        return found

    @property
    def kinds(self) -> dict[str, fx.Node]:
        """What beside tensors is another at the end, and the nodes that changed it last."""
        return {kind: self._last[kind] for kind in (RANDOM, OUTSIDE) if kind in self._last}

    @cached_property
    def _firsts(self) -> dict[Hashable, fx.Node]:
        found: dict[Hashable, fx.Node] = {}
        for node in self.gm.graph.nodes:
            if node in self.live and node.op != "output":
                found.setdefault((self.number[node], self.holds(node)), node)
        return found

    def first(self, node: fx.Node) -> fx.Node:
        """The node that stands for all of one value, if it costs nothing to have it several times; else the node."""
        if computes(node) or node.op in ("placeholder", "output"):
            return node
        return self._firsts.get((self.number[node], self.holds(node)), node)

    def _live(self) -> set[fx.Node]:
        """The nodes that something outside depends on."""
        if self.dead:
            return set(self.gm.graph.nodes)
        pending = [self.output, *self.inputs, *self.left, *self.left.values(), *self.kinds.values(), *self._around]
        found: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += self.needs[node]
        return found

    def _signature(self) -> Hashable:
        """What the graph computes and leaves behind, and how often it computes what."""
        shared: dict[Hashable, int] = {}
        for i, node in enumerate(self.output.all_input_nodes):
            for store in self.holds(node):
                shared.setdefault(store, i)

        def leaf(given: Any) -> Hashable:
            if not isinstance(given, fx.Node):
                return self._leaf(given)
            updates = tuple(map(self.number.__getitem__, self.updates(given)))
            first = min((shared[store] for store in self.holds(given)), default=None)
            return ("node", self.number[given], updates, first)

        computed = Counter(self.number[node] for node in self.live if computes(node))
        left = {(self.number[node], tuple(map(self.number.__getitem__, self.updates(node)))) for node in self.left}
        return (
            len(self.inputs),
            constant(self.output.args, leaf),
            frozenset(left),
            tuple((kind, self.number[last]) for kind, last in self.kinds.items()),
            tuple(self.number[node] for node in self._around),
            frozenset(computed.items()),
        )


# ------------------------------------------------------------------------------------------------- nodes


def op_name_or_none(node: fx.Node) -> str | None:
    """`op_name` of a call, `None` for what calls nothing."""
    return op_name(node) if node.op.startswith("call_") else None


def is_pointer(node: fx.Node) -> bool:
    """Whether a node reads nothing of its first operand: a view, or an item of a tuple."""
    return effects.is_view(node) or (takes_item(node) and is_tuple(node.all_input_nodes[0]))


def computes(node: fx.Node) -> bool:
    """Whether it makes a difference how often a graph has a node: not for views, items and what surrounds others."""
    if not node.op.startswith("call_") or is_pointer(node) or _enters(node) or _is_exit(node):
        return False
    return not (takes_item(node) and len(node.all_input_nodes) == 1)


def _enters(node: fx.Node) -> bool:
    name = op_name_or_none(node) or ""
    return (effects.sets_ambient_state(node) or name.startswith("_enter_") or name == "_set_grad_enabled") and (
        not _is_exit(node)
    )


def _is_exit(node: fx.Node) -> bool:
    return (op_name_or_none(node) or "").startswith("_exit_")


# ------------------------------------------------------------------------------------------------- tensors


def _storage(held: Any) -> Hashable:
    """The storage of a tensor, `None` where it has none."""
    if not isinstance(held, torch.Tensor) or not has_storage(held):
        return None
    return ("storage", StorageWeakRef(held.untyped_storage()))


def _identity(held: Any, by: Tensors) -> Hashable:
    """What tells a tensor or module from others.

    By identity a tensor is where it lies: a parameter and a detached alias of it are the same. A module that holds
    nothing, such as an activation function, is what it does; the guards of a trace, which `torch.export` puts into a
    module, restate what its inputs were and count as nothing.
    """
    if isinstance(held, torch.Tensor):
        if by == "value":
            return _value_of(held)
        if has_storage(held) and held.layout is torch.strided:
            sizes = tuple(held.shape), tuple(held.stride()), held.storage_offset()
            return (_storage(held), str(sizes), held.dtype)
    elif isinstance(held, nn.Module) and not any((held._modules, held._parameters, held._buffers)):
        own = {name: each for name, each in vars(held).items() if not name.startswith("_")}
        if type(held).__name__ == "GuardsFn":  # of torch.export
            own = {}
        return (type(held), tuple((name, constant(each, Same)) for name, each in sorted(own.items())))
    elif isinstance(held, nn.Module) and by == "value":
        parts = tuple((type(part), part.training) for part in held.modules())
        state = (*held.named_parameters(), *held.named_buffers())
        return (repr(held), parts, tuple((name, _value_of(each)) for name, each in state))
    return Same(held)


def _value_of(tensor: torch.Tensor) -> Hashable:
    spec = (type(tensor), tensor.dtype, str(tuple(tensor.shape)), str(tensor.device), tensor.requires_grad)
    try:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError):  # fake, sparse, quantised: no bytes to read
        return (*spec, Same(tensor))
    return (*spec, hashlib.sha256(data.tobytes()).hexdigest())


def _symbols(inputs: list[fx.Node]) -> dict[str, str]:
    """The symbols of a graph, each with the input and the dimension that it is the size of."""
    found: dict[str, str] = {}
    for i, node in enumerate(inputs):
        recorded = value(node)
        sizes = recorded.shape if isinstance(recorded, torch.Tensor) else (recorded,)
        for dim, size in enumerate(sizes):
            if isinstance(size, (torch.SymInt, torch.SymFloat)):
                found.setdefault(str(size), f"input[{i}, {dim}]")
    return found


# ----------------------------------------------------------------------------------------------- arguments


def bound_arguments(gm: fx.GraphModule, node: fx.Node) -> tuple[dict[str, Any], bool]:
    """Arguments by their names, with defaults, where a signature takes them; and whether it is an operator's."""
    signatures, is_operator = _signatures(node.target if node.op == "call_function" else node.op, str(node.target))
    args: tuple[Any, ...] = node.args
    if node.op == "call_module":
        signatures = _signature_of(type(gm.get_submodule(str(node.target))).forward)
        args = (None, *args)
    kwargs = {"input" if name == "self" else name: each for name, each in node.kwargs.items()}
    for signature in signatures:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            continue
        bound.apply_defaults()
        return dict(bound.arguments), is_operator
    positional = {str(i): each for i, each in enumerate(args)}
    return positional | dict(sorted(node.kwargs.items())), False


@lru_cache(maxsize=4096)
def _signatures(target: Any, name: str) -> tuple[tuple[inspect.Signature, ...], bool]:
    """The signatures of a function, or of the method of that name; and whether they are an operator's."""
    if target == "call_method":
        target = getattr(torch.ops.aten, name, None)
    if target is None or isinstance(target, str):
        return (), False
    found = get_signature_for_torch_op(target)
    return (tuple(found), True) if found else (_signature_of(target), False)


def _signature_of(function: Any) -> tuple[inspect.Signature, ...]:
    try:
        return (inspect.signature(function),)
    except (TypeError, ValueError):
        return ()


def _tuples(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return tuple(map(_tuples, given))
    return {name: _tuples(each) for name, each in given.items()} if isinstance(given, dict) else given
