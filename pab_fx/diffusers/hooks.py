"""What diffusers decides: which modules are attentions, their roles under its own config, its cache contexts."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from diffusers import PyramidAttentionBroadcastConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..policy.config import ATTENTION_ROLES, PRESETS, PABConfig, check_diffusers_config

current_cache_context: ContextVar[str | None] = ContextVar("pab_fx_cache_context", default=None)
"""Name of the cache context that the running denoising call belongs to: "cond", "uncond" or none."""

on_reset: list[Callable[[Any], None]] = []
"""Called with the model when its stateful caches are to be reset."""

on_enable_cache: list[Callable[[Any, Any], None]] = []
"""Called with a model and the config of a cache of diffusers, before that is enabled; may raise."""

on_end: list[Callable[[Any], None]] = []
"""Called with a pipeline when it declares its generation to be over."""


def checked_config(config: Any) -> Any:
    """A `PABConfig` or diffusers' config, checked; the default one for `None`.

    Raises:
        ValueError: for anything else, with what was probably meant.
    """
    if config is None:
        return PABConfig()
    if isinstance(config, PyramidAttentionBroadcastConfig):
        check_diffusers_config(config)
        return config
    if isinstance(config, PABConfig):
        return config
    hint = ""
    if isinstance(config, str) and config in PRESETS:
        hint = f" Did you mean PABConfig.preset({config!r})?"
    elif isinstance(config, Mapping):
        hint = " PABConfig.of(...) makes one from a mapping."
    elif isinstance(config, type):
        hint = f" That is the class: write {config.__name__}(...)."
    raise ValueError(f"config must be a PABConfig or diffusers' PyramidAttentionBroadcastConfig, got {config!r}.{hint}")


def is_attention(cls: type | None) -> bool:
    """Whether diffusers' hooks take a module of this class for an attention (`diffusers/hooks/_common.py`)."""
    return cls is not None and issubclass(cls, (Attention, MochiAttention, AttentionModuleMixin))


def has_hooks(module: Any) -> bool:
    """Whether diffusers' own PAB hooks sit on a module."""
    return "pyramid_attention_broadcast" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def other_cache(model: Any) -> str | None:
    """The name of a hook by which another cache of diffusers sits on a model, `None` if there is none."""
    for module in model.modules():
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            if "cache" in name or name.startswith("fbc_"):
                return name
    return None


def is_offloaded_by_layer(model: Any) -> bool:
    """Whether accelerate brings the weights of each layer when it runs, as by `enable_sequential_cpu_offload`."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def prepare_split_hooks(model: Any) -> None:
    """Let the hooks of context parallelism know the parameters of the modules whose inputs they split.

    They look them up in their first call, which Dynamo cannot trace: the model would be captured in pieces, for good.
    `ModuleForwardMetadata` of `diffusers/hooks/context_parallel.py`, seen in 0.36 to 0.42.
    """
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            metadata: Any = getattr(hook, "module_forward_metadata", None)
            if getattr(metadata, "cached_parameter_indices", {}) is None:
                parameters = list(inspect.signature(metadata._cls.forward).parameters)[1:]  # without `self`
                metadata.cached_parameter_indices = {name: i for i, name in enumerate(parameters)}


def adapter_parameters(model: Any) -> Iterator[Any]:
    """The parameters of a model that belong to adapters of peft: they come and go, switched by the user."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            adapters: Any = getattr(module, name, None)
            if hasattr(adapters, "parameters"):
                yield from adapters.parameters()


def role_of(name: str, is_cross_attention: bool, config: PyramidAttentionBroadcastConfig) -> str | None:
    """The role that diffusers gives an attention, `None` where it leaves it alone.

    As `_apply_pyramid_attention_broadcast_on_attention_class` in
    `diffusers/hooks/pyramid_attention_broadcast.py`: the first of spatial, temporal and cross whose range is
    set, whose identifiers match the qualified name and whose kind agrees with `is_cross_attention`.
    """
    for role in ATTENTION_ROLES:
        identifiers = getattr(config, f"{role}_attention_block_identifiers")
        if (
            skip_range(config, role) is not None
            and (role == "cross") == is_cross_attention
            and any(re.search(identifier, name) for identifier in identifiers)
        ):
            return role
    return None


def skip_range(config: PyramidAttentionBroadcastConfig, role: str) -> int | None:
    """The range of a role; without any range given, diffusers takes 2 for spatial attention."""
    ranges = {r: getattr(config, f"{r}_attention_block_skip_range") for r in ATTENTION_ROLES}
    if all(value is None for value in ranges.values()):
        ranges["spatial"] = 2
    return ranges[role]


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
        with cache_context(name), enter_context(self, name, *args, **kwargs):
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
