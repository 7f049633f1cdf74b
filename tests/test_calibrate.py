"""Calibration: what is measured, predicted, searched, verified, written, and what is refused."""

from __future__ import annotations

import dataclasses
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
from pab_fx import Attentions, Blocks, Every, Hermite, Last, Model, PABConfig, Policy, Residual, Scalars, Taylor
from pab_fx.calibrate import Budget, Calibration
from pab_fx.calibrate.files import Folder
from pab_fx.calibrate.forecasts import Errors, Forecasts, plans
from pab_fx.calibrate.lists import Shape, best_list, regular
from pab_fx.calibrate.prediction import Costs, Sensitivity, fitted
from pab_fx.calibrate.probes import EFFORTS, probes, stretches
from pab_fx.calibrate.run import warn_of_timing
from pab_fx.calibrate.samples import Difference, batches_of
from pab_fx.calibrate.search import Predictions, Run, fastest, nearest
from pab_fx.calibrate.setting import Method, Part, Setting, kind_of, methods, thinned
from pab_fx.calibrate.sketch import Sketcher
from pab_fx.calibrate.trajectory import Trajectory, pooled, summed
from pab_fx.calibrate.trials import NOTHING, Trials
from pab_fx.cli import app
from pab_fx.demo import CAPTIONS, load_pipeline
from pab_fx.demo.run import demo_config
from pab_fx.policy.when import reused_calls

TIMESTEPS = tuple(float(t) for t in range(999, -1, -50))  # 20 steps


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
        self.calls = self.spent = 0

    def __call__(self, model: Any, prompt: str, seed: int) -> torch.Tensor:
        self.calls += 1
        x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed + len(prompt)))
        for t in self.timesteps:
            x = x - 0.05 * model(x, t)
        return x


def test_what_is_observed_are_products_of_the_outputs_and_changes_follow_from_them() -> None:
    loop, outputs = Loop(), []
    (batch,) = batches_of(["a prompt"], seed=3, size=1)
    with Trials(loop.model, loop, {}, "eager") as trials:
        observed = trials.observe(batch)
    assert {(each.name, each.role) for each in observed.trajectories} == {
        ("model", "model"),
        ("blocks", "blocks"),
        *((f"blocks.{i}.{name}", role) for i in range(2) for name, role in (("attn", "spatial"), ("ff", "mlp"))),
    }
    handle = loop.model.blocks[1].attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    plain = loop(loop.model, "a prompt", 3)
    handle.remove()
    np.testing.assert_allclose(observed.samples[0], plain.numpy(), rtol=1e-6)
    found = next(each for each in observed.trajectories if each.name == "blocks.1.attn")
    assert found.timesteps == pytest.approx(loop.timesteps.tolist())
    flat = torch.stack(outputs).flatten(1).double()
    np.testing.assert_allclose(found.products, flat @ flat.T, rtol=1e-4)
    for i, lag in ((1, 1), (5, 3), (11, 11)):
        expected = float((flat[i] - flat[i - lag]).norm() / flat[i].norm())
        assert found.change(i, lag) == pytest.approx(expected, rel=1e-3)


def test_a_setting_generates_what_an_enabled_model_does_and_lists_share_a_capture() -> None:
    loop = Loop()
    (batch,) = batches_of(["a prompt"], seed=3, size=1)
    method = Method("blocks", (Part(Blocks(), Taylor(1, of=Residual())),))
    settings = [method.policies((0, 1, 4, 7, 10), 12), method.policies((0, 2, 4, 6, 8, 10), 12)]
    with Trials(loop.model, loop, {}, "eager") as trials:
        trials.follow(trials.observe(batch).trajectories)
        graphs = []
        found = []
        for policies in settings:
            found.append(trials.run(policies, batch))
            assert trials._pab is not None
            graphs.append(trials._pab.backend.graphs)
    assert graphs[0] == graphs[1] != []
    plain = loop(loop.model, "a prompt", 3).numpy()
    for policies, ran in zip(settings, found, strict=True):
        torch.compiler.reset()
        with torch.no_grad(), pab_fx.enable(loop.model, policies, inner="eager", timesteps=loop.timesteps) as pab:
            np.testing.assert_array_equal(ran.samples[0], loop(loop.model, "a prompt", 3).numpy())
            assert ran.reused == {"blocks": pab.report().reused}
        assert not np.array_equal(ran.samples[0], plain)


