"""Published settings, and the polynomial that is fitted for a model that nobody published one for."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy
import pipelines
import pytest
import torch
import zoo
from test_blocks import TIMESTEPS, DiT, build, inputs, trajectory
from test_taylorseer import STEPS, are_equal, tensors, timesteps_of
from torch import Tensor

import pab_fx
from pab_fx import Change, Computed, Model, ModulatedInput
from pab_fx.policy.presets import PUBLISHED

pytestmark = pytest.mark.usefixtures("no_gradients")

ON = {
    "teacache-flux": "FluxTransformer2DModel",
    "teacache-hunyuan-video": "HunyuanVideoTransformer3DModel",
    "teacache-ltx-video": "LTXVideoTransformer3DModel",
    "teacache-lumina2": "Lumina2Transformer2DModel",
    "teacache-latte": "LatteTransformer3DModel",
    "teacache-cogvideox-2b": "CogVideoXTransformer3DModel",
    "teacache-wan2.1-t2v-1.3b": "WanTransformer3DModel",
    "teacache-wan2.1-t2v-1.3b-retained": "WanTransformer3DModel",
    "easycache-wan": "WanTransformer3DModel",
    "first-block": "FluxTransformer2DModel",
}
"""Presets, and the class that each is for."""


@pytest.mark.parametrize(("name", "on"), ON.items(), ids=ON.keys())
def test_a_preset_finds_its_signal_in_the_class_that_it_is_for(name: str, on: str) -> None:
    entry, policy = zoo.BY_NAME[on], pab_fx.preset(name, threshold=1e9)
    policy = replace(policy, when=replace(policy.when, warmup=2, cooldown=0))
    model, plain = entry.build(), entry.build()
    with pab_fx.enable(model, policy, inner="eager") as pab:
        found = [tensors(model(**entry.step(t, i))) for i, t in enumerate(timesteps_of(entry))]
        report = pab.report()
    assert report.reused == STEPS - 2, str(report)
    assert not are_equal(found, [tensors(plain(**entry.step(t, i))) for i, t in enumerate(timesteps_of(entry))])


def test_every_preset_names_its_source_and_goes_into_a_file_and_back(tmp_path: Any) -> None:
    policies = [each.policy for each in PUBLISHED.values()]
    pab_fx.save_policies(policies, tmp_path / "presets.json")
    assert pab_fx.load_policies(tmp_path / "presets.json") == tuple(policies)
    assert all("/" in each.source for each in PUBLISHED.values())
    assert all(pab_fx.preset(name) == each.policy for name, each in PUBLISHED.items())


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"teacache-flux.*got 'teacache'"):
        pab_fx.preset("teacache")


def fitted(signals: list[Tensor], outputs: list[Tensor], degree: int) -> tuple[float, ...]:
    def changes(of: list[Tensor]) -> list[float]:
        return [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(of)]

    return tuple(numpy.polyfit(changes(signals), changes(outputs), degree))


class Observed:
    """A model whose signal and output of all blocks are noted, in plain eager Python."""

    def __init__(self, model: Any) -> None:
        self.model, self.signals, self.outputs = copy.deepcopy(model), [], []
        run = self.model.run

        def noted(streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
            (x,), block = streams, self.model.blocks[0]
            shift, scale, _ = block.modulation(embedding).unsqueeze(1).chunk(3, dim=-1)
            self.signals.append(block.norm(x) * (1 + scale) + shift)
            found = run(streams, embedding)
            self.outputs.append(found[0])
            return found

        self.model.run = noted

    def fitted(self, degree: int) -> tuple[float, ...]:
        return fitted(self.signals, self.outputs, degree)


@pytest.mark.parametrize("contexts", [1, 2])
def test_the_fitted_polynomial_is_that_of_plain_eager_measurements(contexts: int) -> None:
    model = build(DiT)
    reference = Observed(model)
    trajectory(reference.model)

    def generate() -> None:
        for step, t in enumerate(TIMESTEPS):
            for i in range(contexts):
                with pab_fx.cache_context(str(i)):
                    model(*inputs(step, t))

    # float32 changes of about 0.1 are off by 1e-7, and so is a line through them
    assert pab_fx.fit_rescale(model, generate, degree=1) == pytest.approx(reference.fitted(1), rel=1e-3)
    coefficients = pab_fx.fit_rescale(model, generate)
    assert len(coefficients) == 5
    Change(ModulatedInput(), 0.1, accumulate=True, rescale=coefficients)


def test_a_polynomial_is_fitted_over_a_pipelines_generation() -> None:
    entry = pipelines.BY_NAME["FluxPipeline-true_cfg"]
    pipe = entry.build()
    once = pab_fx.fit_rescale(pipe, lambda: pipelines.run(pipe, entry), degree=1)
    twice = pab_fx.fit_rescale(pipe, lambda: [pipelines.run(pipe, entry) for _ in range(2)], degree=1)
    assert twice == pytest.approx(once, rel=1e-6)  # each generation's numbers go with its own outputs
    assert once[0] != 0


def test_a_signal_of_ones_own_is_fitted_for_the_whole_model() -> None:
    model = build(DiT)
    samples = [inputs(step, t)[0] for step, t in enumerate(TIMESTEPS)]
    expected = fitted(list(map(torch.square, samples)), trajectory(model), degree=1)
    signal = Computed(torch.square, Model())
    found = pab_fx.fit_rescale(model, lambda: trajectory(model), of=signal, degree=1, where=Model())
    assert found == pytest.approx(expected, rel=1e-3)


def test_too_few_steps_and_no_function_are_refused() -> None:
    model = build(DiT)
    with pytest.raises(ValueError, match="12 steps were measured, and degree=12"):
        pab_fx.fit_rescale(model, lambda: trajectory(model), degree=12)
    with pytest.raises(TypeError, match="generate must be a function"):
        pab_fx.fit_rescale(model, trajectory(model))
