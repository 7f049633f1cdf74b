"""Diffusers' hooks on a whole pipeline, where they can be right: a hooked copy of the model for each branch."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import zoo
from torch import nn

from . import PipelineEntry, run


@contextlib.contextmanager
def observed(pipe: Any, on_step: Callable[[Any], None]) -> Iterator[None]:
    """Call `on_step` with the timestep of each `scheduler.step` inside."""
    cls = type(pipe.scheduler)
    original, signature = cls.step, inspect.signature(cls.step)

    @functools.wraps(original)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        on_step(signature.bind(*args, **kwargs).arguments["timestep"])
        return original(*args, **kwargs)

    cls.step = step
    try:
        yield
    finally:
        cls.step = original


def plain_run(entry: PipelineEntry, **overrides: Any) -> tuple[torch.Tensor, list[float]]:
    """The output of a pipeline as it is, and its timesteps.

    These are `pipe.current_timestep` where the pipeline has one, else those its scheduler is given.
    """
    pipe, found = entry.build(), []

    def on_step(t: Any) -> None:
        current = getattr(pipe, "_current_timestep", None)
        found.append(float(t if current is None else current))

    with observed(pipe, on_step):
        output = run(pipe, entry, **overrides)
    return output, found


def hooked_run(entry: PipelineEntry, config_of: Callable[[Callable[[], float]], Any], **overrides: Any) -> torch.Tensor:
    """The output of a pipeline whose denoisers have hooks."""
    return plain_and_hooked_run(entry, config_of, **overrides)[1]


def plain_and_hooked_run(
    entry: PipelineEntry, config_of: Callable[[Callable[[], float]], Any], **overrides: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a pipeline as it is, and of one whose denoisers have hooks.

    The hooks keep one counter for all guidance branches, so each branch (the k-th call of a step) gets a hooked
    copy of the model. They know no end of a section of a long video, where timesteps rise: there all are made anew.
    """
    pipe, (plain, known) = entry.build(), plain_run(entry, **overrides)
    calls: Counter[str] = Counter()
    copies: dict[tuple[str, int], nn.Module] = {}
    position = 0

    def on_step(_: Any) -> None:
        nonlocal position
        position += 1
        calls.clear()
        if position < len(known) and known[position] > known[position - 1]:
            copies.clear()

    def dispatching(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, calls[name])
            calls[name] += 1
            if key not in copies:
                copies[key] = zoo.hooked(originals[name], config_of(lambda: known[position]))
            return copies[key](*args, **kwargs)

        return forward

    originals = {name: getattr(entry.build(), name) for name in entry.denoisers}
    for name in entry.denoisers:
        getattr(pipe, name).forward = dispatching(name)
    with observed(pipe, on_step):
        return plain, run(pipe, entry, **overrides)
