"""What `pab-fx explain` and `pab-fx doctor` look at: a model or pipeline by name, with inputs for a call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench.settings import config_of
from ..policy.config import PRESETS, PABConfig
from ..policy.files import load_policies
from ..policy.policy import Policy
from ..policy.presets import PUBLISHED, preset

DEMO = "demo"


@dataclass(frozen=True)
class Subject:
    """A model or pipeline, and what to call it with.

    Args:
        model: the model or pipeline.
        kwargs: keyword arguments of the call.
        config: what is broadcast where nothing else is said.
    """

    model: Any
    kwargs: Mapping[str, Any]
    config: PABConfig


def subject_of(name: str, steps: int = 20) -> Subject:
    """A model or pipeline by its name on the command line.

    Args:
        name: "demo", a model of `pab_fx.bench.models`, or a folder with a pipeline of diffusers.
        steps: of a generation.

    Raises:
        ValueError: for a name that is none of these.
    """
    if name == DEMO:
        return _demo(steps)
    if Path(name).is_dir():
        return _pipeline(Path(name))
    return _of_benchmark(name)


def _demo(steps: int) -> Subject:
    """The demo's trained model, and what the demo broadcasts."""
    from ..demo import load_pipeline
    from ..demo.run import demo_config

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(steps)
    return Subject(pipe, {"prompt": "a red circle moving left"}, demo_config(pipe.scheduler.timesteps.tolist()))


def _pipeline(folder: Path) -> Subject:
    """A pipeline from a folder, to be called with a prompt, or with class labels."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no pipeline of diffusers: there is no model_index.json in it.")
    logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    known = {"prompt": "a panda in a bamboo forest", "class_labels": [0], "output_type": "latent"}
    parameters = inspect.signature(type(pipe).__call__).parameters
    required = {
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    } - {"self", *known}
    if required:
        raise ValueError(
            f"{type(pipe).__name__} is called with {', '.join(sorted(required))}, which a command line cannot give: "
            "call pab_fx.explain(pipe, {...}) from Python."
        )
    return Subject(pipe, {key: value for key, value in known.items() if key in parameters}, PABConfig())


def _of_benchmark(name: str) -> Subject:
    """A model that `pab-fx bench` measures on a CPU, with random weights, and what it broadcasts there."""
    from ..bench.models import NAMES, model_of

    if name not in NAMES:
        known = ", ".join((DEMO, *NAMES))
        raise ValueError(f"unknown model {name!r}: it is one of {known}, or a folder with a pipeline of diffusers.")
    timestep, device = 900.0, torch.device("cpu")
    model = model_of(name, "cpu")
    (kwargs,) = model.inputs((timestep,), device)
    # Flux is given a thousandth of the timestep; pipelines tell the timestep themselves
    config = dataclasses.replace(model.pab, current_timestep_callback=lambda: timestep)
    return Subject(model.build(device), kwargs, config)


def config_by(text: str) -> PABConfig | tuple[Policy, ...]:
    """A config from the command line: a preset's name, a JSON file of a config or of policies, or ranges and a window.

    Example:
        >>> config_by("latte").skip_range("cross"), config_by("spatial=3").skip_range("spatial")
        (6, 3)
        >>> config_by("easycache")[0].where
        Model()

    Raises:
        OSError: if a file cannot be read.
        ValueError: for anything else, or a file that holds no config.
    """
    if text in PRESETS:
        return PABConfig.preset(text)
    if text in PUBLISHED:
        return (preset(text),)
    if text.endswith(".json"):
        is_list = Path(text).read_text(encoding="utf-8").lstrip().startswith("[")
        return load_policies(text) if is_list else PABConfig.load(text)
    try:
        return config_of(text)
    except ValueError as error:
        raise ValueError(f"{error} Or it is a JSON file, as PABConfig.save writes it.") from None
