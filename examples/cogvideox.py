"""Make a video with CogVideoX 5B, once to compile and once more to time it.

    python examples/cogvideox.py --prompt "a panda playing a guitar in a bamboo forest" --output panda.mp4
    python examples/cogvideox.py --no-pab --output plain.mp4    # torch.compile alone, from the same noise

It needs a CUDA device, and `pip install transformers sentencepiece imageio-ffmpeg`. An output that ends
in .gif needs no ffmpeg. The settings of PAB are those of VideoSys.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from checkpoint import parser, timed_rounds
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_gif, export_to_video

import pab_fx

CONFIG = pab_fx.PABConfig.preset("cogvideox")


def load(checkpoint: str) -> CogVideoXPipeline:
    """The pipeline in bfloat16 on the GPU; the VAE decodes tile by tile to save memory."""
    pipe = CogVideoXPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    pipe.vae.enable_tiling()
    return pipe.to("cuda")


def generate(pipe: CogVideoXPipeline, args: argparse.Namespace) -> list[Any]:
    """The frames of one video; the noise is drawn on the CPU: the same everywhere."""
    return pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last video; `load` can be replaced by one that makes another pipeline."""
    options = parser(
        __doc__,
        prompt="a panda playing a guitar in a bamboo forest",
        output="cogvideox.mp4",
        checkpoint="THUDM/CogVideoX-5b",
        steps=50,
        height=480,
        width=720,
    )
    options.add_argument("--frames", type=int, default=49)
    args = options.parse_args(argv)
    frames = timed_rounds(load(args.checkpoint), CONFIG, generate, args)
    write = export_to_gif if args.output.endswith(".gif") else export_to_video
    write(frames, args.output, fps=8)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
