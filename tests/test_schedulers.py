"""One enabled pipeline through all that its users do with it: every generation equals diffusers' hooks bitwise.

Whatever the scheduler, wherever in the plan a generation starts, however the one before ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import diffusers
import pipelines
import pytest
import torch
import zoo
from pipelines import PipelineEntry
from pipelines.oracle import plain_and_hooked_run

import pab_fx
from pab_fx import PAB

LATTE = "LattePipeline"  # has a current timestep
UNET = "StableDiffusionPipeline"  # has none: all that there is to see is what the scheduler counts, if it does
SD3 = "StableDiffusion3Pipeline"  # has none; flow matching
IMG2IMG = "FluxImg2ImgPipeline"  # has none; starts in the middle of the plan
VIDEO2VIDEO = "CogVideoXVideoToVideoPipeline"  # has one; starts in the middle of the plan
WAN = "WanPipeline"  # two calls per step, in cache contexts
CHROMA = "ChromaPipeline"  # two calls per step, without cache contexts

_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(**_BETAS, clip_sample=False),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**_BETAS, algorithm_type="dpmsolver++"),
    "DPM++ SDE": lambda: diffusers.DPMSolverMultistepScheduler(**_BETAS, algorithm_type="sde-dpmsolver++"),
    "DPM++ Karras": lambda: diffusers.DPMSolverMultistepScheduler(**_BETAS, use_karras_sigmas=True),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**_BETAS),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**_BETAS),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**_BETAS),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**_BETAS),
    "PNDM": lambda: diffusers.PNDMScheduler(**_BETAS),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(**_BETAS),
    "DDPM": lambda: diffusers.DDPMScheduler(**_BETAS, clip_sample=False),
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}
CASES = [
    *((LATTE, name, True) for name in ("DDIM", "DPM++", "Euler", "UniPC", "Heun")),
    *((UNET, name, True) for name in ("DDIM", "Heun")),
    *((SD3, name, name != "flow Heun") for name in ("flow Euler", "flow Heun")),
    *((LATTE, name, True) for name in ("DPM++ SDE", "DPM++ Karras", "Euler ancestral", "PNDM", "LMS", "DDPM")),
    *((UNET, name, True) for name in ("DPM++", "Euler", "UniPC", "PNDM", "LMS", "DDPM")),
    *((WAN, name, True) for name in ("DPM++", "Euler", "UniPC", "Heun")),  # it sets where schedulers begin
]


def config_of(clock: Callable[[], Any] | None) -> Any:
    return zoo.diffusers_config(clock, ranges=(2, 3, 3), window=(100, 900))  # type: ignore[arg-type]


def with_scheduler(entry: PipelineEntry, scheduler: Callable[[], Any]) -> PipelineEntry:
    """The entry with another scheduler."""

    def build() -> Any:
        pipe = entry.build()
        pipe.scheduler = scheduler()
        return pipe

    return replace(entry, build=build)


@functools.cache
def reference(name: str, scheduler: str | None, overrides: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    """What the hooks make of a generation, which is not what the bare pipeline does."""
    entry, given = entry_of(name, scheduler), call_of(name, dict(overrides))
    plain, expected = plain_and_hooked_run(entry, config_of, **given)
    assert not torch.equal(expected, plain)
    return expected


def entry_of(name: str, scheduler: str | None = None) -> PipelineEntry:
    entry = pipelines.BY_NAME[name]
    return entry if scheduler is None else with_scheduler(entry, SCHEDULERS[scheduler])


def call_of(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a call; `prompts` stands for that many different ones."""
    overrides = dict(overrides)
    prompts = overrides.pop("prompts", 1)
    if prompts > 1:
        given = pipelines.BY_NAME[name].call()
        for key in given:
            if "prompt" in key and isinstance(given[key], torch.Tensor):
                overrides[key] = torch.cat([given[key].roll(i, -1) for i in range(prompts)])
    return overrides


