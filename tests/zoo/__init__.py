"""Tiny, randomly initialised transformers of diffusers, with inputs as their pipelines give them.

Every transformer class of diffusers that mixes in `CacheMixin` is here, and the main ones that do not. Sizes
are as small as the configs allow; lengths that mean different things differ (7 text tokens, 16 image tokens,
3 frames), so that nothing matches by accident. Models have one block of each kind, and more where a later one
differs; those in `OF_TWO_BLOCKS` have two alike, which tests tell apart or compile once.

The oracle of the tests is diffusers' own Pyramid Attention Broadcast: `hooked` applies it to a copy of a
model, and `diffusers_config` makes a config whose identifiers reach every attention that the hooks recognise.
"""

import diffusers

from pab_fx.testing import Clock

from . import image, packed, sound, video, wan
from .entry import Draw, Entry, Kwargs, call, redraw_, tensors, trajectory
from .oracle import diffusers_config, hooked, hooked_modules

__all__ = [
    "BY_NAME",
    "OF_TWO_BLOCKS",
    "ZOO",
    "Clock",
    "Draw",
    "Entry",
    "Kwargs",
    "call",
    "diffusers_config",
    "hooked",
    "hooked_modules",
    "redraw_",
    "tensors",
    "trajectory",
]

_ALL = (*image.ENTRIES, *packed.ENTRIES, *sound.ENTRIES, *video.ENTRIES, *wan.ENTRIES)

ZOO: tuple[Entry, ...] = tuple(
    sorted((entry for entry in _ALL if hasattr(diffusers, entry.class_name)), key=lambda entry: entry.name)
)
"""Every entry whose class the installed diffusers has, by name."""

BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ZOO}

OF_TWO_BLOCKS = (
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "LatteTransformer3DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
)
