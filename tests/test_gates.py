"""Attentions that are kept with their gate, against plain eager references; as VideoSys keeps them in Latte."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from reference import Part, distance, equal
from torch import Tensor, fx, nn
from torch.nn.functional import dropout, layer_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import pab_fx
from pab_fx import Attentions, Every, How, Last, Policy, Taylor
from pab_fx.select.tag import tag

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = tuple(float(t) for t in range(1000, 0, -120))
WIDTH = 8


# ------------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]))


class TwoStreamAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.to_text = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        attended = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.to_text(attended[:, :2]), self.to_out(attended[:, 2:])


Product = Callable[[Tensor, Any], Tensor]  # of a gate, [B, 1, C], and an attention's output, [B, S, C]
Sum = Callable[[Tensor, Tensor, Any], Tensor]  # of the stream, the gate, and that output


class Block(nn.Module):
    """`join` takes the place of a sum of the stream and a product."""

    def __init__(self, product: Product, join: Sum | None, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.attn, self.ff = attention(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.product, self.join = product, join

    def attended(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Any]:
        modulation = self.modulation(embedding).unsqueeze(1).chunk(3, dim=-1)
        return modulation[0], self.attn(self.norm(x) * (1 + modulation[1]) + modulation[2])

    def kept(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.product(*self.attended(x, embedding))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.join(x, *self.attended(x, embedding)) if self.join is not None else x + self.kept(x, embedding)
        return x + self.ff(self.norm(x))


class DiT(nn.Module):
    def __init__(self, product: Product, join: Sum | None, attention: type[nn.Module]) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([Block(product, join, attention) for _ in range(2)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time(timestep[:, None] / 100).sin()
        for block in self.blocks:
            hidden_states = block(hidden_states, embedding)
        return hidden_states


def times(gate: Tensor, attended: Tensor) -> Tensor:
    return gate * attended


def build(product: Product = times, join: Sum | None = None, attention: type[nn.Module] = Attention) -> DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiT(product, join, attention).eval().requires_grad_(False)


def inputs(step: int, t: float) -> tuple[Tensor, Tensor]:
    start, end = torch.randn(2, 2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    return start * math.cos(step / 30) + 0.5 * end * math.sin(step / 20), torch.tensor([t, t])


def trajectory(model: Any) -> list[Tensor]:
    return [model(*inputs(step, t)).clone() for step, t in enumerate(TIMESTEPS)]


def reference(model: DiT, policy: Policy) -> list[Tensor]:
    """Each block keeps `gate * attention`, in plain eager Python."""
    model, now = copy.deepcopy(model), [0, 0.0]
    for block in model.blocks:
        compute, part = block.kept, Part(policy)
        block.kept = lambda x, e, compute=compute, part=part: part(*now, (), lambda: (compute(x, e),))[0]
    found = []
    for now[:] in enumerate(TIMESTEPS):
        found.append(model(*inputs(*now)).clone())
    return found


def kept(how: How | None = None, gated: bool = True) -> Policy:
    return Policy(Attentions(gated=gated), Every(3, warmup=1), how or Last())


# ------------------------------------------------------------------------------------- to the bit

PRODUCTS: dict[str, Product] = {
    "gate * a": times,
    "a * gate": lambda gate, a: a * gate,
    "torch.mul": lambda gate, a: torch.mul(a, gate),
    "tanh": lambda gate, a: gate.tanh() * a,
    "norm": lambda gate, a: gate * layer_norm(a, (WIDTH,)),
    "norm by hand": lambda gate, a: a * a.pow(2).mean(-1, keepdim=True).rsqrt() * gate,
    "frames": lambda gate, a: (
        (gate.unsqueeze(1) * a.unflatten(1, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(1, 2)
    ),
    "casts": lambda gate, a: (gate.double() * a.double()).float(),
    "dropout": lambda gate, a: dropout(gate * dropout(a, 0.1, training=False), 0.1, training=False),
    "two factors": lambda gate, a: gate * (a * gate.sigmoid()),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_what_is_kept_is_the_product_with_the_gate_of_the_step_that_computed(product: Product) -> None:
    model = build(product)
    expected = reference(model, kept())
    assert equal(trajectory(pab_fx.rewrite(fx.symbolic_trace(model), kept())), expected)
    assert not equal(trajectory(pab_fx.rewrite(fx.symbolic_trace(model), kept(gated=False))), expected)
    assert not equal(trajectory(model), expected)


@pytest.mark.parametrize(
    ("how", "lowering", "product"),
    [(Last(), "specialize", "frames"), (Taylor(1), "cond", "norm by hand")],
    ids=str,
)
def test_a_gated_attention_goes_by_any_how_and_a_reusing_step_computes_no_gate(
    how: How, lowering: str, product: str
) -> None:
    model = build(PRODUCTS[product])
    expected = reference(model, kept(how))
    with pab_fx.enable(model, kept(how), inner="eager", lowering=lowering) as pab:
        assert equal(trajectory(model), expected)
        assert {region.note for region in pab.report().regions} == {"what is kept is its product with the gate"}
        with pytest.raises(ValueError, match=r"with its gate, and the new config .*captured anew"):
            pab.set_config(kept(how, gated=False))
        (graph,) = pab.backend.graphs
    if lowering == "specialize":  # what makes the gate is only the attention's, and goes with it
        (reusing,) = [gm for key, gm in graph.graphs.items() if all(key)]
        left = str([node.args for node in reusing.graph.nodes if "linear" in str(node.target)])
        assert "ff" in left
        assert "modulation" not in left


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["cond", "specialize"])
def test_a_gated_attention_with_inductor(lowering: str) -> None:
    model = build()
    del model.blocks[1]
    with pab_fx.enable(model, kept(), lowering=lowering):
        assert distance(trajectory(model), reference(model, kept())) < 1e-5  # Inductor fuses, so it rounds otherwise


def test_two_streams_of_an_attention_each_have_a_gate() -> None:
    def product(gate: Tensor, attended: Any) -> Tensor:
        return torch.cat([gate * attended[0], gate.tanh() * attended[1]], dim=1)

    model = build(product, attention=TwoStreamAttention)
    with pab_fx.enable(model, kept(), inner="eager") as pab:
        assert equal(trajectory(model), reference(model, kept()))
        assert {region.note for region in pab.report().regions} == {"what is kept is its product with the gate"}
        assert pab.report().roles[0].full_bytes == 2 * 2 * 6 * WIDTH * 4  # blocks, batch, tokens, width, bytes


# ------------------------------------------------------------------------------------- what stays as it is

UNGATED: dict[str, Sum] = {
    "no gate": lambda x, gate, a: x + a,
    "weights": lambda x, gate, a: x + a * torch.full((WIDTH,), 0.5),
    "another use": lambda x, gate, a: x + gate * a + 0.1 * a,
    "two gates": lambda x, gate, a: x + gate * a + gate.tanh() * a,
    "its own gate": lambda x, gate, a: x + a.sigmoid() * a,
    "no sum": lambda x, gate, a: x * (gate * a),
    "activation": lambda x, gate, a: x + gate * a.tanh(),
    "updated": lambda x, gate, a: x + a.mul_(gate),
    "addcmul": torch.addcmul,
}


@pytest.mark.parametrize("join", UNGATED.values(), ids=UNGATED)
def test_an_attention_whose_product_is_not_all_that_it_is_for_is_kept_as_it_is_and_it_is_said(join: Sum) -> None:
    graph = fx.symbolic_trace(build(join=join))
    gated, plain = (tag(graph, [kept(gated=gated)]) for gated in (True, False))
    assert [region.outputs for region in gated] == [region.outputs for region in plain]
    assert all(region.is_broadcast for region in gated)
    said = "(addcmul), so it is kept without" if join is torch.addcmul else "so it is kept as it is"
    assert all(said in str(region.note) for region in gated)


def test_a_gate_that_follows_from_the_attention_is_left_out() -> None:
    """Where one output makes the gate of the other, the region with both would be before and after what makes it."""

    def join(x: Tensor, gate: Tensor, attended: Any) -> Tensor:
        text, image = attended
        return x + torch.cat([text, (gate + text.mean(1, keepdim=True)) * image], dim=1)

    model = build(join=join, attention=TwoStreamAttention)
    found = [trajectory(pab_fx.rewrite(fx.symbolic_trace(model), kept(gated=gated))) for gated in (True, False)]
    assert equal(*found)
    assert not equal(found[0], trajectory(model))


# ------------------------------------------------------------------------------------- models of diffusers


def videosys(block: Any, part: Part, now: Sequence[Any], gated: bool) -> Callable[..., Tensor]:
    """A block's forward as VideoSys has it for Latte, but for the cross-attention, which is not kept here."""

    def forward(hidden_states: Tensor, mask: Any, text: Any, text_mask: Any, timestep: Tensor, *_: Any) -> Tensor:
        table = block.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)

        def attention() -> Tensor:
            return block.attn1(block.norm1(hidden_states) * (1 + scale_msa) + shift_msa, attention_mask=mask)

        if gated:
            attended = part(*now, (), lambda: (gate_msa * attention(),))[0]
        else:  # as diffusers' hooks do
            attended = gate_msa * part(*now, (), lambda: (attention(),))[0]
        hidden_states = attended + hidden_states
        if block.attn2 is not None:
            crossed = block.attn2(hidden_states, encoder_hidden_states=text, attention_mask=text_mask)
            hidden_states = crossed + hidden_states
        normed = block.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return gate_mlp * block.ff(normed) + hidden_states

    return forward


