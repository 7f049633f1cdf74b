"""Lower a rewritten graph, once for each set of decisions that occurs, and have it compiled.

    specialize    the conditions are decided, what is dead is dropped: one graph for each set of reusing regions
    cond          the conditions stay, as inputs: one graph

Either way the state is lifted out (see `lift`): caches come in as inputs and leave as outputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .._torch import (
    boxed,
    compiled_later,
    conditions_let_go_of_operands,
    conditions_take_operands_as_they_lie,
    declare_static,
    faked_for_compiler,
    keep_sources,
    size_hint,
    sizes_at,
    traced_shapes,
)
from ..graph.dataflow import value
from ..passes.compress import compressed, stored
from ..passes.lift import Lifted, fix_cache_strides, fix_operand_strides, lift, stride_order
from ..passes.rewrite import Conditional, conditionals, copy_of
from ..passes.specialize import decide
from ..run.state import TensorSpec

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""What an inner compiler is: `(gm, example_inputs) -> callable`."""


@dataclass(frozen=True)
class Expected:
    """What a captured graph keeps and returns in a call.

    Args:
        caches: of each module what its caches look like.
        outputs: of each output of the captured graph what it looks like, `None` for what is no tensor.
    """

    caches: tuple[tuple[TensorSpec, ...], ...]
    outputs: tuple[TensorSpec | None, ...]


@dataclass(frozen=True)
class Compiled:
    """A lowered graph and what the inner compiler made of it.

    Args:
        lifted: the graph.
        run: takes its inputs as a list, which it may empty, and returns its outputs.
        reads: of each cache it takes, the module's number and the cache's among that module's.
        writes: of each module whose caches it returns, the module's number and their positions among the outputs;
            `None` for a cache that it leaves as it is.
        returns: how many outputs it has to have.
    """

    lifted: Lifted
    run: Callable[[list[Any]], Sequence[Any]]
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, tuple[int | None, ...]], ...]
    returns: int


@contextlib.contextmanager
def _conditions() -> Iterator[None]:
    """Compile conditions so that they neither hold on to their operands nor copy them."""
    with conditions_let_go_of_operands(), conditions_take_operands_as_they_lie():
        yield


