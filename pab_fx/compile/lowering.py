"""Lower a conditional graph, once for each set of decisions that occurs, and have it compiled.

specialize    the conditions are decided, what is dead is dropped: one graph for each set of reusing regions
cond          the conditions stay, as inputs: one graph
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .._torch import boxed, compiled_later, faked_for_compiler, size_hint, sizes_at, traced_shapes
from .._torch.dynamo import compile_lock
from .._torch.inductor import cached, conditions_let_go_of_operands, conditions_take_operands_as_they_lie
from ..graph.dataflow import value
from ..passes.compress import stored
from ..passes.cut import Cut
from ..passes.form import Conditional, Entering, Predicate, Scalar, Slot, all_conditionals, mark_of, slots_returned
from ..passes.order import Lowering, lowered
from ..passes.strides import stride_order
from .specs import TensorSpec

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""What an inner compiler is: `(gm, example_inputs) -> callable`."""


@dataclass(frozen=True)
class Expected:
    """What a captured graph keeps and returns in a call.

    Args:
        slots: for each module what its slots look like.
        outputs: for each output of the captured graph what it looks like, `None` for what is no tensor.
    """

    slots: tuple[tuple[TensorSpec, ...], ...]
    outputs: tuple[TensorSpec | None, ...]


@dataclass(frozen=True)
class Compiled:
    """A lowered graph and what the inner compiler made of it.

    Args:
        gm: the graph, flat; it takes the captured graph's inputs, then its marked ones.
        run: takes its inputs as a list, which it may empty, and returns its outputs.
        takes: the marks of its further inputs, in order.
        reads: per slot that it takes: (position among all inputs, module, number among the module's slots).
        writes: per module whose slots it returns: (module, position of each slot among the outputs); `None` for a slot
            that it leaves as it is.
        returns: how many outputs it has to have.
    """

    gm: fx.GraphModule
    run: Callable[[list[Any]], Sequence[Any]]
    takes: tuple[Predicate | Scalar | Slot | Entering, ...]
    reads: tuple[tuple[int, int, int], ...]
    writes: tuple[tuple[int, tuple[int | None, ...]], ...]
    returns: int


@contextlib.contextmanager
def _compiling(gm: fx.GraphModule) -> Iterator[None]:
    """Compile a graph so that its conditions neither hold on to their operands nor copy them, and caches take it."""
    with conditions_let_go_of_operands(), conditions_take_operands_as_they_lie(), cached(gm):
        yield


