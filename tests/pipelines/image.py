"""Image pipelines of tiny random components.

All make latents of 8 x 8 or, of packed 2 x 2 patches, 16 tokens. Text encoders are left out: prompts are
embeddings of 7 tokens. Guidance is on, so that there are its two branches: in one batch, or in two calls.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
import zoo

from . import Kwargs, PipelineEntry

_STEPS = 8

# --- Components ---------------------------------------------------------------------------------------------


def _redrawn(make: Callable[[], Any]) -> Any:
    """The model in float32 and eval mode, without gradients, its parameters drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval().requires_grad_(False)
        zoo.redraw_(model)
    return model


def _vae(latent_channels: int) -> Any:
    """Images of 8 times the height and width of the latents."""
    return _redrawn(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=latent_channels,
            norm_num_groups=2,
            mid_block_add_attention=False,
            scaling_factor=0.5,
            shift_factor=0.1,
        )
    )


def _vae_qwen() -> Any:
    return _redrawn(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def _vae_dc() -> Any:
    """Sana's; images of 4 times the height and width of the latents."""
    return _redrawn(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(8,) * 3,
            encoder_layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
            encoder_qkv_multiscales=((),) * 3,
            decoder_qkv_multiscales=((),) * 3,
            scaling_factor=0.4,
        )
    )


def _unet() -> Any:
    return _redrawn(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        )
    )


