"""What parts read is off by, under any setting, without a generation.

A step that reuses reads a sum of what was computed before it, with weights that the how and the steps between give. So
what its reads are off by is such a sum too, and its size follows from the inner products of the trajectory:

    steps that compute  0 2 4        weights, order 1, step 3:  -0.5 of step 0, 1.5 of step 2
    error[3]            =  1.5 * output[2] - 0.5 * output[0] - output[3]
    error[i] . error[j] =  weights[i] @ products @ weights[j]

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

Plan = tuple[bool, ...]
"""For each step of a part whether it reuses."""

OUTER = (MODEL, BLOCKS)
"""Parts that others lie in, outermost first."""


def plans(setting: Setting, parts: Sequence[Trajectory]) -> list[tuple[How, Plan] | None]:
    """For each part how it is read and in which steps, `None` where it is left alone.

    Where what a part lies in reuses, it is neither run nor read.
    """
    found: dict[int, tuple[How, Plan]] = {}
    rests: dict[tuple[float, ...], Plan] = {}
    depth = {role: i for i, role in enumerate(OUTER)}
    for i in sorted(range(len(parts)), key=lambda i: depth.get(parts[i].role, len(OUTER))):
        role, timesteps = parts[i].role, parts[i].timesteps
        own = _part_of(setting.method, role)
        if own is None:
            continue
        compute = set(thinned(setting.compute, own.thin))
        around = rests.get(timesteps)
        plan = tuple(n > 0 and n not in compute and not (around and around[n]) for n in range(len(timesteps)))
        found[i] = own.how, plan
        if role in OUTER:
            rests[timesteps] = plan
    return [found.get(i) for i in range(len(parts))]


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
        found = []
        for part, places, planned in zip(self.parts, self._places, plans(setting, self.parts), strict=True):
            if planned is None or not any(planned[1]):
                continue
            (weights,) = self._weights(planned[0], [planned[1]])  # [S, S]
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


def _weights(how: How, several: Sequence[Plan]) -> np.ndarray:
    """As `Forecasts._weights`, of plans of one length: [P, S, S].

    The how's own functions say it, on outputs that are the unit vectors.
    """
    reuses = torch.tensor(several)[..., None]  # [P, S, 1]
    outputs = torch.eye(reuses.shape[1]).expand(len(several), -1, -1)  # [P, S, S]: of each step
    slots = tuple(map(torch.zeros_like, how.slots((outputs[:, 0],))))  # [P, S] each
    filled = distance = torch.zeros(len(several), 1)
    rows = torch.zeros_like(outputs)
    for step in range(reuses.shape[1]):
        scalars = Scalars(torch.where(filled > 0, distance, 1.0), filled)
        computes = ~reuses[:, step]
        rows[:, step] = torch.where(computes, 0.0, how.read(slots, (), scalars)[0] - outputs[:, step])
        updated = how.update(slots, (), (outputs[:, step],), scalars)
        slots = tuple(torch.where(computes, new, old) for new, old in zip(updated, slots, strict=True))
        filled = filled + computes
        distance = torch.where(computes, 1.0, distance + 1)
    found: np.ndarray = rows.numpy()
    return found
