"""A rule with a signal decides as cache-dit's DBCache, step by step, and the outputs are the same to rounding.

Thresholds come from the middle of what DBCache has measured, so that they decide. All models have four blocks or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from test_taylorseer import BREAKS, tensors, timesteps_of
from torch import Tensor
from torch.utils._pytree import tree_map

import pab_fx
from pab_fx import Blocks, Change, Policy, Residual

pytestmark = pytest.mark.usefixtures("no_gradients")

PLACES = (0.0, 0.04, 0.07, 0.3, 0.32, 0.34, 0.7, 0.73, 0.75)
"""How far the inputs of each step are on their way from one noise to another."""
CONTEXTS = ("cond", "uncond")
TWO_LISTS = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel")
"""Models with double blocks and single ones, of each of which they have two here; the others have four."""
MODELS = (
    *TWO_LISTS,
    "AllegroTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "EasyAnimateTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
)


@dataclass(frozen=True)
class Settings:
    """Of DBCache, by its own names; and whether its branches of guidance go by the change of the first."""

    first: int = 1
    last: int = 0
    warmup: int = 1
    in_a_row: int = -1
    share: bool = False

    def policy(self, threshold: float) -> Policy:
        """The policy that says the same."""
        skips = None if self.in_a_row < 0 else self.in_a_row
        of, between = Blocks(0, self.first), Blocks(self.first, -self.last or None)
        rule = Change(of, threshold, warmup=self.warmup, max_skips=skips, share_decision=self.share)
        return Policy(between, rule, Residual())


@dataclass
class Run:
    """What a model has yielded in each call, in which steps it reused in each context, and the changes measured."""

    outputs: list[list[Tensor]]
    reused: list[list[int]]
    changes: list[list[float]]


def entry_of(name: str) -> zoo.Entry:
    return zoo.BY_NAME[name].of_blocks(2 if name in TWO_LISTS else 4)


def step(entry: zoo.Entry, number: int, branch: int) -> Any:
    """The inputs of a step; the branches of guidance are on their way at a pace of their own."""
    first, *_, last = timesteps_of(entry)
    t, place = first + 0.3 * (last - first) * PLACES[number], PLACES[number] ** (1 + branch)
    start, end = (entry.step(t, seed + 100 * branch) for seed in (0, 1))

    def mixed(a: Any, b: Any) -> Any:
        is_latent = isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1
        return torch.lerp(a, b, place) if is_latent else a

    return tree_map(mixed, start, end)


def by_dbcache(entry: zoo.Entry, settings: Settings, threshold: float, contexts: Sequence[str]) -> Run:
    """A generation with cache-dit."""
    cache_dit = pytest.importorskip("cache_dit")
    model: Any = entry.build()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=settings.first,
        Bn_compute_blocks=settings.last,
        residual_diff_threshold=threshold,
        max_warmup_steps=settings.warmup,
        max_continuous_cached_steps=settings.in_a_row,
        enable_separate_cfg=len(contexts) > 1,
        cfg_diff_compute_separate=not settings.share,
    )
    cache_dit.enable_cache(adapted(model), cache_config=config)
    steps = range(len(PLACES))
    outputs = [tensors(model(**step(entry, n, branch))) for n in steps for branch in range(len(contexts))]
    state = model._context_manager.get_context(*model._context_names)
    changes = [list(state.residual_diffs.values()), list(state.cfg_residual_diffs.values())]
    return Run(outputs, [state.cached_steps, state.cfg_cached_steps][: len(contexts)], changes)


def adapted(model: Any) -> Any:
    """What cache-dit is given: a model that it knows; of HunyuanVideo one list of all blocks, as it has it for Flux.

    Its own adapter decides for double and for single blocks apart, with a signal in the middle of the model.
    """
    if type(model).__name__ != "HunyuanVideoTransformer3DModel":
        return model
    import cache_dit

    return cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.transformer_blocks + model.single_transformer_blocks,
        blocks_name="transformer_blocks",
        dummy_blocks_names=["single_transformer_blocks"],
        forward_pattern=cache_dit.ForwardPattern.Pattern_0,
        check_num_outputs=False,  # a type hint in diffusers is wrong
    )


def by_policy(entry: zoo.Entry, policy: Policy, contexts: Sequence[str], **options: Any) -> Run:
    """The same with a policy. The model is one graph: it breaks at each decision in DBCache (cache-dit issue 76)."""
    model, outputs, reused = entry.build(), [], [[] for _ in contexts]
    flags = {"capture_dynamic_output_shape_ops": entry.name in BREAKS}
    with (
        torch._dynamo.config.patch(flags),
        pab_fx.enable(model, policy, inner="eager", fullgraph=True, **options) as pab,
    ):
        for n in range(len(PLACES)):
            for branch, name in enumerate(contexts):
                before = pab.backend.runtime.counts["blocks", True]
                with pab_fx.cache_context(name):
                    outputs.append(tensors(model(**step(entry, n, branch))))
                if pab.backend.runtime.counts["blocks", True] > before:
                    reused[branch].append(n)
    return Run(outputs, reused, [])


@cache
def threshold_of(name: str, settings: Settings, contexts: Sequence[str]) -> float:
    """In the middle of the changes that are measured where nearly no step reuses."""
    measured = by_dbcache(entry_of(name), settings, 1e-9, contexts).changes
    changes = sorted(measured[0] if settings.share else measured[0] + measured[1])
    found = (changes[len(changes) // 2 - 1] + changes[len(changes) // 2]) / 2
    assert found < 1, "DBCache takes a threshold from 1 on for none"
    return found


def check(name: str, settings: Settings, contexts: Sequence[str] = CONTEXTS[:1], **options: Any) -> None:
    """The same steps reuse, not all that may, and the outputs are the same to rounding."""
    entry, threshold = entry_of(name), threshold_of(name, settings, contexts)
    expected = by_dbcache(entry, settings, threshold, contexts)
    measured = expected.changes[: 1 if settings.share else len(contexts)]
    assert all(min(each) < threshold < max(each) for each in measured), "the threshold does not decide"
    found = by_policy(entry, settings.policy(threshold), contexts, **options)
    assert found.reused == expected.reused
    assert all(found.reused)
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    model, branches = entry.build(), range(len(contexts))
    for branch, steps in zip(branches, found.reused, strict=True):
        plain = tensors(model(**step(entry, steps[0], branch)))
        reused = found.outputs[len(contexts) * steps[0] + branch]
        assert not torch.allclose(reused[0], plain[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "lowering"),
    [
        (Settings(1, 0), "specialize"),
        pytest.param(Settings(1, 1, warmup=3), "specialize", marks=pytest.mark.slow),
        pytest.param(Settings(2, 0, in_a_row=1), "cond", marks=pytest.mark.slow),
        pytest.param(Settings(2, 1, warmup=2, in_a_row=2), "specialize", marks=pytest.mark.slow),
    ],
    ids=lambda each: each if isinstance(each, str) else f"F{each.first}B{each.last}",
)
@pytest.mark.parametrize(
    "name", [name if name == MODELS[0] else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_threshold_decides_as_in_dbcache(name: str, settings: Settings, lowering: str) -> None:
    check(name, settings, lowering=lowering)


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "QwenImageTransformer2DModel", "CogView4Transformer2DModel"])
def test_branches_of_guidance_decide_as_in_dbcache(name: str, share: bool) -> None:
    """`enable_separate_cfg`: each branch by its own change, or both by that of the first one."""
    for settings in (Settings(1, 0, share=share), Settings(2, 1, warmup=2, in_a_row=2, share=share)):
        check(name, settings, CONTEXTS)
