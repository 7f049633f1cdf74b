"""With diffusers' own config, the compiled model's outputs are those of diffusers' hooks.

Bitwise with `inner="eager"`, for every transformer of the zoo, with both lowerings, over whole trajectories
with all three roles at different ranges. Breaks inside an attention are the exception: see Mochi.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from zoo import BY_NAME, Entry, diffusers_config

from pab_fx import LayerBroadcast, PABBackend, PABConfig
from pab_fx.policy.when import SkipRange, reused_calls
from pab_fx.testing import Broadcast, Clock, assert_broadcasts_like

TIMESTEPS = (950, 790, 700, 650, 600, 500, 400, 300, 90, 50)
BREAKS_INSIDE_AN_ATTENTION = {"MochiTransformer3DModel": {"capture_dynamic_output_shape_ops": True}}
INDUCTOR = ("LatteTransformer3DModel", "CogVideoXTransformer3DModel", "FluxTransformer2DModel", "WanTransformer3DModel")


class Both:
    """A backend that lowers each captured graph both ways, runs both, and insists on equal outputs."""

    def __init__(self, config: Any) -> None:
        self.specialize = PABBackend(config, inner="eager", lowering="specialize")
        self.cond = PABBackend(config, inner="eager", lowering="cond")

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialized, conditional = self.specialize(gm, example_inputs), self.cond(gm, example_inputs)

        def run(*args: Any) -> Any:
            outputs, others = specialized(*args), conditional(*args)
            for a, b in zip(outputs, others, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            return outputs

        return run


def broadcast(
    entry: Entry, timesteps: Sequence[float], reference: Any = None, of_one_block: bool = False, **options: Any
) -> Broadcast:
    """A generation of a model of the zoo is what its hooks make of it, and not what it is without PAB."""
    made = f"BY_NAME[{entry.name!r}]"
    if of_one_block:
        entry, made = entry.of_one_block(), f"{made}.of_one_block()"
    return assert_broadcasts_like(
        entry.build(),
        diffusers_config(Clock()),
        reference,
        inputs=entry.step,
        generations=[timesteps],
        repro=f"from zoo import BY_NAME  # in tests/\nentry = {made}\nmodel, inputs = entry.build(), entry.step",
        **options,
    )


VARIANTS = {
    *("AceStepTransformer1DModel", "BriaTransformer2DModel", "ChromaTransformer2DModel"),
    "ChronoEditTransformer3DModel",
    *("Cosmos3OmniTransformer", "HeliosTransformer3DModel", "HiDreamImageTransformer2DModel"),
    *("HunyuanImageTransformer2DModel", "HunyuanVideoFramepackTransformer3DModel"),
    *("HunyuanVideoTransformer3DModel-token_replace", "Kandinsky6Transformer3DModel", "LTX2VideoTransformer3DModel"),
    *("LongCatImageTransformer2DModel", "MiniMaxH3Transformer3DModel", "MotifVideoTransformer3DModel"),
    *("NucleusMoEImageTransformer2DModel", "OvisImageTransformer2DModel"),
    *("AllegroTransformer3DModel", "ConsisIDTransformer3DModel", "EasyAnimateTransformer3DModel"),
    *("QwenImage21Transformer2DModel", "QwenImageControlNetModel", "QwenImageMultiControlNetModel"),
    *("SanaWMLTX2RefinerTransformer3DModel", "WanTransformer3DModel-i2v"),
    *("WanAnimateTransformer3DModel", "WanVACETransformer3DModel"),
}
"""Those that take long and whose attentions are much like another's; `.ci/run` runs them apart, and fails for them."""
assert set(BY_NAME) >= VARIANTS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in BY_NAME]
)
def test_both_lowerings_equal_the_hooks_bitwise(name: str) -> None:
    entry, made = BY_NAME[name], []

    def compiled(model: torch.nn.Module, config: Any) -> Callable[..., Any]:
        made.append(Both(config))
        return torch.compile(model, backend=made[0])

    flags = BREAKS_INSIDE_AN_ATTENTION.get(entry.class_name)
    with torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext():
        broadcast(entry, TIMESTEPS, broadcast=compiled)
    assert made[0].specialize.report().reused == made[0].cond.report().reused > 0


def test_an_attention_that_breaks_is_computed_not_guessed() -> None:
    """Mochi's attention breaks in the middle of a loop, where Dynamo gives up: nothing is reused, nothing is wrong."""
    entry = BY_NAME["MochiTransformer3DModel"]
    found = broadcast(entry, TIMESTEPS, entry.build(), reuses=False, changes=False)
    assert found.backend is not None
    left_alone = [region.left_alone for region in found.backend.report().regions if region.left_alone]
    assert any("breaks inside" in reason for reason in left_alone)


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "of_one_block"),
    [(INDUCTOR[0], True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in INDUCTOR)],
)
def test_inductor_equals_the_hooks_to_rounding(name: str, of_one_block: bool, lowering: str) -> None:
    """1e-4 relative: Inductor fuses and reorders float32 sums, which costs a few units in the last place a layer."""
    options: dict[str, Any] = {"inner": "inductor", "lowering": lowering, "tolerance": 1e-4}
    broadcast(BY_NAME[name], (950, 700, 650, 90), of_one_block=of_one_block, **options)


class HookedByLayer:
    """A copy of a model whose layers have diffusers' hooks with a range and a window each."""

    def __init__(self, entry: Entry, layers: dict[str, tuple[int, tuple[int, int]]]) -> None:
        self.model, self.clock = entry.build(), Clock()
        for identifier, (skip_range, window) in layers.items():
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip_range,
                spatial_attention_timestep_skip_range=window,
                spatial_attention_block_identifiers=(identifier,),
                current_timestep_callback=self.clock,
            )
            apply_pyramid_attention_broadcast(self.model, config)

    def __call__(self, **kwargs: Any) -> Any:
        self.clock.t = float(kwargs["timestep"].max())
        return self.model(**kwargs)


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_layers_have_ranges_and_windows_of_their_own(lowering: str) -> None:
    entry = BY_NAME["CogVideoXTransformer3DModel"]
    layers = (LayerBroadcast(("blocks.1",), skip_range=3, timestep_skip_range=(300, 700)),)
    config = PABConfig(spatial_attention_block_skip_range=2, layers=layers)
    reference = HookedByLayer(entry, {"blocks.0": (2, (100, 800)), "blocks.1": (3, (300, 700))})
    found = assert_broadcasts_like(
        entry.build(), config, reference, inputs=entry.step, generations=[TIMESTEPS], lowering=lowering
    )
    assert found.backend is not None
    reused = reused_calls(SkipRange(2, 100, 800), TIMESTEPS), reused_calls(SkipRange(3, 300, 700), TIMESTEPS)
    assert found.backend.report().reused == sum(map(sum, reused))
    assert reused[0] != reused[1]
