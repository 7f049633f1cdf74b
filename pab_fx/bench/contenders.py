"""What is compared: each column of the table, set up on a copy of the model that shares its weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import fx, nn
from torch.fx.node import map_aggregate

from .._torch import lookup_backend
from ..diffusers.configs import policies_of
from ..diffusers.hooks import is_attention
from ..enable import enable
from ..policy.policy import assigned
from ..policy.when import Rule, reused_calls
from ..policy.where import ATTENTION_ROLES


@dataclass(frozen=True)
class Plan:
    """Which attentions reuse in which step: the schedule of one generation, per role.

    Args:
        modules: qualified names of the attentions of each role that occurs.
        reuses: for each of these roles, whether it reuses, step by step.
    """

    modules: Mapping[str, tuple[str, ...]]
    reuses: Mapping[str, tuple[bool, ...]]

    @classmethod
    def of(cls, model: nn.Module, config: PyramidAttentionBroadcastConfig, timesteps: Sequence[float]) -> Plan:
        """The plan of a model under diffusers' config."""
        modules: dict[str, tuple[str, ...]] = {}
        policies, rules = policies_of(config), dict[str, Rule]()
        for name, module in model.named_modules():
            if is_attention(type(module)):
                kind = "cross" if getattr(module, "is_cross_attention", False) else "spatial"
                role, policy, _ = assigned(policies, kind, name)
                if policy is not None and policy.when is not None:
                    modules[role] = (*modules.get(role, ()), name)
                    rules[role] = policy.when
        return cls(modules, {role: reused_calls(rules[role], timesteps) for role in ATTENTION_ROLES if role in rules})

    @property
    def steps(self) -> tuple[frozenset[str], ...]:
        """The roles that reuse, for each step."""
        flags = zip(*self.reuses.values(), strict=True)
        return tuple(frozenset(itertools.compress(self.reuses, step)) for step in flags)

    @property
    def kinds(self) -> tuple[str, ...]:
        """For each step "computing" if no role reuses, "reusing" if all do, else "partly"."""
        names = {0: "computing", len(self.reuses): "reusing"}
        return tuple(names.get(len(roles), "partly") for roles in self.steps)

    @property
    def reused(self) -> int:
        """Calls of attentions that are answered from a cache in a generation."""
        return sum(len(self.modules[role]) * sum(steps) for role, steps in self.reuses.items())


class CountingCompiler:
    """An inner compiler that counts its graphs. As a backend, what it compiles is shared with no other contender."""

    def __init__(self, inner: str) -> None:
        self._compile = lookup_backend(inner)
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        self.graphs += 1
        compiled: Callable[..., Any] = self._compile(gm, list(example_inputs))
        return compiled


@dataclass(frozen=True)
class Setting:
    """What a contender is set up from.

    Args:
        model: whose weights all contenders share.
        config: of diffusers' hooks; `pab_fx` is given the same object.
        timesteps: of a generation.
        plan: what `config` reuses there.
        inputs: of each step.
        inner: the compiler.
        tell_timesteps: whether `pab_fx` knows the generation's timesteps, as it does under a pipeline.
    """

    model: nn.Module
    config: PyramidAttentionBroadcastConfig
    timesteps: tuple[float, ...]
    plan: Plan
    inputs: Sequence[Mapping[str, Any]]
    inner: str = "inductor"
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
        self.call: Callable[..., Any] = self.compiled(self.model) if is_compiled else self.model

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """A model compiled by this contender's own compiler, behind a function that no other compiled model has.

        Dynamo looks for code that fits among all that was compiled by an equal backend.
        """
        compiled: Callable[..., Any] = torch.compile(model, backend=lambda gm, inputs: self.compiler(gm, inputs))
        return compiled

    def at(self, step: int) -> Callable[..., Any]:
        """What runs in a step."""
        return self.call

    def after_step(self) -> None:
        """Look at what the step left behind, where that is how reuse is counted; not in timed generations."""

    def reset(self) -> None:
        """Begin a new generation, and give back what the last one kept."""

    @property
    def reused(self) -> int:
        """Calls of attentions that were answered from a cache so far."""
        return 0

    @property
    def held_bytes(self) -> int:
        """What it holds between generations, beside the weights."""
        return 0


