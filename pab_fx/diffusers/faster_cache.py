"""What diffusers' `FasterCacheConfig` says of attentions, as policies (`diffusers/hooks/faster_cache.py`, in 0.42).

What it says of the unconditional half of a batch is in `half_batch.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers.hooks
import torch

from ..policy.checks import check_callback, check_integer, checked_flag, checked_identifiers, checked_window, is_number
from ..policy.how import How, Scalars, Tensors
from ..policy.policy import Policy
from ..policy.when import Progress, Rule, SkipRange, Step
from ..policy.where import Modules
from .frequencies import DIMENSIONS
from .hooks import is_attention

FasterCacheConfig: Any = getattr(diffusers.hooks, "FasterCacheConfig", ())
"""The config; nothing is one with a diffusers that has none."""


@dataclass(frozen=True)
class Mixed(How):
    """The last two outputs, mixed: `last + (last - the one before) * weight`.

    As with the hooks, what a step has read becomes the last output. Of a batch whose first half is unconditional only
    the second half is kept, for calls of that half alone to read.

    Args:
        weight_of: yields the weight for a module.
        is_whole: whether the batch has both halves.

    Example:
        >>> how, one = Mixed(lambda module: 0.5), torch.ones(1)
        >>> how.read((one, 3 * one), (), Scalars(one[0], one[0], 0.5 * one[0]))
        (tensor([4.]),)
        >>> how.carry((one, 3 * one), (), (4 * one,), Scalars(one[0], one[0]))
        (tensor([3.]), tensor([4.]))
    """

    weight_of: Callable[[Any], Any]
    is_whole: bool = False

    @property
    def is_read(self) -> bool:  # type: ignore[override]
        """Not in a call of a whole batch: the hooks compute there."""
        return not self.is_whole

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """For each output the one before the last, and the last."""
        return tuple(each for output in outputs for each in (self._part(output), self._part(output)))

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What was the last one, and the output; the first output counts twice."""
        kept: list[torch.Tensor] = []
        for last, output in zip(slots[1::2], outputs, strict=True):
            now = self._part(output)
            kept += [torch.where(scalars.filled > 0, last, now), now]
        return tuple(kept)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The mixtures; the weight is not rounded to a smaller dtype, as a number is not either."""
        found = []
        for before, last in zip(slots[::2], slots[1::2], strict=True):
            moved = (last - before) * torch.reshape(scalars.weight, (1,))
            mixed = last + moved.type_as(last)
            found.append(torch.cat([mixed, mixed]) if self.is_whole else mixed)
        return tuple(found)

    def carry(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What was the last one, and what was read."""
        if self.is_whole:
            return tuple(slots)
        return tuple(each for pair in zip(slots[1::2], outputs, strict=True) for each in pair)

    def weigh(self, module: Any) -> float:
        """What the config's `attention_weight_callback` says."""
        return number_from("attention_weight_callback", self.weight_of, module)

    def describe(self) -> str:
        """How it is read in words."""
        return "as the last two, mixed"

    def _part(self, output: torch.Tensor) -> torch.Tensor:
        """What is kept of an output, which is not a view of it."""
        return torch.chunk(output, 2)[1].clone() if self.is_whole else output


@dataclass(frozen=True)
class Both(Rule):
    """Reuse where each of two skip ranges does: an attention's, and that of the unconditional half of the batch.

    Args:
        skip, batch: the two.

    Example:
        >>> from pab_fx.policy.when import reused_calls
        >>> reused_calls(Both(SkipRange(2, 0, 950), SkipRange(3, 0, 950)), (900, 800, 700, 600, 500, 400))
        (False, True, False, False, False, True)
    """

    skip: SkipRange
    batch: SkipRange

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Where both reuse."""
        return self.skip.decide(step, progress) & self.batch.decide(step, progress)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`."""
        return self.skip.may_reuse(step, progress) and self.batch.may_reuse(step, progress)

    def is_over(self, t: float) -> bool:
        """As `Rule.is_over`."""
        return self.skip.is_over(t) or self.batch.is_over(t)

    def describe(self) -> str:
        """The rule in words."""
        return f"{self.skip.describe()}, and with a whole batch, {self.batch.describe().removeprefix('computed ')}"

    def mismatch(self, t: float, timesteps: Any) -> str | None:
        """As `Rule.mismatch`."""
        return self.skip.mismatch(t, timesteps) or self.batch.mismatch(t, timesteps)


