"""Make an image with FLUX.1 dev, once to compile and once more to time it.

    python examples/flux.py --prompt "a lighthouse in a storm" --output lighthouse.png
    python examples/flux.py --no-pab --output plain.png    # torch.compile alone, from the same noise

It needs a CUDA device of some 40 GB, `pip install transformers sentencepiece`, and the checkpoint's licence accepted.
Nobody has published settings of PAB for Flux: compare with --no-pab.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline

import pab_fx

# No callback: the model is given the timestep divided by 1000, and pab_fx asks the scheduler instead
CONFIG = pab_fx.PABConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(100, 950),
)


def load(checkpoint: str) -> FluxPipeline:
    """The pipeline in bfloat16 on the GPU."""
    return FluxPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16).to("cuda")


def generate(pipe: FluxPipeline, args: argparse.Namespace) -> tuple[Any, float]:
    """One image, and the seconds it took. The noise is drawn on the CPU: the same everywhere."""
    start = time.perf_counter()
    image = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    return image, time.perf_counter() - start


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last image; `load` can be replaced by one that makes another pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a lighthouse in a storm, oil on canvas")
    parser.add_argument("--output", default="flux.png")
    parser.add_argument("--checkpoint", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2, help="images to make; the first one includes compiling")
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
        image, seconds = generate(pipe, args)
        print(f"round {turn + 1}: {seconds:.1f} seconds")
    if pab is not None:
        print(pab.report())
    image.save(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
