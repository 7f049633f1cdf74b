"""What a graph computes, up to the names of its nodes and the values of its inputs: equal for graphs that are alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx, nn

from .dataflow import value

Structure = Hashable


def structure_of(gm: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> Structure:
    """A key that two graphs share if one can run in place of the other, given its own inputs.

    It holds every operation with its operands and constants, in order, and of each input what a compiler reads:
    shape, strides, dtype, device. Tensors and modules that a graph holds itself count by identity, nested graphs by
    their structure.

    Args:
        gm: a graph; what was recorded for its inputs tells their shapes, symbolic ones too.
        example_inputs: its inputs, for what no value was recorded of.

    Example:
        >>> x_plus_1, y_plus_1, x_plus_2 = map(fx.symbolic_trace, (lambda x: x + 1, lambda y: y + 1, lambda x: x + 2))
        >>> structure_of(x_plus_1) == structure_of(y_plus_1), structure_of(x_plus_1) == structure_of(x_plus_2)
        (True, False)
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    examples = iter(example_inputs)
    found: list[Hashable] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = next(examples, None)
            recorded = value(node)
            found.append((isinstance(example, nn.Parameter), _spec(example if recorded is None else recorded)))
        elif node.op in ("get_attr", "call_module"):
            found.append((node.op, _held(gm, str(node.target)), _constant(node.args, position)))
        else:
            found.append((node.op, node.target, _constant(node.args, position), _constant(node.kwargs, position)))
    return tuple(found)


def _held(gm: fx.GraphModule, name: str) -> Hashable:
    """What tells something that a graph holds from others."""
    held: Any = gm
    for part in name.split("."):
        held = getattr(held, part)
    return structure_of(held) if isinstance(held, fx.GraphModule) else id(held)


def _spec(given: Any) -> Hashable:
    """What a compiler reads of an input; sizes as text, since symbolic ones are not hashable."""
    if isinstance(given, torch.Tensor):
        layout = str(tuple(given.stride())) if given.layout is torch.strided else ""
        kind = (type(given).__name__, given.dtype, str(given.device), given.requires_grad, given.layout)
        return (str(tuple(given.shape)), layout, *kind)
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(given).__name__, str(given))
    return (type(given).__name__, repr(given))


def _constant(given: Any, position: dict[fx.Node, int]) -> Hashable:
    """An argument: operands by their position in the graph, constants by type and value."""
    if isinstance(given, fx.Node):
        return ("node", position[given])
    if isinstance(given, (tuple, list)):
        return (type(given).__name__, *(_constant(each, position) for each in given))
    if isinstance(given, dict):
        return ("dict", *((key, _constant(each, position)) for key, each in given.items()))
    if isinstance(given, slice):
        return ("slice", *(_constant(each, position) for each in (given.start, given.stop, given.step)))
    if isinstance(given, torch.Tensor) or not isinstance(given, Hashable):
        return ("id", id(given))
    return (type(given).__name__, repr(given) if isinstance(given, float) else given)
