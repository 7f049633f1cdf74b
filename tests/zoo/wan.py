"""The Wan family."""

import diffusers
import torch

from .entry import Draw, Entry, Kwargs
from .shared import full, same, video_inputs

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 1,
}
_WAN_I2V = {"image_dim": 8, "added_kv_proj_dim": 32}


def helios_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 4, 3, 8, 8),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "indices_hidden_states": torch.arange(7, 10)[None],
        "latents_history_short": draw.fixed(1, 4, 1, 8, 8),
        "indices_latents_history_short": torch.tensor([[6]]),
        "latents_history_mid": draw.fixed(1, 4, 2, 8, 8),
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "latents_history_long": draw.fixed(1, 4, 4, 8, 8),
        "indices_latents_history_long": torch.arange(0, 4)[None],
    }


def _i2v_inputs(draw: Draw) -> Kwargs:
    """Wan's image-to-video takes all but the last 512 tokens of the conditions for image tokens."""
    return {
        "hidden_states": draw.noise(1, 4, 3, 8, 8),
        "encoder_hidden_states": draw.fixed(1, 512, 16),
        "encoder_hidden_states_image": draw.fixed(1, 5, 8),
    }


ENTRIES = (
    Entry(
        "ChronoEditTransformer3DModel",
        lambda: diffusers.ChronoEditTransformer3DModel(**WAN, **_WAN_I2V),
        _i2v_inputs,
        same(),
        "ChronoEditPipeline",
    ),
    Entry(
        "HeliosTransformer3DModel",
        lambda: diffusers.HeliosTransformer3DModel(**WAN, rope_dim=(4, 6, 6)),
        helios_inputs,
        same(),
        "HeliosPipeline",
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN),
        video_inputs,
        same(),
        "SkyReelsV2Pipeline",
    ),
    Entry(
        "WanAnimateTransformer3DModel",
        lambda: diffusers.WanAnimateTransformer3DModel(
            **(WAN | _WAN_I2V | {"in_channels": 12}),
            latent_channels=4,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        lambda draw: {
            "hidden_states": torch.cat([draw.noise(1, 4, 3, 8, 8), draw.fixed(1, 8, 3, 8, 8)], dim=1),
            "encoder_hidden_states": draw.fixed(1, 512, 16),
            "encoder_hidden_states_image": draw.fixed(1, 5, 8),
            "pose_hidden_states": draw.fixed(1, 4, 2, 8, 8),
            "face_pixel_values": draw.fixed(1, 3, 8, 16, 16),
        },
        same(),
        "WanAnimatePipeline",
    ),
    Entry(
        "WanTransformer3DModel",
        lambda: diffusers.WanTransformer3DModel(**(WAN | {"num_layers": 2})),
        video_inputs,
        same(),
        "WanPipeline, 2.1",
    ),
    Entry(
        "WanTransformer3DModel-i2v",
        lambda: diffusers.WanTransformer3DModel(**WAN, **_WAN_I2V),
        _i2v_inputs,
        same(),
        "WanImageToVideoPipeline, 2.1",
    ),
    Entry(
        "WanTransformer3DModel-timestep_per_token",
        lambda: diffusers.WanTransformer3DModel(**WAN),
        video_inputs,
        lambda t: {"timestep": full(t, 1, 48)},
        "WanPipeline, 2.2 5B: expand_timesteps",
    ),
    Entry(
        "WanVACETransformer3DModel",
        lambda: diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8),
        lambda draw: video_inputs(draw) | {"control_hidden_states": draw.fixed(1, 8, 3, 8, 8)},
        same(),
        "WanVACEPipeline",
    ),
)
