"""Make an image with FLUX.1 dev, once to compile and once more to time it.

    python examples/flux.py --prompt "a lighthouse in a storm" --output lighthouse.png
    python examples/flux.py --no-pab --output plain.png    # torch.compile alone, from the same noise

It needs a CUDA device, `pip install transformers sentencepiece`, and the checkpoint's licence accepted.
Nobody has published settings of PAB for Flux: compare with --no-pab.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from checkpoint import parser, timed_rounds
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


def generate(pipe: FluxPipeline, args: argparse.Namespace) -> Any:
    """One image; the noise is drawn on the CPU: the same everywhere."""
    return pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = load) -> None:
    """Load, generate, and write the last image; `load` can be replaced by one that makes another pipeline."""
    options = parser(
        __doc__,
        prompt="a lighthouse in a storm, oil on canvas",
        output="flux.png",
        checkpoint="black-forest-labs/FLUX.1-dev",
        steps=28,
        height=1024,
        width=1024,
    )
    args = options.parse_args(argv)
    image = timed_rounds(load(args.checkpoint), CONFIG, generate, args)
    image.save(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
