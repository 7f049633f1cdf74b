"""The scripts for released checkpoints run, with tiny components in place of the checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import prompted

import pab_fx
from pab_fx.bench.caches import CACHES
from pab_fx.bench.models import model_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SMALL = ["--height", "64", "--width", "64", "--steps", "8"]
SCRIPTS: dict[str, tuple[Any, Any, str, list[str]]] = {
    "cogvideox": (diffusers.CogVideoXPipeline, prompted.cogvideox, "out.gif", [*SMALL, "--frames", "9"]),
    "wan": (diffusers.WanPipeline, prompted.wan, "out.gif", [*SMALL, "--frames", "9"]),
    "flux": (diffusers.FluxPipeline, prompted.flux, "out.png", SMALL),
}
scripts = pytest.mark.parametrize("name", SCRIPTS)


def run_script(name: str, folder: Path, *options: str, **replaced: Any) -> np.ndarray:
    """The pixels that a script writes, of all frames."""
    _, _, output, sizes = SCRIPTS[name]
    path = folder / output
    arguments = ["--output", str(path), *sizes, "--inner", "eager", *options]
    importlib.import_module(name).main(arguments, **replaced)
    with Image.open(path) as image:
        frames = []
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGB")))
    path.unlink()
    return np.stack(frames)


@scripts
@pytest.mark.parametrize("how", [[], pytest.param(["--regional"], marks=pytest.mark.slow)], ids=["whole", "regional"])
def test_a_script_loads_generates_and_writes(
    name: str, how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, make, output, _ = SCRIPTS[name]
    asked: list[tuple[str, Any]] = []

    def from_pretrained(checkpoint: str, **kwargs: Any) -> Any:
        asked.append((checkpoint, kwargs["torch_dtype"]))
        return make()

    monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda *args, **kwargs: None)
    with_pab = run_script(name, tmp_path, *how)
    printed = capsys.readouterr().out
    assert len(with_pab) == (1 if output.endswith("png") else 9)
    assert asked == [(asked[0][0], torch.bfloat16)]
    assert printed.count("seconds") == 2
    reused = {
        line.split()[0]: int(line.split()[3])
        for line in printed.splitlines()
        if line.startswith(("spat", "cro")) and line.split()[3].isdigit()  # of the table, not of the schedule below
    }
    assert set(reused) == ({"spatial", "cross"} if name == "wan" else {"spatial"})
    assert all(reused.values())
    assert f"written: {tmp_path / output}" in printed

    without = run_script(name, tmp_path, *how, "--no-pab", "--rounds", "1")
    printed = capsys.readouterr().out
    assert (printed.count("seconds"), printed.count("reused")) == (1, 0)
    assert with_pab.shape == without.shape
    assert not np.array_equal(with_pab, without)


@scripts
@pytest.mark.slow
def test_a_script_compiles_with_inductor(name: str, tmp_path: Path) -> None:
    """As it does by default; the pipeline comes from a `load` of one's own."""
    outputs = [
        run_script(name, tmp_path, "--inner", inner, "--rounds", "1", load=lambda _: SCRIPTS[name][1]())
        for inner in ("eager", "inductor")
    ]
    assert np.abs(outputs[0].astype(int) - outputs[1]).mean() < 1


def test_prompt_and_seed_reach_the_pipeline(tmp_path: Path) -> None:
    options = ["--regional", "--rounds", "1", "--prompt", "a lighthouse"]
    images = [
        run_script("flux", tmp_path, *options, *more, load=lambda _: prompted.flux(layers=1))
        for more in ([], ["--seed", "1"], ["--prompt", "a mill"])
    ]
    same = [np.array_equal(images[0], image) for image in images]
    assert same == [True, False, False]


@pytest.mark.parametrize("name", ["cogvideox", "flux"])
def test_bytes_are_counted_as_they_are_kept(name: str) -> None:
    """On the meta device without running a step, against what the caches hold in a run."""
    measure, model, cpu = importlib.import_module("measure_kept"), model_of(name, "quick"), torch.device("cpu")
    gm = measure.captured(model.build(measure.META), model.inputs((700.0,), measure.META)[0])
    network, (inputs,) = model.build(cpu), model.inputs((700.0,), cpu)
    for config in measure.configs_of(model).values():
        timestep = {"current_timestep_callback": lambda: 700.0} if config is model.pab else {}
        config = dataclasses.replace(config, **timestep)
        with pab_fx.enable(network, config, inner="eager", step_invariants=False) as pab, torch.no_grad():
            held = []
            for _ in range(3):
                network(**inputs)
                held.append(sum(role.cache_bytes for role in pab.report().roles))
        assert max(held) == sum(tensor.nbytes for tensor in measure.kept(gm, config)) > 0


def test_what_travels_to_a_gpu_is_all_but_torch(tmp_path: Path) -> None:
    pack = importlib.import_module("pack_for_gpu")
    needed = pack.needed("pab-fx", pack.EXTRAS)
    assert {"diffusers", "transformers", "hypothesis", "pytest", "rich", "tokenizers"} <= set(needed)
    assert not {"torch", "pab-fx", "jinja2", "triton"} & set(needed)
    script = tmp_path / "run.sh"
    script.write_text(pack.RUN)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    policies = re.findall(r"--policy (\S+)", pack.RUN)
    assert policies
    assert set(policies) <= set(CACHES)


def test_a_model_of_ones_own_and_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("custom_dit").main(["--inner", "eager"])
    printed = capsys.readouterr().out
    assert float(printed.rsplit(" ", 1)[1]) > 1e-6
    importlib.import_module("server_loop").main(["--inner", "eager"])
    printed += capsys.readouterr().out
    assert "the same alone: True" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("blocks ")]
    reused = [int(row[3]) for row in rows if row[1].isdigit()]
    assert len(reused) == 2
    assert all(reused)
