"""Small graphs that are drawn and written down as data: views, updates in place, random numbers, writes to slices.

>>> print(GraphSpec((("chunk", 0, 0), ("mul_halves", 0, 1)), (0,)).build().code)
<BLANKLINE>
...
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .specs import _Short

INPUTS = ("x", "y", "text", "mask", "pooled", "l_self_parameters_weight_")


@dataclass(frozen=True, repr=False)
class GraphSpec(_Short):
    """A graph of tensors of 4 x 4 and 2 x 4 elements.

    Args:
        steps: a name out of `STEPS` and two numbers each, which pick the operands among the inputs and what came last.
        outputs: numbers that pick what the graph returns, subtracted from the first input.
        returned: picks a tensor that is returned as it is.
    """

    steps: tuple[tuple[str, int, int], ...] = ()
    outputs: tuple[int, ...] = (0,)
    returned: int | None = None

    def build(self) -> fx.GraphModule:
        """The graph, with the values that Dynamo would have recorded."""
        pools = _Pools(fx.Graph())
        for name, first, second in self.steps:
            STEPS[name](pools, first, second)
        graph, x = pools.graph, pools.whole[0]
        returned = [graph.call_function(torch.sub, (x, pools.pick(i))) for i in self.outputs]
        if self.returned is not None:
            made = pools.whole[len(INPUTS) :] + pools.half or pools.whole
            returned.append(made[self.returned % len(made)])
        graph.output(tuple(returned))
        gm = fx.GraphModule(nn.Module(), graph)
        with FakeTensorMode():
            _Recording(gm).run(*(torch.empty(4, 4) for _ in INPUTS))
        return gm

    def inputs(self, seed: int) -> list[torch.Tensor]:
        """Inputs of one step: the first two change with the seed, the others do not."""
        drawn, fixed = torch.Generator().manual_seed(1 + seed), torch.Generator().manual_seed(0)
        return [torch.randn(4, 4, generator=drawn if i < 2 else fixed) for i in range(len(INPUTS))]


class _Pools:
    """The tensors of a graph so far, those of 4 x 4 elements and those of 2 x 4."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.whole = [graph.placeholder(name) for name in INPUTS]
        self.half: list[fx.Node] = []

    def pick(self, number: int) -> fx.Node:
        """A tensor of 4 x 4 elements, most often one of the last."""
        return _picked(self.whole, number)

    def pick_made(self, number: int) -> fx.Node:
        """One to update: inputs are, now and then."""
        made = self.whole[len(INPUTS) :]
        return _picked(made if made and number % 10 else self.whole, number)

    def pick_half(self, number: int) -> fx.Node:
        """A tensor of 2 x 4 elements."""
        if not self.half:
            self.half.append(self.call(operator.getitem, self.pick(number), slice(None, 2)))
        return _picked(self.half, number)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A node that calls a function."""
        return self.graph.call_function(function, args)

    def method(self, name: str, *args: Any) -> fx.Node:
        """A node that calls a method."""
        return self.graph.call_method(name, args)

    def halve(self, first: int, second: int) -> None:
        """Both halves of a tensor."""
        chunk = self.method("chunk", self.pick(first), 2)
        self.half += [self.call(operator.getitem, chunk, i) for i in range(2)]


def _picked(nodes: list[fx.Node], number: int) -> fx.Node:
    near = nodes[-6:] + nodes[2:6] + nodes[:1]
    return near[number % len(near)]


Step = Callable[[_Pools, int, int], Any]
_BINARY: dict[str, Step] = {
    function.__name__: lambda p, a, b, function=function: p.whole.append(p.call(function, p.pick(a), p.pick(b)))  # type: ignore[misc]
    for function in (torch.add, torch.mul, torch.matmul)
}
_UNARY: dict[str, Step] = {
    name: lambda p, a, b, name=name, args=args: p.whole.append(p.method(name, p.pick(a), *args))  # type: ignore[misc]
    for name, args in {
        **{"sin": (), "relu": (), "tanh": ()},
        **{"transpose": (0, 1), "detach": ()},  # views
        **{"contiguous": (), "to": (torch.float32,), "reshape": (4, 4)},  # the same tensor, or a copy
    }.items()
}
_UPDATES: dict[str, Step] = {
    "add_": lambda p, a, b: p.whole.append(p.method("add_", p.pick_made(a), p.pick(b))),
    "copy_": lambda p, a, b: p.whole.append(p.method("copy_", p.pick_made(a), p.pick(b))),
    "mul_": lambda p, a, b: p.whole.append(p.method("mul_", p.pick_made(a), 0.5)),
    "tanh_": lambda p, a, b: p.whole.append(p.method("tanh_", p.pick_made(a))),
    "mul_halves": lambda p, a, b: p.half.append(p.method("mul_", p.pick_half(a), p.pick_half(b))),
    "write": lambda p, a, b: p.call(operator.setitem, p.pick_made(a), slice(2, None), 1.0),
    "write_half": lambda p, a, b: p.call(operator.setitem, p.pick_made(a), slice(2, None), p.pick_half(b)),
}
STEPS: dict[str, Step] = {
    **_BINARY,
    **_UNARY,
    **_UPDATES,
    "chunk": _Pools.halve,
    "half": lambda p, a, b: p.half.append(p.call(operator.getitem, p.pick(a), slice(None, 2))),
    "cat": lambda p, a, b: p.whole.append(p.call(torch.cat, [p.pick_half(a), p.pick_half(b)])),
    "zeros": lambda p, a, b: p.whole.append(p.call(torch.zeros, (4, 4))),
    "dropout": lambda p, a, b: p.whole.append(p.call(torch.nn.functional.dropout, p.pick(a), 0.5, True)),
}
"""What a step of a `GraphSpec` may be."""


class _Recording(fx.Interpreter):
    """Records the value of each node."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]
