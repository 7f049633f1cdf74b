"""With diffusers' FirstBlockCacheConfig, the compiled model's outputs are those of its hooks, to the bit."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pipelines
import pytest
import torch
import zoo
from test_magcache import in_default
from test_taylorseer import BREAKS, STEPS, Hooked, are_equal, check_pipeline, tensors, timesteps_of
from torch import Tensor
from torch.utils._pytree import tree_map

import pab_fx

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no FirstBlockCache")
if not hasattr(hooks, "FirstBlockCacheConfig"):
    pytest.skip("this diffusers has no FirstBlockCache", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_gradients")

CACHED = (
    "FluxTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel-token_replace",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
)
"""Models of the zoo that have two blocks or more, and on which the hooks run."""
REFUSED = (
    "ChromaTransformer2DModel",
    "AceStepTransformer1DModel",
    "EasyAnimateTransformer3DModel",
    "Flux2Transformer2DModel",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
)
"""Those with two or more on which the hooks do not run."""
PLACES = (0.0, 0.1, 0.15, 0.5, 0.5, 0.55, 0.9, 0.9, 1.0)
"""How far the inputs of each step are on their way from noise to another."""


def named_only(step: int, t: float, name: str) -> Any:
    """A cache context that says nothing but its name."""
    return pab_fx.cache_context(name)


def trajectory(
    entry: zoo.Entry, model: Any, contexts: Sequence[str] = ("cond",), context: Callable[..., Any] = named_only
) -> list[list[Tensor]]:
    """In each step the outputs of a call in each cache context, with inputs that change little in some steps."""
    found = []
    for step, (place, t) in enumerate(zip(PLACES, timesteps_of(entry), strict=True)):
        for i, name in enumerate(contexts):
            start, end = entry.step(t, 100 * i), entry.step(t, 1 + 100 * i)

            def mixed(a: Any, b: Any, place: float = place if i == 0 else place**2) -> Any:
                is_latent = isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1
                return torch.lerp(a, b, place) if is_latent else a

            with context(step, t, name):
                found.append(tensors(model(**tree_map(mixed, start, end))))
    return found


def threshold_of(entry: zoo.Entry) -> float:
    """One that about half of the steps keep to: the median of what the hooks measure when each step computes."""
    seen = []

    class Watched(hooks.first_block_cache.FBCHeadBlockHook):
        def _should_compute_remaining_blocks(self, residual: Tensor) -> bool:
            before = self.state_manager.get_state().head_block_residual
            if before is not None:
                seen.append(float((residual - before).abs().mean() / before.abs().mean()))
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.first_block_cache, "FBCHeadBlockHook", Watched)
        trajectory(entry, Hooked(entry.build(), hooks.FirstBlockCacheConfig(0.0)))
    return 1.01 * statistics.median(seen)


def found_of(entry: zoo.Entry, config: Any, **kwargs: Any) -> tuple[list[list[Tensor]], Any]:
    model = entry.build()
    flags = {"capture_dynamic_output_shape_ops": True} if entry.name in BREAKS else {}
    patched = torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext()
    contexts = kwargs.pop("contexts", ("cond",))
    with patched, pab_fx.enable(model, config, **{"inner": "eager", **kwargs}) as pab:
        return trajectory(entry, model, contexts), pab.report()


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", in_default(CACHED, (*CACHED[:3], "HunyuanImageTransformer2DModel")))
def test_a_model_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    entry = zoo.BY_NAME[name]
    config = hooks.FirstBlockCacheConfig(threshold_of(entry))
    expected, plain = trajectory(entry, Hooked(entry.build(), config)), trajectory(entry, entry.build())
    assert not are_equal(expected, plain)
    found, report = found_of(entry, config, lowering=lowering)
    assert are_equal(found, expected)
    assert 0 < report.reused < STEPS - 1


def test_contexts_decide_apart() -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"]
    config = hooks.FirstBlockCacheConfig(threshold_of(entry))
    contexts = ("cond", "uncond")
    expected = trajectory(entry, Hooked(entry.build(), config), contexts)
    found, report = found_of(entry, config, contexts=contexts)
    assert are_equal(found, expected)
    assert 0 < report.reused < 2 * (STEPS - 1)


@pytest.mark.parametrize("name", in_default(REFUSED, REFUSED[:1]))
def test_a_model_that_the_hooks_refuse_is_cached(name: str) -> None:
    entry = zoo.BY_NAME[name]
    with pytest.raises(Exception):  # noqa: B017, PT011 - each fails in its own way
        trajectory(entry, Hooked(entry.build(), hooks.FirstBlockCacheConfig(0.6)))
    found, report = found_of(entry, hooks.FirstBlockCacheConfig(0.6))
    assert report.reused > 0
    assert not are_equal(found, trajectory(entry, entry.build()))


def test_a_pipeline_equals_the_hooks_bitwise() -> None:
    check_pipeline(pipelines.BY_NAME["FluxPipeline-true_cfg"], hooks.FirstBlockCacheConfig(0.5))


def test_it_takes_over_from_enable_cache_and_gives_back() -> None:
    entry = zoo.BY_NAME["WanTransformer3DModel"]
    model, config = entry.build(), hooks.FirstBlockCacheConfig(threshold_of(entry))
    expected = trajectory(entry, Hooked(model, config))
    model.enable_cache(config)
    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        assert are_equal(trajectory(entry, model), expected)
        assert pab.report().reused > 0
    assert model._cache_config is config


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED[:3])
def test_a_model_of_quantised_weights_equals_the_hooks_bitwise(name: str) -> None:
    """By torchao, to int8, weights only."""
    quantization = pytest.importorskip("torchao.quantization")
    entry = zoo.BY_NAME[name]

    def build() -> Any:
        model = entry.build()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    config = hooks.FirstBlockCacheConfig(threshold_of(entry))
    expected = trajectory(entry, Hooked(build(), config))
    model = build()
    assert not are_equal(expected, trajectory(entry, Hooked(entry.build(), config)))
    assert not are_equal(expected, trajectory(entry, model))
    with pab_fx.enable(model, config, inner="eager") as pab:
        assert are_equal(trajectory(entry, model), expected)
        assert 0 < pab.report().reused < STEPS - 1


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, "much"])
def test_a_bad_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold must be a number >= 0"):
        pab_fx.PABBackend(hooks.FirstBlockCacheConfig(threshold))