class Lowerings:
    """A conditional graph in all the ways it was lowered so far.

    Args:
        conditional: the captured graph with its conditions, from `insert_conditions`.
        parts: the captured graph in two, if there are signals; `conditional` is the rest then.
        compiler: compiles a lowered graph.
        lowering: how slots are laid out and held.

    Attributes:
        conditionals: its conditionals, by their index.
        modules: for each module, by its number, its conditionals, one per call.
        inputs: the inputs of the captured graph.
        outputs: how many outputs the captured graph has.
        rules: the rules whose signals are measured before it runs.
        takes_sigma: whether the noise level of the step is needed for that.
    """

    def __init__(self, conditional: fx.GraphModule, parts: Cut | None, compiler: Compiler, lowering: Lowering) -> None:
        self._parts = parts
        self.conditional, self._compiler, self._lowering = conditional, compiler, lowering
        self.conditionals = all_conditionals(conditional)
        of_module: dict[int, list[Conditional]] = {}
        for each in self.conditionals:
            of_module.setdefault(each.module, []).append(each)
        self.modules = tuple(map(tuple, of_module.values()))
        self.inputs = [n for n in conditional.graph.find_nodes(op="placeholder") if mark_of(n) is None]
        own: Any = conditional.graph.output_node().args[0]
        own = own[0] if self.conditionals else own
        self._returned = [value(node) if isinstance(node, fx.Node) else node for node in own]
        self.outputs = len(self._returned)
        self.rules = () if parts is None else parts.rules
        self.takes_sigma = parts is not None and parts.takes_sigma
        self._head: Callable[[list[Any]], Sequence[Any]] | None = None
        self._slots = self._looks()
        self._symbols = [
            (i, value(node)) for i, node in enumerate(self.inputs) if isinstance(value(node), torch.SymInt)
        ]
        self._expected: dict[tuple[int, ...], Expected] = {}
        self._compiled: dict[Any, Compiled] = {}

    def _looks(self) -> tuple[dict[Slot, torch.Tensor], ...]:
        """For each module what is held of its slots, by slot."""
        found: list[dict[Slot, torch.Tensor]] = [{} for _ in self.modules]
        dtype = self._lowering.cache_dtype
        for slot, node in slots_returned(self.conditional).items():
            parts = {"": value(node)} if dtype is None else stored(value(node), dtype)
            found[slot.module].update({Slot(slot.module, slot.index, part): each for part, each in parts.items()})
        return tuple(found)

    @property
    def graphs(self) -> dict[Any, fx.GraphModule]:
        """The graphs compiled so far, by their key."""
        return {key: compiled.gm for key, compiled in self._compiled.items()}

    @property
    def slot_bytes(self) -> tuple[tuple[int, ...], ...]:
        """Bytes of each slot of each module when it is held, at the sizes that were captured."""
        return tuple(tuple(map(_size, slots.values())) for slots in self._slots)

    @property
    def signal_bytes(self) -> tuple[int, ...]:
        """Bytes of each signal when it is held, at the sizes that were captured."""
        return tuple(map(_size, self._signals))

    @property
    def _signals(self) -> list[Any]:
        """What was recorded of each signal."""
        if self._parts is None:
            return []
        nows: Any = self._parts.head.graph.output_node().args[0]
        return [value(node) for node in nows[len(self.rules) : 2 * len(self.rules)]]

    @property
    def head(self) -> fx.GraphModule | None:
        """What measures the signals, `None` if there are none."""
        return None if self._parts is None else self._parts.head

    def compiled(self, key: Any) -> Compiled:
        """The compiled graph for a key: whether each conditional reuses, or "cond"; compiled when it is first needed.

        It is compiled for what was recorded. Real inputs beside the recorded slots would not do: outside of Dynamo's
        call, AOTAutograd takes the sizes of those for symbols, though Dynamo has a graph of these sizes only.
        """
        if key not in self._compiled:
            with compile_lock():  # as Dynamo holds it; another thread may have compiled the graph meanwhile
                if key not in self._compiled:
                    self._compiled[key] = self._compiled_later(lowered(self.conditional, key, self._lowering))
        return self._compiled[key]

    def _compiled_later(self, gm: fx.GraphModule) -> Compiled:
        """A graph compiled outside of Dynamo's call."""
        with traced_shapes(gm) as inputs, _compiling(gm):
            return self._with_state(gm, compiled_later(self._compiler, gm, inputs))

    def compile_as_captured(self, key: Any, example_inputs: Sequence[Any]) -> None:
        """Compile the graph for a key inside of Dynamo's call."""
        gm = lowered(self.conditional, key, self._lowering)
        with _compiling(gm):
            self._compiled[key] = self._with_state(gm, self._compiler(gm, self._examples(gm, example_inputs)))
        if self._parts is not None:
            head = self._parts.head
            with _compiling(head):
                self._head = boxed(self._compiler(head, self._examples(head, example_inputs)))

    def _examples(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
        """What a graph is compiled for inside of Dynamo's call: the captured graph's inputs, and fake further ones."""
        further = [value(node) for node in gm.graph.find_nodes(op="placeholder")[len(example_inputs) :]]
        return [*example_inputs, *(further if self._symbols else map(faked_for_compiler, further))]

    def measured(
        self, args: Sequence[Any], before: Sequence[torch.Tensor], further: Sequence[torch.Tensor]
    ) -> tuple[Any, Any, Any]:
        """Measure signals: for each rule the number, and the signal now; and what the conditional graph takes further.

        Args:
            args: the captured graph's inputs.
            before: for each rule its signal in an earlier step.
            further: for each rule that goes by a rate, that; and the noise level, if it is needed.
        """
        if self._head is None:
            assert self._parts is not None
            with compile_lock(), traced_shapes(self._parts.head) as inputs, _compiling(self._parts.head):
                self._head = self._head or boxed(compiled_later(self._compiler, self._parts.head, inputs))
        found, of = self._head([*args, *before, *further]), len(self.rules)
        return found[:of], found[of : 2 * of], found[2 * of :]

    def signal_specs(self, args: Sequence[Any]) -> tuple[TensorSpec, ...]:
        """What the signals look like in a call with these inputs."""
        known = [(symbol, args[i]) for i, symbol in self._symbols]
        return tuple(_spec(each, known) for each in self._signals)

    def expected(self, args: Sequence[Any]) -> Expected:
        """What a call with inputs of these sizes keeps and returns; the same object for the same sizes."""
        sizes = tuple([args[i] for i, _ in self._symbols])
        if sizes not in self._expected:
            known = [(symbol, size) for (_, symbol), size in zip(self._symbols, sizes, strict=True)]
            self._expected[sizes] = Expected(
                tuple(tuple(_spec(each, known) for each in slots.values()) for slots in self._slots),
                tuple(_spec(each, known) if isinstance(each, torch.Tensor) else None for each in self._returned),
            )
        return self._expected[sizes]

    def _with_state(self, gm: fx.GraphModule, run: Callable[..., Any]) -> Compiled:
        """A compiled graph, with the state that it takes and returns."""
        takes = tuple(mark for node in gm.graph.find_nodes(op="placeholder") if (mark := mark_of(node)) is not None)
        own, numbers = len(self.inputs), [list(slots) for slots in self._slots]
        reads = [
            (own + p, mark.module, numbers[mark.module].index(mark))
            for p, mark in enumerate(takes)
            if isinstance(mark, Slot)
        ]
        output_of = {slot: self.outputs + i for i, slot in enumerate(mark_of(gm.graph.output_node()) or ())}
        writes = [
            (m, tuple(output_of.get(slot) for slot in slots))
            for m, slots in enumerate(numbers)
            if any(slot in output_of for slot in slots)
        ]
        return Compiled(gm, boxed(run), takes, tuple(reads), tuple(writes), self.outputs + len(output_of))


def _size(recorded: torch.Tensor) -> int:
    return math.prod(map(size_hint, recorded.shape)) * recorded.dtype.itemsize


def _spec(recorded: torch.Tensor, known: Sequence[tuple[torch.SymInt, int]]) -> TensorSpec:
    return TensorSpec(sizes_at(recorded.shape, known), recorded.dtype, recorded.device, stride_order(recorded))
