"""Tiny, randomly initialised transformers of diffusers, with inputs as their pipelines give them.

Every transformer class of diffusers that mixes in `CacheMixin` is here, and the main ones that do not. Sizes
are as small as the configs allow; lengths that mean different things differ (7 text tokens, 16 image tokens,
3 frames), so that nothing matches by accident.

The oracle of the tests is diffusers' own Pyramid Attention Broadcast: `hooked` applies it to a copy of a
model, and `diffusers_config` makes a config whose identifiers reach every attention that the hooks recognise.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from torch import nn

from .hooked import Clock

Kwargs = dict[str, Any]


class Draw:
    """Draws the tensors of one step: `noise` depends on the step's seed, `fixed` does not."""

    def __init__(self, seed: int) -> None:
        self._noise = torch.Generator().manual_seed(1000 + seed)
        self._fixed = torch.Generator().manual_seed(0)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._noise)

    def fixed(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._fixed)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: Class name in diffusers, with a suffix after `-` where a class is here in several forms.
        make: Builds the model; its parameters are drawn anew by `build`.
        make_inputs: Keyword arguments of `forward` for one step, without the timestep.
        timestep: From `pipe.current_timestep` (0 to 1000) to the keyword arguments that the pipeline makes
            of it; where it makes several, the first is the timestep.
        pipeline_note: The pipeline that calls the model this way.
    """

    name: str
    make: Callable[[], Any]
    make_inputs: Callable[[Draw], Kwargs]
    timestep: Callable[[float], Kwargs]
    pipeline_note: str

    @property
    def class_name(self) -> str:
        return self.name.split("-")[0]

    @property
    def timestep_name(self) -> str:
        return next(iter(self.timestep(500.0)))

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float32 and eval mode, without gradients, its parameters drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = self.make().float().eval().requires_grad_(False)
            redraw_(model)
        return model

    def inputs(self, seed: int) -> Kwargs:
        """Keyword arguments for one step: hidden states drawn from `seed`, conditions the same for each."""
        return self.make_inputs(Draw(seed))

    def step(self, t: float, seed: int) -> Kwargs:
        """All keyword arguments of `forward` for a step at `pipe.current_timestep == t`."""
        return {**self.inputs(seed), **self.timestep(t), "return_dict": False}


def redraw_(model: nn.Module) -> None:
    """Draw all parameters from a normal, so that no zero-initialised gate or projection hides an attention.

    Weights of norms are around 1, and matrices keep the scale of what they multiply.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        elif name.endswith("weight"):
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:  # tables of modulation, padding tokens, experts
            parameter.normal_(std=0.3)


def call(entry: Entry, model: Callable[..., Any], t: float, seed: int) -> tuple[torch.Tensor, ...]:
    """The output tensors of one denoising step at `pipe.current_timestep == t`."""
    with torch.no_grad():
        output = model(**entry.step(t, seed))
    return tuple(tensors(output))


def tensors(output: Any) -> Iterable[torch.Tensor]:
    """All tensors of a nest of tuples and lists, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


# --- Oracle: diffusers' hooks -------------------------------------------------------------------------------

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


def trajectory(
    entry: Entry, model: Callable[..., Any], timesteps: Iterable[float], clock: Clock | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Outputs of one generation: each step has a timestep and hidden states of its own, and sets `clock`."""
    outputs = []
    for step, t in enumerate(timesteps):
        if clock is not None:
            clock.t = t
        # A kept output must not be one that a later step writes to.
        outputs.append(tuple(output.clone() for output in call(entry, model, t, seed=step)))
    return outputs


# --- How pipelines pass the timestep ------------------------------------------------------------------------


def _full(t: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(t))


def _same(batch: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[float], Kwargs]:
    """`t.expand(batch)`; schedulers of the DDIM family have integer timesteps."""
    return lambda t: {"timestep": _full(t, batch).to(dtype)}


def _thousandth(batch: int = 1) -> Callable[[float], Kwargs]:
    """`t.expand(batch) / 1000`, as most flow-matching pipelines pass it."""
    return lambda t: {"timestep": _full(t, batch) / 1000}


