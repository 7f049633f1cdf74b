"""What `pab-fx explain` and `pab-fx doctor` look at: a model or pipeline by name, with inputs for a call."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.settings import config_of
from ..policy.config import PRESETS, PABConfig

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
        name: "demo", a class of `pab_fx.testing.zoo`, or a folder with a pipeline of diffusers.
        steps: of a generation.

    Raises:
        ValueError: for a name that is none of these, with what is like it.
    """
    if name == DEMO:
        return _demo(steps)
    if Path(name).is_dir():
        return _pipeline(Path(name))
    return _of_zoo(name)


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


def _of_zoo(name: str) -> Subject:
    """A tiny model of a class with random weights, and inputs as its pipeline makes them."""
    from ..testing import zoo

    entry = next((each for each in zoo.ZOO if name in (each.name, each.class_name)), None)
    if entry is None:
        near = difflib.get_close_matches(name, [each.name for each in zoo.ZOO], n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown model {name!r}: it is {DEMO!r}, a folder with a pipeline of diffusers, or a class that "
            f"pab_fx.testing.zoo has inputs for.{hint}"
        )
    timestep = 900.0
    # models are given a thousandth of the timestep, among others; pipelines tell the timestep themselves
    config = PABConfig(current_timestep_callback=lambda: timestep)
    return Subject(entry.build(), entry.step(timestep, seed=0), config)


def config_by(text: str) -> PABConfig:
    """A config from the command line: a preset's name, a JSON file, or ranges and a window.

    Example:
        >>> config_by("latte").skip_range("cross"), config_by("spatial=3").skip_range("spatial")
        (6, 3)

    Raises:
        OSError: if a file cannot be read.
        ValueError: for anything else, or a file that holds no config.
    """
    if text in PRESETS:
        return PABConfig.preset(text)
    if text.endswith(".json"):
        return PABConfig.load(text)
    try:
        return config_of(text)
    except ValueError as error:
        raise ValueError(f"{error} Or it is a JSON file, as PABConfig.save writes it.") from None
