"""Run a rewritten graph: find whose state a call reads and writes, decide it, hold the caches, pick the graph."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .._torch import calling_argument, calling_modules
from ..compile.lowering import Compiled, Expected
from ..diffusers import hooks as _diffusers
from ..graph.dataflow import STATE
from ..graph.modules import joined
from ..passes.lift import Lifted
from ..passes.predicates import TIMESTEP_NAMES, timestep_name
from ..policy.when import END, AfterTimesteps, Rule, SkipRange
from .clock import Step, as_number, current_step, request_of, running_pipeline, timestep_from
from .generation import Kept, Variants
from .holding import Static, addresses, at_one_address
from .lockstep import Call, Decision, Lockstep
from .running import name_of_caller
from .state import Cell, StateStore, TensorSpec

if TYPE_CHECKING:
    from ..backend import PABBackend


COMPUTE, REUSE = torch.tensor(True), torch.tensor(False)
"""Predicates of conditions; made here, since a graph may be compiled inside of a mode that makes fake tensors."""


@dataclass(frozen=True)
class Anchor:
    """How a call tells which instance of a module it runs: a parameter among the graph's inputs.

    Args:
        positions: positions of the module's parameters among the inputs; none if its part of the graph reads
            none, and the instance is the innermost module on the Python stack.
        occurrence: tells modules of one graph apart that share all their parameters.
    """

    positions: tuple[int, ...]
    occurrence: int


@dataclass(frozen=True)
class Plan:
    """What a call does once it is decided.

    Args:
        compiled: the graph that it runs.
        predicates: the graph's conditions, in the order of its inputs.
        reads: of each cache that the graph reads, its position among those it takes, its cell and its number in that.
        drops: cells whose caches are not kept on, or are to be replaced.
        writes: of each module whose caches are to be kept, its cell, its number and their positions among the outputs;
            `None` for one that stays.
        takes: what the graph takes after its own inputs: its conditions, and caches, of which those that it reads
            are yet to be filled in; by the identity of what caches are expected to look like.
    """

    compiled: Compiled
    predicates: tuple[torch.Tensor, ...]
    reads: tuple[tuple[int, Cell, int], ...]
    drops: tuple[Cell, ...]
    writes: tuple[tuple[Cell, int, tuple[int | None, ...]], ...]
    takes: dict[int, list[torch.Tensor | None]] = field(default_factory=dict)


class BroadcastGraph:
    """A compiled graph that broadcasts; called by Dynamo in place of the graph it was made from.

    Args:
        backend: owner of the state.
        variants: makes lowerings of the captured graph, and what is computed once a generation.
        unchanging: positions of the inputs that are likely the same in each step; `None` if nothing is to be
            computed once.
        anchors: for each `module_id` of the conditionals, how to tell its instances apart.
        is_model: whether the graph is of the outermost model's own frame. In a block's, an input called
            timestep may be an embedding of it.

    Attributes:
        runs: how often the graph was called.
        overwrites: where the outputs of its last call lie, if its next one overwrites them.
        instances: by qualified name, role and rule of each module that it has run, by the module's number in the graph.
    """

    def __init__(
        self,
        backend: PABBackend,
        variants: Variants,
        unchanging: frozenset[int] | None,
        anchors: Mapping[str, Anchor],
        example_inputs: Sequence[Any],
        is_model: bool,
    ) -> None:
        self.backend, self._variants = backend, variants
        self._has_erred = False
        self.runs = 0
        self.overwrites: frozenset[int] = frozenset()
        self.instances: dict[int, dict[str, tuple[str, Rule | None]]] = {}
        self._use(unchanging)
        self.anchors = tuple(anchors[calls[0].module_id] for calls in self.lowerings.modules)
        self._owners = tuple(anchor.positions[0] for anchor in self.anchors if anchor.positions)
        self._calls = tuple(map(len, self.lowerings.modules))
        self._timestep_input = _timestep_input(self.lowerings.inputs) if is_model else None
        # inside of Dynamo's call, the graph that the first step runs
        self.lowerings.compile_as_captured(self._key((False,) * len(self.lowerings.conditionals)), example_inputs)

    def _use(self, unchanging: frozenset[int] | None) -> None:
        """Run the variant of the graph for inputs that stay the same."""
        self._unchanging = unchanging
        variant = self._variants.variant(unchanging)
        self.lowerings = variant.lowerings
        self.once = None if variant.split is None else self._variants.once(variant.split)

    def __call__(self, *args: Any) -> Any:
        backend, step = self.backend, current_step.get() or self._step_of_its_own()
        backend.calls += 1
        self.runs += 1
        t = self._timestep(args) if step.t is None else step.t
        call = Call(t, step.next_t, step.timesteps or backend.known_timesteps(), step.generation)
        modules, expected = self._modules(args, step), self.lowerings.expected(args)
        before = modules.first.count
        modules.begin(call, expected.caches)
        is_first = modules.first.count.n == 0
        backend.seen.see(t, call.timesteps, is_first)
        if is_first:
            self._warn_of_schedule(t, call.timesteps, {cell.rule for cell in modules.cells})
        try:
            if self.once is not None:
                args = (*args, *self._computed_once(args, step, is_first))
                expected = self.lowerings.expected(args)  # of another variant, if the guess was wrong
            decisions = modules.advance(call)
            for decision in decisions:
                decision.record(backend.counts)
            if call.generation is None and before.n > 0 and before.t == t:
                self._warn_of_second_call(t, decisions)
            outputs = self._run(args, self._plan(modules, decisions), expected)
        except BaseException:
            modules.reset()
            raise
        if backend.has_cuda_graphs:
            self.overwrites = addresses(outputs)
        return outputs

    # ------------------------------------------------------------------------------------ one call

    def _run(self, args: Sequence[Any], plan: Plan, expected: Expected) -> Any:
        """Run a graph on what the cells keep, and keep what it leaves.

        What a step replaces, or is the last to read, is let go before: by the cells here, by the compiled graph as soon
        as it has read it.
        """
        takes = plan.takes.get(id(expected))
        is_new = takes is None
        if takes is None:
            reads = {position for position, _, _ in plan.reads}
            takes = plan.takes[id(expected)] = [
                *plan.predicates,
                *(
                    None if p in reads else self.backend.unread(expected.caches[m][i])
                    for p, (m, i) in enumerate(plan.compiled.reads)
                ),
            ]
        holder = self.backend.holder
        inputs, first = [*args, *takes], len(args) + len(plan.predicates)
        for position, cell, i in plan.reads:
            inputs[first + position] = self._kept(cell, i)
        for cell in plan.drops:
            cell.caches = None
        outputs = plan.compiled.run(inputs)
        _check(outputs, plan.compiled.returns, expected.outputs)
        if is_new:
            _check_caches(outputs, plan, expected.caches)
        for cell, m, positions in plan.writes:
            written = tuple([outputs[i] if i is not None else self._kept(cell, c) for c, i in enumerate(positions)])
            cell.caches, cell.specs = written if holder is None else holder.hold(cell, written), expected.caches[m]
        return outputs[: self.lowerings.outputs]

    def _kept(self, cell: Cell, i: int) -> torch.Tensor:
        kept = cell.caches[i]  # type: ignore[index]
        return kept if self.backend.holder is None else self.backend.holder.lend(kept)

    def _plan(self, modules: Lockstep, decisions: Sequence[Decision]) -> Plan:
        """What decisions come to; found once for equal ones."""
        key = (self.lowerings, *[(decision.reuses, decision.keeps) for decision in decisions])
        if key not in modules.plans:
            modules.plans[key] = self._planned(modules, decisions)
        return modules.plans[key]

    def warmup(self, timesteps: Sequence[float]) -> None:
        """Compile every graph that a generation with these timesteps needs, for inputs like those captured."""
        modules = Lockstep([Cell(calls[0].role, calls[0].rule) for calls in self.lowerings.modules], self._calls, ())
        for t, next_t in zip(timesteps, (*timesteps[1:], END), strict=True):
            decisions = modules.advance(Call(t, next_t, timesteps, None))
            self.lowerings.compiled(self._key(self._reuses(decisions)))
            for decision in decisions:
                for cell in decision.group.cells:
                    cell.caches = () if decision.keeps else None

    def _reuses(self, decisions: Sequence[Decision]) -> tuple[bool, ...]:
        """For each conditional whether it reuses."""
        reuses = [False] * len(self.lowerings.conditionals)
        for decision in decisions:
            for m in decision.group.modules:
                for conditional, reuse in zip(self.lowerings.modules[m], decision.reuses, strict=True):
                    reuses[conditional.index] = reuse
        return tuple(reuses)

    def _key(self, reuses: tuple[bool, ...]) -> Any:
        return "cond" if self.backend.lowering == "cond" else reuses

    def _planned(self, modules: Lockstep, decisions: Sequence[Decision]) -> Plan:
        cells, reuses = modules.cells, self._reuses(decisions)
        compiled = self.lowerings.compiled(self._key(reuses))
        of_module = {m: decision for decision in decisions for m in decision.group.modules}
        written = {m: positions for m, positions in compiled.writes if of_module[m].keeps}
        # a cache that stays is neither let go nor written; of a module that has one, none is let go before
        stays = {m for m, each in of_module.items() if each.keeps and None in written.get(m, (None,))}
        return Plan(
            compiled,
            tuple(REUSE if reuses[i] else COMPUTE for i in compiled.lifted.predicates),
            tuple((p, cells[m], i) for p, (m, i) in enumerate(compiled.reads) if of_module[m].reuses[0]),
            tuple(cell for m, cell in enumerate(cells) if m not in stays),
            tuple((cells[m], m, positions) for m, positions in written.items()),
        )

    def _computed_once(self, args: Sequence[Any], step: Step, is_first: bool) -> tuple[torch.Tensor, ...]:
        """What the graph computes once a generation; anew where it reads others than before.

        Weights may be other ones in each generation: merged adapters leave no trace in a parameter's version.
        """
        store = self.backend.store(step.request)
        of_contexts = store.kept.setdefault(self, {})
        context = (_diffusers.current_cache_context.get(), step.branch)
        kept: Kept | None = None if is_first else of_contexts.get(context)
        outdated = [] if kept is None else kept.outdated(args)
        assert self.once is not None
        if outdated and self._unchanging and not self._unchanging.isdisjoint(outdated):
            # the guess was wrong: once, the inputs that changed are left out, and then all of them
            self._use(frozenset() if self._has_erred else self._unchanging - set(outdated))
            self._has_erred, kept = True, None
            of_contexts.clear()
        if self.once is None:
            return ()
        if kept is None or outdated:
            kept = of_contexts[context] = Kept(self.once, args, partial(self._placed, store, context))
            self.backend.computed_once += 1
        else:
            self.backend.taken_as_kept += 1
        return kept.tensors

    def _placed(
        self, store: StateStore, context: Hashable, tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """What is computed once, where it was computed; for CUDA graphs at one address for a request and context."""
        if not isinstance(self.backend.holder, Static):
            return tuple(tensors)
        of_contexts = store.buffers.setdefault(self, {})
        of_contexts[context] = at_one_address(of_contexts.get(context), tensors)
        return of_contexts[context]  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------ what a call is

    def _step_of_its_own(self) -> Step:
        """The step of a model that is not enabled, only compiled: it has no more than a request."""
        pipeline = running_pipeline()
        if pipeline is not None:
            self.backend.clock(pipeline)  # so that the backend heeds the end of the pipeline's call
        return Step(request_of(pipeline))

    def _modules(self, args: Sequence[Any], step: Step) -> Lockstep:
        """The modules that a call runs, with their cells in its request and cache context."""
        store, context = self.backend.store(step.request), (_diffusers.current_cache_context.get(), step.branch)
        known = store.found.setdefault(self, {})
        found: Lockstep | None = known.get(context)
        if found is None or any(owner() is not args[i] for owner, i in zip(found.owners, self._owners, strict=True)):
            # where more than the owners tell the modules apart, they are found anew in every call
            by_owner = len(self._owners) == len(self.anchors) and not any(
                args[i] in self.backend.tied for i in self._owners
            )
            owners = [weakref.ref(args[i], lambda _: known.pop(context, None)) for i in self._owners]
            found = Lockstep(self._cells(args, store, context), self._calls, owners)
            if by_owner:
                known[context] = found
        return found

    def _cells(self, args: Sequence[Any], store: StateStore, context: Hashable) -> list[Cell]:
        caller: Any = None
        cells = []
        for m, anchor in enumerate(self.anchors):
            if not anchor.positions and caller is None:
                caller = next(iter(calling_modules()), self)
            owner, *others = [args[i] for i in anchor.positions] or [caller]
            key: tuple[Hashable, ...] = (anchor.occurrence, *map(id, others))
            if owner in self.backend.tied:
                key = (*key, self._instance(m))
            cell = store.find(owner, key, context)
            if cell is None:
                role, rule, name = self._assigned(m)
                cell = store.add(owner, key, context, Cell(role, rule, name=name))
            cells.append(cell)
            self.instances.setdefault(m, {})[cell.name] = (cell.role, cell.rule)
        return cells

    def _instance(self, m: int) -> Hashable:
        """Tells an instance of a module from others that have its parameters."""
        relative = self.lowerings.modules[m][0].relative
        caller = next(iter(calling_modules()), None)
        if relative is None or caller is None:
            known = self.lowerings.modules[m][0].module_id  # Dynamo's: the module's id
            return (int(known), "") if known.isdigit() else self.lowerings.modules[m][0].name
        path, _, node = relative.partition(":")
        try:
            return id(caller.get_submodule(path)), node
        except AttributeError:
            return id(caller), relative

    def _assigned(self, m: int) -> tuple[str, Rule | None, str]:
        """Role, rule and name of the module instance that runs now; by its name where many blocks run this graph."""
        conditional = self.lowerings.modules[m][0]
        role, name = conditional.role, conditional.name
        rule: Rule | None = conditional.rule
        if conditional.relative is not None and conditional.assign is not None:
            block = name_of_caller(tuple(self.backend.roots))
            if block is None:
                return role, None, name
            name = joined(block, conditional.relative)
            role, rule, _ = conditional.assign(name)
        rule_of = self.backend.rule_of
        return role, rule if rule_of is None else rule_of(role, name), name

    def _timestep(self, args: Sequence[Any]) -> float:
        """The timestep of this call: from the callback, the graph's input, or the argument of the model around it."""
        callback = self.backend.config.current_timestep_callback
        if callback is not None:
            return as_number(timestep_from(callback))
        if self._timestep_input is not None:
            return as_number(args[self._timestep_input])
        given = calling_argument(TIMESTEP_NAMES)
        if given is None:
            self.backend.notices.warn_once(
                "no timestep",
                "pab_fx: no model around the attention takes an argument called timestep, so every step is computed. "
                "Set current_timestep_callback, for example lambda: pipe.current_timestep.",
            )
            return math.inf
        return as_number(given)

    def _warn_of_second_call(self, t: float, decisions: Sequence[Decision]) -> None:
        """Warn, in a loop of one's own, of what may be guidance that would get the other branch's attention."""
        if _diffusers.current_cache_context.get() is not None or not any(any(each.reuses) for each in decisions):
            return
        self.backend.notices.warn_once(
            "second call",
            f"pab_fx: the model is called twice in a row at timestep {t:g}, and the second call reuses attention of "
            "the first. If these are branches of guidance, name them: with pab_fx.cache_context('cond'): ... If a "
            "new generation begins there, call reset().",
        )

    def _warn_of_schedule(self, t: float, timesteps: Sequence[float] | None, rules: AbstractSet[Rule | None]) -> None:
        """Warn, at the start of a generation, of timesteps at which these rules reuse nothing."""
        listed = {t for rule in rules if isinstance(rule, AfterTimesteps) for t, _ in rule.skip_counts}
        if timesteps and listed and listed.isdisjoint(timesteps):
            self.backend.notices.warn_once(
                "mlp timesteps",
                f"pab_fx: none of the mlp timesteps {sorted(listed)} is among the generation's {list(timesteps)}, "
                "so no feed-forward will be reused. List timesteps of the scheduler.",
            )
        if timesteps and all(abs(t - known) > 1e-3 * max(1.0, abs(known)) for known in timesteps):
            self.backend.notices.warn_once(
                "other timesteps",
                f"pab_fx: the generation starts at timestep {t:g}, which is none of timesteps={list(timesteps)}: what "
                "is kept is decided by those. Pass the timesteps that the loop runs through, or none.",
            )
        windows = [rule.high for rule in rules if isinstance(rule, SkipRange)]
        if t <= 1 and windows and max(windows) > 1:
            self.backend.notices.warn_once(
                "scale",
                f"pab_fx: the generation starts at timestep {t:g}, but the windows (up to {max(windows):g}) are on the "
                "scheduler's scale, 0 to 1000: nothing will be reused. Set current_timestep_callback to a function "
                "that returns the scheduler's timestep, for example lambda: pipe.current_timestep.",
            )

    @property
    def graphs(self) -> dict[Any, Lifted]:
        """The graphs compiled so far, by their key."""
        return self.lowerings.graphs


