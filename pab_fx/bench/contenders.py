"""What is compared: each column of the table, set up on a copy of the model that shares its weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate

from ..enable import enable
from ..policy.where import BLOCKS
from .apart import CountingCompiler, Inner, give_own_code, sharing_weights
from .caches import Cache, Plan, blocks_of


@dataclass(frozen=True)
class Setting:
    """What a contender is set up from.

    Args:
        model: whose weights all contenders share.
        cache: the step cache.
        timesteps: of a generation.
        plan: what the cache reuses there.
        inputs: of each step.
        inner: the compiler.
        tell_timesteps: whether `pab_fx` knows the generation's timesteps, as it does under a pipeline.
    """

    model: nn.Module
    cache: Cache
    timesteps: tuple[float, ...]
    plan: Plan
    inputs: Sequence[Mapping[str, Any]]
    inner: Inner
    tell_timesteps: bool = True


class Contender:
    """One column: a model that is called step by step. Plain in itself; the others replace what they do differently.

    Args:
        setting: what it is set up from.
        is_compiled: whether the model is handed to the compiler.
    """

    def __init__(self, setting: Setting, is_compiled: bool = False) -> None:
        self.compiler = CountingCompiler(setting.inner)
        self.model = sharing_weights(setting.model)
        self._reused = 0
        self.call: Callable[..., Any] = self.compiled(self.model) if is_compiled else self.model

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """A model compiled by this contender's own compiler, which shares nothing with other compiled models.

        Dynamo looks for code that fits among all that was compiled by an equal backend. It counts recompiles by the
        model's code, and gives a code up that it cannot trace, as hooks may make it.
        """
        give_own_code(model)
        compiled: Callable[..., Any] = torch.compile(model, backend=self.backend())
        return compiled

    def backend(self) -> Callable[..., Any]:
        """This contender's own compiler, which is equal to no other backend."""
        return lambda gm, inputs: self.compiler(gm, inputs)

    def at(self, step: int) -> Callable[..., Any]:
        """What runs in a step."""
        return self.call

    def after_step(self) -> None:
        """Look at what the step left behind, where that is how reuse is counted; not in timed generations."""

    def reset(self) -> None:
        """Begin a new generation, and give back what the last one kept."""

    @property
    def reused(self) -> int:
        """Calls of parts that were answered from a cache so far."""
        return self._reused

    @property
    def held_bytes(self) -> int:
        """What it holds between generations, beside the weights."""
        return 0


class BlockByBlock(Contender):
    """The model whose repeated blocks are compiled one by one, as `compile_repeated_blocks` of diffusers does."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        blocks = [self.model.get_submodule(name) for name in blocks_of(self.model)]
        give_own_code(*blocks)
        backend = self.backend()
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)


class Hooked(Contender):
    """The model with diffusers' hooks."""

    def __init__(self, setting: Setting, is_compiled: bool = False) -> None:
        super().__init__(setting, is_compiled)
        self.model.enable_cache(setting.cache.hooks)
        found = [getattr(module, "_diffusers_hook", None) for module in self.model.modules()]
        self._hooks = [
            (MARKS[name], hook)
            for registry in found
            for name, hook in getattr(registry, "hooks", {}).items()
            if name in MARKS
        ]
        self._marks: list[Any] = [None] * len(self._hooks)

    def at(self, step: int) -> Callable[..., Any]:
        """In a cache context, as pipelines call it: some hooks keep their state by its name."""
        return self._in_context

    def _in_context(self, **inputs: Any) -> Any:
        with self.model.cache_context("bench"):
            return self.call(**inputs)

    def after_step(self) -> None:
        """Count the hooks whose mark is what it was."""
        marks = [mark(hook, before) for (mark, hook), before in zip(self._hooks, self._marks, strict=True)]
        self._reused += sum(new is before for new, before in zip(marks, self._marks, strict=True))
        self._marks = marks

    def reset(self) -> None:
        """As a pipeline does at its end."""
        self.model._reset_stateful_cache()
        self._marks = [None] * len(self._hooks)