class Enabled:
    """An enabled pipeline beside its reference, which is made anew for each generation."""

    def __init__(self, name: str, config: Any = None, scheduler: str | None = None, **options: Any) -> None:
        self.name, self.scheduler = name, scheduler
        self.entry = entry_of(name, scheduler)
        self.pipe = self.entry.build()
        self.pab: PAB = pab_fx.enable(self.pipe, config_of(None) if config is None else config(self.pipe), **options)

    def swap(self, scheduler: str) -> None:
        self.scheduler, self.pipe.scheduler = scheduler, SCHEDULERS[scheduler]()

    def run(self, **overrides: Any) -> torch.Tensor:
        return pipelines.run(self.pipe, self.entry, **call_of(self.name, overrides))

    def check(self, **overrides: Any) -> None:
        """One generation, which equals the hooks, reuses something, and gives all that it kept back."""
        before = self.pab.report().reused
        found = self.run(**overrides)
        assert torch.equal(found, reference(self.name, self.scheduler, tuple(overrides.items()))), overrides
        report = self.pab.report()
        assert report.reused > before
        assert sum(role.cache_bytes for role in report.roles) == 0


@pytest.fixture
def enabled() -> Iterator[Callable[..., Enabled]]:
    made: list[Enabled] = []

    def make(*args: Any, **kwargs: Any) -> Enabled:
        made.append(Enabled(*args, **{"inner": "eager", **kwargs}))
        return made[-1]

    yield make
    for each in made:
        each.pab.disable()


Make = Callable[..., Enabled]


class CutOff(Exception):
    """Raised in a callback to end a generation early."""


def raising_at(step: int) -> Callable[..., Any]:
    """A `callback_on_step_end` that raises."""

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            raise CutOff
        return kwargs

    return callback


def interrupting_at(step: int) -> Callable[..., Any]:
    """A `callback_on_step_end` that ends a generation the way diffusers' guide tells."""

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            pipe._interrupt = True
        return kwargs

    return callback


# -------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        pytest.param(name, scheduler, id=f"{name}-{scheduler}", marks=pytest.mark.slow if slow else ())
        for name, scheduler, slow in CASES
    ],
)
def test_each_scheduler_equals_the_hooks(enabled: Make, name: str, scheduler: str) -> None:
    run = enabled(name, scheduler=scheduler)
    run.check()
    run.check()


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
def test_the_scheduler_may_be_swapped_between_generations(enabled: Make, lowering: str) -> None:
    run = enabled(LATTE, scheduler="DDIM", lowering=lowering)
    for name in ("DDIM", "Euler", "Heun", "DDIM", "UniPC", "DPM++"):
        run.swap(name)
        run.check()


@pytest.mark.slow
def test_the_scheduler_may_be_swapped_after_a_generation_was_cut_off(enabled: Make) -> None:
    run = enabled(LATTE, scheduler="Euler")
    for name in ("DDIM", "Heun"):
        with pytest.raises(CutOff):
            run.run(callback_on_step_end=raising_at(3))
        run.swap(name)
        run.check()


# ---------------------------------------------------------------------------------- where a generation starts


@pytest.mark.parametrize("name", [pytest.param(IMG2IMG), pytest.param(VIDEO2VIDEO, marks=pytest.mark.slow)])
def test_a_generation_may_start_in_the_middle_of_the_plan(enabled: Make, name: str) -> None:
    run = enabled(name)
    for strength in (0.75, 0.5, 1.0):
        run.check(strength=strength)


@pytest.mark.parametrize("name", [IMG2IMG, VIDEO2VIDEO])
@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (0, 1)), 3])
def test_after_one_that_was_cut_off_a_generation_at_lower_timesteps_starts_afresh(
    enabled: Make, name: str, step: int
) -> None:
    """Timesteps do not rise from the one to the other: only the new plan tells them apart."""
    run = enabled(name)
    for _ in range(2):
        with pytest.raises(CutOff):
            run.run(strength=1.0, callback_on_step_end=raising_at(step))
        run.check(strength=0.5)


# ----------------------------------------------------------------------------------- how the one before ended


@pytest.mark.parametrize("name", [LATTE, *(pytest.param(name, marks=pytest.mark.slow) for name in (SD3, WAN, CHROMA))])
def test_a_generation_after_one_that_a_callback_cut_off_starts_afresh(enabled: Make, name: str) -> None:
    run = enabled(name)
    for step in (3, 0, 4):
        with pytest.raises(CutOff):
            run.run(callback_on_step_end=raising_at(step))
        run.check()


