"""How long the first generation takes in a process that finds what another one has compiled.

    python examples/second_process.py --model wan --update docs/costs.md

For `torch.compile` alone and for each lowering three processes run one after the other. The first begins with an empty
cache on disk, and saves `torch.compiler.save_cache_artifacts()`. The second has the same cache on disk. The third has
an empty one, and loads the artifacts. All outputs have to be equal to the bit, and no graph is compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pab_fx
from pab_fx import Attentions, Blocks, Every, Policy, Residual, Taylor
from pab_fx.bench.models import model_of, timesteps_of
from pab_fx.report.marked import table, update

WAYS = ("compile", "specialize", "cond")
POLICIES = {
    "blocks": Policy(Blocks(), Every(3), Taylor(1, of=Residual())),
    "attentions": Policy(Attentions(), Every(2), Taylor(1)),
}


def main() -> None:
    """Run three processes for each way, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan", choices=("cogvideox", "latte", "flux", "wan"))
    parser.add_argument("--size", default="cpu", choices=("cpu", "quick"))
    parser.add_argument("--policy", default="blocks", choices=POLICIES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--update", type=Path, help="a Markdown file whose table is replaced")
    parser.add_argument("--artifacts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.artifacts:
        print(json.dumps(generate(args.model, args.size, args.policy, *args.ways, args.artifacts, args.load)))
        return
    rows = []
    for way in args.ways:
        with tempfile.TemporaryDirectory() as home:
            first = process(Path(home), "here", args, way)
            others = [process(Path(home), name, args, way) for name in ("here", "elsewhere")]
        for other in others:
            if first["sums"] != other["sums"] or other["compiled"] or other["left out"]:
                raise SystemExit(f"{way}: another process compiled, or computed something else: {first}, {other}")
        ratios = [f"{each['seconds']:.1f} ({each['seconds'] / first['seconds']:.2f})" for each in others]
        rows.append((way, f"{first['seconds']:.1f}", *ratios, str(first["graphs"])))
    heads = (f"{args.model}, seconds", "first process", "same cache on disk", "artifacts only", "graphs")
    written = table(heads, rows)
    print(written)
    if args.update:
        update(args.update, f"second process {args.model}", written)


def process(home: Path, name: str, args: argparse.Namespace, way: str) -> dict[str, Any]:
    """What a process finds that has a cache on disk of that name."""
    command = [sys.executable, "-W", "ignore", __file__, "--artifacts", str(home / "artifacts"), "--ways", way]
    command += ["--model", args.model, "--size", args.size, "--policy", args.policy]
    command += ["--load"] * (name == "elsewhere")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(home / name)}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def generate(model: str, size: str, policy: str, way: str, artifacts: Path, load: bool) -> dict[str, Any]:
    """One generation of six steps, and what was compiled for it."""
    from torch._dynamo.utils import counters

    kind, timesteps = model_of(model, size), timesteps_of(6)
    transformer, inputs = kind.build(torch.device("cpu")), kind.inputs(timesteps, torch.device("cpu"))
    run: Callable[..., Any] = transformer
    start = time.perf_counter()
    if load:
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    if way == "compile":
        run = torch.compile(transformer)
    else:
        pab_fx.enable(transformer, POLICIES[policy], lowering=way)
    with torch.no_grad():
        sums = [float(run(**step)[0].double().sum()) for step in inputs]
    seconds = time.perf_counter() - start
    made = torch.compiler.save_cache_artifacts()
    if made is not None:
        artifacts.write_bytes(made[0])
    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    return {
        "seconds": seconds,
        "sums": sums,
        "graphs": autograd["total"],
        "compiled": inductor["fxgraph_cache_miss"] + autograd["autograd_cache_miss"],
        "left out": inductor["fxgraph_cache_bypass"] + autograd["autograd_cache_bypass"],
    }


if __name__ == "__main__":
    main()
