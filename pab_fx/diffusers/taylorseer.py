"""What diffusers' `TaylorSeerCacheConfig` says, as policies (`diffusers/hooks/taylorseer_cache.py`, seen in 0.42)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers.hooks
import torch

from ..policy.checks import check_integer, checked_dtype, checked_identifiers
from ..policy.how import HIGHEST_ORDER, How, Scalars, Taylor, Tensors
from ..policy.policy import Policy
from ..policy.when import Progress, Rule, Step
from ..policy.where import NamedModules

TaylorSeerCacheConfig: Any = getattr(diffusers.hooks, "TaylorSeerCacheConfig", ())
"""The config; nothing is one with a diffusers that has none."""

ATTENTIONS = (
    "^blocks.*attn",
    "^transformer_blocks.*attn",
    "^single_transformer_blocks.*attn",
    "^temporal_transformer_blocks.*attn",
)
"""What is forecast where nothing is said."""

LITE = {"skipped": (r"^[^.]*block[^.]*\.[^.]+$",), "cached": ("^proj_out$",)}
"""What is skipped and forecast in lite mode."""


@dataclass(frozen=True)
class Interval(Rule):
    """When the hooks compute: before a call, at every `interval`-th one after it, and from another one on.

    Args:
        interval, before, after: as `cache_interval`, `disable_cache_before_step` and `disable_cache_after_step`.

    Example:
        >>> from pab_fx.policy.when import reused_calls
        >>> reused_calls(Interval(3, 2, 8), range(10, 0, -1))
        (False, False, True, False, True, True, False, True, False, False)
    """

    interval: int
    before: int
    after: int | None = None

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Between the calls that compute."""
        due = (step.n >= self.before) & ((step.n - self.before - 1) % self.interval != 0)
        return due if self.after is None else due & (step.n < self.after)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`: timesteps do not matter."""
        return bool(self.decide(step, progress))

    def describe(self) -> str:
        """The rule in words."""
        until = "" if self.after is None else f", and from call {self.after} on"
        return f"computed in {self.before} calls, then in one of {self.interval}{until}"


class Factors(Taylor):
    """The hooks' forecast: `Taylor`, whose kept output is rounded to the factors' dtype as well."""

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """As `Taylor.update`; what is kept of an output has its own dtype still, which tells that of the forecast."""
        kept = list(super().update(slots, inputs, outputs, scalars))
        for i in range(0, len(kept), self.order + 1):
            rounded = kept[i] if self.dtype is None else kept[i].to(self.dtype).type_as(kept[i])
            kept[i] = rounded + 0.0  # -0.0 too
        return tuple(kept)


@dataclass(frozen=True)
class Zeros(How):
    """What the hooks yield for a module that they skip: zeros, of the shape of what enters it."""

    reads_streams = True

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """One element: that something was computed."""
        return (outputs[0].flatten()[:1],)

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """That element."""
        return (torch.zeros_like(outputs[0].flatten()[:1]),)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Zeros."""
        return tuple(map(torch.zeros_like, inputs))

    def describe(self) -> str:
        """How it is read in words."""
        return "as zeros"


def policies_of_taylorseer(config: Any) -> tuple[Policy, ...]:
    """What the hooks of that config do, as policies.

    Raises:
        ValueError: for fields that make no sense.
    """
    check_integer("cache_interval", config.cache_interval)
    check_integer("disable_cache_before_step", config.disable_cache_before_step, least=0)
    if config.disable_cache_after_step is not None:
        check_integer("disable_cache_after_step", config.disable_cache_after_step, least=0)
    check_integer("max_order", config.max_order, least=0, most=HIGHEST_ORDER)
    dtype = checked_dtype("taylor_factors_dtype", config.taylor_factors_dtype)
    skipped: Any = config.skip_predict_identifiers or ()
    cached: Any = config.cache_identifiers or ATTENTIONS
    if config.use_lite_mode:
        skipped, cached = LITE["skipped"], LITE["cached"]
    rule = Interval(config.cache_interval, config.disable_cache_before_step, config.disable_cache_after_step)
    forecast = NamedModules(checked_identifiers("cache_identifiers", cached))
    left_out = NamedModules(checked_identifiers("skip_predict_identifiers", skipped))
    policies = (Policy(left_out, rule, Zeros()), Policy(forecast, rule, Factors(config.max_order, dtype)))
    return policies if skipped else policies[1:]
