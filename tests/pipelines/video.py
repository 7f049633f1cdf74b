"""Video pipelines of tiny random components, with classifier-free guidance and latents as output.

Text is passed in as embeddings, so that no pipeline has a tokenizer or a text encoder. Only the pipelines that
encode an image or a video have a VAE; the others fall back on its usual ratios, 8 in space and 4 in time: 9 frames
of 64 x 64 pixels are 3 of 8 x 8 latents. Schedulers are of the class that the released checkpoints have.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
import zoo

from . import Kwargs, PipelineEntry

# --- Components ---------------------------------------------------------------------------------------------


def _seeded(make: Callable[[], Any]) -> Any:
    """A model as its class initialises it, in float32 and eval mode, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().float().eval().requires_grad_(False)


def _transformer(name: str, seed: int = 0, **changes: Any) -> Any:
    """The zoo's transformer of that name, its config changed, its parameters drawn so that attention matters."""
    entry = zoo.BY_NAME[name]

    def make() -> Any:
        model = entry.make()
        return type(model).from_config({**model.config, **changes})

    return replace(entry, make=make).build(seed)


def _cogvideox_vae() -> Any:
    return _seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=64,
            sample_width=64,
        )
    )


def _hunyuan_video_vae() -> Any:
    return _seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        )
    )


