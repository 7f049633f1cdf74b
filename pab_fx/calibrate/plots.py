"""What a calibration shows in pictures: changes by layer and step, by role and step, and speed-up against error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..policy.where import ROLES
from ..report.palette import bare, pyplot
from .changes import ModuleChanges
from .result import Calibration, Outcome

COLOURS = {"spatial": "#1f6feb", "temporal": "#d1495b", "cross": "#2a9d5c", "mlp": "#8a63d2"}
"""Of the roles, in every picture."""

PROPOSAL, TRIED, COMPARED, PREDICTED = "#c9a227", "#9aa0a6", "#24292f", "#9ec9ff"
CHANGE = "relative change from the step before"


def save_plots(found: Calibration) -> None:
    """Write `changes.png`, `roles.png` and `pareto.png` into the calibration's folder."""
    changes_by_layer(found.changes, found.folder / "changes.png")
    changes_by_role(found.changes, found.folder / "roles.png")
    pareto(found, found.folder / "pareto.png")


def changes_by_layer(changes: Sequence[ModuleChanges], path: Path) -> None:
    """Write a heat map: a row for each attention and feed-forward, a column for each step."""
    from matplotlib.colors import LogNorm

    rows = [module for role in ROLES for module in changes if module.role == role]
    known = sorted(row[0] for module in rows for row in module.by_lag if row and row[0] > 0)
    few = len(known) // 50  # outliers at either end would leave the rest without contrast
    norm = LogNorm(vmin=known[few], vmax=known[-1 - few]) if known else None
    labels = len(rows) <= 60
    height = (0.24 if labels else 0.1) * len(rows) + 1.5
    figure, axis = pyplot().subplots(figsize=(9.6, height), layout="constrained")
    steps = max(len(module.timesteps) for module in rows)
    table = [
        [float("nan")] * (steps - len(module.timesteps)) + [row[0] if row else float("nan") for row in module.by_lag]
        for module in rows
    ]
    image = axis.imshow(table, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, label=CHANGE, pad=0.01, fraction=0.04)
    bar.ax.yaxis.set_major_formatter(_percent)
    bar.ax.yaxis.set_minor_formatter(_percent)
    bar.ax.tick_params(which="both", labelsize=8)
    axis.set_yticks(range(len(rows)) if labels else [], [module.name for module in rows] if labels else [], fontsize=7)
    for label, module in zip(axis.get_yticklabels(), rows, strict=False):
        label.set_color(COLOURS[module.role])
    for i in (i for i in range(1, len(rows)) if rows[i].role != rows[i - 1].role):
        axis.axhline(i - 0.5, color="white", linewidth=1.5)
    for role in dict.fromkeys(module.role for module in rows):
        middle = statistics.fmean(i for i, module in enumerate(rows) if module.role == role)
        colour = {"color": COLOURS[role], "fontsize": 9, "fontweight": "bold"}
        axis.text(0, middle, role, rotation=90, ha="center", va="center", **colour)
    _step_axis(axis, max((module.timesteps for module in rows), key=len))
    axis.set_title("How much each output changes, by layer and step", loc="left", fontsize=11)
    _save(figure, path)


def changes_by_role(changes: Sequence[ModuleChanges], path: Path) -> None:
    """Write a curve for each role over the timesteps: the mean over layers, and the range of the layers as a band."""
    figure, axis = pyplot().subplots(figsize=(8.0, 4.4), layout="constrained")
    for role in ROLES:
        of_role = [module for module in changes if module.role == role]
        at: dict[float, list[float]] = {}
        for module in of_role:
            for t, row in zip(module.timesteps, module.by_lag, strict=True):
                if row:
                    at.setdefault(t, []).append(row[0])
        if not at:
            continue
        timesteps = sorted(at, reverse=True)
        low, mean, high = ([of(at[t]) for t in timesteps] for of in (min, statistics.fmean, max))
        axis.fill_between(timesteps, low, high, color=COLOURS[role], alpha=0.12, linewidth=0)
        label = f"{role} ({len({module.name for module in of_role})} layers)"
        axis.plot(timesteps, mean, color=COLOURS[role], label=label, linewidth=2)
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


def pareto(found: Calibration, path: Path) -> None:
    """Write speed-up against error: the predicted front, what was generated with, the presets, and the proposal."""
    is_psnr = found.budget.psnr is not None
    figure, axis = pyplot().subplots(figsize=(8.0, 5.0), layout="constrained")

    def error(outcome: Outcome) -> float:
        return outcome.psnr(found.peak) if is_psnr else outcome.relative_l2

    generated = [found.proposal, *found.tried, *found.compared]
    most = 1.15 * max(outcome.speedup for outcome in generated) - 0.15
    line = [(each.psnr if is_psnr else each.relative_l2, each.speedup) for each in found.front if each.speedup <= most]
    axis.plot(*zip(*line, strict=True), color=PREDICTED, linewidth=2.5, label="front, as predicted", zorder=1)
    others = [outcome for outcome in found.tried if outcome is not found.proposal]
    if others:
        points = list(map(error, others)), [outcome.speedup for outcome in others]
        axis.scatter(*points, color=TRIED, s=36, label="tried", zorder=2)
    for outcome in found.compared:
        axis.scatter(error(outcome), outcome.speedup, color=COMPARED, marker="D", s=44, zorder=3)
        _label(axis, error(outcome), outcome.speedup, outcome.label, COMPARED)
    axis.scatter(error(found.proposal), found.proposal.speedup, color=PROPOSAL, marker="*", s=260, zorder=4)
    _label(axis, error(found.proposal), found.proposal.speedup, "proposal", PROPOSAL, "bold")
    limit = found.budget.mean("psnr" if is_psnr else "relative_l2") or 0.0  # one of them is given
    name = f"budget: {found.budget}"
    axis.axvline(limit, color=PROPOSAL, linestyle="--", linewidth=1, label=name, zorder=0)
    if is_psnr:
        axis.set_xlabel("PSNR to the samples without PAB, dB, mean over prompts   (error falls to the right)")
    else:
        axis.invert_xaxis()
        axis.set_xlabel("relative L2 distance from the samples without PAB, mean over prompts   (falls to the right)")
    axis.set_ylabel("speed-up of denoising, predicted from step times")
    axis.set_title("Speed-up against error", loc="left", fontsize=11)
    errors = [*map(error, generated), limit]
    pad = 0.15 * (max(errors) - min(errors)) or 1.0
    left, right = min(errors) - pad, max(errors) + pad
    axis.set_xlim((left, right) if is_psnr else (right, max(left, 0.0)))
    axis.set_ylim(1.0, most + 0.1)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    bare(axis)
    _save(figure, path)


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
