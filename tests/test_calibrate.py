"""Calibration: what is measured, predicted, searched, verified, written, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import prompted
from typer.testing import CliRunner

import pab_fx
from pab_fx import PABConfig
from pab_fx.calibrate import Budget, Calibration
from pab_fx.calibrate.changes import ModuleChanges, mean_changes
from pab_fx.calibrate.files import Folder
from pab_fx.calibrate.prediction import CostModel, ErrorModel, ages, scales, share_of_step
from pab_fx.calibrate.run import warn_of_timing
from pab_fx.calibrate.samples import Difference, batches_of
from pab_fx.calibrate.search import front, next_try, undominated
from pab_fx.calibrate.settings import (
    Group,
    Option,
    at_own_timesteps,
    config_of,
    graphs_of,
    groups_of,
    options_of,
    reused_modules,
    rule_of,
    segments_of,
    window,
)
from pab_fx.calibrate.sketch import Sketcher
from pab_fx.calibrate.trials import Trials
from pab_fx.cli import app
from pab_fx.demo import CAPTIONS, load_pipeline
from pab_fx.policy.config import PRESETS
from pab_fx.policy.when import reused_calls
from pab_fx.policy.where import ATTENTION_ROLES, MLP

TIMESTEPS = tuple(float(t) for t in range(999, -1, -50))  # 20 steps
ATTENTIONS = {"spatial": "blocks.{}.attn1", "cross": "blocks.{}.attn2", "mlp": "blocks.{}.ff"}


def measured(role: str, block: int, change: float = 0.1, timesteps: Sequence[float] = TIMESTEPS) -> ModuleChanges:
    """An attention or feed-forward that changes by as much in each step, and all in one direction."""
    by_lag = tuple(tuple(change * lag for lag in range(1, min(i, 11) + 1)) for i in range(len(timesteps)))
    return ModuleChanges(ATTENTIONS[role].format(block), role, tuple(timesteps), by_lag)


MODULES = tuple(measured(role, block, 0.1 * (block + 1)) for role in ATTENTIONS for block in range(2))


# ------------------------------------------------------------------------------------------ what is measured


@given(seed=st.integers(0, 1000), count=st.sampled_from([10, 5000, 123_457]))
@settings(max_examples=15, deadline=None)
def test_a_sketch_keeps_distances_and_inner_products(seed: int, count: int) -> None:
    a, b = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
    sketch = Sketcher()
    x, y = sketch(a), sketch(b)
    assert len(x) <= 4096
    assert float((x - y).norm() / (a - b).norm()) == pytest.approx(1, abs=0.08)
    assert float(x @ y) == pytest.approx(float(a @ b), abs=0.1 * float(a.norm() * b.norm()))


def test_a_sketch_is_linear_so_that_small_changes_are_seen() -> None:
    a = torch.randn(100_000)
    sketch = Sketcher()
    change = float((sketch(a * 1.001) - sketch(a)).norm() / sketch(a).norm())
    assert change == pytest.approx(0.001, rel=0.01)


class Loop:
    """A loop of one's own around a small transformer: two blocks of attention and feed-forward."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv, self.to_out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
            return self.to_out(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Loop.Attention()
            self.ff = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(x)
            return x + self.ff(x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Loop.Block(), Loop.Block()])

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = x * (1 + timestep / 1000)
            for block in self.blocks:
                x = block(x)
            return x

    def __init__(self, steps: int = 12) -> None:
        torch.manual_seed(0)
        self.model = Loop.Model().eval().requires_grad_(False)
        self.timesteps = torch.linspace(950, 50, steps)
        self.calls = 0

    def __call__(self, model: Any, prompt: str, seed: int) -> torch.Tensor:
        self.calls += 1
        x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed + len(prompt)))
        for t in self.timesteps:
            x = x - 0.05 * model(x, t)
        return x


