"""Guidance parallelism under PAB: one group of ranks runs the prompt, another one the empty prompt.

    torchrun --nproc-per-node 2 examples/guidance_parallel.py
    torchrun --nproc-per-node 4 examples/guidance_parallel.py      # two ranks for each branch, by sequence parallelism

Each rank holds the counters and caches of its own branch. The branches meet once a step, outside of the model, in an
all-gather of their predictions. Rank 0 then generates the same alone, with both branches in turn, and compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import parallel
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import pab_fx

SCALE = 5.0


def combined(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    return uncond + SCALE * (cond - uncond)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parallel.options(__doc__).parse_args(arguments)

    device = parallel.start(options.device)
    ranks = dist.get_world_size()
    if ranks % 2:
        raise SystemExit(f"two branches need an even number of ranks, got {ranks}: --nproc-per-node 2")
    mesh = init_device_mesh(device.type, (2, 1, ranks // 2), mesh_dim_names=("guidance", "ring", "ulysses"))
    branches, branch = mesh["guidance"].get_group(), mesh["guidance"].get_local_rank()
    inputs = parallel.Inputs(device, options.steps)
    text = (inputs.text, inputs.empty)[branch]
    model = parallel.small_wan(device)
    if ranks > 2:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks // 2, mesh=mesh))

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        own = model(latents, t, text, return_dict=False)[0]
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own.contiguous(), group=branches)
        return combined(*both)

    with pab_fx.enable(model, parallel.config(options.range), inner=options.inner) as pab:
        latents = inputs.generate(predict)
        print(f"rank {dist.get_rank()}, {('prompt', 'empty prompt')[branch]}:\n{pab.report()}", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        alone(inputs, latents, options)
    parallel.stop()


def alone(inputs: parallel.Inputs, latents: torch.Tensor, options: argparse.Namespace) -> None:
    """Generate in this process only, the branches in turn, and print by how much that differs."""
    model = parallel.small_wan(inputs.device)

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with pab_fx.cache_context("cond"):
            cond = model(latents, t, inputs.text, return_dict=False)[0]
        with pab_fx.cache_context("uncond"):
            uncond = model(latents, t, inputs.empty, return_dict=False)[0]
        return combined(cond, uncond)

    with pab_fx.enable(model, parallel.config(options.range), inner=options.inner):
        expected = inputs.generate(predict)
    difference = (latents - expected).abs().max().item()
    print(f"\nlargest difference to one process: {difference:g} (latents up to {expected.abs().max():.3g})")


if __name__ == "__main__":
    main()
