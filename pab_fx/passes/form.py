"""The functional form of a conditional graph: what its further inputs and outputs are, as typed marks on the nodes.

    def forward(x, compute_0, slot_0_0):                # inputs of the graph; then predicates, scalars and slots
        cond = torch.cond(compute_0, compute, read, (slot_0_0, x))
        out = cond[0]
        return ((x + out,), out)                        # what the graph returned; then what is in the slots now

Nothing is hidden: state comes in and goes out. A mark stands in a node's meta under `MARK`, and survives copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.dataflow import value
from ..policy.policy import Policy
from ..select.region import Assign

MARK = "pab_fx"
"""Key in a node's meta: of an input its mark, of a `cond` its `Conditional`, of the output the slots it returns."""


COPY = "copy"
"""Mark of a clone that only the branches of a `cond` need, whose results alias nothing."""


@dataclass(frozen=True)
class Slot:
    """An input that holds what is kept, and an output that is kept.

    Args:
        module: number of the module among those of the graph that are broadcast.
        index: number of the slot among the module's.
        part: what of it that is, where a slot is held in several tensors: "" or "scale".
    """

    module: int
    index: int
    part: str = ""


@dataclass(frozen=True)
class Predicate:
    """An input that says whether a conditional computes: a bool on the CPU.

    Args:
        conditional: its index.
    """

    conditional: int


@dataclass(frozen=True)
class Scalar:
    """An input that is one of the `Scalars` of a how.

    Args:
        conditional: index of the conditional that reads it.
        name: which of them, "distance", "filled" or "weight".
    """

    conditional: int
    name: str


def noise_level(like: torch.Tensor) -> torch.Tensor:
    """Stands for the noise level of a step until something tells it: an input of the head, or the timestep.

    Raises:
        RuntimeError: if it is run.
    """
    raise RuntimeError("the noise level of a step is told from outside of a graph.")


@dataclass(frozen=True)
class Entering:
    """An input that is what entered a range of blocks in this step, where another graph holds its beginning.

    Args:
        conditional: index of the conditional that ends the range.
        stream: number of the stream, as it enters this graph.
    """

    conditional: int
    stream: int


@dataclass(frozen=True)
class Conditional:
    """What a `cond` node broadcasts.

    Args:
        index: number of the conditional in the graph.
        name: qualified name of the part.
        label: the name with the number of its call in the graph, "attn#1" for the second one.
        module: number of its module, whose calls share counter and slots; see `tag`.
        role: its role.
        policy: when it reuses and how.
        call: which of the module's calls in this graph it is.
        calls: how often the graph calls the module.
        outputs: how many outputs it has; they are its first items.
        slots: the slots that it reads and writes.
        items: for each slot, the item that is in it afterwards.
        remembers: whether it reads its slots also where it computes.
        assign: role, policy and reason for a qualified name, where several blocks run this graph.
        relative: the name within such a block, `None` where the graph is the model's own.
        outer: index of the conditional in whose computing branch it lies, `None` for one that lies in none.
    """

    index: int
    name: str
    label: str
    module: int
    role: str
    policy: Policy
    call: int
    calls: int
    outputs: int
    slots: tuple[Slot, ...]
    items: tuple[int, ...]
    remembers: bool = False
    assign: Assign | None = None
    relative: str | None = None
    outer: int | None = None


def mark_of(node: fx.Node) -> Any:
    """What a node is marked with, `None` if it has no mark."""
    return node.meta.get(MARK)


def inputs_of(gm: fx.GraphModule, kind: type) -> dict[Any, fx.Node]:
    """The inputs that are marked with that kind, by their marks, in order."""
    return {mark: node for node in gm.graph.find_nodes(op="placeholder") if isinstance(mark := mark_of(node), kind)}


def conditionals(gm: fx.GraphModule) -> dict[fx.Node, Conditional]:
    """The conditional nodes of a graph, in graph order; those in its branches are not among them."""
    return {node: mark for node in gm.graph.nodes if isinstance(mark := mark_of(node), Conditional)}


def with_branches(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph, and the computing branches of its conditionals, which may hold further ones, and so on."""
    yield gm
    for cond in conditionals(gm):
        yield from with_branches(branches_of(gm, cond)[0])


def all_conditionals(gm: fx.GraphModule) -> tuple[Conditional, ...]:
    """The conditionals of a graph and of its branches, by their index."""
    # a module whose first node a pass has moved up has an earlier number than its place in the graph
    found = (conditional for each in with_branches(gm) for conditional in conditionals(each).values())
    return tuple(sorted(found, key=lambda each: each.index))


def operands_of(cond: fx.Node) -> tuple[Any, ...]:
    """What a `cond` node hands to its branches: slots and scalars first, then what the computing one reads."""
    return cond.args[3]  # type: ignore[return-value]


def branches_of(gm: fx.GraphModule, cond: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The branch of a `cond` node that computes and the one that reads."""
    compute, read = (gm.get_submodule(str(branch.target)) for branch in cond.args[1:3])  # type: ignore[union-attr]
    return compute, read  # type: ignore[return-value]


def slots_returned(gm: fx.GraphModule) -> dict[Slot, fx.Node]:
    """What is in the slots when a graph in functional form has run, for the slots that it returns."""
    output = gm.graph.output_node()
    marks = mark_of(output) or ()
    returned: Any = output.args[0]
    return dict(zip(marks, returned[len(returned) - len(marks) :], strict=True))


def set_slots_returned(gm: fx.GraphModule, slots: dict[Slot, fx.Node]) -> None:
    """Let a graph return these slots after what it returns itself."""
    output = gm.graph.output_node()
    returned: Any = output.args[0]
    own = returned[: len(returned) - len(mark_of(output) or ())]
    output.args = ((*own, *slots.values()),)
    output.meta[MARK] = tuple(slots)


def add_input(gm: fx.GraphModule, name: str, mark: Any, recorded: Any) -> fx.Node:
    """Give a graph a further input, behind the others."""
    inputs = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(inputs[-1].next if inputs else next(iter(gm.graph.nodes))):
        node = gm.graph.placeholder(name)
    node.meta = {MARK: mark} if recorded is None else {MARK: mark, "example_value": recorded}
    return node


def fake_like(recorded: Any, made: torch.Tensor) -> torch.Tensor:
    """A small tensor as one of the mode in which a recorded value is fake."""
    mode = getattr(recorded, "fake_mode", None)
    return made if mode is None else mode.from_tensor(made, static_shapes=True)


def device_of(node: fx.Node) -> torch.device:
    """The device of a node's recorded tensor; the CPU where nothing was recorded."""
    recorded = value(node)
    return recorded.device if isinstance(recorded, torch.Tensor) else torch.device("cpu")
