"""Capture a model, look at what was captured, and measure where its time goes: `pab_fx.explain`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..enable import PAB, enable
from ..export.rewrite import rewrite
from ..passes.order import Lowering, lowered
from ..passes.users import Pass
from ..policy.when import checked_timesteps, evenly_spaced
from ..report.account import Round
from ..report.captured import Captured
from ..report.costs import operations
from ..report.data import RoleReport
from ..report.report import Report
from .outline import outlines_of
from .stopwatch import Stopwatch, number_nodes


def explain(
    model: Any,
    kwargs: Mapping[str, Any] | None = None,
    config: Any = None,
    *,
    args: Sequence[Any] = (),
    timesteps: Any = None,
    steps: int = 20,
    rounds: int = 3,
    **options: Any,
) -> Report:
    """What PAB would broadcast of a model or pipeline, when, and what that would save: without compiling it.

    The model is captured and rewritten as by `enable`, and runs one step, in which nothing is reused, a few times. It
    is left as it was. `PAB.report()` has all but the times and the drawing for a model that PAB is enabled on.

    Args:
        model: a transformer, or a pipeline that holds one as `transformer`, `transformer_2` or `unet`.
        kwargs: keyword arguments of a call: of one step for a model, of a whole generation for a pipeline, which
            is left after its first step.
        config: as for `enable`; or give fields of `PABConfig` by name.
        args: positional arguments of the call.
        timesteps: those of a generation, for the schedule; default: those of the pipeline, else evenly spaced ones.
        steps: of a generation, where timesteps are not given.
        rounds: how often the step is timed; 0 to leave times out.
        options: as for `enable`, without `inner`.

    Returns:
        The report, with times and outlines of the graphs for drawing.

    Raises:
        ValueError: as `enable`; for keyword arguments without names; for a number of steps or rounds that is too small,
            or for `inner`.
        TypeError: for something that is neither a model nor a pipeline with one.

    Example:
        >>> from pab_fx.bench.models import model_of
        >>> wan, device = model_of("wan", "quick"), torch.device("cpu")
        >>> (kwargs,) = wan.inputs((900.0,), device)
        >>> report = explain(wan.build(device), kwargs, spatial_attention_block_skip_range=2, rounds=0)
        >>> [region.name for region in report.regions if region.left_alone is None]
        ['blocks.0.attn1', 'blocks.1.attn1', 'blocks.2.attn1']
    """
    if steps < 1 or rounds < 0:
        raise ValueError(f"steps must be at least 1 and rounds at least 0, got {steps} and {rounds}.")
    if not isinstance(kwargs, (Mapping, NoneType)):
        raise ValueError(
            f"kwargs must be the keyword arguments of a call by name, got {type(kwargs).__name__}; positional ones are "
            "given as args=(...)."
        )
    if "inner" in options:
        raise ValueError(f"explain compiles nothing: leave inner={options['inner']!r} out, or enable() the model.")
    given = None if timesteps is None else checked_timesteps(timesteps)
    stopwatch = Stopwatch()
    passes = _with_numbers(options.pop("passes", ()))
    pab = enable(model, config, inner=stopwatch, timesteps=given, passes=passes, **options)
    with pab, torch.no_grad():
        step = _first_step(model, args, dict(kwargs or {}), steps)
        measured = [_timed(pab, step, stopwatch) for _ in range(1 + rounds)][1:]  # the first one captures
        captured = pab.backend.captured
        found = pab.backend.report(measured, evenly_spaced(steps))
        return dataclasses.replace(
            found,
            graphs=0,
            roles=tuple(_in_a_generation(role, found) for role in found.roles),
            captured=tuple(
                dataclasses.replace(each, runs=each.runs // (1 + rounds), reusing=_reusing(of))
                for each, of in zip(found.captured, captured, strict=True)
            ),
            outlines=outlines_of(captured, found.regions),
        )


def _in_a_generation(role: RoleReport, found: Report) -> RoleReport:
    """A role with the calls and caches of a whole generation in place of those of the steps that were measured."""
    strips = [strip for strip in found.schedule.strips if strip.role == role.role]
    kept = sum(region.cache_bytes for region in found.regions if region.role == role.role and not region.left_alone)
    return dataclasses.replace(
        role,
        computed=sum(strip.modules * strip.computed for strip in strips),
        reused=sum(strip.modules * strip.reused for strip in strips),
        contexts=tuple(dataclasses.replace(each, cache_bytes=0, full_bytes=kept) for each in role.contexts),
    )


def _with_numbers(passes: Sequence[Pass]) -> list[Pass]:
    """These passes, and one that numbers the nodes as they are when they are rewritten."""
    at = passes.index(rewrite) if rewrite in passes else len(passes)
    return [*passes[:at], number_nodes, *passes[at:]]


def _timed(pab: PAB, step: Callable[[], None], stopwatch: Stopwatch) -> Round:
    pab.reset()
    stopwatch.lap()
    step()
    return stopwatch.lap()


def _reusing(captured: Captured) -> int | None:
    """How many operations are left where everything reuses that is broadcast."""
    if captured.graph is None:
        return None
    lowerings = captured.graph.lowerings
    reusing = lowered(lowerings.conditional, (True,) * len(lowerings.conditionals), Lowering())
    return operations(reusing.graph.nodes)


# ---------------------------------------------------------------------------------------------------- one step


class _FirstStepDone(Exception):
    """A pipeline has made its first step."""


def _first_step(model: Any, args: Sequence[Any], kwargs: dict[str, Any], steps: int) -> Callable[[], None]:
    """Runs one step of a model, or the first one of a pipeline."""
    if isinstance(model, nn.Module):
        return lambda: model(*args, **kwargs)
    if "num_inference_steps" in inspect.signature(type(model).__call__).parameters:
        kwargs = {"num_inference_steps": steps, **kwargs}

    def first_step() -> None:
        with contextlib.suppress(_FirstStepDone), _left_after_a_step(model.scheduler):
            model(*args, **kwargs)
        model.maybe_free_model_hooks()  # as at the end of its call

    return first_step


@contextlib.contextmanager
def _left_after_a_step(scheduler: Any) -> Iterator[None]:
    """Leave the call of a pipeline where its scheduler is asked to step: the denoiser has run, in each branch."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def leave(*args: Any, **kwargs: Any) -> Any:
        raise _FirstStepDone

    scheduler.step = leave
    try:
        yield
    finally:
        del scheduler.step
