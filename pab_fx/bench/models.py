"""The models that are timed, each in three sizes, and how its pipeline calls it.

`"cuda"` has the numbers of the released checkpoints (their `config.json` on the Hub) and of their pipelines' default
sizes; weights are random, so that nothing is downloaded. `"cpu"` are the same classes at sizes where a compiled step
takes 50 to 200 ms on 2 cores, `"quick"` at sizes that show that everything runs, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from ..policy.config import PABConfig
from ..policy.where import ATTENTION_ROLES
from ..spelling import instead_of

Kwargs = dict[str, Any]

# diffusers' default "blocks" is found in "temporal_transformer_blocks" too, and it asks for spatial first
IDENTIFIERS = {"spatial": (r"^(?!temporal_)",), "temporal": (r"^temporal_",), "cross": (r"",)}


@dataclass(frozen=True)
class BenchModel:
    """A transformer of diffusers at one size, and what its pipeline hands it.

    Args:
        name: as on the command line.
        title: in tables and charts.
        cls: its class.
        config: arguments of the class.
        latents: shape of `hidden_states` at batch 1, [1, ...] as its pipeline has it.
        conditions: shapes of further inputs, drawn once for all steps.
        options: further arguments of the call, as they are.
        pab: what is broadcast. Feed-forwards are not: the hooks cannot.
        steps: of a generation.
        timestep_scale: what the transformer is given of the scheduler's timestep.
        dtype: of its weights and inputs.
    """

    name: str
    title: str
    cls: type
    config: Mapping[str, Any]
    latents: tuple[int, ...]
    conditions: Mapping[str, tuple[int, ...]]
    pab: PABConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 20
    timestep_scale: float = 1.0
    dtype: torch.dtype = torch.float32

    def build(self, device: torch.device, seed: int = 0) -> nn.Module:
        """The model with random weights, made on the device in its dtype, so that no larger copy ever exists."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with device:
                model: nn.Module = self.cls(**self.config)
        finally:
            torch.set_default_dtype(before)
        model = model.eval().requires_grad_(False)
        keep_in_float32(model)
        redraw(model, torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed))
        return model

    def inputs(self, timesteps: tuple[float, ...], device: torch.device, seed: int = 1) -> list[Kwargs]:
        """Arguments of the model for each step. They do not depend on its outputs, so nothing that differs grows."""
        generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=self.dtype).normal_(generator=generator)

        conditions = {name: draw(shape) for name, shape in self.conditions.items()}
        conditions |= self.positions(device)
        latents = draw(self.latents)
        return [
            {
                "hidden_states": latents + t / 1000,
                "timestep": torch.tensor([t * self.timestep_scale], device=device),
                **conditions,
                **self.options,
                "return_dict": False,
            }
            for t in timesteps
        ]

    def positions(self, device: torch.device) -> Kwargs:
        """Positions of the tokens, for the classes whose pipelines compute them."""
        if self.cls is CogVideoXTransformer3DModel:
            _, frames, _, height, width = self.latents
            grid = (height // 2, width // 2)
            rotary = get_3d_rotary_pos_embed(
                self.config["attention_head_dim"], ((0, 0), grid), grid, frames, device=device
            )
            return {"image_rotary_emb": rotary}
        if self.cls is FluxTransformer2DModel:
            side = round(self.latents[1] ** 0.5)
            axis = torch.arange(side, device=device, dtype=self.dtype)
            rows, columns = torch.meshgrid(axis, axis, indexing="ij")
            ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)  # [H * W, 3]
            text = torch.zeros(self.conditions["encoder_hidden_states"][1], 3, device=device, dtype=self.dtype)
            return {"img_ids": ids, "txt_ids": text}
        return {}


def keep_in_float32(model: nn.Module) -> None:
    """Cast what the class keeps in float32 whatever its dtype (`_keep_in_fp32_modules`), as `from_pretrained` does."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(each in name.split(".") for each in kept):
            parameter.data = parameter.data.float()


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters from a normal, in place.

    As a class initialises them, gates of attentions are close to 0, and an attention that went wrong would not show.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
        elif name.endswith("weight"):
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:  # tables of modulation
            parameter.normal_(0.0, 0.3, generator=generator)


def diffusers_config(pab: PABConfig, clock: Any) -> PyramidAttentionBroadcastConfig:
    """The config of diffusers' hooks that is equal to `pab` for these models; it is given to both contestants.

    Args:
        pab: ranges and windows. What it says of feed-forwards is left out.
        clock: returns the current timestep.
    """
    fields: dict[str, Any] = {"current_timestep_callback": clock}
    for role in ATTENTION_ROLES:
        fields[f"{role}_attention_block_skip_range"] = pab.skip_range(role)
        fields[f"{role}_attention_timestep_skip_range"] = pab.window(role)
        fields[f"{role}_attention_block_identifiers"] = pab.identifiers(role) or IDENTIFIERS[role]
    return PyramidAttentionBroadcastConfig(**fields)


def timesteps_of(steps: int, spacing: float = 1.0) -> tuple[float, ...]:
    """Timesteps from 1000 down, evenly spaced, as schedulers with `timestep_spacing="trailing"` have them.

    Args:
        steps: how many.
        spacing: how far apart, as a share of what leads to 0.

    Example:
        >>> timesteps_of(4)
        (1000.0, 750.0, 500.0, 250.0)
    """
    return tuple(1000.0 * (steps - spacing * i) / steps for i in range(steps))


def _cogvideox(layers: int, heads: int, frames: int, height: int, width: int, text: int, wide: int, **more: Any) -> Any:
    """CogVideoX with rotary embeddings, as the 5b has them; `height` and `width` are of the latents."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "time_embed_dim": 512 if wide > 512 else 64,
        "text_embed_dim": wide,
        "num_layers": layers,
        "sample_width": width,
        "sample_height": height,
        "sample_frames": 4 * (frames - 1) + 1,
        "max_text_seq_length": text,
        "use_rotary_positional_embeddings": True,
    }
    return BenchModel(
        name="cogvideox",
        cls=CogVideoXTransformer3DModel,
        config=config,
        latents=(1, frames, 16, height, width),
        conditions={"encoder_hidden_states": (1, text, wide)},
        pab=PABConfig.preset("cogvideox"),
        **more,
    )