class Hooked(Contender):
    """The model with diffusers' hooks."""

    def __init__(self, setting: Setting, is_compiled: bool = False) -> None:
        super().__init__(setting, is_compiled)
        apply_pyramid_attention_broadcast(self.model, setting.config)
        self._registries: list[Any] = [m._diffusers_hook for m in self.model.modules() if hasattr(m, "_diffusers_hook")]
        self._hooks: list[Any] = [each.hooks["pyramid_attention_broadcast"] for each in self._registries]
        self._reused = 0
        self._kept: list[int | None] = [None] * len(self._hooks)

    def after_step(self) -> None:
        """A hook that reuses leaves the very tensor that it had; one that computes makes the new one beside the old."""
        kept: list[int | None] = [_identity(hook.state.cache) for hook in self._hooks]
        self._reused += sum(new == old for new, old in zip(kept, self._kept, strict=True))
        self._kept = kept

    def reset(self) -> None:
        """As a pipeline does at its end."""
        for registry in self._registries:
            registry.reset_stateful_hooks(recurse=False)
        self._kept = [None] * len(self._hooks)

    @property
    def reused(self) -> int:
        """As seen by `after_step`."""
        return self._reused


def _identity(cache: Any) -> int:
    """A tuple may be made anew of the same tensors."""
    return id(cache[0] if isinstance(cache, (tuple, list)) else cache)


class Broadcasting(Contender):
    """The model under `pab_fx.enable`, with these options of its."""

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting)
        timesteps = setting.timesteps if setting.tell_timesteps else None
        self.handle = enable(self.model, setting.config, inner=self.compiler, timesteps=timesteps, **options)

    def reset(self) -> None:
        """As a pipeline does at its end."""
        self.handle.reset()

    @property
    def reused(self) -> int:
        """As reported."""
        return self.handle.report().reused


class Constant(nn.Module):
    """In place of an attention: returns what it is given to return, and computes nothing.

    Args:
        outputs: a tensor or a tuple of tensors.
    """

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._is_tuple = isinstance(outputs, tuple)
        for i, output in enumerate(outputs if self._is_tuple else (outputs,)):
            self.register_buffer(f"output_{i}", output, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same in every call."""
        outputs = tuple(self.buffers())
        return outputs if self._is_tuple else outputs[0]


class LowerBound(Contender):
    """What no reuse of attention can beat: the compiled model, and, where roles reuse, with constants in their place.

    One variant for each set of reusing roles that occurs, chosen per step by the plan.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        plan = setting.plan
        names = {name for role in plan.reuses for name in plan.modules[role]}
        self._constants = attention_outputs(self.model, names, setting.inputs[0])
        self._steps, self._modules = plan.steps, plan.modules
        self._calls = {roles: self.compiled(self.without(roles)) for roles in dict.fromkeys(plan.steps)}
        self._reused = 0

    def use(self, compiled: Callable[..., Any]) -> None:
        """Run computing steps with a compiled model that is there already, which saves a compilation."""
        self._calls[frozenset()] = compiled

    def without(self, roles: Collection[str]) -> nn.Module:
        """The model without the attentions of these roles."""
        model = sharing_weights(self.model)
        for name in (name for role in roles for name in self._modules[role]):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, self._constants[name])
        return model

    def at(self, step: int) -> Callable[..., Any]:
        """The variant for a step."""
        roles = self._steps[step]
        self._reused += sum(len(self._modules[role]) for role in roles)
        return self._calls[roles]

    @property
    def reused(self) -> int:
        """By the variants that were called."""
        return self._reused

    @property
    def held_bytes(self) -> int:
        """Its constants: what the others keep in their caches."""
        return sum(tensor.nbytes for constant in self._constants.values() for tensor in constant.buffers())


def attention_outputs(model: nn.Module, names: Collection[str], inputs: Mapping[str, Any]) -> dict[str, Constant]:
    """What the modules of these names return in one step, as constants."""
    found: dict[str, Constant] = {}

    def keep(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        found[name] = Constant(map_aggregate(outputs, torch.clone))  # type: ignore[arg-type]

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def sharing_weights(model: nn.Module) -> Any:
    """A copy of a model with modules of its own and the same parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


SETUPS: Mapping[str, Callable[[Setting], Contender]] = {
    "eager": Contender,
    "hooks": Hooked,
    "compile": lambda setting: Contender(setting, is_compiled=True),
    "pab_fx specialize": Broadcasting,
    "no invariants": lambda setting: Broadcasting(setting, step_invariants=False),
    "pab_fx cond": lambda setting: Broadcasting(setting, lowering="cond"),
    "regional": lambda setting: Broadcasting(setting, regional=True),
    "lower bound": LowerBound,
    "hooks + compile": lambda setting: Hooked(setting, is_compiled=True),
}
"""What sets each column up, in the order in which they run. The last one exhausts Dynamo's recompile limit."""

COLUMNS = tuple(SETUPS)
HOOKS_AND_COMPILE = COLUMNS[-1]
_SHORT = ("eager", "hooks", "compile", "specialize", "each-step", "cond", "regional", "bound", "both")
SHORT_NAMES = dict(zip(_SHORT, COLUMNS, strict=True))
"""As on the command line."""


def contender(column: str, setting: Setting) -> Contender:
    """Set a column up; nothing is compiled before its first step."""
    return SETUPS[column](setting)
