"""The oracle of the tests: diffusers' own Pyramid Attention Broadcast, on a copy of a model."""

import copy
from collections.abc import Callable

from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

# `re.search` patterns on qualified names. diffusers asks for spatial before temporal and its default "blocks"
# is found in "temporal_transformer_blocks" too, so spatial has to say that it means the others.
SPATIAL_IDENTIFIERS = (r"^(?!temporal_)",)
TEMPORAL_IDENTIFIERS = (r"^temporal_",)
CROSS_IDENTIFIERS = (r"",)


def diffusers_config(
    current_timestep_callback: Callable[[], float],
    ranges: tuple[int | None, int | None, int | None] = (2, 3, 4),
    window: tuple[int, int] = (100, 800),
) -> PyramidAttentionBroadcastConfig:
    """A config that gives a role to every attention module that diffusers' hooks recognise.

    Args:
        current_timestep_callback: Returns the current timestep, a `Clock` for instance.
        ranges: Skip ranges of the spatial, temporal and cross attentions, `None` for a role to leave alone.
        window: The timesteps, exclusive, between which attention is broadcast; the same for the three roles.
    """
    spatial, temporal, cross = ranges
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        temporal_attention_block_skip_range=temporal,
        cross_attention_block_skip_range=cross,
        spatial_attention_timestep_skip_range=window,
        temporal_attention_timestep_skip_range=window,
        cross_attention_timestep_skip_range=window,
        spatial_attention_block_identifiers=SPATIAL_IDENTIFIERS,
        temporal_attention_block_identifiers=TEMPORAL_IDENTIFIERS,
        cross_attention_block_identifiers=CROSS_IDENTIFIERS,
        current_timestep_callback=current_timestep_callback,
    )


def hooked(model: nn.Module, config: PyramidAttentionBroadcastConfig) -> nn.Module:
    """A copy of `model` with diffusers' Pyramid Attention Broadcast hooks."""
    model = copy.deepcopy(model)
    apply_pyramid_attention_broadcast(model, config)
    return model


def hooked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules, by qualified name, that carry a Pyramid Attention Broadcast hook."""
    return {
        name: module
        for name, module in model.named_modules()
        if "pyramid_attention_broadcast" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    }
