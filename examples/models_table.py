"""Measure what docs/models.md says of each transformer class, and write it as a Markdown table: some 5 minutes.

    python examples/models_table.py > table.md
    python examples/models_table.py --update docs/models.md

Every model of tests/zoo runs a generation of ten steps with diffusers' hooks and with `pab_fx` in both
lowerings (`inner="eager"`); outputs are compared bit by bit. `--update` replaces the table of a Markdown file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pab_fx import Blocks, Every, PABBackend, PABConfig, Policy, Residual

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo import ZOO, Clock, Entry, diffusers_config, hooked, hooked_modules, trajectory

TIMESTEPS = (950, 790, 700, 650, 600, 500, 400, 300, 90, 50)
ROLES = ("spatial", "temporal", "cross")
ONE_GRAPH = {"capture_dynamic_output_shape_ops": True}

Trajectory = list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """What was measured for one model.

    Args:
        name: class name, after "-" the variant.
        regions: the attentions that are broadcast with diffusers' config, per role.
        dataflow: the same with a `PABConfig`, whose roles come from the dataflow.
        blocks: its repeated blocks, and how many streams leave them; or why they are left alone.
        hooks: how many modules the hooks sit on.
        frames: how many graphs Dynamo captured.
        graphs: what the inner compiler compiled, with "specialize" and "cond".
        verdict: whether the outputs are those of the hooks.
    """

    name: str
    regions: Counter[str]
    dataflow: Counter[str]
    blocks: str
    hooks: int
    frames: int
    graphs: tuple[int, int]
    verdict: str

    def __str__(self) -> str:
        cells = [f"`{self.name}`", _counts(self.regions), _counts(self.dataflow), self.blocks]
        return "| " + " | ".join([*cells, *map(str, (self.hooks, self.frames, *self.graphs)), self.verdict]) + " |"


HEAD = (
    "| class | regions as the hooks | regions by dataflow | blocks "
    "| hooked modules | captured | specialize | cond | equal |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def _counts(regions: Counter[str]) -> str:
    return ", ".join(f"{regions[role]} {role}" for role in ROLES if regions[role]) or "none"


def measure(entry: Entry, **flags: Any) -> Row:
    """Run one model with the hooks and with both lowerings; `flags` are Dynamo's."""
    clock, model = Clock(), entry.build()
    config = diffusers_config(clock)
    oracle = hooked(model, config)
    reference = trajectory(entry, oracle, TIMESTEPS, clock)
    backends: dict[str, PABBackend] = {}
    outputs: dict[str, Trajectory] = {}
    with torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext():
        for lowering in ("specialize", "cond"):
            outputs[lowering] = _run(entry, model, config, lowering, TIMESTEPS, clock, backends)
        own = PABConfig(2, 3, 4, current_timestep_callback=clock)
        _run(entry, model, own, "dataflow", TIMESTEPS[:1], clock, backends)
        _run(entry, model, Policy(Blocks(), Every(2), Residual()), "blocks", TIMESTEPS[:1], clock, backends)
    specialize, cond = backends["specialize"], backends["cond"]
    return Row(
        name=entry.name,
        regions=_regions(specialize),
        dataflow=_regions(backends["dataflow"]),
        blocks=_blocks(backends["blocks"]),
        hooks=len(hooked_modules(oracle)),
        frames=len(specialize.graphs),
        graphs=(specialize.report().graphs, cond.report().graphs),
        verdict=_verdict(outputs, reference, specialize),
    )


def _run(
    entry: Entry,
    model: Any,
    config: Any,
    name: str,
    timesteps: Sequence[float],
    clock: Clock,
    backends: dict[str, PABBackend],
) -> Trajectory:
    torch._dynamo.reset()
    backends[name] = PABBackend(config, inner="eager", lowering="cond" if name == "cond" else "specialize")
    return trajectory(entry, torch.compile(model, backend=backends[name]), timesteps, clock)


def _regions(backend: PABBackend) -> Counter[str]:
    """Distinct modules per role, as blocks that are compiled alone are captured once for all their siblings."""
    return Counter({role.role: role.modules for role in backend.report().roles})


def _blocks(backend: PABBackend) -> str:
    """Of each graph that has some; those of graphs that are alike once."""
    found = []
    for region in backend.regions:
        count = region.why.partition(" of ")[0] if " of " in region.why else "1"
        streams = f"{len(region.outputs)} stream{'s' if len(region.outputs) > 1 else ''}"
        left_alone = None if region.unsafe is None else f"left alone: {region.unsafe.partition(' (')[0]}"
        where = f"{count} in several graphs" if region.piece is not None else count
        found.append(f"{where}, {left_alone or streams}")
    return "; ".join(dict.fromkeys(found)) or "none"


def _verdict(outputs: dict[str, Trajectory], reference: Trajectory, backend: PABBackend) -> str:
    different = [lowering for lowering, own in outputs.items() if not _is_equal(own, reference)]
    if not different:
        return "bitwise"
    reasons = {region.left_alone.split(",")[0] for region in backend.report().regions if region.left_alone}
    return f"no ({', '.join(different)}): {'; '.join(sorted(reasons)) or 'unexplained'}"


def _is_equal(outputs: Trajectory, others: Trajectory) -> bool:
    return all(
        torch.equal(a, b) for own, other in zip(outputs, others, strict=True) for a, b in zip(own, other, strict=True)
    )


def table(names: Sequence[str]) -> str:
    """The table for the named entries of the zoo, all of them by default."""
    rows = []
    for entry in ZOO:
        if names and entry.name not in names:
            continue
        row = measure(entry)
        rows.append(str(row))
        print(row, file=sys.stderr, flush=True)
        if row.verdict != "bitwise":
            flags = f"` with `{next(iter(ONE_GRAPH))}` |"
            rows.append(str(measure(entry, **ONE_GRAPH)).replace("` |", flags, 1))
    return "\n".join([HEAD, *rows])


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries of the zoo; all by default")
    parser.add_argument("--update", type=Path, metavar="FILE", help="a Markdown file whose table is replaced")
    args = parser.parse_args()
    torch.set_num_threads(1)
    written = table(args.names)
    if not args.update:
        print(written)
        return
    old = re.compile(r"(<!-- table -->\n\n).*?(\n\n|\Z)", re.DOTALL)
    args.update.write_text(old.sub(lambda m: m[1] + written + (m[2] or "\n"), args.update.read_text()))


if __name__ == "__main__":
    main()
