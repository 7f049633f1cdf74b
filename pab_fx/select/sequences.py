"""Whose tokens an attention reads: do keys and values come from another sequence than the queries?"""

from __future__ import annotations

import math

import torch
from torch import fx

from ..graph.dataflow import PERMUTATIONS, Core, backward, is_projection, op_name, permutation, shape, value
from ..graph.parts import JOINS, joined, taken


def reads_another_sequence(core: Core, acts: set[fx.Node], cores: dict[fx.Node, Core]) -> bool:
    """Whether keys and values come from another sequence than the queries: cross-attention.

    Queries and keys that are projected from a common activation are one sequence. Otherwise both are
    followed to the graph's inputs along operations that keep the tokens' correspondence.
    """
    from_query, from_keys = projected(core.query, acts), set()
    for key in core.keys:
        from_keys |= projected(key, acts)
    if from_query & from_keys:
        return False
    return not (_origins(from_query, acts, cores) & _origins(from_keys, acts, cores))


def projected(node: fx.Node, acts: set[fx.Node]) -> set[fx.Node]:
    """The activations whose projections make up `node`; `node` itself where nothing is projected.

    Rotary tables and masks are activations too, but no projection of them reaches queries or keys.
    """

    def stop(step: fx.Node) -> bool:
        return is_projection(step, acts)

    def follow(step: fx.Node) -> list[fx.Node]:
        return [source for source in step.all_input_nodes if source in acts]

    found = [step for step in backward([node], stop, follow) if stop(step)]
    return {follow(step)[0] for step in found} or {node}


Span = tuple[int, int, int]  # a dimension and the half-open range of positions in it


def _origins(nodes: set[fx.Node], acts: set[fx.Node], cores: dict[fx.Node, Core]) -> set[fx.Node]:
    """The graph inputs whose tokens the tokens of `nodes` are.

    An attention's output has its queries' tokens, a part of a concatenation those of the operands it lies
    in. What is broadcast over the tokens (modulation by a timestep, a pooled embedding) says nothing of them,
    nor does what only lends its dtype or shape.
    """
    pending: list[tuple[fx.Node, Span | None]] = [(node, None) for node in nodes]
    seen: set[tuple[fx.Node, Span | None]] = set()
    while pending:
        step = pending.pop()
        if step not in seen:
            seen.add(step)
            pending.extend(token_sources(*step, acts, cores))
    inputs = {node for node, _ in seen if node.op == "placeholder" and node in acts}
    sizes = {node: shape(node) for node in inputs}
    return {node for node, size in sizes.items() if (size is None or len(size) > 1) and "timestep" not in node.name}


LENDS_DTYPE_OR_SHAPE = {"type_as", "view_as", "expand_as", "reshape_as", "to"}


def token_sources(
    node: fx.Node, span: Span | None, acts: set[fx.Node], cores: dict[fx.Node, Core]
) -> list[tuple[fx.Node, Span | None]]:
    """What holds the tokens in `span` of a node (all of them for `None`), and where in it."""
    name = op_name(node) if node.op.startswith("call") else node.op
    if node in cores:
        return [(cores[node].query, span)]
    if name in JOINS and span is not None:
        return _concatenated(node, span)
    sources = [source for source in node.all_input_nodes if source in acts and not _is_broadcast(source, node)]
    if name.startswith("new_") or name.endswith("_like"):
        return []
    if name in LENDS_DTYPE_OR_SHAPE:
        sources = sources[:1]
    part = taken(node)
    if part is not None:
        return [(sources[0], _within(span, *part.span))] if sources else []
    return [(source, _span_before(node, source, span)) for source in sources]


def _concatenated(node: fx.Node, span: Span) -> list[tuple[fx.Node, Span | None]]:
    """The operands of a concatenation that the span lies in."""
    along, low, high = span
    parts = joined(node)
    if not parts or parts[0][1].along != along:
        return [(source, span if parts else None) for source in node.all_input_nodes]
    found: list[tuple[fx.Node, Span | None]] = []
    for part, at in parts:
        _, start, stop = at.span
        first, last = max(low, start) - start, min(high, stop) - start
        if first < last:
            found.append((part, (along, first, last)))
    return found


def _within(span: Span | None, dim: int, start: int, stop: int) -> Span:
    """The span, of a part that starts at `start`, in the whole."""
    return (dim, start + span[1], start + span[2]) if span is not None and span[0] == dim else (dim, start, stop)


def _span_before(node: fx.Node, source: fx.Node, span: Span | None) -> Span | None:
    """Where a span of a node lies in its source, `None` (everywhere) if that cannot be told."""
    before, after = shape(source), shape(node)
    if span is None or not before or not after:
        return None
    dim, start, stop = span
    if op_name(node) in PERMUTATIONS:
        dim = permutation(node, source)[dim]
        return (dim, start, stop)
    if len(before) == len(after) and before[dim] == after[dim]:
        return span
    ahead = math.prod(after[:dim])
    for other in range(len(before)):
        if math.prod(before[:other]) == ahead and before[other] == after[dim]:
            return (other, start, stop)
    return None


def _is_broadcast(source: fx.Node, result: fx.Node) -> bool:
    small, large = shape(source), shape(result)
    if not small or not large or len(large) < 2 or not isinstance(value(source), torch.Tensor):
        return False
    if math.prod(small) == math.prod(large):  # nothing is repeated: it only lies in another shape
        return False
    return len(small) < len(large) - 1 or (len(small) == len(large) and small[-2] == 1 and large[-2] != 1)
