"""Configs become policies here, at the door: `PABConfig`, diffusers' own, policies, or a list of any of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusers import PyramidAttentionBroadcastConfig

from ..policy.checks import check_callback, check_integer, checked_identifiers, checked_window
from ..policy.config import PRESETS, PABConfig
from ..policy.how import Last
from ..policy.policy import Policy
from ..policy.when import SkipRange
from ..policy.where import ATTENTION_ROLES, Modules
from .faster_cache import FasterCacheConfig, policies_of_faster_cache
from .first_block import FirstBlockCacheConfig, policies_of_first_block
from .half_batch import HalfBatch
from .hooks import is_attention
from .magcache import MagCacheConfig, policies_of_magcache
from .sea_cache import SeaCacheConfig, policies_of_sea_cache
from .taylorseer import TaylorSeerCacheConfig, policies_of_taylorseer

HOOKS_CONFIGS = (
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    MagCacheConfig,
    FirstBlockCacheConfig,
    SeaCacheConfig,
    FasterCacheConfig,
)
"""Configs of diffusers' hooks that become policies."""


def policies_of(config: Any) -> tuple[Policy, ...]:
    """A config as policies; `PABConfig()` for `None`.

    Args:
        config: a `PABConfig`, a config of diffusers (`PyramidAttentionBroadcastConfig`, `TaylorSeerCacheConfig`,
            `MagCacheConfig`, `FirstBlockCacheConfig`, `SeaCacheConfig`, `FasterCacheConfig` of a distilled model), a
            `Policy`, or several of these.

    Raises:
        ValueError: for anything else, with what was probably meant.

    Example:
        >>> [policy.where.roles for policy in policies_of(PABConfig())]
        [('spatial',), ('temporal',), ('cross',)]
    """
    if config is None:
        config = PABConfig()
    if isinstance(config, Policy):
        return (config,)
    if isinstance(config, PABConfig):
        return config.policies()
    if isinstance(config, PyramidAttentionBroadcastConfig):
        return _of_hooks(config)
    if isinstance(config, TaylorSeerCacheConfig):
        return policies_of_taylorseer(config)
    if isinstance(config, MagCacheConfig):
        return policies_of_magcache(config)
    if isinstance(config, FirstBlockCacheConfig):
        return policies_of_first_block(config)
    if isinstance(config, SeaCacheConfig):
        return policies_of_sea_cache(config)
    if isinstance(config, HalfBatch):
        return config.whole
    if isinstance(config, FasterCacheConfig):
        if not config.is_guidance_distilled:
            raise ValueError(
                "FasterCacheConfig leaves out the unconditional half of the batch in some steps, which is about the "
                "call of a model and not its graph: give it, alone, to pab_fx.enable(model, config). With "
                "is_guidance_distilled=True, which leaves its attentions, it goes wherever a config goes."
            )
        return policies_of_faster_cache(config)
    if isinstance(config, Iterable) and not isinstance(config, (str, bytes, Mapping)):
        policies = tuple(policy for each in config if each is not None for policy in policies_of(each))
        if policies:
            return policies
    hint = ""
    if isinstance(config, str) and config in PRESETS:
        hint = f" Did you mean PABConfig.preset({config!r})?"
    elif isinstance(config, Mapping):
        hint = " PABConfig.of(...) makes one from a mapping."
    elif isinstance(config, type):
        hint = f" That is the class: write {config.__name__}(...)."
    raise ValueError(
        "config must be a PABConfig, diffusers' PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig, "
        "MagCacheConfig, FirstBlockCacheConfig, SeaCacheConfig or FasterCacheConfig, a Policy, or a list of those, got "
        f"{config!r}.{hint}"
    )


def callback_of(config: Any) -> Callable[[], Any] | None:
    """The `current_timestep_callback` of a config, of several the first one's that has one."""
    for each in config if isinstance(config, (list, tuple)) else (config,):
        callback: Callable[[], Any] | None = getattr(each, "current_timestep_callback", None)
        if callback is not None:
            return callback
    return None


def ranges_of(config: PyramidAttentionBroadcastConfig) -> dict[str, int]:
    """The skip range of each role that has one; without any given, diffusers takes 2 for spatial attention."""
    ranges = {role: getattr(config, f"{role}_attention_block_skip_range") for role in ATTENTION_ROLES}
    return {role: found for role, found in ranges.items() if found is not None} or {"spatial": 2}


def _of_hooks(config: PyramidAttentionBroadcastConfig) -> tuple[Policy, ...]:
    """What the hooks do, as policies.

    As `_apply_pyramid_attention_broadcast_on_attention_class` in `diffusers/hooks/pyramid_attention_broadcast.py`: the
    first of spatial, temporal and cross whose range is set, whose identifiers match the qualified name and whose kind
    agrees with `is_cross_attention`. A hook keeps the very tensor that the model may go on to update.
    """
    windows, identifiers = {}, {}
    for role in ATTENTION_ROLES:
        name = f"{role}_attention_block_skip_range"
        if getattr(config, name) is not None:
            check_integer(name, getattr(config, name))
        name = f"{role}_attention_timestep_skip_range"
        windows[role] = checked_window(name, getattr(config, name))
        name = f"{role}_attention_block_identifiers"
        identifiers[role] = checked_identifiers(name, getattr(config, name))
    check_callback(callback_of(config))
    return tuple(
        Policy(
            Modules(is_attention, role, role == "cross", identifiers[role]),
            SkipRange(skip_range, *windows[role]),
            Last(keeps_updates=True),
        )
        for role, skip_range in ranges_of(config).items()
    )
