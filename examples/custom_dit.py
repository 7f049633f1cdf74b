"""A diffusion transformer in plain PyTorch, in a loop of one's own: nothing of it is registered anywhere.

    python examples/custom_dit.py                    # on a CPU, half a minute with Inductor, most of it compiling
    python examples/custom_dit.py --inner eager      # a second

Two of three steps skip the blocks. With random weights, what the samples differ by says nothing of a trained model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import pab_fx
from pab_fx import Blocks, Every, Policy, Residual, Taylor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # [B, tokens, width], [B, 1, width]
        heads = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + gate * self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class DiT(nn.Module):
    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.lead, self.time, self.follow = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x, gate = self.lead(sample), self.time(timestep[:, None, None] / 1000).tanh()
        for block in self.blocks:
            x = block(x, gate)
        return self.follow(x)


@torch.no_grad()
def generate(model: nn.Module, steps: int) -> Tensor:
    sample = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))
    for t in torch.linspace(1000, 1000 / steps, steps):
        sample = sample - model(sample, t.expand(1)) / steps
    return sample


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--inner", default="inductor")
    args = options.parse_args(argv)
    torch.manual_seed(0)
    model = DiT().eval().requires_grad_(False)
    plain = generate(model, args.steps)
    with pab_fx.enable(model, Policy(Blocks(), Every(3, warmup=2), Taylor(1, of=Residual())), inner=args.inner) as pab:
        cached = generate(model, args.steps)
        print(pab.report())
    print(f"relative distance of the samples: {(cached - plain).norm() / plain.norm():.1e}")


if __name__ == "__main__":
    main()
