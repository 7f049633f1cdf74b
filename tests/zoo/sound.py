"""Audio transformers, and those of video with audio."""

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from .entry import Draw, Entry, Kwargs
from .shared import LTX2, full, mask, same, thousandth


def _minimax_h3_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 12, 16),  # 3 frames of 2 x 2 patches
        "audio_hidden_states": draw.noise(1, 5, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "timestep_indices": torch.zeros(24, dtype=torch.int64),
        "token_tags": torch.tensor([1] * 7 + [2] * 5 + [0] * 12),
        "position_ids": draw.fixed(24, 3).abs().mul(4).round(),
        "video_indices": torch.arange(12, 24),
        "audio_indices": torch.arange(7, 12),
        "text_indices": torch.arange(7),
    }


def _ltx2_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 48, 4),
        "audio_hidden_states": draw.noise(1, 5, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "audio_encoder_hidden_states": draw.fixed(1, 7, 16),
        "encoder_attention_mask": mask(5),
        "audio_encoder_attention_mask": mask(5),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 5,
    }


ENTRIES = (
    Entry(
        "AceStepTransformer1DModel",
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,  # sliding and full attention take turns
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=2,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 20, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 32),
            "context_latents": draw.fixed(2, 20, 8),
        },
        lambda t: {"timestep": full(t, 2) / 1000, "timestep_r": full(t, 2) / 1000},
        "AceStepPipeline; its scheduler's timesteps run from 1 to 0 and it has no current_timestep",
    ),
    Entry(
        "Kandinsky6Transformer3DModel",
        lambda: diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 3, 8, 8, 9),
            "audio_hidden_states": draw.noise(1, 5, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "pooled_projections": draw.fixed(1, 8),
            "encoder_attention_mask": mask(5, dtype=torch.bool),
        },
        same(),
        "Kandinsky6TI2VAPipeline",
    ),
    Entry(
        "LTX2VideoTransformer3DModel",
        lambda: diffusers.LTX2VideoTransformer3DModel(**LTX2),
        _ltx2_inputs,
        lambda t: {"timestep": full(t, 1), "sigma": full(t, 1)},
        "LTX2Pipeline",
    ),
    Entry(
        "MiniMaxH3Transformer3DModel",
        lambda: diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            ffn_dim=48,
            in_channels=4,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=32,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax_h3_inputs,
        same(),
        "MiniMaxH3ModularPipeline; it has no current_timestep",
    ),
    Entry(
        "StableAudioDiTModel",
        lambda: diffusers.StableAudioDiTModel(
            sample_size=20,
            in_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=8,
            cross_attention_input_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 20),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "global_hidden_states": draw.fixed(2, 1, 8),
            "rotary_embedding": get_1d_rotary_pos_embed(8, 21, use_real=True, repeat_interleave_real=False),
        },
        thousandth(),
        "StableAudioPipeline; its scheduler's timesteps are below 1 and it has no current_timestep",
    ),
)
