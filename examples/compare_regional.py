"""Time `enable(model, regional=True)` against compiling the whole model: cold start, then generations in turn.

    python examples/compare_regional.py --rounds 5

Inductor's caches on disk are off, so that a cold start is one. A round runs each way once; ratios are taken
within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import LatteTransformer3DModel

import pab_fx

TIMESTEPS = [1000 - 50 * step for step in range(20)]
CONFIG = pab_fx.PABConfig(
    spatial_attention_block_skip_range=2,
    temporal_attention_block_skip_range=3,
    cross_attention_block_skip_range=6,
)


def build(layers: int) -> LatteTransformer3DModel:
    """A narrow Latte with `layers` spatial and as many temporal blocks, random weights."""
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=256,
        attention_bias=True,
        sample_size=32,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        caption_channels=64,
        video_length=8,
    )
    return model.eval().requires_grad_(False)


def generation(model: LatteTransformer3DModel) -> tuple[torch.Tensor, float]:
    """The sum of the outputs of one generation, and the seconds it took."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 32, 32, generator=generator)
    text = torch.randn(1, 16, 64, generator=generator)
    total, start = torch.zeros(1, 8, 8, 32, 32), time.perf_counter()
    for t in TIMESTEPS:
        total += model(latents + t / 1000, torch.tensor([t]), text, enable_temporal_attentions=True, return_dict=False)[
            0
        ]
    return total, time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Run, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6, help="spatial blocks, and as many temporal ones")
    parser.add_argument("--dynamic", choices=("auto", "no"), default="auto")
    parser.add_argument("--lowering", choices=("specialize", "cond"), default="specialize")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch.compile(lambda x: x.sin() + 1)(torch.ones(64))  # what the first compilation of a process does once
    models = {name: build(args.layers) for name in ("regional", "whole")}
    handles, cold, outputs = [], {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        handles.append(
            pab_fx.enable(
                model,
                CONFIG,
                lowering=args.lowering,
                regional=name == "regional",
                dynamic=None if args.dynamic == "auto" else False,
            )
        )
    for turn in range(args.rounds + 1):
        for name, model in models.items():
            output, took = generation(model)
            if turn:
                seconds[name].append(took)
            else:
                outputs[name], cold[name] = output, took
    print("| | first generation, s | generation, s | against whole (spread) | reused | distance from whole |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, times), handle in zip(seconds.items(), handles, strict=True):
        ratios = [own / base for base, own in zip(seconds["whole"], times, strict=True)]
        distance = float((outputs[name] - outputs["whole"]).norm() / outputs["whole"].norm())
        print(
            f"| {name} | {cold[name]:.1f} | {statistics.median(times):.2f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) | {handle.report().reused} | {distance:.0e} |"
        )
    # the first generation holds a generation's own time too
    compile_times = {name: cold[name] - statistics.median(seconds[name]) for name in cold}
    print(f"\ncold start, regional to whole: {compile_times['regional'] / compile_times['whole']:.2f}")


if __name__ == "__main__":
    main()
