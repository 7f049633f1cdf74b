"""Time what `pab_fx` itself does in a call (counting, deciding, caches), with compiled code that does nothing.

python examples/measure_dispatch.py --attentions 2 42 84
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import pab_fx
from pab_fx.run.call import BroadcastGraph

TIMESTEPS = tuple(float(1000 - 20 * step) for step in range(50))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.to_out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (projection(x).unflatten(-1, (2, -1)).transpose(1, 2) for projection in self.projections)
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    def __init__(self, attentions: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention() for _ in range(attentions))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for attention in self.attentions:
            x = x + attention(x)
        return x


def nothing(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler whose code returns zeros that were made before."""
    recorded = [node.meta["example_value"] for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    outputs = tuple(torch.zeros(tensor.shape) for tensor in recorded)
    return lambda *args: outputs


@torch.no_grad()
def measured(attentions: int, lowering: str) -> list[float]:
    """Seconds of each call in five generations of 50 steps."""
    torch.compiler.reset()
    t = [TIMESTEPS[0]]
    config = pab_fx.PABConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: t[0])
    backend = pab_fx.PABBackend(config, inner=nothing, lowering=lowering, timesteps=TIMESTEPS)
    model = torch.compile(Model(attentions).eval().requires_grad_(False), backend=backend, dynamic=False)
    seen: list[tuple[Any, ...]] = []
    call = BroadcastGraph.__call__

    def recording(graph: BroadcastGraph, *args: Any) -> Any:
        seen.append(args)
        return call(graph, *args)

    BroadcastGraph.__call__ = recording  # type: ignore[method-assign]
    for t[0] in TIMESTEPS * 2:
        model(torch.zeros(1, 4, 8), torch.tensor([1]))
    BroadcastGraph.__call__ = call  # type: ignore[method-assign]
    (graph,), seconds = backend.graphs, []
    for t[0] in TIMESTEPS * 5:
        start = time.perf_counter()
        graph(*seen[0])
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attentions", type=int, nargs="+", default=[2, 42, 84])
    args = parser.parse_args()
    print("| attentions | lowering | microseconds a call, median | 90th percentile |")
    print("| --- | --- | --- | --- |")
    for attentions in args.attentions:
        for lowering in ("specialize", "cond"):
            seconds = sorted(measured(attentions, lowering))
            median, high = statistics.median(seconds) * 1e6, seconds[int(0.9 * len(seconds))] * 1e6
            print(f"| {attentions} | {lowering} | {median:.0f} | {high:.0f} |")


if __name__ == "__main__":
    main()