# --- Parts of inputs ----------------------------------------------------------------------------------------


def _mask(*lengths: int, size: int = 7, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Padding mask [batch, size], ones for the first `length` tokens of each item."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).to(dtype)


def _grid_ids(height: int = 4, width: int = 4, axes: int = 3) -> torch.Tensor:
    """Flux's ids of packed image tokens, [height * width, axes], with the row and the column at 1 and 2."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.flatten(0, 1)


def _flux_inputs(draw: Draw, axes: int = 3) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 16, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "img_ids": _grid_ids(axes=axes),
        "txt_ids": torch.zeros(7, axes),
    }


def _size_inputs(batch: int) -> Kwargs:
    """CogView's size conditions."""
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


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
        "encoder_attention_mask": _mask(5),
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


def _helios_inputs(draw: Draw) -> Kwargs:
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


def _qwen_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 16, 16),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "encoder_hidden_states_mask": _mask(5, dtype=torch.bool),
        "img_shapes": [[(1, 4, 4)]],
    }


def _ltx2_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(1, 48, 4),
        "audio_hidden_states": draw.noise(1, 5, 4),
        "encoder_hidden_states": draw.fixed(1, 7, 16),
        "audio_encoder_hidden_states": draw.fixed(1, 7, 16),
        "encoder_attention_mask": _mask(5),
        "audio_encoder_attention_mask": _mask(5),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 5,
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
        "encoder_attention_mask": _mask(5),
    }


def _hunyuan_dit_inputs(draw: Draw) -> Kwargs:
    return {
        "hidden_states": draw.noise(2, 4, 8, 8),
        "encoder_hidden_states": draw.fixed(2, 7, 16),
        "text_embedding_mask": _mask(5, 7),
        "encoder_hidden_states_t5": draw.fixed(2, 5, 16),
        "text_embedding_mask_t5": _mask(5, 3, size=5),
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


def _i2v_inputs(draw: Draw) -> Kwargs:
    """Wan's image-to-video takes all but the last 512 tokens of the conditions for image tokens."""
    return {
        "hidden_states": draw.noise(1, 4, 3, 8, 8),
        "encoder_hidden_states": draw.fixed(1, 512, 16),
        "encoder_hidden_states_image": draw.fixed(1, 5, 8),
    }


def _video_inputs(draw: Draw, batch: int = 1) -> Kwargs:
    return {"hidden_states": draw.noise(batch, 4, 3, 8, 8), "encoder_hidden_states": draw.fixed(batch, 7, 16)}


def _cogvideox_inputs(draw: Draw) -> Kwargs:
    """Frames come before channels."""
    return {"hidden_states": draw.noise(2, 3, 4, 8, 8), "encoder_hidden_states": draw.fixed(2, 7, 16)}


def _image_inputs(draw: Draw, batch: int = 2) -> Kwargs:
    return {"hidden_states": draw.noise(batch, 4, 8, 8), "encoder_hidden_states": draw.fixed(batch, 7, 16)}


# --- Configs that several entries share ---------------------------------------------------------------------

_FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
_WAN_I2V = {"image_dim": 8, "added_kv_proj_dim": 32}
_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
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
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
_QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
}
_PIXART_LIKE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "sample_size": 8,
}

# --- Classes with CacheMixin --------------------------------------------------------------------------------

