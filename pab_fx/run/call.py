"""A call of a graph that broadcasts, from top to bottom: whose state, begin, decide, run, hold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .._torch.dynamo import calling_argument, calling_modules
from ..compile.lowering import Expected, Lowerings
from ..compile.specs import TensorSpec
from ..compile.variants import Variants
from ..graph.modules import joined
from ..passes.counting import TIMESTEP_NAMES, timestep_name
from ..policy.when import END, Rule
from .checks import check_outputs, refuse
from .clock import Step, as_number, current_step, request_of, running_pipeline, timestep_from
from .contexts import current_cache_context, current_steps
from .deciding import Call, Decision, Lockstep
from .holding import addresses
from .kept import Kept
from .measuring import keep_signals, keeper_of, measure
from .owners import Anchor, instance_of
from .passages import Visit
from .planning import Plan, planned, reused
from .running import name_of_caller
from .runtime import Runtime
from .state import Cell, StateStore


class BroadcastGraph:
    """A compiled graph that broadcasts; called by Dynamo in place of the graph it was made from.

    Args:
        runtime: owner of the state.
        variants: makes lowerings of the captured graph, and what is computed once a generation.
        unchanging: positions of the inputs that are likely the same in each step; `None` if nothing is to be
            computed once.
        anchors: for each module, how to tell its instances apart.
        example_inputs: inputs of the captured graph.
        is_model: whether the graph is of the outermost model's own frame. In a block's, an input called
            timestep may be an embedding of it.
        has_conditions: whether one graph holds every condition, instead of one for each set of reusing parts.
        is_captured: whether this is made while Dynamo captures the graph, and not later.

    Attributes:
        runs: how often the graph was called.
        overwrites: where the outputs of its last call lie, if its next one overwrites them.
        instances: by qualified name, role and rule of each module that it has run, by the module's number in the graph.
    """

    def __init__(
        self,
        runtime: Runtime,
        variants: Variants,
        unchanging: frozenset[int] | None,
        anchors: tuple[Anchor, ...],
        example_inputs: Sequence[Any],
        is_model: bool,
        has_conditions: bool,
        is_captured: bool = True,
    ) -> None:
        self._runtime, self._variants, self._has_conditions = runtime, variants, has_conditions
        self._has_erred = False
        self.runs = 0
        self.overwrites: frozenset[int] = frozenset()
        self.instances: dict[int, dict[str, tuple[str, Rule | None]]] = {}
        self._use(unchanging)
        self.anchors = anchors
        self._owners = tuple(anchor.positions[0] for anchor in anchors if anchor.positions)
        self._timestep_input = _timestep_input(self.lowerings.inputs) if is_model else None
        if is_captured:  # inside of Dynamo's call, the graph that the first step runs
            self.lowerings.compile_as_captured(self._key((False,) * len(self.lowerings.conditionals)), example_inputs)

    def __call__(self, *args: Any) -> Any:
        return self.run(args, step_of(self._runtime))

    def run(self, args: tuple[Any, ...], step: Step, visit: Visit | None = None) -> Any:
        """Run the graph in a step, as a piece of a range of blocks if it is one."""
        runtime = self._runtime
        runtime.calls += 1
        self.runs += 1
        t = self.timestep(args) if step.t is None else step.t
        timesteps = step.timesteps or runtime.known_timesteps()
        call = Call(t, step.next_t, timesteps, step.generation, current_steps.get())
        store = runtime.store(step.request)
        modules, expected = self._modules(args, step, store, visit), self.lowerings.expected(args)
        decided = {} if visit is None or visit.decision is None else {visit.module: visit.decision}
        store.enter(modules.first)
        try:
            before = modules.first.count
            self._begin(modules, call, _slots(expected, visit), decided)
            if self.once is not None:
                args = (*args, *self._computed_once(args, step, modules.first.count.n == 0))
                expected = self.lowerings.expected(args)  # of another variant, if the guess was wrong
            context = (current_cache_context.get(), step.branch)
            args, measured = measure(runtime, self.lowerings, modules, store, context, args, call)
            decisions = modules.advance(call, measured, decided)
            for decision in decisions:
                if decision.group.modules[0] not in decided:
                    decision.record(runtime.counts)
                    runtime.note_decision(context, t, decision.group.rule, decision.decided_by, any(decision.reuses))
            if visit is not None:
                visit.decision = next(each for each in decisions if visit.module in each.group.modules)
            if call.generation is None and before.n > 0 and before.t == t and not decided:
                self._warn_of_second_call(t, decisions)
            if self.lowerings.rules:
                keep_signals(runtime, self.lowerings.rules, modules, decisions)
            outputs = self._run(args, self._plan(modules, decisions, visit), decisions, expected, visit)
            if runtime.has_cuda_graphs:
                self.overwrites = addresses(outputs)
            return outputs
        except BaseException:
            modules.reset()
            raise
        finally:
            store.leave(modules.first)

    @property
    def graphs(self) -> dict[Any, fx.GraphModule]:
        """The graphs compiled so far, by their key."""
        return self.lowerings.graphs

    def warmup(self, timesteps: Sequence[float]) -> None:
        """Compile every graph that a generation with these timesteps needs, for inputs like those captured."""
        cells = [Cell(calls[0].role, calls[0].policy.when) for calls in self.lowerings.modules]
        modules = self._lockstep(cells, ())
        for t, next_t in zip(timesteps, (*timesteps[1:], END), strict=True):
            decisions = modules.advance(Call(t, next_t, timesteps, None), lambda rule: 0.0)
            self.lowerings.compiled(self._key(reused(self.lowerings, decisions)))
            for decision in decisions:
                for cell in decision.group.cells if not decision.rests else ():
                    cell.caches = () if decision.keeps else None

    # ------------------------------------------------------------------------------------------- whose state

    def _modules(self, args: Sequence[Any], step: Step, store: StateStore, visit: Visit | None) -> Lockstep:
        """The modules that a call runs, with their cells in its request and cache context."""
        context = (current_cache_context.get(), step.branch)
        known = store.found.setdefault(self, {})
        found: Lockstep | None = known.get(context)
        if found is None or any(owner() is not args[i] for owner, i in zip(found.owners, self._owners, strict=True)):
            # where more than the owners tell the modules apart, they are found anew in every call
            by_owner = len(self._owners) == len(self.anchors) and not any(
                args[i] in self._runtime.tied for i in self._owners
            )
            owners = [weakref.ref(args[i], lambda _: known.pop(context, None)) for i in self._owners]
            cells = self._cells(args, store, context, visit)
            found = self._lockstep(cells, owners, tuple(self._signals(args, store, context, cells)), visit)
            if by_owner:
                known[context] = found
        return found

    def _lockstep(
        self, cells: Sequence[Cell], owners: Sequence[Any], signals: Sequence[Cell] = (), visit: Visit | None = None
    ) -> Lockstep:
        modules = self.lowerings.modules
        conditionals = self.lowerings.conditionals
        outers = [None if calls[0].outer is None else conditionals[calls[0].outer].module for calls in modules]
        remembers = [calls[0].remembers for calls in modules]
        if visit is not None and not visit.ends:  # what is kept is read in another graph, maybe also where it computes
            remembers[visit.module] = True
        unread = [m for m, calls in enumerate(modules) if not calls[0].policy.how.is_read]
        piece = None if visit is None else visit.module
        return Lockstep(cells, tuple(map(len, modules)), remembers, outers, owners, signals, unread, piece)

    def _cells(self, args: Sequence[Any], store: StateStore, context: Hashable, visit: Visit | None) -> list[Cell]:
        cells = []
        for m in range(len(self.anchors)):
            if visit is not None and m == visit.module:
                cells.append(visit.cell)
                if visit.cell.rule is not None:
                    self.instances.setdefault(m, {})[visit.cell.name] = (visit.cell.role, visit.cell.rule)
                continue
            owner, key = self._place(m, args)
            cell = store.find(owner, key, context)
            if cell is None:
                role, rule, name = self._assigned(m)
                cell = store.add(owner, key, context, Cell(role, rule, name=name))
            cells.append(cell)
            self.instances.setdefault(m, {})[cell.name] = (cell.role, cell.rule)
        return cells

    def _place(self, m: int, args: Sequence[Any]) -> tuple[Any, tuple[Hashable, ...]]:
        """What the cell of a module hangs on, and which of those that hang there it is."""
        anchor = self.anchors[m]
        caller = None if anchor.positions else next(iter(calling_modules()), self)
        owner, *others = [args[i] for i in anchor.positions] or [caller]
        key: tuple[Hashable, ...] = (anchor.occurrence, *map(id, others))
        if owner in self._runtime.tied:
            key = (*key, instance_of(anchor, self.lowerings.modules[m][0]))
        return owner, key

    def _signals(
        self, args: Sequence[Any], store: StateStore, context: Hashable, cells: Sequence[Cell]
    ) -> Iterator[Cell]:
        """For each rule that looks at a signal, where that is kept: beside the first module that goes by it."""
        rules = self.lowerings.rules
        for i in range(len(rules)):
            m = keeper_of(i, rules, [cell.rule for cell in cells])
            owner, key = self._place(m, args)
            key = (*key, "signal", i)
            made = Cell(cells[m].role, None, name=cells[m].name, is_signal=True)
            yield store.find(owner, key, context) or store.add(owner, key, context, made)

    def _assigned(self, m: int) -> tuple[str, Rule | None, str]:
        """Role, rule and name of the module instance that runs now; by its name where many blocks run this graph."""
        conditional = self.lowerings.modules[m][0]
        role, name, rule = conditional.role, conditional.name, conditional.policy.when
        if conditional.relative is not None and conditional.assign is not None:
            block = name_of_caller(tuple(self._runtime.roots))
            if block is None:
                return role, None, name
            name = joined(block, conditional.relative)
            role, policy, _ = conditional.assign(name)
            rule = None if policy is None else policy.when
        rule_of = self._runtime.rule_of
        return role, rule if rule_of is None else rule_of(role, name), name

    # ------------------------------------------------------------------------------------------- begin

    def _begin(
        self, modules: Lockstep, call: Call, slots: Sequence[Sequence[TensorSpec]], decided: Mapping[int, Decision]
    ) -> None:
        """Begin a generation where it is due, and note the timestep."""
        if modules.begin(call, slots, decided):
            self._runtime.restarts += 1
            if self._runtime.restarts > 1:
                self._runtime.warn_once(
                    "rising",
                    f"pab_fx: the timestep rises to {call.t:g} in the middle of a generation, and not for the first "
                    "time: timesteps of a generation fall, so each rise begins another one, and little or nothing is "
                    "reused. Set current_timestep_callback to a function that returns the scheduler's timestep.",
                )
        is_first = modules.first.count.n == 0 and not decided
        self._runtime.seen.see(call.t, call.timesteps, is_first)
        if call.timesteps and call.generation is None and call.t not in call.timesteps:
            self._warn_of_other_timesteps(call.t, call.timesteps)
        for rule in {cell.rule for cell in modules.cells if cell.rule is not None} if is_first else ():
            why = rule.mismatch(call.t, call.timesteps) if call.timesteps or not call.steps else None
            if why is not None:
                self._runtime.warn_once(f"mismatch {type(rule).__name__}", f"pab_fx: {why}")

    def timestep(self, args: Sequence[Any]) -> float:
        """The timestep of this call: from the callback, the graph's input, or the argument of the model around it."""
        callback = self._runtime.callback
        if callback is not None:
            return as_number(timestep_from(callback))
        if self._timestep_input is not None:
            return as_number(args[self._timestep_input])
        given = calling_argument(TIMESTEP_NAMES)
        if given is None:
            self._runtime.warn_once(
                "no timestep",
                f"pab_fx: no model around the attention takes an argument called {' or '.join(TIMESTEP_NAMES)}, so a "
                "rule that asks for the timestep, as PAB's ranges do, computes every step, and no beginning of a "
                "generation is seen: call reset() there. Or set current_timestep_callback, for example lambda: "
                "pipe.current_timestep.",
            )
            return math.inf
        return as_number(given)

    def _warn_of_second_call(self, t: float, decisions: Sequence[Decision]) -> None:
        """Warn, in a loop of one's own, of what may be guidance that would get the other branch's attention."""
        is_branch = current_cache_context.get() is None and any(any(each.reuses) for each in decisions)
        if not is_branch or math.isinf(t):  # of calls without a timestep none can be told apart
            return
        self._runtime.warn_once(
            "second call",
            f"pab_fx: the model is called twice in a row at timestep {t:g}, and the second call reuses attention of "
            "the first. If these are branches of guidance, name them: with pab_fx.cache_context('cond'): ... If a "
            "new generation begins there, call reset().",
        )

    def _warn_of_other_timesteps(self, t: float, timesteps: Sequence[float]) -> None:
        """Warn, in a loop of one's own, of timesteps that were given and are not those that it runs through."""
        if all(abs(t - known) > 1e-3 * max(1.0, abs(known)) for known in timesteps):
            self._runtime.warn_once(
                "other timesteps",
                f"pab_fx: the model is called at timestep {t:g}, which is none of timesteps={list(timesteps)}: what is "
                "kept is decided by those. Pass the timesteps that the loop runs through, or none.",
            )

    # ------------------------------------------------------------------------------------------- once a generation

    def _use(self, unchanging: frozenset[int] | None) -> None:
        """Run the variant of the graph for inputs that stay the same."""
        self._unchanging = unchanging
        variant = self._variants.variant(unchanging)
        self.lowerings: Lowerings = variant.lowerings
        self.once = None if variant.split is None else self._variants.once(variant.split)

    def _computed_once(self, args: Sequence[Any], step: Step, is_first: bool) -> tuple[torch.Tensor, ...]:
        """What the graph computes once a generation; anew where it reads others than before.

        Weights may be other ones in each generation: merged adapters leave no trace in a parameter's version.
        """
        of_contexts = self._runtime.store(step.request).kept.setdefault(self, {})
        context = (current_cache_context.get(), step.branch)
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
            kept = of_contexts[context] = Kept(self.once, args, self._at_one_address(step, context))
            self._runtime.computed_once += 1
        else:
            self._runtime.taken_as_kept += 1
            if self._runtime.checks_invariants:
                kept.check(args)
        return kept.tensors

    def _at_one_address(self, step: Step, context: Hashable) -> list[torch.Tensor] | None:
        """Where what is computed once is copied to, for CUDA graphs, in each request; `None` if it need not be."""
        holder = self._runtime.holder
        if holder is None or not holder.at_one_address:
            return None
        return self._runtime.store(step.request).buffers.setdefault(self, {}).setdefault(context, [])

    # ------------------------------------------------------------------------------------------- decide

    def _plan(self, modules: Lockstep, decisions: Sequence[Decision], visit: Visit | None) -> Plan:
        """What decisions come to; found once for equal ones."""
        key = (self.lowerings, *[(each.reuses, each.reads, each.keeps, each.rests) for each in decisions])
        if key not in modules.plans:
            made = planned(self._runtime, self.lowerings, self._key, modules.cells, decisions, visit)
            modules.plans[key] = made
        return modules.plans[key]

    def _key(self, reuses: tuple[bool, ...]) -> Any:
        return "cond" if self._has_conditions else reuses

    # ------------------------------------------------------------------------------------------- run, hold

    def _run(
        self,
        args: Sequence[Any],
        plan: Plan,
        decisions: Sequence[Decision],
        expected: Expected,
        visit: Visit | None,
    ) -> Any:
        """Run a graph on what the cells keep, and keep what it leaves.

        What a step replaces, or is the last to read, is let go before: by the cells here, by the compiled graph as soon
        as it has read it.
        """
        runtime, is_new = self._runtime, not plan.stand_ins or plan.stand_ins[0] is not expected
        if is_new:
            plan.stand_ins[:] = [expected, *[runtime.unread(expected.slots[m][i]) for _, m, i in plan.unread]]
        inputs = [*args, *plan.given]
        for (position, _, _), stand_in in zip(plan.unread, plan.stand_ins[1:], strict=True):
            inputs[position] = stand_in
        for position, i, call, which, device in plan.scalars:
            inputs[position] = runtime.scalar(decisions[i].scalars[call][which], device)
        for position, how, module, device in plan.weights:
            inputs[position] = runtime.scalar(how.weigh(module()), device)
        for position, stream in plan.entering if visit is not None else ():
            inputs[position] = visit.entering[stream]  # type: ignore[union-attr]
        for position, cell, i in plan.reads:
            inputs[position] = runtime.lend(cell, i)
        for cell in plan.drops:
            cell.caches = None
        outputs = plan.compiled.run(inputs)
        check_outputs(outputs, plan.compiled.returns, expected.outputs)
        if is_new:
            _check_slots(outputs, plan, expected.slots)
        for cell, m, positions in plan.writes:
            written = tuple([outputs[i] if i is not None else runtime.lend(cell, c) for c, i in enumerate(positions)])
            cell.caches, cell.specs = runtime.hold(cell, written), expected.slots[m]
        return outputs[: self.lowerings.outputs]


