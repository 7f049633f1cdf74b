"""With diffusers' MagCacheConfig, the compiled model's outputs are those of its hooks, to the bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
import zoo
from test_taylorseer import STEPS, Hooked, are_equal, check_pipeline, expected_of, tensors, trajectory
from torch import Tensor

import pab_fx

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no MagCache")
if not hasattr(hooks, "MagCacheConfig"):
    pytest.skip("this diffusers has no MagCache", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_gradients")

RATIOS = [1.0, 1.02, 1.01, 0.99, 1.0, 0.98, 0.97, 1.01, 0.9]
CONSTANT = [1.0] * STEPS
"""With these, `max_skip_steps` decides. On a model of one block the hooks count only the calls that compute."""


def config_of(**fields: Any) -> Any:
    given = {"threshold": 0.06, "max_skip_steps": 2, "num_inference_steps": STEPS, "mag_ratios": RATIOS, **fields}
    return hooks.MagCacheConfig(**given)


RUNS = (
    "CogVideoXTransformer3DModel",
    "CogVideoXTransformer3DModel-rotary",
    "CogView4Transformer2DModel",
    "DiTTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel-token_replace",
    "Kandinsky5Transformer3DModel",
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "QwenImageControlNetModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "WanTransformer3DModel",
    "WanTransformer3DModel-i2v",
    "WanTransformer3DModel-timestep_per_token",
    "WanVACETransformer3DModel",
)
"""Of those in the zoo, the ones on which the hooks run and change anything, but for those below."""

LOST = "MotifVideoTransformer3DModel"
"""Whose hooks add what they keep to a stream that the output is not made of."""

REFUSED = ("LatteTransformer3DModel", "ZImageTransformer2DModel", "ChromaTransformer2DModel")
"""On which the hooks fail: streams of another shape, of another name, a class that is not registered."""

FEW = (
    "Flux2Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "QwenImageControlNetModel",
    "WanVACETransformer3DModel",
)
"""Streams that are joined, a graph for each block, several outputs, sums between the blocks."""


def in_default(names: Sequence[str], few: Sequence[str]) -> list[Any]:
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def found_of(
    entry: zoo.Entry, config: Any, lowering: str = "specialize", contexts: Sequence[str] = ("cond",)
) -> list[list[Tensor]]:
    model = entry.build()
    # the graph breaks inside of an attention without the flag
    flags = {"capture_dynamic_output_shape_ops": True} if "Mochi" in entry.name else {}
    patched = torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext()
    with patched, pab_fx.enable(model, config, inner="eager", lowering=lowering) as pab:
        found = trajectory(entry, model, contexts)
        assert pab.report().reused > 0
    return found


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", in_default(RUNS, FEW))
def test_a_model_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    entry, config = zoo.BY_NAME[name], config_of(mag_ratios=CONSTANT)
    assert are_equal(found_of(entry, config, lowering), expected_of(entry, config))


@pytest.mark.slow
def test_a_stream_that_the_hooks_lose_is_followed() -> None:
    """Theirs yields in a reusing step what the model would without blocks; ours is nearer to the model."""
    entry = zoo.BY_NAME[LOST]
    plain, ours, theirs = (
        trajectory(entry, entry.build()),
        found_of(entry, config_of()),
        expected_of(entry, config_of()),
    )
    near, far = (max(float((a - b).abs().max()) for (a,), (b,) in zip(x, plain, strict=True)) for x in (ours, theirs))
    assert near < far / 4


@pytest.mark.parametrize("name", in_default(REFUSED, REFUSED[:2]))
def test_a_model_that_the_hooks_refuse_is_cached(name: str) -> None:
    entry = zoo.BY_NAME[name]
    with pytest.raises(Exception):  # noqa: B017, PT011 - each fails in its own way
        trajectory(entry, Hooked(entry.build(), config_of()))
    assert not are_equal(found_of(entry, config_of()), trajectory(entry, entry.build()))


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 0.02},
        {"max_skip_steps": 1, "retention_ratio": 0.5},
        {"retention_ratio": 0.0, "num_inference_steps": 5, "mag_ratios": RATIOS},
        {"mag_ratios": torch.tensor(RATIOS, dtype=torch.float64)},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_field_does_what_it_does_for_the_hooks(fields: dict[str, Any]) -> None:
    """Ratios of another length are interpolated, and calls beyond the config's number of steps begin anew."""
    entry, contexts = zoo.BY_NAME["FluxTransformer2DModel"].of_one_block(), ("cond", "uncond")
    expected = expected_of(entry, config_of(**fields), contexts)
    assert are_equal(found_of(entry, config_of(**fields), "specialize", contexts), expected)


def test_it_takes_over_from_enable_cache_and_gives_back() -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"].of_one_block()
    model, config = entry.build(), config_of()
    expected = expected_of(entry, config)
    model.enable_cache(config)
    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        assert are_equal(trajectory(entry, model), expected)
        assert pab.report().reused > 0
    assert model._cache_config is config


@pytest.mark.parametrize("name", ["FluxPipeline-true_cfg", "CogVideoXPipeline"])
def test_a_pipeline_equals_the_hooks_bitwise(name: str) -> None:
    entry = pipelines.BY_NAME[name]
    config = config_of(num_inference_steps=entry.steps, threshold=1.0)
    check_pipeline(entry, config)


def test_calibrate_measures_what_the_hooks_measure(capsys: Any, tmp_path: Path) -> None:
    entry = zoo.BY_NAME["FluxTransformer2DModel"].of_one_block()
    model = entry.build()
    trajectory(entry, Hooked(model, hooks.MagCacheConfig(num_inference_steps=STEPS, calibrate=True)))
    printed = json.loads(capsys.readouterr().out.split("\n")[2])
    path = tmp_path / "ratios.json"
    ratios = pab_fx.magnitude_ratios(model, lambda: trajectory(entry, model), STEPS, path)
    assert len(ratios) == STEPS
    assert ratios == pytest.approx(printed, rel=1e-5)
    assert json.loads(path.read_text()) == list(ratios)
    with pab_fx.enable(model, hooks.MagCacheConfig(num_inference_steps=STEPS, calibrate=True), inner="eager") as pab:
        assert are_equal([tensors(model(**entry.step(600.0, 0)))], [tensors(entry.build()(**entry.step(600.0, 0)))])
        assert "to measure the ratios" in str(pab.report())


def test_a_pipeline_is_measured_before_its_end() -> None:
    entry = pipelines.BY_NAME["CogVideoXPipeline"]
    pipe = entry.build()
    ratios = pab_fx.magnitude_ratios(pipe, lambda: pipelines.run(pipe, entry), entry.steps)
    assert len(ratios) == entry.steps
    assert ratios[0] == 1.0
    with pytest.raises(ValueError, match="another number of steps"):
        pab_fx.magnitude_ratios(pipe, lambda: pipelines.run(pipe, entry), entry.steps + 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("max_skip_steps", -1),
        ("threshold", -0.1),
        ("retention_ratio", 1.5),
        ("mag_ratios", torch.ones(3)),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(field: str, value: Any) -> None:
    config = config_of()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        pab_fx.PABBackend(config)
