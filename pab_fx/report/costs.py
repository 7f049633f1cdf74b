"""What the nodes of a captured graph cost: operations and floating-point operations. No model is run for that.

Floating-point operations are counted by `torch.utils.flop_counter`, on tensors of the recorded shapes that hold no
data. What it has no formula for counts as 0: everything that is no product, and kernels of others unless they are told
to it by `torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from .._torch import operator_namespace, size_hint
from ..graph import effects
from ..graph.dataflow import op_name, value
from ..select.region import Region


def operations(nodes: Iterable[fx.Node]) -> int:
    """How many of these nodes do something: inputs, parameters and the output of a graph do not.

    Example:
        >>> operations(fx.symbolic_trace(lambda x, y: x.sin() + y).graph.nodes)
        2
    """
    return sum(node.op.startswith("call") for node in nodes)


def spared_by(region: Region, owned: Collection[fx.Node] = ()) -> tuple[fx.Node, ...]:
    """What a step that reuses a region runs without: its nodes and those that only feed it, in graph order.

    Args:
        region: the region.
        owned: nodes of all regions, which go with their own.

    %n = norm(%x)           # only %a uses it
    %a = attention(%n)      # the region           ->    %n, %a
    %y = add(%x, %a)
    """
    inside, others = set(region.nodes), set(owned)
    pending = [source for node in region.nodes for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in inside and node not in others and inside.issuperset(node.users) and _may_go(node):
            inside.add(node)
            pending.extend(node.all_input_nodes)
    return tuple(sorted(inside))


def _may_go(node: fx.Node) -> bool:
    return node.op.startswith("call") and (effects.is_removable(node) or effects.collective_of(node) is not None)


@dataclass(frozen=True)
class _Shape:
    """All that a count depends on of a tensor; floating types cost alike, and need not agree under an autocast."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return cls(tuple(map(size_hint, tensor.shape)), torch.complex64 if tensor.is_complex() else dtype)


def flops(node: fx.Node) -> int:
    """The floating-point operations of a node, two for a product of numbers and its sum; 0 where they are not known.

    Example:
        >>> gm = fx.symbolic_trace(lambda x: x @ x)
        >>> for node in gm.graph.nodes:
        ...     node.meta["example_value"] = torch.empty(4, 4)
        >>> [flops(node) for node in gm.graph.nodes]
        [0, 128, 0]
    """
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    if sum(isinstance(value(operand), torch.Tensor) for operand in operands) < 2 or not _computes(node):
        return 0
    args, kwargs = fx.map_arg((node.args, tuple(node.kwargs.items())), lambda operand: _recorded(value(operand)))
    if op_name(node) == "flex_attention":  # its further arguments are graphs
        return _counted(scaled_dot_product_attention, args[:3], ())
    call = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    try:
        return _counted(call, args, kwargs)
    except TypeError:  # an argument that has no hash, such as a slice
        return 0


def _computes(node: fx.Node) -> bool:
    """Whether a node calls an operator of torch that only computes: a function of somebody else's may do anything."""
    if node.op not in ("call_function", "call_method") or effects.is_collective(node):
        return False
    if effects.draws_random_numbers(node) or effects.sets_ambient_state(node):
        return False
    module = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_method" or bool(operator_namespace(node.target)) or module in ("torch", "_operator")


def _recorded(found: Any) -> Any:
    """A recorded value without its data, sizes as they were traced."""
    if isinstance(found, torch.Tensor):
        return _Shape.of(found)
    if isinstance(found, torch.SymInt):
        return size_hint(found)
    return tuple(map(_recorded, found)) if isinstance(found, (tuple, list)) else found


@functools.lru_cache(maxsize=4096)
def _counted(call: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> int:
    """The operations of one call; equal blocks make equal calls."""

    def stand_in(argument: Any) -> Any:
        if not isinstance(argument, _Shape):
            return argument
        return torch.empty(argument.sizes, dtype=argument.dtype, device="meta")

    positional, named = map_aggregate((args, dict(kwargs)), stand_in)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(*positional, **named)
    except Exception:  # a count is no reason to fail: what cannot be computed without data is no product
        return 0
    return int(counter.get_total_flops())
