"""A report in Markdown, as for an issue or a page of documentation."""

from __future__ import annotations

from collections.abc import Sequence

from .content import (
    Table,
    graph_lines,
    graph_table,
    left_alone,
    notes,
    region_table,
    role_table,
    source_of,
    step_line,
    strip_labels,
    title_of,
)
from .data import ReportData
from .strips import ruler


def markdown(report: ReportData) -> str:
    """The report in Markdown.

    Args:
        report: from `PAB.report()` or `pab_fx.explain`.
    """
    parts = [f"# {title_of(report)}"]
    if report.schedule.strips:
        parts += ["## Schedule", _strips(report), f"C computes, R reuses; {source_of(report)}."]
    regions = region_table(report)
    if regions.rows:
        parts += ["## Attentions", _table(regions), _sentence(step_line(report))]
    parts += ["## Graphs", _table(graph_table(report)), _items(graph_lines(report))]
    if report.reused:
        parts += ["## Calls and caches", _table(role_table(report))]
    for heading, lines in (
        ("Left alone", left_alone(report)),
        ("Notes", notes(report)),
        ("Warnings", report.warnings),
    ):
        parts += [f"## {heading}", _items(lines)] if lines else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    titles = [column.title for column in table.columns]
    rules = ["---:" if column.is_number else "---" for column in table.columns]
    return "\n".join(_row(row) for row in (titles, rules, *table.rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"


def _strips(report: ReportData) -> str:
    labels = ["timestep", *strip_labels(report)]
    width = max(map(len, labels)) + 2
    strips = [ruler(report.schedule.timesteps, 2), *(" ".join(strip.steps) for strip in report.schedule.strips)]
    lines = [f"{label.ljust(width)}{strip}" for label, strip in zip(labels, strips, strict=True)]
    return "\n".join(["```", *lines, "```"])


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}." if line else ""
