"""What entries of several kinds share: how a pipeline passes the timestep, parts of inputs, and configs."""

from collections.abc import Callable

import torch

from .entry import Draw, Kwargs


def full(t: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(t))


def same(batch: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[float], Kwargs]:
    """`t.expand(batch)`; schedulers of the DDIM family have integer timesteps."""
    return lambda t: {"timestep": full(t, batch).to(dtype)}


def thousandth(batch: int = 1) -> Callable[[float], Kwargs]:
    """`t.expand(batch) / 1000`, as most flow-matching pipelines pass it."""
    return lambda t: {"timestep": full(t, batch) / 1000}


def mask(*lengths: int, size: int = 7, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Padding mask [batch, size], ones for the first `length` tokens of each item."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).to(dtype)


def video_inputs(draw: Draw, batch: int = 1) -> Kwargs:
    return {"hidden_states": draw.noise(batch, 4, 3, 8, 8), "encoder_hidden_states": draw.fixed(batch, 7, 16)}


LTX2 = {
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
    "num_layers": 1,
    "caption_channels": 16,
}
PIXART_LIKE = {
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
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "sample_size": 8,
}
