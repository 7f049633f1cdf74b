"""Make a video with Wan 2.1 1.3B, once to compile and once more to time it.

    python examples/wan.py --prompt "a cat walking on grass" --output cat.mp4
    python examples/wan.py --no-pab --output plain.mp4    # torch.compile alone, from the same noise

It needs a CUDA device of some 20 GB, and `pip install transformers sentencepiece ftfy imageio-ffmpeg`. An output that
ends in .gif needs no ffmpeg. Nobody has published settings of PAB for Wan: compare with --no-pab.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
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


def generate(pipe: WanPipeline, args: argparse.Namespace) -> tuple[list[Any], float]:
    """The frames of one video, and the seconds it took. The noise is drawn on the CPU: the same everywhere."""
    start = time.perf_counter()
    frames = pipe(
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
    return frames, time.perf_counter() - start


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last video; `load` can be replaced by one that makes another pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a cat walking on grass")
    parser.add_argument("--negative-prompt", default="blurry, static, overexposed, low quality")
    parser.add_argument("--output", default="wan.mp4", help="ends in .mp4 or .gif")
    parser.add_argument("--checkpoint", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=2, help="videos to make; the first one includes compiling")
    parser.add_argument("--no-pab", action="store_true", help="torch.compile alone, to compare with")
    parser.add_argument("--regional", action="store_true", help="compile one block for all: starts sooner")
    parser.add_argument("--inner", default="inductor", help='the compiler; "eager" compiles nothing')
    args = parser.parse_args(argv)
    pipe, pab = load(args.checkpoint), None
    if not args.no_pab:
        pab = pab_fx.enable(pipe, CONFIG, regional=args.regional, inner=args.inner)
    elif args.regional:
        pipe.transformer.compile_repeated_blocks(backend=args.inner)
    else:
        pipe.transformer.compile(backend=args.inner)
    for turn in range(args.rounds):
        frames, seconds = generate(pipe, args)
        print(f"round {turn + 1}: {seconds:.1f} seconds")
    if pab is not None:
        print(pab.report())
    write = export_to_gif if args.output.endswith(".gif") else export_to_video
    write(frames, args.output, fps=16)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
