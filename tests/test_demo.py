"""The demo: a trained model from the package, the same clips without and with PAB, and what it says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pab_fx.cli import app
from pab_fx.demo import Caption, recognise, run
from pab_fx.demo.run import Result, compare, run_demo, save_animation


@dataclass
class Run:
    """What the demo found, and how many threads there were in each of its generations and after it, of two."""

    result: Result
    inside: set[int]
    after: int


@pytest.fixture(scope="module")
def ran() -> Run:
    inside, generate = set[int](), run._generate

    def generate_seen(*args: Any) -> Any:
        inside.add(torch.get_num_threads())
        return generate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_generate", generate_seen)
        torch.set_num_threads(2)
        try:
            return Run(run_demo(steps=30, clips=2, rounds=1, seed=703), inside, torch.get_num_threads())
        finally:
            torch.set_num_threads(1)


@pytest.fixture(scope="module")
def result(ran: Run) -> Result:
    return ran.result


def test_clips_show_what_their_captions_say_without_and_with_pab(result: Result) -> None:
    for clips in result.frames:
        assert [recognise(2 * clip - 1) for clip in clips] == [Caption.parse(prompt) for prompt in result.prompts]


def test_every_role_is_reused_and_the_clips_are_near_but_not_the_same(result: Result) -> None:
    assert {role.role for role in result.roles} == {"spatial", "temporal", "cross", "mlp"}
    assert all(0 < role.reused < role.reused + role.computed for role in result.roles)
    assert all(15 < psnr < 90 for psnr in result.psnr)
    assert all(0.5 < ssim < 1 for ssim in result.ssim)
    without, kept, forecast = result.frames
    assert not any(np.array_equal(a, b) for a, b in ((without, kept), (without, forecast), (kept, forecast)))


def test_a_forecast_is_nearer_than_what_was_kept_in_the_same_setting(result: Result) -> None:
    assert result.psnr[0] + 1 < result.psnr[1]
    assert result.ssim[0] < result.ssim[1]


def test_the_demo_runs_on_one_thread_and_leaves_the_number_as_it_was(ran: Run) -> None:
    """Threads of a model this small wait for each other all the time, and for any other process on their cores."""
    assert ran.inside == {1}
    assert ran.after == 2


def test_the_animation_shows_all_frames(result: Result, tmp_path: Path) -> None:
    save_animation(result, tmp_path / "demo.gif")
    frames = imageio.imread(tmp_path / "demo.gif")
    assert len(frames) == result.frames[0].shape[1]
    assert not np.array_equal(frames[0], frames[-1])


def test_the_command_writes_the_animation_and_prints_the_table(tmp_path: Path) -> None:
    path = tmp_path / "clips.gif"
    numbers = tmp_path / "result.json"
    arguments = ["demo", "--steps", "6", "--clips", "1", "--rounds", "1", "--output", str(path), "--json", str(numbers)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert path.stat().st_size > 0
    for word in ("spatial", "temporal", "cross", "speed-up", "as kept", "forecast", "PSNR", "SSIM"):
        assert word in shown.output
    found = json.loads(numbers.read_text())
    assert found["steps"] == 6
    assert {role["role"] for role in found["roles"]} == {"spatial", "temporal", "cross", "mlp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "clips.txt"], ".gif or .mp4"),
        (["--output", "no/such/folder/clips.gif"], "no folder"),
        (["--inner", "inductr"], "not a registered Dynamo backend"),
        (["--lowering", "branch"], "'specialize', 'cond'"),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["demo", *arguments])
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.split())


def test_a_change_of_a_hundredth_is_40_decibels() -> None:
    clips = np.random.default_rng(0).random((1, 2, 16, 16, 3))
    psnr, ssim = compare(clips, np.clip(clips + 0.01, 0, 1))
    assert 39 < psnr < 41
    assert 0.9 < ssim <= 1
