"""With diffusers' FasterCacheConfig, the compiled model's outputs are those of its hooks, to the bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pipelines
import pytest
import torch
import zoo
from test_magcache import in_default
from test_taylorseer import STEPS, are_equal, tensors
from torch import Tensor

import pab_fx
from pab_fx.diffusers.faster_cache import policies_of_faster_cache
from pab_fx.testing import replaying

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no FasterCache")
if not hasattr(hooks, "FasterCacheConfig"):
    pytest.skip("this diffusers has no FasterCache", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = tuple(900.0 - 100 * i for i in range(STEPS))
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])
slow = pytest.mark.slow

IN_EITHER = (
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "ChronoEditTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "CogVideoXTransformer3DModel-rotary",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "CosmosTransformer3DModel",
    "DiTTransformer2DModel",
    "EasyAnimateTransformer3DModel",
    "GlmImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HunyuanDiT2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel-token_replace",
    "LatteTransformer3DModel",
    "MochiTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "WanAnimateTransformer3DModel",
    "WanTransformer3DModel",
    "WanTransformer3DModel-i2v",
    "WanTransformer3DModel-timestep_per_token",
    "WanVACETransformer3DModel",
)
"""Models of the zoo on which the hooks run with both halves of guidance in one batch, and as distilled."""

WITH_GUIDANCE = (
    *IN_EITHER,
    "Kandinsky5Transformer3DModel",
    "Kandinsky6Transformer3DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "OmniGenTransformer2DModel",
    "PRXTransformer2DModel",
)
"""With both halves."""

DISTILLED = (
    *IN_EITHER,
    "BriaFiboTransformer2DModel",
    "BriaTransformer2DModel",
    "ChromaTransformer2DModel",
    "ConsisIDTransformer3DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LongCatImageTransformer2DModel",
    "MiniMaxH3Transformer3DModel",
    "NucleusMoEImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "QwenImageControlNetModel",
    "QwenImageTransformer2DModel",
    "SanaWMLTX2RefinerTransformer3DModel",
    "StableAudioDiTModel",
)
"""As distilled, where they change anything."""

BREAKS = ("MochiTransformer3DModel",)
"""Whose graph breaks inside of an attention without the flag."""


def step_of(entry: zoo.Entry, t: float, seed: int, is_distilled: bool) -> dict[str, Any]:
    """The inputs of a step; without distillation those of two, one half unconditional and one conditional."""
    cond, uncond = entry.step(t, seed), entry.step(t, seed + 500)
    if is_distilled:
        return cond

    def joined(given: Any, other: Any) -> Any:
        is_single = isinstance(given, Tensor) and given.dim() > 0 and len(given) == 1
        return torch.cat([other, given]) if is_single else given

    return {name: joined(given, uncond[name]) for name, given in cond.items()}


def config_of(entry: zoo.Entry, model: Any, clock: zoo.Clock, **fields: Any) -> Any:
    """A config that names the inputs with both halves, and whose weights differ from step to step and part to part."""
    is_distilled = fields.get("is_guidance_distilled", False)
    inputs = step_of(entry, TIMESTEPS[0], 0, is_distilled)
    prediction = tensors(model(**inputs))[0]
    of_batch = [n for n, each in inputs.items() if isinstance(each, Tensor) and each.shape[:1] == prediction.shape[:1]]
    formats = {4: "BCHW", 5: "BFCHW" if entry.name.startswith("CogVideoX") else "BCFHW"}
    return hooks.FasterCacheConfig(
        **{
            "spatial_attention_timestep_skip_range": (-1, 801),
            "spatial_attention_block_identifiers": (r"^(?!temporal_).*attn",),
            "temporal_attention_block_skip_range": 3,
            "temporal_attention_timestep_skip_range": (-1, 801),
            "unconditional_batch_skip_range": 3,
            "unconditional_batch_timestep_skip_range": (-1, 801),
            "attention_weight_callback": lambda module: clock.t / 1000 + 0.1 * (len(list(module.parameters())) % 3),
            "tensor_format": formats.get(prediction.dim(), "BCHW"),
            "current_timestep_callback": clock,
            "_unconditional_conditional_input_kwargs_identifiers": tuple(of_batch),
            **fields,
        }
    )


def hooked(model: Any, config: Any) -> Any:
    """A copy of a model with the hooks, which put callbacks into a copy of the config."""
    model = copy.deepcopy(model)
    hooks.apply_faster_cache(model, copy.copy(config))
    return model


def trajectory(
    entry: zoo.Entry, model: Any, clock: zoo.Clock, is_distilled: bool = False, steps: int = STEPS, seed: int = 0
) -> list[list[Tensor]]:
    found = []
    for step, clock.t in enumerate(TIMESTEPS[:steps]):
        found.append(tensors(model(**step_of(entry, clock.t, step + seed, is_distilled))))
    return found


def check(name: str, lowering: str, regional: bool = False, **fields: Any) -> pab_fx.report.report.Report:
    """That a model yields what it does with the hooks, and what it does not without them."""
    entry, clock = zoo.BY_NAME[name], zoo.Clock()
    if name in zoo.OF_TWO_BLOCKS and not regional:
        entry = entry.of_one_block()
    model, is_distilled = entry.build(), fields.get("is_guidance_distilled", False)
    config = config_of(entry, model, clock, **fields)
    expected, plain = (trajectory(entry, each, clock, is_distilled) for each in (hooked(model, config), model))
    assert not are_equal(expected, plain)
    flags = {"capture_dynamic_output_shape_ops": True} if name in BREAKS else {}
    with (
        torch._dynamo.config.patch(flags) if flags else contextlib.nullcontext(),
        pab_fx.enable(model, config, inner="eager", lowering=lowering, regional=regional) as pab,
    ):
        assert are_equal(trajectory(entry, model, clock, is_distilled), expected)
        report = pab.report()
    assert report.reused > 0
    return report


@lowerings
@pytest.mark.parametrize("name", in_default(WITH_GUIDANCE, ("LatteTransformer3DModel",)))
def test_a_model_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    report = check(name, lowering)
    (batch,) = (role for role in report.roles if role.role == "uncond")
    assert (batch.computed, batch.reused) == (3, 6)


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=slow)])
@pytest.mark.parametrize("name", in_default(DISTILLED, ("FluxTransformer2DModel",)))
def test_a_distilled_model_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    report = check(name, lowering, is_guidance_distilled=True)
    assert all(role.role != "uncond" for role in report.roles)


@slow
@lowerings
@pytest.mark.parametrize("name", ["LatteTransformer3DModel", "WanTransformer3DModel"])
def test_blocks_compiled_once_for_all_equal_the_hooks_bitwise(name: str, lowering: str) -> None:
    check(name, lowering, regional=True)


FIELDS: tuple[dict[str, Any], ...] = (
    {"spatial_attention_block_skip_range": 4, "attention_weight_callback": None},
    {"spatial_attention_block_skip_range": None},
    {"spatial_attention_block_identifiers": (r"blocks\.0\.", r"nowhere")},
    {"alpha_low_frequency": 1.3, "high_frequency_weight_update_timestep_range": (-1, 601)},
    {"low_frequency_weight_callback": lambda _: 0.9, "high_frequency_weight_callback": lambda _: torch.tensor(1.2)},
    {"unconditional_batch_timestep_skip_range": (250, 651), "spatial_attention_timestep_skip_range": (-1, 451)},
)


@pytest.mark.parametrize("fields", [FIELDS[0], *(pytest.param(each, marks=slow) for each in FIELDS[1:])], ids="-".join)
def test_every_field_does_what_it_does_for_the_hooks(fields: dict[str, Any]) -> None:
    check("CogVideoXTransformer3DModel", "specialize", **fields)


def test_what_a_step_reads_counts_as_the_last_output() -> None:
    """Of two steps in a row that reuse, the second goes on from what the first has read."""
    one, how = torch.ones(1), policies_of_faster_cache(hooks.FasterCacheConfig(is_guidance_distilled=True))[0].how
    scalars = pab_fx.Scalars(one[0], one[0], 0.5 * one[0])
    slots, found = (2 * one, 6 * one), []
    for _ in range(2):
        (read,) = how.read(slots, (), scalars)
        slots = how.carry(slots, (), (read,), scalars)
        found.append(float(read))
    assert found == [6 + 0.5 * 4, 8 + 0.5 * 2]
    assert [float(each) for each in how.update(slots, (), (20 * one,), scalars)] == [9.0, 20.0]


@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_not_rounded_to_a_smaller_dtype(dtype: torch.dtype) -> None:
    entry, clock = zoo.BY_NAME["FluxTransformer2DModel"].of_one_block(), zoo.Clock()
    model = entry.build()
    config = config_of(entry, model, clock, is_guidance_distilled=True, attention_weight_callback=lambda _: 0.3)
    model = model.to(dtype)

    def run(each: Any) -> list[list[Tensor]]:
        found = []
        for step, clock.t in enumerate(TIMESTEPS):
            given = entry.step(clock.t, step)
            is_float = {name: isinstance(each, Tensor) and each.is_floating_point() for name, each in given.items()}
            found.append(tensors(each(**{n: given[n].to(dtype) if is_float[n] else given[n] for n in given})))
        return found

    expected = run(hooked(model, config))
    with pab_fx.enable(model, config, inner="eager"):
        assert are_equal(run(model), expected)


# ------------------------------------------------------------------------------------------------------ pipelines


PIPELINES = {"CogVideoXPipeline": "BFCHW", "LattePipeline": "BCFHW"}


def of_pipeline(name: str, pipe: Any, **fields: Any) -> Any:
    given = {"tensor_format": PIPELINES[name], "unconditional_batch_timestep_skip_range": (-1, 801), **fields}
    return hooks.FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep, **given)


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("CogVideoXPipeline", "specialize"),
        ("LattePipeline", "cond"),
        pytest.param("CogVideoXPipeline", "cond", marks=slow),
        pytest.param("LattePipeline", "specialize", marks=slow),
    ],
)
def test_a_pipeline_equals_the_hooks_bitwise(name: str, lowering: str) -> None:
    """Two generations, and one that is cut off between them: each starts afresh by itself."""
    entry = pipelines.BY_NAME[name]
    with_hooks, plain = entry.build(), pipelines.run(entry.build(), entry)
    with_hooks.transformer.enable_cache(of_pipeline(name, with_hooks))
    expected = pipelines.run(with_hooks, entry)
    assert not torch.equal(plain, expected)
    captured: list[Any] = []
    pipe = entry.build()

    def count(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        captured.append(gm)
        return gm

    config = hooks.FasterCacheConfig(**{**vars(of_pipeline(name, pipe)), "current_timestep_callback": None})
    with pab_fx.enable(pipe, config, inner="eager", lowering=lowering, passes=[count]) as pab:
        assert torch.equal(pipelines.run(pipe, entry), expected)
        with cut_off_after(pipe, 5), pytest.raises(CutOff):
            pipelines.run(pipe, entry)
        assert torch.equal(pipelines.run(pipe, entry), expected)
        report = pab.report()
    assert len(captured) == 2  # of calls with a whole batch, and of those with half of one
    assert {role.role: role.reused > 0 for role in report.roles} == {"spatial": True, "uncond": True}
    assert sum(role.cache_bytes for role in report.roles) == 0
    assert torch.equal(pipelines.run(pipe, entry), plain)


class CutOff(Exception):
    """Ends a generation early."""


@contextlib.contextmanager
def cut_off_after(pipe: Any, steps: int) -> Any:
    calls = itertools.count(1)
    original = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) > steps:
            raise CutOff
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", step)
        yield


# ---------------------------------------------------------------------------------------------------------- state


SMALL = zoo.BY_NAME["CogVideoXTransformer3DModel"].of_one_block()


def small(**fields: Any) -> tuple[Any, Any, zoo.Clock]:
    """A model, a config and its clock."""
    clock, model = zoo.Clock(), SMALL.build()
    return model, config_of(SMALL, model, clock, **fields), clock


def test_a_generation_that_was_cut_off_leaves_nothing_to_the_next() -> None:
    """Whether it ends early, between two calls with half a batch, or in an error inside of one."""
    model, config, clock = small()
    expected = trajectory(SMALL, hooked(model, config), clock)
    with pab_fx.enable(model, config, inner="eager") as pab:
        for steps in (3, 6, STEPS):
            trajectory(SMALL, model, clock, steps=steps, seed=1000)
            assert are_equal(trajectory(SMALL, model, clock), expected)
        trajectory(SMALL, model, clock, steps=4)
        pab.reset()
        clock.t = TIMESTEPS[4]
        given = step_of(SMALL, clock.t, 4, False)
        assert are_equal([tensors(model(**given))], [tensors(SMALL.build()(**given))])


def test_what_a_config_keeps_is_kept_for_each_context_and_session() -> None:
    model, config, clock = small()
    expected = [
        trajectory(SMALL, hooked(model, config), clock, seed=seed) for seed in (0, 100, 200)
    ]  # a hooked model for each
    with pab_fx.enable(model, config, inner="eager") as pab:
        session = pab.session()
        for step, clock.t in enumerate(TIMESTEPS):
            for i, name in enumerate(("one", "other")):
                with pab_fx.cache_context(name):
                    found = tensors(model(**step_of(SMALL, clock.t, step + 100 * i, False)))
                assert are_equal([found], [expected[i][step]])
            with session, pab_fx.cache_context("one"):
                found = tensors(model(**step_of(SMALL, clock.t, step + 200, False)))
            assert are_equal([found], [expected[2][step]])


@pytest.mark.parametrize(
    "options",
    [
        {"inner": replaying},
        pytest.param({"cache_device": "cpu"}, marks=slow),
        pytest.param({"inner": replaying, "lowering": "cond"}, marks=slow),
        pytest.param({"step_invariants": "check"}, marks=slow),
        pytest.param({"dynamic": True}, marks=slow),
        pytest.param({"timesteps": TIMESTEPS, "step_invariants": False}, marks=slow),
    ],
    ids=lambda options: " ".join(f"{key}={getattr(each, '__name__', each)}" for key, each in options.items()),
)
def test_options_of_enable_change_nothing_of_what_is_said(options: dict[str, Any]) -> None:
    model, config, clock = small()
    expected = trajectory(SMALL, hooked(model, config), clock)
    with pab_fx.enable(model, config, **{"inner": "eager", **options}) as pab:
        for _ in range(2):
            assert are_equal(trajectory(SMALL, model, clock), expected)
        assert len(pab.backend.captured) == 2


@slow
def test_a_larger_batch_is_captured_once_whole_and_once_halved_and_never_again() -> None:
    """Dynamo takes a size that changes for a symbol; the batch of a half is none."""
    model, config, clock = small()
    with_hooks = hooked(model, config)

    def four(t: float, seed: int) -> dict[str, Any]:
        first, second = (step_of(SMALL, t, s, False) for s in (seed, seed + 300))
        halves = [
            [each.chunk(2) if isinstance(each, Tensor) else each for each in of.values()] for of in (first, second)
        ]
        joined = [
            torch.cat([a[0], b[0], a[1], b[1]]) if isinstance(a, tuple) else a for a, b in zip(*halves, strict=True)
        ]
        return dict(zip(first, joined, strict=True))

    with pab_fx.enable(model, config, inner="eager") as pab:
        for _ in range(2):
            for step, clock.t in enumerate(TIMESTEPS):
                given = four(clock.t, step)
                assert are_equal([tensors(model(**given))], [tensors(with_hooks(**given))])
            with_hooks._diffusers_hook.reset_stateful_hooks()
        assert len(pab.backend.captured) == 2
        assert all(not each.graph.lowerings._symbols for each in pab.backend.captured)


def test_what_stays_the_same_is_computed_once_a_generation_in_either_half() -> None:
    model, config, clock = small()
    kept = SMALL.inputs(0)["encoder_hidden_states"]

    def run() -> Tensor:
        for step, clock.t in enumerate(TIMESTEPS):
            last = model(**{**step_of(SMALL, clock.t, step, False), "encoder_hidden_states": kept})[0]
        return last

    with pab_fx.enable(model, config, inner="eager", step_invariants="check") as pab:
        outputs = []
        for by in (1.0, 1.5, 1.5):
            model.patch_embed.text_proj.weight.data.mul_(by)  # leaves no trace
            outputs.append(run())
            once = pab.report().once
        assert once.computed == 6  # once for each half in each generation
        assert once.taken == 3 * STEPS - 6
    assert not torch.equal(outputs[0], outputs[1])


@slow
@lowerings
@pytest.mark.parametrize("is_distilled", [False, True])
def test_inductor_rounds_otherwise_and_does_the_same(lowering: str, is_distilled: bool) -> None:
    model, config, clock = small(is_guidance_distilled=is_distilled)
    expected, plain = (trajectory(SMALL, each, clock, is_distilled) for each in (hooked(model, config), model))
    with pab_fx.enable(model, config, lowering=lowering) as pab:
        for _ in range(2):
            found = trajectory(SMALL, model, clock, is_distilled)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert pab.report().reused > 0
    assert max(float((a[0] - b[0]).abs().max()) for a, b in zip(expected, plain, strict=True)) > 1e-2


@slow
@lowerings
def test_smaller_caches_change_little(lowering: str) -> None:
    model, config, clock = small()
    expected = trajectory(SMALL, hooked(model, config), clock)
    with pab_fx.enable(model, config, inner="eager", lowering=lowering, cache_dtype="int8"):
        found = trajectory(SMALL, model, clock)
    assert not are_equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------- users


def test_it_takes_over_from_enable_cache_and_gives_back() -> None:
    model, config, clock = small()
    expected = trajectory(SMALL, hooked(model, config), clock)
    model.enable_cache(config)
    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        assert are_equal(trajectory(SMALL, model, clock), expected)
        assert pab.report().reused > 0
        assert ">uncond<" in pab.report().html()
    assert model._cache_config is config
    model._reset_stateful_cache()
    assert are_equal(trajectory(SMALL, model, clock), expected)


@slow
def test_warmup_compiles_what_both_halves_need() -> None:
    model, config, clock = small()
    expected = trajectory(SMALL, hooked(model, config), clock)
    with pab_fx.enable(model, config, inner="eager", timesteps=TIMESTEPS) as pab:
        trajectory(SMALL, model, clock, steps=3)
        pab.warmup()
        graphs = pab.report().graphs
        assert are_equal(trajectory(SMALL, model, clock), expected)
        assert pab.report().graphs == graphs


def without(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: each for name, each in {**given, **changes}.items() if each is not None}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], tuple[Sequence[Any], dict[str, Any]]], str]] = {
    "odd": (
        lambda given: ((), {name: each[:1] if isinstance(each, Tensor) else each for name, each in given.items()}),
        r"hidden_states of shape \[1, 3, 4, 8, 8\], which has no uncond.*is_guidance_distilled=True",
    ),
    "no dimension": (
        lambda given: ((), {**given, "timestep": given["timestep"][0]}),
        r"timestep of shape \[\], which has no uncond.*_unconditional_conditional_input_kwargs_identifiers",
    ),
    "a number": (lambda given: ((), {**given, "timestep": 500}), "timestep = 500, which has no uncond"),
    "by position": (
        lambda given: ((given["hidden_states"], given["encoder_hidden_states"][:1]), {"timestep": given["timestep"]}),
        r"encoder_hidden_states of shape \[1, 7, 16\], which has no uncond.*pass other tensors by name",
    ),
    "all by position": (
        lambda given: ((given["hidden_states"], given["encoder_hidden_states"], given["timestep"]), {}),
        "without any of the keyword arguments encoder_hidden_states, hidden_states, timestep",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_that_cannot_be_halved_is_refused_before_anything_runs(name: str) -> None:
    model, config, clock = small()
    change, match = REFUSED[name]
    clock.t = TIMESTEPS[0]
    args, kwargs = change(step_of(SMALL, clock.t, 0, False))
    with pab_fx.enable(model, config, inner="eager") as pab:
        with pytest.raises(ValueError, match=match):
            model(*args, **kwargs)
        assert pab.backend.captured == []


def test_a_pipeline_without_guidance_is_refused_before_anything_runs() -> None:
    """Of two prompts none is the unconditional half of the other."""
    entry = pipelines.BY_NAME["CogVideoXPipeline"]
    pipe, config = entry.build(), hooks.FasterCacheConfig(tensor_format="BFCHW")
    given = {name: torch.cat([each, each]) for name, each in entry.call().items() if name.endswith("prompt_embeds")}
    with pab_fx.enable(pipe, config, inner="eager") as pab:
        with pytest.raises(ValueError, match=r"CogVideoXPipeline runs without.*is_guidance_distilled=True"):
            pipelines.run(pipe, entry, guidance_scale=1.0, **given)
        assert pab.backend.captured == []


@slow
def test_tensors_by_position_are_halved_too() -> None:
    model, config, clock = small()
    with_hooks = hooked(model, config)
    with pab_fx.enable(model, config, inner="eager"):
        for step, clock.t in enumerate(TIMESTEPS):
            given = step_of(SMALL, clock.t, step, False)
            first = given.pop("hidden_states")
            assert are_equal([tensors(model(first, **given))], [tensors(with_hooks(first, **given))])


def test_an_argument_that_is_not_named_and_has_both_halves_is_noticed() -> None:
    entry, clock = zoo.BY_NAME["DiTTransformer2DModel"], zoo.Clock()
    model = entry.build()
    names = ("hidden_states", "timestep")  # and class_labels
    config = config_of(entry, model, clock, _unconditional_conditional_input_kwargs_identifiers=names)
    with (
        pab_fx.enable(model, config, inner="eager"),
        pytest.raises(RuntimeError, match=r"returned 2 predictions in place of 1: another argument.*Add its name"),
    ):
        trajectory(entry, model, clock)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        pytest.param(
            "FluxTransformer2DModel", {}, r"shape \[2, 16, 4\], which is not tensor_format='BCHW'", marks=slow
        ),
        pytest.param("CogVideoXTransformer3DModel", {"tensor_format": "BCHW"}, "", marks=slow),
        ("AuraFlowTransformer2DModel", {"tensor_format": "BFCHW"}, r"not tensor_format='BFCHW'.*one of BCFHW"),
    ],
)
def test_a_prediction_of_another_format_is_refused(name: str, fields: dict[str, Any], match: str) -> None:
    entry, clock = zoo.BY_NAME[name].of_one_block(), zoo.Clock()
    model = entry.build()
    config = config_of(entry, model, clock, **fields)
    with (
        pab_fx.enable(model, config, inner="eager"),
        pytest.raises(RuntimeError, match=match) if match else contextlib.nullcontext(),
    ):
        trajectory(entry, model, clock, steps=1)


def test_only_enable_halves_a_batch_and_only_alone() -> None:
    config, policy = hooks.FasterCacheConfig(), pab_fx.Policy(pab_fx.Attentions(), pab_fx.Every(2))
    for use in (
        pab_fx.PABBackend,
        lambda config: pab_fx.export(SMALL.build(), SMALL.step(900.0, 0), config),
        lambda config: pab_fx.rewrite(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), config),
    ):
        with pytest.raises(ValueError, match=r"alone, to pab_fx\.enable\(model, config\)"):
            use(config)
    with pytest.raises(ValueError, match="pass it alone"):
        pab_fx.enable(SMALL.build(), [config, policy], inner="eager")
    model = SMALL.build()
    with (
        pab_fx.enable(model, [config], inner="eager") as pab,
        pytest.raises(ValueError, match=r"disable\(\) and enable"),
    ):
        pab.set_config(policy)
    distilled = hooks.FasterCacheConfig(is_guidance_distilled=True)
    with pytest.raises(ValueError, match=r"scalars\.weight"):
        pab_fx.export(SMALL.build(), SMALL.step(900.0, 0), distilled, timesteps=TIMESTEPS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spatial_attention_block_skip_range", 0),
        ("unconditional_batch_skip_range", 2.5),
        ("unconditional_batch_timestep_skip_range", (641, -1)),
        ("alpha_low_frequency", "much"),
        ("attention_weight_callback", 0.5),
        ("tensor_format", "BSC"),
        ("is_guidance_distilled", None),
        ("_unconditional_conditional_input_kwargs_identifiers", "hidden_states"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(field: str, value: Any) -> None:
    config = hooks.FasterCacheConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        pab_fx.enable(torch.nn.Linear(2, 2), config)


def test_a_callback_that_returns_no_number_is_named() -> None:
    model, config, clock = small(attention_weight_callback=lambda _: "much")
    with (
        pab_fx.enable(model, config, inner="eager"),
        pytest.raises(RuntimeError, match="attention_weight_callback returned 'much' for a Attention"),
    ):
        trajectory(SMALL, model, clock)


def test_for_training_the_whole_batch_is_called() -> None:
    model, config, clock = small()
    model.requires_grad_(True)
    with torch.enable_grad(), pab_fx.enable(model, config, inner="eager") as pab:
        found = trajectory(SMALL, model, clock, steps=4)
        assert any("gradients" in each for each in pab.report().warnings)
    assert are_equal(found, trajectory(SMALL, SMALL.build(), clock, steps=4))