_WITH_CACHE_MIXIN = (
    Entry(
        "AceStepTransformer1DModel",
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,  # sliding and full attention take turns
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
        lambda t: {"timestep": _full(t, 2) / 1000, "timestep_r": _full(t, 2) / 1000},
        "AceStepPipeline; its scheduler's timesteps run from 1 to 0 and it has no current_timestep",
    ),
    Entry(
        "AllegroTransformer3DModel",
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=3,
            caption_channels=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5),
            "image_rotary_emb": _allegro_rotary_emb(),
        },
        _same(batch=2, dtype=torch.int64),
        "AllegroPipeline",
    ),
    Entry(
        "BriaTransformer2DModel",
        lambda: diffusers.BriaTransformer2DModel(**_FLUX, axes_dims_rope=[4, 6, 6]),
        _flux_inputs,
        _same(),
        "BriaPipeline; it has no current_timestep",
    ),
    Entry(
        "ChromaTransformer2DModel",
        lambda: diffusers.ChromaTransformer2DModel(
            **_FLUX,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        lambda draw: _flux_inputs(draw) | {"attention_mask": _mask(5, dtype=torch.float32, size=23)},
        _thousandth(),
        "ChromaPipeline",
    ),
    Entry(
        "ChronoEditTransformer3DModel",
        lambda: diffusers.ChronoEditTransformer3DModel(**_WAN, **_WAN_I2V),
        _i2v_inputs,
        _same(),
        "ChronoEditPipeline",
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        lambda: diffusers.CogVideoXTransformer3DModel(**_COGVIDEOX),
        _cogvideox_inputs,
        _same(batch=2, dtype=torch.int64),
        "CogVideoXPipeline, 2B: sincos positions",
    ),
    Entry(
        "CogVideoXTransformer3DModel-rotary",
        lambda: diffusers.CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True),
        lambda draw: {
            **_cogvideox_inputs(draw),
            "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3),
        },
        _same(batch=2, dtype=torch.int64),
        "CogVideoXPipeline, 5B: rotary positions",
    ),
    Entry(
        "CogView4Transformer2DModel",
        lambda: diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
        ),
        lambda draw: _image_inputs(draw, batch=1) | _size_inputs(batch=1),
        _same(),
        "CogView4Pipeline",
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
            num_hidden_layers=2,
            num_key_value_heads=1,
            patch_latent_dim=16,
            vocab_size=32,
            rope_axes_dim=[4, 2, 2],
        ),
        _cosmos3_inputs,
        lambda t: {"vision_timesteps": _full(t, 12)},
        "Cosmos3OmniPipeline",
    ),
    Entry(
        "Flux2Transformer2DModel",
        lambda: diffusers.Flux2Transformer2DModel(**_FLUX, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        lambda draw: _flux_inputs(draw, axes=4) | {"guidance": torch.tensor([4.0])},
        _thousandth(),
        "Flux2Pipeline",
    ),
    Entry(
        "FluxTransformer2DModel",
        lambda: diffusers.FluxTransformer2DModel(
            **_FLUX, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6)
        ),
        lambda draw: {
            **_flux_inputs(draw),
            "pooled_projections": draw.fixed(1, 8),
            "guidance": torch.tensor([3.5]),
        },
        _thousandth(),
        "FluxPipeline, dev",
    ),
    Entry(
        "GlmImageTransformer2DModel",
        lambda: diffusers.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
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
        lambda t: {"timestep": _full(t, 1) - 1},
        "GlmImagePipeline",
    ),
    Entry(
        "HeliosTransformer3DModel",
        lambda: diffusers.HeliosTransformer3DModel(**_WAN, rope_dim=(4, 6, 6)),
        _helios_inputs,
        _same(),
        "HeliosPipeline",
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=16,
            text_embed_2_dim=8,
            rope_axes_dim=(8, 8),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 4, 4, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": _mask(5),
            "encoder_hidden_states_2": draw.fixed(1, 5, 8),
            "encoder_attention_mask_2": _mask(3, size=5),
        },
        _same(),
        "HunyuanImagePipeline",
    ),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=2,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 9, 3, 4, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": _mask(5),
            "encoder_hidden_states_2": draw.fixed(1, 5, 8),
            "encoder_attention_mask_2": _mask(3, size=5),
            "image_embeds": draw.fixed(1, 6, 8),
        },
        _same(),
        "HunyuanVideo15ImageToVideoPipeline",
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            **_HUNYUAN_VIDEO, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
        ),
        _framepack_inputs,
        _same(),
        "HunyuanVideoFramepackPipeline",
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        lambda: diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN_VIDEO),
        _hunyuan_video_inputs,
        _same(),
        "HunyuanVideoPipeline",
    ),
    Entry(
        "HunyuanVideoTransformer3DModel-token_replace",
        lambda: diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN_VIDEO, image_condition_type="token_replace"),
        _hunyuan_video_inputs,
        _same(),
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
            num_text_blocks=2,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 3, 8, 8, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "pooled_projections": draw.fixed(1, 8),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(7),
        },
        _same(),
        "Kandinsky5T2VPipeline; it has no current_timestep",
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
            num_text_blocks=2,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 3, 8, 8, 9),
            "audio_hidden_states": draw.noise(1, 5, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "pooled_projections": draw.fixed(1, 8),
            "encoder_attention_mask": _mask(5, dtype=torch.bool),
        },
        _same(),
        "Kandinsky6TI2VAPipeline",
    ),
    Entry(
        "LTX2VideoTransformer3DModel",
        lambda: diffusers.LTX2VideoTransformer3DModel(**_LTX2),
        _ltx2_inputs,
        lambda t: {"timestep": _full(t, 1), "sigma": _full(t, 1)},
        "LTX2Pipeline",
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 48, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5),
            "num_frames": 3,
            "height": 4,
            "width": 4,
        },
        _same(batch=2),
        "LTXPipeline",
    ),
    Entry(
        "LongCatImageTransformer2DModel",
        lambda: diffusers.LongCatImageTransformer2DModel(**_FLUX, pooled_projection_dim=8, axes_dims_rope=[4, 6, 6]),
        _flux_inputs,
        _thousandth(),
        "LongCatImagePipeline",
    ),
    Entry(
        "MiniMaxH3Transformer3DModel",
        lambda: diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=2,
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
        _same(),
        "MiniMaxH3ModularPipeline; it has no current_timestep",
    ),
    Entry(
        "MochiTransformer3DModel",
        lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,  # the last one leaves out the text
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5, dtype=torch.bool),
        },
        lambda t: {"timestep": _full(1000 - t, 2)},
        "MochiPipeline; its schedule runs upwards, current_timestep is 1000 less it",
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        lambda: diffusers.MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=4,
            num_decoder_layers=2,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 9, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_attention_mask": _mask(5),
        },
        _same(),
        "MotifVideoPipeline",
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        lambda: diffusers.NucleusMoEImageTransformer2DModel(
            **_QWEN,
            num_key_value_heads=1,
            mlp_ratio=8.0,  # the dense layers round their size down to a multiple of 128
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        _qwen_inputs,
        _thousandth(),
        "NucleusMoEImagePipeline",
    ),
    Entry(
        "OvisImageTransformer2DModel",
        lambda: diffusers.OvisImageTransformer2DModel(**_FLUX, out_channels=4, axes_dims_rope=(4, 6, 6)),
        _flux_inputs,
        _thousandth(),
        "OvisImagePipeline",
    ),
    Entry(
        "QwenImage21Transformer2DModel",
        lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda draw: {
            "hidden_states": draw.noise(1, 16, 4),
            "encoder_hidden_states": draw.fixed(1, 7, 16),
            "encoder_hidden_states_mask": _mask(7),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 7 + [True] * 4]),  # a slot for every 2 x 2 image tokens
        },
        _thousandth(),
        "QwenImage21Pipeline",
    ),
    Entry(
        "QwenImageControlNetModel",
        lambda: diffusers.QwenImageControlNetModel(**_QWEN),
        lambda draw: {
            **_qwen_inputs(draw),
            "controlnet_cond": draw.fixed(1, 16, 16),
            "conditioning_scale": 0.8,
        },
        _thousandth(),
        "QwenImageControlNetPipeline",
    ),
    Entry(
        "QwenImageMultiControlNetModel",
        lambda: diffusers.QwenImageMultiControlNetModel([diffusers.QwenImageControlNetModel(**_QWEN)]),
        lambda draw: {
            **_qwen_inputs(draw),
            "controlnet_cond": [draw.fixed(1, 16, 16), draw.fixed(1, 16, 16)],
            "conditioning_scale": [0.8, 0.6],
        },
        _thousandth(),
        "QwenImageControlNetPipeline with a list; one network is called once per condition",
    ),
    Entry(
        "QwenImageTransformer2DModel",
        lambda: diffusers.QwenImageTransformer2DModel(**_QWEN),
        _qwen_inputs,
        _thousandth(),
        "QwenImagePipeline",
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        lambda: diffusers.SanaWMLTX2RefinerTransformer3DModel(**_LTX2),
        _sana_wm_refiner_inputs,
        lambda t: {"timestep": _full(t, 1, 48)},
        "SanaWMPipeline's refiner, without its key-value cache; it has no current_timestep",
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        lambda: diffusers.SkyReelsV2Transformer3DModel(**_WAN),
        _video_inputs,
        _same(),
        "SkyReelsV2Pipeline",
    ),
    Entry(
        "WanAnimateTransformer3DModel",
        lambda: diffusers.WanAnimateTransformer3DModel(
            **(_WAN | _WAN_I2V | {"in_channels": 12}),
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
        _same(),
        "WanAnimatePipeline",
    ),
    Entry(
        "WanTransformer3DModel",
        lambda: diffusers.WanTransformer3DModel(**_WAN),
        _video_inputs,
        _same(),
        "WanPipeline, 2.1",
    ),
    Entry(
        "WanTransformer3DModel-i2v",
        lambda: diffusers.WanTransformer3DModel(**_WAN, **_WAN_I2V),
        _i2v_inputs,
        _same(),
        "WanImageToVideoPipeline, 2.1",
    ),
    Entry(
        "WanTransformer3DModel-timestep_per_token",
        lambda: diffusers.WanTransformer3DModel(**_WAN),
        _video_inputs,
        lambda t: {"timestep": _full(t, 1, 48)},
        "WanPipeline, 2.2 5B: expand_timesteps",
    ),
    Entry(
        "WanVACETransformer3DModel",
        lambda: diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1], vace_in_channels=8),
        lambda draw: _video_inputs(draw) | {"control_hidden_states": draw.fixed(1, 8, 3, 8, 8)},
        _same(),
        "WanVACEPipeline",
    ),
    Entry(
        "LatteTransformer3DModel",
        lambda: diffusers.LatteTransformer3DModel(**_PIXART_LIKE, video_length=3),
        lambda draw: _video_inputs(draw, batch=2),
        _same(batch=2, dtype=torch.int64),
        "LattePipeline",
    ),
)

