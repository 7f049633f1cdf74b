"""Do two graphs compute the same? If not, where do they part?

    assert_graphs_equivalent(gm, other)

    AssertionError: the graphs differ first in %mul of one and %mul_1 of the other:
    --- one
    +++ other
    @@ -2,4 +2,4 @@
     %x = input 0
     %linear = linear(input=%x, weight=%weight, bias=None)
    -%mul = mul(input=%linear, other=2.0)
    +%mul = mul(input=%linear, other=3.0)
     return (%mul,)

Both graphs are printed in an order and with names that are the same for both wherever they agree.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from ..graph.dataflow import op_name
from .numbering import Numbered, Numbers, Tensors, bound_arguments

CONTEXT, AT_MOST = 3, 80
"""Lines of a difference that surround a change, and that are printed of it."""


def assert_graphs_equivalent(
    a: fx.GraphModule,
    b: fx.GraphModule,
    *,
    tensors: Tensors = "identity",
    private: str | None = None,
    dead_code: bool = False,
) -> None:
    """Assert that two graphs do the same operations on the same: up to names, and the order of what is independent.

    Graphs from Dynamo, `torch.export`, `torch.fx.symbolic_trace` and any pass will do.

    - Inputs correspond by their order, nodes by what they compute. An operation has to occur as often in both; a
      view, or an item of a tuple, that is taken twice counts once, since it computes nothing.
    - Order matters where something is updated in place that others read, where random numbers are drawn, around
      autocasts and other modes, and among what reaches out of the graph: collectives, assertions. Tensors that may
      share storage count as if they did: an update of one half is ordered with reads of the other.
    - Arguments are compared by name where the operation's signature tells the names, with its defaults: `sum(x, 1)`
      is `sum(x, dim=1)`. Different spellings of an operation, `torch.add(x, y)` and `x + y`, are different.
    - Nested graphs, as the branches of `torch.cond`, are compared likewise. Symbolic sizes count as the dimension of
      the input that they are the size of.

    Args:
        a: a graph.
        b: another one.
        tensors: how parameters, buffers, constants and modules that a graph holds are compared. By "identity": the
            same module, the same place in memory. By "value", for graphs of two copies of a model: equal type, shape
            and bits.
        private: a regular expression; buffers with such names are nobody's business: what is written there is an effect
            for the graph's own reads only.
        dead_code: whether operations count that nothing depends on. Updates in place that nobody can see are such.

    Raises:
        AssertionError: with the first node that differs, and the difference.
        TypeError: if one of them is no graph.

    Example:
        >>> one, same = lambda x, y: (x.sin() * 2, y.cos()), lambda u, v: (v.cos(), u.sin() * 2)[::-1]
        >>> assert_graphs_equivalent(fx.symbolic_trace(one), fx.symbolic_trace(same))
        >>> assert_graphs_equivalent(fx.symbolic_trace(one), fx.symbolic_trace(lambda x, y: (x.sin(), y)))
        Traceback (most recent call last):
        ...
        AssertionError: the graphs differ first in %mul of one and the output of the other:
        ...
    """
    found = graph_difference(a, b, tensors=tensors, private=private, dead_code=dead_code)
    if found is not None:
        raise AssertionError(found)


def graph_difference(
    a: fx.GraphModule,
    b: fx.GraphModule,
    *,
    tensors: Tensors = "identity",
    private: str | None = None,
    dead_code: bool = False,
) -> str | None:
    """What `assert_graphs_equivalent` says of two graphs, `None` if they are equivalent; its arguments.

    Example:
        >>> doubled, tripled = fx.symbolic_trace(lambda x: x * 2), fx.symbolic_trace(lambda x: x * 3)
        >>> print(graph_difference(doubled, tripled))
        the graphs differ first in %mul of one and %mul of the other:
        --- one
        +++ other
        @@ -1,4 +1,4 @@
         takes 1 input
         %x = input 0
        -%mul = mul(a=%x, b=2)
        +%mul = mul(a=%x, b=3)
         return %mul
        >>> graph_difference(doubled, doubled)
    """
    for gm in (a, b):
        if not isinstance(gm, fx.GraphModule):
            hint = "pass its module()" if isinstance(gm, torch.export.ExportedProgram) else "trace the model first"
            raise TypeError(f"graphs are compared, got {type(gm).__name__}: {hint}.")
    if tensors not in ("identity", "value"):
        raise ValueError(f"tensors={tensors!r} is unknown; it is 'identity' or 'value'.")
    numbers, pattern = Numbers(), re.compile(private) if private is not None else None
    one, other = (Numbered(gm, numbers, tensors, pattern, dead_code) for gm in (a, b))
    return None if one.signature == other.signature else _difference(one, other)


def _difference(one: Numbered, other: Numbered) -> str:
    """The difference of both graphs' texts, with the first nodes that differ by their own names."""
    ours, theirs = list(_lines(one)), list(_lines(other))
    names = _names(ours, theirs)
    left, right = ([line.text(names) for line in lines] for lines in (ours, theirs))
    diff = list(difflib.unified_diff(left, right, "one", "other", lineterm="", n=CONTEXT))
    if not diff:
        return "the graphs differ in which of their outputs share memory, or in how often they compute the same."
    changes = difflib.SequenceMatcher(None, left, right).get_opcodes()
    _, i, i_end, j, j_end = next(change for change in changes if change[0] != "equal")
    firsts = [lines[at].name if at < end else "nothing" for lines, at, end in ((ours, i, i_end), (theirs, j, j_end))]
    more = [f"... and {len(diff) - AT_MOST} lines more"] if len(diff) > AT_MOST else []
    headline = f"the graphs differ first in {firsts[0]} of one and {firsts[1]} of the other:"
    return "\n".join([headline, *diff[:AT_MOST], *more])


