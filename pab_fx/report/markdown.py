"""A report in Markdown, as for an issue or a page of documentation."""

from __future__ import annotations

from collections.abc import Sequence

from . import content
from .content import Table
from .data import ReportData
from .strips import SOURCES


def markdown(report: ReportData) -> str:
    """The report in Markdown."""
    parts = [f"# {content.title_of(report)}"]
    if report.schedule.strips:
        strips = "\n".join(["```", *content.strip_lines(report, " "), "```"])
        parts += ["## Schedule", strips, f"C computes, R reuses; {SOURCES[report.schedule.source]}."]
    regions = content.region_table(report)
    if regions.rows:
        line = content.step_line(report)
        parts += ["## Attentions", _table(regions), f"{line[0].upper()}{line[1:]}." if line else ""]
    parts += ["## Graphs", _table(content.graph_table(report)), _items(content.graph_lines(report))]
    if report.reused:
        parts += ["## Calls and caches", _table(content.role_table(report))]
    for heading, lines in (
        ("Left alone", content.left_alone(report)),
        ("Notes", content.notes(report)),
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


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)
