"""The Dynamo backend: `torch.compile(model, backend=pab_backend)`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._torch import inputs_that_are_state
from .compile.lowering import Compiler, Lowerings
from .compile.regional import RegionalCompiler
from .diffusers import hooks as _diffusers
from .graph.dataflow import STATE, is_number
from .graph.modules import ModuleNames, repeated_blocks
from .notices import Notices
from .options import cache_device_of, cache_dtype_of, falling_timesteps, inner_compiler, records_cuda_graphs
from .passes.numbers import fix_numbers
from .passes.rewrite import copy_of
from .passes.users import Pass, Passes
from .policy.config import PABConfig
from .policy.when import Rule
from .report.account import report_of
from .report.captured import Captured, Plain, frame_of
from .report.data import Report
from .report.strips import SeenTimesteps
from .run.clock import PipelineClock, request_of, running_pipeline
from .run.generation import Variants, likely_unchanging
from .run.graph import BroadcastGraph, anchors
from .run.holding import Static, holder_for
from .run.running import TiedParameters, module_names, running_modules
from .run.state import StateStore, TensorSpec
from .select.region import Region
from .select.tag import tag

logger = logging.getLogger(__name__)

LOWERINGS = ("specialize", "cond")
_live: weakref.WeakSet[PABBackend] = weakref.WeakSet()


class PABBackend:
    """A backend of `torch.compile` that broadcasts attention and hands the rest to an inner compiler.

    Args:
        config: a `PABConfig` (default: spatial attention every 2nd step in (100, 800)) or diffusers'
            `PyramidAttentionBroadcastConfig`, with which roles and outputs are those of its hooks.
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

    Raises:
        ValueError: for a bad config, an unknown lowering, an inner backend that is not registered, or a `regional`
            that is no bool.

    Example:
        >>> backend = PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    """

    def __init__(
        self,
        config: PABConfig | PyramidAttentionBroadcastConfig | None = None,
        inner: str | Callable[..., Any] = "inductor",
        lowering: str = "specialize",
        passes: Sequence[Pass] = (),
        timesteps: Iterable[float] | torch.Tensor | Callable[[], Any] | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        regional: bool = False,
        cache_dtype: torch.dtype | str | None = None,
        cache_device: torch.device | str | None = None,
        step_invariants: bool = True,
    ) -> None:
        self.config = _diffusers.checked_config(config)
        if lowering not in LOWERINGS:
            raise ValueError(f"lowering={lowering!r} is unknown; it is one of {', '.join(map(repr, LOWERINGS))}.")
        self.lowering = lowering
        self.passes = Passes.of(passes)
        self.timesteps = timesteps if callable(timesteps) or timesteps is None else falling_timesteps(timesteps)
        self.inner = inner
        self._inner = inner_compiler(inner, mode, options)
        for name, given in (("regional", regional), ("step_invariants", step_invariants)):
            if not isinstance(given, bool):
                raise ValueError(f"{name} must be True or False, got {given!r}.")
        self.regional, self.step_invariants = regional, step_invariants
        self.cache_dtype, cache_device = cache_dtype_of(cache_dtype), cache_device_of(cache_device)
        self.has_cuda_graphs = records_cuda_graphs(inner, mode, options)
        self.holder = holder_for(cache_device, self.has_cuda_graphs)
        self.runs_eagerly = inner == "eager"
        self.rule_of: Callable[[str, str], Rule | None] | None = None
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.clear()
        _diffusers.listen()
        _live.add(self)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PABBackend:
        """A backend from its arguments and, in place of `config`, fields of `PABConfig`.

        Raises:
            ValueError: for a name that is neither, naming all that there are.

        Example:
            >>> PABBackend.of({"inner": "eager", "spatial_attention_block_skip_range": 3}).config.skip_range("spatial")
            3
        """
        arguments = [name for name in inspect.signature(cls).parameters if name in options]
        fields = {name: value for name, value in options.items() if name not in arguments}
        known = {field.name for field in dataclasses.fields(PABConfig)}
        for name in fields:
            if name not in known:
                names = ", ".join([*inspect.signature(cls).parameters, *sorted(known)])
                raise ValueError(f"unknown option {name!r} for the backend 'pab'; it takes {names}.")
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
        self.rule_of = rule_of
        self._forget_state()

    def _forget_state(self) -> None:
        self.state = StateStore()
        self._stores: Any = WeakIdKeyDictionary()
        self._spare: list[StateStore] = []  # of requests that are over

    def clear(self) -> None:
        """Forget every graph and all state, as for a new backend."""
        self._forget_state()
        self._clocks: Any = WeakIdKeyDictionary()
        self.counts: Counter[tuple[str, bool]] = Counter()  # of each role, and whether they reused
        self.graphs: list[BroadcastGraph] = []
        self.regions: list[Region] = []
        self.captured: list[Captured] = []
        self.seen = SeenTimesteps()
        self.tied = TiedParameters()
        self.notices = Notices()
        self._unread: dict[TensorSpec, torch.Tensor] = {}
        self.calls = 0  # of graphs that broadcast
        self.computed_once = 0  # how often what does not change was computed, and how often taken
        self.taken_as_kept = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph: tag, rewrite, lower, hand to the inner compiler."""
        inputs = gm.graph.find_nodes(op="placeholder")
        for i in inputs_that_are_state():
            inputs[i].meta[STATE] = True
        names = module_names(tuple(self.roots))
        gm = self.passes.run_before(gm, partial(tag, config=self.config, names=names))
        if torch.is_grad_enabled() and any(_requires_grad(value) for value in example_inputs):
            self.notices.warn_of_gradients()
            return self.compile_inner(self.passes.run_after(gm), example_inputs)
        around = running_modules()
        cache = next(filter(None, map(_diffusers.other_cache, around)), None)
        if cache is not None:
            self.notices.warn_of_other_cache(cache)
            return self.compile_inner(self.passes.run_after(gm), example_inputs)
        rewritten = fix_numbers(copy_of(gm), everywhere=self.lowering == "cond")
        regions = tag(rewritten, self.config, names)
        if self.lowering == "cond":
            regions = tuple(_without_numbers(region) for region in regions)
        self.regions += regions
        nodes_of = {region.module_id: region.nodes for region in regions if region.is_broadcast}
        if not nodes_of:
            if not any(region.is_broadcast for region in self.regions):
                self.notices.warn_of_nothing(regions)
            plain = Plain(self._compiler(names)(gm, example_inputs), self.has_cuda_graphs)
            self.captured.append(Captured(rewritten, regions, frame_of(names), id(names.model), plain))
            return plain
        self.notices.warn_of_several_calls([region for region in regions if region.is_broadcast])
        inputs = rewritten.graph.find_nodes(op="placeholder")
        # adapters are switched within a generation; what has been counted and kept goes on
        adapters = {id(parameter) for module in around for parameter in _diffusers.adapter_parameters(module)}
        lasting = [None if id(given) in adapters else given for given in example_inputs]
        found = anchors(nodes_of, inputs, lasting)
        compiler = self._compiler(names)
        is_model = len(names.enclosing) <= 1
        unchanging: frozenset[int] | None = None
        if self.step_invariants:
            unchanging = frozenset()
            if is_model and names.model is not None:
                unchanging = likely_unchanging(rewritten, example_inputs, names.model, self._overwritten())
        variants = Variants(rewritten, regions, partial(self._lowerings, compiler), self.passes.run_after)
        graph = BroadcastGraph(self, variants, unchanging, found, example_inputs, is_model)
        self.graphs.append(graph)
        self.captured.append(Captured(rewritten, regions, frame_of(names), id(names.model), graph))
        return graph

    def _overwritten(self) -> frozenset[int]:
        """Where tensors lie that CUDA graphs returned: the same ones in each step, with other values."""
        return frozenset().union(*(each.run.overwrites for each in self.captured))

    def _lowerings(self, compiler: Compiler, rewritten: fx.GraphModule) -> Lowerings:
        static = isinstance(self.holder, Static)
        return Lowerings(rewritten, compiler, not self.runs_eagerly, self.cache_dtype, static)

    def _compiler(self, names: ModuleNames) -> Compiler:
        """What compiles the lowered graphs of one frame, once the passes behind the rewrite have run on them."""
        compiler: Compiler = self.compile_inner
        if self.regional and names.model is not None:
            classes = {type(block).__name__ for block in repeated_blocks(names.model)}
            compiler = RegionalCompiler(compiler, classes, not self.runs_eagerly, self.notices.warn_of_whole)
        return lambda gm, example_inputs: compiler(self.passes.run_after(gm), example_inputs)

    def compile_inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a lowered graph with the inner compiler."""
        compiled = self._inner(gm, list(example_inputs))
        if not callable(compiled):
            raise TypeError(f"the inner compiler must return a callable, got {compiled!r}.")
        return compiled

    def known_timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of the running generation, `None` if they were not given."""
        return falling_timesteps(self.timesteps()) if callable(self.timesteps) else self.timesteps

    def store(self, request: Any) -> StateStore:
        """The state of a request (a session or a pipeline), or what belongs to none; it goes with the request."""
        if request is None:
            return self.state
        found = self._stores.get(request)
        return self._begun(request) if found is None else found

    def _begun(self, request: Any) -> StateStore:
        """The state of a new request. With CUDA graphs it takes over the buffers of a request that is over.

        The graphs were recorded for their addresses: with others, each request would have them recorded again.
        """
        try:
            new = self._spare.pop()
        except IndexError:
            new = StateStore()
        found: StateStore = self._stores.setdefault(request, new)
        if found is new and isinstance(self.holder, Static):
            weakref.finalize(request, _give_back, weakref.ref(new), self._spare).atexit = False
        return found

    def clock(self, pipeline: Any) -> PipelineClock:
        """The clock that follows a pipeline."""
        found = self._clocks.get(pipeline)
        return found or self._clocks.setdefault(pipeline, PipelineClock(self.config.current_timestep_callback))

    def stores(self) -> list[StateStore]:
        """The state of every request, and what belongs to none."""
        return [self.state, *self._stores.data.copy().values()]  # another thread may begin a request meanwhile

    def reset(self) -> None:
        """Start a new generation in every request: all counters are 0 and all caches are given back."""
        for store in self.stores():
            store.reset()

    def reset_model(self, model: nn.Module) -> None:
        """`reset` for the modules of one model, in the request that runs, or in all if none does."""
        pipeline = running_pipeline()
        request = request_of(pipeline)
        stores = self.stores() if request is None else [self.store(request)]
        for store in stores:
            store.reset([*model.parameters(), *model.modules()])

    def end_generation(self, pipeline: Any) -> None:
        """A pipeline's call is over: give back what its request keeps."""
        if pipeline in self._clocks:
            self.clock(pipeline).end()
            self.store(request_of(pipeline)).reset()

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
        known = self.known_timesteps() if timesteps is None else falling_timesteps(timesteps)
        with torch.no_grad():
            for graph in list(self.graphs):
                graph.warmup(known or tuple(float(1000 - step) for step in range(1000)))

    def report(self) -> Report:
        """What is broadcast, what is left alone and why, and what was computed and reused so far."""
        return report_of(self)

    def unread(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor to pass where a cache is demanded but not read; its values are arbitrary."""
        if spec not in self._unread:
            self._unread[spec] = spec.empty()
        return self._unread[spec]

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
            every 2nd step.
        mode: Inductor's mode.

    Raises:
        ValueError: for an option that is none of these, or a bad value.

    Example:
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend="pab", options={"inner": "eager"})
    """
    return _backend_of(options or {}, mode)(gm, example_inputs)


def _reset_backends() -> None:
    """Called by `torch.compiler.reset()`, which drops the compiled code of every model."""
    for backend in _backends.values():
        backend.clear()


pab_backend.reset = _reset_backends  # type: ignore[attr-defined]
_backends: dict[tuple[Any, ...], PABBackend] = {}


def _backend_of(options: Mapping[str, Any], mode: str | None) -> PABBackend:
    """The backend for these options: one for equal ones, since state lives in it."""
    key = (mode, *sorted((name, _hashable(value)) for name, value in options.items()))
    if key not in _backends:
        given = {**options, "options": options["inner_options"]} if "inner_options" in options else dict(options)
        given.pop("inner_options", None)
        _backends[key] = PABBackend.of({**given, "mode": mode})
    return _backends[key]


def _hashable(value: Any) -> Any:
    """A key for an option's value: by type and value for plain data, by identity for other objects."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (str, int, float, tuple, list, dict, set, range, type(None))):
        return f"{type(value).__name__} {value!r}"
    return id(value)


def _without_numbers(region: Region) -> Region:
    """The region, unsafe if it reads a number that is no constant: a `cond` takes tensors and integers."""
    inside = set(region.nodes)
    outside = {source for node in region.nodes for source in node.all_input_nodes if source not in inside}
    numbers = [source.name for source in outside if is_number(source)]
    if region.is_broadcast and numbers:
        return dataclasses.replace(region, unsafe=f"lowering='cond' cannot hand it the number {numbers[0]}")
    return region


def _give_back(state: weakref.ref[StateStore], spare: list[StateStore]) -> None:
    """Called when a request is over, before its state goes."""
    found = state()
    if found is not None:
        found.reset()
        spare.append(found)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _reset_model(model: nn.Module) -> None:
    for backend in list(_live):
        backend.reset_model(model)


def _end_generation(pipeline: Any) -> None:
    for backend in list(_live):
        backend.end_generation(pipeline)


_diffusers.on_reset.append(_reset_model)
_diffusers.on_end.append(_end_generation)
