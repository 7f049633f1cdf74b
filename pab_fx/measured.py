"""Measure what rules ask for, in generations in which every step computes.

`magnitude_ratios` is for `Magnitude` and diffusers' `MagCacheConfig`, as its `calibrate=True`. `fit_rescale` fits the
polynomial by which `Change` rescales, as TeaCache's authors do for a model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch

from .diffusers.magcache import measured_in, measuring
from .enable import enable
from .policy.change import Change, ModulatedInput
from .policy.checks import check_integer
from .policy.how import Last, Scalars, Tensors
from .policy.policy import Policy
from .policy.when import Progress, Rule, Step
from .policy.where import Blocks

Numbers = dict[Any, list[float]]
"""By cache context, the numbers that a rule has read, in the order of the steps."""
Cells = Iterable[tuple[Any, Any, Any]]
"""As `Runtime.cells` yields them."""


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
    measured: list[tuple[float, ...]] = []
    _observe(model, measuring(steps), generate, lambda _, cells: measured.extend(measured_in(cells)))
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


MOST_STEPS = 1000
"""Of a generation, of which changes are noted; what comes after is left out."""


@dataclass(frozen=True)
class Observing(Change):
    """Read the change of a signal in every step, and compute every step."""

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """A step may reuse, so that the number is read, and then does not."""
        return step.n > 0 if signal is None else signal < -1.0

    def keeps(self, step: Step, progress: Progress, next_t: float | None) -> bool:
        """Always, also in the last step."""
        return True


@dataclass(frozen=True)
class ChangesOfOutput(Last):
    """The last output, and the relative changes of the first one from step to step."""

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """The first output, and the changes: shape [MOST_STEPS], float32."""
        return outputs[0], outputs[0].new_empty((MOST_STEPS,), dtype=torch.float32)

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The first output, and the changes with one more."""
        before, changes = slots
        change = (outputs[0] - before).float().abs().mean() / before.float().abs().mean()
        position = torch.cumsum(torch.ones_like(changes), 0) - 1
        return outputs[0], torch.where(position == scalars.filled, change, changes)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """No step reads; of a part with several outputs each would be the first one."""
        return tuple(slots[:1])


def fit_rescale(
    model: Any, generate: Callable[[], Any], of: Any = None, degree: int = 4, where: Any = None
) -> tuple[float, ...]:
    """Coefficients for `Change(..., rescale=)`: how far a part's output changes where a signal changes by so much.

    Every step computes. From step to step the relative change of the signal and that of the output are measured, in
    every cache context, and a polynomial from one to the other is fitted by least squares (TeaCache, arXiv 2411.19108,
    section 3.3). Take a generation with a prompt and a number of steps as they will be.

    Args:
        model: a transformer, or a pipeline that holds one.
        generate: runs one generation, or several, with it.
        of: whose signal, as for `Change`; `ModulatedInput()` for `None`.
        degree: of the polynomial.
        where: the part whose output is predicted, as for `Policy`; `Blocks()` for `None`.

    Returns:
        `degree + 1` coefficients, the highest power first.

    Raises:
        TypeError: if `generate` is no function.
        ValueError: if nothing could be measured, or in too few steps for the degree.

    Example:
        >>> import pab_fx, torch
        >>> model = torch.nn.Identity()
        >>> pab_fx.fit_rescale(model, lambda: model(torch.ones(1)))
        Traceback (most recent call last):
        ...
        ValueError: fit_rescale: 0 steps were measured, and degree=4 asks for 5 at least: the model has no such ...
    """
    check_integer("fit_rescale: degree", degree)
    rule = Observing(ModulatedInput() if of is None else of, threshold=0.0, accumulate=True)
    pairs: list[tuple[float, float]] = []

    def collect(numbers: Numbers, cells: Cells) -> None:
        for _, context, cell in cells:
            if cell.rule == rule and cell.caches:
                changes = cell.caches[1][1 : cell.count.n].tolist()
                pairs.extend(zip(numbers.pop(context, ()), changes, strict=False))

    _observe(model, Policy(Blocks() if where is None else where, rule, ChangesOfOutput()), generate, collect)
    if len(pairs) <= degree:
        raise ValueError(
            f"fit_rescale: {len(pairs)} steps were measured, and degree={degree} asks for {degree + 1} at least: the "
            "model has no such signal or part, or the generation has too few steps."
        )
    signal, output = zip(*pairs, strict=True)
    return tuple(map(float, numpy.polyfit(signal, output, degree)))


def _observe(
    model: Any, policy: Policy, generate: Callable[[], Any], collect: Callable[[Numbers, Cells], object]
) -> None:
    """Run generations under a policy, and hand over what was read and kept, at the end of each and of all.

    Raises:
        TypeError: if `generate` is no function.
    """
    if not callable(generate):
        raise TypeError(f"generate must be a function that runs a generation, as lambda: pipe(...), got {generate!r}.")
    numbers: Numbers = defaultdict(list)

    def note(context: Any, rule: Rule, number: float) -> None:
        numbers[context].append(number)

    with enable(model, policy, inner="eager") as pab:
        pab.backend.runtime.on_number = note
        pab.backend.runtime.at_end = lambda cells: collect(numbers, cells)
        generate()
        collect(numbers, pab.backend.runtime.cells())  # what no pipeline has given back