OTHER_GRAPH = "the inner compiler, or a pass behind the rewrite, has made another graph of it"


def _check(outputs: Any, returns: int, expected: Sequence[TensorSpec | None]) -> None:
    """Refuse what a compiled graph returned if it is not what the captured graph says."""
    if not isinstance(outputs, (tuple, list)):
        raise RuntimeError(
            f"a compiled graph returned a {type(outputs).__name__} in place of {returns} values: {OTHER_GRAPH}."
        )
    if len(outputs) != returns:
        raise RuntimeError(f"a compiled graph returned {len(outputs)} values in place of {returns}: {OTHER_GRAPH}.")
    for output, spec in zip(outputs, expected, strict=False):
        if spec is not None and not spec.fits(output):
            _refuse(output, spec, "an output")


def _check_caches(outputs: Any, plan: Plan, expected: Sequence[Sequence[TensorSpec]]) -> None:
    """Refuse what is to be kept if it is not what the captured graph says."""
    for cell, m, positions in plan.writes:
        for spec, i in zip(expected[m], positions, strict=True):
            if i is not None and not spec.fits(outputs[i]):
                _refuse(outputs[i], spec, f"a {cell.role} cache")


def _refuse(found: Any, spec: TensorSpec, what: str) -> None:
    given = getattr(found, "dtype", type(found).__name__), list(getattr(found, "shape", ()))
    wanted = spec.dtype, list(spec.shape)
    raise RuntimeError(f"a compiled graph returned {given} for {what} of {wanted}: {OTHER_GRAPH}.")


def _timestep_input(inputs: Sequence[fx.Node]) -> int | None:
    names = [timestep_name(node) for node in inputs]
    return next((names.index(name) for name in TIMESTEP_NAMES if name in names), None)


def anchors(
    nodes_of: Mapping[str, Sequence[fx.Node]], inputs: Sequence[fx.Node], example_inputs: Sequence[Any]
) -> dict[str, Anchor]:
    """For each module, the parameters that its nodes read among the graph's inputs."""
    position = {node: i for i, node in enumerate(inputs)}
    taken: Counter[tuple[int, ...]] = Counter()
    found = {}
    for module_id, nodes in nodes_of.items():
        read = {position[source] for node in nodes for source in node.all_input_nodes if source in position}
        own = tuple(sorted(i for i in read if isinstance(example_inputs[i], nn.Parameter) or STATE in inputs[i].meta))
        found[module_id] = Anchor(own, taken[own])
        taken[own] += 1
    return found