# --------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class _Line:
    """A node, where it stands in, and how deep; `node` is `None` for the first line of a graph."""

    graph: Numbered
    node: fx.Node | None
    depth: int

    @property
    def name(self) -> str:
        """What the node is called in its own graph."""
        return "the inputs" if self.node is None else "the output" if self.node.op == "output" else f"%{self.node.name}"

    def likeness(self, closely: bool) -> Hashable:
        """A key that a node shares with its counterpart of another graph, if only operands (or constants) differ."""
        if self.node is None:
            return self.depth
        constants = fx.map_arg((self.node.args, self.node.kwargs), lambda node: None) if closely else None
        return (self.depth, self.node.op, _called(self.graph, self.node), str(constants))

    def text(self, names: Callable[[Numbered, fx.Node], str]) -> str:
        """The node with the names that both graphs share."""
        indent = "    " * self.depth
        if self.node is None:
            count = len(self.graph.inputs)
            return f"{indent}takes {count} input{'' if count == 1 else 's'}"
        seen = self.graph.seen.get(self.node, {})

        def operand(node: fx.Node) -> str:
            return names(self.graph, node) + (f" after {names(self.graph, seen[node])}" if node in seen else "")

        notes = [
            ("inside " if key == "inside" else "after ") + names(self.graph, node)
            for key, node in seen.items()
            if not isinstance(key, fx.Node)
        ]
        if self.node.op == "output":
            left = self.graph.left.items()
            notes = [f"{names(self.graph, node)} is left as {names(self.graph, last)} has it" for node, last in left]
        return indent + self._call(operand) + (f"    # {', '.join(notes)}" if notes else "")

    def _call(self, operand: Callable[[fx.Node], str]) -> str:
        node, graph = self.node, self.graph
        assert node is not None
        if node.op == "output":
            return f"return {_argument(node.args[0], operand)}"
        name = operand(node).split(" after ")[0]
        if node.op == "placeholder":
            return f"{name} = input {graph.inputs.index(node)}" + (f", default {node.args}" if node.args else "")
        if node.op == "get_attr":
            return f"{name} = {node.target}: {_described(graph, node)}"
        given = {key: each for key, each in bound_arguments(graph.gm, node)[0].items() if each is not None}
        spelled = {key: _argument(each, operand) for key, each in given.items()}
        named = (each if key.isdigit() else f"{key}={each}" for key, each in spelled.items())
        return f"{name} = {_called(graph, node)}({', '.join(named)})"


