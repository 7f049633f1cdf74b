"""What diffusers puts on modules: attentions, hooks of caches, offloading and parallelism, adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention


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
