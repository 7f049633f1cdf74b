"""What parts read is off by, under any setting, without a generation.

A step that reuses reads a sum of what was computed before it, with weights that the how and the steps between give. So
what its reads are off by is such a sum too, and its size follows from the inner products of the trajectory:

    steps that compute  0 2 4        weights, order 1, step 3:  -0.5 of step 0, 1.5 of step 2
    error[3]            =  1.5 * output[2] - 0.5 * output[0] - output[3]
    error[i] . error[j] =  weights[i] @ products @ weights[j]

Where a part lies in another one, its error is read again in steps in which that one reuses, by the weights of that one:

    blocks compute 0 2 4, attentions in them 0 4        error of the attentions[3]  =  1.5 * error[2] - 0.5 * error[0]

Errors of different steps count half as if they pointed wherever they do, and half as if each had a direction of its
own: so no setting is chosen because its errors seem to undo each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch

from ..policy.how import How, Last, Residual, Scalars, Taylor
from ..policy.where import BLOCKS, MODEL
from .setting import Method, Part, Setting, kind_of, thinned
from .trajectory import Trajectory

Errors = tuple[tuple[str, np.ndarray, np.ndarray], ...]
"""For each part its kind, the place of its steps in a generation from -1 to 1, and products of their errors, [S, S]."""

Plan = tuple[bool | None, ...]
"""For each step of a part whether it reuses; `None` where it is neither run nor read."""

OUTER = (MODEL, BLOCKS)
"""Parts that others lie in, outermost first."""


def plans(setting: Setting, parts: Sequence[Trajectory]) -> list[tuple[How, Plan] | None]:
    """For each part how it is read and in which steps, `None` where it is left alone.

    Where what a part lies in reuses, it is neither run nor read.
    """
    found: dict[int, tuple[How, Plan]] = {}
    rests: dict[tuple[float, ...], Plan] = {}
    for i in sorted(range(len(parts)), key=lambda i: depth(parts[i])):
        role, timesteps = parts[i].role, parts[i].timesteps
        own = _part_of(setting.method, role)
        if own is None:
            continue
        compute = set(thinned(setting.compute, own.thin))
        around = rests.get(timesteps)
        reuses = [n > 0 and n not in compute for n in range(len(timesteps))]
        plan = tuple(None if around and around[n] else reuse for n, reuse in enumerate(reuses))
        found[i] = own.how, plan
        if role in OUTER:
            rests[timesteps] = plan
    return [found.get(i) for i in range(len(parts))]


def depth(part: Trajectory) -> int:
    """In how many others it may lie."""
    return OUTER.index(part.role) if part.role in OUTER else len(OUTER)


@functools.lru_cache(maxsize=256)
def _part_of(method: Method, role: str) -> Part | None:
    return next((part for part in method.parts if part.where.takes(role, role)), None)


class Forecasts:
    """The errors of settings on a model.

    Args:
        parts: the pooled trajectories.
    """

    MOST_KNOWN = 4096
    """Of how many plans the weights are remembered: 10 kB each for 50 steps."""

    def __init__(self, parts: Sequence[Trajectory]) -> None:
        self.parts = tuple(parts)
        self._known: dict[tuple[How, Plan], np.ndarray] = {}
        every = sorted({t for part in parts for t in part.timesteps}, reverse=True)
        ends = max(len(every) - 1, 1)
        self._places = [np.array([2 * every.index(t) / ends - 1 for t in part.timesteps]) for part in parts]

    def errors(self, setting: Setting) -> Errors:
        """What the parts' reads are off by."""
        planned = plans(setting, self.parts)
        around: dict[tuple[float, ...], tuple[np.ndarray, Plan]] = {}
        found = []
        for part, places, each in sorted(
            zip(self.parts, self._places, planned, strict=True), key=lambda each: depth(each[0])
        ):
            if each is None or not any(each[1]):
                continue
            (weights,) = self._weights(each[0], [each[1]])  # [S, S]
            if part.role in OUTER:
                around[part.timesteps] = weights, each[1]
            elif part.timesteps in around:
                weights = _read_again(weights, *around[part.timesteps])
            products = weights @ part.products @ weights.T
            np.fill_diagonal(products, 2 * np.diag(products))
            found.append((kind_of(part.role), places, products / 2))
        return tuple(found)

    def prepare(self, settings: Sequence[Setting]) -> None:
        """Find what `errors` needs for many settings at once, which takes little more time than for one."""
        wanted: dict[How, dict[Plan, None]] = {}
        for setting in settings:
            for planned in plans(setting, self.parts):
                if planned is not None and any(planned[1]):
                    wanted.setdefault(planned[0], {})[planned[1]] = None
        for how, several in wanted.items():
            self._weights(how, list(several))

    def _weights(self, how: How, several: Sequence[Plan]) -> list[np.ndarray]:
        """For each plan the weights of every step's output in what each step is off by: [S, S] float32."""
        if isinstance(how, Taylor):
            how = dataclasses.replace(how, of=Last(), dtype=None)
        elif isinstance(how, Residual):
            how = Last()
        if len(self._known) + len(several) > self.MOST_KNOWN:
            self._known.clear()
        of_length: dict[int, list[Plan]] = {}
        for plan in several:
            if (how, plan) not in self._known:
                of_length.setdefault(len(plan), []).append(plan)
        for alike in of_length.values():
            self._known.update(zip([(how, plan) for plan in alike], _weights(how, alike), strict=True))
        return [self._known[how, plan] for plan in several]


def _read_again(inner: np.ndarray, outer: np.ndarray, reuses: Plan) -> np.ndarray:
    """The errors of a part, [S, S], with those that the part around it reads again in the steps in which it reuses.

    In such a step the weights of the outer part are those of the steps that it reads, and -1 of the step itself.
    """
    skipped = [step for step, reuse in enumerate(reuses) if reuse]
    read = outer[skipped]
    read[np.arange(len(skipped)), skipped] = 0.0
    found = inner.copy()
    found[skipped] = read @ inner
    return found


def _weights(how: How, several: Sequence[Plan]) -> np.ndarray:
    """As `Forecasts._weights`, of plans of one length: [P, S, S].

    The how's own functions say it, on outputs that are the unit vectors.
    """
    reuses = torch.tensor([[step is True for step in plan] for plan in several])[..., None]  # [P, S, 1]
    computes = torch.tensor([[step is False for step in plan] for plan in several])[..., None]
    outputs = torch.eye(reuses.shape[1]).expand(len(several), -1, -1)  # [P, S, S]: of each step
    slots = tuple(map(torch.zeros_like, how.slots((outputs[:, 0],))))  # [P, S] each
    filled = distance = torch.zeros(len(several), 1)
    rows = torch.zeros_like(outputs)
    for step in range(reuses.shape[1]):
        scalars = Scalars(torch.where(filled > 0, distance, 1.0), filled)
        rows[:, step] = torch.where(reuses[:, step], how.read(slots, (), scalars)[0] - outputs[:, step], 0.0)
        updated = how.update(slots, (), (outputs[:, step],), scalars)
        slots = tuple(torch.where(computes[:, step], new, old) for new, old in zip(updated, slots, strict=True))
        filled = filled + computes[:, step]
        distance = torch.where(computes[:, step], 1.0, distance + 1)
    found: np.ndarray = rows.numpy()
    return found
