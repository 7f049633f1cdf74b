"""Models that no library of diffusion models has: blocks in lists of lists, of timm, of x-transformers."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import Part, distance, equal
from test_blocks import Attention, feed_forward
from torch import Tensor, nn

from pab_fx import Attentions, Blocks, Every, FeedForwards, PABBackend, Policy, Residual, Taylor

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = tuple(float(t) for t in range(1000, 0, -120))
WIDTH = 16


def installed(name: str) -> Any:
    """A package that the tests do without: what is for it is skipped where it cannot be imported, and says why."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # timm's torchvision may be built for another torch
        pytest.skip(f"runs where {name} can be imported: {error}")


class Denoiser(nn.Module):
    """What runs `blocks` on tokens, given a timestep."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.proj_in, self.time, self.proj_out = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = blocks

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time(timestep[:, None] / 1000).sin()
        return self.proj_out(self.blocks(self.proj_in(hidden_states) + embedding[:, None]))


class Layers(nn.Module):
    """Layers of a norm and what comes after it, an attention and a feed-forward in turns; one list holds the lists."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        parts = [part for _ in range(2) for part in (Attention(WIDTH), feed_forward(WIDTH))]
        self.layers = nn.ModuleList([nn.ModuleList([nn.LayerNorm(WIDTH), part]) for part in parts])
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in self.layers:
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return x


def timm_blocks() -> nn.Module:
    vision_transformer = installed("timm.models.vision_transformer")
    return nn.Sequential(*(vision_transformer.Block(WIDTH, 2, init_values=0.5, qk_norm=True) for _ in range(2)))


def timm_model() -> nn.Module:
    """As a whole, without what makes patches of an image."""
    vision_transformer = installed("timm.models.vision_transformer")
    model = vision_transformer.VisionTransformer(
        *(8, 4), embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0, global_pool="", class_token=False
    )
    model.patch_embed = model.norm = nn.Identity()
    model.pos_embed = nn.Parameter(torch.randn(1, 6, WIDTH))
    return model


def encoder(**options: Any) -> nn.Module:
    made = installed("x_transformers").Encoder(dim=WIDTH, depth=2, heads=2, attn_dim_head=8, **options)
    made.final_norm = nn.Identity()  # which follows the blocks
    return made


def wrapper() -> nn.Module:
    layers = encoder(rotary_pos_emb=True, ff_glu=True)
    return installed("x_transformers").ContinuousTransformerWrapper(max_seq_len=6, attn_layers=layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, str]]] = {
    "lists": (Layers, 4, LISTS := {"attn": r"layers\.[02]\.1", "ff": r"layers\.[13]\.1", "blocks": ""}),
    "lists, norms last": (lambda: Layers(norm_first=False), 4, LISTS),
    "timm blocks": (timm_blocks, 2, {"attn": r"\d\.attn", "ff": r"\d\.mlp", "blocks": ""}),
    "timm model": (timm_model, 2, {"attn": r"blocks\.\d\.attn", "ff": r"blocks\.\d\.mlp", "blocks": "blocks"}),
    "x-transformers": (encoder, 4, LISTS),
    "x-transformers, wrapped": (wrapper, 4, {part: f"attn_layers.{LISTS[part]}".rstrip(".") for part in LISTS}),
}
"""A model, how many blocks it has, and what its attentions, feed-forwards and blocks as a whole are called."""
PARTS = {"attn": Attentions(), "ff": FeedForwards(), "blocks": Blocks()}
FURTHER = [(name, part) for name in ("lists, norms last", "x-transformers, wrapped") for part in ("attn", "ff")]
QUICK = [(name, part) for name in MODELS for part in PARTS if (name, part) not in FURTHER]


def build(name: str) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(MODELS[name][0]()).eval().requires_grad_(False)


def inputs(step: int, t: float) -> tuple[Tensor, Tensor]:
    start, end = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    return start * math.cos(step / 30) + 0.5 * end * math.sin(step / 20), torch.tensor([t, t])


def trajectory(model: Any) -> list[Tensor]:
    return [model(*inputs(step, t)).clone() for step, t in enumerate(TIMESTEPS)]


def policy(part: str) -> Policy:
    how = Taylor(1, of=Residual()) if part == "blocks" else Taylor(1)
    return Policy(PARTS[part], Every(3, warmup=1), how)


def reference(model: Denoiser, part: str, name: str) -> list[Tensor]:
    """Modules of certain names under the policy, in plain eager Python."""
    model, now, found = copy.deepcopy(model), [0, 0.0], []
    for full, module in model.blocks.named_modules():
        if re.fullmatch(name, full):
            module.forward = wrapped(module.forward, Part(policy(part)), now)
    for now[:] in enumerate(TIMESTEPS):
        found.append(model(*inputs(*now)).clone())
    return found


def wrapped(compute: Callable[..., Any], part: Part, now: Sequence[Any]) -> Callable[..., Any]:
    def forward(x: Tensor, **given: Any) -> Any:
        output = compute(x, **given)
        if isinstance(output, tuple):  # x-transformers' attentions yield more, for others to read
            return (part(*now, (x,), lambda: output[:1])[0], *output[1:])
        return part(*now, (x,), lambda: (output,))[0]

    return forward


@pytest.mark.parametrize(("name", "part"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in FURTHER)])
def test_parts_of_a_plain_model_do_what_the_policy_says(name: str, part: str) -> None:
    model, (_, blocks, names) = build(name), MODELS[name]
    expected, backend = reference(model, part, names[part]), PABBackend(policy(part), inner="eager")
    assert equal(trajectory(torch.compile(model, backend=backend)), expected)
    assert not equal(expected, trajectory(model))
    regions = [region for region in backend.report().regions if not region.left_alone]
    if part == "blocks":
        assert [region.why.partition(",")[0] for region in regions] == [f"{blocks} of {blocks} blocks"]
    else:
        assert len(regions) == 2
        assert all(re.search(names[part], region.name) for region in regions)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_model_with_inductor(name: str, lowering: str) -> None:
    model = build(name)
    compiled = torch.compile(model, backend=PABBackend(policy("blocks"), lowering=lowering))
    expected = reference(model, "blocks", MODELS[name][2]["blocks"])
    assert distance(trajectory(compiled), expected) < 1e-5  # Inductor fuses, so it rounds otherwise


def test_a_range_of_lists_is_skipped_and_the_others_run() -> None:
    model = build("lists")
    backend = PABBackend(Policy(Blocks(1, -1), Every(2), Residual()), inner="eager")
    trajectory(torch.compile(model, backend=backend))
    (graph,) = backend.graphs
    (reusing,) = [gm for key, gm in graph.graphs.items() if all(key)]
    left = str([node.args for node in reusing.graph.nodes if node.op == "call_function"])
    assert [f"layers_modules_{i}_modules_1" in left for i in range(4)] == [True, False, False, True]
