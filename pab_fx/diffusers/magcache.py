"""What diffusers' `MagCacheConfig` says, as policies (`diffusers/hooks/mag_cache.py`, seen in 0.42)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import diffusers.hooks
import torch

from ..policy.checks import check_integer, is_number
from ..policy.how import Residual, Scalars, Tensors
from ..policy.lists import Listed, steps_of_small_change
from ..policy.policy import Policy
from ..policy.when import Progress, Rule, Step
from ..policy.where import PassedBlocks

MagCacheConfig: Any = getattr(diffusers.hooks, "MagCacheConfig", ())
"""The config; nothing is one with a diffusers that has none."""


@dataclass(frozen=True)
class Cycle(Listed):
    """When the hooks reuse: at the same calls of every `of`, since they count those of a generation of that length.

    Args:
        reused: numbers of the calls that reuse.
        of: the config's `num_inference_steps`.

    Example:
        >>> from pab_fx.policy.when import reused_calls
        >>> reused_calls(Cycle((1, 2), of=3), range(6, 0, -1))
        (False, True, True, False, True, True)
    """

    reused: tuple[int, ...]
    of: int

    @property
    def listed(self) -> int:
        """The number of steps that the list is for."""
        return self.of

    def reusing(self, of: int) -> tuple[int, ...]:
        """The steps that reuse, however many steps the generation has."""
        return self.reused

    def decide(self, step: Step, progress: Any, signal: Any = None) -> Any:
        """At the calls that are listed."""
        return super().decide(step._replace(n=step.n % self.of), progress, signal)

    def mismatch(self, t: float, timesteps: Any) -> str | None:
        """As `Rule.mismatch`: the generation has another number of steps than the config says."""
        if not timesteps or len(timesteps) == self.of:
            return None
        return (
            f"the generation has {len(timesteps)} steps, and the config says num_inference_steps={self.of}: its ratios "
            "are taken for other steps than they were measured in."
        )

    def describe(self) -> str:
        """The rule in words."""
        return f"computed in {self.of - len(self.reused)} of {self.of} steps, by the ratios of residuals"


@dataclass(frozen=True)
class Measuring(Rule):
    """Compute every step, and keep what was measured, also in the last one."""

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Never."""
        return step.n < 0

    def keeps(self, step: Step, progress: Progress, next_t: float | None) -> bool:
        """Always."""
        return True

    def describe(self) -> str:
        """The rule in words."""
        return "computed every step, to measure the ratios of residuals"


@dataclass(frozen=True)
class Magnitudes(Residual):
    """The residual, and beside it the ratios of its magnitude to that of the step before.

    Args:
        of: how many steps a generation has; after these the ratios begin anew.
    """

    of: int

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """The residual, and the ratios: shape [of], float32."""
        return (outputs[0], outputs[0].new_empty((self.of,), dtype=torch.float32))

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The residual, and the ratios with one more: the mean over tokens, as in `_perform_calibration_step`."""
        before, ratios = slots
        (residual,) = super().update((), inputs, outputs, scalars)
        lengths = [torch.linalg.norm(each.float(), dim=-1) for each in (residual, before)]
        done = torch.remainder(scalars.filled, self.of)
        ratio = torch.where(done > 0, (lengths[0] / (lengths[1] + 1e-8)).mean(), 1.0)
        step = torch.cumsum(torch.ones_like(ratios), 0) - 1
        measured = torch.where(step < done, ratios, torch.where(step == done, ratio, torch.nan))
        return residual, measured

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """As a residual; no step reads it."""
        return super().read(slots[:1], inputs, scalars)


def measuring(steps: int) -> Policy:
    """Measure the ratios in a generation of that many steps.

    Raises:
        ValueError: for no integer >= 1.
    """
    check_integer("steps", steps)
    return Policy(PassedBlocks(lists=lists_of_blocks()), Measuring(), Magnitudes(steps))


def measured_in(cells: Iterable[tuple[Any, Any, Any]]) -> list[tuple[float, ...]]:
    """The ratios that were measured of each cache context, from the cells of a generation."""
    kept = [cell.caches[1].tolist() for _, _, cell in cells if isinstance(cell.rule, Measuring) and cell.caches]
    return [tuple(ratio for ratio in ratios if not math.isnan(ratio)) for ratios in kept]


def lists_of_blocks() -> tuple[str, ...]:
    """The names of the lists that hold blocks for the hooks."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS

    return tuple(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))


def policies_of_magcache(config: Any) -> tuple[Policy, ...]:
    """What the hooks of that config do, as policies.

    Raises:
        ValueError: for fields that make no sense.
    """
    of = config.num_inference_steps
    check_integer("num_inference_steps", of)
    if config.calibrate:
        return (measuring(of),)
    check_integer("max_skip_steps", config.max_skip_steps, least=0)
    for name, most in (("threshold", float("inf")), ("retention_ratio", 1)):
        given = getattr(config, name)
        if not is_number(given) or not 0 <= given <= most:
            raise ValueError(f"{name} must be a number from 0 to {most:g}, got {given!r}.")
    ratios = torch.as_tensor(config.mag_ratios)
    if ratios.shape != (of,):
        raise ValueError(f"mag_ratios must be num_inference_steps={of} numbers, got {config.mag_ratios!r}.")
    reused = steps_of_small_change(ratios, config.threshold, config.max_skip_steps, config.retention_ratio)
    return (Policy(PassedBlocks(lists=lists_of_blocks()), Cycle(reused, of), Residual()),)
