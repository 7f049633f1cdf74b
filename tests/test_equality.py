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
from zoo import BY_NAME, Clock, Entry, diffusers_config, hooked, trajectory

from pab_fx import PABBackend

TIMESTEPS = (950, 790, 700, 650, 600, 500, 400, 300, 90, 50)
BREAKS_INSIDE_AN_ATTENTION = {"MochiTransformer3DModel": {"capture_dynamic_output_shape_ops": True}}
INDUCTOR = ("LatteTransformer3DModel", "CogVideoXTransformer3DModel", "FluxTransformer2DModel", "WanTransformer3DModel")


class Both:
    """A backend that lowers each captured graph both ways, runs both, and insists on equal outputs."""

    def __init__(self, config: Any, inner: str = "eager") -> None:
        self.specialize = PABBackend(config, inner=inner, lowering="specialize")
        self.cond = PABBackend(config, inner=inner, lowering="cond")

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialized, conditional = self.specialize(gm, example_inputs), self.cond(gm, example_inputs)

        def run(*args: Any) -> Any:
            outputs, others = specialized(*args), conditional(*args)
            assert all(_same(a, b) for a, b in zip(outputs, others, strict=True))
            return outputs

        return run


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _is_equal(outputs: list[tuple[torch.Tensor, ...]], others: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(
        _same(a, b) for step, other in zip(outputs, others, strict=True) for a, b in zip(step, other, strict=True)
    )


def _distance(outputs: list[tuple[torch.Tensor, ...]], others: list[tuple[torch.Tensor, ...]]) -> float:
    """Largest relative L2 distance of any output tensor."""
    return max(
        float((a - b).norm() / b.norm())
        for step, other in zip(outputs, others, strict=True)
        for a, b in zip(step, other, strict=True)
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_both_lowerings_equal_the_hooks_bitwise(name: str) -> None:
    entry: Entry = BY_NAME[name]
    clock = Clock()
    config = diffusers_config(clock)
    model = entry.build()
    plain = trajectory(entry, model, TIMESTEPS, clock)
    reference = trajectory(entry, hooked(model, config), TIMESTEPS, clock)
    assert not _is_equal(plain, reference), "the hooks change nothing, so nothing would be shown"
    flags = BREAKS_INSIDE_AN_ATTENTION.get(entry.class_name)
    with torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext():
        backend = Both(config)
        compiled = torch.compile(model, backend=backend)
        outputs = trajectory(entry, compiled, TIMESTEPS, clock)
    assert backend.specialize.report().reused == backend.cond.report().reused > 0
    assert _is_equal(outputs, reference)


def test_an_attention_that_breaks_is_computed_not_guessed() -> None:
    """Mochi's attention breaks in the middle of a loop, where Dynamo gives up: nothing is reused, nothing is wrong."""
    entry = BY_NAME["MochiTransformer3DModel"]
    clock = Clock()
    model = entry.build()
    plain = trajectory(entry, model, TIMESTEPS, clock)
    backend = PABBackend(diffusers_config(clock), inner="eager")
    assert _is_equal(trajectory(entry, torch.compile(model, backend=backend), TIMESTEPS, clock), plain)
    left_alone = [region.left_alone for region in backend.report().regions if region.left_alone]
    assert any("breaks inside" in reason for reason in left_alone)


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", [INDUCTOR[0], *(pytest.param(name, marks=pytest.mark.slow) for name in INDUCTOR[1:])])
def test_inductor_equals_the_hooks_to_rounding(name: str, lowering: str) -> None:
    """1e-4 relative: Inductor fuses and reorders float32 sums, which costs a few units in the last place a layer."""
    entry: Entry = BY_NAME[name]
    clock = Clock()
    config = diffusers_config(clock)
    model = entry.build()
    timesteps = (950, 700, 650, 600, 90)
    plain = trajectory(entry, model, timesteps, clock)
    reference = trajectory(entry, hooked(model, config), timesteps, clock)
    backend = PABBackend(config, inner="inductor", lowering=lowering)
    outputs = trajectory(entry, torch.compile(model, backend=backend), timesteps, clock)
    assert _distance(outputs, reference) < 1e-4
    assert _distance(plain, reference) > 1e-2
