"""The functions of a how, traced into graphs and checked there.

update(slots, inputs, outputs, scalars)    ->    %sub : call_function[operator.sub](%y, %pab_slot_0_0)
                                                 %div : call_function[operator.truediv](%sub, %pab_distance_0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..graph.copies import traced_into
from ..graph.dataflow import value
from ..policy.how import How
from .strides import copied_in_order, stride_order


def looks_of_slots(how: How, outputs: Sequence[fx.Node]) -> list[Any]:
    """What the slots for these outputs look like, each in memory of its own; `None` where that was not recorded."""
    recorded = list(map(value, outputs))
    if any(each is None for each in recorded):
        return [None] * len(how.slots([torch.empty((), device="meta") for _ in outputs]))
    return [copied_in_order(each, stride_order(each)) for each in how.slots(recorded)]


def traced_how(
    how: How, function: str, looks: Sequence[Any], graph: fx.Graph, *given: Any, meta: dict[str, Any] | None = None
) -> tuple[fx.Node, ...]:
    """The nodes that a function of a how yields, traced into a graph where it inserts nodes now.

    Args:
        how: the how.
        function: name of the function.
        looks: for each tensor that it has to yield, one of the shape and dtype, `None` where that is not known.
        graph: the graph.
        given: what the function takes, as nests of nodes.
        meta: meta of the new nodes.

    Raises:
        TypeError: naming the how and the function, if it cannot be traced, updates a tensor in place, or yields other
            tensors.
    """
    before = set(graph.nodes)
    try:
        found = traced_into(graph, getattr(how, function), *given, meta=meta)
    except Exception as error:
        raise TypeError(f"{how!r}: its {function} cannot be traced, {type(error).__name__}: {error}") from error
    for node in graph.nodes:
        if node not in before and effects.updated(node):
            raise TypeError(f"{how!r}: its {function} updates a tensor in place ({node.target}); let it make another.")
    if len(found) != len(looks):
        raise TypeError(f"{how!r}: its {function} yields {len(found)} tensors in place of {len(looks)}.")
    for node, look in zip(found, looks, strict=True):
        if not _is_like(value(node), look):
            raise TypeError(f"{how!r}: its {function} yields {_described(value(node))} in place of {_described(look)}.")
    return found


def _is_like(made: Any, look: Any) -> bool:
    """Whether two tensors have one dtype and shape, as far as is known; to compare symbols would add guards."""
    if not isinstance(made, torch.Tensor) or not isinstance(look, torch.Tensor):
        return True
    if made.dtype != look.dtype or made.dim() != look.dim():
        return False
    pairs = zip(made.shape, look.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