def _wan_vae() -> Any:
    return _seeded(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def _siglip() -> Kwargs:
    """An image encoder that makes 4 tokens of width 8, and its preprocessing."""
    import transformers

    config = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    # Its name where it needs no torchvision; before transformers 5, the plain one does not either.
    processor = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    return {
        "image_encoder": _seeded(lambda: transformers.SiglipVisionModel(config)),
        "feature_extractor": processor(size={"height": 8, "width": 8}),
    }


def _cogvideox_scheduler(name: str) -> Any:
    return getattr(diffusers, name)(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        snr_shift_scale=1.0,
    )


def _unipc() -> Any:
    """Wan's scheduler, without the shift towards high noise: timesteps 999, 874, and so on down to 124."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


# --- Pipelines ----------------------------------------------------------------------------------------------

_NO_TEXT = {"tokenizer": None, "text_encoder": None}
_NO_TEXTS = _NO_TEXT | {"tokenizer_2": None, "text_encoder_2": None}


def _cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        transformer=_transformer("CogVideoXTransformer3DModel-rotary"),
        scheduler=_cogvideox_scheduler("CogVideoXDPMScheduler"),
        vae=None,
        **_NO_TEXT,
    )


def _cogvideox_i2v() -> Any:
    """The 5B model: rotary and learned positions; the image's latents come as further channels."""
    return diffusers.CogVideoXImageToVideoPipeline(
        transformer=_transformer(
            "CogVideoXTransformer3DModel-rotary", in_channels=8, use_learned_positional_embeddings=True
        ),
        scheduler=_cogvideox_scheduler("CogVideoXDPMScheduler"),
        vae=_cogvideox_vae(),
        **_NO_TEXT,
    )


def _cogvideox_v2v() -> Any:
    return diffusers.CogVideoXVideoToVideoPipeline(
        transformer=_transformer("CogVideoXTransformer3DModel", num_layers=1),
        scheduler=_cogvideox_scheduler("CogVideoXDDIMScheduler"),
        vae=_cogvideox_vae(),
        **_NO_TEXT,
    )


def _latte() -> Any:
    return diffusers.LattePipeline(
        transformer=_transformer("LatteTransformer3DModel", num_layers=1),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vae=None,
        **_NO_TEXT,
    )


def _allegro() -> Any:
    return diffusers.AllegroPipeline(
        transformer=_transformer("AllegroTransformer3DModel"),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        vae=None,
        **_NO_TEXT,
    )


def _mochi() -> Any:
    return diffusers.MochiPipeline(
        transformer=_transformer("MochiTransformer3DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        **_NO_TEXT,
    )


def _ltx() -> Any:
    return diffusers.LTXPipeline(
        transformer=_transformer("LTXVideoTransformer3DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=None,
        **_NO_TEXT,
    )


def _hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        transformer=_transformer("HunyuanVideoTransformer3DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        **_NO_TEXTS,
    )


def _framepack() -> Any:
    return diffusers.HunyuanVideoFramepackPipeline(
        transformer=_transformer("HunyuanVideoFramepackTransformer3DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_hunyuan_video_vae(),
        **_siglip(),
        **_NO_TEXTS,
    )


def _wan() -> Any:
    return diffusers.WanPipeline(
        transformer=_transformer("WanTransformer3DModel"), scheduler=_unipc(), vae=None, **_NO_TEXT
    )


def _wan_two() -> Any:
    return diffusers.WanPipeline(
        transformer=_transformer("WanTransformer3DModel"),
        transformer_2=_transformer("WanTransformer3DModel", seed=1),
        boundary_ratio=0.55,
        scheduler=_unipc(),
        vae=None,
        **_NO_TEXT,
    )


def _wan_i2v_two() -> Any:
    """Wan 2.2: a mask and the image's latents come as further channels, and there is no image encoder."""
    return diffusers.WanImageToVideoPipeline(
        transformer=_transformer("WanTransformer3DModel", in_channels=12),
        transformer_2=_transformer("WanTransformer3DModel", seed=1, in_channels=12),
        boundary_ratio=0.55,
        scheduler=_unipc(),
        vae=_wan_vae(),
        **_NO_TEXT,
    )


# --- Calls --------------------------------------------------------------------------------------------------

_SIZE = {"height": 64, "width": 64, "num_frames": 9}


def _prompts(pooled: bool = False) -> Kwargs:
    """Embeddings of a prompt and of a negative prompt, each with a pooled one if asked for."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, 7, 16), "negative_prompt_embeds": (1, 7, 16)}
    if pooled:
        shapes |= {"pooled_prompt_embeds": (1, 8), "negative_pooled_prompt_embeds": (1, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _masks(negative: int = 5) -> Kwargs:
    """The prompt fills its 7 tokens; the negative prompt fills as many as given, the rest is padding."""
    mask = torch.ones(1, 7, dtype=torch.bool)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask & (torch.arange(7) < negative)}


def _image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def _video() -> list[Any]:
    """9 frames of 64 x 64 pixels."""
    from PIL import Image

    frames = torch.rand(9, 64, 64, 3, generator=torch.Generator().manual_seed(2)).mul(255).byte()
    return [Image.fromarray(frame.numpy()) for frame in frames]


def _call(steps: int = 8, **kwargs: Any) -> Kwargs:
    return {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **kwargs,
    }


def _hunyuan_video_call(negative: int = 5, **kwargs: Any) -> Kwargs:
    """`guidance_scale` is a condition of the model; `true_cfg_scale` is what makes the branch without the prompt."""
    return _call(true_cfg_scale=3.0, **_SIZE | kwargs, **_prompts(pooled=True), **_masks(negative))


def _framepack_call(num_frames: int) -> Kwargs:
    """The prompts have the same length: the model drops padding, and the hooks mix up the two branches."""
    return _hunyuan_video_call(7, image=_image(), num_frames=num_frames, latent_window_size=3)


ENTRIES: tuple[PipelineEntry, ...] = (
    PipelineEntry("CogVideoXPipeline", _cogvideox, lambda: _call(guidance_scale=6.0, **_SIZE, **_prompts())),
    PipelineEntry(
        "CogVideoXImageToVideoPipeline",
        _cogvideox_i2v,
        lambda: _call(image=_image(), guidance_scale=6.0, **_SIZE, **_prompts()),
    ),
    # A strength below 1 leaves out the first timesteps: 8 of 10 steps run. The number of frames is the video's.
    PipelineEntry(
        "CogVideoXVideoToVideoPipeline",
        _cogvideox_v2v,
        lambda: _call(10, video=_video(), strength=0.8, height=64, width=64, guidance_scale=6.0, **_prompts()),
        steps=10,
    ),
    # No cache context. The negative prompt is "" unless told to be None. It says `video_length`, of latents.
    PipelineEntry(
        "LattePipeline",
        _latte,
        lambda: _call(height=64, width=64, video_length=3, guidance_scale=7.5, negative_prompt=None, **_prompts()),
    ),
    # No cache context. The scheduler draws noise in each step.
    PipelineEntry(
        "AllegroPipeline",
        _allegro,
        lambda: _call(guidance_scale=7.5, negative_prompt=None, **_SIZE, **_prompts(), **_masks()),
    ),
    # The scheduler's timesteps rise from 0; `current_timestep` is 1000 less them. The first half of the steps stays
    # above 970, hence more of them. It compresses time by 6, and its sizes do not come from the VAE.
    PipelineEntry(
        "MochiPipeline",
        _mochi,
        lambda: _call(12, guidance_scale=4.5, **_SIZE | {"num_frames": 13}, **_prompts(), **_masks()),
        steps=12,
    ),
    # `current_timestep` keeps its last value after a run. Without a VAE the ratios are 32 in space and 8 in time.
    PipelineEntry(
        "LTXPipeline",
        _ltx,
        lambda: _call(height=128, width=128, num_frames=17, guidance_scale=3.0, **_prompts(), **_masks()),
    ),
    # Two calls per step, in the cache contexts "cond" and "uncond". diffusers' hooks of PAB do not look at contexts:
    # an attention has one cache and one count of calls for both branches, so that at a skip range of 2 the second
    # branch always gets what the first has computed.
    PipelineEntry("HunyuanVideoPipeline", _hunyuan_video, _hunyuan_video_call),
    # Two calls per step as well, and no cache context to tell them apart.
    PipelineEntry("HunyuanVideoFramepackPipeline", _framepack, lambda: _framepack_call(num_frames=9)),
    # Two sections: `current_timestep` falls twice within one run, and the hooks are not reset in between.
    PipelineEntry("HunyuanVideoFramepackPipeline-two_sections", _framepack, lambda: _framepack_call(num_frames=18)),
    # Two calls per step in contexts, as HunyuanVideo; so do the next two.
    PipelineEntry("WanPipeline", _wan, lambda: _call(guidance_scale=5.0, **_SIZE, **_prompts())),
    # Four steps each: the second transformer takes over below timestep 550.
    PipelineEntry(
        "WanPipeline-two_transformers",
        _wan_two,
        lambda: _call(guidance_scale=4.0, guidance_scale_2=3.0, **_SIZE, **_prompts()),
        denoisers=("transformer", "transformer_2"),
    ),
    PipelineEntry(
        "WanImageToVideoPipeline-two_transformers",
        _wan_i2v_two,
        lambda: _call(image=_image(), guidance_scale=4.0, guidance_scale_2=3.0, **_SIZE, **_prompts()),
        denoisers=("transformer", "transformer_2"),
    ),
)
