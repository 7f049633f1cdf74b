"""One call turns PAB on for a diffusers pipeline; what it makes is what diffusers' hooks make, branch by branch."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
import zoo
from pipelines.oracle import hooked_run, plain_and_hooked_run

import pab_fx
from pab_fx import Blocks, Every, Policy, Residual

QUICK = {
    "CogVideoXPipeline",
    "LattePipeline",
    "FluxPipeline-true_cfg",
    "AllegroPipeline",
    "WanPipeline-two_transformers",
    "ChromaPipeline",
    "StableDiffusion3Pipeline",
    "DiTPipeline",
}
UNREAD = QUICK - {"AllegroPipeline"}
"""Of Allegro's generations the first step is found by its timestep, which is read: its scheduler counts later."""
entries = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.slow)
        for entry in pipelines.PIPELINES
    ],
)


def config_of(clock: Callable[[], float] | None) -> Any:
    return zoo.diffusers_config(clock, ranges=(2, 3, 3), window=(100, 900))  # type: ignore[arg-type]


BREAKS_INSIDE_AN_ATTENTION = {"MochiPipeline": {"capture_dynamic_output_shape_ops": True}}
CONFIG = config_of(None)
"""Without a callback: timesteps are read off the scheduler."""


def reads(pipe: Any, entry: pipelines.PipelineEntry) -> tuple[torch.Tensor, list[int]]:
    """What a generation makes; and in each call of a denoiser, how often a tensor's value is read by the host."""
    models = [getattr(pipe, name) for name in entry.denoisers]
    calls = [model._compiled_call_impl for model in models]

    def recorded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function("denoiser"):
            return call(*args, **kwargs)

    for model, call in zip(models, calls, strict=True):
        model._compiled_call_impl = functools.partial(recorded, call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = pipelines.run(pipe, entry)
    for model, call in zip(models, calls, strict=True):
        model._compiled_call_impl = call
    # as the profiler has them: it takes a second to make the tree of `profile.events()`
    events = profile.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "denoiser"]
    found = [event.start_ns() for event in events if event.name() == "aten::_local_scalar_dense"]
    return output, [sum(start <= each <= end for each in found) for start, end in spans]


@entries
def test_a_pipeline_equals_the_hooks_bitwise_and_no_step_waits_for_the_device(entry: pipelines.PipelineEntry) -> None:
    """Two generations: the second one starts afresh by itself. A GPU would be waited for where a value is read."""
    plain, expected = plain_and_hooked_run(entry, config_of)
    assert not torch.equal(plain, expected)
    pipe = entry.build()
    flags = BREAKS_INSIDE_AN_ATTENTION.get(entry.name)
    with (
        torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext(),
        pab_fx.enable(pipe, CONFIG, inner="eager") as pab,
    ):
        assert torch.equal(pipelines.run(pipe, entry), expected)
        output, counted = reads(pipe, entry)
        assert torch.equal(output, expected)
        report = pab.report()
    if entry.name in UNREAD:
        assert len(counted) >= entry.steps
        assert not any(counted), counted
    assert report.reused > 0
    assert sum(role.cache_bytes for role in report.roles) == 0
    assert torch.equal(pipelines.run(pipe, entry), plain)


REGIONAL = ("LattePipeline", "WanPipeline-two_transformers", "FluxPipeline-true_cfg", "StableDiffusionPipeline")


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REGIONAL)
def test_blocks_compiled_once_for_all_equal_the_hooks_bitwise(name: str, lowering: str) -> None:
    """Each block has a cache of its own and, as in Latte, where one class attends space and time, its own role."""
    entry = pipelines.BY_NAME[name]
    expected = hooked_run(entry, config_of)
    pipe = entry.build()
    with pab_fx.enable(pipe, CONFIG, inner="eager", lowering=lowering, regional=True) as pab:
        assert torch.equal(pipelines.run(pipe, entry), expected)
        assert pab.report().reused > 0
    assert all(
        vars(module).get("_compiled_call_impl") is None
        for d in entry.denoisers
        for module in getattr(pipe, d).modules()
    )


