"""How the cost of `pab_fx` itself grows with a model's blocks and tokens, and with requests that take turns on it.

    python examples/measure_growth.py --update docs/costs.md

Dispatch is the Python of a call of the compiled graph, with code in place of Inductor's that does nothing: counting,
deciding, handing over what is kept; requests come in turns, each in a session of its own. Bytes are what the report
tells of them, when all of it is kept. A cold start is the first four steps with Inductor and without any cache of its
own, less the same steps again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import pab_fx
from pab_fx import Attentions, Blocks, Every, Policy, Residual, Taylor
from pab_fx.report.marked import table, update
from pab_fx.run.call import BroadcastGraph

TIMESTEPS = tuple(float(1000 - 50 * step) for step in range(20))
POLICIES = {
    "attentions": Policy(Attentions(), Every(2)),
    "blocks": Policy(Blocks(), Every(2), Taylor(1, of=Residual())),
}
WIDTH, HEADS = 64, 2


@dataclass(frozen=True)
class Size:
    """A model and how many requests take turns on it."""

    blocks: int = 10
    tokens: int = 256
    requests: int = 1


SIZES = (
    *(Size(blocks=count) for count in (10, 20, 40, 60)),
    *(Size(tokens=count) for count in (1024, 4096)),
    *(Size(requests=count) for count in (4, 16)),
)


class Block(nn.Module):
    """Attention and a feed-forward on a residual stream, both modulated by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x) * scale).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norms[1](x) * scale)))
        return out


class Model(nn.Module):
    """A transformer of so many blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = 1 + torch.cos(timestep / 1000)
        for block in self.blocks:
            x = block(x, scale)
        out: torch.Tensor = self.head(x)
        return out


def build(size: Size) -> tuple[nn.Module, torch.Tensor]:
    """The model and its input."""
    torch.compiler.reset()
    torch.manual_seed(0)
    return Model(size.blocks).eval().requires_grad_(False), torch.randn(1, size.tokens, WIDTH)


def nothing(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler whose code returns zeros that were made before."""
    recorded = [node.meta["example_value"] for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    outputs = tuple(torch.zeros(tensor.shape) for tensor in recorded)
    return lambda *args: outputs


def dispatch(size: Size, policy: Policy, generations: int, lowering: str) -> tuple[float, int]:
    """Microseconds of a call, the median of the fastest generation, and the bytes that are kept for all requests."""
    model, x = build(size)
    seen: list[tuple[Any, ...]] = []
    call = BroadcastGraph.__call__

    def recording(graph: BroadcastGraph, *args: Any) -> Any:
        seen.append(args)
        return call(graph, *args)

    pab = pab_fx.enable(model, policy, inner=nothing, lowering=lowering, dynamic=False)
    sessions, seconds = [pab.session() for _ in range(size.requests)], []
    BroadcastGraph.__call__ = recording  # type: ignore[method-assign]
    with sessions[0]:
        model(x, torch.tensor(TIMESTEPS[0]))
    BroadcastGraph.__call__ = call  # type: ignore[method-assign]
    (graph,) = pab.backend.graphs
    inputs = {t: [torch.tensor(t) if each.ndim == 0 else each for each in seen[0]] for t in TIMESTEPS}
    for _ in range(generations):
        calls = []
        for t in TIMESTEPS:
            for session in sessions:
                with session:
                    start = time.perf_counter()
                    graph(*inputs[t])
                    calls.append(time.perf_counter() - start)
        seconds.append(statistics.median(calls))
    kept = sum(role.cache_bytes for role in pab.report().roles)
    pab.disable()
    return min(seconds) * 1e6, kept


def cold_start(size: Size, policy: Policy | None, lowering: str) -> float:
    """Seconds of compiling: for a policy, or of `torch.compile` alone."""
    model, x = build(size)
    run: Any = model
    if policy is None:
        run = torch.compile(model)
    else:
        pab_fx.enable(model, policy, lowering=lowering)
    first, again = (_seconds(run, x) for _ in range(2))
    return first - again


def _seconds(run: Any, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for t in TIMESTEPS[:4]:
        run(x, torch.tensor(t))
    return time.perf_counter() - start


@torch.no_grad()
def rows(sizes: Sequence[Size], generations: int, lowering: str, with_cold_starts: bool) -> list[tuple[str, ...]]:
    """A row for each size and policy."""
    found = []
    for size in sizes:
        is_compiled = with_cold_starts and size.requests == 1
        alone = cold_start(size, None, lowering) if is_compiled else None
        for name, policy in POLICIES.items():
            microseconds, kept = dispatch(size, policy, generations, lowering)
            cells = [name, str(size.blocks), f"{size.tokens:,}", str(size.requests)]
            cells += [f"{microseconds:.0f}", f"{kept / 2**20:.2f}"]
            if with_cold_starts:
                cells += (
                    [f"{cold_start(size, policy, lowering):.1f}", f"{alone:.1f}"] if alone is not None else ["", ""]
                )
            found.append(tuple(cells))
            print(*cells, flush=True)
    return found


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="specialize", choices=("specialize", "cond"))
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument(
        "--cold-starts", action="store_true", help="of one request, too: this takes a quarter of an hour"
    )
    parser.add_argument("--update", type=Path, help="a Markdown file whose table is replaced")
    args = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch.set_num_threads(1)
    heads = ("policy", "blocks", "tokens", "requests", "microseconds a call", "MiB kept")
    heads += ("cold start, s", "of compile, s") if args.cold_starts else ()
    written = table(heads, rows(SIZES, args.generations, args.lowering, args.cold_starts))
    print(written)
    if args.update:
        update(args.update, "growth", written)


if __name__ == "__main__":
    main()