def number_from(name: str, callback: Callable[[Any], Any], module: Any) -> float:
    """What a config's callback says of a module, a number or a tensor that holds one.

    Raises:
        RuntimeError: if it is neither.

    Example:
        >>> number_from("attention_weight_callback", lambda module: 0.5, None)
        0.5
    """
    found = callback(module)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise RuntimeError(
            f"{name} returned {found!r} for a {type(module).__name__}: it must return a number."
        ) from None


def policies_of_faster_cache(config: Any, is_whole: bool = False) -> tuple[Policy, ...]:
    """What the hooks of that config do to attentions, as policies.

    As `_apply_faster_cache_on_attention_class`: a module that is no cross-attention is spatial if its range is set and
    an identifier matches, else temporal if that holds for it; one of the hooks' own identifiers has to match too.

    Args:
        config: the config.
        is_whole: for calls of a whole batch, in place of its conditional half; of no matter to a distilled model.

    Raises:
        ValueError: for fields that make no sense.
    """
    _check(config)
    batch = None if config.is_guidance_distilled else batch_rule_of(config)
    from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS

    how = Mixed(config.attention_weight_callback or _half, is_whole and batch is not None)
    policies = []
    for role in ("spatial", "temporal"):
        every, window, identifiers = (
            getattr(config, f"{role}_attention_{each}")
            for each in ("block_skip_range", "timestep_skip_range", "block_identifiers")
        )
        if every is None:
            continue
        skip = None if window is None else SkipRange(every, *window)
        where = Modules(is_attention, role, False, tuple(identifiers), _TRANSFORMER_BLOCK_IDENTIFIERS)
        policies.append(Policy(where, Both(skip, batch) if skip and batch else skip, how))
    return tuple(policies)


def batch_rule_of(config: Any) -> SkipRange:
    """When the unconditional half of a batch is left out."""
    return SkipRange(config.unconditional_batch_skip_range, *config.unconditional_batch_timestep_skip_range)


def _half(module: Any) -> float:
    """The hooks' weight where no callback says another."""
    return 0.5


def _check(config: Any) -> None:
    checked_flag("is_guidance_distilled", config.is_guidance_distilled)
    for role in ("spatial", "temporal"):
        name = f"{role}_attention_block_skip_range"
        if getattr(config, name) is not None:
            check_integer(name, getattr(config, name))
        name = f"{role}_attention_timestep_skip_range"
        if getattr(config, name) is not None:
            checked_window(name, getattr(config, name))
        name = f"{role}_attention_block_identifiers"
        checked_identifiers(name, getattr(config, name))
    check_integer("unconditional_batch_skip_range", config.unconditional_batch_skip_range)
    for name in (
        "unconditional_batch_timestep_skip_range",
        "low_frequency_weight_update_timestep_range",
        "high_frequency_weight_update_timestep_range",
    ):
        checked_window(name, getattr(config, name))
    for name in ("alpha_low_frequency", "alpha_high_frequency"):
        if not is_number(getattr(config, name)):
            raise ValueError(f"{name} must be a number, got {getattr(config, name)!r}.")
    for name in ("attention_weight_callback", "low_frequency_weight_callback", "high_frequency_weight_callback"):
        if getattr(config, name) is not None and not callable(getattr(config, name)):
            raise ValueError(f"{name} must be callable, got {getattr(config, name)!r}.")
    check_callback(config.current_timestep_callback)
    if config.tensor_format not in DIMENSIONS:
        raise ValueError(f"tensor_format must be one of {', '.join(DIMENSIONS)}, got {config.tensor_format!r}.")
    names: Any = config._unconditional_conditional_input_kwargs_identifiers
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "_unconditional_conditional_input_kwargs_identifiers must be names of arguments, such as "
            f"('hidden_states', 'timestep'), got {names!r}."
        )
