"""Whose state a call reads and writes: how a graph tells the instances of its modules apart.

What tells them apart is a parameter among the graph's inputs: its identity names the module. A module whose part of the
graph reads no parameter is told by the innermost module on the Python stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .._torch.dynamo import calling_modules
from ..graph.dataflow import STATE
from ..passes.form import Conditional


@dataclass(frozen=True)
class Anchor:
    """How a call tells which instance of a module it runs.

    Args:
        positions: positions of the module's parameters among the inputs; none if its part of the graph reads none, and
            the instance is the innermost module on the Python stack.
        occurrence: tells modules of one graph apart that share all their parameters.
        module_id: the module's in the captured graph.
    """

    positions: tuple[int, ...]
    occurrence: int
    module_id: str


def anchors(
    nodes_of: Mapping[str, Sequence[fx.Node]], inputs: Sequence[fx.Node], example_inputs: Sequence[Any]
) -> tuple[Anchor, ...]:
    """For each module, by its id, the parameters that its nodes read among the graph's inputs."""
    position = {node: i for i, node in enumerate(inputs)}
    taken: Counter[tuple[int, ...]] = Counter()
    found = []
    for module_id, nodes in nodes_of.items():
        read = {position[source] for node in nodes for source in node.all_input_nodes if source in position}
        own = tuple(sorted(i for i in read if isinstance(example_inputs[i], nn.Parameter) or STATE in inputs[i].meta))
        found.append(Anchor(own, taken[own], module_id))
        taken[own] += 1
    return tuple(found)


def instance_of(anchor: Anchor, conditional: Conditional) -> Hashable:
    """Tells the instance of a module that runs now from others that have its parameters."""
    caller = next(iter(calling_modules()), None)
    if conditional.relative is None or caller is None:
        # Dynamo's id of a module is Python's
        module_id = anchor.module_id.partition("@")[0]
        return (int(module_id), "") if module_id.isdigit() else conditional.name
    path, _, node = conditional.relative.partition(":")
    try:
        return id(caller.get_submodule(path)), node
    except AttributeError:
        return id(caller), conditional.relative
