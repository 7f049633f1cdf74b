"""One model as a graph, from each of the three tracers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

TRACERS = ("symbolic_trace", "export", "dynamo")


def traced(model: nn.Module, tracer: str, inputs: Sequence[Any] = (), **kwargs: Any) -> fx.GraphModule:
    """The graph of a model, without gradients.

    Args:
        model: is not changed; the graph shares its parameters.
        tracer: "symbolic_trace", which knows no shapes; "export", the module of `torch.export.export`; "dynamo", what
            `torch.compile` hands to a backend, whose inputs are the parameters too.
        inputs: positional arguments of the model; `symbolic_trace` needs none.
        kwargs: keyword arguments.

    Raises:
        ValueError: for another tracer, or if Dynamo makes several graphs of the model.

    Example:
        >>> [node.op for node in traced(torch.nn.ReLU(), "export", (torch.ones(2),)).graph.nodes][-2:]
        ['call_function', 'output']
    """
    with torch.no_grad():
        if tracer == "symbolic_trace":
            return fx.symbolic_trace(model)
        if tracer == "export":
            return torch.export.export(model, tuple(inputs), kwargs).module()  # type: ignore[return-value]
        if tracer == "dynamo":
            return captured(model, inputs, kwargs)[0]
    raise ValueError(f"tracer={tracer!r} is unknown; it is one of {', '.join(map(repr, TRACERS))}.")


def captured(
    model: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any] | None = None, dynamic: bool | None = None
) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and the inputs that it runs it with: parameters, then what is given.

    Raises:
        ValueError: if the graph of the model breaks.

    Example:
        >>> gm, inputs = captured(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
        >>> [tuple(each.shape) for each in inputs], gm(*inputs)[0].shape
        ([(3, 2), (3,), (1, 2)], torch.Size([1, 3]))
    """
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append((gm, list(args)))
            return gm(*args)

        return run

    torch.compiler.reset()  # else code that was compiled for an equal model may run
    torch.compile(model, backend=backend, dynamic=dynamic)(*inputs, **(kwargs or {}))
    if len(found) != 1:
        raise ValueError(f"the graph of {type(model).__name__} breaks: Dynamo makes {len(found)} graphs of it.")
    return found[0]