class Lowerings:
    """A rewritten graph in all the ways it was lowered so far.

    Args:
        rewritten: the captured graph with its conditionals, from `insert_conditions(..., allocate=False)`.
        compiler: compiles a lowered graph.
        fix_strides: hold caches and operands of conditions to one layout, as a compiler needs that is free to choose.
        cache_dtype: what caches are kept in, `None` for what they are computed in.
        static_caches: whether caches have a fixed address.
    """

    def __init__(
        self,
        rewritten: fx.GraphModule,
        compiler: Compiler,
        fix_strides: bool,
        cache_dtype: torch.dtype | None = None,
        static_caches: bool = False,
    ) -> None:
        self.rewritten, self._compiler, self._fix_strides = rewritten, compiler, fix_strides
        self._cache_dtype, self._static_caches = cache_dtype, static_caches
        found = conditionals(rewritten)
        self.conditionals = tuple(found.values())
        of_module: dict[str, list[Conditional]] = {}
        for conditional in self.conditionals:
            of_module.setdefault(conditional.module_id, []).append(conditional)
        self.modules = tuple(map(tuple, of_module.values()))
        self.inputs = rewritten.graph.find_nodes(op="placeholder")
        self._returned = [value(node) if isinstance(node, fx.Node) else node for node in _returned(rewritten)]
        self.outputs = len(self._returned)
        outputs, self._recorded = _recorded_outputs(found), {}
        names: list[tuple[str, ...]] = []
        for calls in self.modules:
            kept = {name: outputs[name] for name in calls[0].caches}
            if cache_dtype is not None:
                kept = {n: each for name, whole in kept.items() for n, each in stored(name, whole, cache_dtype).items()}
            self._recorded.update(kept)
            names.append(tuple(kept))
        self._caches = tuple(names)
        self._symbols = [
            (i, value(node)) for i, node in enumerate(self.inputs) if isinstance(value(node), torch.SymInt)
        ]
        self._expected: dict[tuple[int, ...], Expected] = {}
        self._compiled: dict[Any, Compiled] = {}

    @property
    def graphs(self) -> dict[Any, Lifted]:
        """The graphs compiled so far, by their key."""
        return {key: compiled.lifted for key, compiled in self._compiled.items()}

    @property
    def cache_bytes(self) -> tuple[int, ...]:
        """Bytes that the caches of each module hold when kept, at the sizes that were captured."""
        return tuple(sum(_size(self._recorded[name]) for name in names) for names in self._caches)

    def lowered(self, key: Any) -> Lifted:
        """The graph lowered for a key: whether each conditional reuses, or "cond"."""
        gm = copy_of(self.rewritten)
        lifted = lift(gm if key == "cond" else decide(gm, dict(enumerate(key))))
        if self._fix_strides:
            fix_cache_strides(lifted)
        if self._cache_dtype is not None:
            lifted = compressed(lifted, self._cache_dtype)
        if self._fix_strides:
            fix_operand_strides(gm)
        keep_sources(self.rewritten, gm)  # of the inputs that it has now
        if self._static_caches:
            for node in gm.graph.find_nodes(op="placeholder"):
                if node.target in lifted.reads or str(node.target).startswith("pab_invariant_"):
                    declare_static(node)
        return lifted

    def compiled(self, key: Any) -> Compiled:
        """The compiled graph for a key, as for `lowered`; compiled when it is first needed, for what was recorded.

        Real inputs beside the recorded caches would not do: outside of Dynamo's call, AOTAutograd takes the sizes of
        those for symbols, though Dynamo has a graph of these sizes only.
        """
        if key not in self._compiled:
            lifted = self.lowered(key)
            with traced_shapes(lifted.gm) as inputs, _conditions():
                self._compiled[key] = self._with_caches(lifted, compiled_later(self._compiler, lifted.gm, inputs))
        return self._compiled[key]

    def compile_as_captured(self, key: Any, example_inputs: Sequence[Any]) -> None:
        """Compile the graph for a key inside of Dynamo's call."""
        lifted = self.lowered(key)
        further = [value(node) for node in lifted.gm.graph.find_nodes(op="placeholder")[len(example_inputs) :]]
        if not self._symbols:
            further = [faked_for_compiler(each) for each in further]
        with _conditions():
            self._compiled[key] = self._with_caches(lifted, self._compiler(lifted.gm, [*example_inputs, *further]))

    def expected(self, args: Sequence[Any]) -> Expected:
        """What a call with inputs of these sizes keeps and returns; the same object for the same sizes."""
        sizes = tuple([args[i] for i, _ in self._symbols])
        if sizes not in self._expected:
            known = [(symbol, size) for (_, symbol), size in zip(self._symbols, sizes, strict=True)]
            self._expected[sizes] = Expected(
                tuple(tuple(_spec(self._recorded[name], known) for name in names) for names in self._caches),
                tuple(_spec(each, known) if isinstance(each, torch.Tensor) else None for each in self._returned),
            )
        return self._expected[sizes]

    def _with_caches(self, lifted: Lifted, run: Callable[..., Any]) -> Compiled:
        """A compiled graph, with whose caches it takes and returns."""
        place = {name: (m, i) for m, names in enumerate(self._caches) for i, name in enumerate(names)}
        output_of = {name: self.outputs + i for i, name in enumerate(lifted.writes)}
        writes = [
            (m, tuple(output_of.get(name) for name in names))
            for m, names in enumerate(self._caches)
            if any(name in output_of for name in names)
        ]
        reads, returns = tuple(place[name] for name in lifted.reads), self.outputs + len(lifted.writes)
        return Compiled(lifted, boxed(run), reads, tuple(writes), returns)


def _size(recorded: torch.Tensor) -> int:
    return math.prod(map(size_hint, recorded.shape)) * recorded.dtype.itemsize


def _spec(recorded: torch.Tensor, known: Sequence[tuple[torch.SymInt, int]]) -> TensorSpec:
    return TensorSpec(sizes_at(recorded.shape, known), recorded.dtype, recorded.device, stride_order(recorded))


def _returned(gm: fx.GraphModule) -> Sequence[Any]:
    return gm.graph.output_node().args[0]  # type: ignore[return-value]


def _recorded_outputs(found: dict[fx.Node, Conditional]) -> dict[str, torch.Tensor]:
    """The fake tensor recorded for what each cache holds."""
    recorded: dict[str, torch.Tensor] = {}
    for cond, conditional in found.items():
        for item in cond.users:
            recorded[conditional.caches[item.args[1]]] = value(item)  # type: ignore[index]
    return recorded