def latte_by_videosys(entry: zoo.Entry, policy: Policy, gated: bool) -> list[Tensor]:
    model, now, found = entry.build(), [0, 0.0], []
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        block.forward = videosys(block, Part(policy), now, gated)
    for now[:] in enumerate(TIMESTEPS[:5]):
        found.append(zoo.call(entry, model, now[1], now[0])[0].clone())
    return found


@pytest.mark.parametrize("lowering", ["cond", pytest.param("specialize", marks=pytest.mark.slow)])
def test_latte_is_kept_as_videosys_keeps_it(lowering: str) -> None:
    entry = zoo.BY_NAME["LatteTransformer3DModel"].of_one_block()
    policy, model = Policy(Attentions(("spatial", "temporal"), gated=True), Every(2)), entry.build()
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering):
        found = outputs(entry, model)
    assert equal(found, latte_by_videosys(entry, policy, gated=True))
    assert not equal(found, latte_by_videosys(entry, policy, gated=False))
    assert not equal(found, outputs(entry, model))


def outputs(entry: zoo.Entry, model: Any, timesteps: Sequence[float] = TIMESTEPS[:5]) -> list[Tensor]:
    return [zoo.call(entry, model, t, step)[0].clone() for step, t in enumerate(timesteps)]


class Products(TorchFunctionMode):
    """Puts what was kept in the place of products of what attentions yield, while a model runs in plain eager Python.

    Args:
        model: the model.
        gated: for the name of each attention, whether its product is kept.
        policy: when and how.
    """

    def __init__(self, model: nn.Module, gated: dict[str, bool], policy: Policy) -> None:
        super().__init__()
        self._parts: defaultdict[Any, Part] = defaultdict(lambda: Part(policy))
        self._calls, self._attended = Counter[nn.Module](), dict[int, tuple[nn.Module, Tensor]]()  # by the tensor's id
        for name, product in gated.items():
            model.get_submodule(name).register_forward_hook(self._mark if product else self._replace)

    def step(self, entry: zoo.Entry, model: nn.Module, n: int, t: float) -> Tensor:
        self._n, self._t = n, t
        self._calls.clear()
        with self:
            found = zoo.call(entry, model, t, n)[0].clone()
        self._attended.clear()
        return found

    def _kept(self, module: nn.Module, computed: tuple[Tensor, ...]) -> Sequence[Tensor]:
        self._calls[module] += 1
        return self._parts[module, self._calls[module]](self._n, self._t, (), lambda: computed)

    def _mark(self, module: nn.Module, _: Any, output: Any) -> None:
        self._attended.update({id(each): (module, each) for each in zoo.tensors(output)})

    def _replace(self, module: nn.Module, _: Any, output: Any) -> Any:
        found = self._kept(module, tuple(zoo.tensors(output)))
        return tuple(found) if isinstance(output, tuple) else found[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]
        marked = [self._attended[id(each)][0] for each in given if id(each) in self._attended]
        if marked and len(marked) < len(given) and func in (torch.mul, Tensor.mul, Tensor.__mul__):
            return self._kept(marked[0], (found,))[0]
        if marked and len(marked) == len(given):
            self._attended.update({id(each): (marked[0], each) for each in zoo.tensors(found)})
        return found


