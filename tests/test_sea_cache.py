"""With diffusers' SeaCacheConfig, the compiled model's outputs are those of its hooks, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import test_first_block
import torch
import zoo
from test_taylorseer import STEPS, are_equal, tensors, timesteps_of
from torch import Tensor

import pab_fx
from pab_fx.diffusers.sea_cache import Filtered

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no SeaCache")
if not hasattr(hooks, "SeaCacheConfig"):
    pytest.skip("this diffusers has no SeaCache", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_gradients")

WAN = "WanTransformer3DModel"


def trajectory(entry: zoo.Entry, model: Any, contexts: Sequence[str] = ("cond",)) -> list[list[Tensor]]:
    """As for the first block, in contexts that say where the loop is."""

    def context(step: int, t: float, name: str) -> Any:
        return model.cache_context(name, step_index=step, sigma=t / 1000, num_inference_steps=STEPS)

    return test_first_block.trajectory(entry, model, contexts, context)


def hooked(entry: zoo.Entry, config: Any) -> Any:
    model = entry.build()
    hooks.apply_sea_cache(model, config)
    return model


def measured(entry: zoo.Entry, contexts: Sequence[str]) -> list[float]:
    """What the hooks measure from step to step where each step computes."""
    seen: list[float] = []

    class Watched(hooks.sea_cache.SeaCacheSharedState):
        def resolve_gate(self, state: Any, metadata: Any, indicator: Any, config: Any) -> bool:
            before = state.previous_indicator
            found = super().resolve_gate(state, metadata, indicator, config)
            if before is not None:
                seen.append(float((indicator[0] - before[0]).abs().mean() / before[0].abs().mean()))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.sea_cache, "SeaCacheSharedState", Watched)
        trajectory(entry, hooked(entry, hooks.SeaCacheConfig(0.0)), contexts)
    return seen


FIELDS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "order 0": {"residual_order": 0, "max_consecutive_cached": 0},
    "ends": {"retention_steps": 3, "cache_end_steps": 2, "max_consecutive_cached": 1, "power_exp": 2.0},
}


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("contexts", [("cond",), ("cond", "uncond")], ids=["one context", "two contexts"])
def test_a_model_equals_the_hooks_bitwise(contexts: Sequence[str], fields: dict[str, Any], lowering: str) -> None:
    entry = zoo.BY_NAME[WAN]
    config = hooks.SeaCacheConfig(1.1 * sorted(measured(entry, contexts))[len(contexts) * STEPS // 2], **fields)
    expected, plain = trajectory(entry, hooked(entry, config), contexts), trajectory(entry, entry.build(), contexts)
    assert not are_equal(expected, plain)
    model = entry.build()
    with pab_fx.enable(model, config, inner="eager", lowering=lowering) as pab:
        found = trajectory(entry, model, contexts)
        report = pab.report()
    assert are_equal(found, expected)
    assert 0 < report.reused < len(contexts) * (STEPS - 2)


def test_the_filter_is_that_of_the_hooks_to_rounding() -> None:
    """float32: a matrix along each axis, and a transform and back, differ by their rounding."""
    sample = torch.randn(2, 4, 5, 8, 6, generator=torch.Generator().manual_seed(0))
    for sigma in (0.0, 0.02, 0.5, 1.0):
        found = Filtered(3.0)(sample, torch.tensor(sigma))
        for each, one in zip(found, sample, strict=True):
            expected = hooks.sea_cache._apply_sea_filter(one.movedim(0, -1), sigma, 3.0).movedim(-1, 0)
            torch.testing.assert_close(each, expected, atol=2e-5, rtol=2e-5)


def test_it_takes_over_from_enable_cache_and_gives_back() -> None:
    entry = zoo.BY_NAME[WAN]
    model, config = entry.build(), hooks.SeaCacheConfig(1.0)
    model.enable_cache(config)
    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        trajectory(entry, model)
        assert pab.report().reused > 0
    assert model._cache_config is config


def test_a_loop_that_tells_another_cache_of_other_noise_levels_runs() -> None:
    """Of a scheduler whose levels go beyond 1, say: no signal here is made of them."""
    entry = zoo.BY_NAME[WAN]
    model, expected = entry.build(), tensors(entry.build()(**entry.step(900.0, 0)))
    pab_fx.enable(model, pab_fx.Policy(pab_fx.Blocks(), pab_fx.Every(2)), inner="eager")
    with model.cache_context("cond", sigma=14.0):
        found = tensors(model(**entry.step(900.0, 0)))
    assert are_equal([found], [expected])


def test_a_model_that_takes_its_sample_in_a_list_decides_as_with_the_hooks() -> None:
    """Cosmos 3. Outputs differ in steps that reuse: there the hooks keep what the norm behind the blocks leaves."""
    entry = zoo.BY_NAME["Cosmos3OmniTransformer"]
    config = hooks.SeaCacheConfig(5.0)
    expected, plain = trajectory(entry, hooked(entry, config)), trajectory(entry, entry.build())
    model = entry.build()
    with pab_fx.enable(model, config, inner="eager") as pab:
        found = trajectory(entry, model)
        assert pab.report().reused > 0
    reuses = [not are_equal([own], [other]) for own, other in zip(expected, plain, strict=True)]
    assert [not are_equal([own], [other]) for own, other in zip(found, plain, strict=True)] == reuses
    assert any(reuses)


def test_a_model_on_which_the_hooks_find_no_sample_is_cached() -> None:
    entry = zoo.BY_NAME["PixArtTransformer2DModel"]
    model, plain = entry.build(), entry.build()
    timesteps = timesteps_of(entry)
    with pab_fx.enable(model, hooks.SeaCacheConfig(5.0), inner="eager", timesteps=timesteps) as pab:
        found = [tensors(model(**entry.step(t, 0))) for t in timesteps]
        assert pab.report().reused > 0
    assert not are_equal(found, [tensors(plain(**entry.step(t, 0))) for t in timesteps])


def test_a_sequence_has_no_frequencies_in_space_and_it_is_said() -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"]
    model = entry.build()
    pab_fx.enable(model, hooks.SeaCacheConfig(), inner="eager")
    with pytest.raises(Exception, match=r"SeaCache filters samples \[B, C, H, W\]"):
        model(**entry.step(900.0, 0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"raw_vision_callback": lambda *args: None}, "raw_vision_callback is a function of Python objects"),
        ({"retention_steps": 1.5}, "retention_steps must be an integer"),
        ({"cache_end_steps": 1.5}, "cache_end_steps must be an integer"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pab_fx.enable(zoo.BY_NAME[WAN].build(), diffusers.hooks.SeaCacheConfig(**fields))
