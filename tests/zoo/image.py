"""Image transformers whose latents are pictures."""

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from .entry import Draw, Entry, Kwargs
from .shared import PIXART_LIKE, SANA, full, mask, same, thousandth


def _size_inputs(batch: int) -> Kwargs:
    """CogView's size conditions."""
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def _hunyuan_dit_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(2, 4, 8, 8),
        "encoder_hidden_states": draw.fixed(2, 7, 16),
        "text_embedding_mask": mask(5, 7),
        "encoder_hidden_states_t5": draw.fixed(2, 5, 16),
        "text_embedding_mask_t5": mask(5, 3, size=5),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(2, 1),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    }


def _omnigen_inputs(draw: Draw) -> Kwargs:
    length = 7 + 1 + 16  # text, time token, image
    return {
        "hidden_states": draw.noise(2, 4, 8, 8),
        "input_ids": torch.arange(14).reshape(2, 7),
        "input_img_latents": [draw.fixed(1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 6]]},
        "attention_mask": torch.ones(2, length, length).tril(),
        "position_ids": torch.arange(length).repeat(2, 1),
    }


def _image_inputs(draw: Draw, batch: int = 2) -> Kwargs:
    return {"hidden_states": draw.noise(batch, 4, 8, 8), "encoder_hidden_states": draw.fixed(batch, 7, 16)}


ENTRIES = (
    Entry(
        "AuraFlowTransformer2DModel",
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        _image_inputs,
        thousandth(batch=2),
        "AuraFlowPipeline",
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        lambda: diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        lambda draw: _image_inputs(draw) | _size_inputs(batch=2),
        same(batch=2, dtype=torch.int64),
        "CogView3PlusPipeline",
    ),
    Entry(
        "CogView4Transformer2DModel",
        lambda: diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
        ),
        lambda draw: _image_inputs(draw, batch=1) | _size_inputs(batch=1),
        same(),
        "CogView4Pipeline",
    ),
    Entry(
        "DiTTransformer2DModel",
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=1, sample_size=8
        ),
        lambda draw: {"hidden_states": draw.noise(2, 4, 8, 8), "class_labels": torch.tensor([3, 1000])},
        same(batch=2, dtype=torch.int64),
        "DiTPipeline",
    ),
    Entry(
        "GlmImageTransformer2DModel",
        lambda: diffusers.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": torch.tensor([[64.0, 64.0]]),
            "crop_coords": torch.zeros(1, 2),
        },
        lambda t: {"timestep": full(t, 1) - 1},
        "GlmImagePipeline",
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=8,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 0, 1],
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states_t5": draw.fixed(2, 7, 16),
            "encoder_hidden_states_llama3": draw.fixed(2, 2, 7, 16),
            "pooled_embeds": draw.fixed(2, 8),
        },
        lambda t: {"timesteps": full(t, 2)},
        "HiDreamImagePipeline",
    ),
    Entry(
        "HunyuanDiT2DModel",
        lambda: diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=4,  # the last one has a skip connection from the first
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=7,
            text_len_t5=5,
        ),
        _hunyuan_dit_inputs,
        same(batch=2),
        "HunyuanDiTPipeline",
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            rope_axes_dim=(8, 8),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 4, 4, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": mask(5),
            "encoder_hidden_states_2": draw.fixed(1, 5, 8),
            "encoder_attention_mask_2": mask(3, size=5),
        },
        same(),
        "HunyuanImagePipeline",
    ),
    Entry(
        "Lumina2Transformer2DModel",
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 16, 16),
            cap_feat_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": mask(7, dtype=torch.bool),
        },
        lambda t: {"timestep": 1 - full(t, 1) / 1000},
        "Lumina2Pipeline; it has no current_timestep",
    ),
    Entry(
        "LuminaNextDiT2DModel",
        lambda: diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_mask": mask(7, 5),
            "image_rotary_emb": torch.polar(torch.ones(4, 4, 8), draw.fixed(4, 4, 8)),
            "cross_attention_kwargs": {"base_sequence_length": 16},
        },
        lambda t: {"timestep": 1 - full(t, 2) / 1000},
        "LuminaPipeline; it has no current_timestep",
    ),
    Entry(
        "OmniGenTransformer2DModel",
        lambda: diffusers.OmniGenTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            num_layers=1,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=32,
        ),
        _omnigen_inputs,
        lambda t: {"timestep": 1 - full(t, 2) / 1000},
        "OmniGenPipeline; its schedule runs upwards from 0 to 1",
    ),
    Entry(
        "PRXTransformer2DModel",
        lambda: diffusers.PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2,
            num_heads=2,
            depth=1,
            axes_dim=[8, 8],
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "attention_mask": mask(7, 5, dtype=torch.bool),
        },
        thousandth(batch=2),
        "PRXPipeline",
    ),
    Entry(
        "PixArtTransformer2DModel",
        lambda: diffusers.PixArtTransformer2DModel(**PIXART_LIKE),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        same(batch=2, dtype=torch.int64),
        "PixArtAlphaPipeline",
    ),
    Entry(
        "SD3Transformer2DModel",
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,  # the last one leaves out the text
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "pooled_projections": draw.fixed(2, 8),
        },
        same(batch=2),
        "StableDiffusion3Pipeline, 3.5 medium",
    ),
    Entry(
        "SanaTransformer2DModel",
        lambda: diffusers.SanaTransformer2DModel(**SANA),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 4, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": mask(7, 5),
        },
        same(batch=2),
        "SanaPipeline",
    ),
    Entry(
        "Transformer2DModel",
        lambda: diffusers.Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=32,
            num_layers=1,
            norm_num_groups=4,
            cross_attention_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 32, 4, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
        },
        same(batch=2, dtype=torch.int64),
        "the attention of UNet2DConditionModel; it ignores the timestep",
    ),
    Entry(
        "ZImageTransformer2DModel",
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        ),
        lambda draw: {"x": [draw.noise(4, 1, 16, 16)], "cap_feats": [draw.fixed(7, 16)]},
        lambda t: {"t": (1000 - full(t, 1)) / 1000},
        "ZImagePipeline; it has no current_timestep",
    ),
)
