"""Print one graph on its way through the passes.

python examples/print_graphs.py                # all stages; a word after it chooses those it is part of
python examples/print_graphs.py --update FILE  # put them under their <!-- graph: NAME --> marks in a Markdown file
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from pab_fx import Attentions, Every, PABBackend, PABConfig, Policy, Taylor, rewrite, specialize
from pab_fx.graph.copies import copy_of
from pab_fx.graph.modules import ModuleNames
from pab_fx.passes.conditions import insert_conditions
from pab_fx.select.tag import tag

CONFIG = PABConfig(spatial_attention_block_skip_range=2)
FORECAST = Policy(Attentions(("spatial",)), Every(2), Taylor(1))


class Attention(nn.Module):
    """Self-attention of tokens [B, S, D] with one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_out(functional.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.ff = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm(hidden_states))
        return hidden_states + self.ff(hidden_states)


def build() -> Block:
    """The block whose graphs are printed."""
    return Block().eval().requires_grad_(False)


def conditional(captured: fx.GraphModule, policies: Sequence[Policy]) -> fx.GraphModule:
    """The functional form of a captured graph: predicates, scalars and slots come in, slots go out."""
    gm = copy_of(captured)
    insert_conditions(gm, tag(gm, policies, ModuleNames.of_graph(gm)))
    gm.recompile()
    return gm


def lowered_graphs(lowering: str) -> list[fx.GraphModule]:
    """What the inner compiler is handed in two steps, of which the second may reuse."""
    graphs: list[fx.GraphModule] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    model = torch.compile(build(), backend=PABBackend(CONFIG, inner=capture, lowering=lowering))
    for timestep in (700, 600):
        model(torch.zeros(1, 4, 8), torch.tensor([timestep]))
    return graphs


def stages() -> dict[str, str]:
    """The graph as Python code, by the name of the stage."""
    captured = fx.symbolic_trace(build())
    rewritten = rewrite(captured, CONFIG)
    kept, forecast = conditional(captured, CONFIG.policies()), conditional(captured, [FORECAST])
    computing, reusing = lowered_graphs("specialize")
    (with_conditions,) = lowered_graphs("cond")
    found: dict[str, Any] = {
        "captured": captured,
        "conditional": kept,
        "conditional, the computing branch": kept.pab_compute_0,
        "conditional, the reading branch": kept.pab_read_0,
        "forecast, the computing branch": forecast.pab_compute_0,
        "forecast, the reading branch": forecast.pab_read_0,
        "lowered, computing": computing,
        "lowered, reusing": reusing,
        "lowered, cond": with_conditions,
        "rewritten": rewritten,
        "specialized, computing": specialize(rewritten, reuse=()),
        "specialized, reusing": specialize(rewritten, reuse={"spatial"}),
    }
    return {name: readable(gm) for name, gm in found.items()}


def readable(gm: fx.GraphModule) -> str:
    """The code of a graph, tidied: no type annotations, no `x = None` that frees a value early, short input
    names, attributes where they are read.
    """
    code = re.sub(r";  (\w+ = )+None( +#.*)?$", "", str(gm.code).strip(), flags=re.MULTILINE)
    code = re.sub(r"(\w) ?: \"?[\w.]+(\[[^\]]*\])?\"?(?=[,)])", r"\1", code)
    code = re.sub(r"\) -> .*:$", "):", code, flags=re.MULTILINE)
    signature, *lines = code.splitlines()
    body: list[str] = []
    attributes: dict[str, str] = {}
    for line in lines:
        read = re.fullmatch(r" +(\w+) = (self\.\w+)", line)
        alias = re.fullmatch(r" +(\w+) = (\w+)", line)  # Dynamo's inputs have a name outside and one inside
        if alias and alias[2] in re.findall(r"\w+", signature):
            signature = re.sub(rf"\b{alias[2]}\b", alias[1], signature)
        elif read:
            attributes[read[1]] = read[2]
        else:
            body.append(re.sub(r"(?<!\.)\b\w+\b", lambda m: attributes.get(m[0], m[0]), line))
    return "\n".join([signature, *body]).replace("_modules_", "_").replace("_parameters_", "_")


def update(path: Path) -> None:
    """Replace the fenced block after each `<!-- graph: NAME -->` by the stage of that name."""
    text = path.read_text()
    for name, code in stages().items():
        mark = re.escape(f"<!-- graph: {name} -->\n")
        text = re.sub(f"({mark}```python\n).*?(```)", lambda m: f"{m[1]}{code}\n{m[2]}", text, flags=re.DOTALL)  # noqa: B023
    path.write_text(text)


def main() -> None:
    """Print the stages, or write them into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="", help="a part of the names of the stages to print")
    parser.add_argument("--update", type=Path, metavar="FILE", help="a Markdown file to bring up to date")
    args = parser.parse_args()
    if args.update:
        update(args.update)
        return
    for name, code in stages().items():
        if args.stage in name:
            print(f"# {name}\n{code}\n")


if __name__ == "__main__":
    main()
