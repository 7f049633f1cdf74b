"""What diffusers' `SeaCacheConfig` says, as policies (`diffusers/hooks/sea_cache.py`, seen in 0.42).

The method is that of arXiv 2602.18993.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import diffusers.hooks
import torch

from ..policy.change import Change, Computed, Sigma
from ..policy.checks import check_integer
from ..policy.how import Residual, Scalars, Tensors
from ..policy.policy import Policy
from ..policy.when import Progress, Step
from ..policy.where import Blocks, Model
from .magcache import lists_of_blocks

SeaCacheConfig: Any = getattr(diffusers.hooks, "SeaCacheConfig", ())
"""The config; nothing is one with a diffusers that has none."""


@dataclass(frozen=True)
class Filtered:
    """The sample, filtered for what is signal at a noise level: a Wiener filter along each axis of space and time.

    The paper multiplies the spectrum by a gain that is symmetric and a product over axes. That is the product with a
    real matrix along each axis, which compilers take without complex numbers.

    Args:
        power: the signal's spectrum is taken to fall by `frequency ** -power`.
    """

    power: float

    def __call__(self, sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Filter a sample of shape [B, C, H, W] or [B, C, T, H, W] at a noise level of shape [].

        Raises:
            ValueError: for a sample of another shape.

        Example:
            >>> flat = torch.ones(1, 1, 4, 4)  # the mean gain is 1, that of frequency 0 is the highest
            >>> bool((Filtered(3.0)(flat, torch.tensor(0.5)) > 1).all())
            True
        """
        if sample.dim() not in (4, 5):
            raise ValueError(f"SeaCache filters samples [B, C, H, W] or [B, C, T, H, W], not {list(sample.shape)}")
        found, sigma = sample.float(), sigma.clamp(1e-6, 1 - 1e-6)
        for axis in range(2, sample.dim()):
            found = (found.movedim(axis, -1) @ self._matrix(found, axis, sigma)).movedim(-1, axis)
        return found.to(sample.dtype)

    def _matrix(self, like: torch.Tensor, axis: int, sigma: torch.Tensor) -> torch.Tensor:
        """The filter along an axis: shape [n, n]; `entry[i, j]` is the mean of `gain[k] cos(2 pi k (i - j) / n)`."""
        of = like.shape[axis]
        k = torch.arange(of, device=like.device)
        frequencies = torch.minimum(k, of - k) / of
        clean = 1 / (frequencies**self.power + 1e-16)
        gain = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
        angles = (k[:, None] * k % of) * (2 * math.pi / of)
        cosines, sines = angles.cos(), angles.sin()
        return ((cosines * gain) @ cosines + (sines * gain) @ sines) / (of * gain.mean())


@dataclass(frozen=True)
class ChangeOfSamples(Change):
    """As `Change`, the mean over the samples of a batch, below the threshold."""

    def measured(self, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """As `resolve_gate` measures."""
        difference, size = (each.float().abs().flatten(1).mean(1) for each in (now.float() - before.float(), before))
        return (difference / (size + 1e-16)).mean()

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """As for `Change`, but not at the threshold itself."""
        due = super().decide(step, progress)
        return due if signal is None else due & (signal < self.threshold)


@dataclass(frozen=True)
class Extrapolated(Residual):
    """The residual, extrapolated along a line through those of the last two steps that computed.

    `Taylor(1, of=Residual())` is the same up to rounding: the hooks multiply the difference by a quotient of steps.
    """

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """For each output the last residual and the one before, and how many steps lay between."""
        return (*outputs, *outputs, outputs[0].new_empty((), dtype=torch.float32))

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The residual now, what was the last one, and the distance between."""
        now = super().update((), inputs, outputs, scalars)
        return (*now, *slots[: len(now)], scalars.distance.clone())

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The line, where two steps have computed; else the last residual."""
        of, scale = len(inputs), scalars.distance / slots[-1]
        lines = [
            torch.where(scalars.filled > 1, last + (last - before) * scale, last)
            for last, before in zip(slots[:of], slots[of : 2 * of], strict=True)
        ]
        return super().read(lines, inputs, scalars)

    def describe(self) -> str:
        """How it is read in words."""
        return "as a residual, extrapolated"


def policies_of_sea_cache(config: Any) -> tuple[Policy, ...]:
    """What the hooks of that config do, as policies.

    Raises:
        ValueError: for fields that make no sense, and for a `raw_vision_callback`.
    """
    if config.raw_vision_callback is not None:
        raise ValueError(
            "raw_vision_callback is a function of Python objects, which is not compiled: write a policy whose signal "
            "is a function of tensors, Change(Computed(function, (Model(), Sigma())), ...)."
        )
    for name in ("retention_steps", "cache_end_steps"):  # the others are checked by the config
        check_integer(name, getattr(config, name), least=0)
    rule = ChangeOfSamples(
        Computed(Filtered(config.power_exp), (Model(), Sigma())),
        config.threshold,
        accumulate=True,
        warmup=max(config.retention_steps, 1),
        cooldown=config.cache_end_steps,
        max_skips=config.max_consecutive_cached or None,
    )
    how = Extrapolated() if config.residual_order else Residual()
    return (Policy(Blocks(0, None, lists_of_blocks()), rule, how),)
