"""Ranges of blocks that span several graphs, since the graph breaks in between, are as those of one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from reference import Part, distance, equal, skip_blocks
from test_blocks import TIMESTEPS, Denoiser, DiT, JoinedMMDiT, MMDiT, PostNormDiT, build, inputs, trajectory
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pab_fx
from pab_fx import Blocks, Change, Every, Hermite, How, Last, ModulatedInput, Policy, Residual, Taylor

pytestmark = pytest.mark.usefixtures("no_gradients")

lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


# ------------------------------------------------------------------------------------------------- models


class BrokenDiT(DiT):
    """The graph breaks between blocks, in a loop, so that Dynamo captures the blocks one by one."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, embedding)
        return (x,)


class StraightDiT(DiT):
    """It breaks outside of a loop: the first graph has what leads up to the blocks too, the last one what follows."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        embedding = self.time(timestep[:, None] / 1000).sin()
        x = self.blocks[0](self.proj_in(hidden_states), embedding)
        torch._dynamo.graph_break()
        x = self.blocks[1](x, embedding)
        torch._dynamo.graph_break()
        return self.proj_out(self.blocks[2](x, embedding))


class BrokenMMDiT(MMDiT):
    """Of two streams."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        image, text = streams
        for block in self.blocks:
            torch._dynamo.graph_break()
            image, text = block(image, text, embedding)
        return image, text


class BrokenPostNormDiT(PostNormDiT, BrokenDiT):
    """Of blocks that no sum leads through."""


class SummingDiT(DiT):
    """Something is added to the stream between the graphs."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, embedding) + embedding.unsqueeze(1)
        return (x,)


class UpdatingDiT(DiT):
    """It is added in place: what enters a block is the very tensor that left the one before, with other values."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, embedding)
            x += embedding.unsqueeze(1)
        return (x,)