def test_measured_changes_are_those_of_the_outputs() -> None:
    loop, outputs = Loop(), []
    (batch,) = batches_of(["a prompt"], seed=3, size=1)
    with Trials(loop.model, loop, {}, PABConfig(), "eager") as trials:
        samples, changes = trials.observe(batch, lags=3)
    assert {(each.name, each.role) for each in changes} == {
        (f"blocks.{i}.{name}", role) for i in range(2) for name, role in (("attn", "spatial"), ("ff", "mlp"))
    }
    handle = loop.model.blocks[1].attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    plain = loop(loop.model, "a prompt", 3)
    handle.remove()
    np.testing.assert_allclose(samples[0], plain.numpy(), rtol=1e-6)
    found = next(each for each in changes if each.name == "blocks.1.attn")
    assert found.timesteps == pytest.approx(loop.timesteps.tolist())
    for i in range(1, len(outputs)):
        for lag in range(1, min(i, 3) + 1):
            expected = float((outputs[i] - outputs[i - lag]).norm() / outputs[i].norm())
            assert found.at(i, lag) == pytest.approx(expected, rel=1e-3)


def test_a_trial_generates_what_an_enabled_model_does_and_captures_once() -> None:
    loop = Loop()
    (batch,) = batches_of(["a prompt"], seed=3, size=1)
    configs = [
        PABConfig(spatial_attention_block_skip_range=2),
        PABConfig(spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(300, 960)),
        PABConfig(mlp={"timesteps": [float(t) for t in loop.timesteps[::3]], "skip_count": 2}),
    ]
    with Trials(loop.model, loop, {}, PABConfig(), "eager") as trials:
        found = [trials.run(config, batch)[0][0] for config in [None, *configs, None]]
        assert trials._pab is not None
        assert len(trials._pab.backend.graphs) == 1
    expected = [loop(loop.model, "a prompt", 3).numpy()]
    for config in configs:
        torch.compiler.reset()
        with torch.no_grad(), pab_fx.enable(loop.model, config, inner="eager", timesteps=loop.timesteps) as pab:
            expected.append(loop(loop.model, "a prompt", 3).numpy())
            assert pab.report().reused > 0
    for a, b in zip(found, [*expected, expected[0]], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(np.array_equal(each, expected[0]) for each in expected[1:])


def test_branches_of_guidance_and_prompts_are_averaged_and_partial_ones_left_out() -> None:
    full, other, partial = (
        measured("spatial", 0, 0.1),
        measured("spatial", 0, 0.3),
        measured("spatial", 0, 0.5, TIMESTEPS[5:10]),
    )
    (found,) = mean_changes([full, partial, other])
    assert found.timesteps == TIMESTEPS
    assert found.at(4, 1) == pytest.approx(0.2)


# ----------------------------------------------------------------------------------------- what there is to choose


@given(steps=st.integers(3, 60), count=st.integers(1, 8))
def test_segments_cover_every_step_but_the_first_once(steps: int, count: int) -> None:
    found = segments_of(steps, count)
    assert [step for begin, end in found for step in range(begin, end)] == list(range(1, steps))
    assert all(end - begin >= 2 for begin, end in found)
    assert len(found) <= count


@given(data=st.data(), last=st.sampled_from([0.0, 1.0, 19.0]))
def test_a_window_holds_exactly_its_steps(data: st.DataObject, last: float) -> None:
    timesteps = tuple(last + 0.7 * i for i in range(30, -1, -1))
    begin = data.draw(st.integers(1, 29))
    end = data.draw(st.integers(begin + 1, 31))
    low, high = window(timesteps, begin, end)
    assert [low < t < high for t in timesteps] == [begin <= i < end for i in range(31)]


@given(data=st.data(), layer_groups=st.integers(1, 3))
@settings(deadline=None)
def test_the_config_of_a_setting_reuses_in_the_steps_of_its_options(data: st.DataObject, layer_groups: int) -> None:
    groups = groups_of(MODULES, layer_groups)
    segments = segments_of(len(TIMESTEPS), 3)
    setting = tuple(data.draw(st.sampled_from(options_of(group, (2, 3, 5), segments))) for group in groups)
    if not any(setting):
        return
    config = config_of(groups, setting, PABConfig())
    reuses = reused_modules(config, MODULES)
    for group, option in zip(groups, setting, strict=True):
        for module in group.modules:
            assert reuses[module] == group.reuses(option)
    assert graphs_of(config, MODULES) == len(set(zip(*reuses.values(), strict=True)))


def test_layers_are_grouped_by_how_much_they_change_and_feed_forwards_by_their_block() -> None:
    groups = groups_of(MODULES, layer_groups=2)
    assert [group.label for group in groups] == [f"{role} {i} of 2" for role in ATTENTIONS for i in (1, 2)]
    calm, restless = groups[4], groups[5]
    option = Option(2, 0, 1000)
    config = config_of(groups, (option, None, None, None, option, None), PABConfig())
    assert rule_of(config, "spatial", "blocks.0.attn1") is not None
    assert rule_of(config, "spatial", "blocks.1.attn1") is None
    assert config.mlp[0].blocks == (0,)
    assert (calm.names, restless.names) == ({"blocks.0.ff"}, {"blocks.1.ff"})


def test_feed_forward_timesteps_of_a_preset_are_moved_to_those_of_the_generation() -> None:
    config = at_own_timesteps(PABConfig.preset("latte"), TIMESTEPS)
    assert set(config.mlp[0].timesteps) <= set(TIMESTEPS)
    assert any(reused_modules(config, MODULES)[MODULES[-1]])
    assert not any(reused_modules(PABConfig.preset("latte"), MODULES)[MODULES[-1]])


def test_models_that_take_turns_are_one_group_with_a_plan_each() -> None:
    early, late = measured("spatial", 0, 0.1, TIMESTEPS[:8]), measured("spatial", 0, 0.2, TIMESTEPS[8:])
    (group,) = groups_of([late, early])
    assert group.timesteps == TIMESTEPS
    option = Option(2, 0, 1000)
    expected = reused_calls(group.rule(option), TIMESTEPS[:8]) + reused_calls(group.rule(option), TIMESTEPS[8:])
    assert group.reuses(option) == expected
    assert (group.change(3, 1), group.change(9, 1)) == (0.1, 0.2)


# --------------------------------------------------------------------------------------------- what is predicted


def test_ages_count_steps_since_the_last_computed_one() -> None:
    assert ages((False, True, True, False, True)) == (0, 1, 2, 0, 1)


def test_a_probe_predicts_itself_and_older_outputs_count_for_more() -> None:
    group, segments = Group("spatial", "spatial", (MODULES[0],)), segments_of(len(TIMESTEPS), 4)
    second = Option(2, *window(TIMESTEPS, *segments[1]))
    np.testing.assert_allclose(scales(group, second, segments), [0, 1, 0, 0])
    rarely = scales(group, Option(4, 0, 1000), segments)
    assert (rarely > scales(group, Option(2, 0, 1000), segments)).all()
    np.testing.assert_array_equal(scales(group, None, segments), 0)


def test_errors_that_undo_each_other_are_predicted_to() -> None:
    groups = tuple(Group(role, role, (measured(role, 0),)) for role in ("spatial", "cross"))
    segments = segments_of(len(TIMESTEPS), 1)
    vectors = np.array([[1.0, 0.0, 0.5], [-1.0, 0.2, 0.0]])  # what each of the two probes changes
    model = ErrorModel((vectors @ vectors.T)[None], np.array([10.0]), 3, segments, groups)
    option = Option(2, *window(TIMESTEPS, *segments[0]))
    (both,), (one,) = model.differences((option, option)), model.differences((option, None))
    assert both.squared == pytest.approx(float((vectors.sum(0) ** 2).sum()))
    assert both.squared < one.squared


@given(share=st.floats(0.01, 0.9), seed=st.integers(0, 100))
def test_the_share_of_a_step_is_found_on_a_noisy_machine(share: float, seed: int) -> None:
    noise = np.random.default_rng(seed).pareto(3, size=400) + 1
    reuses = [i % 2 == 1 for i in range(400)]
    seconds = [n * (1 - share if reuse else 1) for n, reuse in zip(noise, reuses, strict=True)]
    assert float(np.median(share_of_step(seconds, reuses))) == pytest.approx(share, abs=0.12)


def test_the_speedup_of_a_config_is_that_of_its_setting() -> None:
    groups = groups_of(MODULES)
    costs = CostModel((0.3, 0.1, 0.4), groups)
    setting = (Option(2, 0, 1000), None, Option(3, 0, 1000))
    config = config_of(groups, setting, PABConfig())
    assert costs.speedup(setting) == pytest.approx(costs.speedup_of(reused_modules(config, MODULES)))
    assert costs.speedup(setting) > 1


# ----------------------------------------------------------------------------------------------- what is searched


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Inner products of probes, and options of groups, of which the first reuses nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    groups, parts, options = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    vectors = rng.normal(size=(groups * parts, 5))
    scales_ = [np.vstack([np.zeros(parts), rng.random((options, parts)) * 3]) for _ in range(groups)]
    saved = [np.concatenate([[0.0], rng.random(options) / groups]) for _ in range(groups)]
    return vectors @ vectors.T, scales_, saved


def errors_of(choices: Any, problem: tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]) -> dict[Any, Any]:
    products, scales_, saved = problem
    found = {}
    for choice in choices:
        scale = np.concatenate([each[option] for each, option in zip(scales_, choice, strict=True)])
        found[tuple(choice)] = (
            sum(float(each[option]) for each, option in zip(saved, choice, strict=True)),
            float(scale @ products @ scale),
        )
    return found


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_no_setting_of_the_front_is_beaten_by_another_and_it_begins_with_none(problem: Any) -> None:
    found = front(*problem)
    values = list(errors_of(found, problem).values())
    assert found[0] == tuple(0 for _ in problem[1])
    for (saved, error), (more, worse) in itertools.pairwise(values):
        assert more > saved
        assert worse > error


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_no_choice_for_a_single_group_is_better_than_the_front(problem: Any) -> None:
    every = errors_of(np.ndindex(*(len(each) for each in problem[2])), problem)
    values = list(errors_of(front(*problem), problem).values())
    for choice, (saved, error) in every.items():
        if np.count_nonzero(choice) <= 1:
            assert any(more >= saved - 1e-12 and less <= error + 1e-9 for more, less in values)


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_with_one_group_the_front_is_that_of_all_settings(problem: Any) -> None:
    products, scales_, saved = problem
    alone = (products[: scales_[0].shape[1], : scales_[0].shape[1]], scales_[:1], saved[:1])
    every = errors_of(np.ndindex(len(saved[0])), alone)
    assert front(*alone) == undominated(every)


