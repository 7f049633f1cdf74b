"""A server's loop: requests of different lengths take a step each in turn, on one model, and none gets another's cache.

    python examples/server_loop.py                   # on a CPU, a minute with Inductor, most of it compiling
    python examples/server_loop.py --inner eager     # a second

Each request is then run alone, and has to be the same to the bit. docs/serving.md has the loop of a released model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from custom_dit import DiT
from torch import Tensor, nn

import pab_fx
from pab_fx import Blocks, Change, Policy, Residual

POLICY = Policy(Blocks(1), Change(Blocks(0, 1), threshold=0.1, warmup=2, max_skips=3), Residual())


class Request:
    """A generation: its noise, its timesteps, and a session, which has counters and caches of its own."""

    def __init__(self, model: nn.Module, pab: pab_fx.PAB, steps: int, seed: int) -> None:
        self.model, self.session = model, pab.session()
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)
        self.sample: Tensor = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(seed))
        self.done = 0

    @torch.no_grad()
    def step(self) -> None:
        with self.session:
            predicted = self.model(self.sample, self.timesteps[self.done].expand(1))
        self.sample = self.sample - predicted / len(self.timesteps)
        self.done += 1


def serve(requests: Sequence[Request]) -> list[Tensor]:
    """A step of each in turn until all are done."""
    while waiting := [request for request in requests if request.done < len(request.timesteps)]:
        for request in waiting:
            request.step()
    return [request.sample for request in requests]


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--inner", default="inductor")
    args = options.parse_args(argv)
    torch.manual_seed(0)
    model, lengths = DiT().eval().requires_grad_(False), (20, 14, 10)
    with pab_fx.enable(model, POLICY, inner=args.inner) as pab:
        together = serve([Request(model, pab, steps, seed) for seed, steps in enumerate(lengths)])
        print(pab.report())
        alone = [serve([Request(model, pab, steps, seed)])[0] for seed, steps in enumerate(lengths)]
    print("the same alone:", all(map(torch.equal, together, alone)))


if __name__ == "__main__":
    main()
