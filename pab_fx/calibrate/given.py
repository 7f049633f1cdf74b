"""What a calibration is given: refused before anything runs, and remembered, since a folder is for one of these."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from diffusers import DiffusionPipeline

from ..diffusers.configs import policies_of
from ..diffusers.half_batch import with_halves
from ..enable import denoisers
from .samples import Batch


def check_model(model: Any, prompts: Any, generate: Any, batch: int) -> None:
    """Refuse what cannot be generated with."""
    denoisers(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) < 2:
        raise ValueError(
            f"prompts must be a list of prompts, two at least, got {prompts!r}: half are held out of the search."
        )
    twice = next((prompt for i, prompt in enumerate(prompts) if prompt in prompts[:i]), None)
    if twice is not None:
        raise ValueError(
            f"prompts has {twice!r} twice: half of them are held out of the search, and would hold out what was seen."
        )
    if generate is None and not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"{type(model).__name__} is no pipeline: pass generate=, a function (model, prompt, seed) that returns a "
            "sample."
        )
    if generate is not None and not callable(generate):
        raise ValueError(f"generate must be a function (model, prompt, seed), got {generate!r}.")
    if generate is not None and batch != 1:
        raise ValueError(f"batch={batch} is for pipelines: generate is called with one prompt at a time.")


OWN = ("prompt", "generator")
"""Arguments of a pipeline's call that a calibration gives."""


def check_call(model: Any, generate: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline does not take, and those that are not the caller's to give."""
    if generate is not None:
        return
    for name in OWN:
        if name in call:
            raise ValueError(
                f"call has {name!r}, which calibrate gives: each prompt is generated from the same noise with and "
                "without a cache. Pass prompts= and seed=."
            )
    parameters = inspect.signature(type(model).__call__).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for name in call:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"call has {name!r}, which {type(model).__name__} does not take.{hint}")


def check_configs(**configs: Any) -> None:
    """Refuse what `enable` does not take, naming where it stands."""
    for name, config in configs.items():
        _check_config(name, config)


def _check_config(name: str, config: Any) -> None:
    try:
        policies_of(with_halves(config))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_names(known: Collection[str], parts: Any) -> None:
    """Refuse parts that there are not."""
    is_list = isinstance(parts, Collection) and not isinstance(parts, str) and len(parts)
    if not is_list or not set(parts) <= set(known):
        raise ValueError(f"parts must be of {', '.join(known)}, one at least, got {parts!r}.")


def check_effort(effort: Any, known: Collection[str]) -> None:
    """Refuse an effort that there is not."""
    if effort not in known:
        raise ValueError(f"effort must be one of {', '.join(known)}, got {effort!r}.")


def check_counts(least: int, **counts: Any) -> None:
    """Refuse numbers of something that are none."""
    for name, value in counts.items():
        if not _is_integer(value, least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_amounts(peak: Any, margin: Any) -> None:
    """Refuse a peak or margin that is no number, or too small."""
    for name, value, least in (("peak", peak, "above 0"), ("margin", margin, "of at least 0")):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not is_number or (name == "peak" and not value):
            raise ValueError(f"{name} must be a number {least}, got {value!r}.")


def identity(
    model: Any, generate: Any, call: Mapping[str, Any], searched: Sequence[Batch], held: Sequence[Batch], inner: Any
) -> dict[str, Any]:
    """What results depend on: a folder is for one of these."""
    return {
        "model": type(model).__name__,
        "weights": _fingerprint(model),
        "prompts": [prompt for batch in (*searched, *held) for prompt in batch.prompts],
        "seeds": [seed for batch in (*searched, *held) for seed in batch.seeds],
        "searched": sum(len(batch.prompts) for batch in searched),
        "batch": len(searched[0].prompts),
        "call": {name: repr(value) for name, value in sorted(call.items())},
        "generate": None if generate is None else getattr(generate, "__qualname__", type(generate).__name__),
        "inner": inner if isinstance(inner, str) else getattr(inner, "__qualname__", type(inner).__name__),
    }


def _fingerprint(model: Any) -> str:
    """Tells models apart by their parameters: names, shapes, and some values of each."""
    digest = hashlib.sha256()
    for denoiser in denoisers(model):
        for name, parameter in denoiser.named_parameters():
            some = parameter.detach().flatten()[:: max(parameter.numel() // 16, 1)]
            digest.update(f"{name} {tuple(parameter.shape)} {float(some.double().sum()):.9g}".encode())
    return digest.hexdigest()[:16]
