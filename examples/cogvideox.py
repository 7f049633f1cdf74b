"""Make a video with CogVideoX 5B, once to compile and once more to time it.

    python examples/cogvideox.py --prompt "a panda playing a guitar in a bamboo forest" --output panda.mp4
    python examples/cogvideox.py --no-pab --output plain.mp4    # torch.compile alone, from the same noise

It needs a CUDA device of some 30 GB, and `pip install transformers sentencepiece imageio-ffmpeg`. An output that ends
in .gif needs no ffmpeg. The settings of PAB are those of VideoSys.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_gif, export_to_video

import pab_fx

CONFIG = pab_fx.PABConfig.preset("cogvideox")


def load(checkpoint: str) -> CogVideoXPipeline:
    """The pipeline in bfloat16 on the GPU; the VAE decodes tile by tile to save memory."""
    pipe = CogVideoXPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    pipe.vae.enable_tiling()
    return pipe.to("cuda")


def generate(pipe: CogVideoXPipeline, args: argparse.Namespace) -> tuple[list[Any], float]:
    """The frames of one video, and the seconds it took. The noise is drawn on the CPU: the same everywhere."""
    start = time.perf_counter()
    frames = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    return frames, time.perf_counter() - start


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last video; `load` can be replaced by one that makes another pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a panda playing a guitar in a bamboo forest")
    parser.add_argument("--output", default="cogvideox.mp4", help="ends in .mp4 or .gif")
    parser.add_argument("--checkpoint", default="THUDM/CogVideoX-5b")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--rounds", type=int, default=2, help="videos to make; the first one includes compiling")
    parser.add_argument("--no-pab", action="store_true", help="torch.compile alone, to compare with")
    parser.add_argument("--regional", action="store_true", help="compile one block for all: starts sooner")
    parser.add_argument("--inner", default="inductor", help='the compiler; "eager" compiles nothing')
    args = parser.parse_args(argv)
    pipe, pab = load(args.checkpoint), None
    if not args.no_pab:
        pab = pab_fx.enable(pipe, CONFIG, regional=args.regional, inner=args.inner)
    elif args.regional:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=args.inner)
    else:
        pipe.transformer.compile(backend=args.inner)
    for turn in range(args.rounds):
        frames, seconds = generate(pipe, args)
        print(f"round {turn + 1}: {seconds:.1f} seconds")
    if pab is not None:
        print(pab.report())
    write = export_to_gif if args.output.endswith(".gif") else export_to_video
    write(frames, args.output, fps=8)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