class JoiningDiT(JoinedMMDiT):
    """Two streams are joined between the graphs."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        image, text = streams
        for block in self.blocks:
            torch._dynamo.graph_break()
            image, text = block(image, text, embedding)
        joined = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            torch._dynamo.graph_break()
            joined = block(joined, embedding)
        return (joined,)


PAIRS = ((BrokenDiT, DiT), (StraightDiT, DiT), (BrokenMMDiT, MMDiT), (BrokenPostNormDiT, PostNormDiT))


def check_equal(
    broken: type[Denoiser], whole: type[Denoiser], policy: Any, contexts: tuple[Any, ...] = (None,), **options: Any
) -> None:
    """In two generations, per cache context, what one graph of the whole model yields under the policy, to the bit."""
    found: list[list[Tensor]] = []
    reused = []
    for kind in (broken, whole):
        torch.compiler.reset()
        model, outputs = build(kind), []
        with pab_fx.enable(model, policy, **{"inner": "eager", "timesteps": TIMESTEPS, **options}) as pab:
            for step, t in enumerate(TIMESTEPS * 2):
                for i, name in enumerate(contexts):
                    with pab_fx.cache_context(name):
                        outputs.append(model(*inputs(step % len(TIMESTEPS) + 3 * i, t)).clone())
            reused.append(pab.report().reused)
            assert (len(pab.backend.graphs) > 1) is (kind is broken) or kind is whole
            assert all(region.left_alone is None for region in pab.report().regions)
        found.append(outputs)
    plain = build(whole)
    computed = [
        plain(*inputs(step % len(TIMESTEPS) + 3 * i, t))
        for step, t in enumerate(TIMESTEPS * 2)
        for i in range(len(contexts))
    ]
    assert equal(*found)
    assert not equal(found[0], computed)
    assert reused[0] == reused[1] > 0


# ------------------------------------------------------------------------------------------------- ranges


@lowerings
@pytest.mark.parametrize("where", [Blocks(), Blocks(1), Blocks(0, -1), Blocks(1, -1), Blocks(-1)], ids=str)
def test_a_range_is_counted_over_all_blocks(where: Blocks, lowering: str) -> None:
    check_equal(BrokenDiT, DiT, Policy(where, Every(3), Residual()), lowering=lowering)


@lowerings
@pytest.mark.parametrize(("broken", "whole"), PAIRS, ids=lambda kind: kind.__name__)
def test_one_residual_is_kept_for_the_range(broken: type[Denoiser], whole: type[Denoiser], lowering: str) -> None:
    check_equal(broken, whole, Policy(Blocks(), Every(3, warmup=2), Residual()), lowering=lowering)


@pytest.mark.parametrize("how", [Last(), Taylor(2, of=Residual()), Hermite(1, of=Residual())], ids=repr)
def test_every_how_reads_as_in_one_graph(how: How) -> None:
    check_equal(BrokenDiT, DiT, Policy(Blocks(1), Every(3, warmup=2), how))


@lowerings
def test_contexts_have_residuals_of_their_own(lowering: str) -> None:
    check_equal(BrokenMMDiT, MMDiT, Policy(Blocks(), Every(2), Residual()), ("cond", "uncond"), lowering=lowering)


@pytest.mark.parametrize("kind", [BrokenDiT, StraightDiT], ids=lambda kind: kind.__name__)
def test_two_ranges_go_by_rules_of_their_own(kind: type[Denoiser]) -> None:
    policies = [Policy(Blocks(0, 1), Every(2), Residual()), Policy(Blocks(1), Every(3), Residual())]
    check_equal(kind, DiT, policies)


def test_a_range_takes_one_tensor_for_each_stream() -> None:
    model = build(BrokenMMDiT)
    with pab_fx.enable(model, Policy(Blocks(), Every(3), Residual()), inner="eager") as pab:
        trajectory(model)
        (role,) = pab.report().roles
    assert role.modules == 1
    assert role.full_bytes == 2 * (6 + 3) * 8 * 4  # batch, tokens of image and text, width, bytes


@pytest.mark.parametrize("inner", ["replaying"], indirect=True)
def test_sizes_may_change_and_calls_may_fail(inner: Any) -> None:
    """In the middle of a generation, and where the buffers of graphs are written over."""
    policy, found = Policy(Blocks(), Every(3), Residual()), []
    for kind in (BrokenDiT, DiT):
        torch.compiler.reset()
        model = build(kind)
        with pab_fx.enable(model, policy, inner=inner) as pab:
            outputs = trajectory(model, TIMESTEPS[:5])
            outputs += trajectory(model, TIMESTEPS[5:], tokens=8)
            with pytest.raises(Exception, match=r"shape|dim"):
                model(torch.ones(1, 5, 9), *inputs(0, 40.0)[1:])
            outputs += trajectory(model)
            assert pab.report().reused > 0
        found.append(outputs)
    assert equal(*found)


def test_inductor_compiles_ranges() -> None:
    model, policy = build(BrokenDiT), Policy(Blocks(1), Every(3), Residual())
    whole = build(DiT)
    with pab_fx.enable(whole, policy, inner="eager"):
        expected = trajectory(whole)
    with pab_fx.enable(model, policy) as pab:
        assert distance(trajectory(model), expected) < 1e-5  # Inductor fuses, so it rounds otherwise
        assert pab.report().reused > 0


# ------------------------------------------------------------------------------------------------- signals


@lowerings
@pytest.mark.parametrize("kind", [BrokenDiT, StraightDiT], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"accumulate": True, "max_skips": 2, "warmup": 2}], ids=str)
def test_a_decision_by_a_signal_holds_for_all_graphs(
    kind: type[Denoiser], options: dict[str, Any], lowering: str
) -> None:
    policy = Policy(Blocks(1), Change(Blocks(0, 1), 0.1, **options), Residual())
    check_equal(kind, DiT, policy, ("cond", "uncond"), lowering=lowering)


def test_a_signal_may_span_graphs_itself_and_branches_may_share_it() -> None:
    policy = Policy(Blocks(2), Change(Blocks(0, 2), 0.1, share_decision=True), Residual())
    check_equal(BrokenDiT, DiT, policy, ("cond", "uncond"))


# ------------------------------------------------------------------------------------------------- left alone


across = pytest.mark.parametrize("kind", [BrokenDiT, StraightDiT], ids=lambda kind: kind.__name__)
THIRD, SECOND = (Policy(Blocks(), Every(n), Residual()) for n in (3, 2))


def in_one_graph(policy: Policy) -> list[Tensor]:
    with pab_fx.enable(model := build(DiT), policy, inner="eager") as pab:
        found = trajectory(model)
        assert pab.report().reused > 0
    return found


@lowerings
@across
def test_warmup_compiles_what_a_range_across_graphs_asks_for(kind: type[Denoiser], lowering: str) -> None:
    with pab_fx.enable(model := build(kind), THIRD, inner="eager", lowering=lowering) as pab:
        model(*inputs(0, 1000.0))
        pab.warmup(TIMESTEPS)
        pab.reset()
        compiled = pab.report().graphs
        assert equal(trajectory(model), in_one_graph(THIRD))
        assert pab.report().graphs == compiled


@across
def test_another_rule_for_a_range_across_graphs_needs_no_capture(kind: type[Denoiser]) -> None:
    with pab_fx.enable(model := build(kind), THIRD, inner="eager") as pab:
        assert equal(trajectory(model), in_one_graph(THIRD))
        captured = len(pab.report().captured)
        pab.set_config(SECOND)
        assert equal(trajectory(model), in_one_graph(SECOND))
        assert len(pab.report().captured) == captured


@across
def test_a_range_across_graphs_may_be_compiled_by_block(kind: type[Denoiser]) -> None:
    with pab_fx.enable(model := build(kind), THIRD, inner="eager", regional=True) as pab:
        assert equal(trajectory(model), in_one_graph(THIRD))
        assert pab.report().reused > 0


@pytest.mark.parametrize("kind", [SummingDiT, UpdatingDiT, JoiningDiT], ids=lambda kind: kind.__name__)
def test_blocks_between_which_something_is_computed_are_left_alone_and_it_is_said(kind: type[Denoiser]) -> None:
    model = build(kind)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Blocks(), Every(2), Residual()), inner="eager") as pab:
        with pytest.warns(UserWarning, match="something is computed between the graphs"):
            assert equal(trajectory(model), plain)
        assert {"is not the tensor that left the one before" in str(r.left_alone) for r in pab.report().regions} == {
            True
        }


def test_a_signal_that_is_not_followed_from_graph_to_graph_is_refused_and_it_is_said() -> None:
    model = build(BrokenDiT)
    plain = trajectory(model)
    policy = Policy(Blocks(), Change(ModulatedInput(), 10.0), Residual())
    with pab_fx.enable(model, policy, inner="eager") as pab:
        assert equal(trajectory(model), plain)
        (region,) = pab.report().regions
    assert "the modulated input, which decides, is not followed" in str(region.left_alone)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("HiDreamImageTransformer2DModel", "double_stream_blocks.0"),
        ("NucleusMoEImageTransformer2DModel", "transformer_blocks.1"),  # the one before does not
    ],
)
def test_a_range_of_which_a_block_breaks_inside_is_left_alone_and_it_is_said(name: str, block: str) -> None:
    entry = zoo.BY_NAME[name]
    model = entry.build()
    with pab_fx.enable(model, Policy(Blocks(), Every(2), Residual()), inner="eager") as pab:
        for step in range(3):
            model(**entry.step(600.0 - step, step))
        report = pab.report()
    reasons = [str(region.left_alone) for region in report.regions]
    assert any(f"the graph breaks inside of the block {block}, so that no graph holds all of it" in r for r in reasons)
    assert None not in [region.left_alone for region in report.regions]
    assert report.reused == 0


# ------------------------------------------------------------------------------------------------- of diffusers

BROKEN = (
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
)


@lowerings
@pytest.mark.parametrize("name", BROKEN)
def test_a_model_of_diffusers_does_what_the_policy_says(name: str, lowering: str) -> None:
    entry, policy = zoo.BY_NAME[name], Policy(Blocks(), Every(3), Residual())
    model, reference = entry.build(), entry.build()
    part, now = Part(policy), {}
    skip_blocks(reference, part, lambda: (now["n"], now["t"]))
    expected, plain, found = [], [], []
    steps = [(n, 900.0 - 100 * n) for n in range(7)]
    for n, t in steps:
        plain += _tensors(model(**entry.step(t, n)))
        now.update(n=n, t=t)
        expected += _tensors(reference(**entry.step(t, n)))
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering) as pab:
        for n, t in steps:
            found += _tensors(model(**entry.step(t, n)))
        assert pab.report().reused == part.reused > 0
    assert equal(found, expected)
    assert not equal(found, plain)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
