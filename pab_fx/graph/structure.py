"""What a graph computes, up to the names of its nodes and the values of its inputs: equal for graphs that are alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import has_storage, wrapped
from .dataflow import value

Structure = Hashable


class Same:
    """Equal to another one of the very same object, which it keeps alive: the id of one that is gone is given anew.

    Example:
        >>> one, other = [1], [1]
        >>> Same(one) == Same(one), Same(one) == Same(other)
        (True, False)
    """

    def __init__(self, held: Any) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)


def structure_of(gm: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> Structure:
    """A key that two graphs share if one can run in place of the other, given its own inputs.

    It holds every operation with its operands and constants, in order; of each input what a compiler reads: shape,
    strides, dtype, device; and which inputs share a storage. Tensors and modules that a graph holds itself count by
    identity, nested graphs by their structure. Symbolic sizes count by their names: those of one capture.

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
    storages: dict[Any, int] = {}
    found: list[Hashable] = []

    def leaf(given: Any) -> Hashable:
        return ("node", position[given]) if isinstance(given, fx.Node) else _leaf(given)

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example, recorded = next(examples, None), value(node)
            given = example if recorded is None else recorded
            found.append((isinstance(example, nn.Parameter), _spec(given), _storage(given, storages)))
        elif node.op in ("get_attr", "call_module"):
            held, args, kwargs = _held(gm, str(node.target)), node.args, node.kwargs
            found.append((node.op, held, constant(args, leaf), constant(kwargs, leaf)))
        else:
            found.append((node.op, node.target, constant(node.args, leaf), constant(node.kwargs, leaf)))
    return tuple(found)


def _held(gm: fx.GraphModule, name: str) -> Hashable:
    """What tells something that a graph holds from others."""
    held: Any = attrgetter(name)(gm)
    return structure_of(held) if isinstance(held, fx.GraphModule) else Same(held)


def _spec(given: Any) -> Hashable:
    """What a compiler reads of an input; sizes as text, since symbolic ones are not hashable."""
    if isinstance(given, torch.Tensor):
        layout = str(tuple(given.stride())) if given.layout is torch.strided else ""
        bits = (given.requires_grad, given.is_conj(), given.is_neg())
        spec = (
            type(given).__name__,
            str(tuple(given.shape)),
            layout,
            given.layout,
            given.dtype,
            str(given.device),
            bits,
        )
        inner, context = wrapped(given)
        return (*spec, constant(context, _leaf), *((name, _spec(each)) for name, each in inner.items()))
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(given).__name__, str(given))
    return (type(given).__name__, repr(given))


def _storage(given: Any, seen: dict[Any, int]) -> int | None:
    """The number of the storage of an input among those that were seen; a compiler heeds which inputs share one."""
    if not isinstance(given, torch.Tensor) or not has_storage(given):
        return None
    return seen.setdefault(StorageWeakRef(given.untyped_storage()), len(seen))


def _leaf(given: Any) -> Hashable:
    """A tensor among the arguments counts by identity, a symbolic number by its name."""
    return Same(given) if isinstance(given, torch.Tensor) else _spec(given)


def constant(given: Any, leaf: Callable[[Any], Hashable]) -> Hashable:
    """A key for an argument of a node: constants by type and value.

    Args:
        given: any nest of what a node takes.
        leaf: makes the key of a node, a tensor or a symbolic number in it.

    Example:
        >>> constant([1, 1.0], repr) == constant([1, True], repr)
        False
    """
    if isinstance(given, (fx.Node, torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return leaf(given)
    if isinstance(given, (tuple, list)):
        return (type(given).__name__, *(constant(each, leaf) for each in given))
    if isinstance(given, dict):
        return ("dict", *((constant(key, leaf), constant(each, leaf)) for key, each in given.items()))
    if isinstance(given, slice):
        return ("slice", *(constant(each, leaf) for each in (given.start, given.stop, given.step)))
    if isinstance(given, (float, complex)):
        return (type(given).__name__, repr(given))  # 0.0 and -0.0 are equal and compute different things
    try:
        hash(given)
    except TypeError:
        return Same(given)
    return (type(given).__name__, given)
