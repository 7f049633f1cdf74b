"""Make a video with Wan 2.1 1.3B, once to compile and once more to time it.

    python examples/wan.py --prompt "a cat walking on grass" --output cat.mp4
    python examples/wan.py --no-pab --output plain.mp4    # torch.compile alone, from the same noise

It needs a CUDA device, and `pip install transformers sentencepiece ftfy imageio-ffmpeg`. An output that
ends in .gif needs no ffmpeg. Nobody has published settings of PAB for Wan: compare with --no-pab.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from checkpoint import parser, timed_rounds
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_gif, export_to_video

import pab_fx

# Wan's schedule stays long at high noise: of 50 steps, 8 have a timestep above 940 and 26 one above 740
CONFIG = pab_fx.PABConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(100, 940),
    cross_attention_block_skip_range=6,
    cross_attention_timestep_skip_range=(100, 940),
)


def load(checkpoint: str) -> WanPipeline:
    """The pipeline in bfloat16 on the GPU, its VAE in float32 as the model's authors advise."""
    vae = AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(checkpoint, vae=vae, torch_dtype=torch.bfloat16).to("cuda")


def generate(pipe: WanPipeline, args: argparse.Namespace) -> list[Any]:
    """The frames of one video; the noise is drawn on the CPU: the same everywhere."""
    return pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pil",
    ).frames[0]


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last video; `load` can be replaced by one that makes another pipeline."""
    options = parser(
        __doc__,
        prompt="a cat walking on grass",
        output="wan.mp4",
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        steps=50,
        height=480,
        width=832,
    )
    options.add_argument("--frames", type=int, default=81)
    options.add_argument("--negative-prompt", default="blurry, static, overexposed, low quality")
    args = options.parse_args(argv)
    frames = timed_rounds(load(args.checkpoint), CONFIG, generate, args)
    write = export_to_gif if args.output.endswith(".gif") else export_to_video
    write(frames, args.output, fps=16)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
