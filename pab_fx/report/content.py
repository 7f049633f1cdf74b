"""What is said of a report in whichever form: its tables, and the lines around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .data import GraphReport, ReportData
from .groups import Group, grouped, joined_names
from .strips import SOURCES
from .units import counted, in_bytes, in_flops, in_percent, in_seconds, listed, unit_of


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: what stands above it.
        hint: what that means.
        is_number: whether it is aligned on the right.
        width: how wide it is at least where all characters are.
    """

    title: str
    hint: str = ""
    is_number: bool = True
    width: int = 0


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        columns: its columns.
        rows: its rows, each with a text for each column.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> Table:
        """The table without the columns that say nothing in any row."""
        said = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        return Table(tuple(self.columns[i] for i in said), tuple(tuple(row[i] for i in said) for row in self.rows))


def role_table(report: ReportData) -> Table:
    """Calls so far and caches of each role, and of each cache context where there are several."""
    unit = unit_of(size for role in report.roles for size in (role.cache_bytes, role.full_bytes))
    rows: list[tuple[str, ...]] = []
    for role in report.roles:
        sizes = in_bytes(role.cache_bytes, unit), in_bytes(role.full_bytes, unit)
        rows.append((role.role, str(role.modules), str(role.computed), str(role.reused), *sizes))
        for each in role.contexts if len(role.contexts) > 1 else ():
            sizes = in_bytes(each.cache_bytes, unit), in_bytes(each.full_bytes, unit)
            rows.append((f"  {each.context or 'no context'}", "", "", "", *sizes))
    columns = (
        Column("role", "", is_number=False, width=10),
        Column("modules", "how many attentions or feed-forwards have the role", width=8),
        Column("computed", "calls so far that computed", width=10),
        Column("reused", "calls so far that were answered from a cache", width=8),
        Column("cache", "what caches hold now", width=12),
        Column("at most", "what they hold when all of them are kept", width=12),
    )
    return Table(columns, tuple(rows))


def region_table(report: ReportData) -> Table:
    """What is broadcast: what it costs, and when it is computed; what is alike in one row."""
    groups = [group for group in grouped(report.regions) if group.left_alone is None]
    unit = unit_of(group.cache_bytes for group in groups)
    rows = tuple(_region_row(group, unit) for group in groups)
    columns = (
        Column("attention", "or feed-forward; what is alike in one row", is_number=False),
        Column("", "how many of them"),
        Column("role", "", is_number=False),
        Column("operations", "that one of them has"),
        Column("spared", "operations that a reusing step runs without: also those that only feed it"),
        Column("FLOPs", "share of a step's floating-point operations that the row is spared"),
        Column("time", "share of a step's time that the row is spared"),
        Column("cache", "what the row's caches hold when kept, in one cache context"),
        Column("rule", "when it is computed; outside of the timesteps in brackets in every step", is_number=False),
        Column("why", "why it has that role", is_number=False),
    )
    return Table(columns, rows).without_empty_columns()


def _region_row(group: Group, unit: str) -> tuple[str, ...]:
    region, count = group.first, len(group.regions)
    return (
        group.name,
        f"x {count}" if count > 1 else "",
        region.role,
        str(region.operations),
        str(region.spared),
        in_percent(group.flops_share),
        in_percent(group.time_share),
        in_bytes(group.cache_bytes, unit),
        region.rule,
        group.why,
    )


def graph_table(report: ReportData) -> Table:
    """What the rewrite did to each captured graph that has something to broadcast; those that are alike in one row."""
    alike: dict[object, list[GraphReport]] = {}
    for graph in report.captured:
        if graph.conditions:
            key = (graph.operations, graph.conditions, graph.outside, graph.once, graph.reusing)
            alike.setdefault(key, []).append(graph)
    columns = (
        Column("captured", "the module whose code the graph is", is_number=False),
        Column("calls", "how often it ran"),
        Column("operations", "in the captured graph"),
        Column("conditions", "attentions and feed-forwards that were made conditional"),
        Column("outside", "operations outside of the conditions, run in each step"),
        Column("once", "operations that are computed once a generation"),
        Column("reusing all", "operations of the step that reuses everything"),
    )
    return Table(columns, tuple(map(_graph_row, alike.values()))).without_empty_columns()


