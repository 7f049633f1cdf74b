"""Quality as numbers: the metrics, and the command that writes docs/quality.md."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pab_fx.demo import CAPTIONS, draw
from pab_fx.policy.config import PRESETS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import measure_quality  # noqa: E402
from measure_quality import METRICS  # noqa: E402

PAGE = (ROOT / "docs/quality.md").read_text()
METRIC = {metric.name: metric for metric in METRICS}


def clip() -> np.ndarray:
    return draw(CAPTIONS[0], np.random.default_rng(0)) / 2 + 0.5


def test_a_clip_does_not_differ_from_itself() -> None:
    found = {metric.name: metric.measure(clip(), clip()) for metric in METRICS if metric.name != "PSNR, dB"}
    assert found == {"SSIM": 1.0, "NRMSE": 0.0, "CIEDE2000": 0.0, "motion NRMSE": 0.0}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_tells_more_change_from_less(metric: measure_quality.Metric) -> None:
    noise = np.random.default_rng(1).standard_normal(clip().shape)
    less, more = (metric.measure(clip(), np.clip(clip() + scale * noise, 0, 1)) for scale in (0.01, 0.05))
    assert (more < less) == metric.more_is_nearer
    assert more != less


def test_a_brighter_clip_moves_as_before_and_a_stopped_one_does_not() -> None:
    motion = METRIC["motion NRMSE"].measure
    assert motion(clip(), clip() + 0.1) < 1e-6
    assert motion(clip(), np.repeat(clip()[:1], len(clip()), axis=0)) == pytest.approx(1)


def test_the_worst_is_the_lowest_psnr_and_the_highest_error() -> None:
    values = list(range(101))
    assert [METRIC["PSNR, dB"].worst(values, share) for share in (0.0, 0.05)] == [0, 5]
    assert [METRIC["NRMSE"].worst(values, share) for share in (0.0, 0.05)] == [100, 95]


@pytest.mark.slow
def test_the_command_writes_tables_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {option: tmp_path / name for option, name in (("json", "a.json"), ("picture", "a.png"), ("update", "a.md"))}
    paths["update"].write_text(PAGE)
    options = [text for option, path in paths.items() for text in (f"--{option}", str(path))]
    measure_quality.main(["--captions", "2", "--steps", "8", *options])
    printed = capsys.readouterr().out.strip()
    assert printed in paths["update"].read_text()
    assert paths["update"].read_text().startswith(PAGE[: PAGE.index("<!-- quality -->")])
    found = {each["config"]: each for each in json.loads(paths["json"].read_text())}
    assert list(found) == [line.split(" | ")[0].strip("| ") for line in printed.split("\n\n")[0].splitlines()[2:]]
    reused = {name: each["reused"]["attentions"] for name, each in found.items()}
    assert reused["without a cache"] == reused["without a cache, 4 steps"] == 0
    assert 0 < found["latte"]["operations"] < found["cogvideox"]["operations"] < 1
    assert found["without a cache, 4 steps"]["operations"] == 0.5
    assert 0 < reused["default"] <= reused["cogvideox"] < reused["latte"] < 1
    assert found["latte"]["reused"]["feed-forwards"] > 0
    assert all(15 < found[name]["metrics"]["PSNR, dB"]["mean"] < 90 for name in ("default", *PRESETS))
    assert Image.open(paths["picture"]).width > 900


@pytest.mark.slow
def test_the_command_writes_the_table_of_forecasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.md"
    path.write_text(PAGE)
    measure_quality.main(["--table", "forecasts", "--captions", "1", "--steps", "8", "--update", str(path)])
    printed = capsys.readouterr().out.strip()
    assert printed in path.read_text()
    assert len(printed.splitlines()) == 2 + len(PRESETS) + 2


@pytest.mark.slow
def test_a_part_of_the_second_model_is_measured_against_no_cache() -> None:
    way = measure_quality.Way
    model = measure_quality.Policy(measure_quality.Model(), measure_quality.Every(2), measure_quality.Residual())

    def ways(pipe: object, steps: int) -> list[measure_quality.Way]:
        return [way("without a cache", None, steps), way("model", model, steps)]

    captions = measure_quality.MODELS["pictures"].CAPTIONS[:1]
    without, cached = measure_quality.measure(ways, captions, steps=6, batch=1, seed=0, model="pictures")
    assert list(without.right) == ["first", "relation", "second", "all three"]
    assert without.clips.shape == cached.clips.shape == (1, 1, 32, 32, 3)
    assert 0 < cached.reused["attentions"] < 1
    assert list(cached.metrics) == [metric.name for metric in METRICS if metric.frames == 1]
    assert 10 < cached.metrics["PSNR, dB"][0] < 60


def test_the_page_has_every_part_of_the_second_model() -> None:
    written = PAGE[PAGE.index("<!-- pictures parts -->") : PAGE.index("<!-- /pictures parts -->")]
    rows = re.findall(r"^\| (\w[\w-]*), 1 step of ", written, re.MULTILINE)
    assert set(rows) == set(measure_quality.PARTS_OF_MODEL)
    assert (
        "measure_quality.py --table parts --captions 8 --model pictures --intervals 2 3 --update docs/quality.md"
        in PAGE
    )


def test_the_page_has_every_preset_as_kept_and_as_forecasts() -> None:
    written = PAGE[PAGE.index("<!-- forecasts -->") : PAGE.index("<!-- /forecasts -->")]
    rows = re.findall(r"^\| ([\w, -]+?) \|", written, re.MULTILINE)
    assert {"default", *PRESETS, "every attention, every 3rd step"} <= set(rows)
    assert "measure_quality.py --table forecasts" in PAGE


@pytest.mark.parametrize("model", measure_quality.MODELS)
def test_the_page_has_every_method_on_both_models_and_the_command_that_makes_it(model: str) -> None:
    mark = "quality" if model == "clips" else f"{model} quality"
    written = PAGE[PAGE.index(f"<!-- {mark} -->") : PAGE.index(f"<!-- /{mark} -->")]
    rows = re.findall(r"^\| ([\w -]+?) \|", written, re.MULTILINE)
    assert {"default", *PRESETS, "TaylorSeer", "MagCache", "first block", "EasyCache"} <= set(rows)
    assert "calibrated: " in written
    assert " of 96 |" in written
    picture = " --picture docs/quality.png" if model == "clips" else ""
    chosen = "" if model == "clips" else f" --model {model}"
    assert f"measure_quality.py{chosen} --calibrated runs/{model}/*.json{picture} --update docs/quality.md" in PAGE
    assert (ROOT / "docs/quality.png").is_file()