FEW = {"SD3Transformer2DModel", "WanTransformer3DModel"}
"""Two streams of an attention, each with a gate; gates and sums in another dtype, and some without a gate."""


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in zoo.BY_NAME])
def test_models_of_diffusers_keep_the_products(name: str) -> None:
    entry = zoo.BY_NAME[name].of_one_block() if name in FEW else zoo.BY_NAME[name]
    policy = Policy(Attentions(gated=True), Every(2))
    model, eager = entry.build(), entry.build()
    with pab_fx.enable(model, policy, inner="eager") as pab:
        timesteps = TIMESTEPS[:5] if _falls(entry) else TIMESTEPS[4::-1]
        found = outputs(entry, model, timesteps)
        assert pab.report().reused > 0
        regions = [region for region in pab.report().regions if not region.left_alone]
    if any(":" in region.name for region in regions):
        pytest.skip("an attention is no module, so no hook reaches it")
    gated = {region.name: str(region.note).startswith("what is kept is its product") for region in regions}
    assert name not in FEW or any(gated.values())
    products = Products(eager, gated, policy)
    assert equal(found, [products.step(entry, eager, n, t) for n, t in enumerate(timesteps)])


def _falls(entry: zoo.Entry) -> bool:
    """Whether what the model is given falls with the timestep; for some it rises."""
    low, high = (entry.timestep(t)[entry.timestep_name] for t in (100.0, 900.0))
    return bool((low.max() if isinstance(low, Tensor) else low) < (high.max() if isinstance(high, Tensor) else high))


# ------------------------------------------------------------------------------------- the door


def test_a_gated_policy_comes_back_from_a_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    pab_fx.save_policies(kept(), path)
    assert pab_fx.load_policies(path) == (kept(),)
    path.write_text(path.read_text().replace("true", '"yes"'))
    with pytest.raises(ValueError, match=r"policies\.json: Attentions: gated must be True or False, got 'yes'"):
        pab_fx.load_policies(path)
