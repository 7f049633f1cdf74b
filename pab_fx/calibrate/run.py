"""`calibrate`: measure, probe, predict, verify, write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..policy.config import PRESETS, PABConfig
from ..report.palette import pyplot
from .budget import Budget
from .files import Folder
from .given import check_amounts, check_call, check_configs, check_counts, check_model, check_ranges, identity
from .laboratory import Laboratory
from .plots import save_plots
from .prediction import CostModel, ErrorModel, scales
from .result import Calibration, Predicted, mean_psnr
from .samples import Generate, batches_of
from .search import front
from .settings import Setting, at_own_timesteps, groups_of, options_of, segments_of, window
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
    base = PABConfig() if config is None else config
    others = {name: PABConfig.preset(name) for name in PRESETS} if compare is None else compare
    check_model(model, prompts, generate, batch)
    check_call(model, generate, call or {})
    check_counts(1, batch=batch, segments=segments, layer_groups=layer_groups, tries=tries)
    check_counts(0, rounds=rounds)
    check_amounts(peak, margin)
    check_ranges(ranges)
    check_configs(config=base, **{f"compare[{name!r}]": each for name, each in others.items()})
    pyplot()
    batches = batches_of(prompts, seed, batch)
    to_enter = Trials(model, generate, call or {}, base, inner)
    home = Folder(folder, identity(model, generate, call or {}, batches, base, inner))
    with to_enter as trials, _progress(console) as progress:
        laboratory = Laboratory(home, trials, batches, progress)
        changes = laboratory.changes()
        groups = groups_of(changes, layer_groups)
        timesteps = groups[0].timesteps
        errors, costs = laboratory.probe(groups, segments_of(len(timesteps), segments), base)
        if isinstance(limit, PABConfig):
            limit = Budget.like(laboratory.differences(at_own_timesteps(limit, timesteps), "the budget"), peak)
        judge = Judge(laboratory, limit, peak, margin, costs, changes)
        compared = tuple(judge.outcome(name, at_own_timesteps(each, timesteps)) for name, each in others.items())
        settings = _front(errors, costs, ranges)
        tried = judge.search(settings, errors, base, tries)
        proposal = judge.best((*tried, *compared))
        measured = laboratory.measured_speedup(proposal.config, rounds)
    warn_of_timing(proposal.speedup, measured)
    found = Calibration(
        config=proposal.config,
        proposal=proposal,
        budget=limit,
        measured_speedup=measured,
        tried=tried,
        compared=compared,
        front=tuple(_predicted(each, errors, costs, peak) for each in settings),
        probes={
            group.label: tuple(mean_psnr(each, peak) for each in errors.probes(i)) for i, group in enumerate(groups)
        },
        windows=tuple(window(timesteps, *segment) for segment in errors.segments),
        shares={group.label: share for group, share in zip(groups, costs.shares, strict=True)},
        changes=changes,
        peak=peak,
        folder=home.path,
    )
    found.config.save(home.path / "config.json")
    save_plots(found)
    return found


def warn_of_timing(predicted: float, measured: float | None) -> None:
    """Warn where the proposal takes another time than predicted.

    Of all that is measured, only time depends on what else a machine does, and what a role is thought to save decides
    between settings.
    """
    if measured is not None and not 0.75 < measured / predicted < 1.5:
        warnings.warn(
            f"pab_fx: the proposal was predicted to be {predicted:.2f}x as fast and measured at {measured:.2f}x. Was "
            "the machine busy? Errors do not depend on that, but the choice between settings does: calibrate again in "
            "another folder when it is not, with more rounds, or more steps and prompts.",
            stacklevel=3,
        )


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
        mean_psnr(differences, peak),
        float(np.mean([each.relative_l2 for each in differences])),
    )


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(stderr=True))
