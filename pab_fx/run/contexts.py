"""Cache contexts: which branch of guidance a denoising call belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

current_cache_context: ContextVar[str | None] = ContextVar("pab_fx_cache_context", default=None)
"""Name of the cache context that the running denoising call belongs to: "cond", "uncond" or none."""


@contextlib.contextmanager
def cache_context(name: str | None) -> Iterator[None]:
    """Run the denoising calls inside under a cache context of their own.

    Pipelines of diffusers that call the denoiser once per guidance branch say which with
    `transformer.cache_context("cond")`; that is heeded by itself. This is for loops of your own.

    Args:
        name: any name; each has its own counters and caches.

    Example:
        >>> with cache_context("cond"):
        ...     current_cache_context.get()
        'cond'
    """
    token = current_cache_context.set(name)
    try:
        yield
    finally:
        current_cache_context.reset(token)
