"""Measure the most bytes of tensors that a step holds, beside the weights, for a Latte of 3 + 3 blocks and three roles.

    python examples/measure_memory.py

Counted by the profiler's memory events on the CPU; what is kept from the steps before is included.
"""

from __future__ import annotations

from typing import Any

import torch
from compare_regional import CONFIG, build

import pab_fx
from pab_fx.bench._torch import peak_of_live_bytes

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
WAYS: dict[str, dict[str, Any]] = {
    "specialize": {},
    "specialize, int8": {"cache_dtype": "int8"},
    "cond": {"lowering": "cond"},
    "regional": {"regional": True},
}


@torch.no_grad()
def step(model: Any, t: float) -> None:
    """One step on fixed inputs."""
    model(LATENTS + t / 1000, torch.tensor([t]), TEXT, return_dict=False)


def main() -> None:
    """Measure, and print a table in Markdown."""
    print("| | MiB | of it kept, when all caches are |\n| --- | --- | --- |")
    plain = build(3)
    plain.compile()
    step(plain, 900)
    print(f"| compiled, without PAB | {peak_of_live_bytes(lambda: step(plain, 900)) / 2**20:.1f} | |")
    for name, options in WAYS.items():
        torch.compiler.reset()
        model, most = build(3), 0
        pab = pab_fx.enable(model, CONFIG, timesteps=TIMESTEPS, **options)
        for t in TIMESTEPS:
            step(model, t)
        pab.reset()
        for t in TIMESTEPS:
            report = pab.report()
            before = sum(role.cache_bytes for role in report.roles) + report.once.kept_bytes
            most = max(most, before + peak_of_live_bytes(lambda t=t, model=model: step(model, t)))  # type: ignore[misc]
        full = sum(role.full_bytes for role in pab.report().roles)
        print(f"| {name} | {most / 2**20:.1f} | {full / 2**20:.1f} |")


LATENTS, TEXT = torch.randn(1, 4, 8, 32, 32), torch.randn(1, 16, 64)

if __name__ == "__main__":
    main()