def trajectory(role: str, outputs: np.ndarray, timesteps: Sequence[float] = TIMESTEPS, name: str = "") -> Trajectory:
    return Trajectory(name or role, role, tuple(timesteps), outputs @ outputs.T)


def test_branches_of_guidance_and_prompts_are_summed_and_partial_ones_left_out() -> None:
    one, other = np.ones((20, 3)), np.full((20, 3), 2.0)
    partial = trajectory("spatial", one[:5], TIMESTEPS[:5])
    (found,) = summed([trajectory("spatial", one), trajectory("spatial", other), partial])
    np.testing.assert_allclose(found.products, one @ one.T + other @ other.T)


def test_models_that_take_turns_stay_two() -> None:
    one = np.ones((10, 3))
    found = summed([trajectory("spatial", one, TIMESTEPS[:10]), trajectory("spatial", one, TIMESTEPS[10:])])
    assert len(found) == 2
    assert len(pooled(found)) == 2


# -------------------------------------------------------------------------------------------- what is predicted


def blocks(compute: Sequence[int], how: Any) -> Setting:
    return Setting(Method("blocks", (Part(Blocks(), how),)), tuple(compute), 20)


@st.composite
def lists_of_steps(draw: st.DrawFn, of: int = 20) -> tuple[int, ...]:
    return tuple(sorted({0} | draw(st.sets(st.integers(0, of - 1), min_size=2, max_size=of - 2))))


HOWS = [Residual(), Taylor(1, of=Residual()), Taylor(2, of=Residual()), Hermite(2, of=Residual())]


@given(compute=lists_of_steps(), how=st.sampled_from(HOWS), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_predicted_errors_are_those_of_the_reads(compute: tuple[int, ...], how: Any, seed: int) -> None:
    """The how itself, run over outputs step by step, is off by what the products of the outputs say."""
    outputs = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed)).double()
    plain: Any = Last() if isinstance(how, Residual) else dataclasses.replace(how, of=Last())
    slots: Any = tuple(map(torch.zeros_like, plain.slots((outputs[0],))))
    off, last, filled = torch.zeros(20, 7).double(), 0, 0
    for step, output in enumerate(outputs):
        scalars = Scalars(torch.tensor(float(step - last or 1)), torch.tensor(float(filled)))
        if step in compute:
            slots, last, filled = plain.update(slots, (), (output,), scalars), step, filled + 1
        else:
            off[step] = plain.read(slots, (), scalars)[0] - output
    ((kind, places, products),) = Forecasts([trajectory("blocks", outputs.numpy())]).errors(blocks(compute, how))
    assert (kind, len(places)) == ("blocks", 20)
    expected = (off @ off.T).numpy()
    expected = (expected + np.diag(np.diag(expected))) / 2
    np.testing.assert_allclose(products, expected, atol=1e-3 * max(1.0, np.abs(expected).max()))


