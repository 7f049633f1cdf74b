"""What a calibration shows in pictures: changes by layer and step, by role and step, and speed-up against error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..policy.policy import Policy
from ..policy.when import evenly_spaced, reused_calls
from ..policy.where import ROLES
from ..report.palette import COMPUTE_COLOUR, PARTLY_COLOUR, REUSE_COLOUR, ROLE_COLOURS, bare, pyplot
from .result import Calibration
from .trajectory import Trajectory

PROPOSAL, TRIED, COMPARED = "#c9a227", "#9aa0a6", "#24292f"
CHANGE = "relative change from the step before"


def save_plots(found: Calibration) -> None:
    """Write `changes.png`, `roles.png` and `front.png` into the calibration's folder."""
    changes_by_layer(found.trajectories, found.folder / "changes.png")
    changes_by_role(found.trajectories, found.folder / "roles.png")
    front(found, found.folder / "front.png")


def changes_by_layer(parts: Sequence[Trajectory], path: Path) -> None:
    """Write a heat map: a row for each attention and feed-forward, a column for each step."""
    from matplotlib.colors import LogNorm

    rows = [module for role in ROLES for module in parts if module.role == role]
    known = sorted(change for module in rows for change in _changes(module) if change > 0)
    few = len(known) // 50  # outliers at either end would leave the rest without contrast
    norm = LogNorm(vmin=known[few], vmax=known[-1 - few]) if known else None
    labels = len(rows) <= 60
    height = (0.24 if labels else 0.1) * len(rows) + 1.5
    figure, axis = pyplot().subplots(figsize=(9.6, height), layout="constrained")
    steps = max(len(module.timesteps) for module in rows)
    table = [[float("nan")] * (steps - len(module.timesteps) + 1) + _changes(module) for module in rows]
    image = axis.imshow(table, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, label=CHANGE, pad=0.01, fraction=0.04)
    bar.ax.yaxis.set_major_formatter(_percent)
    bar.ax.yaxis.set_minor_formatter(_percent)
    bar.ax.tick_params(which="both", labelsize=8)
    axis.set_yticks(range(len(rows)) if labels else [], [module.name for module in rows] if labels else [], fontsize=7)
    for label, module in zip(axis.get_yticklabels(), rows, strict=False):
        label.set_color(ROLE_COLOURS[module.role])
    for i in (i for i in range(1, len(rows)) if rows[i].role != rows[i - 1].role):
        axis.axhline(i - 0.5, color="white", linewidth=1.5)
    for role in dict.fromkeys(module.role for module in rows):
        middle = statistics.fmean(i for i, module in enumerate(rows) if module.role == role)
        colour = {"color": ROLE_COLOURS[role], "fontsize": 9, "fontweight": "bold"}
        axis.text(0, middle, role, rotation=90, ha="center", va="center", **colour)
    _step_axis(axis, max((module.timesteps for module in rows), key=len))
    axis.set_title("How much each output changes, by layer and step", loc="left", fontsize=11)
    _save(figure, path)


def _changes(part: Trajectory) -> list[float]:
    """How much it changes from step to step."""
    return [part.change(step) for step in range(1, len(part.timesteps))]


def changes_by_role(parts: Sequence[Trajectory], path: Path) -> None:
    """Write a curve for each role over the timesteps: the mean over layers, and the range of the layers as a band."""
    figure, axis = pyplot().subplots(figsize=(8.0, 4.4), layout="constrained")
    for role in ROLES:
        of_role = [module for module in parts if module.role == role]
        at: dict[float, list[float]] = {}
        for module in of_role:
            for t, change in zip(module.timesteps[1:], _changes(module), strict=True):
                at.setdefault(t, []).append(change)
        if not at:
            continue
        timesteps = sorted(at, reverse=True)
        low, mean, high = ([of(at[t]) for t in timesteps] for of in (min, statistics.fmean, max))
        axis.fill_between(timesteps, low, high, color=ROLE_COLOURS[role], alpha=0.12, linewidth=0)
        label = f"{role} ({len({module.name for module in of_role})} layers)"
        axis.plot(timesteps, mean, color=ROLE_COLOURS[role], label=label, linewidth=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_percent)
    axis.yaxis.set_minor_formatter(lambda value, place: _percent(value, place) if f"{value:e}"[0] in "25" else "")
    axis.tick_params(which="both", labelsize=9)
    axis.invert_xaxis()
    axis.set_xlabel("timestep, from noise to sample")
    axis.set_ylabel(CHANGE)
    axis.set_title("How much outputs change, by role: mean over layers, and their range", loc="left", fontsize=11)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="lower center")
    bare(axis)
    _save(figure, path)


