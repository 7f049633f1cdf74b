"""With diffusers' TaylorSeerCacheConfig, the compiled model's outputs are those of its hooks, to the bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import pipelines
import pytest
import torch
import zoo
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pab_fx

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no TaylorSeer")
if not hasattr(hooks, "TaylorSeerCacheConfig"):
    pytest.skip("this diffusers has no TaylorSeer", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_gradients")

STEPS = 9
ATTENTIONS = r".*\.\w*att(n|ention)\w*"
"""Of every class; what the config says by default are those of a few."""


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def timesteps_of(entry: zoo.Entry) -> Sequence[float]:
    """Those at which the model's own timestep falls."""
    falling = tuple(900.0 - 100 * i for i in range(STEPS))
    first, last = (next(iter(tree_leaves(entry.timestep(t)))) for t in (falling[0], falling[-1]))
    return falling if torch.as_tensor(first).max() > torch.as_tensor(last).max() else falling[::-1]


def trajectory(entry: zoo.Entry, model: Any, contexts: Sequence[str] = ("cond",)) -> list[list[Tensor]]:
    """In each step the outputs of a call in each cache context, each of its own inputs."""
    found = []
    for step, t in enumerate(timesteps_of(entry)):
        for i, name in enumerate(contexts):
            with pab_fx.cache_context(name):
                found.append(tensors(model(**entry.step(t, step + 100 * i))))
    return found


class Hooked:
    """A copy of a model with the hooks, in the cache context that is entered for `pab_fx`."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model = copy.deepcopy(model)
        applied = {"MagCacheConfig": "apply_mag_cache", "FirstBlockCacheConfig": "apply_first_block_cache"}
        getattr(hooks, applied.get(type(config).__name__, "apply_taylorseer_cache"))(self.model, config)

    def __call__(self, **kwargs: Any) -> Any:
        context = hooks.hooks.CacheContext(pab_fx.run.contexts.current_cache_context.get())
        hooks.hooks._set_cache_context(self.model, context)
        return self.model(**kwargs)


def are_equal(found: Sequence[list[Tensor]], expected: Sequence[list[Tensor]]) -> bool:
    return all(all(map(torch.equal, a, b)) for a, b in zip(found, expected, strict=True))


def expected_of(entry: zoo.Entry, config: Any, contexts: Sequence[str] = ("cond",)) -> list[list[Tensor]]:
    """What the hooks yield, which is not what the model yields without them."""
    model = entry.build()
    found, plain = (trajectory(entry, each, contexts) for each in (Hooked(model, config), model))
    assert not are_equal(found, plain)
    return found


def check(
    entry: zoo.Entry, config: Any, expected: list[list[Tensor]], lowering: str, contexts: Any = ("cond",)
) -> None:
    model = entry.build()
    with pab_fx.enable(model, config, inner="eager", lowering=lowering) as pab:
        found = trajectory(entry, model, contexts)
        report = pab.report()
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for ours, theirs in zip(a, b, strict=True):
            assert torch.equal(ours, theirs), f"call {step}: {float((ours - theirs).abs().max()):.2g}\n{report}"
    assert report.reused > 0


def check_pipeline(entry: pipelines.PipelineEntry, config: Any) -> None:
    """Two generations: the second one starts afresh by itself. Branches of guidance name their contexts."""
    hooked = entry.build()
    hooked.transformer.enable_cache(config)
    plain, expected = pipelines.run(entry.build(), entry), pipelines.run(hooked, entry)
    assert not torch.equal(plain, expected)
    pipe = entry.build()
    with pab_fx.enable(pipe, config, inner="eager") as pab:
        for _ in range(2):
            assert torch.equal(pipelines.run(pipe, entry), expected)
        assert pab.report().reused > 0


BREAKS = {"MochiTransformer3DModel"}
"""Whose graph breaks inside of an attention without the flag."""

DEFAULT = ("FluxTransformer2DModel", "CogVideoXTransformer3DModel")


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in zoo.BY_NAME])
def test_a_model_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    entry = zoo.BY_NAME[name]
    config = hooks.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=2)
    config.cache_identifiers = [ATTENTIONS]
    expected = expected_of(entry, config)
    flags = {"capture_dynamic_output_shape_ops": True} if name in BREAKS else {}
    with torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext():
        check(entry, config, expected, lowering)


@pytest.mark.parametrize(
    ("fields", "lowering"),
    [
        ({"taylor_factors_dtype": torch.float32, "max_order": 1}, "specialize"),
        ({"disable_cache_after_step": 6, "max_order": 3}, "cond"),
        ({"use_lite_mode": True}, "specialize"),
        ({"use_lite_mode": True}, "cond"),
        ({"skip_predict_identifiers": [r"single_.*\.\d+"], "cache_identifiers": [r"proj_out"]}, "specialize"),
    ],
    ids=lambda each: each if isinstance(each, str) else next(iter(each)),
)
def test_every_field_does_what_it_does_for_the_hooks(fields: dict[str, Any], lowering: str) -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"].of_one_block()
    config = hooks.TaylorSeerCacheConfig(**{"cache_interval": 3, "disable_cache_before_step": 2, **fields})
    contexts = ("cond", "uncond")
    expected = expected_of(entry, config, contexts)
    check(entry, config, expected, lowering, contexts)


def test_it_takes_over_from_enable_cache_and_gives_back() -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"]
    model, config = entry.build(), hooks.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)
    expected = expected_of(entry, config)
    model.enable_cache(config)
    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        found = trajectory(entry, model)
        assert pab.report().reused > 0
    assert are_equal(found, expected)
    assert model._cache_config is config


@pytest.mark.parametrize("name", ["FluxPipeline-true_cfg", "CogVideoXPipeline"])
def test_a_pipeline_equals_the_hooks_bitwise(name: str) -> None:
    entry = pipelines.BY_NAME[name]
    config = hooks.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)
    config.cache_identifiers = [ATTENTIONS]
    check_pipeline(entry, config)


def test_modules_inside_of_each_other_are_refused() -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"]
    config = hooks.TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.0", r"transformer_blocks\.0\.attn"])
    model = entry.build()
    with pab_fx.enable(model, config, inner="eager"), pytest.raises(Exception, match="the config names both"):
        trajectory(entry, model)


@pytest.mark.parametrize(
    ("field", "value"), [("cache_interval", 0), ("max_order", -1), ("taylor_factors_dtype", torch.int8)]
)
def test_a_field_that_makes_no_sense_is_refused(field: str, value: Any) -> None:
    config = hooks.TaylorSeerCacheConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        pab_fx.PABBackend(config)
