"""The step caches that are timed: what `pab_fx` is given, what others are given for the same, and what all reuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
from torch import nn

from ..diffusers.configs import policies_of
from ..diffusers.hooks import is_attention
from ..diffusers.taylorseer import LITE
from ..policy.change import Change
from ..policy.config import PABConfig
from ..policy.how import RatedResidual, Residual, Taylor
from ..policy.policy import Policy, assigned
from ..policy.when import Every, reused_calls
from ..policy.where import BLOCKS, MODEL, MODULES, ROLES, Blocks, Model, NamedModules
from .models import BenchModel, diffusers_config


@dataclass(frozen=True)
class Cache:
    """A step cache in the words of all.

    Args:
        config: for `pab_fx.enable`.
        hooks: the config of diffusers' hooks that do the same, `None` if none do.
        cache_dit: fields of cache-dit's `DBCacheConfig` that say the same, `None` if none do.
        order: of cache-dit's TaylorSeer beside those, 0 for none.
        spacing: how far apart timesteps are, as a share of what they are in a whole generation.
    """

    config: Any
    hooks: Any = None
    cache_dit: Mapping[str, Any] | None = None
    order: int = 0
    spacing: float = 1.0


THRESHOLD, SPACING = 0.99, 1 / 200
"""Of rules with a signal: every change keeps to the threshold, and each step measures to decide.

With random weights changes tell nothing, and a plan that is known before makes the same decisions in every column. They
are too large for that between steps of a usual distance, and from a threshold of 1 on cache-dit would not measure.
"""


def _pab(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    config = diffusers_config(pab or model.pab, clock)
    return Cache(config, config)


def _blocks(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    return Cache(Policy(Blocks(), Every(3), Taylor(2, of=Residual())))


def _taylorseer(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    """Lite mode: blocks are skipped, and the last projection's output is forecast."""
    config = diffusers.TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=model.dtype, use_lite_mode=True)
    return Cache(config, config)


