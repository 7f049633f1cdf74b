"""Tiny models with a context-parallel plan of diffusers, in sizes that 2 and 4 ranks can split: heads and tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import diffusers
import torch
from zoo import Draw, Entry, Kwargs, packed, wan

from pab_fx import Blocks, Every, PABConfig, Policy, Residual, Taylor

TIMESTEPS = (900, 760, 700, 600, 500, 400, 300, 200, 50)
CONFIG = PABConfig(
    spatial_attention_block_skip_range=2,
    cross_attention_block_skip_range=4,
    spatial_attention_timestep_skip_range=(100, 800),
    cross_attention_timestep_skip_range=(100, 800),
)
BLOCKS = Policy(Blocks(), Every(3, warmup=2), Taylor(1, of=Residual()))


@dataclass
class StepSeen:
    """What a step was: outputs, attentions computed by role, collectives run by the process group by kind, waits."""

    outputs: tuple[torch.Tensor, ...]
    computed: Counter[str]
    collectives: Counter[str] = field(default_factory=Counter)
    waits: int = 0


HEADS = {"num_attention_heads": 4}


def _wan_inputs(draw: Draw) -> Kwargs:
    return {"hidden_states": draw.noise(1, 4, 4, 8, 8), "encoder_hidden_states": draw.fixed(1, 7, 16)}


def _flux_inputs(draw: Draw, axes: int = 3) -> Kwargs:
    return packed.flux_inputs(draw, axes) | {
        "encoder_hidden_states": draw.fixed(1, 8, 16),
        "txt_ids": torch.zeros(8, axes),
    }


def _flux2_inputs(draw: Draw) -> Kwargs:
    """As its pipeline passes them: the positions have a batch."""
    inputs = _flux_inputs(draw, axes=4)
    ids = {name: inputs[name][None] for name in ("img_ids", "txt_ids")}
    return inputs | ids | {"guidance": torch.tensor([4.0])}


def _helios_inputs(draw: Draw) -> Kwargs:
    """192 tokens, and 64, 16 and 4 of its short, middle and long history."""
    return wan.helios_inputs(draw) | {
        "hidden_states": draw.noise(1, 4, 3, 16, 16),
        "latents_history_short": draw.fixed(1, 4, 1, 16, 16),
        "latents_history_mid": draw.fixed(1, 4, 2, 16, 16),
        "latents_history_long": draw.fixed(1, 4, 4, 16, 16),
    }


def _thousandth(t: float) -> Kwargs:
    return {"timestep": torch.full((1,), t) / 1000}


MODELS = {
    "wan": Entry(
        "WanTransformer3DModel",
        lambda: diffusers.WanTransformer3DModel(**wan.WAN | HEADS),
        _wan_inputs,
        lambda t: {"timestep": torch.full((1,), float(t))},
        "self-attention over ranks, cross-attention on each; rotary embeddings are split, the gather is at the end",
    ),
    "flux": Entry(
        "FluxTransformer2DModel",
        lambda: diffusers.FluxTransformer2DModel(
            **packed.FLUX | HEADS, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6)
        ),
        lambda draw: _flux_inputs(draw) | {"pooled_projections": draw.fixed(1, 8), "guidance": torch.tensor([3.5])},
        _thousandth,
        "joint attention: text and image are split each",
    ),
    "flux2": Entry(
        "Flux2Transformer2DModel",
        lambda: diffusers.Flux2Transformer2DModel(
            **packed.FLUX | HEADS, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)
        ),
        _flux2_inputs,
        _thousandth,
        "joint attention, and blocks whose attention and feed-forward are one",
    ),
    "ltx": Entry(
        "LTXVideoTransformer3DModel",
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=16,
            **HEADS,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 48, 4),
            "encoder_hidden_states": draw.fixed(1, 8, 16),
            "encoder_attention_mask": None,
            "num_frames": 3,
            "height": 4,
            "width": 4,
        },
        lambda t: {"timestep": torch.full((1,), float(t))},
        "cross-attention over ranks too: the text is split",
    ),
    "qwen": Entry(
        "QwenImageTransformer2DModel",
        lambda: diffusers.QwenImageTransformer2DModel(**packed.QWEN | HEADS),
        lambda draw: {
            "hidden_states": draw.noise(1, 16, 16),
            "encoder_hidden_states": draw.fixed(1, 8, 16),
            "img_shapes": [[(1, 4, 4)]],
        },
        _thousandth,
        "joint attention",
    ),
    "chronoedit": Entry(
        "ChronoEditTransformer3DModel",
        lambda: diffusers.ChronoEditTransformer3DModel(**wan.WAN | HEADS),
        _wan_inputs,
        lambda t: {"timestep": torch.full((1,), float(t))},
        "as Wan",
    ),
    "helios": Entry(
        "HeliosTransformer3DModel",
        lambda: diffusers.HeliosTransformer3DModel(**wan.WAN | HEADS, rope_dim=(4, 6, 6)),
        _helios_inputs,
        lambda t: {"timestep": torch.full((1,), float(t))},
        "tokens are split and gathered around each attention and feed-forward, not around the model",
    ),
}
