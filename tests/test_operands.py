"""What a condition is given: as it lies in memory, whatever layout Inductor chose for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code

import pab_fx
from pab_fx import PABConfig
from pab_fx._torch import symbols_inside
from pab_fx._torch.inductor import hold_strides
from pab_fx.graph.dataflow import value
from pab_fx.passes.form import conditionals, operands_of

RELEASE = Version(torch.__version__).release
TIMESTEPS = (900, 700, 600, 500, 400)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value))


class BehindConvolution(nn.Module):
    """On an image [B, 4, H, W], whose patches lie with channels first as traced, and with channels last in Inductor."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width) for _ in range(2)])

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) * 2
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return x


def generate(model: nn.Module, inner: Any, sizes: tuple[int, ...], dynamic: bool) -> list[Tensor]:
    """Generations at these heights, by a model whose attentions reuse every second step."""
    torch.compiler.reset()
    outputs = []
    with pab_fx.enable(model, PABConfig(), inner=inner, lowering="cond", dynamic=dynamic) as pab, torch.no_grad():
        for size in sizes:
            for t in TIMESTEPS:
                image = torch.randn(2, 4, size, 8, generator=torch.Generator().manual_seed(t))
                outputs.append(model(image, torch.tensor(float(t))))
            pab.reset()
        assert pab.report().reused > 0
    return outputs


def without_pab(model: nn.Module, sizes: tuple[int, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(torch.randn(2, 4, size, 8, generator=torch.Generator().manual_seed(t)), torch.tensor(float(t)))
            for size in sizes
            for t in TIMESTEPS
        ]


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_operand_is_copied_into_the_layout_that_it_was_traced_with(dynamic: bool) -> None:
    if dynamic and RELEASE < (2, 13):
        pytest.skip("torch 2.9 compiles a graph with another fake mode than it was traced with; runs from 2.13 on")
    torch.manual_seed(0)
    model = BehindConvolution().eval().requires_grad_(False)
    sizes = (16, 24) if dynamic else (16,)
    expected = generate(model, "eager", sizes, dynamic)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, codes = run_and_get_code(generate, model, "inductor", sizes, dynamic)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # rounding, of float32
    changes = [float((a - b).abs().max()) for a, b in zip(found, without_pab(model, sizes), strict=True)]
    assert max(changes) > 1e-2
    if RELEASE[:2] == (2, 13):  # for others see `_torch.inductor.conditions_take_operands_as_they_lie`
        assert any("_decided" in code for code in codes)  # there are conditions
        assert not any("force_stride_order" in code for code in codes)


def test_a_branch_is_given_the_sizes_that_its_operands_shapes_are_computed_from() -> None:
    """Inductor's code of a branch knows no other symbols; with a whole dimension of an operand it needs none."""
    graphs: list[fx.GraphModule] = []

    def kept(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    model = BehindConvolution().eval().requires_grad_(False)
    generate(model, kept, (16,), dynamic=True)
    for cond in conditionals(graphs[0]):
        given = [value(operand) for operand in operands_of(cond)]
        assert sum(isinstance(each, torch.SymInt) for each in given) == 2  # height and width of the image
        assert not symbols_inside(given)
        branches = [graphs[0].get_submodule(str(node.target)) for node in cond.args[1:3]]  # type: ignore[union-attr]
        assert [len(branch.graph.find_nodes(op="placeholder")) for branch in branches] == [len(given)] * 2  # type: ignore[operator, union-attr]


def test_an_operand_with_gaps_is_handed_on_as_it_is_where_the_graph_runs_eagerly() -> None:
    part = torch.randn(2, 5, 3)[:, :4]
    assert hold_strides(part) is part