def _cache_of_attention(hook: Any, before: Any) -> Any:
    cache = hook.state.cache
    return cache[0] if isinstance(cache, (tuple, list)) else cache  # a tuple may be made anew of the same tensors


def _last_update(hook: Any, before: Any) -> Any:
    (state,) = hook.state_manager._state_cache.values()
    return before if state.last_update_step < state.current_step else object()


def _decision(hook: Any, before: Any) -> Any:
    (state,) = hook.state_manager._state_cache.values()
    return object() if state.should_compute else before


MARKS: Mapping[str, Callable[[Any, Any], Any]] = {
    "pyramid_attention_broadcast": _cache_of_attention,
    "taylorseer_cache": _last_update,
    "mag_cache_leader_block_hook": _decision,
    "fbc_leader_block_hook": _decision,
}
"""By the name of a hook, for it and its mark before: an object that is another one after a step that computed."""


class CacheDit(Contender):
    """The model under cache-dit's DBCache; its documentation compiles it by `torch.compile` and nothing else."""

    def __init__(self, setting: Setting, is_compiled: bool = False) -> None:
        super().__init__(setting, is_compiled)
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it tells on stderr what it does
        import cache_dit

        fields, order = setting.cache.cache_dit or {}, setting.cache.order
        config = cache_dit.DBCacheConfig(
            **fields, enable_separate_cfg=False, num_inference_steps=len(setting.timesteps)
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        self._configs = {"cache_config": config, "calibrator_config": calibrator}
        self._refresh = cache_dit.refresh_context
        cache_dit.enable_cache(self.model, **self._configs)

    def after_step(self) -> None:
        """Count the step if it is one of those that it has answered from its cache."""
        state = self.model._context_manager.get_context(*self.model._context_names)
        self._reused += state.get_current_step() in state.get_cached_steps()

    def reset(self) -> None:
        """As it documents it for transformers without a pipeline."""
        self._refresh(self.model, **self._configs)


class Broadcasting(Contender):
    """The model under `pab_fx.enable`, with these options of its."""

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting)
        timesteps = setting.timesteps if setting.tell_timesteps else None
        self.handle = enable(self.model, setting.cache.config, inner=self.compiler, timesteps=timesteps, **options)

    def reset(self) -> None:
        """As a pipeline does at its end."""
        self.handle.reset()

    @property
    def reused(self) -> int:
        """As reported."""
        return self.handle.report().reused


