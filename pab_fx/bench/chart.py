"""Charts: how much faster than `torch.compile` each column is, and how much there is to win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.palette import bare, pyplot
from .results import BenchResult, ModelResult

COLOURS = {"pab_fx specialize": "#1f6feb", "pab_fx cond": "#58a6ff", "regional": "#9ec9ff", "lower bound": "#c9a227"}
OTHERS = "#9aa0a6"
SUFFIXES = (".png", ".svg", ".pdf")


def save_chart(result: BenchResult, path: Path) -> None:
    """Write the chart, a panel for each model.

    Raises:
        ValueError: without matplotlib; or if `compile` is not among the columns: bars are ratios to it.
    """
    if not any(model.column("compile") for model in result.models):
        raise ValueError("the chart shows ratios to compile, which is not among the columns.")
    across = min(2, len(result.models))
    down = -(-len(result.models) // across)
    longest = max(len(model.columns) for model in result.models)
    figure, axes = pyplot().subplots(
        down, across, figsize=(6.4 * across, down * (0.34 * longest + 1.3)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(result.models) :]:
        axis.set_visible(False)
    for axis, model in zip(axes.flat, result.models, strict=False):
        _draw(axis, model)
    title = "Speed-up of a generation over torch.compile: median, and lowest to highest round as a black line"
    figure.suptitle(f"{title}\n{result.machine}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


DOTS = {
    "hooks + compile": (OTHERS, "o"),
    "cache-dit + compile": ("#c46a3f", "s"),
    "regional": (COLOURS["regional"], "v"),
    "pab_fx cond": (COLOURS["pab_fx cond"], "^"),
    "pab_fx specialize": (COLOURS["pab_fx specialize"], "D"),
    "lower bound": (COLOURS["lower bound"], "|"),
}
"""Colour and mark of the columns of the overview; the last ones are drawn over the first."""


def save_overview(models: Sequence[ModelResult], path: Path) -> None:
    """Write the chart of many policies and models: a row for each, a mark for each compiled column."""
    shown = [model for model in models if model.column("compile")]
    figure, axis = pyplot().subplots(figsize=(8, 0.24 * len(shown) + 1.4), layout="constrained")
    for name, (colour, mark) in DOTS.items():
        columns = [(y, model.column(name)) for y, model in enumerate(shown)]
        found = [(column.speedup.median, y) for y, column in columns if column and column.speedup]
        if found:
            size = 130 if mark == "|" else 34
            axis.scatter(*zip(*found, strict=True), color=colour, marker=mark, s=size, label=name, zorder=3)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [f"{model.policy}, {model.model}" for model in shown], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.4)
    axis.set_xlabel("times as fast as torch.compile alone, median of the rounds", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    bare(axis)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def _draw(axis: Any, model: ModelResult) -> None:
    """A model's panel: a bar for each column with its spread over rounds, a line where the lower bound is."""
    columns = [column for column in model.columns if column.speedup is not None]
    bound = model.column("lower bound")
    for y, column in enumerate(columns):
        assert column.speedup is not None
        median, low, high = column.speedup.median, column.speedup.low, column.speedup.high
        axis.barh(y, median, color=COLOURS.get(column.column, OTHERS), height=0.72)
        axis.plot([low, high], [y, y], color="black", linewidth=1.2, solid_capstyle="butt")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # over the lines that go through it
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axis.annotate(f"{median:.2f}x", (high, y), va="center", fontsize=8, bbox=box, **offset)
    axis.axvline(1.0, color="black", linewidth=0.8)
    if bound is not None and bound.speedup is not None:
        axis.axvline(bound.speedup.median, color=COLOURS["lower bound"], linewidth=1.2, linestyle="--")
    axis.set_yticks(range(len(columns)), [column.column for column in columns], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max((column.speedup.high for column in columns if column.speedup), default=1.0))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(model.title, fontsize=9, loc="left")
    bare(axis)
