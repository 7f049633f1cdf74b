"""`calibrate`: observe, probe, search, verify, write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..policy.files import save_policies
from .budget import Budget
from .files import Folder
from .forecasts import Forecasts
from .given import (
    check_amounts,
    check_call,
    check_configs,
    check_counts,
    check_effort,
    check_model,
    check_names,
    identity,
)
from .judge import Judge, curves
from .laboratory import Laboratory
from .plots import save_plots
from .probes import EFFORTS, probes
from .result import Calibration
from .samples import Generate, batches_of
from .setting import KINDS, kind_of, methods
from .signals import signalled
from .trajectory import pooled
from .trials import Trials


def calibrate(
    model: Any,
    prompts: Sequence[str],
    budget: str | Budget | Any,
    *,
    generate: Generate | None = None,
    call: Mapping[str, Any] | None = None,
    compare: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] = "calibration",
    effort: str = "medium",
    parts: Collection[str] = KINDS,
    seed: int = 0,
    batch: int = 1,
    peak: float = 1.0,
    margin: float = 2.0,
    rounds: int = 3,
    inner: Any = "eager",
    console: Console | None = None,
) -> Calibration:
    """Find the setting that is fastest within an error budget, or nearest at a speed, over every policy.

    It chooses where (attentions, feed-forwards, blocks, the model, or attentions inside of blocks), how what is kept is
    read (as kept, forecast to order 1 or 2, Hermite polynomials), and in which steps it is computed. One generation of
    each prompt without a cache says how far any such setting's reads will be off; a few probes say how much that
    matters; so a search needs no generation, and only the most promising settings are generated with. The first half of
    the prompts is searched with, the second half is held out of the search, and decides. docs/tuning.md explains it.

    All that is finished is in `folder`: run it again to go on after an interruption, or to ask for another budget.

    Args:
        model: a diffusers pipeline; or, with `generate`, anything that `enable` takes. It is left as it was.
        prompts: what to generate, two at least; different ones, as the setting is to be used for.
        budget: the most that samples may differ from those without a cache, in the mean over prompts: such as
            `"psnr>=42"` (dB), `"relative_l2<=0.05"`, or both. Or the least speed-up, `"speedup>=3"`, counted in
            floating-point operations: then the nearest setting is found. Or a `Budget`; or a config or policies to be
            no worse than, compared prompt by prompt.
        generate: a loop of one's own, `generate(model, prompt, seed)`, that returns one sample: an array or a tensor.
        call: further arguments of the pipeline's call, such as `num_inference_steps`, sizes and `output_type`
            (default "np").
        compare: configs or policies to show beside it, by name.
        folder: where files are written: `policies.json`, `front.png`, `changes.png`, `roles.png` and `entries`.
        effort: "low", "medium" or "high": at most 15, 40 or 150 generations of each prompt.
        parts: of what is chosen, of "attentions" (feed-forwards with them), "blocks" and "model". What is kept of all
            attentions of a large model takes much memory: leave them out there.
        seed: the i-th prompt starts from the noise of `seed + i`.
        batch: prompts in one generation of a pipeline.
        peak: for PSNR, the largest difference that two elements of a sample can have; 1 for pixels in 0 to 1.
        margin: standard errors of the mean over prompts that are kept in reserve, for prompts yet to come.
        rounds: generations with and without the proposal that are timed in turns; 0 for none.
        inner: compiles the graphs while calibrating; the setting is for any.
        console: where progress is shown.

    Returns:
        The proposal as `.policies`, and all that led to it.

    Raises:
        ValueError: for bad input, before anything runs, or a folder of another calibration.
        RuntimeError: if no setting keeps the budget, with the nearest one that was tried.

    Example:
        >>> prompts = ["a red circle moving left", "a blue cross moving up"]
        >>> found = calibrate(pipe, prompts, "psnr>=42")  # doctest: +SKIP
        >>> pab = pab_fx.enable(pipe, found.policies)  # doctest: +SKIP
    """
    limit = Budget.of(budget) if isinstance(budget, (str, Budget)) else None
    check_model(model, prompts, generate, batch)
    check_call(model, generate, call or {})
    check_configs(**({} if limit else {"budget": budget}), **{f"compare[{k!r}]": v for k, v in (compare or {}).items()})
    check_names(KINDS, parts)
    check_effort(effort, EFFORTS)
    check_counts(1, batch=batch)
    check_counts(0, rounds=rounds)
    check_amounts(peak, margin)
    half = (len(prompts) + 1) // 2
    searched, held = batches_of(prompts[:half], seed, batch), batches_of(prompts[half:], seed + half, batch)
    to_enter = Trials(model, generate, call or {}, inner)
    home = Folder(folder, identity(model, generate, call or {}, searched, held, inner))
    most = EFFORTS[effort].generations
    with to_enter as trials, _progress(console) as progress:
        progress.console.print(f"at most {most} generations of each of {len(prompts)} prompts")
        laboratory = Laboratory(home, trials, searched, held, progress, most * (len(searched) + len(held)))
        trajectories = laboratory.observe()
        progress.console.print(_estimate(laboratory.seconds, most))
        found = pooled(trajectories)
        steps = len({t for each in found for t in each.timesteps})
        roles = {each.role for each in found if kind_of(each.role) in parts}
        _check_roles(roles, parts)
        limits = (limit, limit) if limit else _like(laboratory, budget, peak)
        judge = Judge(laboratory, *limits, peak, margin, Forecasts(found), steps)
        planned = probes(roles, steps, EFFORTS[effort])
        for probe in planned:
            judge.probe(probe)
        signals, thresholds = signalled(roles), EFFORTS[effort].thresholds
        rest = len(planned) + len(compare or ()) + 2 * rounds + len(signals) * thresholds
        judge.search(methods(roles), max(most - 1 - rest, 1))
        judge.try_signals(signals, thresholds)
        chosen = judge.best()
        compared = tuple(laboratory.outcome(name, each, on_held=True) for name, each in (compare or {}).items())
        measured = laboratory.measured_speedup(chosen.searched.config, rounds)
    assert chosen.held is not None
    warn_of_timing(chosen.held.speedup, measured)
    result = Calibration(
        policies=chosen.searched.config,
        proposal=chosen.held,
        searched=chosen.searched,
        budget=limits[1],
        measured_speedup=measured,
        tried=(*judge.tried.values(), *judge.signals),
        compared=compared,
        curves=curves(judge.predictions(), methods(roles), steps),
        trajectories=trajectories,
        peak=peak,
        folder=home.path,
    )
    save_policies(result.policies, home.path / "policies.json")
    save_plots(result)
    return result


def _check_roles(roles: Collection[str], parts: Collection[str]) -> None:
    """Refuse to choose from nothing."""
    if not roles:
        raise ValueError(f"the model has none of parts={tuple(parts)!r}, so there is nothing to calibrate.")


def _like(laboratory: Laboratory, config: Any, peak: float) -> tuple[Budget, Budget]:
    """To be no worse than a config, prompt by prompt: for those that are searched with, and those held out."""
    searched, held = (laboratory.outcome("the budget", config, on_held).differences for on_held in (False, True))
    return Budget.like(searched, peak), Budget.like(held, peak)


def _estimate(seconds: float, most: int) -> str:
    """How long it takes at most, from the generations without a cache of all prompts."""
    minutes = seconds * most / 60
    return f"these took {seconds:.0f} s without a cache, so all take {minutes:.0f} minutes at most"


def warn_of_timing(counted: float, measured: float | None) -> None:
    """Warn where the proposal saves much less time than operations."""
    if measured is not None and measured < 0.6 * counted:
        warnings.warn(
            f"pab_fx: the proposal has {counted:.2f}x fewer operations, and was measured at {measured:.2f}x as fast. "
            "Was the machine busy, or is a step so short that other things take longer? The choice depends on neither.",
            stacklevel=3,
        )


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(stderr=True))