class Constant(nn.Module):
    """In place of a module: returns what it is given to return, and computes nothing.

    Args:
        outputs: a tensor or a tuple of tensors.
        handed_on: for each of them the argument that is returned instead, by position or name; `None` for none.
    """

    def __init__(self, outputs: Any, handed_on: Sequence[int | str | None] = ()) -> None:
        super().__init__()
        self._is_tuple, self._handed_on = isinstance(outputs, tuple), tuple(handed_on)
        for i, output in enumerate(outputs if self._is_tuple else (outputs,)):
            self.register_buffer(f"output_{i}", output, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same in every call, but for what is handed on."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        places = self._handed_on or (None,) * len(tuple(self.buffers()))
        outputs = tuple(given.get(at, kept) for at, kept in zip(places, self.buffers(), strict=True))
        return outputs if self._is_tuple else outputs[0]


class LowerBound(Contender):
    """What no reuse can beat: the compiled model, and, where roles reuse, with constants in place of their modules.

    Blocks that reuse as a whole hand on what they are given: what leads up to them is needed all the same. One variant
    for each set of reusing roles that occurs, chosen per step by the plan: it measures no signal and waits for none.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        plan = setting.plan
        names = {name for role in plan.reuses for name in plan.modules[role]}
        self._constants = outputs_of(self.model, names, setting.inputs[0], BLOCKS in plan.modules)
        self._plan, self._roles, self._saved = plan, plan.steps, plan.reused
        self._calls = {roles: self.compiled(self.without(roles)) for roles in dict.fromkeys(plan.steps)}

    def use(self, compiled: Callable[..., Any]) -> None:
        """Run computing steps with a compiled model that is there already, which saves a compilation."""
        self._calls[frozenset()] = compiled

    def without(self, roles: Collection[str]) -> nn.Module:
        """The model without the parts of these roles; the model itself may be one."""
        model = sharing_weights(self.model)
        for name in (name for role in roles for name in self._plan.modules[role]):
            if not name:
                return self._constants[name]
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, self._constants[name])
        return model

    def at(self, step: int) -> Callable[..., Any]:
        """The variant for a step."""
        self._reused += self._saved[step]
        return self._calls[self._roles[step]]

    @property
    def held_bytes(self) -> int:
        """Its constants: what the others keep in their caches."""
        return sum(tensor.nbytes for constant in self._constants.values() for tensor in constant.buffers())


def outputs_of(
    model: nn.Module, names: Collection[str], inputs: Mapping[str, Any], hand_on: bool = False
) -> dict[str, Constant]:
    """What the modules of these names return in one step, as constants; or the arguments that look like it."""
    found: dict[str, Constant] = {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        shapes = {at: each.shape for at, each in given.items() if isinstance(each, torch.Tensor)}
        each_output = outputs if isinstance(outputs, tuple) else (outputs,)
        places = [next((at for at, shape in shapes.items() if shape == each.shape), None) for each in each_output]
        found[name] = Constant(map_aggregate(outputs, torch.clone), places if hand_on else ())  # type: ignore[arg-type]

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


SETUPS: Mapping[str, Callable[[Setting], Contender]] = {
    "eager": Contender,
    "hooks": Hooked,
    "cache-dit": CacheDit,
    "compile": lambda setting: Contender(setting, is_compiled=True),
    "compile regional": BlockByBlock,
    "pab_fx specialize": Broadcasting,
    "no invariants": lambda setting: Broadcasting(setting, step_invariants=False),
    "pab_fx cond": lambda setting: Broadcasting(setting, lowering="cond"),
    "regional": lambda setting: Broadcasting(setting, regional=True),
    "lower bound": LowerBound,
    "cache-dit + compile": lambda setting: CacheDit(setting, is_compiled=True),
    "hooks + compile": lambda setting: Hooked(setting, is_compiled=True),
}
"""What sets each column up, in the order in which they run."""

COLUMNS = tuple(SETUPS)
CACHE_DIT_AND_COMPILE, HOOKS_AND_COMPILE = COLUMNS[-2:]
SHORT_NAMES = {
    "eager": "eager",
    "hooks": "hooks",
    "cache-dit": "cache-dit",
    "compile": "compile",
    "compile-regional": "compile regional",
    "specialize": "pab_fx specialize",
    "each-step": "no invariants",
    "cond": "pab_fx cond",
    "regional": "regional",
    "bound": "lower bound",
    "cache-dit-compile": CACHE_DIT_AND_COMPILE,
    "both": HOOKS_AND_COMPILE,
}
"""As on the command line, in the order of `COLUMNS`."""

PLAIN = ("eager", "compile", "compile regional")
"""The columns that reuse nothing."""

CACHE_DIT = ("cache-dit", CACHE_DIT_AND_COMPILE)
"""The columns of cache-dit."""


def is_ours(column: str) -> bool:
    """Whether a column is of this package, and none that it is compared with."""
    return column not in (*PLAIN, *CACHE_DIT, "hooks", HOOKS_AND_COMPILE)


def does_the_same(column: str, cache: Cache) -> bool:
    """Whether a column has words for this cache."""
    if column in CACHE_DIT:
        return cache.cache_dit is not None
    return column not in ("hooks", HOOKS_AND_COMPILE) or cache.hooks is not None


def is_installed(column: str) -> bool:
    """Whether what a column needs beside this package's own dependencies is there."""
    return column not in CACHE_DIT or importlib.util.find_spec("cache_dit") is not None


def contender(column: str, setting: Setting) -> Contender:
    """Set a column up; nothing is compiled before its first step."""
    return SETUPS[column](setting)


def reference(setting: Setting) -> Contender:
    """Whose outputs all others are to have: the hooks, or where none do the same `pab_fx` without a compiler."""
    return Hooked(setting) if setting.cache.hooks else Broadcasting(dataclasses.replace(setting, inner=Inner("eager")))