@given(settings_=st.lists(lists_of_steps(), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_many_lists_at_once_are_predicted_as_one_by_one(settings_: list[tuple[int, ...]]) -> None:
    part = trajectory("blocks", np.random.default_rng(0).normal(size=(20, 4)))
    several = [blocks(each, Taylor(2, of=Residual())) for each in settings_]
    forecasts = Forecasts([part])
    forecasts.prepare(several)
    for each in several:
        for (_, _, a), (_, _, b) in zip(forecasts.errors(each), Forecasts([part]).errors(each), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@given(compute=lists_of_steps(), thin=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_setting_is_planned_as_its_policies_run(compute: tuple[int, ...], thin: int) -> None:
    """Where blocks reuse, attentions inside of them are neither run nor read."""
    parts = [trajectory("spatial", np.ones((20, 2))), trajectory("blocks", np.ones((20, 2)))]
    method = Method("", (Part(Blocks(), Residual()), Part(Attentions(), Last(), thin)))
    inner, outer = plans(Setting(method, compute, 20), parts)
    assert inner is not None
    assert outer is not None
    first, second = method.policies(compute, 20)
    assert first.when is not None
    assert second.when is not None
    assert outer[1] == reused_calls(first.when, TIMESTEPS)
    assert [step is None for step in inner[1]] == list(outer[1])
    assert tuple(map(bool, inner[1])) == reused_calls(second.when, TIMESTEPS, 1, outer[1])


@given(compute=lists_of_steps(), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_errors_inside_of_what_is_forecast_are_forecast_with_it(compute: tuple[int, ...], seed: int) -> None:
    """Attentions are read inside of blocks that compute; what the blocks then leave is off, and read again."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(20, 5))
    parts = [trajectory("spatial", outputs), trajectory("blocks", np.zeros((20, 5)))]
    method = Method("", (Part(Blocks(), Taylor(1, of=Residual())), Part(Attentions(), Last(), thin=2)))
    kept, off = np.zeros(5), np.zeros((20, 5))
    seen: list[tuple[int, Any]] = []
    for step in range(20):
        if step and step not in compute:  # the blocks are forecast from the last two steps in which they computed
            (before, first), (last, second) = seen[-2:] if len(seen) > 1 else seen * 2
            off[step] = second + (second - first) * (step - last) / max(last - before, 1)
            continue
        reads = bool(step) and step not in thinned(compute, 2)
        kept = kept if reads else outputs[step]
        off[step] = kept - outputs[step]
        seen.append((step, off[step]))
    errors = Forecasts(parts).errors(Setting(method, compute, 20))
    found = next((products for kind, _, products in errors if kind == "attentions"), np.zeros((20, 20)))
    expected = off @ off.T
    np.fill_diagonal(expected, 2 * np.diag(expected))
    np.testing.assert_allclose(found, expected / 2, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_how_much_errors_matter_is_fitted_to_what_was_found() -> None:
    """Errors in late steps count for ten times as much: settings that differ in where they reuse tell it."""
    rng = np.random.default_rng(0)
    part = trajectory("blocks", np.cumsum(rng.normal(size=(20, 200)), 0))
    true = Sensitivity({"blocks": (1.15, -4.0)}, slope=1.5)

    def errors(compute: Sequence[int]) -> Errors:
        return Forecasts([part]).errors(blocks(compute, Residual()))

    seen = [errors([step for step in range(20) if not begin <= step < begin + 4]) for begin in (2, 5, 8, 11, 14, 16)]
    found = fitted([(each, true.psnr(each)) for each in seen])
    other = errors([step for step in range(20) if step % 3 == 0])
    assert found.psnr(other) == pytest.approx(true.psnr(other), abs=2.0)
    assert Sensitivity().psnr(()) == math.inf


def test_errors_of_a_kind_of_which_nothing_is_known_matter_as_those_of_others() -> None:
    part = trajectory("blocks", np.cumsum(np.random.default_rng(0).normal(size=(20, 50)), 0))
    errors = Forecasts([part]).errors(blocks(range(0, 20, 2), Residual()))
    found = fitted([(errors, 40.0)])
    unknown = tuple(("model", places, products) for _, places, products in errors)
    assert Sensitivity().psnr(unknown) < 30
    assert found.psnr(unknown) == pytest.approx(40.0, abs=1.0)


@given(compute=lists_of_steps(), kept=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_predicted_operations_are_those_that_are_counted(compute: tuple[int, ...], kept: float) -> None:
    costs = Costs({"blocks": kept, "spatial": kept / 2}, {"blocks": 20, "spatial": 40})
    parts = [trajectory("blocks", np.ones((20, 1))), trajectory("spatial", np.ones((20, 1)))]
    assert costs.predicted(blocks(compute, Residual()), parts) == pytest.approx(
        costs.left({"blocks": 20 - len(compute)})
    )


# --------------------------------------------------------------------------------------------- what is searched


@given(
    count=st.integers(2, 49),
    shape=st.builds(Shape, st.integers(1, 6), st.integers(0, 2), st.floats(-2, 2), st.floats(-2, 2)),
)
@settings(max_examples=50, deadline=None)
def test_a_shape_has_as_many_steps_as_asked_for_or_none(count: int, shape: Shape) -> None:
    found = shape.steps(count, 50)
    if found is not None:
        assert len(set(found)) == count
        assert found == tuple(sorted(found))
        assert set(found) <= set(range(50))
        assert set(range(shape.warmup)) <= set(found)


@pytest.mark.parametrize("count", [5, 14, 25])
def test_the_best_list_is_no_worse_than_any_regular_one(count: int) -> None:
    target = np.random.default_rng(count).random(50)

    def errors(lists: Sequence[tuple[int, ...]]) -> list[float]:
        return [float(sum(target[step] for step in each)) for each in lists]

    found = best_list(count, 50, errors)
    assert found is not None
    assert len(found) == count
    assert all(errors([found]) <= errors([each]) for each in regular(50).get(count, ()))


def test_methods_are_those_that_the_model_has_parts_for() -> None:
    labels = {method.label for method in methods({"spatial", "mlp", "blocks", "model"})}
    assert {"blocks, order 1", "model, as kept", "attentions and feed-forwards, Hermite, order 2"} <= labels
    assert {method.label.split(",")[0] for method in methods({"spatial"})} == {"attentions"}
    assert methods(set()) == ()


@pytest.fixture(scope="module")
def forecasts() -> Forecasts:
    """Of a model whose blocks drift, with attentions inside that do so too."""
    drift = np.cumsum(np.cumsum(np.random.default_rng(1).normal(size=(20, 30)), 0), 0)
    return Forecasts([trajectory("blocks", drift), trajectory("spatial", drift[:, ::-1])])


@pytest.fixture
def predictions(forecasts: Forecasts) -> Predictions:
    costs = Costs({"blocks": 0.9, "spatial": 0.3}, {"blocks": 20, "spatial": 20})
    return Predictions(forecasts, costs, 20, Sensitivity())


AVAILABLE = methods({"blocks", "spatial"})[:4]


def searched(
    forecasts: Forecasts, predictions: Predictions, limit: float, bias: float
) -> tuple[dict[Setting, float], list[Run]]:
    """What is tried where samples are nearer than predicted by so many dB, after a probe."""
    tried: dict[Setting, float] = {}
    probe = probes({"blocks"}, 20, EFFORTS["low"])[0]
    psnr = predictions.psnr(probe) + bias
    runs = [Run("", forecasts.errors(probe), predictions.operations(probe), psnr, psnr - limit)]
    while (setting := fastest(predictions, AVAILABLE, 20, runs, tried)) is not None:
        assert setting not in tried
        psnr = predictions.psnr(setting) + bias
        tried[setting] = psnr - limit
        errors = forecasts.errors(setting)
        runs.append(Run(setting.method.label, errors, predictions.operations(setting), psnr, psnr - limit))
    return tried, runs


@pytest.mark.parametrize("bias", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("limit", [-50.0, -40.0, -30.0])
def test_the_search_ends_with_the_fastest_setting_that_keeps_the_budget(
    forecasts: Forecasts, predictions: Predictions, limit: float, bias: float
) -> None:
    """Against all lengths of all methods, whose best lists are tried; fewer are."""
    tried, _ = searched(forecasts, predictions, limit, bias)
    every = [s for method in AVAILABLE for count in range(2, 20) if (s := predictions.best(method, count))]
    keeping = [predictions.operations(each) for each in every if predictions.psnr(each) + bias >= limit]
    assert keeping
    best = min(predictions.operations(each) for each, room in tried.items() if room >= 0)
    assert (
        best <= min(keeping) + 0.9 / 20
    )  # by bisection: a longer list may be the farther one, and then a step is lost
    assert len(tried) < len(every) / 2


def test_what_is_tried_next_saves_operations_beyond_the_best_that_is_known(
    forecasts: Forecasts, predictions: Predictions
) -> None:
    tried, runs = searched(forecasts, predictions, -40.0, 0.0)
    best = min((each for each, room in tried.items() if room >= 0), key=predictions.operations)
    without = {each: room for each, room in tried.items() if room < 0}
    assert fastest(predictions, AVAILABLE, 20, runs, tried) is None
    assert fastest(predictions, AVAILABLE, 20, runs, without) is not None
    slower = {**without, max(tried, key=predictions.operations): 1.0}
    further = fastest(predictions, AVAILABLE, 20, runs, slower)
    assert further is not None
    assert predictions.operations(further) < max(map(predictions.operations, tried))
    assert predictions.operations(best) <= predictions.operations(further)


def test_for_a_speed_up_the_nearest_setting_is_looked_for(predictions: Predictions) -> None:
    available = methods({"blocks", "spatial"})
    setting = nearest(predictions, available, 20, 0.5, [], {})
    assert setting is not None
    assert predictions.operations(setting) <= 0.5
    other = nearest(predictions, available, 20, 0.5, [], {setting: -math.inf})
    assert other is not None
    assert sum(predictions.room(other, [])) <= sum(predictions.room(setting, []))


@pytest.mark.parametrize("effort", EFFORTS)
def test_each_probe_reuses_one_kind_of_part_in_one_stretch_of_steps(effort: str) -> None:
    found = probes({"spatial", "mlp", "blocks", "model"}, 20, EFFORTS[effort])
    assert len(found) == EFFORTS[effort].kinds * EFFORTS[effort].stretches
    assert len(found) < EFFORTS[effort].generations / 2
    parts = [trajectory(role, np.ones((20, 1))) for role in ("blocks", "model", "spatial", "mlp")]
    for setting in found:
        reusing = {part.role: each[1] for part, each in zip(parts, plans(setting, parts), strict=True) if each}
        assert len({kind_of(role) for role in reusing}) == 1
        steps = {step for plan in reusing.values() for step, reuse in enumerate(plan) if reuse}
        assert any(steps <= set(range(*stretch)) for stretch in stretches(20, EFFORTS[effort].stretches))
        assert steps


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("psnr>=35", Budget(psnr=35.0)),
        (" psnr >= 35.5 dB ", Budget(psnr=35.5)),
        ("relative_l2<=5e-2, psnr>=30", Budget(psnr=30.0, relative_l2=0.05)),
        ("speedup>=2.5x", Budget(speedup=2.5)),
    ],
)
def test_a_budget_is_read_from_text(text: str, expected: Budget) -> None:
    assert Budget.of(text) == expected


@pytest.mark.parametrize(
    "given_",
    ["psnr<=35", "psnr", "35", "psnr>=35, psnr>=36", "ssim>=0.9", "psnr>=0", "speedup>=1", "speedup>=2, psnr>=40", ""],
)
def test_a_bad_budget_is_refused_with_the_forms_there_are(given_: Any) -> None:
    with pytest.raises(ValueError, match=r"psnr|speedup must be above 1"):
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


def test_a_folder_of_something_else_is_refused_and_nothing_written_into_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("of years")
    with pytest.raises(ValueError, match="holds something else than a calibration"):
        Folder(tmp_path, {"batch": 1})
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


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
    return Loop(steps=20)


def calibrated(loop: Loop, folder: Path, **changed: Any) -> Calibration:
    """With little effort, compared with two settings, and timed once."""
    given_: dict[str, Any] = {"budget": "relative_l2<=0.01", "generate": loop, "folder": folder, "effort": "low"}
    compare = {"every 2nd": PABConfig(), "blocks": Policy(Blocks(), Every(2), Residual())}
    return pab_fx.calibrate(loop.model, PROMPTS, **{**given_, "compare": compare, "rounds": 1, **changed})


@pytest.fixture(scope="module")
def found(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    before = loop.calls
    result = calibrated(loop, tmp_path_factory.mktemp("calibration"))
    loop.spent = loop.calls - before
    return result


def test_the_proposal_keeps_the_budget_and_reuses_on_prompts_that_were_not_seen(loop: Loop, found: Calibration) -> None:
    policies = pab_fx.load_policies(found.folder / "policies.json")
    assert policies == found.policies
    unseen = [(letter * i, 100 + i) for i, letter in enumerate("abcdefgh", start=7)]
    plain = [loop(loop.model, prompt, seed).numpy() for prompt, seed in unseen]
    torch.compiler.reset()
    with torch.no_grad(), pab_fx.enable(loop.model, policies, inner="eager", timesteps=loop.timesteps) as pab:
        samples = [loop(loop.model, prompt, seed).numpy() for prompt, seed in unseen]
        assert pab.report().reused > 0
    assert 0 < np.mean([Difference.between(a, b).relative_l2 for a, b in zip(samples, plain, strict=True)]) <= 0.01
    assert found.proposal.speedup > 1
    assert found.measured_speedup is not None
    chosen = next(each for each in found.tried if each.held is found.proposal)
    assert chosen.room >= 0
    assert chosen.searched is found.searched
    assert found.lost == pytest.approx(found.searched.psnr() - found.proposal.psnr())
    assert [each.label for each in found.compared] == ["every 2nd", "blocks"]
    assert all(each.operations < 1 for each in found.compared)


def test_parts_that_are_left_out_are_not_proposed(loop: Loop, found: Calibration) -> None:
    only = calibrated(loop, found.folder, parts=["model"], rounds=0)
    assert {type(policy.where) for each in only.tried for policy in each.searched.config} == {Model}


def test_a_signal_is_tried_and_proposed_only_where_it_beats_the_best_list(tmp_path: Path) -> None:
    loop = Loop(steps=12)
    found = pab_fx.calibrate(
        loop.model,
        ["a", "bb"],
        "relative_l2<=0.02",
        generate=loop,
        folder=tmp_path,
        rounds=0,
        parts=["blocks"],
        margin=0,
    )
    by_signal = [each for each in found.tried if "threshold" in each.searched.label]
    assert len(by_signal) == EFFORTS["medium"].thresholds
    assert any(each.searched.operations < 1 for each in by_signal)
    keeping = [each for each in found.tried if each.held is not None and each.room >= 0]
    assert found.proposal.operations == min(each.searched.operations for each in keeping)


def test_the_prompts_held_out_decide_and_are_not_searched_with(loop: Loop, found: Calibration) -> None:
    assert len(found.proposal.differences) == len(found.searched.differences) == len(PROMPTS) // 2
    assert set(found.proposal.differences).isdisjoint(found.searched.differences)
    keeping = [each for each in found.tried if each.held is not None and each.room >= 0]
    assert found.proposal.operations == min(each.searched.operations for each in keeping)
    for each in found.tried:
        if each.held is not None:
            budget = Budget.of("relative_l2<=0.01")
            assert each.room == pytest.approx(budget.room(each.held.differences, margin=2.0))


def test_no_more_is_generated_than_was_told(loop: Loop, found: Calibration) -> None:
    """15 generations of each prompt, of which some are for the timing and for what it is compared with."""
    assert len(found.tried) > 1
    assert loop.spent <= 15 * len(PROMPTS)


def test_a_setting_to_be_no_worse_than_is_beaten_on_prompts_that_were_not_seen(loop: Loop, tmp_path: Path) -> None:
    setting = PABConfig(spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_range=(100, 960))
    given_: Any = {"generate": loop, "folder": tmp_path, "effort": "low", "rounds": 0}
    found = pab_fx.calibrate(loop.model, PROMPTS, setting, compare={"setting": setting}, **given_)
    (compared,) = found.compared
    assert found.proposal.operations < compared.operations < 1
    (batch,) = batches_of([letter * 9 for letter in "abcdefgh"], 5000, 8)
    batches = batches_of(batch.prompts, 5000, 1)
    with Trials(loop.model, loop, {}, "eager") as trials:
        trials.timesteps = tuple(map(float, loop.timesteps))
        plain = [loop(loop.model, each.prompts[0], each.seeds[0]).numpy() for each in batches]
        psnrs = [
            np.mean(
                [Difference.between(trials.run(c, b).samples[0], p).psnr() for b, p in zip(batches, plain, strict=True)]
            )
            for c in (setting, found.policies)
        ]
    assert psnrs[0] <= psnrs[1] < 100


def test_for_a_speed_up_the_nearest_setting_that_is_so_fast_is_proposed(loop: Loop, found: Calibration) -> None:
    fast = calibrated(loop, found.folder, budget="speedup>=2", rounds=0)
    held = [each.held for each in fast.tried if each.held is not None]
    assert len(held) > 1
    assert fast.proposal.speedup >= 2
    assert fast.proposal.psnr() == max(each.psnr() for each in held if each.speedup >= 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogvideox", "latte", "open-sora"])
def test_the_proposal_beats_every_preset_on_captions_that_calibration_did_not_see(name: str, tmp_path: Path) -> None:
    """As examples/prove_calibration.py, in fewer steps and on fewer captions."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 20}
    pipe.scheduler.set_timesteps(20)
    timesteps = [float(t) for t in pipe.scheduler.timesteps]
    preset = demo_config(timesteps) if name == "latte" else PABConfig.preset(name)
    captions = [str(CAPTIONS[i]) for i in np.random.default_rng(0).permutation(len(CAPTIONS))]
    given_: Any = {"call": call, "folder": tmp_path, "batch": 8, "rounds": 0, "effort": "low"}
    found = pab_fx.calibrate(pipe, captions[:16], preset, compare={name: preset}, **given_)
    (compared,) = found.compared
    assert found.proposal.operations < compared.operations < 1
    (batch,) = batches_of(captions[16:24], 5000, 8)
    with Trials(pipe, None, call, "eager") as trials, torch.no_grad():
        plain = trials.run(NOTHING, batch).samples
        psnrs = [
            np.mean([Difference.between(a, b).psnr() for a, b in zip(trials.run(c, batch).samples, plain, strict=True)])
            for c in (preset, found.policies)
        ]
    assert psnrs[0] <= psnrs[1] < 100


def test_the_model_is_left_as_it_was(loop: Loop, found: Calibration) -> None:
    assert loop.model._compiled_call_impl is None
    pab_fx.enable(loop.model, inner="eager").disable()


def test_where_nothing_is_asked_for_no_alarm_is_raised_that_nothing_is_reused(loop: Loop) -> None:
    """The timing's generations without a cache go by such policies."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pab_fx.enable(loop.model, NOTHING, inner="eager") as pab:
            loop(loop.model, "a", 0)
    assert pab.report().reused == 0
    with (
        pytest.warns(UserWarning, match="matches none of the"),
        pab_fx.enable(loop.model, Policy(Attentions(("cross",)), Every(2)), inner="eager"),
    ):
        loop(loop.model, "a", 0)


def test_pictures_policies_and_results_are_written_and_nothing_is_pickled(found: Calibration) -> None:
    names = {path.name for path in found.folder.iterdir()}
    assert {"policies.json", "changes.png", "roles.png", "front.png", "entries", "calibration.json"} == names
    assert all((found.folder / name).stat().st_size > 5000 for name in names if name.endswith(".png"))
    for path in (found.folder / "entries").iterdir():
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            json.loads(path.read_text())
    json.dumps(found.as_json())


def test_what_is_finished_is_not_run_again(loop: Loop, found: Calibration) -> None:
    before = loop.calls
    again = calibrated(loop, found.folder)
    assert loop.calls == before + 2  # the timing of the first prompt
    assert again.policies == found.policies


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
    given_: Any = {"generate": loop, "folder": tmp_path, "effort": "low", "rounds": 0}
    with pytest.raises(Stopped):
        pab_fx.calibrate(loop.model, ["a", "bb"], "relative_l2<=0.9", **given_)
    assert loop.model._compiled_call_impl is None
    done = len(list((tmp_path / "entries").glob("*.json")))
    assert done == 4
    pab_fx.calibrate(loop.model, ["a", "bb"], "relative_l2<=0.9", **given_)
    assert loop.calls + 100 == len(list((tmp_path / "entries").glob("*.json"))) - done


def test_a_budget_that_nothing_keeps_is_an_error_that_says_how_near_it_was(loop: Loop, found: Calibration) -> None:
    with pytest.raises(RuntimeError, match=r"no setting (keeps|is expected to keep) the budget, relative L2 <= 1e-12"):
        calibrated(loop, found.folder, budget="relative_l2<=1e-12", rounds=0)
    with pytest.raises(RuntimeError, match=r"no setting leaves out so many operations, .*: ask for less"):
        calibrated(loop, found.folder, budget="speedup>=1000000", rounds=0)


def test_a_pipeline_with_two_branches_of_guidance_is_calibrated(tmp_path: Path) -> None:
    pipe = prompted.wan()
    found = pab_fx.calibrate(
        pipe,
        ["a lighthouse", "a mill"],
        "relative_l2<=0.5",
        call={"num_inference_steps": 6, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent"},
        folder=tmp_path,
        effort="low",
        rounds=0,
    )
    assert {each.role for each in found.trajectories} == {"spatial", "cross", "mlp", "blocks", "model"}
    assert found.proposal.speedup > 1
    assert all(each.squared > 0 for each in found.proposal.differences)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "prompts must be a list"),
        ({"prompts": ["one"]}, "two at least"),
        ({"prompts": "one prompt"}, "prompts must be a list"),
        ({"prompts": ["a", "b", "a"]}, "prompts has 'a' twice"),
        ({"generate": None}, "pass generate="),
        ({"generate": 3}, "must be a function"),
        ({"batch": 2}, "one prompt at a time"),
        ({"parts": "blocks"}, "parts must be of attentions, blocks, model"),
        ({"parts": ["mlp"]}, "parts must be of attentions, blocks, model"),
        ({"effort": "much"}, "effort must be one of low, medium, high"),
        ({"rounds": True}, "rounds must be an integer"),
        ({"margin": -1}, "margin must be a number of at least 0"),
        ({"peak": 0}, "peak must be a number above 0"),
        ({"compare": {"mine": "latte"}}, r"compare\['mine'\]"),
        ({"budget": "quick"}, "budget='quick': cannot read 'quick'"),
        ({"budget": 35}, "budget"),
        ({"inner": "inductr"}, "not a registered Dynamo backend"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    loop = Loop()
    given_: dict[str, Any] = {"prompts": ["a", "b"], "budget": "psnr>=30", "generate": loop, "folder": tmp_path / "new"}
    given_ |= changed
    with pytest.raises(ValueError, match=message):
        pab_fx.calibrate(loop.model, given_.pop("prompts"), given_.pop("budget"), **given_)
    assert loop.calls == 0
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_calibrates_writes_and_prints(tmp_path: Path) -> None:
    arguments = ["calibrate", "psnr>=15", "--count", "2", "--steps", "6", "--effort", "low", "--compare", "cogvideox"]
    arguments += ["--rounds", "0", "--margin", "0", "-o", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "found.json")])
    assert shown.exit_code == 0, shown.output
    numbers = json.loads((tmp_path / "found.json").read_text())
    assert numbers["proposal"]["psnr"] >= 15
    assert len(pab_fx.load_policies(tmp_path / "out" / "policies.json")) == len(numbers["policies"])
    for word in ("proposal", "cogvideox", "PSNR", "speed-up", "policies.json", "generations of each of 2 prompts"):
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
    (tmp_path / "prompts").write_text("a red circle moving left\na blue cross moving up")
    monkeypatch.setattr(pab_fx, "calibrate", interrupted)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    try:
        CliRunner().invoke(app, ["calibrate", "psnr>=40", "--pipeline", pipeline, "--prompts", "prompts"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [threads]


@pytest.mark.parametrize(("measured", "is_far"), [(None, False), (1.5, False), (1.0, True)])
def test_a_proposal_that_saves_much_less_time_than_operations_is_warned_of(
    measured: float | None, is_far: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_timing(2.0, measured)
    assert [("Was the machine busy" in str(each.message)) for each in caught] == [True] * is_far


@pytest.mark.parametrize("given_", [{"prompt": "a red circle"}, {"generator": None}])
def test_what_calibrate_gives_a_pipeline_itself_is_refused_in_call(given_: dict[str, Any], tmp_path: Path) -> None:
    """Noise of one's own would not be the same with and without a cache."""
    with pytest.raises(ValueError, match="which calibrate gives"):
        pab_fx.calibrate(load_pipeline(), ["a", "b"], "psnr>=30", call=given_, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_arguments_that_a_pipeline_does_not_take_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'guidance_scal', which ClipPipeline does not take. Did you mean"):
        pab_fx.calibrate(load_pipeline(), ["a", "b"], "psnr>=30", call={"guidance_scal": 2.0}, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_calibration_that_failed_before_anything_was_finished_leaves_its_folder_free(tmp_path: Path) -> None:
    Folder(tmp_path, {"call": "one"})
    folder = Folder(tmp_path, {"call": "other"})
    folder.save("reference", {})
    with pytest.raises(ValueError, match="call was"):
        Folder(tmp_path, {"call": "one"})
