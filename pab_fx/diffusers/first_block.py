"""What diffusers' `FirstBlockCacheConfig` says, as policies (`diffusers/hooks/first_block_cache.py`, seen in 0.42)."""

from __future__ import annotations

import math
from typing import Any

import diffusers.hooks

from ..policy.change import Change
from ..policy.checks import is_number
from ..policy.how import Residual
from ..policy.policy import Policy
from ..policy.where import Blocks
from .magcache import lists_of_blocks

FirstBlockCacheConfig: Any = getattr(diffusers.hooks, "FirstBlockCacheConfig", ())
"""The config; nothing is one with a diffusers that has none."""


def policies_of_first_block(config: Any) -> tuple[Policy, ...]:
    """What the hooks of that config do, as policies.

    Raises:
        ValueError: for a threshold that makes no sense.
    """
    if not is_number(config.threshold) or not 0 <= config.threshold < math.inf:
        raise ValueError(f"threshold must be a number >= 0, got {config.threshold!r}.")
    lists = lists_of_blocks()
    return (Policy(Blocks(1, None, lists), Change(Blocks(0, 1, lists), config.threshold), Residual()),)