def _flow_dynamic(**overrides: Any) -> Any:
    """Flow matching whose shift depends on the number of tokens, as for Flux."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **overrides)


def _ddim(**overrides: Any) -> Any:
    """It finds its step in the timestep alone and has no `_step_index`."""
    return diffusers.DDIMScheduler(clip_sample=False, **overrides)


# --- Calls --------------------------------------------------------------------------------------------------


def _call(**kwargs: Any) -> Kwargs:
    """`kwargs` and what every call has; the generator is new, so each call draws the same noise."""
    return {
        "num_inference_steps": _STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **kwargs,
    }


def _prompts(
    *, pooled: bool = False, masks: str = "", mask_dtype: torch.dtype = torch.int64, negative_length: int = 5
) -> Kwargs:
    """Embeddings of a prompt and of a negative prompt, 7 tokens of 16 features each.

    Args:
        pooled: Whether there are pooled embeddings of 8 features too.
        masks: What the argument of the prompt's padding mask is called; nothing for no masks. The prompt has
            no padding.
        mask_dtype: The masks' dtype.
        negative_length: Tokens of the negative prompt that its mask does not leave out.
    """
    draw = zoo.Draw(0)
    kwargs = {"prompt_embeds": draw.fixed(1, 7, 16), "negative_prompt_embeds": draw.noise(1, 7, 16)}
    if pooled:
        kwargs |= {"pooled_prompt_embeds": draw.fixed(1, 8), "negative_pooled_prompt_embeds": draw.noise(1, 8)}
    if masks:
        negative = torch.ones(1, 7, dtype=mask_dtype)
        negative[:, negative_length:] = 0
        kwargs |= {masks: torch.ones(1, 7, dtype=mask_dtype), f"negative_{masks}": negative}
    return kwargs


def _without_negative(kwargs: Kwargs) -> Kwargs:
    return {name: value for name, value in kwargs.items() if not name.startswith("negative_")}


def _size(height: int = 64, width: int = 64) -> Kwargs:
    return {"height": height, "width": width}


def _image(height: int = 64, width: int = 64) -> torch.Tensor:
    """An image to start from or to edit, between 0 and 1."""
    return zoo.Draw(0).fixed(1, 3, height, width).sigmoid()


# --- Flux and its relatives: packed latents, timestep / 1000 -------------------------------------------------


def _flux(cls: Any, layers: int = 1) -> Any:
    """With so many blocks of each of the two kinds."""
    entry = zoo.BY_NAME["FluxTransformer2DModel"]

    def make() -> Any:
        model = entry.make()
        return type(model).from_config({**model.config, "num_layers": layers, "num_single_layers": layers})

    return cls(
        transformer=replace(entry, make=make).build(),
        scheduler=_flow_dynamic(),
        vae=_vae(1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=zoo.BY_NAME["ChromaTransformer2DModel"].build(),
        scheduler=_flow_dynamic(),
        vae=_vae(1),
        text_encoder=None,
        tokenizer=None,
    )


def _qwen() -> Any:
    return diffusers.QwenImagePipeline(
        transformer=zoo.BY_NAME["QwenImageTransformer2DModel"].build(),
        scheduler=_flow_dynamic(),
        vae=_vae_qwen(),
        text_encoder=None,
        tokenizer=None,
    )


def _qwen_prompts(batch: int = 1) -> Kwargs:
    """Prompts of 7 and, where there is a second, 5 tokens; negative prompts, one text for all, of 7."""
    draw = zoo.Draw(0)
    mask = torch.ones(batch, 7, dtype=torch.int64)
    mask[1:, 5:] = 0
    return {
        "prompt_embeds": draw.fixed(batch, 7, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": draw.noise(1, 7, 16).repeat(batch, 1, 1),
        "negative_prompt_embeds_mask": torch.ones(batch, 7, dtype=torch.int64),
    }


_FLUX_LIKE = (
    # Guidance is distilled: an input of the model, and one call per step, in the cache context "cond".
    PipelineEntry(
        "FluxPipeline",
        lambda: _flux(diffusers.FluxPipeline),
        lambda: _call(**_size(), **_without_negative(_prompts(pooled=True))),
    ),
    # Two calls per step, in the cache contexts "cond" and "uncond".
    PipelineEntry(
        "FluxPipeline-true_cfg",
        lambda: _flux(diffusers.FluxPipeline),
        lambda: _call(**_size(), **_prompts(pooled=True), true_cfg_scale=3.0),
    ),
    # No cache context. The 12 tokens of the image to edit follow the 16 that are denoised.
    PipelineEntry(
        "FluxKontextPipeline",
        lambda: _flux(diffusers.FluxKontextPipeline),
        lambda: _call(
            **_size(),
            **_without_negative(_prompts(pooled=True)),
            image=_image(64, 48),
            max_area=64 * 64,
            _auto_resize=False,
        ),
    ),
    # Two calls per step without a cache context: only their order tells them apart.
    PipelineEntry(
        "FluxKontextPipeline-true_cfg",
        lambda: _flux(diffusers.FluxKontextPipeline),
        lambda: _call(
            **_size(),
            **_prompts(pooled=True),
            image=_image(64, 48),
            max_area=64 * 64,
            _auto_resize=False,
            true_cfg_scale=3.0,
        ),
    ),
    # No current_timestep and no cache context. The first 2 of the 8 timesteps are left out.
    PipelineEntry(
        "FluxImg2ImgPipeline",
        lambda: _flux(diffusers.FluxImg2ImgPipeline),
        lambda: _call(**_size(), **_without_negative(_prompts(pooled=True)), image=_image(), strength=0.75),
    ),
    # Two calls per step without a cache context.
    PipelineEntry(
        "ChromaPipeline",
        _chroma,
        lambda: _call(
            **_size(), **_prompts(masks="prompt_attention_mask", mask_dtype=torch.float32), guidance_scale=3.0
        ),
    ),
    # Two calls per step, in the cache contexts "cond" and "uncond". The pipeline drops masks that mask nothing.
    PipelineEntry(
        "QwenImagePipeline",
        _qwen,
        lambda: _call(**_size(), **_qwen_prompts(), true_cfg_scale=3.0),
    ),
    # The same with a batch of prompts of two lengths: the call "cond" has a mask and "uncond" has None.
    PipelineEntry(
        "QwenImagePipeline-batch",
        _qwen,
        lambda: _call(**_size(), **_qwen_prompts(batch=2), true_cfg_scale=3.0),
    ),
)

# --- Other transformers -------------------------------------------------------------------------------------


def _cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=zoo.BY_NAME["CogView4Transformer2DModel"].build(),
        scheduler=_flow_dynamic(base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=zoo.BY_NAME["SD3Transformer2DModel"].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=zoo.BY_NAME["PixArtTransformer2DModel"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading"),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


def _sana() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        transformer=zoo.BY_NAME["SanaTransformer2DModel"].build(),
        scheduler=scheduler,
        vae=_vae_dc(),
        text_encoder=None,
        tokenizer=None,
    )


def _dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=zoo.BY_NAME["DiTTransformer2DModel"].build(), scheduler=_ddim(), vae=_vae(4)
    )


def _hunyuan_dit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        transformer=zoo.BY_NAME["HunyuanDiT2DModel"].build(),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_end=0.018,
            clip_sample=False,
            prediction_type="v_prediction",
            steps_offset=1,
        ),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _hunyuan_dit_prompts() -> Kwargs:
    """Embeddings of the two text encoders, 7 and 5 tokens."""
    draw = zoo.Draw(1)
    return _prompts(masks="prompt_attention_mask") | {
        "prompt_embeds_2": draw.fixed(1, 5, 16),
        "negative_prompt_embeds_2": draw.noise(1, 5, 16),
        "prompt_attention_mask_2": torch.ones(1, 5, dtype=torch.int64),
        "negative_prompt_attention_mask_2": torch.tensor([[1, 1, 1, 0, 0]]),
    }


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=zoo.BY_NAME["Lumina2Transformer2DModel"].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


_OTHERS = (
    # Two calls per step, in the cache contexts "cond" and "uncond".
    PipelineEntry(
        "CogView4Pipeline",
        _cogview4,
        lambda: _call(**_size(), **_prompts(), guidance_scale=3.0),
    ),
    # No current_timestep and no cache context; both branches in one batch.
    PipelineEntry(
        "StableDiffusion3Pipeline",
        _sd3,
        lambda: _call(**_size(), **_prompts(pooled=True), guidance_scale=3.0),
    ),
    # The same with another call in step 1, of the prompt alone, a batch of 1, and without block 1. diffusers' hooks
    # keep its outputs, and in step 2 they are broadcast to both branches.
    PipelineEntry(
        "StableDiffusion3Pipeline-skip_layers",
        _sd3,
        lambda: _call(**_size(), **_prompts(pooled=True), guidance_scale=3.0, skip_guidance_layers=[1]),
    ),
    # No current_timestep. Learned sigmas: the pipeline drops half of the model's channels.
    PipelineEntry(
        "PixArtSigmaPipeline",
        _pixart_sigma,
        lambda: _call(
            **_size(),
            **_prompts(masks="prompt_attention_mask"),
            negative_prompt=None,
            guidance_scale=3.0,
            use_resolution_binning=False,
        ),
    ),
    # No current_timestep. Its self-attention is linear.
    PipelineEntry(
        "SanaPipeline",
        _sana,
        lambda: _call(
            **_size(32, 32),
            **_prompts(masks="prompt_attention_mask"),
            negative_prompt=None,
            guidance_scale=3.0,
            use_resolution_binning=False,
        ),
    ),
    # No current_timestep. It always decodes; the scheduler has no _step_index.
    PipelineEntry(
        "DiTPipeline",
        _dit,
        lambda: _call(class_labels=[3, 7], guidance_scale=3.0, output_type="pt"),
    ),
    # No current_timestep. The scheduler has no _step_index and adds noise in each step.
    PipelineEntry(
        "HunyuanDiTPipeline",
        _hunyuan_dit,
        lambda: _call(**_size(), **_hunyuan_dit_prompts(), guidance_scale=3.0, use_resolution_binning=False),
    ),
    # No current_timestep and no cache context; two calls per step. The model gets 1 - timestep / 1000. It drops
    # padding, and diffusers' hooks, which give one call the outputs of the other, fail for two lengths.
    PipelineEntry(
        "Lumina2Pipeline",
        _lumina2,
        lambda: _call(
            **_size(),
            **_prompts(masks="prompt_attention_mask", mask_dtype=torch.bool, negative_length=7),
            guidance_scale=3.0,
        ),
    ),
    # The same with two calls in each of the first 4 steps and one in each of the others.
    PipelineEntry(
        "Lumina2Pipeline-truncated_cfg",
        _lumina2,
        lambda: _call(
            **_size(),
            **_prompts(masks="prompt_attention_mask", mask_dtype=torch.bool, negative_length=7),
            guidance_scale=3.0,
            cfg_trunc_ratio=0.5,
        ),
    ),
)

# --- Stable Diffusion's U-Net -------------------------------------------------------------------------------

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _sd(scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=_unet(),
        scheduler=scheduler,
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd_call() -> Kwargs:
    return _call(**_size(), **_prompts(), guidance_scale=3.0)


# No current_timestep; the model gets the timestep as a tensor without dimensions, by position.
_UNET = (
    # Decoded images.
    PipelineEntry(
        "StableDiffusionPipeline",
        lambda: _sd(_ddim(**_BETAS, steps_offset=1)),
        lambda: _sd_call() | {"output_type": "pt"},
        denoisers=("unet",),
    ),
    # The scheduler of the first checkpoints: one call more than steps, the second timestep comes twice.
    PipelineEntry(
        "StableDiffusionPipeline-pndm",
        lambda: _sd(diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1)),
        _sd_call,
        denoisers=("unet",),
    ),
    # A scheduler of second order: all timesteps but the first come twice.
    PipelineEntry(
        "StableDiffusionPipeline-heun",
        lambda: _sd(diffusers.HeunDiscreteScheduler(**_BETAS, steps_offset=1)),
        _sd_call,
        denoisers=("unet",),
    ),
)

ENTRIES: tuple[PipelineEntry, ...] = (*_FLUX_LIKE, *_OTHERS, *_UNET)