def _magcache(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    """The ratios are Flux's for every model: with random weights none are right, and they only decide.

    The hooks fail with Latte, whose spatial and temporal blocks have streams of different shapes.
    """
    if not hasattr(diffusers, "MagCacheConfig"):
        raise ValueError(f"diffusers {diffusers.__version__} has no MagCacheConfig: the policy magcache needs 0.37.")
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    config = diffusers.MagCacheConfig(threshold=0.24, num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS)
    return Cache(config, None if model.name == "latte" else config)


def _firstblock(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    """All steps but the first reuse. The hooks fail with Latte, as MagCache's do; cache-dit does not know it."""
    config = diffusers.FirstBlockCacheConfig(threshold=THRESHOLD)
    if model.name == "latte":
        return Cache(config, spacing=SPACING)
    return Cache(config, config, _dbcache_fields(first=1, last=0, warmup=1), spacing=SPACING)


def _dbcache(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any, order: int = 0) -> Cache:
    """The first and the last block run in every step. cache-dit does not know Latte.

    cache-dit's TaylorSeer has its first difference in the fourth step, where `Taylor` has it in the second one: with
    four steps at the beginning that compute, they forecast alike at order 1.
    """
    how = Taylor(order, of=Residual()) if order else Residual()
    policy = Policy(Blocks(1, -1), Change(Blocks(0, 1), THRESHOLD, warmup=4, max_skips=3), how)
    fields = None if model.name == "latte" else _dbcache_fields(first=1, last=1, warmup=4, max_skips=3)
    return Cache(policy, None, fields, order, SPACING)


def _dbcache_fields(first: int, last: int, warmup: int, max_skips: int = -1) -> Mapping[str, Any]:
    return {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "residual_diff_threshold": THRESHOLD,
        "max_warmup_steps": warmup,
        "max_continuous_cached_steps": max_skips,
    }


def _easycache(model: BenchModel, pab: PABConfig | None, steps: int, clock: Any) -> Cache:
    """The whole model, by how far its sample has changed, which has no upper limit: here no change is too large."""
    rule = Change(Model(), 1e9, accumulate=True, warmup=2, max_skips=3, by_rate=True)
    return Cache(Policy(Model(), rule, RatedResidual()))


CACHES: Mapping[str, Callable[[BenchModel, PABConfig | None, int, Any], Cache]] = {
    "pab": _pab,
    "blocks": _blocks,
    "taylorseer": _taylorseer,
    "magcache": _magcache,
    "firstblock": _firstblock,
    "dbcache": _dbcache,
    "dbcache-taylorseer": partial(_dbcache, order=1),
    "easycache": _easycache,
}
"""By name on the command line, made for a model, ranges of PAB (`None`: the model's), steps, and a clock."""


EVERY_BLOCK = NamedModules(LITE["skipped"])


def blocks_of(model: nn.Module) -> list[str]:
    """Names of a model's repeated blocks."""
    return [name for name, _ in model.named_modules() if EVERY_BLOCK.takes(MODULES, name)]


@dataclass(frozen=True)
class Plan:
    """Which parts of a model reuse in which step: the schedule of one generation, per role.

    Args:
        modules: qualified names of the modules that a role's parts are made of.
        parts: how many parts that is: each module, or all blocks together.
        reuses: for each of these roles, whether it reuses, step by step.
        said: that in words.
    """

    modules: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, int]
    reuses: Mapping[str, tuple[bool, ...]]
    said: str

    @classmethod
    def of(cls, model: nn.Module, config: Any, timesteps: Sequence[float]) -> Plan:
        """The plan of a model under a config of `CACHES`."""
        policies = policies_of(config)
        modules: dict[str, list[str]] = {}
        governing: dict[str, list[Policy]] = {}
        for kind, part, name in _candidates(model, policies[0].where):
            role, policy, _ = assigned(policies, kind, part)
            if policy is not None:
                modules.setdefault(role, []).append(name)
                governing.setdefault(role, []).append(policy)
        roles = {role: dict.fromkeys(governing[role]) for role in ROLES if role in governing}
        rules = {role: next(iter(policies)).when for role, policies in roles.items()}
        return cls(
            {role: tuple(names) for role, names in modules.items()},
            {role: 1 if role in (BLOCKS, MODEL) else len(names) for role, names in modules.items()},
            {role: reused_calls(rule, timesteps) for role, rule in rules.items() if rule},
            ", ".join(f"{role} {' or '.join(map(_said, policies))}" for role, policies in roles.items()),
        )

    @property
    def steps(self) -> tuple[frozenset[str], ...]:
        """The roles that reuse, for each step."""
        flags = zip(*self.reuses.values(), strict=True)
        return tuple(frozenset(itertools.compress(self.reuses, step)) for step in flags)

    @property
    def reused(self) -> tuple[int, ...]:
        """For each step, the calls of parts that are answered from a cache."""
        return tuple(sum(self.parts[role] for role in roles) for roles in self.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """For each step "computing" if no role reuses, "reusing" if all do, else "partly"."""
        names = {0: "computing", len(self.reuses): "reusing"}
        return tuple(names.get(len(roles), "partly") for roles in self.steps)


def _said(policy: Policy) -> str:
    return policy.describe().removeprefix("computed ")


def _candidates(model: nn.Module, where: Any) -> Iterator[tuple[str, str, str]]:
    """Kind and name of a part that policies like this one may be for, and the name of its module, or of one of them."""
    if isinstance(where, Model):
        yield MODEL, "", ""
        return
    if isinstance(where, Blocks):
        blocks = blocks_of(model)[where.first : where.last]
        yield from ((BLOCKS, where.label, name) for name in blocks)
        return
    for name, module in model.named_modules():
        if isinstance(where, NamedModules):
            yield MODULES, name, name
        elif is_attention(type(module)):
            yield "cross" if getattr(module, "is_cross_attention", False) else "spatial", name, name
