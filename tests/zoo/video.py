"""Video transformers, without those of the Wan family."""

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro

from .entry import Draw, Entry, Kwargs
from .shared import LTX2, PIXART_LIKE, SANA, full, mask, same, video_inputs

_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,  # 3 after the temporal compression by 4
    "max_text_seq_length": 7,
}
_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _allegro_rotary_emb() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    rotary: Any = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=3
    )
    freqs_t, freqs_h, freqs_w, *grid = rotary
    positions = torch.cartesian_prod(*(axis.long() for axis in grid)).T.reshape(3, 1, -1)
    return (freqs_t, freqs_h, freqs_w), tuple(positions)


def _hunyuan_video_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 4, 3, 8, 8),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "encoder_attention_mask": mask(5),
        "pooled_projections": draw.fixed(1, 8),
        "guidance": torch.tensor([6016.0]),
    }


def _framepack_inputs(draw: Draw) -> Kwargs:
    return _hunyuan_video_inputs(draw) | {
        "image_embeds": draw.fixed(1, 5, 8),
        "indices_latents": torch.arange(8, 11),
        "latents_clean": draw.fixed(1, 4, 2, 8, 8),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": draw.fixed(1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": draw.fixed(1, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def _cosmos3_inputs(draw: Draw) -> Kwargs:
    vision = torch.arange(7, 19)  # 3 frames of 2 x 2 patches, after 7 text tokens
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).T + 100
    return {
        "input_ids": torch.arange(7),
        "text_indexes": torch.arange(7),
        "position_ids": torch.cat([torch.arange(7).expand(3, -1), grid], dim=1),
        "und_len": 7,
        "sequence_length": 19,
        "vision_tokens": [draw.noise(1, 4, 3, 4, 4)],
        "vision_token_shapes": [(3, 2, 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_noisy_frame_indexes": [torch.arange(3)],
    }


def _sana_wm_refiner_inputs(draw: Draw) -> Kwargs:
    # Not at the top: older releases of diffusers do not have it.
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=32, patch_size=1, patch_size_t=1, num_attention_heads=2)
    coordinates = rope.prepare_video_coords(1, 3, 4, 4, torch.device("cpu"), fps=24.0)
    return {
        "hidden_states": draw.noise(1, 48, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "video_rotary_emb": rope(coordinates, device=torch.device("cpu")),
        "encoder_attention_mask": mask(5),
    }


def _cogvideox_inputs(draw: Draw) -> Kwargs:
    """Frames come before channels."""
    return {"hidden_states": draw.noise(2, 3, 4, 8, 8), "encoder_hidden_states": draw.fixed(2, 7, 16)}


ENTRIES = (
    Entry(
        "AllegroTransformer3DModel",
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=1,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=3,
            caption_channels=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5),
            "image_rotary_emb": _allegro_rotary_emb(),
        },
        same(batch=2, dtype=torch.int64),
        "AllegroPipeline",
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        lambda: diffusers.CogVideoXTransformer3DModel(**(_COGVIDEOX | {"num_layers": 2})),
        _cogvideox_inputs,
        same(batch=2, dtype=torch.int64),
        "CogVideoXPipeline, 2B: sincos positions",
    ),
    Entry(
        "CogVideoXTransformer3DModel-rotary",
        lambda: diffusers.CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True),
        lambda draw: {
            **_cogvideox_inputs(draw),
            "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3),
        },
        same(batch=2, dtype=torch.int64),
        "CogVideoXPipeline, 5B: rotary positions",
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        lambda: diffusers.ConsisIDTransformer3DModel(
            **_COGVIDEOX,
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=16,
            cross_attn_num_heads=1,
            LFE_id_dim=4,
            LFE_vit_dim=4,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=1,
            LFE_output_dim=21,  # two thirds of the hidden size: keys and values of the face attention
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        lambda draw: {
            **_cogvideox_inputs(draw),
            "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3),
            "id_cond": draw.fixed(2, 4),
            "id_vit_hidden": [draw.fixed(2, 5, 4)],
        },
        same(batch=2, dtype=torch.int64),
        "ConsisIDPipeline",
    ),
    Entry(
        "Cosmos3OmniTransformer",
        lambda: diffusers.Cosmos3OmniTransformer(
            dtype="float32",
            head_dim=16,
            hidden_size=32,
            intermediate_size=48,
            latent_channel=4,
            latent_patch_size=2,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=1,
            patch_latent_dim=16,
            vocab_size=32,
            rope_axes_dim=[4, 2, 2],
        ),
        _cosmos3_inputs,
        lambda t: {"vision_timesteps": full(t, 12)},
        "Cosmos3OmniPipeline",
    ),
    Entry(
        "CosmosTransformer3DModel",
        lambda: diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=8,
            max_size=(4, 8, 8),
            concat_padding_mask=False,  # would need torchvision
        ),
        lambda draw: video_inputs(draw) | {"fps": 24},
        same(),
        "CosmosTextToWorldPipeline",
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            text_embed_dim=16,
        ),
        lambda draw: video_inputs(draw, batch=2),
        same(batch=2),
        "EasyAnimatePipeline",
    ),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 9, 3, 4, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": mask(5),
            "encoder_hidden_states_2": draw.fixed(1, 5, 8),
            "encoder_attention_mask_2": mask(3, size=5),
            "image_embeds": draw.fixed(1, 6, 8),
        },
        same(),
        "HunyuanVideo15ImageToVideoPipeline",
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            **_HUNYUAN_VIDEO, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
        ),
        _framepack_inputs,
        same(),
        "HunyuanVideoFramepackPipeline",
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        lambda: diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN_VIDEO),
        _hunyuan_video_inputs,
        same(),
        "HunyuanVideoPipeline",
    ),
    Entry(
        "HunyuanVideoTransformer3DModel-token_replace",
        lambda: diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN_VIDEO, image_condition_type="token_replace"),
        _hunyuan_video_inputs,
        same(),
        "HunyuanVideoImageToVideoPipeline",
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        lambda: diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 3, 8, 8, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "pooled_projections": draw.fixed(1, 8),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(7),
        },
        same(),
        "Kandinsky5T2VPipeline; it has no current_timestep",
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 48, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5),
            "num_frames": 3,
            "height": 4,
            "width": 4,
        },
        same(batch=2),
        "LTXPipeline",
    ),
    Entry(
        "LatteTransformer3DModel",
        lambda: diffusers.LatteTransformer3DModel(**PIXART_LIKE, video_length=3),
        lambda draw: video_inputs(draw, batch=2),
        same(batch=2, dtype=torch.int64),
        "LattePipeline",
    ),
    Entry(
        "MochiTransformer3DModel",
        lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,  # the last one leaves out the text
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5, dtype=torch.bool),
        },
        lambda t: {"timestep": full(1000 - t, 2)},
        "MochiPipeline; its schedule runs upwards, current_timestep is 1000 less it",
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        lambda: diffusers.MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 9, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": mask(5),
        },
        same(),
        "MotifVideoPipeline",
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        lambda: diffusers.SanaVideoTransformer3DModel(**SANA),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5),
        },
        same(batch=2),
        "SanaVideoPipeline",
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        lambda: diffusers.SanaWMLTX2RefinerTransformer3DModel(**LTX2),
        _sana_wm_refiner_inputs,
        lambda t: {"timestep": full(t, 1, 48)},
        "SanaWMPipeline's refiner, without its key-value cache; it has no current_timestep",
    ),
    Entry(
        "TransformerTemporalModel",
        lambda: diffusers.TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=1, norm_num_groups=4
        ),
        lambda draw: {"hidden_states": draw.noise(6, 32, 4, 4), "num_frames": 3},
        same(batch=2, dtype=torch.int64),
        "the temporal attention of TextToVideoSDPipeline; it ignores the timestep",
    ),
)