# --- Classes without CacheMixin -----------------------------------------------------------------------------

_WITHOUT_CACHE_MIXIN = (
    Entry(
        "AuraFlowTransformer2DModel",
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        _image_inputs,
        _thousandth(batch=2),
        "AuraFlowPipeline",
    ),
    Entry(
        "BriaFiboTransformer2DModel",
        lambda: diffusers.BriaFiboTransformer2DModel(**_FLUX, axes_dims_rope=[4, 6, 6], text_encoder_dim=8),
        lambda draw: _flux_inputs(draw) | {"text_encoder_layers": [draw.fixed(1, 7, 8) for _ in range(4)]},
        _same(),
        "BriaFiboPipeline",
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        lambda: diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=2,
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
        _same(batch=2, dtype=torch.int64),
        "CogView3PlusPipeline",
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
        _same(batch=2, dtype=torch.int64),
        "ConsisIDPipeline",
    ),
    Entry(
        "CosmosTransformer3DModel",
        lambda: diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=8,
            max_size=(4, 8, 8),
            concat_padding_mask=False,  # would need torchvision
        ),
        lambda draw: _video_inputs(draw) | {"fps": 24},
        _same(),
        "CosmosTextToWorldPipeline",
    ),
    Entry(
        "DiTTransformer2DModel",
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8
        ),
        lambda draw: {"hidden_states": draw.noise(2, 4, 8, 8), "class_labels": torch.tensor([3, 1000])},
        _same(batch=2, dtype=torch.int64),
        "DiTPipeline",
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
            num_layers=4,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=16,
        ),
        lambda draw: _video_inputs(draw, batch=2),
        _same(batch=2),
        "EasyAnimatePipeline",
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
        lambda t: {"timesteps": _full(t, 2)},
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
        _same(batch=2),
        "HunyuanDiTPipeline",
    ),
    Entry(
        "Lumina2Transformer2DModel",
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
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
            "encoder_attention_mask": _mask(7, dtype=torch.bool),
        },
        lambda t: {"timestep": 1 - _full(t, 1) / 1000},
        "Lumina2Pipeline; it has no current_timestep",
    ),
    Entry(
        "LuminaNextDiT2DModel",
        lambda: diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_mask": _mask(7, 5),
            "image_rotary_emb": torch.polar(torch.ones(4, 4, 8), draw.fixed(4, 4, 8)),
            "cross_attention_kwargs": {"base_sequence_length": 16},
        },
        lambda t: {"timestep": 1 - _full(t, 2) / 1000},
        "LuminaPipeline; it has no current_timestep",
    ),
    Entry(
        "OmniGenTransformer2DModel",
        lambda: diffusers.OmniGenTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            num_layers=2,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=32,
        ),
        _omnigen_inputs,
        lambda t: {"timestep": 1 - _full(t, 2) / 1000},
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
            depth=2,
            axes_dim=[8, 8],
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "attention_mask": _mask(7, 5, dtype=torch.bool),
        },
        _thousandth(batch=2),
        "PRXPipeline",
    ),
    Entry(
        "PixArtTransformer2DModel",
        lambda: diffusers.PixArtTransformer2DModel(**_PIXART_LIKE),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        _same(batch=2, dtype=torch.int64),
        "PixArtAlphaPipeline",
    ),
    Entry(
        "SD3Transformer2DModel",
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,  # the last one leaves out the text
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "pooled_projections": draw.fixed(2, 8),
        },
        _same(batch=2),
        "StableDiffusion3Pipeline, 3.5 medium",
    ),
    Entry(
        "SanaTransformer2DModel",
        lambda: diffusers.SanaTransformer2DModel(**_SANA),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 4, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5),
        },
        _same(batch=2),
        "SanaPipeline",
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        lambda: diffusers.SanaVideoTransformer3DModel(**_SANA),
        lambda draw: {
            "hidden_states": draw.noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
            "encoder_attention_mask": _mask(7, 5),
        },
        _same(batch=2),
        "SanaVideoPipeline",
    ),
    Entry(
        "StableAudioDiTModel",
        lambda: diffusers.StableAudioDiTModel(
            sample_size=20,
            in_channels=4,
            num_layers=2,
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
        _thousandth(),
        "StableAudioPipeline; its scheduler's timesteps are below 1 and it has no current_timestep",
    ),
    Entry(
        "Transformer2DModel",
        lambda: diffusers.Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=32,
            num_layers=2,
            norm_num_groups=4,
            cross_attention_dim=16,
        ),
        lambda draw: {
            "hidden_states": draw.noise(2, 32, 4, 4),
            "encoder_hidden_states": draw.fixed(2, 7, 16),
        },
        _same(batch=2, dtype=torch.int64),
        "the attention of UNet2DConditionModel; it ignores the timestep",
    ),
    Entry(
        "TransformerTemporalModel",
        lambda: diffusers.TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, norm_num_groups=4
        ),
        lambda draw: {"hidden_states": draw.noise(6, 32, 4, 4), "num_frames": 3},
        _same(batch=2, dtype=torch.int64),
        "the temporal attention of TextToVideoSDPipeline; it ignores the timestep",
    ),
    Entry(
        "ZImageTransformer2DModel",
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        ),
        lambda draw: {"x": [draw.noise(4, 1, 16, 16)], "cap_feats": [draw.fixed(7, 16)]},
        lambda t: {"t": (1000 - _full(t, 1)) / 1000},
        "ZImagePipeline; it has no current_timestep",
    ),
)

ZOO: tuple[Entry, ...] = tuple(
    entry for entry in (*_WITH_CACHE_MIXIN, *_WITHOUT_CACHE_MIXIN) if hasattr(diffusers, entry.class_name)
)
"""Every entry whose class the installed diffusers has."""

BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ZOO}
