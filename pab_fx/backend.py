"""The Dynamo backend: `torch.compile(model, backend=pab_backend)`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ._torch.dynamo import inputs_that_are_state
from .compile.lowering import Compiler, Lowerings
from .compile.regional import RegionalCompiler
from .compile.variants import Variants, likely_unchanging
from .diffusers import listen
from .diffusers.configs import callback_of, policies_of
from .diffusers.hooks import adapter_parameters, other_cache
from .export.rewrite import rewrite
from .graph import effects
from .graph.copies import copy_of
from .graph.dataflow import STATE
from .graph.modules import ModuleNames, repeated_blocks
from .notices import Notices
from .options import as_key, cache_device_of, cache_dtype_of, inner_compiler, records_cuda_graphs
from .passes.cut import tag_with_signals
from .passes.numbers import fix_numbers, without_numbers
from .passes.order import Lowering
from .passes.pieces import placed
from .passes.users import Pass, Passes
from .policy.checks import checked_flag
from .policy.config import PABConfig
from .policy.policy import Policy, assigned
from .policy.when import Rule, falling_timesteps
from .report.account import report_of
from .report.captured import Captured, Plain
from .report.report import Report
from .run.call import BroadcastGraph
from .run.holding import addresses, holder_for
from .run.measuring import position_of
from .run.owners import anchors
from .run.pieces import PieceGraph
from .run.running import module_names, running_modules
from .run.runtime import Runtime
from .select.region import Region
from .select.tag import tag
from .spelling import instead_of

logger = logging.getLogger(__name__)

LOWERINGS = ("specialize", "cond")
_live: weakref.WeakSet[PABBackend] = weakref.WeakSet()


class PABBackend:
    """A backend of `torch.compile` that broadcasts attention and hands the rest to an inner compiler.

    Args:
        config: a `PABConfig` (default: spatial attention every 2nd step in (100, 800)), diffusers'
            `PyramidAttentionBroadcastConfig`, `TaylorSeerCacheConfig`, `MagCacheConfig`, `FirstBlockCacheConfig`,
            `SeaCacheConfig` or `FasterCacheConfig` (with `enable`, or of a distilled model), with which roles and
            outputs are those of its hooks, a `Policy`, or a list of these; the first that is for a part counts.
        inner: compiles the lowered graphs: the name of a registered Dynamo backend, or a callable
            `(gm, example_inputs) -> callable`.
        lowering: "specialize" compiles one graph for each set of reusing regions that occurs, without
            branches; "cond" one graph that holds every condition.
        passes: functions `gm -> gm` that run on the captured graph before it is tagged. Those behind `pab_fx.rewrite`
            in the list run after it, on each graph that goes to the inner compiler and each branch of a condition.
        timesteps: the timesteps of the generation, in order, or a function that returns them
            (`lambda: scheduler.timesteps`). Where they are known, nothing is kept that no later step
            reuses.
        mode: passed to Inductor, as in `torch.compile(mode=...)`.
        options: passed to Inductor, as in `torch.compile(options=...)`.
        regional: compile each repeated block once for all its siblings.
        cache_dtype: what is kept is kept in bfloat16 (float32 models), int8 or float8_e4m3fn (with a scale per token).
        cache_device: where what is kept lies between two steps, such as "cpu"; default: where it is computed.
        step_invariants: compute once a generation what depends on nothing that changes from step to step, such as
            the keys and values of a text; the same operations on the same operands, so with inner="eager" to the bit.
            An update that leaves no trace (`weight.data.mul_(2)`) in the middle of a generation is not seen: "check"
            computes it in each step too, and raises where it differs.

    Raises:
        ValueError: for a bad config, an unknown lowering, an inner backend that is not registered, or a flag
            that is no bool.

    Example:
        >>> backend = PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    """

    def __init__(
        self,
        config: Any = None,
        inner: str | Callable[..., Any] = "inductor",
        lowering: str = "specialize",
        passes: Sequence[Pass] = (),
        timesteps: Iterable[float] | torch.Tensor | Callable[[], Any] | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        regional: bool = False,
        cache_dtype: torch.dtype | str | None = None,
        cache_device: torch.device | str | None = None,
        step_invariants: bool | str = True,
    ) -> None:
        self.policies = policies_of(config)
        self.config = PABConfig() if config is None else config
        if lowering not in LOWERINGS:
            raise ValueError(f"lowering={lowering!r} is unknown; it is one of {', '.join(map(repr, LOWERINGS))}.")
        self.inner, self.lowering = inner, lowering
        self._passes = Passes.of(passes, rewrite)
        self._inner = inner_compiler(inner, mode, options)
        self._regional = checked_flag("regional", regional)
        self._step_invariants = step_invariants == "check" or checked_flag("step_invariants", step_invariants)
        has_cuda_graphs = records_cuda_graphs(inner, mode, options)
        holder = holder_for(cache_device_of(cache_device), has_cuda_graphs)
        self._lowering = Lowering(
            fix_strides=inner != "eager",
            cache_dtype=cache_dtype_of(cache_dtype),
            static_slots=holder is not None and holder.at_one_address,
        )
        self.notices = Notices()
        self.runtime = Runtime(
            timesteps=timesteps if callable(timesteps) or timesteps is None else falling_timesteps(timesteps),
            callback=callback_of(config),
            holder=holder,
            warn_once=lambda key, message: self.notices.warn_once(key, message),
            checks_invariants=step_invariants == "check",
            has_cuda_graphs=has_cuda_graphs,
        )
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.runtime.roots = self.roots
        self.clear()
        listen.listen()
        _live.add(self)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PABBackend:
        """A backend from its arguments and, in place of `config`, fields of `PABConfig`.

        Raises:
            ValueError: for a name that is neither, naming those that are like it.

        Example:
            >>> PABBackend.of({"inner": "eager", "spatial_attention_block_skip_range": 3}).config.skip_range("spatial")
            3
        """
        arguments = [name for name in inspect.signature(cls).parameters if name in options]
        fields = {name: value for name, value in options.items() if name not in arguments}
        known = (*inspect.signature(cls).parameters, *(field.name for field in dataclasses.fields(PABConfig)))
        for name in fields:
            if name not in known:
                raise ValueError(f"unknown option {name!r} for the backend 'pab': {instead_of(name, known, 'it has')}")
        if fields and options.get("config") is not None:
            raise ValueError(f"give either config or its fields as options, not both: {', '.join(fields)}.")
        config = PABConfig(**fields) if fields else options.get("config")
        return cls(**{name: options[name] for name in arguments if name != "config"}, config=config)

    def __repr__(self) -> str:
        inner = self.inner if isinstance(self.inner, str) else getattr(self.inner, "__name__", self.inner)
        return f"{type(self).__name__}({self.config!r}, inner={inner!r}, lowering={self.lowering!r})"

    def assign(self, rule_of: Callable[[str, str], Rule | None] | None) -> None:
        """Let what was captured as conditional go by other rules from now on, in generations that begin afresh.

        Nothing is captured anew, and a set of reusing modules that was lowered for one config serves every other.

        Args:
            rule_of: the rule for a role and a qualified name, `None` to leave that module alone; without it, the
                config's.
        """
        self.runtime.rule_of = rule_of
        self.runtime.forget_state()

    def set_config(self, config: Any) -> None:
        """Go by another config from now on, in generations that begin afresh; see `PAB.set_config`.

        Raises:
            ValueError: for a bad config, or one that has to be captured anew, naming the part.
        """
        policies = policies_of(config)
        looked_for = {type(each.where) for each in self.policies}
        for each in policies:
            if self.regions and each.when is not None and type(each.where) not in looked_for:
                raise ValueError(
                    f"{each.where!r}: the model was captured without such parts being looked for, and has to be "
                    "captured anew, by disable() and enable()."
                )
        found = [(region, *assigned(policies, region.role, region.name)) for region in self.regions]
        for region, role, policy, _ in found:
            if policy is not None and not (region.unsafe or (region.policy and _are_kept_alike(region.policy, policy))):
                raise ValueError(
                    f"{region.name} ({role}) was captured to be {_captured(region)}, and the new config has it "
                    f"{policy.describe()}: that has to be captured anew, by disable() and enable()."
                )
        measured = [rule for graph in self.graphs for rule in graph.lowerings.rules]
        for region, _, policy, _ in found:
            rule = None if policy is None else policy.when
            if rule is not None and rule.signal is not None and position_of(rule, measured) is None:
                raise ValueError(
                    f"{region.name}: the model was captured without what {rule!r} looks at. It has to be "
                    "captured anew, by disable() and enable()."
                )
        is_idle = not any(policy is not None for *_, policy, _ in found)
        if found and is_idle and any(each.when is not None for each in policies):
            self.notices.warn_of_nothing([dataclasses.replace(region, policy=None) for region in self.regions])
        self.policies, self.config = policies, config
        self.assign(partial(_rule, policies))

    def clear(self) -> None:
        """Forget every graph and all state, as for a new backend."""
        self.runtime.clear()
        self.regions: list[Region] = []
        self.captured: list[Captured] = []
        self.notices = Notices()

    @property
    def graphs(self) -> list[BroadcastGraph]:
        """What runs in the place of the captured graphs that broadcast."""
        return [graph for each in self.captured for graph in each.all_graphs]

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph: select, make conditional, lower, hand to the inner compiler."""
        return self.compile_for(gm, example_inputs, self.policies)

    def compile_for(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], policies: Sequence[Policy]
    ) -> Callable[..., Any]:
        """`__call__` for a kind of calls that goes by policies of its own, and shares what is kept with the others."""
        inputs = gm.graph.find_nodes(op="placeholder")
        for i in inputs_that_are_state():
            inputs[i].meta[STATE] = True
        names = module_names(tuple(self.roots), example_inputs)
        gm = self._passes.run_before(gm, partial(tag, policies=policies, names=names))
        if self._is_left_alone(example_inputs):
            return self.compile_inner(self._passes.run_after(gm), example_inputs)
        captured = fix_numbers(copy_of(gm), everywhere=self.lowering == "cond")
        regions = tag_with_signals(captured, policies, names)
        if self.lowering == "cond":
            regions = tuple(without_numbers(region) for region in regions)
        self.regions += regions
        run: BroadcastGraph | PieceGraph | Plain | None = self._broadcasting(captured, regions, names, example_inputs)
        if run is None:
            asks = any(each.when is not None for each in policies)
            if asks and not any(region.is_broadcast for region in self.regions):
                self.notices.warn_of_nothing(regions)
            run = Plain(self._compiler(names)(gm, example_inputs), self.runtime.has_cuda_graphs)
        self.captured.append(Captured(captured, regions, names.frame, id(names.model), run))
        return run

    def _is_left_alone(self, example_inputs: Sequence[Any]) -> bool:
        """Whether a graph is captured for training, or under another cache; the user is told."""
        trained = [given for given in example_inputs if _requires_grad(given)] if torch.is_grad_enabled() else []
        if trained:
            self.notices.warn_of_gradients(any(isinstance(given, nn.Parameter) for given in trained))
            return True
        cache = next(filter(None, map(other_cache, running_modules())), None)
        if cache is not None:
            self.notices.warn_of_other_cache(cache)
        return cache is not None

    def _broadcasting(
        self, captured: fx.GraphModule, regions: Sequence[Region], names: ModuleNames, example_inputs: Sequence[Any]
    ) -> BroadcastGraph | PieceGraph | None:
        """What runs in the place of a captured graph; `None` if nothing of it is broadcast."""
        broadcast = [region for region in regions if region.is_broadcast]
        if not broadcast:
            return None
        self.notices.warn_of_several_calls(broadcast)
        nodes_of = {region.module_id: region.nodes for region in broadcast}
        # adapters are switched within a generation; what has been counted and kept goes on
        adapters = {id(parameter) for module in running_modules() for parameter in adapter_parameters(module)}
        lasting = [None if id(given) in adapters else given for given in example_inputs]
        found = anchors(nodes_of, captured.graph.find_nodes(op="placeholder"), lasting)
        compiler = self._compiler(names)
        is_model = len(names.enclosing) <= 1
        unchanging: frozenset[int] | None = None
        if self._step_invariants:
            unchanging = frozenset()
            if is_model and names.model is not None:
                likely = likely_unchanging(captured, example_inputs, names.model)
                unchanging = likely - self._overwritten(example_inputs)
        lowerings = partial(Lowerings, compiler=compiler, lowering=self._lowering)

        def made(regions: Sequence[Region], is_captured: bool = True) -> BroadcastGraph:
            return BroadcastGraph(
                self.runtime,
                Variants(captured, regions, lowerings, self._passes.run_after),
                unchanging,
                found,
                example_inputs if is_captured else (),
                is_model,
                self.lowering == "cond",
                is_captured,
            )

        piece = next((region for region in broadcast if region.piece is not None), None)
        if piece is None:
            return made(regions)
        at = lambda place, is_captured: made(placed(regions, place), is_captured)  # noqa: E731
        return PieceGraph(self.runtime, piece, at, effects.process_groups(captured.graph))

    def _overwritten(self, example_inputs: Sequence[Any]) -> frozenset[int]:
        """Positions of the inputs that CUDA graphs returned: in each step the same tensor, with other values."""
        places = frozenset().union(*(each.run.overwrites for each in self.captured))
        return frozenset(i for i, given in enumerate(example_inputs) if not addresses([given]).isdisjoint(places))

    def _compiler(self, names: ModuleNames) -> Compiler:
        """What compiles the lowered graphs of one frame, once the passes behind the rewrite have run on them."""
        compiler: Compiler = self.compile_inner
        if self._regional and names.model is not None:
            classes = {type(block).__name__ for block in repeated_blocks(names.model)}
            compiler = RegionalCompiler(compiler, classes, self._lowering.fix_strides, self.notices.warn_of_whole)
        return lambda gm, example_inputs: compiler(self._passes.run_after(gm), example_inputs)

    def compile_inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a lowered graph with the inner compiler."""
        compiled = self._inner(gm, list(example_inputs))
        if not callable(compiled):
            raise TypeError(f"the inner compiler must return a callable, got {compiled!r}.")
        return compiled

    def reset(self) -> None:
        """Start a new generation in every request: all counters are 0 and all caches are given back."""
        self.runtime.reset()

    def warmup(self, timesteps: Iterable[float] | torch.Tensor | None = None) -> None:
        """Compile ahead of time what generations to come would stop for: a graph for each set of roles that reuse.

        Args:
            timesteps: those of the generations, in order; default: for whichever there may be.

        Raises:
            RuntimeError: if nothing has been captured yet.
        """
        if not self.graphs:
            raise RuntimeError("nothing was captured yet: call the model, or the pipeline, once, and then warmup().")
        # in a thousand steps every rule meets every state of the others in each window
        known = self.runtime.known_timesteps() if timesteps is None else falling_timesteps(timesteps)
        with torch.no_grad():
            for graph in list(self.graphs):
                graph.warmup(known or tuple(float(1000 - step) for step in range(1000)))

    def report(self, rounds: Sequence[Mapping[int | None, float]] = (), assumed: Sequence[float] = ()) -> Report:
        """What is broadcast, what is left alone and why, and what was computed and reused so far.

        Args:
            rounds: where the time of a step went, for each time that it was measured.
            assumed: timesteps for the schedule where not all are known; default: those seen.
        """
        told = self.notices.messages
        return report_of(self.runtime, self.captured, self.regions, told, rounds, assumed, self.policies)

    def newly_left_alone(self, known: int) -> list[str]:
        """Names of the attentions that the graphs compiled since there were `known` regions compute in every step.

        What is known of them from before, as when the model was another one still, is forgotten.
        """
        new = self.regions[known:]
        broadcast = {region.name for region in new if region.is_broadcast}
        left = {region.name: None for region in new if region.unsafe and region.name not in broadcast}
        if left:
            self.regions[:known] = [region for region in self.regions[:known] if region.name not in left]
        return list(left)


def _are_kept_alike(one: Policy, other: Policy) -> bool:
    return one.how == other.how and one.where.gated == other.where.gated


def _captured(region: Region) -> str:
    return "left alone" if region.policy is None else region.policy.describe()


def _rule(policies: Sequence[Policy], role: str, name: str) -> Rule | None:
    policy = assigned(policies, role, name)[1]
    return None if policy is None else policy.when


def backend_that_captured(model: nn.Module) -> PABBackend | None:
    """The backend that has captured a graph of a model, `None` if none has."""
    return next((each for each in list(_live) if any(id(model) == of.model for of in each.captured)), None)


def pab_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Broadcast attention: `torch.compile(model, backend=pab_backend)`, or `backend="pab"` by name.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: arguments of `PABBackend` (`config`, `inner`, `lowering`, `passes`, `timesteps`, `regional`)
            and fields of `PABConfig`; `inner_options` are Inductor's own options. Default: spatial attention
            every 2nd step. Give `timesteps` as a list where several models are compiled: Dynamo compares the options
            of two of them by `==`, which arrays and tensors refuse to answer.
        mode: Inductor's mode.

    Raises:
        ValueError: for an option that is none of these, or a bad value.

    Example:
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend="pab", options={"inner": "eager"})
    """
    return backend_of(options or {}, mode)(gm, example_inputs)


def _reset_backends() -> None:
    """Called by `torch.compiler.reset()`, which drops the compiled code of every model."""
    for backend in _backends.values():
        backend.clear()


pab_backend.reset = _reset_backends  # type: ignore[attr-defined]
_backends: dict[tuple[Any, ...], PABBackend] = {}


def backend_of(options: Mapping[str, Any], mode: str | None) -> PABBackend:
    """The backend for these options: one for equal ones, since state lives in it."""
    key = mode, as_key(options)
    if key not in _backends:
        given = {**options, "options": options["inner_options"]} if "inner_options" in options else dict(options)
        given.pop("inner_options", None)
        _backends[key] = PABBackend.of({**given, "mode": mode})
    return _backends[key]


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _reset_model(model: nn.Module) -> None:
    for backend in list(_live):
        backend.runtime.reset_model(model)


def _end_generation(pipeline: Any) -> None:
    for backend in list(_live):
        backend.runtime.end_generation(pipeline)


listen.on_reset.append(_reset_model)
listen.on_end.append(_end_generation)