@pytest.mark.parametrize(
    ("name", "callback", "regional"),
    [
        ("CogVideoXPipeline", True, False),
        ("StableDiffusionPipeline-heun", False, False),
        ("WanPipeline", True, False),
        *(
            pytest.param(name, callback, regional, marks=pytest.mark.slow)
            for name, callback, regional in (
                ("LattePipeline", False, True),
                ("CogVideoXPipeline", True, True),
                ("FluxPipeline-true_cfg", False, True),
                ("StableDiffusion3Pipeline", False, True),
                ("DiTPipeline", False, True),
                ("StableDiffusionPipeline-heun", False, True),
                ("WanPipeline", True, True),
            )
        ),
    ],
)
def test_no_step_waits_for_the_device(name: str, callback: bool, regional: bool) -> None:
    """Whatever the schedule, and also with the callback that diffusers' users write; a GPU would be waited for."""
    entry = pipelines.BY_NAME[name]
    pipe = entry.build()
    config = config_of(lambda: pipe.current_timestep) if callback else CONFIG
    with pab_fx.enable(pipe, config, inner="eager", regional=regional) as pab:
        pipelines.run(pipe, entry)  # compiles
        _, counted = reads(pipe, entry)
        assert len(counted) >= entry.steps
        assert not any(counted), counted
        assert pab.report().reused > 0


SIZES = {
    "FluxPipeline-true_cfg": [{"height": size, "width": size} for size in (48, 80, 96)],
    "CogVideoXPipeline": [{"height": size, "width": 96} for size in (80, 128, 160)],
}
"""Sizes of which no two are equal in the first call: Dynamo would take them for one, and compile again."""


@pytest.mark.parametrize(("name", "lowering"), [("FluxPipeline-true_cfg", "specialize"), ("CogVideoXPipeline", "cond")])
def test_dynamic_shapes_serve_three_resolutions_without_a_recompile(name: str, lowering: str) -> None:
    entry = pipelines.BY_NAME[name]
    expected = [hooked_run(entry, config_of, **size) for size in SIZES[name]]
    assert len({output.shape for output in expected}) == 3
    pipe = entry.build()
    captured: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        captured.append(gm)
        return gm

    with pab_fx.enable(pipe, CONFIG, inner="eager", lowering=lowering, dynamic=True, passes=[count]) as pab:
        for size, output in zip(SIZES[name], expected, strict=True):
            assert torch.equal(pipelines.run(pipe, entry, **size), output), size
        assert pab.report().reused > 0
    assert len(captured) == 1


def test_a_block_that_is_compiled_alone_has_the_role_that_the_whole_model_shows() -> None:
    """In a block's graph, frames and patches are both just a sequence; in the pipeline's video they are told apart."""
    entry = pipelines.BY_NAME["LattePipeline"]
    config = pab_fx.PABConfig.preset("latte", temporal_attention_block_skip_range=4)
    outputs, roles = [], []
    for regional in (False, True):
        pipe = entry.build()
        with pab_fx.enable(pipe, config, inner="eager", regional=regional) as pab:
            outputs.append(pipelines.run(pipe, entry))
            roles.append({(role.role, role.modules, role.computed, role.reused) for role in pab.report().roles})
    assert torch.equal(*outputs)
    assert roles[0] == roles[1]
    assert {role for role, *_, reused in roles[0] if reused} >= {"spatial", "temporal", "cross"}


def test_a_model_without_repeated_blocks_is_refused_regional_compilation() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        pab_fx.enable(torch.nn.Linear(2, 2), regional=True)


MOST_USED = (
    "FluxPipeline",
    "QwenImagePipeline",
    "WanPipeline",
    "CogVideoXPipeline",
    "HunyuanVideoPipeline",
    "LTXPipeline",
    "StableDiffusion3Pipeline",
    "SanaPipeline",
    "PixArtSigmaPipeline",
    "LattePipeline",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("FluxPipeline", "WanPipeline") else pytest.mark.slow) for n in MOST_USED]
)
def test_a_default_run_of_the_most_used_pipelines_says_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No warning, nothing logged, nothing printed, with a policy for blocks and with PAB by default."""
    (entry,) = (each for each in pipelines.PIPELINES if each.name == name)
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logging.getLogger("pab_fx").addHandler(handler)
    plain = pipelines.run(entry.build(), entry)
    try:
        for config in (Policy(Blocks(), Every(2, warmup=2), Residual()), pab_fx.PABConfig()):
            pipe = entry.build()
            capsys.readouterr()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                with pab_fx.enable(pipe, config, inner="eager") as pab:
                    output = pipelines.run(pipe, entry)
                    reused = pab.report().reused
            assert reused > 0
            assert not torch.equal(output, plain)
            assert [str(each.message) for each in warned if "pab_fx" in str(each.message)] == []
            assert [record.getMessage() for record in told if record.levelno >= logging.INFO] == []
            assert capsys.readouterr() == ("", "")
    finally:
        logging.getLogger("pab_fx").removeHandler(handler)