def _graph_row(alike: list[GraphReport]) -> tuple[str, ...]:
    first = alike[0]
    return (
        joined_names([graph.frame or "the model" for graph in alike]),
        str(sum(graph.runs for graph in alike)),
        str(first.operations),
        str(first.conditions),
        str(first.outside),
        str(first.once),
        "" if first.reusing is None else str(first.reusing),
    )


def graph_lines(report: ReportData) -> list[str]:
    """What the tables leave out of what was captured and compiled."""
    lines = []
    idle = [graph for graph in report.captured if not graph.conditions]
    if idle:
        size = counted(sum(graph.operations for graph in idle), "operation")
        lines.append(f"{counted(len(idle), 'captured graph')} with nothing to broadcast: {size}")
    once = report.once
    if once.operations:
        calls = f", {once.computed} times instead of {once.computed + once.taken}" if once.taken else ""
        size = f"{counted(once.operations, 'operation')}{calls}; kept now: {in_bytes(once.kept_bytes)}"
        lines.append(f"computed once a generation: {size}")
    steps = set(zip(*(strip.steps for strip in report.schedule.strips), strict=True))
    if len(steps) > 1:
        lines.append(
            f"{len(steps)} kinds of steps in the schedule: with lowering='specialize', a compiled graph for each"
        )
    if report.graphs or not steps:
        lines.append(f"{counted(report.graphs, 'graph')} compiled")
    return lines


def step_line(report: ReportData) -> str:
    """What a step that reuses nothing takes, and how much of it is broadcast; "" where nothing is known of that."""
    regions = [region for region in report.regions if region.left_alone is None]
    flops = sum(region.flops for region in regions)
    share = sum(region.flops_share or 0.0 for region in regions)
    if not flops:
        return ""
    said = [f"{in_percent(share)} of a step's FLOPs ({in_flops(flops)})"]
    if report.seconds is not None:
        time = sum(region.time_share or 0.0 for region in regions)
        spent = f"{in_seconds(time * report.seconds)} of {in_seconds(report.seconds)}"
        said.append(f"{in_percent(time)} of its time ({spent})")
    return f"what is broadcast has {listed(said)}"


def left_alone(report: ReportData) -> list[str]:
    """What is computed in every step, and why."""
    return [f"{_of_role(group)}: {group.left_alone}" for group in grouped(report.regions) if group.left_alone]


def notes(report: ReportData) -> list[str]:
    """What else is to know of what was found."""
    return [f"{_of_role(group)}: {group.first.note}" for group in grouped(report.regions) if group.first.note]


def _of_role(group: Group) -> str:
    return f"{group.name} ({group.first.role})"


def source_of(report: ReportData) -> str:
    """How the timesteps of the schedule are known."""
    return SOURCES[report.schedule.source]


def strip_labels(report: ReportData) -> list[str]:
    """What stands before each strip of the schedule: its role; its rule, too, where a role has several."""
    strips = report.schedule.strips
    roles = [strip.role for strip in strips]
    return [strip.role if roles.count(strip.role) == 1 else f"{strip.role}, {strip.rule}" for strip in strips]


def title_of(report: ReportData) -> str:
    """What stands above the report."""
    return f"What pab_fx broadcasts{' of ' if report.model else ''}{report.model}"


def reasons(report: ReportData) -> Iterable[tuple[str, str]]:
    """Each role that is broadcast with the reasons for which it was given."""
    groups = [group for group in grouped(report.regions) if group.left_alone is None]
    return list(dict.fromkeys((group.first.role, group.why) for group in groups))
