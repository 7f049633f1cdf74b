"""What diffusers' own tests promise of every cache, `tests/models/testing_utils/cache.py`, holds through `enable` too.

A state that is on and off, a second cache refused, hooks that are gone, contexts that do not see each other, and a step
that differs from one without a cache.
"""

from __future__ import annotations

from typing import Any

import diffusers.hooks
import pytest
import torch
import zoo
from test_taylorseer import ATTENTIONS, tensors, timesteps_of

import pab_fx

pytestmark = pytest.mark.usefixtures("no_gradients")

FIELDS: dict[str, dict[str, Any]] = {
    "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2},
    "TaylorSeerCacheConfig": {
        "cache_interval": 2,
        "disable_cache_before_step": 1,
        "cache_identifiers": [ATTENTIONS],
    },
    "MagCacheConfig": {"num_inference_steps": 4, "retention_ratio": 0.0, "threshold": 100.0, "mag_ratios": [1.0] * 4},
    "FirstBlockCacheConfig": {"threshold": 1e6},
    "SeaCacheConfig": {"threshold": 1e6},
    "FasterCacheConfig": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 901),
        "is_guidance_distilled": True,
        "tensor_format": "BCHW",
    },
}
"""Of each config what makes the second or the third step reuse."""

CLOCKED = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")
STEPS = 4


def config_of(name: str) -> Any:
    """A config of diffusers; one that asks for a timestep is told one in its ranges."""
    if not hasattr(diffusers.hooks, name):
        pytest.skip(f"this diffusers has no {name}")
    clock = {"current_timestep_callback": lambda: 500} if name in CLOCKED else {}
    return getattr(diffusers.hooks, name)(**FIELDS[name], **clock)


def trajectory(entry: zoo.Entry, model: Any, context: str = "cond") -> list[list[torch.Tensor]]:
    found = []
    for step, t in enumerate(timesteps_of(entry)[:STEPS]):
        with pab_fx.cache_context(context):
            found.append(tensors(model(**entry.step(t, step))))
    return found


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> list[bool]:
    """For each step whether the outputs are the same bits."""
    return [all(map(torch.equal, a, b)) for a, b in zip(left, right, strict=True)]


MODELS = ("FluxTransformer2DModel", "WanTransformer3DModel")
OF_IMAGES_ONLY = ("SeaCacheConfig",)  # Flux is given a sequence, which is refused


@pytest.mark.parametrize(
    ("name", "model_name"), [(name, model) for name in FIELDS for model in MODELS[name in OF_IMAGES_ONLY :]]
)
def test_what_holds_for_the_hooks_holds_for_the_compiled_model(name: str, model_name: str) -> None:
    entry = zoo.BY_NAME[model_name]
    model, config = entry.build(), config_of(name)
    without = trajectory(entry, model)
    pab = pab_fx.enable(model, config, inner="eager")
    with pytest.raises(ValueError, match="enabled on this"):
        pab_fx.enable(model, config)
    if hasattr(model, "is_cache_enabled"):
        assert not model.is_cache_enabled  # a pipeline that looks at it is not to think of hooks
        with pytest.raises(ValueError, match="pab_fx"):
            model.enable_cache(config)
    assert not any(getattr(module, "_diffusers_hook", None) for module in model.modules())

    first = trajectory(entry, model)
    reused = [not equal for equal in same(first, without)]
    assert not reused[0]
    assert any(reused)
    assert all(bool(each.isfinite().all()) for step in first for each in step)
    assert all(same(trajectory(entry, model, "uncond"), first))  # of a context of its own, not what the other has kept
    pab.reset()
    assert all(same(trajectory(entry, model), first))
    assert pab.report().reused > 0

    pab.disable()
    assert all(same(trajectory(entry, model), without))
    assert not any(getattr(module, "_diffusers_hook", None) for module in model.modules())
    with pab_fx.enable(model, config, inner="eager"):
        assert all(same(trajectory(entry, model), first))
