"""What is said of a report in whichever form: its tables, and the lines around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .data import DecisionReport, GraphReport, ReportData
from .groups import Group, grouped, joined_names
from .strips import EITHER, ruler
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


PLANNED = "Nothing has run yet, so nothing was looked for. Planned:"
"""Above the policies of a model that has not been called."""


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
    unit = unit_of(group.total("cache_bytes") for group in groups)
    rows = [
        (
            group.name,
            f"x {len(group.regions)}" if len(group.regions) > 1 else "",
            group.first.role,
            str(group.first.operations),
            str(group.first.spared),
            in_percent(group.total("flops_share")),
            in_percent(group.total("time_share")),
            in_bytes(group.total("cache_bytes"), unit),
            group.first.rule,
            group.why,
        )
        for group in groups
    ]
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
    return Table(columns, tuple(rows)).without_empty_columns()


def graph_table(report: ReportData) -> Table:
    """What the rewrite did to each captured graph that has something to broadcast; those that are alike in one row."""
    alike: dict[tuple[int | None, ...], list[GraphReport]] = {}
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
    rows = [
        (
            joined_names([graph.frame or "the model" for graph in graphs]),
            str(sum(graph.runs for graph in graphs)),
            *("" if number is None else str(number) for number in numbers),
        )
        for numbers, graphs in alike.items()
    ]
    return Table(columns, tuple(rows)).without_empty_columns()


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
    if any(EITHER in strip.steps for strip in report.schedule.strips):
        read = f", {counted(report.numbers_read, 'number')} so far" if report.numbers_read else ""
        lines.append(f"a step that may do either waits for one number to decide{read}")
    lines += decision_lines(report)
    steps = set(zip(*(strip.steps for strip in report.schedule.strips), strict=True))
    if len(steps) > 1:
        lines.append(
            f"{len(steps)} kinds of steps in the schedule: with lowering='specialize', a compiled graph for each"
        )
    if report.graphs or not steps:
        lines.append(f"{counted(report.graphs, 'graph')} compiled")
    return lines


def decision_lines(report: ReportData) -> list[str]:
    """What was decided by signals, a line for each: what it was measured at, for computed and for reused steps."""
    found: dict[tuple[str, float | None], list[DecisionReport]] = {}
    for each in report.decisions:
        found.setdefault((each.signal, each.threshold), []).append(each)
    lines = []
    for (signal, threshold), decisions in found.items():
        said = f"the last {counted(len(decisions), 'decision')} by {signal}"
        said += "" if threshold is None else f", threshold {threshold:g}"
        for reused, did in ((False, "computed"), (True, "reused")):
            numbers = [each.measured for each in decisions if each.reused is reused]
            if numbers:
                said += f"; {did} {len(numbers)}, at {min(numbers):.3g} to {max(numbers):.3g}"
        lines.append(said)
    return lines


def broadcast(report: ReportData) -> Group:
    """All that is not left alone."""
    return Group(tuple(region for region in report.regions if region.left_alone is None))


def outermost(report: ReportData) -> Group:
    """What is broadcast and lies in nothing else that is, whose costs add up."""
    return Group(tuple(region for region in broadcast(report).regions if not region.inside))


def time_of(report: ReportData) -> tuple[str, str]:
    """The share of a step's time that what is broadcast has, and that in seconds; "" where it was not measured."""
    if report.seconds is None:
        return "", ""
    share = outermost(report).total("time_share") or 0.0
    return in_percent(share), f"{in_seconds(share * report.seconds)} of {in_seconds(report.seconds)}"


def step_line(report: ReportData) -> str:
    """What a step that reuses nothing takes, and how much of it is broadcast; "" where nothing is known of that."""
    own, (share, spent) = outermost(report), time_of(report)
    flops = own.total("flops")
    if not flops:
        return ""
    of_time = [f"{share} of its time ({spent})"] if share else []
    said = [f"{in_percent(own.total('flops_share') or 0.0)} of a step's FLOPs ({in_flops(flops)})", *of_time]
    return f"what is broadcast has {listed(said)}"


def left_alone(report: ReportData) -> list[str]:
    """What is computed in every step, and why."""
    return [f"{_of_role(group)}: {group.left_alone}" for group in grouped(report.regions) if group.left_alone]


def notes(report: ReportData) -> list[str]:
    """What else is to know of what was found."""
    return [f"{_of_role(group)}: {group.first.note}" for group in grouped(report.regions) if group.first.note]


def _of_role(group: Group) -> str:
    return f"{group.name} ({group.first.role})"


def strip_labels(report: ReportData) -> list[str]:
    """What stands before each strip of the schedule: its role; its rule, too, where a role has several."""
    strips = report.schedule.strips
    roles = [strip.role for strip in strips]
    return [strip.role if roles.count(strip.role) == 1 else f"{strip.role}, {strip.rule}" for strip in strips]


def strip_lines(report: ReportData, gap: str) -> list[str]:
    """The strips of the schedule under their timesteps, with labels before them and gaps between the steps."""
    strips = [gap.join(strip.steps) for strip in report.schedule.strips]
    labels, lines = ["timestep", *strip_labels(report)], [ruler(report.schedule.timesteps, 1 + len(gap)), *strips]
    width = max(map(len, labels)) + 2
    return [f"{label.ljust(width)}{line}" for label, line in zip(labels, lines, strict=True)]


def title_of(report: ReportData) -> str:
    """What stands above the report."""
    return f"What pab_fx broadcasts{' of ' if report.model else ''}{report.model}"


def reasons(report: ReportData) -> Iterable[tuple[str, str]]:
    """Each role that is broadcast with the reasons for which it was given."""
    groups = [group for group in grouped(report.regions) if group.left_alone is None]
    return list(dict.fromkeys((group.first.role, group.why) for group in groups))
