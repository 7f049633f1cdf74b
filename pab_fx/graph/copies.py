"""Copies of graphs, and values recorded for new nodes, so that passes can go on asking what tracers told."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .._torch import fake_mode_of, keep_persistence
from .._torch.dynamo import keep_sources
from .dataflow import value


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own that shares parameters, buffers and submodules with `gm`."""
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    result.meta.update(gm.meta)
    keep_sources(gm, result)
    keep_persistence(gm, result)
    return result


def traced_into(
    graph: fx.Graph, function: Callable[..., Any], *groups: Any, meta: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """The nodes of what a torch function yields, traced into a graph where it inserts nodes now.

    Args:
        graph: the graph.
        function: takes the groups with a `Proxy` in the place of each node, and returns a tuple.
        groups: nests of nodes.
        meta: meta of the new nodes, beside their recorded values.

    Raises:
        TypeError: if the function returns something else than tensors that are computed from what it takes.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> traced_into(graph, lambda values: (values[0] + 1,), (x,))
        (add,)
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    before = set(graph.nodes)

    def proxy(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    results = function(*(fx.map_arg(group, proxy) for group in groups))
    nodes = tuple(result.node if isinstance(result, fx.Proxy) else None for result in results)
    if None in nodes:
        raise TypeError(f"{function!r} must return tensors that are computed from its arguments, got {results!r}.")
    for node in graph.nodes:
        if node not in before:
            node.meta = dict(meta or {})
            record(node)
    return nodes


def record(node: fx.Node) -> None:
    """Record the value of a node, where those of all its operands were recorded."""
    recorded = [value(source) for source in node.all_input_nodes]
    if all(each is not None for each in recorded):
        with fake_mode_of(recorded) or contextlib.nullcontext(), torch.no_grad():  # numbers become tensors in the mode
            node.meta["example_value"] = evaluated(node, value)


def evaluated(node: fx.Node, operand: Callable[[fx.Node], Any]) -> Any:
    """What a node yields for these values of its operands.

    Raises:
        TypeError: for a node that calls no function.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function" and callable(node.target):
        return node.target(*args, **kwargs)
    raise TypeError(f"{node.format_node()} calls no function.")


def returned(gm: fx.GraphModule) -> Sequence[Any]:
    """What a graph returns, as a flat tuple."""
    found: Any = gm.graph.output_node().args[0]
    return found if isinstance(found, (tuple, list)) else (found,)
