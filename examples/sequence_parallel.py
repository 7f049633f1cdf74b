"""Sequence parallelism with and without PAB: what is communicated in a generation.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py
    torchrun --nproc-per-node 8 examples/sequence_parallel.py --device cuda --inner inductor

The model is a small Wan with random weights. Its tokens are spread over the ranks by diffusers' context parallelism
(Ulysses): each attention exchanges queries, keys, values and outputs with all-to-alls, and a reused one does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import parallel
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import pab_fx


def table(without: parallel.Traffic, with_pab: parallel.Traffic, ranks: int) -> str:
    """A Markdown table: calls and bytes sent by each rank, by kind of collective."""
    lines = [
        "| collective | calls without PAB | with PAB | MB sent by each rank without PAB | with PAB | less |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kinds = sorted(without.calls)
    sent = {kind: (without.sent(kind, ranks) / 1e6, with_pab.sent(kind, ranks) / 1e6) for kind in kinds}
    rows = [(kind.replace("_", "-"), without.calls[kind], with_pab.calls[kind], *sent[kind]) for kind in kinds]
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    for name, *calls, before, after in [*rows, ("all", *total)]:
        less = f"{1 - after / before:.0%}"
        lines.append(f"| {name} | {calls[0]} | {calls[1]} | {before:.2f} | {after:.2f} | {less} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parallel.options(__doc__)
    parser.add_argument("--lowering", default="specialize", choices=["specialize", "cond"])
    options = parser.parse_args(arguments)

    device = parallel.start(options.device)
    ranks = dist.get_world_size()
    inputs = parallel.Inputs(device, options.steps)
    model = parallel.small_wan(device)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))

    def generate() -> torch.Tensor:
        return inputs.generate(lambda latents, t: model(latents, t, inputs.text, return_dict=False)[0])

    plain, without = parallel.traffic_of(generate)
    pab = pab_fx.enable(model, parallel.config(options.range), inner=options.inner, lowering=options.lowering)
    generate()  # compiles
    broadcast, with_pab = parallel.traffic_of(generate)
    if dist.get_rank() == 0:
        difference = (plain - broadcast).abs().mean() / plain.abs().mean()
        print(pab.report(), f"\nmean difference that PAB makes: {difference:.1%} of the latents\n", sep="\n")
        print(table(without, with_pab, ranks), flush=True)
    pab.disable()
    parallel.stop()


if __name__ == "__main__":
    main()