def _lines(graph: Numbered, depth: int = 0) -> Iterator[_Line]:
    """The nodes that count, operands first, in an order that their order in the graph has no part in."""
    yield _Line(graph, None, depth)
    for node in graph.inputs:
        yield _Line(graph, node, depth)
    state = sorted(graph.left, key=lambda node: str(node.target))
    roots = [*graph.output.all_input_nodes, *(graph.left[node] for node in state), *graph.kinds.values()]
    if graph.dead:
        roots += list(graph.gm.graph.nodes)
    done: set[Hashable] = set(graph.inputs)
    pending = [(root, False) for root in reversed([*map(graph.first, roots), graph.output])]
    while pending:
        node, is_ready = pending.pop()
        if node in done or node not in graph.live:
            continue
        if not is_ready:
            pending.append((node, True))
            pending += [(graph.first(each), False) for each in reversed(graph.needs[node])]
            continue
        done.add(node)
        if node in graph.nested:
            yield from _lines(graph.nested[node], depth + 1)
        yield _Line(graph, node, depth)


def _names(ours: Sequence[_Line], theirs: Sequence[_Line]) -> Callable[[Numbered, fx.Node], str]:
    """Names by which both graphs call what corresponds: what computes the same, and what is most alike of the rest."""
    left, free = ([line for line in lines if line.node is not None] for lines in (ours, theirs))
    names = {line.node: line.node.name for line in left}  # type: ignore[union-attr]
    used = set(names.values())
    for pairs, key in (
        (_alike, lambda line: (line.depth, line.graph.number.get(line.node))),
        (_in_sequence, lambda line: line.likeness(closely=True)),
        (_in_sequence, lambda line: line.likeness(closely=False)),
    ):
        partners = [(own.node, line.node) for own, line in pairs(left, free, key)]
        names |= {node: names[own] for own, node in partners}
        matched = {node for pair in partners for node in pair}
        left, free = ([line for line in lines if line.node not in matched] for lines in (left, free))
    names |= {line.node: line.node.name + "'" * (line.node.name in used) for line in free}  # type: ignore[union-attr]

    def name(graph: Numbered, node: fx.Node) -> str:
        first = graph.first(node)
        return f"%{names.get(first, first.name)}"

    return name


def _alike(
    ours: Sequence[_Line], theirs: Sequence[_Line], key: Callable[[_Line], Hashable]
) -> Iterator[tuple[_Line, _Line]]:
    """Pairs of lines with the same key, the first with the first."""
    found: defaultdict[Hashable, list[_Line]] = defaultdict(list)
    for line in reversed(ours):
        found[key(line)].append(line)
    for line in theirs:
        if found[key(line)]:
            yield found[key(line)].pop(), line


def _in_sequence(
    ours: Sequence[_Line], theirs: Sequence[_Line], key: Callable[[_Line], Hashable]
) -> Iterator[tuple[_Line, _Line]]:
    """Pairs of lines with the same key in the longest common sequences; ends that agree are taken off first."""
    left, right = list(map(key, ours)), list(map(key, theirs))
    shorter = min(len(left), len(right))
    start = next((i for i in range(shorter) if left[i] != right[i]), shorter)
    end = next((i for i in range(shorter - start) if left[-1 - i] != right[-1 - i]), shorter - start)
    yield from zip(ours[:start], theirs[:start], strict=True)
    middle = left[start : len(left) - end], right[start : len(right) - end]
    for i, j, size in difflib.SequenceMatcher(None, *middle).get_matching_blocks():
        yield from zip(ours[start + i : start + i + size], theirs[start + j : start + j + size], strict=True)
    if end:
        yield from zip(ours[-end:], theirs[-end:], strict=True)


# ---------------------------------------------------------------------------------------------------- text


def _called(graph: Numbered, node: fx.Node) -> str:
    """What a node calls, for people: with its kind where that is not told by the name."""
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return f"{node.target}: {_described(graph, node)}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return op_name(node) if node.op == "call_function" else node.op


def _described(graph: Numbered, node: fx.Node) -> str:
    """A tensor, module or graph that a graph holds; those of one number are the same."""
    held: Any = attrgetter(str(node.target))(graph.gm)
    if isinstance(held, fx.GraphModule):
        return "the graph above"
    if isinstance(held, torch.Tensor):
        kind = f"{type(held).__name__} {tuple(held.shape)} {str(held.dtype).removeprefix('torch.')}"
    elif isinstance(held, nn.Module):
        kind = type(held).__name__
    else:
        kind = repr(held)
    return f"{kind}, no. {graph.held[node]}"


class _Name(str):
    """What an operand is called, which prints without quotes."""

    __repr__ = str.__str__


def _argument(given: Any, operand: Callable[[fx.Node], str]) -> str:
    """An argument as Python spells it."""
    return repr(fx.map_arg(given, lambda node: _Name(operand(node))))
