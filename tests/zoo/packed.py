"""Image transformers whose pipelines pack latents into tokens: Flux's and Qwen-Image's families."""

import diffusers
import torch

from .entry import Draw, Entry, Kwargs
from .shared import mask, same, thousandth

FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def _grid_ids(height: int = 4, width: int = 4, axes: int = 3) -> torch.Tensor:
    """Flux's ids of packed image tokens, [height * width, axes], with the row and the column at 1 and 2."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.flatten(0, 1)


def flux_inputs(draw: Draw, axes: int = 3) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 16, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "img_ids": _grid_ids(axes=axes),
        "txt_ids": torch.zeros(7, axes),
    }


def _qwen_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 16, 16),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "encoder_hidden_states_mask": mask(5, dtype=torch.bool),
        "img_shapes": [[(1, 4, 4)]],
    }


ENTRIES = (
    Entry(
        "BriaFiboTransformer2DModel",
        lambda: diffusers.BriaFiboTransformer2DModel(**FLUX, axes_dims_rope=[4, 6, 6], text_encoder_dim=8),
        lambda draw: flux_inputs(draw) | {"text_encoder_layers": [draw.fixed(1, 7, 8) for _ in range(2)]},
        same(),
        "BriaFiboPipeline",
    ),
    Entry(
        "BriaTransformer2DModel",
        lambda: diffusers.BriaTransformer2DModel(**FLUX, axes_dims_rope=[4, 6, 6]),
        flux_inputs,
        same(),
        "BriaPipeline; it has no current_timestep",
    ),
    Entry(
        "ChromaTransformer2DModel",
        lambda: diffusers.ChromaTransformer2DModel(
            **FLUX,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        lambda draw: flux_inputs(draw) | {"attention_mask": mask(5, dtype=torch.float32, size=23)},
        thousandth(),
        "ChromaPipeline",
    ),
    Entry(
        "Flux2Transformer2DModel",
        lambda: diffusers.Flux2Transformer2DModel(**FLUX, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        lambda draw: flux_inputs(draw, axes=4) | {"guidance": torch.tensor([4.0])},
        thousandth(),
        "Flux2Pipeline",
    ),
    Entry(
        "FluxTransformer2DModel",
        lambda: diffusers.FluxTransformer2DModel(
            **(FLUX | {"num_layers": 2, "num_single_layers": 2}),
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda draw: {
            **flux_inputs(draw),
            "pooled_projections": draw.fixed(1, 8),
            "guidance": torch.tensor([3.5]),
        },
        thousandth(),
        "FluxPipeline, dev",
    ),
    Entry(
        "LongCatImageTransformer2DModel",
        lambda: diffusers.LongCatImageTransformer2DModel(**FLUX, pooled_projection_dim=8, axes_dims_rope=[4, 6, 6]),
        flux_inputs,
        thousandth(),
        "LongCatImagePipeline",
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        lambda: diffusers.NucleusMoEImageTransformer2DModel(
            **(QWEN | {"num_layers": 2}),
            num_key_value_heads=1,
            mlp_ratio=8.0,  # the dense layers round their size down to a multiple of 128
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        _qwen_inputs,
        thousandth(),
        "NucleusMoEImagePipeline",
    ),
    Entry(
        "OvisImageTransformer2DModel",
        lambda: diffusers.OvisImageTransformer2DModel(**FLUX, out_channels=4, axes_dims_rope=(4, 6, 6)),
        flux_inputs,
        thousandth(),
        "OvisImagePipeline",
    ),
    Entry(
        "QwenImage21Transformer2DModel",
        lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 16, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_hidden_states_mask": mask(7),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 7 + [True] * 4]),  # a slot for every 2 x 2 image tokens
        },
        thousandth(),
        "QwenImage21Pipeline",
    ),
    Entry(
        "QwenImageControlNetModel",
        lambda: diffusers.QwenImageControlNetModel(**QWEN),
        lambda draw: {
            **_qwen_inputs(draw),
            "controlnet_cond": draw.fixed(1, 16, 16),
            "conditioning_scale": 0.8,
        },
        thousandth(),
        "QwenImageControlNetPipeline",
    ),
    Entry(
        "QwenImageMultiControlNetModel",
        lambda: diffusers.QwenImageMultiControlNetModel([diffusers.QwenImageControlNetModel(**QWEN)]),
        lambda draw: {
            **_qwen_inputs(draw),
            "controlnet_cond": [draw.fixed(1, 16, 16), draw.fixed(1, 16, 16)],
            "conditioning_scale": [0.8, 0.6],
        },
        thousandth(),
        "QwenImageControlNetPipeline with a list; one network is called once per condition",
    ),
    Entry(
        "QwenImageTransformer2DModel",
        lambda: diffusers.QwenImageTransformer2DModel(**QWEN),
        _qwen_inputs,
        thousandth(),
        "QwenImagePipeline",
    ),
)