@given(
    rooms=st.lists(st.floats(-30, 30), min_size=1, max_size=60),
    errors=st.lists(st.floats(-3, 3), min_size=60, max_size=60),
)
def test_tries_end_with_the_fastest_setting_before_one_that_fails(rooms: list[float], errors: list[float]) -> None:
    actual = sorted(rooms, reverse=True)
    predicted = sorted((a + b for a, b in zip(actual, errors, strict=False)), reverse=True)
    tried: dict[int, float] = {}
    for _ in range(len(rooms) + 1):
        i = next_try(predicted, tried)
        if i is None:
            break
        assert i not in tried
        tried[i] = actual[i]
    holding = max((i for i, room in tried.items() if room >= 0), default=-1)
    assert holding == max((i for i, room in enumerate(actual) if room >= 0), default=-1)


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("psnr>=35", Budget(psnr=35.0)),
        (" psnr >= 35.5 dB ", Budget(psnr=35.5)),
        ("relative_l2<=5e-2, psnr>=30", Budget(psnr=30.0, relative_l2=0.05)),
    ],
)
def test_a_budget_is_read_from_text(text: str, expected: Budget) -> None:
    assert Budget.of(text) == expected


@pytest.mark.parametrize(
    "given_", ["psnr<=35", "psnr", "35", "psnr>=35, psnr>=36", "ssim>=0.9", "psnr>=0", "", 35, None]
)
def test_a_bad_budget_is_refused_with_the_forms_there_are(given_: Any) -> None:
    with pytest.raises(ValueError, match=r"psnr"):
        Budget.of(given_)


