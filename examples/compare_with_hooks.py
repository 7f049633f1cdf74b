"""Time a CogVideoX-shaped transformer with diffusers' hooks and with pab_fx: one process, interleaved.

    python examples/compare_with_hooks.py --rounds 5

Every way runs the same generation (a loop of 20 steps over random inputs); a round runs each way once, and
ratios are taken within a round, so that a machine that slows down slows all of them. "hooks + compile" comes
last: it uses up Dynamo's recompile limit for its class.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import CogVideoXTransformer3DModel, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

import pab_fx

TIMESTEPS = [1000 - 50 * step for step in range(20)]


def build(layers: int) -> CogVideoXTransformer3DModel:
    """A CogVideoX of few layers and narrow width, random weights; a step takes some 100 ms on 2 cores."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        time_embed_dim=128,
        text_embed_dim=128,
        num_layers=layers,
        sample_width=32,
        sample_height=20,
        sample_frames=9,
        max_text_seq_length=64,
    )
    return model.eval().requires_grad_(False)


class Loop:
    """A generation: `model` called once per timestep with inputs that do not depend on the model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.timestep = 0.0
        self.latents = torch.randn(1, 3, 16, 20, 32, generator=generator)
        self.text = torch.randn(1, 64, 128, generator=generator)

    def run(self, model: Callable[..., tuple[torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """The sum of all outputs, and the seconds it took."""
        total = torch.zeros_like(self.latents)
        start = time.perf_counter()
        for t in TIMESTEPS:
            self.timestep = t
            total += model(self.latents + t / 1000, self.text, torch.tensor([t]), return_dict=False)[0]
        return total, time.perf_counter() - start


def ways(loop: Loop, layers: int) -> dict[str, Callable[..., tuple[torch.Tensor]]]:
    """What is compared, by name, in the order in which it runs."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: loop.timestep,
    )
    model = build(layers)

    def hooked() -> nn.Module:
        other = copy.deepcopy(model)
        apply_pyramid_attention_broadcast(other, config)
        return other

    return {
        "eager": model,
        "hooks": hooked(),
        "compile": torch.compile(copy.deepcopy(model)),
        "pab_fx specialize": torch.compile(copy.deepcopy(model), backend=pab_fx.PABBackend(config)),
        "pab_fx cond": torch.compile(copy.deepcopy(model), backend=pab_fx.PABBackend(config, lowering="cond")),
        "hooks + compile": torch.compile(hooked()),
    }


def reset_hooks(model: Callable[..., tuple[torch.Tensor]]) -> None:
    """Start a new generation for diffusers' hooks, as a pipeline does at its end; pab_fx sees it by itself."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.reset_stateful_hooks(recurse=False)


@torch.no_grad()
def main() -> None:
    """Run, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    loop = Loop()
    compared = ways(loop, args.layers)
    cold, outputs = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(args.rounds + 1):
        for name, model in compared.items():
            reset_hooks(model)
            output, took = loop.run(model)
            if turn == 0:
                outputs[name], cold[name] = output, took
            else:
                seconds[name].append(took)
    print("| | first generation, s | generation, s | speed-up over compile (spread) | distance from hooks |")
    print("| --- | --- | --- | --- | --- |")
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["compile"], times, strict=True)]
        reference = outputs["hooks"]
        distance = float((outputs[name] - reference).norm() / reference.norm())
        print(
            f"| {name} | {cold[name]:.1f} | {statistics.median(times):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {distance:.0e} |"
        )


if __name__ == "__main__":
    main()