def _latte(layers: int, heads: int, dim: int, frames: int, side: int, text: int, wide: int, **more: Any) -> Any:
    """Latte: `layers` spatial and as many temporal blocks; `side` is of the latents."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "cross_attention_dim": heads * dim,
        "attention_bias": True,
        "sample_size": side,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": wide,
        "video_length": frames,
    }
    return BenchModel(
        name="latte",
        cls=LatteTransformer3DModel,
        config=config,
        latents=(1, 4, frames, side, side),
        conditions={"encoder_hidden_states": (1, text, wide)},
        options={"enable_temporal_attentions": True},
        pab=PABConfig.preset("latte", mlp=None),
        **more,
    )


def _flux(dual: int, single: int, heads: int, dim: int, side: int, text: int, wide: int, **more: Any) -> Any:
    """Flux: `dual` blocks of two streams, `single` of one; `side` is of the packed latents."""
    config = {
        "num_layers": dual,
        "num_single_layers": single,
        "attention_head_dim": dim,
        "num_attention_heads": heads,
        "joint_attention_dim": wide,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (dim // 8, dim * 7 // 16, dim * 7 // 16),
    }
    return BenchModel(
        name="flux",
        cls=FluxTransformer2DModel,
        config=config,
        latents=(1, side * side, 64),
        conditions={"encoder_hidden_states": (1, text, wide), "pooled_projections": (1, 768), "guidance": (1,)},
        pab=PABConfig(spatial_attention_block_skip_range=2),
        timestep_scale=1 / 1000,
        **more,
    )


def _wan(
    layers: int, heads: int, dim: int, ffn: int, frames: int, size: tuple[int, int], text: int, wide: int, **more: Any
) -> Any:
    """Wan 2.1, from text; `size` is height and width of the latents."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": dim,
        "text_dim": wide,
        "ffn_dim": ffn,
        "num_layers": layers,
    }
    return BenchModel(
        name="wan",
        cls=WanTransformer3DModel,
        config=config,
        latents=(1, 16, frames, *size),
        conditions={"encoder_hidden_states": (1, text, wide)},
        pab=PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=6),
        **more,
    )


_BF16: dict[str, Any] = {"dtype": torch.bfloat16}

SIZES: Mapping[str, tuple[BenchModel, ...]] = {
    "cpu": (
        _cogvideox(4, 8, 3, 20, 32, 64, 128, title="CogVideoX, 4 layers, width 512, 544 tokens"),
        _latte(4, 4, 64, 8, 24, 16, 64, title="Latte, 4 + 4 blocks, width 256, 8 x 144 tokens"),
        _flux(2, 4, 8, 64, 20, 64, 256, title="Flux, 2 + 4 blocks, width 512, 464 tokens"),
        _wan(5, 6, 64, 1536, 4, (24, 24), 64, 256, title="Wan, 5 layers, width 384, 576 tokens"),
    ),
    # steps: a generation of these is some seconds long on an H100, by count of operations
    "cuda": (
        _cogvideox(42, 48, 13, 60, 90, 226, 4096, title="CogVideoX-5b, 49 frames, 480 x 720", steps=10, **_BF16),
        _latte(28, 16, 72, 16, 64, 120, 4096, title="Latte-1, 16 frames, 512 x 512", **_BF16),
        _flux(19, 38, 24, 128, 64, 512, 4096, title="Flux-dev, 1024 x 1024", steps=10, **_BF16),
        _wan(
            30, 12, 128, 8960, 21, (60, 104), 512, 4096, title="Wan 2.1 1.3B, 81 frames, 480 x 832", steps=10, **_BF16
        ),
    ),
    "quick": (
        _cogvideox(3, 1, 2, 4, 6, 5, 16, title="CogVideoX, tiny", steps=8),
        _latte(2, 2, 8, 3, 8, 5, 16, title="Latte, tiny", steps=8),
        _flux(2, 2, 1, 32, 4, 5, 16, title="Flux, tiny", steps=8),
        _wan(3, 2, 12, 32, 2, (4, 6), 5, 16, title="Wan, tiny", steps=8),
    ),
}
NAMES = tuple(model.name for model in SIZES["cpu"])


def model_of(name: str, size: str) -> BenchModel:
    """A model by its name at one of the three sizes.

    Raises:
        ValueError: for a name that is none of the models.

    Example:
        >>> model_of("flux", "cuda").config["num_single_layers"]
        38
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: {instead_of(name, NAMES, 'the models are')}")
    return next(model for model in SIZES[size] if model.name == name)