@pytest.mark.parametrize("name", [LATTE, *(pytest.param(name, marks=pytest.mark.slow) for name in (SD3, WAN))])
def test_an_interrupted_generation_equals_the_hooks_and_so_does_the_next(enabled: Make, name: str) -> None:
    run = enabled(name)
    given: dict[str, Any] = {"callback_on_step_end": interrupting_at(4)}
    plain, expected = plain_and_hooked_run(run.entry, config_of, **given)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        assert torch.equal(run.run(**given), expected)
        run.check()


class FailingInner:
    """An inner compiler, as "eager", whose graphs fail when told to: at their `at`-th call from then."""

    def __init__(self) -> None:
        self.at = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            if self.at:
                self.at -= 1
                if not self.at:
                    raise CutOff("out of memory")
            return gm(*args)

        return compiled


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [LATTE, *(pytest.param(name, marks=pytest.mark.slow) for name in (WAN, CHROMA))])
def test_a_generation_after_one_that_failed_in_the_model_starts_afresh(enabled: Make, name: str, lowering: str) -> None:
    inner = FailingInner()
    run = enabled(name, inner=inner, lowering=lowering)
    run.check()
    for at in (1, 2, 5, 6):
        inner.at = at
        with pytest.raises(CutOff):
            run.run()
        run.check()


def test_a_failed_call_leaves_nothing_for_a_generation_at_lower_timesteps(enabled: Make) -> None:
    inner = FailingInner()
    run = enabled(VIDEO2VIDEO, inner=inner)
    for at in (1, 4):
        inner.at = at
        with pytest.raises(CutOff):
            run.run(strength=1.0)
        run.check(strength=0.5)


# --------------------------------------------------------------------------------------- one pipe, many shapes


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
def test_generations_of_any_length_size_and_number(enabled: Make, lowering: str) -> None:
    run = enabled(WAN, lowering=lowering)
    run.check(height=32)
    run.check(num_videos_per_prompt=2, num_inference_steps=5)
    run.check(guidance_scale=1.0, height=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [LATTE, SD3, UNET])
def test_generations_of_any_length_size_and_number_one_after_the_other(enabled: Make, name: str) -> None:
    run = enabled(name)
    several = {} if name == SD3 else {"num_images_per_prompt": 2}  # SD3 does not repeat pooled embeddings
    run.check()
    run.check(num_inference_steps=5)
    run.check(height=32, width=96)
    run.check(prompts=2)
    run.check(**several, num_inference_steps=11)
    run.check(guidance_scale=1.0)
    run.check(**several, prompts=2, guidance_scale=1.0)
    run.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [WAN, "CogVideoXPipeline", "HunyuanVideoPipeline"])
def test_videos_of_any_length_size_and_number(enabled: Make, name: str) -> None:
    run = enabled(name)
    scale = "true_cfg_scale" if name == "HunyuanVideoPipeline" else "guidance_scale"
    # CogVideoX takes it for 1, HunyuanVideo does not repeat masks
    several = {"num_videos_per_prompt": 2} if name == WAN else {}
    run.check()
    run.check(num_inference_steps=5)
    run.check(height=32, width=96)
    run.check(num_frames=17)
    run.check(prompts=2)
    run.check(**several, num_inference_steps=11)
    run.check(**{scale: 1.0})
    run.check()


def test_a_generation_of_another_shape_may_follow_one_that_was_cut_off(enabled: Make) -> None:
    run = enabled(CHROMA)
    for given in ({"guidance_scale": 1.0}, {"num_inference_steps": 5}, {}):
        with pytest.raises(CutOff):
            run.run(callback_on_step_end=raising_at(3))
        run.check(**given)


# --------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (LATTE, "Heun"),
        ("FluxPipeline-true_cfg", None),
        pytest.param(LATTE, "DDIM", marks=pytest.mark.slow),
        pytest.param(LATTE, "Euler", marks=pytest.mark.slow),
        pytest.param(WAN, None, marks=pytest.mark.slow),
        pytest.param("MochiPipeline", None, marks=pytest.mark.slow),
        pytest.param(VIDEO2VIDEO, None, marks=pytest.mark.slow),
    ],
)
def test_a_callback_as_diffusers_users_write_it(
    enabled: Make, name: str, scheduler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "MochiPipeline":  # else its graph breaks inside of attentions
        monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    run = enabled(name, lambda pipe: config_of(lambda: pipe.current_timestep), scheduler=scheduler)
    run.check()
    with pytest.raises(CutOff):
        run.run(callback_on_step_end=raising_at(3))
    run.check()
