"""Run a rewritten graph: count, decide from the schedule on the host, hold the caches, pick the graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from . import _diffusers
from ._torch import calling_argument, calling_modules, faked_for_compiler, sizes_at, traced_shapes
from .clock import Step, as_number, current_step, request_of, running_pipeline, timestep_from
from .dataflow import value
from .lift import Lifted, fix_cache_strides, fix_operand_strides, lift, stride_order
from .modules import joined
from .predicates import TIMESTEP_NAMES, timestep_name
from .rewrite import Conditional, conditionals, copy_of
from .running import name_of_caller
from .schedule import AfterTimesteps, Rule, SkipRange
from .specialize import decide
from .state import Cell, TensorSpec, next_timestep

if TYPE_CHECKING:
    from .backend import PABBackend
    from .regional import Compiler

Compiled = Callable[..., Any]


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


class BroadcastGraph:
    """A compiled graph that broadcasts; called by Dynamo in place of the graph it was made from.

    Args:
        backend: owner of the state and of the inner compiler.
        original: the graph as it was captured.
        rewritten: the same graph with its conditionals, from `insert_conditions(..., allocate=False)`.
        anchors: for each `module_id` of the conditionals, how to tell its instances apart.
        example_inputs: what the graph is first called with.
        is_model: whether the graph is of the outermost model's own frame. In a block's, an input called
            timestep may be an embedding of it.
    """

    def __init__(
        self,
        backend: PABBackend,
        compiler: Compiler,
        original: fx.GraphModule,
        rewritten: fx.GraphModule,
        anchors: dict[str, Anchor],
        example_inputs: Sequence[Any],
        is_model: bool,
    ) -> None:
        self.backend = backend
        self._compiler = compiler
        self.original = original
        self.rewritten = rewritten
        found = conditionals(rewritten)
        self.conditionals = tuple(found.values())
        self.modules = tuple(dict.fromkeys(conditional.module_id for conditional in self.conditionals))
        self.anchors = tuple(anchors[module_id] for module_id in self.modules)
        self._firsts = tuple(next(c for c in self.conditionals if c.module_id == each) for each in self.modules)
        self._module_of = tuple(self.modules.index(c.module_id) for c in self.conditionals)
        self._calls = tuple({c.module_id: c.calls for c in self.conditionals}.values())
        self._caches = _caches_of_modules(self.conditionals)
        self._slot = {name: (m, i) for m, names in enumerate(self._caches) for i, name in enumerate(names)}
        self._recorded = _recorded_outputs(found)
        self._orders = {name: stride_order(recorded) for name, recorded in self._recorded.items()}
        inputs = original.graph.find_nodes(op="placeholder")
        self._symbols = [(i, value(node)) for i, node in enumerate(inputs) if isinstance(value(node), torch.SymInt)]
        self._expected: dict[tuple[int, ...], tuple[tuple[TensorSpec, ...], ...]] = {}
        self._timestep_input = _timestep_input(inputs) if is_model else None
        self._compute, self._reuse = torch.tensor(True), torch.tensor(False)
        self._compiled: dict[Any, tuple[Lifted, Compiled]] = {}
        self._outputs = len(original.graph.output_node().args[0])  # type: ignore[arg-type]
        self._compile_first(example_inputs)

    def __call__(self, *args: Any) -> Any:
        self.backend.calls += 1
        step = current_step.get() or self._step_of_its_own()
        t = self._timestep(args) if step.t is None else step.t
        cells = self._cells(args, step)
        expected = self._expected_caches(args)
        timesteps = step.timesteps or self.backend.known_timesteps()
        is_second = step.generation is None and cells[0].n > 0 and cells[0].t == t
        for cell, calls, specs in zip(cells, self._calls, expected, strict=True):
            cell.begin(t, cell.n // calls, timesteps, specs, step.generation)
        if next((cell.n for cell in cells if cell.rule is not None), None) == 0:
            self._warn_of_schedule(t, timesteps)
        try:
            reuses, keeps = self._decide(cells, t, timesteps, step)
            if is_second and any(reuses) and _diffusers.current_cache_context.get() is None:
                self._warn_of_second_call(t)
            if self.backend.lowering == "cond":
                return self._run_conditional(args, cells, expected, reuses, keeps)
            if timesteps and not any(reuses) and not any(keeps):
                return self._run_original(args, cells)
            return self._run_specialized(args, cells, reuses, keeps)
        except BaseException:
            for cell in cells:
                cell.reset()
            raise

    # ------------------------------------------------------------------------------------ one call

    def _decide(
        self, cells: list[Cell], t: float, timesteps: tuple[float, ...] | None, step: Step
    ) -> tuple[tuple[bool, ...], list[bool]]:
        """For each conditional whether it reuses, for each module whether its caches are kept; counts."""
        has_cache = [cell.caches is not None for cell in cells]
        keeps = [False] * len(cells)
        reuses = []
        for conditional, m in zip(self.conditionals, self._module_of, strict=True):
            cell = cells[m]
            last = conditional.call == conditional.calls - 1
            next_t = step.next_t
            if next_t is None:
                next_t = next_timestep(timesteps, cell.n // conditional.calls, t)
            if not last:
                next_t = t
            reuse, keeps[m] = cell.advance(t, has_cache[m], next_t)
            self.backend.counts[cell.role, reuse] += cell.rule is not None
            has_cache[m] = True
            reuses.append(reuse)
        return tuple(reuses), keeps

    def _run_original(self, args: Sequence[Any], cells: list[Cell]) -> Any:
        for cell in cells:
            cell.caches = None
        return self._graph(None, args)[1](*args)

    def _run_specialized(
        self, args: Sequence[Any], cells: list[Cell], reuses: tuple[bool, ...], keeps: list[bool]
    ) -> Any:
        lifted, compiled = self._graph(reuses, args)
        read = [self._slot[name] for name in lifted.reads]
        caches = [cells[m].caches[i] for m, i in read]  # type: ignore[index]
        reading = {m for m, _ in read}
        for m, cell in enumerate(cells):
            if m not in reading or not keeps[m]:
                cell.caches = None  # let go before the step that replaces it runs
        outputs = compiled(*args, *caches)
        self._store(lifted, outputs[self._outputs :], cells, keeps)
        return outputs[: self._outputs]

    def _run_conditional(
        self,
        args: Sequence[Any],
        cells: list[Cell],
        expected: tuple[tuple[TensorSpec, ...], ...],
        reuses: tuple[bool, ...],
        keeps: list[bool],
    ) -> Any:
        lifted, compiled = self._graph("cond", args)
        predicates = [self._reuse if reuses[i] else self._compute for i in lifted.predicates]
        caches, reading = [], {m for m, reuse in zip(self._module_of, reuses, strict=True) if reuse}
        for m, i in (self._slot[name] for name in lifted.reads):
            held = cells[m].caches if m in reading else None  # what is replaced is let go before
            caches.append(held[i] if held is not None else self.backend.unread(expected[m][i]))
        for cell in cells:
            cell.caches = None
        outputs = compiled(*args, *predicates, *caches)
        self._store(lifted, outputs[self._outputs :], cells, keeps)
        return outputs[: self._outputs]

    def _store(self, lifted: Lifted, written: Sequence[torch.Tensor], cells: list[Cell], keeps: list[bool]) -> None:
        values = dict(zip(lifted.writes, written, strict=True))
        for m, names in enumerate(self._caches):
            if keeps[m] and all(name in values for name in names):
                cells[m].caches = tuple(values[name] for name in names)

    # ------------------------------------------------------------------------------ what a call is

    def _step_of_its_own(self) -> Step:
        """The step of a model that is not enabled, only compiled: it has no more than a request."""
        pipeline = running_pipeline()
        if pipeline is not None:
            self.backend.clock(pipeline)  # so that the backend heeds the end of the pipeline's call
        return Step(request_of(pipeline))

    def _cells(self, args: Sequence[Any], step: Step) -> list[Cell]:
        store, context = self.backend.store(step.request), (_diffusers.current_cache_context.get(), step.branch)
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
            cells.append(cell or store.add(owner, key, context, Cell(*self._assigned(m))))
        return cells

    def _instance(self, m: int) -> Hashable:
        """Tells an instance of a module from others that have its parameters."""
        relative = self._firsts[m].relative
        caller = next(iter(calling_modules()), None)
        if relative is None or caller is None:
            known = self._firsts[m].module_id  # Dynamo's: the module's id
            return (int(known), "") if known.isdigit() else self._firsts[m].name
        path, _, node = relative.partition(":")
        try:
            return id(caller.get_submodule(path)), node
        except AttributeError:
            return id(caller), relative

    def _assigned(self, m: int) -> tuple[str, Rule | None]:
        """Role and rule of the instance of a module that runs now; by its name, where many blocks run this graph."""
        conditional = self._firsts[m]
        if conditional.relative is None or conditional.assign is None:
            return conditional.role, conditional.rule
        block = name_of_caller(tuple(self.backend.roots))
        if block is None:
            return conditional.role, None
        role, rule, _ = conditional.assign(joined(block, conditional.relative))
        return role, rule

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

    def _expected_caches(self, args: Sequence[Any]) -> tuple[tuple[TensorSpec, ...], ...]:
        """What each module's caches look like in a call with these sizes."""
        sizes = tuple(args[i] for i, _ in self._symbols)
        if sizes not in self._expected:
            known = [(symbol, size) for (_, symbol), size in zip(self._symbols, sizes, strict=True)]
            self._expected[sizes] = tuple(
                tuple(
                    TensorSpec(
                        sizes_at(self._recorded[name].shape, known),
                        self._recorded[name].dtype,
                        self._recorded[name].device,
                        self._orders[name],
                    )
                    for name in names
                )
                for names in self._caches
            )
        return self._expected[sizes]

    def _warn_of_second_call(self, t: float) -> None:
        """Warn, in a loop of one's own, of what may be guidance that would get the other branch's attention."""
        self.backend.notices.warn_once(
            "second call",
            f"pab_fx: the model is called twice in a row at timestep {t:g}, and the second call reuses attention of "
            "the first. If these are branches of guidance, name them: with pab_fx.cache_context('cond'): ... If a "
            "new generation begins there, call reset().",
        )

    def _warn_of_schedule(self, t: float, timesteps: tuple[float, ...] | None) -> None:
        """Warn, at the start of a generation, of timesteps at which the config reuses nothing."""
        listed = {t for c in self.conditionals if isinstance(c.rule, AfterTimesteps) for t, _ in c.rule.skip_counts}
        if timesteps and listed and listed.isdisjoint(timesteps):
            self.backend.notices.warn_once(
                "mlp timesteps",
                f"pab_fx: none of the mlp timesteps {sorted(listed)} is among the generation's {list(timesteps)}, "
                "so no feed-forward will be reused. List timesteps of the scheduler.",
            )
        windows = [c.rule.high for c in self.conditionals if isinstance(c.rule, SkipRange)]
        if t <= 1 and windows and max(windows) > 1:
            self.backend.notices.warn_once(
                "scale",
                f"pab_fx: the generation starts at timestep {t:g}, but the windows (up to {max(windows):g}) are on the "
                "scheduler's scale, 0 to 1000: nothing will be reused. Set current_timestep_callback to a function "
                "that returns the scheduler's timestep, for example lambda: pipe.current_timestep.",
            )

    # -------------------------------------------------------------------------------------- graphs

    def _compile_first(self, example_inputs: Sequence[Any]) -> None:
        """Compile, inside of Dynamo's call, the graph that the first step runs."""
        if self.backend.lowering == "cond":
            self._compile("cond", example_inputs)
        elif ((step := current_step.get()) and step.timesteps) or self.backend.known_timesteps():
            self._compile(None, example_inputs)
        else:
            self._compile((False,) * len(self.conditionals), example_inputs)

    def _graph(self, key: Any, args: Sequence[Any]) -> tuple[Lifted, Compiled]:
        """The compiled graph for a tuple of decisions, "cond" for all conditions, `None` for the original."""
        if key not in self._compiled:
            if self._symbols:
                lifted = self.lowered(key)
                with traced_shapes(lifted.gm) as inputs:
                    self._compiled[key] = lifted, self._compiler(lifted.gm, inputs)
            else:
                self._compile(key, args)
        return self._compiled[key]

    def _compile(self, key: Any, args: Sequence[Any]) -> None:
        lifted = self.lowered(key)
        further = [value(node) for node in lifted.gm.graph.find_nodes(op="placeholder")[len(args) :]]
        if not self._symbols:
            further = [faked_for_compiler(each) for each in further]
        self._compiled[key] = lifted, self._compiler(lifted.gm, [*args, *further])

    def lowered(self, key: Any) -> Lifted:
        """The lowered graph for a tuple of decisions, "cond" for all conditions, `None` for the original."""
        if key is None:
            return Lifted(copy_of(self.original), (), (), ())
        gm = copy_of(self.rewritten)
        lifted = lift(gm if key == "cond" else decide(gm, dict(enumerate(key))))
        if not self.backend.runs_eagerly:
            fix_operand_strides(gm)
            fix_cache_strides(lifted)
        return lifted

    @property
    def graphs(self) -> dict[Any, Lifted]:
        """The graphs compiled so far, by their key."""
        return {key: lifted for key, (lifted, _) in self._compiled.items()}


def _caches_of_modules(found: Sequence[Conditional]) -> tuple[tuple[str, ...], ...]:
    return tuple({conditional.module_id: conditional.caches for conditional in found}.values())


def _recorded_outputs(found: dict[fx.Node, Conditional]) -> dict[str, torch.Tensor]:
    """The fake tensor recorded for what each cache holds."""
    recorded: dict[str, torch.Tensor] = {}
    for cond, conditional in found.items():
        for item in cond.users:
            recorded[conditional.caches[item.args[1]]] = value(item)  # type: ignore[index]
    return recorded


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
        own = tuple(sorted(i for i in read if isinstance(example_inputs[i], nn.Parameter)))
        found[module_id] = Anchor(own, taken[own])
        taken[own] += 1
    return found
