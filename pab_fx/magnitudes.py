"""Measure the ratios by which `Magnitude` and diffusers' `MagCacheConfig` decide, as its `calibrate=True` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from .diffusers.magcache import measured_in, measuring
from .enable import enable


def magnitude_ratios(
    model: Any, generate: Callable[[], Any], steps: int, path: str | Path | None = None
) -> tuple[float, ...]:
    """The ratios of the residuals' magnitudes from step to step, of one checkpoint and sampler (MagCache).

    A residual is what all blocks add to the image's stream, and its magnitude the length of a token's. The mean is
    taken over tokens, as in `diffusers/hooks/mag_cache.py`, and over cache contexts, where a step has several calls.

    Args:
        model: a transformer, or a pipeline that holds one.
        generate: runs one generation with it.
        steps: how many steps that has.
        path: a file to write them to, as a JSON list.

    Returns:
        A ratio for each step; the first one is 1.

    Raises:
        TypeError: if `generate` is no function.
        ValueError: if the generation has another number of steps, or nothing of the model could be measured.

    Example:
        >>> import pab_fx, torch
        >>> class Nothing(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
        >>> model = Nothing()
        >>> pab_fx.magnitude_ratios(model, lambda: model(torch.ones(1)), steps=1)
        Traceback (most recent call last):
        ...
        ValueError: nothing was measured: the model has no blocks that a stream goes through, or no step of it ran.
    """
    if not callable(generate):
        raise TypeError(f"generate must be a function that runs a generation, as lambda: pipe(...), got {generate!r}.")
    ended: list[tuple[float, ...]] = []
    with enable(model, measuring(steps), inner="eager") as pab:
        pab.backend.runtime.at_end = lambda cells: ended.extend(measured_in(cells))
        generate()
        measured = ended or measured_in(pab.backend.runtime.cells())
    if not measured:
        raise ValueError(
            "nothing was measured: the model has no blocks that a stream goes through, or no step of it ran."
        )
    if any(len(each) != steps for each in measured):
        raise ValueError(f"steps={steps}, and the generation has another number of steps.")
    ratios = tuple(map(fmean, zip(*measured, strict=True)))
    if path is not None:
        Path(path).write_text(json.dumps(ratios))
    return ratios