def front(found: Calibration, path: Path) -> None:
    """Write speed-up against error: each method's predicted curve, what was generated with, and the proposal.

    Below it the steps of the proposal, a row for each part.
    """
    height = 0.28 * len(found.policies) + 0.5
    figure, (axis, strip) = pyplot().subplots(
        2, 1, figsize=(8.0, 5.4 + height), layout="constrained", height_ratios=(5.4, height)
    )
    peak = found.peak
    held = [each.held for each in found.tried if each.held is not None and each.held is not found.proposal]
    most = 1.15 * max(outcome.speedup for outcome in (found.proposal, *held, *found.compared)) + 0.2
    for label, points in found.curves.items():
        curve = sorted(points)
        family = label.split(",")[0]
        axis.plot(*zip(*curve, strict=True), color=FAMILIES.get(family, COMPARED), linewidth=1, alpha=0.55)
    for family, colour in FAMILIES.items():
        if any(label.startswith(f"{family},") for label in found.curves):
            axis.plot([], [], color=colour, label=f"{family}, predicted")
    if held:
        points_of = [outcome.speedup for outcome in held], [outcome.psnr(peak) for outcome in held]
        axis.scatter(*points_of, color=TRIED, s=30, label="tried, prompts held out", zorder=3)
    for outcome in found.compared:
        axis.scatter(outcome.speedup, outcome.psnr(peak), color=COMPARED, marker="D", s=40, zorder=3)
        _label(axis, outcome.speedup, outcome.psnr(peak), outcome.label, COMPARED)
    axis.scatter(found.proposal.speedup, found.proposal.psnr(peak), color=PROPOSAL, marker="*", s=260, zorder=4)
    _label(axis, found.proposal.speedup, found.proposal.psnr(peak), "proposal", PROPOSAL, "bold")
    limit = found.budget.mean("psnr")
    if limit is not None:
        axis.axhline(limit, color=PROPOSAL, linestyle="--", linewidth=1, label=f"budget: {found.budget}", zorder=0)
    elif found.budget.speedup is not None:
        axis.axvline(found.budget.speedup, color=PROPOSAL, linestyle="--", linewidth=1, label=f"budget: {found.budget}")
    axis.set_xlim(1.0, most)
    axis.set_ylim(max(axis.get_ylim()[0], 10), min(axis.get_ylim()[1], 90))
    axis.set_xlabel("speed-up, by floating-point operations")
    axis.set_ylabel("PSNR to the samples without a cache, dB")
    axis.set_title("Speed-up against error: further right is faster, further up is nearer", loc="left", fontsize=11)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    bare(axis)
    steps = max(len(each.timesteps) for each in found.trajectories)
    strips(strip, [(type(policy.where).__name__, policy) for policy in found.policies], steps)
    _save(figure, path)


FAMILIES = {
    "blocks": ROLE_COLOURS["blocks"],
    "blocks and attentions": ROLE_COLOURS["temporal"],
    "model": ROLE_COLOURS["model"],
    "attentions": ROLE_COLOURS["spatial"],
    "attentions and feed-forwards": ROLE_COLOURS["mlp"],
}
"""Colours of methods, by where they are."""


def strips(axis: Any, rows: Sequence[tuple[str, Policy]], steps: int) -> None:
    """Draw in which steps policies compute, a row for each with its label."""
    for row, (_, policy) in enumerate(rows):
        assert policy.when is not None
        plan = reused_calls(policy.when, evenly_spaced(steps))
        reuses = REUSE_COLOUR if policy.when.signal is None else PARTLY_COLOUR
        colours = [reuses if reuse else COMPUTE_COLOUR for reuse in plan]
        axis.bar(range(steps), [0.7] * steps, bottom=row - 0.35, width=0.86, color=colours)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-0.6, steps - 0.4)
    axis.set_xlabel("step: grey computes, green reuses, yellow does either, by a signal", fontsize=9)
    axis.tick_params(labelsize=8, length=0)
    axis.spines[:].set_visible(False)


def _label(axis: Any, x: float, y: float, text: str, colour: str, weight: str = "normal") -> None:
    offset = {"xytext": (8, 5), "textcoords": "offset points"}
    axis.annotate(text, (x, y), color=colour, fontsize=9, fontweight=weight, zorder=5, **offset)


def _step_axis(axis: Any, timesteps: Sequence[float]) -> None:
    """Steps below, a few of them with their timestep."""
    every = max(1, len(timesteps) // 10)
    shown = range(0, len(timesteps), every)
    axis.set_xticks(shown, [f"{i}\n{timesteps[i]:g}" for i in shown], fontsize=8)
    axis.set_xlabel("step, and its timestep; the first step has none before it")


def _percent(value: float, place: Any = None) -> str:
    return f"{100 * value:g} %"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