def differences_of(psnrs: Sequence[float]) -> list[Difference]:
    return [Difference(squared=100 * 10 ** (-psnr / 10), norm=25.0, size=100) for psnr in psnrs]


def test_a_budget_is_kept_with_standard_errors_in_reserve() -> None:
    budget, found = Budget(psnr=35.0), differences_of([34.0, 36.0, 38.0, 36.0])
    error = np.std([34, 36, 38, 36], ddof=1) / 2
    assert budget.room(found) == pytest.approx(1.0)
    assert budget.room(found, margin=1.0) == pytest.approx(1.0 - error)
    assert budget.room(found, margin=2.0) < 0


def test_a_setting_to_be_no_worse_than_is_compared_prompt_by_prompt() -> None:
    """Prompts differ by far more than two settings do; that spread is no uncertainty of which is better."""
    preset, better = differences_of([20.0, 30.0, 40.0]), differences_of([20.5, 30.6, 40.4])
    assert Budget.like(preset).room(better, margin=2.0) > 0
    assert Budget(psnr=30.0).room(better, margin=2.0) < 0
    assert Budget.like(preset).room(preset) == pytest.approx(0)


def test_equal_samples_keep_every_budget() -> None:
    same = [Difference.between(np.ones(3), np.ones(3))] * 2
    assert same[0].psnr() == math.inf
    assert Budget.of("psnr>=99, relative_l2<=1e-6").room(same, margin=2.0) > 0


