"""What is kept of released models: by PAB one tensor for each attention, by `Blocks` one for each stream and order.

    python examples/measure_kept.py

Nothing is downloaded and no memory is needed: the models are captured on the meta device, with the numbers of their
checkpoints. A kept tensor is a buffer of the rewritten graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

import pab_fx
from pab_fx import Blocks, Every, Last, Policy, Residual, Taylor
from pab_fx.bench.models import BenchModel, model_of
from pab_fx.passes.form import conditionals

META = torch.device("meta")
WAN_14B = dataclasses.replace(
    model_of("wan", "cuda"),
    title="Wan 2.1 14B, 81 frames, 720 x 1280",
    config={**model_of("wan", "cuda").config, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    latents=(1, 16, 21, 90, 160),
)
MODELS = (model_of("cogvideox", "cuda"), WAN_14B, model_of("flux", "cuda"))

HOWS = {"the last output": Last(), **{f"residual, order {n}": Taylor(n, of=Residual()) for n in range(3)}}


def configs_of(model: BenchModel) -> dict[str, Any]:
    """What is compared: PAB as the benchmark has it for the model, and its blocks as a whole."""
    return {"PAB": model.pab, **{f"`Blocks`, {name}": Policy(Blocks(), Every(3), how) for name, how in HOWS.items()}}


def captured(model: nn.Module, inputs: Mapping[str, Any]) -> fx.GraphModule:
    """The graph that Dynamo captures of a model."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(**inputs)
    (graph,) = graphs
    return graph


def kept(gm: fx.GraphModule, config: Any) -> list[torch.Tensor]:
    """What a config keeps of a captured graph when it keeps all, in one cache context."""
    rewritten = pab_fx.rewrite(gm, config)
    assert conditionals(rewritten)
    return [buffer for name, buffer in rewritten.named_buffers() if name.startswith("pab_slot")]


def main() -> None:
    """Count, and print a table in Markdown."""
    columns = {}
    for model in MODELS:
        gm = captured(model.build(META), model.inputs((900.0,), META)[0])
        columns[model.title] = {name: kept(gm, config) for name, config in configs_of(model).items()}
    print(f"| | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for name in configs_of(MODELS[0]):
        found = [column[name] for column in columns.values()]
        cells = [f"{sum(t.nbytes for t in each) / 2**20:,.0f} MiB in {len(each)}" for each in found]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
