"""The migration guide's code runs, and what is the same before and after is what the guide says is the same."""

from __future__ import annotations

import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
import zoo
from pages import blocks, stand_in
from pipelines import prompted
from pipelines.oracle import hooked_run, observed

import pab_fx

BLOCKS = {
    str(block.of("code")): block.code for block in (*blocks("docs/migrating.md"), *blocks("docs/migrating_others.md"))
}
ROLES = ("spatial", "temporal", "cross", "mlp")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checkpoints are tiny and `enable` is bitwise: nothing else about the guide's code changes."""
    stand_in(monkeypatch, tmp_path)


def run_block(name: str, **names: Any) -> dict[str, Any]:
    """The names that a block of the guide leaves, begun with `names`."""
    exec(compile(BLOCKS[name], f"migrating.md, {name}", "exec"), names)
    return names


def latents(pipe: Any, **kwargs: Any) -> torch.Tensor:
    """Of one generation, as they are before a VAE rounds them to pixels."""
    kwargs = {"num_inference_steps": 20, "generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe("a panda", output_type="latent", return_dict=False, **kwargs)[0]


class Counts:
    """How many calls of each role the handle `names["pab"]` has reused, step by step; none before there is one."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names, self._before = names, dict.fromkeys(ROLES, 0)
        self.steps: dict[str, list[int]] = {role: [] for role in ROLES}

    def step(self, _: Any = None) -> None:
        """To be called after each step."""
        roles = self._names["pab"].report().roles if "pab" in self._names else ()
        now = {**self._before, **{role.role: role.reused for role in roles}}
        for role, counts in self.steps.items():
            counts.append(now[role] - self._before[role])
        self._before = now

    @property
    def reuses(self) -> dict[str, list[bool]]:
        return {role: [count > 0 for count in counts] for role, counts in self.steps.items()}


def counted(name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Counts]:
    """The names that a block leaves, whose `from_pretrained` yields `pipe`, and the counts of its generations."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in BLOCKS[name]:
            monkeypatch.setattr(cls, "from_pretrained", lambda *args, **kwargs: pipe)
    names: dict[str, Any] = {}
    counts = Counts(names)
    with observed(pipe, counts.step):
        exec(compile(BLOCKS[name], f"migrating.md, {name}", "exec"), names)
    return names, counts


def test_no_block_is_left_untested() -> None:
    """By its name, or among the names that a test is given."""
    named = re.findall(r'(?:run_block|counted)\("(.*?)"|\("(\w+, after)", "[\d.]+"\)', Path(__file__).read_text())
    assert {first or second for first, second in named} == set(BLOCKS)


# ---------------------------------------------------------------------------------------------------------- hooks


def hooks_on(pipe: Any) -> int:
    return len(zoo.hooked_modules(pipe.transformer))


class CutOff(Exception):
    """Ends a generation early."""


def cut_off(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
    if step == 10:
        raise CutOff
    return kwargs


def test_hooks_before_and_after_make_the_same_picture_but_for_what_a_generation_that_was_cut_off_leaves() -> None:
    before, after = run_block("hooks, before"), run_block("hooks, after")
    assert hooks_on(before["pipe"])
    assert not hooks_on(after["pipe"])
    assert np.array_equal(np.stack(before["video"]), np.stack(after["video"]))
    expected = latents(before["pipe"])
    assert torch.equal(latents(after["pipe"]), expected)
    assert after["pab"].report().reused > 0
    assert not torch.equal(latents(prompted.cogvideox()), expected)
    same = {}
    for name, pipe in (("before", before["pipe"]), ("after", after["pipe"])):
        with pytest.raises(CutOff):
            latents(pipe, callback_on_step_end=cut_off)
        same[name] = torch.equal(latents(pipe), expected)
    assert same == {"before": False, "after": True}


def test_hooks_are_taken_over_and_put_back() -> None:
    before = run_block("hooks, before")
    expected = latents(before["pipe"])
    pipe = prompted.cogvideox()
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    pab = run_block("hooks, taken over", pipe=pipe, config=config, pab_fx=pab_fx)["pab"]
    assert not hooks_on(pipe)
    assert torch.equal(latents(pipe), expected)
    assert pab.report().reused > 0
    pab.disable()
    assert hooks_on(pipe)
    assert torch.equal(latents(pipe), expected)


def test_taylorseer_before_and_after_make_the_same_picture() -> None:
    after, before = run_block("taylorseer, after"), prompted.cogvideox()
    expected = latents(before)
    before.transformer.enable_cache(after["config"])
    hooked = latents(before)
    assert torch.equal(latents(after["pipe"]), hooked)
    assert after["pab"].report().reused > 0
    assert not torch.equal(hooked, expected)


def test_magcache_before_and_after_make_the_same_picture() -> None:
    after, before = run_block("magcache, after"), prompted.flux()
    expected = latents(before, num_inference_steps=28)
    config = diffusers.MagCacheConfig(mag_ratios=after["FLUX_MAG_RATIOS"], num_inference_steps=28)
    before.transformer.enable_cache(config)
    hooked = latents(before, num_inference_steps=28)
    assert torch.equal(latents(after["pipe"], num_inference_steps=28), hooked)
    assert after["pab"].report().reused > 0
    assert not torch.equal(hooked, expected)
    after["pab"].disable()
    measured = run_block("magcache, measured", pipe=after["pipe"], pab_fx=pab_fx, diffusers=diffusers)
    latents(after["pipe"], num_inference_steps=28)
    assert len(measured["ratios"]) == 28
    assert measured["pab"].report().reused > 0


def test_fastercache_makes_the_same_picture_as_the_hooks() -> None:
    after = run_block("fastercache, after")
    pipe = prompted.cogvideox()
    expected = latents(pipe)
    config = replace(after["config"], current_timestep_callback=lambda: pipe.current_timestep)
    pipe.transformer.enable_cache(config)
    hooked = latents(pipe)
    assert torch.equal(latents(after["pipe"]), hooked)
    assert {role.role for role in after["pab"].report().roles if role.reused} == {"spatial", "uncond"}
    assert not torch.equal(hooked, expected)


def test_branches_of_guidance_are_kept_apart() -> None:
    """The hooks give the second branch what the first has computed; with a hooked model for each, all is well."""
    entry = pipelines.BY_NAME["WanPipeline"]

    def config_of(clock: Any) -> Any:
        return zoo.diffusers_config(clock, ranges=(2, None, None), window=(100, 900))

    apart, plain = hooked_run(entry, config_of), pipelines.run(entry.build(), entry)
    hooked, pipe = entry.build(), entry.build()
    hooked.transformer.enable_cache(config_of(lambda: hooked.current_timestep))
    with pab_fx.enable(pipe, config_of(None)):
        output = pipelines.run(pipe, entry)
    assert torch.equal(output, apart)
    shared = pipelines.run(hooked, entry)
    assert not torch.equal(shared, apart)
    assert (apart - plain).norm() < (shared - plain).norm()


def test_hooks_are_compiled_again_and_again_and_pab_is_captured_once() -> None:
    captured: list[Any] = []

    def count(gm: torch.fx.GraphModule, example_inputs: Any = None) -> torch.fx.GraphModule:
        captured.append(gm)
        return gm

    pipe = run_block("hooks, before")["pipe"]
    pipe.transformer.compile(backend=count)
    latents(pipe)
    by_hooks = len(captured)
    captured.clear()
    torch.compiler.reset()  # the limit of recompiles, which is used up, is the class's
    pipe = prompted.cogvideox()
    with pab_fx.enable(pipe, passes=[count]) as pab:
        latents(pipe)
        assert pab.report().reused > 0
    assert by_hooks >= 8
    assert len(captured) == 1


# ------------------------------------------------------------------------------------------------------- videosys


@dataclass
class StandIn:
    """The fields of VideoSys' `PABConfig`."""

    spatial_broadcast: bool = False
    spatial_threshold: Any = None
    spatial_range: Any = None
    temporal_broadcast: bool = False
    temporal_threshold: Any = None
    temporal_range: Any = None
    cross_broadcast: bool = False
    cross_threshold: Any = None
    cross_range: Any = None
    mlp_broadcast: bool = False
    mlp_spatial_broadcast_config: Any = None
    mlp_temporal_broadcast_config: Any = None

    def reuses(self, timesteps: Sequence[float], block: int) -> dict[str, list[bool]]:
        """For each role, in which steps VideoSys reuses in a block of that number."""
        found, whole = {}, [int(t) for t in timesteps]
        for role in ROLES[:3]:
            on, every = getattr(self, f"{role}_broadcast"), getattr(self, f"{role}_range")
            low, high = getattr(self, f"{role}_threshold") or (0, 0)
            found[role] = [bool(on and n % every and low < t < high) for n, t in enumerate(whole)]
        return {**found, "mlp": [self._reuses_mlp(whole, t, block) for t in whole]}

    def _reuses_mlp(self, whole: list[int], t: int, block: int) -> bool:
        entries = self.mlp_spatial_broadcast_config
        attends = self.spatial_broadcast or self.temporal_broadcast or self.cross_broadcast
        if not (self.mlp_broadcast and attends) or (t in entries and block in entries[t]["block"]):
            return False
        for key in filter(whole.__contains__, entries):
            first = whole.index(key)
            if t in whole[first : first + 1 + entries[key]["skip_count"]]:
                return block in entries[key]["block"]
        return False


def _defaults(window: list[int], ranges: tuple[int, int, int], keys: Sequence[int] = ()) -> dict[str, Any]:
    """Fields of the role configs of VideoSys' pipelines."""
    fields: dict[str, Any] = {}
    for role, every in zip(ROLES[:3], ranges, strict=True):
        if every:
            fields |= {f"{role}_broadcast": True, f"{role}_threshold": window, f"{role}_range": every}
    if keys:
        entries = {key: {"block": [0, 1, 2, 3, 4], "skip_count": 2} for key in keys}
        fields |= {
            "mlp_broadcast": True,
            "mlp_spatial_broadcast_config": entries,
            "mlp_temporal_broadcast_config": dict(entries),
        }
    return fields


DEFAULTS = {
    "CogVideoXPABConfig": _defaults([100, 850], (2, 0, 0)),
    "LattePABConfig": _defaults([100, 800], (2, 3, 6), (720, 640, 560, 480, 400)),
    "OpenSoraPABConfig": _defaults([450, 930], (2, 4, 6), (676, 788, 864)),
}


@pytest.fixture
def videosys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with VideoSys' names, whose engine makes no video, but says in which steps each role reuses."""
    module: Any = ModuleType("videosys")
    for name, defaults in DEFAULTS.items():
        setattr(module, name, lambda defaults=defaults, **given: StandIn(**{**defaults, **given}))
    module.LatteConfig = lambda checkpoint, enable_pab=False, pab_config=None: SimpleNamespace(
        pab_config=pab_config if enable_pab else StandIn()
    )

    class VideoSysEngine:
        def __init__(self, config: Any) -> None:
            self.config = config.pab_config

        def generate(self, prompt: str, guidance_scale: float, num_inference_steps: int) -> Any:
            scheduler = diffusers.DDIMScheduler(clip_sample=False)
            scheduler.set_timesteps(num_inference_steps)
            return SimpleNamespace(video=[self.config.reuses(scheduler.timesteps.tolist(), block=0)])

    module.VideoSysEngine = VideoSysEngine
    monkeypatch.setitem(sys.modules, "videosys", module)
    return module


def test_videosys_before_and_after_reuse_in_the_same_steps(videosys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_block("videosys, before")["video"]
    assert all(any(steps) for steps in expected.values())
    names, counts = counted("videosys, after", prompted.latte(), monkeypatch)
    assert counts.reuses == expected
    assert len(names["video"]) == 3
    roles = {role.role: role.modules for role in names["pab"].report().roles}
    assert roles["mlp"] == roles["spatial"] + roles["temporal"]


@pytest.mark.parametrize(
    ("preset", "old"),
    [("cogvideox", "CogVideoXPABConfig"), ("latte", "LattePABConfig"), ("open-sora", "OpenSoraPABConfig")],
)
def test_presets_are_the_defaults_of_videosys(preset: str, old: str, videosys: Any) -> None:
    """Apart from Open-Sora's feed-forwards."""
    from_videosys = run_block("videosys, any config")["from_videosys"]
    config, expected = from_videosys(getattr(videosys, old)()), pab_fx.PABConfig.preset(preset)

    def kept_after(config: pab_fx.PABConfig) -> set[Any]:
        return {(t, entry.blocks, entry.skip_count) for entry in config.mlp for t in entry.timesteps}

    assert replace(config, mlp=None) == replace(expected, mlp=None)
    assert preset == "open-sora" or kept_after(config) == kept_after(expected)


def random_config(seed: int, timesteps: Sequence[float]) -> StandIn:
    """Any fields of VideoSys, but for spans of `mlp` that overlap."""
    rng = random.Random(seed)
    fields: dict[str, Any] = {"spatial_broadcast": True}
    for role in ROLES[:3]:
        fields.setdefault(f"{role}_broadcast", rng.random() < 0.7)
        fields[f"{role}_threshold"] = sorted(rng.choices([*map(int, timesteps), *range(0, 1000, 50)], k=2))
        fields[f"{role}_range"] = rng.randint(1, 6)
    if rng.random() < 0.8:
        entries = {
            int(timesteps[i]): {"block": rng.choice([[0], [1], [0, 1], [7]]), "skip_count": rng.randint(1, 4)}
            for i in rng.sample(range(0, len(timesteps) - 4, 5), k=3)
        }
        entries[5] = {"block": [0, 1], "skip_count": 1}  # at none of the timesteps
        fields |= {
            "mlp_broadcast": True,
            "mlp_spatial_broadcast_config": entries,
            "mlp_temporal_broadcast_config": entries,
        }
    return StandIn(**fields)


@pytest.mark.parametrize("seed", [pytest.param(i, marks=() if i < 1 else pytest.mark.slow) for i in range(25)])
def test_any_config_of_videosys_reuses_in_the_same_steps_and_blocks(seed: int) -> None:
    from_videosys = run_block("videosys, any config")["from_videosys"]
    pipe = prompted.latte()
    pipe.scheduler.set_timesteps(25)
    timesteps = pipe.scheduler.timesteps.tolist()
    old = random_config(seed, timesteps)
    blocks = [old.reuses(timesteps, block) for block in (0, 1)]
    expected = {
        role: [sum(of_block) * (2 if role == "mlp" else 1) for of_block in zip(*(b[role] for b in blocks), strict=True)]
        for role in ROLES  # a feed-forward in each spatial and in each temporal block
    }
    with pab_fx.enable(pipe, from_videosys(old)) as pab:
        counts = Counts({"pab": pab})
        with observed(pipe, counts.step):
            latents(pipe, num_inference_steps=25)
    assert counts.steps == expected


def test_blocks_of_a_role_that_is_left_alone_neither_warn_nor_have_a_line() -> None:
    """Latte's spatial and temporal blocks are of one class: compiled alone, they share a graph."""
    pipe = prompted.latte()
    with pab_fx.enable(pipe, pab_fx.PABConfig(spatial_attention_block_skip_range=2), regional=True) as pab:
        latents(pipe)
        report = pab.report()
    assert [role.role for role in report.roles] == ["spatial"]
    assert report.roles[0].modules == 2
    assert report.reused > 0
    assert not report.warnings


def test_feed_forwards_that_differ_in_space_and_time_are_refused(videosys: Any) -> None:
    from_videosys = run_block("videosys, any config")["from_videosys"]
    old = videosys.LattePABConfig(mlp_temporal_broadcast_config={720: {"block": [0], "skip_count": 1}})
    with pytest.raises(ValueError, match="one config for the feed-forwards"):
        from_videosys(old)


def test_timesteps_that_are_fractions_are_cut_by_the_callback(videosys: Any) -> None:
    """Open-Sora's, of 30 steps at a ratio of 1.7: the keys of its `mlp` are met once their fractions are cut."""
    timesteps = [1000 * 1.7 * t / (1 + 0.7 * t) for t in (1 - i / 30 for i in range(30))]
    assert not any(t.is_integer() for t in timesteps[1:])
    keys = {int(t): {"block": [0, 1], "skip_count": 2} for t in timesteps[5:20:5]}
    old = videosys.OpenSoraPABConfig(
        mlp_spatial_broadcast_config=keys,
        mlp_temporal_broadcast_config=keys,
        cross_threshold=[int(timesteps[20]), 930],  # the timestep is above this edge, and cut, it is on it
        cross_range=3,
    )
    expected = old.reuses(timesteps, block=0)
    entry, loop = pipelines.BY_NAME["LattePipeline"], SimpleNamespace(timestep=0.0)
    inputs_of = zoo.BY_NAME["LatteTransformer3DModel"].make_inputs

    def OpenSoraPABConfig() -> Any:
        return old

    names = run_block("videosys, any config", OpenSoraPABConfig=OpenSoraPABConfig, loop=loop)
    found = {}
    for name, config in {
        "cut": run_block("videosys, fractions", **names)["config"],
        "whole": names["from_videosys"](old),
    }.items():
        model = entry.build().transformer
        with pab_fx.enable(model, config) as pab:
            counts = Counts({"pab": pab})
            for n, loop.timestep in enumerate(timesteps):
                model(**inputs_of(zoo.Draw(n)), timestep=torch.full((2,), loop.timestep))
                counts.step()
        found[name] = counts.reuses
    assert found["cut"] == expected
    assert any(expected["mlp"])
    assert not any(found["whole"]["mlp"])
    assert found["whole"]["cross"] != expected["cross"]


# ------------------------------------------------------------------------------------------------------ cache-dit


def test_the_settings_for_cache_dit_reuse_in_10_of_28_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    names, counts = counted("cache-dit, after", prompted.flux(), monkeypatch)
    without, reuses = counts.reuses["spatial"][:28], counts.reuses["spatial"][28:]
    assert not any(without)
    assert [n for n, reuse in enumerate(reuses) if reuse] == list(range(9, 28, 2))
    assert names["image"].size == (64, 64)


@pytest.mark.slow
def test_cache_dit_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights change more from step to step, so here the threshold is the median of what is measured."""
    cache_dit = pytest.importorskip("cache_dit")
    made, summaries = prompted.flux(), []
    summary = cache_dit.summary
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *args, **kwargs: made)
    monkeypatch.setattr(cache_dit, "summary", lambda pipe: summaries.extend(summary(pipe)[:1]))
    code = BLOCKS["cache-dit, before"]
    monkeypatch.setitem(BLOCKS, "cache-dit, before", code.replace("0.12", "1e-9"))
    run_block("cache-dit, before")
    threshold = statistics.median(summaries[0].residual_diffs.values())
    monkeypatch.setitem(BLOCKS, "cache-dit, before", code.replace("0.12", str(threshold)))
    before = run_block("cache-dit, before")
    assert [len(each.cached_steps) for each in summaries[:1]] == [0]
    cached = summaries[1].cached_steps
    assert 2 < len(cached) < 10
    plain = latents(prompted.flux())
    assert torch.equal(latents(made), plain)
    code = BLOCKS["cache-dit, the same rule"].replace("0.12", str(threshold))
    code = code.replace("enable(pipe,", 'enable(pipe, inner="eager", config=')
    monkeypatch.setitem(BLOCKS, "cache-dit, the same rule", code)
    assert_decides_as_dbcache(cached, before["image"])
    assert not np.array_equal(before["image"], image_of(prompted.flux()))
    outputs = []
    for pipe in (made, prompted.flux()):  # after cache-dit was there, and on a fresh pipeline
        with pab_fx.enable(pipe) as pab:
            outputs.append(latents(pipe))
            assert pab.report().reused > 0
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain)


def assert_decides_as_dbcache(cached: Sequence[int], image: Any) -> None:
    """That the rule of the page reuses in the same steps, and makes the same picture up to the rounding of pixels."""
    pipe = prompted.flux()
    names = run_block("cache-dit, the same rule", pipe=pipe, pab_fx=pab_fx)
    found = image_of(pipe)
    pab = names["pab"]
    assert pab.report().reused == len(cached)
    pab.disable()
    assert np.abs(np.asarray(found).astype(int) - np.asarray(image).astype(int)).max() <= 1


def image_of(pipe: Any) -> Any:
    """The guide's image without any cache."""
    return pipe("a lighthouse", num_inference_steps=28, generator=torch.Generator().manual_seed(0)).images[0]


def test_a_step_mask_of_cache_dit_computes_in_the_same_steps() -> None:
    pytest.importorskip("cache_dit")
    given = {"pipe": prompted.flux(), "pab_fx": pab_fx, **{name: getattr(pab_fx, name) for name in pab_fx.__all__}}
    names = run_block("cache-dit, step mask", **given)
    latents(names["pipe"], num_inference_steps=28)
    strip = names["pab"].report().schedule.strips[0]
    assert [letter == "C" for letter in strip.steps] == [bool(computes) for computes in names["mask"]]
    assert strip.reused > 0


@pytest.mark.parametrize(
    ("name", "published"), [("teacache, after", "0.4"), ("para_attn, after", "0.08"), ("sglang, after", "0.24")]
)
def test_rules_for_other_packages_reuse(name: str, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that random weights keep to: what was published is for released ones."""
    assert published in BLOCKS[name]
    monkeypatch.setitem(BLOCKS, name, BLOCKS[name].replace(published, "0.9"))
    plain = latents(prompted.flux())
    names = run_block(name, pipe=prompted.flux(), pab_fx=pab_fx)
    pab = names["pab"] if "pab" in names else pab_fx.enable(names["pipe"], names["policy"])
    found = latents(names["pipe"])
    assert pab.report().reused > 0
    assert not torch.equal(found, plain)
