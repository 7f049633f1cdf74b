"""Pipelines that take a prompt and make pictures, as users call them: tiny, with a VAE, small by default."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from . import image, video


def _embeds(texts: str | list[str], *shape: int) -> torch.Tensor:
    """Noise that depends on the text alone, in place of a tokenizer and a text encoder."""
    texts = [texts] if isinstance(texts, str) else texts
    seeds = (zlib.crc32(text.encode()) for text in texts)
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _encode_pair(prompt: Any, *args: Any, negative_prompt: Any = None, **kwargs: Any) -> Any:
    """As `encode_prompt` of the video pipelines: embeddings of the prompt and of the negative prompt."""
    negative = negative_prompt or next((arg for arg in args if isinstance(arg, str)), "")
    return _embeds(prompt, 7, 16), _embeds(negative, 7, 16)


def encode_pooled(prompt: Any, **kwargs: Any) -> Any:
    """As Flux's `encode_prompt`: embeddings, pooled embeddings, positions."""
    return _embeds(prompt, 7, 16), _embeds(prompt, 8), torch.zeros(7, 3)


def cogvideox() -> Any:
    pipe = diffusers.CogVideoXPipeline(
        transformer=video._transformer(
            "CogVideoXTransformer3DModel-rotary", sample_height=8, sample_width=8, sample_frames=9
        ),
        scheduler=video._cogvideox_scheduler("CogVideoXDPMScheduler"),
        vae=video._cogvideox_vae(),
        **video._NO_TEXT,
    )
    return _prepared(pipe, _encode_pair)


class SmallLattePipeline(diffusers.LattePipeline):
    """Its sizes are defaults of its call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"height": 64, "width": 64, "video_length": 3, **kwargs})


def latte() -> Any:
    pipe = SmallLattePipeline(
        transformer=video._transformer("LatteTransformer3DModel"),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vae=image._vae(4),
        **video._NO_TEXT,
    )
    return _prepared(pipe, _encode_pair)


def wan() -> Any:
    pipe = diffusers.WanPipeline(
        transformer=video._transformer("WanTransformer3DModel"),
        scheduler=video._unipc(),
        vae=video._wan_vae(),
        **video._NO_TEXT,
    )
    return _prepared(pipe, _encode_pair)


def flux(layers: int = 2) -> Any:
    pipe = image._flux(diffusers.FluxPipeline, layers)
    pipe.default_sample_size = 8
    return _prepared(pipe, encode_pooled)


def _prepared(pipe: Any, encode_prompt: Callable[..., Any]) -> Any:
    pipe.encode_prompt = encode_prompt
    pipe.to = lambda *args, **kwargs: pipe  # it is where it can be
    pipe.set_progress_bar_config(disable=True)
    return pipe
