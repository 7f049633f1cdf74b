"""Make diffusers tell cache contexts, caches and ends of generations to `pab_fx` as well."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..run.clock import PIPELINES
from ..run.contexts import cache_context

PIPELINES.append(DiffusionPipeline)

on_reset: list[Callable[[Any], None]] = []
"""Called with the model when its stateful caches are to be reset."""

on_enable_cache: list[Callable[[Any, Any], None]] = []
"""Called with a model and the config of a cache of diffusers, before that is enabled; may raise."""

on_end: list[Callable[[Any], None]] = []
"""Called with a pipeline when it declares its generation to be over."""


def listen() -> None:
    """Make diffusers tell cache contexts, caches and ends of generations to `pab_fx` as well.

    `CacheMixin` passes them on to diffusers' own hooks only, and there are none here; a pipeline whose model does
    not mix it in tells nobody. The four methods keep doing what they did; wrapping them twice does nothing.
    """
    if hasattr(CacheMixin.cache_context, "_pab_fx"):
        return
    enter_context, reset = CacheMixin.cache_context, CacheMixin._reset_stateful_cache
    free, enable_cache = DiffusionPipeline.maybe_free_model_hooks, CacheMixin.enable_cache

    @functools.wraps(enter_context)
    @contextlib.contextmanager
    def cache_context_of_model(self: CacheMixin, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with cache_context(name, *_told(**kwargs)), enter_context(self, name, *args, **kwargs):
            yield

    @functools.wraps(reset)
    def reset_stateful_cache(self: CacheMixin, *args: Any, **kwargs: Any) -> None:
        for listener in on_reset:
            listener(self)
        reset(self, *args, **kwargs)

    @functools.wraps(enable_cache)
    def enable_cache_of_model(self: CacheMixin, config: Any) -> None:
        for listener in on_enable_cache:
            listener(self, config)
        enable_cache(self, config)

    @functools.wraps(free)
    def maybe_free_model_hooks(self: DiffusionPipeline) -> None:
        for listener in on_end:
            listener(self)
        free(self)

    cache_context_of_model._pab_fx = True  # type: ignore[attr-defined]
    CacheMixin.cache_context = cache_context_of_model  # type: ignore[method-assign]
    CacheMixin.enable_cache = enable_cache_of_model  # type: ignore[method-assign]
    CacheMixin._reset_stateful_cache = reset_stateful_cache  # type: ignore[method-assign]
    DiffusionPipeline.maybe_free_model_hooks = maybe_free_model_hooks  # type: ignore[method-assign]


def _told(sigma: Any = None, num_inference_steps: Any = None, **others: Any) -> tuple[Any, Any]:
    """Noise level and number of steps as `cache_context` takes them, `None` for what another cache is told."""
    is_level = hasattr(sigma, "item") or (isinstance(sigma, (int, float)) and 0 <= sigma <= 1)
    is_count = isinstance(num_inference_steps, int) and num_inference_steps > 0
    return sigma if is_level else None, num_inference_steps if is_count else None
