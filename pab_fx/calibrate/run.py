"""`calibrate`: measure, probe, predict, verify, write."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import ATTENTION_ROLES, PRESETS, PABConfig
from ..enable import denoisers
from .budget import MOST_PSNR, Budget
from .files import Folder
from .laboratory import Laboratory
from .plots import check_plots, save_plots
from .prediction import CostModel, ErrorModel, scales
from .result import Calibration, Predicted
from .samples import Batch, Generate, batches_of
from .search import front
from .settings import Setting, at_own_timesteps, groups_of, options_of, segments_of
from .trials import Trials
from .verify import Judge

RANGES = (2, 3, 4, 6, 8, 12)


def calibrate(
    model: Any,
    prompts: Sequence[str],
    budget: str | Budget | PABConfig,
    *,
    generate: Generate | None = None,
    call: Mapping[str, Any] | None = None,
    config: PABConfig | None = None,
    compare: Mapping[str, PABConfig] | None = None,
    folder: str | os.PathLike[str] = "calibration",
    seed: int = 0,
    batch: int = 1,
    peak: float = 1.0,
    margin: float = 2.0,
    ranges: Sequence[int] = RANGES,
    segments: int = 5,
    layer_groups: int = 1,
    tries: int = 8,
    rounds: int = 3,
    inner: Any = "eager",
    console: Console | None = None,
) -> Calibration:
    """Find the setting that is fastest within an error budget, and write it as a file that `PABConfig.load` reads.

    One generation without PAB measures how much each output changes from step to step (the paper's figure 3). Probes
    then show what it does to the samples, and what it saves, if one role (or some layers of it) reuses within one
    stretch of steps. From these a search predicts the fastest settings for any error; the most promising are generated
    with until the fastest one that keeps the budget is known. docs/tuning.md explains it with pictures.

    All that is finished is in `folder`: run it again to go on after an interruption, or to ask for another budget.

    Args:
        model: a diffusers pipeline; or, with `generate`, anything that `enable` takes. It is left as it was.
        prompts: what to generate; different ones, as the setting is to be used for: it sees no others.
        budget: the most that samples may differ from those without PAB, in the mean over prompts: such as
            `"psnr>=35"` (dB), `"relative_l2<=0.05"`, or both; a `Budget`; or a `PABConfig` to be no worse than, which
            is compared prompt by prompt.
        generate: a loop of one's own, `generate(model, prompt, seed)`, that returns one sample: an array or a tensor.
        call: further arguments of the pipeline's call, such as `num_inference_steps`, sizes and `output_type`
            (default "np").
        config: takes part by its identifiers and its timestep callback.
        compare: settings to show beside it, by name; default: the presets.
        folder: where files are written: `config.json`, `changes.png`, `roles.png`, `pareto.png` and `entries`.
        seed: the i-th prompt starts from the noise of `seed + i`.
        batch: prompts in one generation of a pipeline.
        peak: for PSNR, the largest difference that two elements of a sample can have; 1 for pixels in 0 to 1.
        margin: standard errors of the mean over prompts that are kept in reserve, for prompts yet to come.
        ranges: skip ranges to choose from.
        segments: in how many stretches of steps roles are probed, between which windows begin and end.
        layer_groups: in how many groups the layers of a role may go by rules of their own.
        tries: how many settings are generated with at most.
        rounds: generations with and without the proposal that are timed in turns; 0 for none.
        inner: compiles the graphs while calibrating; the setting is for any.
        console: where progress is shown.

    Returns:
        The proposal as `.config`, and all that led to it.

    Raises:
        ValueError: for bad input, before anything runs, or a folder of another calibration.
        RuntimeError: if no setting keeps the budget, with the most careful one that was tried.

    Example:
        >>> prompts = ["a red circle moving left", "a blue cross moving up"]
        >>> found = calibrate(pipe, prompts, "psnr>=35")  # doctest: +SKIP
        >>> pab = pab_fx.enable(pipe, PABConfig.load("calibration/config.json"))  # doctest: +SKIP
    """
    limit = budget if isinstance(budget, PABConfig) else Budget.of(budget)
    _check_model(model, prompts, generate, batch)
    _check_counts(1, batch=batch, segments=segments, layer_groups=layer_groups, tries=tries)
    _check_counts(0, rounds=rounds)
    _check_amounts(peak=peak, margin=margin)
    _check_ranges(ranges)
    check_plots()
    base, batches = config or PABConfig(), batches_of(prompts, seed, batch)
    if compare is None:
        compare = {name: PABConfig.preset(name) for name in PRESETS}
    not_yet_captured = Trials(model, generate, call or {}, base, inner)
    home = Folder(folder, _identity(model, generate, call or {}, batches, base, inner))
    with not_yet_captured as trials, _progress(console) as progress:
        laboratory = Laboratory(home, trials, batches, progress)
        changes = laboratory.changes()
        groups = groups_of(changes, layer_groups)
        timesteps = groups[0].timesteps
        errors, costs = laboratory.probe(groups, segments_of(len(timesteps), segments), base)
        if isinstance(limit, PABConfig):
            limit = Budget.like(laboratory.differences(at_own_timesteps(limit, timesteps), "the budget"), peak)
        judge = Judge(laboratory, limit, peak, margin, costs, changes)
        others = {name: at_own_timesteps(each, timesteps) for name, each in compare.items()}
        compared = tuple(judge.outcome(name, each) for name, each in others.items())
        settings = _front(errors, costs, ranges)
        tried = judge.search(settings, errors, base, tries)
        proposal = max((each for each in tried if each.room >= 0), key=lambda each: each.speedup)
        measured = laboratory.measured_speedup(proposal.config, rounds)
    found = Calibration(
        config=proposal.config,
        proposal=proposal,
        budget=limit,
        measured_speedup=measured,
        tried=tried,
        compared=compared,
        front=tuple(_predicted(each, errors, costs, peak) for each in settings),
        shares={group.label: share for group, share in zip(groups, costs.shares, strict=True)},
        changes=changes,
        peak=peak,
        folder=home.path,
    )
    found.config.save(home.path / "config.json")
    save_plots(found)
    return found


def _front(errors: ErrorModel, costs: CostModel, ranges: Sequence[int]) -> list[Setting]:
    """The settings on the predicted front that reuse something, from the most careful to the fastest."""
    options = [options_of(group, ranges, errors.segments) for group in errors.groups]
    found = front(
        errors.balanced,
        [
            np.stack([scales(group, option, errors.segments) for option in each])
            for group, each in zip(errors.groups, options, strict=True)
        ],
        [np.array([costs.saved(i, option) for option in each]) for i, each in enumerate(options)],
    )
    settings = [tuple(each[i] for each, i in zip(options, choice, strict=True)) for choice in found]
    return [setting for setting in settings if any(setting)]


def _predicted(setting: Setting, errors: ErrorModel, costs: CostModel, peak: float) -> Predicted:
    differences = errors.differences(setting)
    return Predicted(
        costs.speedup(setting),
        float(np.mean([min(each.psnr(peak), MOST_PSNR) for each in differences])),
        float(np.mean([each.relative_l2 for each in differences])),
    )


# ------------------------------------------------------------------------------------------ what is given


def _check_model(model: Any, prompts: Any, generate: Any, batch: int) -> None:
    """Refuse what cannot be generated with."""
    denoisers(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a list of prompts, one at least, got {prompts!r}.")
    if generate is None and not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"{type(model).__name__} is no pipeline: pass generate=, a function (model, prompt, seed) that returns a "
            "sample."
        )
    if generate is not None and not callable(generate):
        raise ValueError(f"generate must be a function (model, prompt, seed), got {generate!r}.")
    if generate is not None and batch != 1:
        raise ValueError(f"batch={batch} is for pipelines: generate is called with one prompt at a time.")


def _check_counts(least: int, **counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _check_amounts(**amounts: Any) -> None:
    for name, value in amounts.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")


def _check_ranges(ranges: Any) -> None:
    is_list = isinstance(ranges, Sequence) and not isinstance(ranges, str) and ranges
    if not is_list or any(isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 2 for n in ranges):
        raise ValueError(f"ranges must be skip ranges, integers of at least 2, got {ranges!r}.")


def _identity(
    model: Any, generate: Any, call: Mapping[str, Any], batches: Sequence[Batch], base: PABConfig, inner: Any
) -> dict[str, Any]:
    """What results depend on: a folder is for one of these."""
    return {
        "model": type(model).__name__,
        "weights": _fingerprint(model),
        "prompts": [prompt for batch in batches for prompt in batch.prompts],
        "seeds": [seed for batch in batches for seed in batch.seeds],
        "batch": len(batches[0].prompts),
        "call": {name: repr(value) for name, value in sorted(call.items())},
        "generate": None if generate is None else getattr(generate, "__qualname__", type(generate).__name__),
        "identifiers": {role: list(base.identifiers(role)) for role in ATTENTION_ROLES},
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


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(stderr=True))
