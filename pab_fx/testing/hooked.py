"""The reference: diffusers' own Pyramid Attention Broadcast, on a copy of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

from ..diffusers.configs import policies_of
from ..diffusers.hooks import has_hooks
from ..policy.policy import assigned

Counts = Counter[tuple[str, bool]]


@dataclass
class Clock:
    """Stands in for `pipe.current_timestep`: a config's callback that returns whatever `t` was set to.

    Example:
        >>> clock = Clock(900)
        >>> clock()
        900
    """

    t: float = 1000.0

    def __call__(self) -> float:
        return self.t


def told_by(config: Any, clock: Clock) -> Any:
    """A config of either kind, with the clock for its callback."""
    return dataclasses.replace(config, current_timestep_callback=clock)


class Hooked:
    """A copy of a model with diffusers' hooks, which counts what they compute and reuse.

    Args:
        model: is not changed.
        config: diffusers'.
        alone: names of modules to leave without hooks.
    """

    def __init__(self, model: nn.Module, config: PyramidAttentionBroadcastConfig, alone: Sequence[str] = ()) -> None:
        self.model = copy.deepcopy(model)
        self.counts: Counts = Counter()
        apply_pyramid_attention_broadcast(self.model, config)
        for name, module in self.model.named_modules():
            if not has_hooks(module):
                continue
            if name in alone:
                module._diffusers_hook.remove_hook("pyramid_attention_broadcast")
                continue
            kind = "cross" if getattr(module, "is_cross_attention", False) else "spatial"
            role, policy, _ = assigned(policies_of(config), kind, name)
            self._count(module, role if policy is not None else "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def reset(self) -> None:
        """Start a new generation, as pipelines do at their end."""
        modules: Iterator[Any] = filter(has_hooks, self.model.modules())
        for module in modules:
            module._diffusers_hook.hooks["pyramid_attention_broadcast"].state.reset()

    def _count(self, module: Any, role: str) -> None:
        """Count a call as reused until the module's own `forward` is reached."""
        hook = module._diffusers_hook.hooks["pyramid_attention_broadcast"]
        compute, forward = hook.fn_ref.original_forward, module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[role, True] -= 1
            self.counts[role, False] += 1
            return compute(*args, **kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.counts[role, True] += 1
            return forward(*args, **kwargs)

        hook.fn_ref.original_forward, module.forward = counted, called
