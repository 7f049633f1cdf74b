"""A report for a terminal: as plain text, and in colour."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from . import content
from .content import Table
from .data import ReportData
from .strips import COMPUTE, EITHER, PARTLY, REUSE, SKIPPED, SOURCES, ruler

COLOURS = {
    COMPUTE: "white on grey37",
    PARTLY: "black on yellow",
    REUSE: "black on green",
    SKIPPED: "dim",
    EITHER: "black on cyan",
}
ROLE_COLOURS = {
    **{"spatial": "cyan", "temporal": "magenta", "cross": "yellow", "mlp": "blue"},
    **{"blocks": "bright_blue", "model": "white", "modules": "bright_magenta"},
    "uncond": "bright_yellow",
}
WIDE = 40
"""From so many steps on, the letters of a strip stand without spaces between them."""


def plain(report: ReportData) -> str:
    """The report as text without colours, a blank line between its parts."""
    if report.planned:
        return "\n".join([content.PLANNED, *report.planned, *report.warnings])
    regions, graphs = _without(content.region_table(report), "why"), content.graph_table(report)
    reasons = (f"{role}: {why}" for role, why in content.reasons(report))
    broadcast = [*_aligned(regions), *filter(None, [content.step_line(report)]), *reasons]
    parts = [_aligned(content.role_table(report)), _strips(report), broadcast, _aligned(graphs)]
    lines = [line for part in parts if part for line in (*part, "")] if regions.rows else parts[0]
    lines += content.graph_lines(report)
    lines += [f"left alone: {line}" for line in content.left_alone(report)]
    lines += [f"note: {line}" for line in content.notes(report)]
    return "\n".join([*lines, *report.warnings])


def _without(table: Table, title: str) -> Table:
    kept = [i for i, column in enumerate(table.columns) if column.title != title]
    return Table(tuple(table.columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in table.rows))


def _aligned(table: Table) -> list[str]:
    """The lines of a table; none for one without columns."""
    cells = [tuple(column.title for column in table.columns), *table.rows]
    widths = [
        max(column.width, *(len(row[i]) + (2 if i else 0) for row in cells)) for i, column in enumerate(table.columns)
    ]
    return [
        "".join(
            text.rjust(width) if column.is_number else f"{'  ' if i else ''}{text}".ljust(width)
            for i, (text, width, column) in enumerate(zip(row, widths, table.columns, strict=True))
        ).rstrip()
        for row in cells
        if row
    ]


def _strips(report: ReportData) -> list[str]:
    if not report.schedule.strips:
        return []
    legend = f"C computes, R reuses{_partly(report)}; {SOURCES[report.schedule.source]}"
    return [*content.strip_lines(report, _gap(report)), legend]


def _partly(report: ReportData) -> str:
    is_partly = any(PARTLY in strip.steps for strip in report.schedule.strips)
    is_skipped = any(SKIPPED in strip.steps for strip in report.schedule.strips)
    is_either = any(EITHER in strip.steps for strip in report.schedule.strips)
    said = ", P reuses in some of its calls" if is_partly else ""
    said += ", ? does either, by what is measured" if is_either else ""
    return f"{said}, S is skipped with what it lies in" if is_skipped else said


def _gap(report: ReportData) -> str:
    return " " if len(report.schedule.timesteps) < WIDE else ""


def tables(report: ReportData) -> RenderableType:
    """The report as tables and coloured strips, for `rich.print`."""
    if report.planned:
        return Group(Text(content.PLANNED, style="bold"), *map(Text, (*report.planned, *report.warnings)))
    parts: list[RenderableType] = [Text(content.title_of(report), style="bold"), ""]
    regions = content.region_table(report)
    if regions.rows:
        parts += [_coloured_strips(report), "", _rich(regions)]
        parts += [Text(line, style="bold") for line in [content.step_line(report)] if line]
        parts += ["", _rich(content.graph_table(report))]
    if report.reused:
        parts += ["", _rich(content.role_table(report))]
    parts += [Text(line) for line in content.graph_lines(report)]
    parts += [Text.assemble(("left alone: ", "red"), line) for line in content.left_alone(report)]
    parts += [Text.assemble(("note: ", "yellow"), line) for line in content.notes(report)]
    return Group(*parts, *(Text(line, style="yellow") for line in report.warnings))


def _rich(table: Table) -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns:
        is_prose = column.title == "why"
        made.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=not is_prose)
    for row in table.rows:
        made.add_row(*(Text(text, style=ROLE_COLOURS.get(text, "")) for text in row))
    return made


def _coloured_strips(report: ReportData) -> RenderableType:
    schedule, width = report.schedule, 1 + 2 * len(_gap(report))
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_row(Text("timestep", style="dim"), Text(ruler(schedule.timesteps, width), style="dim"))
    for label, strip in zip(content.strip_labels(report), schedule.strips, strict=True):
        steps = Text.assemble(*((step.center(width), COLOURS[step]) for step in strip.steps))
        said = f"{strip.reused} of {len(strip.steps)} reused, {strip.rule}"
        grid.add_row(Text(label, style=ROLE_COLOURS.get(strip.role, "")), steps, Text(said, style="dim"))
    legend = Text.assemble((" C ", COLOURS[COMPUTE]), " computes  ", (" R ", COLOURS[REUSE]), " reuses")
    return Group(grid, legend.append(f"{_partly(report)}; {SOURCES[report.schedule.source]}", style="dim"))