def step_of(runtime: Runtime) -> Step:
    """The step of an enabled model; of one that is only compiled, which has no more than a request."""
    step = current_step.get()
    if step is not None:
        return step
    pipeline = running_pipeline()
    if pipeline is not None:
        runtime.clock(pipeline)  # so that the backend heeds the end of the pipeline's call
    return Step(request_of(pipeline))


def _slots(expected: Expected, visit: Visit | None) -> Sequence[Sequence[TensorSpec]]:
    """What the slots of each module look like; of a range of blocks that ends in another graph whatever is kept."""
    if visit is None or visit.ends:
        return expected.slots
    slots = list(expected.slots)
    slots[visit.module] = visit.cell.specs  # type: ignore[call-overload]
    return slots


def _check_slots(outputs: Any, plan: Plan, expected: Sequence[Sequence[TensorSpec]]) -> None:
    """Refuse what is to be kept if it is not what the captured graph says."""
    for cell, m, positions in plan.writes:
        for spec, i in zip(expected[m], positions, strict=True):
            if i is not None and not spec.fits(outputs[i]):
                refuse(outputs[i], spec, f"a {cell.role} cache")


def _timestep_input(inputs: Sequence[fx.Node]) -> int | None:
    names = [timestep_name(node) for node in inputs]
    return next((names.index(name) for name in TIMESTEP_NAMES if name in names), None)
