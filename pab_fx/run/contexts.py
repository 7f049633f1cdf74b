"""Cache contexts: which branch of guidance a denoising call belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from ..policy.checks import check_integer, is_number

current_cache_context: ContextVar[str | None] = ContextVar("pab_fx_cache_context", default=None)
"""Name of the cache context that the running denoising call belongs to: "cond", "uncond" or none."""


current_sigma: ContextVar[Any] = ContextVar("pab_fx_sigma", default=None)
"""Noise level that goes with it, `None` where it is not told."""


current_steps: ContextVar[int | None] = ContextVar("pab_fx_steps", default=None)
"""Number of steps that its generation has, `None` where it is not told."""


@contextlib.contextmanager
def cache_context(name: str | None, sigma: Any = None, steps: Any = None) -> Iterator[None]:
    """Run the denoising calls inside under a cache context of their own.

    Pipelines of diffusers that call the denoiser once per guidance branch say which with
    `transformer.cache_context("cond")`; that is heeded by itself. This is for loops of your own.

    Args:
        name: any name; each has its own counters and caches.
        sigma: noise level of the step, from 0 to 1, a number or a tensor of one element, for signals that are made of
            it (`Sigma`). A tensor is read only where there is such a signal.
        steps: how many steps the generation has, for rules that compute the last ones where no timesteps are known.

    Raises:
        ValueError: for another noise level, or a number of steps that is no integer >= 1.

    Example:
        >>> with cache_context("cond"):
        ...     current_cache_context.get()
        'cond'
    """
    if sigma is not None and not hasattr(sigma, "item") and not (is_number(sigma) and 0 <= sigma <= 1):
        raise ValueError(f"cache_context: sigma must be a noise level from 0 to 1, got {sigma!r}.")
    if steps is not None:
        check_integer("cache_context: steps", steps)
    token, level, of = current_cache_context.set(name), current_sigma.set(sigma), current_steps.set(steps)
    try:
        yield
    finally:
        current_steps.reset(of)
        current_sigma.reset(level)
        current_cache_context.reset(token)
