"""How far samples of a setting will be from those without a cache, predicted without a generation.

A step that reuses reads a sum of what was computed before it, with weights that the how and the steps between give. So
what a part's reads are off by, in each step, is such a sum too, and its size follows from the inner products of the
trajectory. How much an error in a step matters for the sample is fitted to what settings have done to samples:

    squared error of the samples  =  sum over parts and pairs of steps (i, j) of  w[i] * w[j] * (error[i] . error[j])
    w[i] = exp(a cubic polynomial of the step), one for each kind of part

Errors of different steps count half as if they pointed wherever they do, and half as if each had a direction of its
own: so no setting is chosen because its errors seem to undo each other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import least_squares

from ..policy.how import How, Last, Residual, Scalars, Taylor
from ..policy.where import ATTENTION_ROLES, BLOCKS, MODEL
from .setting import Method, Part, Setting, thinned
from .trajectory import Trajectory

Errors = tuple[tuple[str, np.ndarray, np.ndarray], ...]
"""For each part its kind, the place of its steps in a generation from -1 to 1, and products of their errors, [S, S]."""

OUTER = (MODEL, BLOCKS)
"""Parts that others lie in, outermost first."""


Plan = tuple[bool, ...]
"""For each step of a part whether it reuses."""


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


def errors_of(setting: Setting, parts: Sequence[Trajectory]) -> Errors:
    """What the parts' reads are off by."""
    found = []
    for part, planned in zip(parts, plans(setting, parts), strict=True):
        if planned is None or not any(planned[1]):
            continue
        (reads,) = _reads(planned[0], [planned[1]])  # [S, S]
        products = reads @ part.products @ reads.T
        np.fill_diagonal(products, 2 * np.diag(products))
        found.append((_kind(part.role), _places(part.timesteps, tuple(each.timesteps for each in parts)), products / 2))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _places(timesteps: tuple[float, ...], others: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """Where steps lie in a generation, from -1 to 1."""
    every = sorted({t for each in others for t in each}, reverse=True)
    return np.array([2 * every.index(t) / max(len(every) - 1, 1) - 1 for t in timesteps])


def _kind(role: str) -> str:
    return "attentions" if role in ATTENTION_ROLES else role


def prepare(settings: Sequence[Setting], parts: Sequence[Trajectory]) -> None:
    """Find what `errors_of` needs for many settings at once, which takes little more time than for one."""
    wanted: dict[How, dict[Plan, None]] = {}
    for setting in settings:
        for planned in plans(setting, parts):
            if planned is not None and any(planned[1]):
                wanted.setdefault(planned[0], {})[planned[1]] = None
    for how, several in wanted.items():
        _reads(how, list(several))


_known: dict[tuple[How, Plan], np.ndarray] = {}
MOST_KNOWN = 4096


def _reads(how: How, several: Sequence[Plan]) -> list[np.ndarray]:
    """What a part reads in each step that reuses, less what it would compute: rows of weights of each step's output.

    The how's own functions say it, on outputs that are the unit vectors.

    Args:
        how: how what is kept is read.
        several: plans of as many steps.

    Returns:
        [S, S] float32 for each plan.
    """
    if isinstance(how, Taylor):
        how = dataclasses.replace(how, of=Last(), dtype=None)
    elif isinstance(how, Residual):
        how = Last()
    if len(_known) + len(several) > MOST_KNOWN:
        _known.clear()
    of_length: dict[int, list[Plan]] = {}
    for plan in several:
        if (how, plan) not in _known:
            of_length.setdefault(len(plan), []).append(plan)
    for alike in of_length.values():
        _known.update(zip([(how, plan) for plan in alike], _computed_reads(how, alike), strict=True))
    return [_known[how, plan] for plan in several]


def _computed_reads(how: How, several: Sequence[Plan]) -> np.ndarray:
    """For plans of one length, [P, S, S]."""
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


@dataclass(frozen=True)
class Sensitivity:
    """How much errors matter, by the kind of part and the step; fitted to what settings have done.

    Args:
        weights: for each kind the coefficients of the polynomial, the highest power first.
    """

    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def psnr(self, errors: Errors) -> float:
        """The predicted mean over prompts, in dB; infinite where nothing reuses."""
        squared = 0.0
        for kind, places, products in errors:
            weights = np.exp(np.polyval(self.weights.get(kind, (0.0,)), places))
            squared += float(weights @ products @ weights)
        return -10 * math.log10(squared) if squared > 0 else math.inf


DEGREE = 3


def fitted(runs: Sequence[tuple[Errors, float]]) -> Sensitivity:
    """What explains best what was found, in dB; where little was found, all steps matter alike.

    Args:
        runs: the errors of settings, and the PSNR of their samples in dB.
    """
    kinds = sorted({kind for errors, _ in runs for kind, _, _ in errors})
    if not kinds:
        return Sensitivity()

    def sensitivity(numbers: np.ndarray) -> Sensitivity:
        rows = numbers[1:].reshape(len(kinds), DEGREE + 1) + np.array([0.0] * DEGREE + [numbers[0]])
        return Sensitivity({kind: tuple(row) for kind, row in zip(kinds, rows, strict=True)})

    def residuals(numbers: np.ndarray) -> np.ndarray:
        model = sensitivity(numbers)
        off = [model.psnr(errors) - psnr for errors, psnr in runs]
        bent = numbers[1:].reshape(len(kinds), DEGREE + 1) * np.array([1.0] * DEGREE + [0.1])
        return np.concatenate([off, bent.ravel()])

    start = np.zeros(1 + len(kinds) * (DEGREE + 1))
    flat = Sensitivity()
    start[0] = float(np.mean([flat.psnr(errors) - psnr for errors, psnr in runs])) * math.log(10) / 20
    return sensitivity(least_squares(residuals, start, loss="soft_l1", f_scale=3.0, max_nfev=40).x)


@dataclass(frozen=True)
class Costs:
    """What share of a generation's floating-point operations is left.

    Args:
        shares: of each role, of a step that reuses nothing; of parts that lie in others too.
        calls: of each role, how many calls a generation makes.
    """

    shares: Mapping[str, float]
    calls: Mapping[str, int]

    def left(self, reused: Mapping[str, int]) -> float:
        """The share that is left where so many calls of each role reuse.

        Example:
            >>> Costs({"blocks": 0.9}, {"blocks": 50}).left({"blocks": 25})
            0.55
        """
        spared = sum(self.shares.get(role, 0.0) * count / self.calls[role] for role, count in reused.items() if count)
        return max(1 - spared, 1e-3)

    def predicted(self, setting: Setting, parts: Sequence[Trajectory]) -> float:
        """The share that is left under a setting."""
        of_role: dict[str, list[bool]] = {}
        for part, planned in zip(parts, plans(setting, parts), strict=True):
            of_role.setdefault(part.role, []).extend(planned[1] if planned else (False,) * len(part.timesteps))
        return max(1 - sum(self.shares.get(role, 0.0) * sum(plan) / len(plan) for role, plan in of_role.items()), 1e-3)