# -------------------------------------------------------------------------------------------------------- files


def test_a_folder_of_another_calibration_is_refused_with_what_differs(tmp_path: Path) -> None:
    Folder(tmp_path, {"prompts": ["a"], "batch": 1}).save("entry", [1])
    assert Folder(tmp_path, {"prompts": ["a"], "batch": 1}).load("entry") == [1]
    with pytest.raises(ValueError, match=r"another calibration: prompts was \[\"a\"\] and is \[\"b\"\]"):
        Folder(tmp_path, {"prompts": ["b"], "batch": 1})


def test_an_entry_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = Folder(tmp_path, {})
    (folder.entries / "cut.json.part").write_text('{"half')
    (folder.entries / "cut.npy.part").write_bytes(b"half")
    assert folder.load("cut") is None
    assert folder.load_array("cut") is None
    folder.save_array("whole", np.arange(3))
    np.testing.assert_array_equal(folder.load_array("whole"), np.arange(3))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- all of it


PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def found(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("calibration")
    return pab_fx.calibrate(
        loop.model,
        PROMPTS,
        "relative_l2<=0.01",
        generate=loop,
        folder=folder,
        segments=2,
        tries=4,
        rounds=1,
    )


def test_the_proposal_keeps_the_budget_and_reuses_on_prompts_that_were_not_seen(loop: Loop, found: Calibration) -> None:
    config = PABConfig.load(found.folder / "config.json")
    assert config == found.config
    unseen = [(letter * i, 100 + i) for i, letter in enumerate("abcdefgh", start=7)]
    plain = [loop(loop.model, prompt, seed).numpy() for prompt, seed in unseen]
    torch.compiler.reset()
    with torch.no_grad(), pab_fx.enable(loop.model, config, inner="eager", timesteps=loop.timesteps) as pab:
        samples = [loop(loop.model, prompt, seed).numpy() for prompt, seed in unseen]
        assert pab.report().reused > 0
    assert 0 < np.mean([Difference.between(a, b).relative_l2 for a, b in zip(samples, plain, strict=True)]) <= 0.01
    assert found.proposal.speedup > 1
    assert found.proposal.room >= 0
    assert found.measured_speedup is not None


def means(
    model: Any, generate: Any, call: dict[str, Any], config: PABConfig, prompts: Sequence[str]
) -> tuple[float, float]:
    """PSNR and relative L2 of samples from other seeds than a calibration's, means."""
    with Trials(model, generate, call, PABConfig(), "eager") as trials:
        (batch,) = batches_of(prompts, 5000, len(prompts))
        differences = [
            Difference.between(a, b)
            for a, b in zip(trials.run(config, batch)[0], trials.run(None, batch)[0], strict=True)
        ]
    return float(np.mean([each.psnr() for each in differences])), float(np.mean([e.relative_l2 for e in differences]))


def assert_better(found: Calibration, preset: PABConfig, model: Any, generate: Any, call: Any, prompts: Any) -> None:
    """The proposal is as near to the samples without PAB as the preset, by both measures, and faster."""
    (compared,) = found.compared
    assert found.proposal.speedup > compared.speedup > 1
    torch.compiler.reset()
    psnr, relative_l2 = means(model, generate, call, preset, prompts)
    own_psnr, own_relative_l2 = means(model, generate, call, found.config, prompts)
    assert psnr <= own_psnr < 100
    assert 0 < own_relative_l2 <= relative_l2


def test_the_proposal_beats_a_setting_on_prompts_that_calibration_did_not_see(loop: Loop, tmp_path: Path) -> None:
    setting = PABConfig(spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_range=(100, 960))
    given_: Any = {"generate": loop, "folder": tmp_path, "segments": 3, "tries": 6, "rounds": 0}
    found = pab_fx.calibrate(loop.model, PROMPTS, setting, compare={"setting": setting}, **given_)
    assert_better(found, setting, loop.model, loop, {}, [letter * 9 for letter in "abcdefgh"])


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_proposal_beats_every_preset_on_captions_that_calibration_did_not_see(
    name: str, shared_folder: Path
) -> None:
    """As examples/prove_calibration.py, in fewer steps and on fewer captions."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 20}
    pipe.scheduler.set_timesteps(20)
    preset = at_own_timesteps(PABConfig.preset(name), [float(t) for t in pipe.scheduler.timesteps])
    captions = [str(CAPTIONS[i]) for i in np.random.default_rng(0).permutation(len(CAPTIONS))]
    given_: Any = {"call": call, "folder": shared_folder, "batch": 8, "rounds": 0}
    found = pab_fx.calibrate(pipe, captions[:8], preset, compare={name: preset}, **given_)
    assert_better(found, preset, pipe, None, call, captions[8:24])


def test_the_model_is_left_as_it_was(loop: Loop, found: Calibration) -> None:
    assert loop.model._compiled_call_impl is None
    pab_fx.enable(loop.model, inner="eager").disable()


def test_pictures_config_and_results_are_written_and_nothing_is_pickled(found: Calibration) -> None:
    names = {path.name for path in found.folder.iterdir()}
    assert {"config.json", "changes.png", "roles.png", "pareto.png", "entries", "calibration.json"} == names
    assert all((found.folder / name).stat().st_size > 5000 for name in names if name.endswith(".png"))
    for path in (found.folder / "entries").iterdir():
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            json.loads(path.read_text())


def test_what_is_finished_is_not_run_again(loop: Loop, found: Calibration) -> None:
    before = loop.calls
    again = pab_fx.calibrate(
        loop.model,
        PROMPTS,
        "relative_l2<=0.01",
        generate=loop,
        folder=found.folder,
        segments=2,
        tries=4,
        rounds=0,
    )
    assert loop.calls == before
    assert again.config == found.config


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stopping(Loop):
        def __call__(self, model: Any, prompt: str, seed: int) -> torch.Tensor:
            if self.calls == 4:
                self.calls = -100
                raise Stopped
            return super().__call__(model, prompt, seed)

    loop = Stopping(steps=8)
    given_: Any = {"generate": loop, "folder": tmp_path, "segments": 1, "tries": 1, "rounds": 0, "compare": {}}
    with pytest.raises(Stopped):
        pab_fx.calibrate(loop.model, ["a", "bb"], "relative_l2<=0.9", **given_)
    assert loop.model._compiled_call_impl is None
    done = len(list((tmp_path / "entries").glob("*.json")))
    assert done == 4
    pab_fx.calibrate(loop.model, ["a", "bb"], "relative_l2<=0.9", **given_)
    assert loop.calls + 100 == len(list((tmp_path / "entries").glob("*.json"))) - done


def test_a_budget_that_nothing_keeps_is_an_error_that_says_how_near_it_was(loop: Loop, found: Calibration) -> None:
    with pytest.raises(RuntimeError, match=r"no setting keeps the budget, relative L2 <= 1e-09.*relative L2 of"):
        pab_fx.calibrate(
            loop.model,
            PROMPTS,
            "relative_l2<=1e-9",
            generate=loop,
            folder=found.folder,
            segments=2,
            tries=2,
            rounds=0,
        )


def test_a_pipeline_with_two_branches_of_guidance_is_calibrated(tmp_path: Path) -> None:
    pipe = prompted.wan()
    found = pab_fx.calibrate(
        pipe,
        ["a lighthouse", "a mill"],
        "relative_l2<=0.5",
        call={"num_inference_steps": 6, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent"},
        folder=tmp_path,
        segments=1,
        tries=1,
        rounds=0,
        compare={},
    )
    assert {each.role for each in found.changes} == {"spatial", "cross", "mlp"}
    assert found.proposal.speedup > 1
    assert all(each.squared > 0 for each in found.proposal.differences)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "prompts must be a list"),
        ({"prompts": "one prompt"}, "prompts must be a list"),
        ({"generate": None}, "pass generate="),
        ({"generate": 3}, "must be a function"),
        ({"batch": 2}, "one prompt at a time"),
        ({"segments": 0}, "segments must be an integer of at least 1"),
        ({"tries": True}, "tries must be an integer"),
        ({"ranges": [1, 2]}, "ranges must be"),
        ({"margin": -1}, "margin must be a number of at least 0"),
        ({"peak": 0}, "peak must be a number above 0"),
        ({"config": {"layers": None}}, "config must be a PABConfig"),
        ({"compare": {"mine": "latte"}}, r"compare\['mine'\] must be a PABConfig"),
        ({"budget": "quick"}, "budget='quick': cannot read 'quick'"),
        ({"inner": "inductr"}, "not a registered Dynamo backend"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    loop = Loop()
    given_: dict[str, Any] = {"prompts": ["a"], "budget": "psnr>=30", "generate": loop, "folder": tmp_path / "new"}
    given_ |= changed
    with pytest.raises(ValueError, match=message):
        pab_fx.calibrate(loop.model, given_.pop("prompts"), given_.pop("budget"), **given_)
    assert loop.calls == 0
    assert not (tmp_path / "new").exists()


def test_timesteps_on_another_scale_are_refused_with_what_to_set(tmp_path: Path) -> None:
    loop = Loop()
    loop.timesteps = loop.timesteps / 1000
    with pytest.raises(ValueError, match="current_timestep_callback"):
        pab_fx.calibrate(loop.model, ["a"], "psnr>=30", generate=loop, folder=tmp_path)


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_calibrates_writes_and_prints(tmp_path: Path) -> None:
    arguments = ["calibrate", "psnr>=15", "--count", "2", "--batch", "2", "--steps", "4", "--segments", "1"]
    arguments += ["--tries", "1", "--rounds", "0", "--margin", "0", "-o", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "found.json")])
    assert shown.exit_code == 0, shown.output
    numbers = json.loads((tmp_path / "found.json").read_text())
    assert numbers["proposal"]["psnr"] >= 15
    assert PABConfig.load(tmp_path / "out" / "config.json") != PABConfig()
    assert len(numbers["windows"]) == 1
    assert {role: len(each) for role, each in numbers["probes"].items()} == dict.fromkeys((*ATTENTION_ROLES, MLP), 1)
    for word in ("proposal", "latte", "PSNR", "speed-up", "config.json"):
        assert word in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick"], "budget='quick': cannot read 'quick'"),
        (["psnr>=30", "--pipeline", "somewhere/else"], "--prompts is missing"),
        (["psnr>=30", "--call", "height"], "NAME=VALUE"),
        (["psnr>=30", "--dtype", "half-float"], "none of torch's"),
        (["psnr>=30", "--json", "no/such/folder/x.json"], "no folder"),
        (["psnr>=30", "--inner", "inductr"], "not a registered Dynamo backend"),
    ],
)
def test_a_bad_option_of_the_command_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["calibrate", *arguments, "-o", str(tmp_path / "out")])
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.split())


def test_an_interrupted_command_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pab_fx, "calibrate", interrupted)
    shown = CliRunner().invoke(app, ["calibrate", "psnr>=40", "-o", str(tmp_path / "out")])
    assert shown.exit_code == 130
    assert "the same command goes on from there" in shown.output


@pytest.mark.parametrize(("pipeline", "threads"), [("demo", 1), ("folder", 2)])
def test_the_demos_model_is_calibrated_on_one_thread(
    pipeline: str, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pipeline: Callable[[Path], None]
) -> None:
    """Another one on as many as there are."""
    seen = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    tiny_pipeline(tmp_path / "folder")
    (tmp_path / "prompts").write_text("a red circle moving left")
    monkeypatch.setattr(pab_fx, "calibrate", interrupted)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    try:
        CliRunner().invoke(app, ["calibrate", "psnr>=40", "--pipeline", pipeline, "--prompts", "prompts"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [threads]


@pytest.mark.parametrize(("measured", "is_far"), [(None, False), (1.0, False), (0.7, True), (21.0, True)])
def test_a_proposal_whose_time_is_far_from_predicted_is_warned_of(measured: float | None, is_far: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_timing(1.2, measured)
    assert [("Was the machine busy?" in str(each.message)) for each in caught] == [True] * is_far


def test_arguments_that_a_pipeline_does_not_take_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'guidance_scal', which ClipPipeline does not take. Did you mean"):
        pab_fx.calibrate(load_pipeline(), ["a"], "psnr>=30", call={"guidance_scal": 2.0}, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_calibration_that_failed_before_anything_was_finished_leaves_its_folder_free(tmp_path: Path) -> None:
    Folder(tmp_path, {"call": "one"})
    folder = Folder(tmp_path, {"call": "other"})
    folder.save("reference", {})
    with pytest.raises(ValueError, match="call was"):
        Folder(tmp_path, {"call": "one"})
