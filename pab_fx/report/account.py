"""What the graphs and the state of a backend come to: its report."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, cast

from torch import fx

from ..compile.variants import ORIGIN
from ..policy.change import named
from ..policy.policy import Policy
from ..policy.when import Rule
from ..policy.where import ROLES
from ..run.runtime import Runtime
from ..run.state import Cell
from ..select.region import Region, around
from .captured import Captured
from .costs import operations
from .data import ContextReport, DecisionReport, GraphReport, OnceReport, RegionReport, RoleReport
from .report import Report
from .strips import Scheduled, schedule_of

NUMBER = "pab_number"
"""Key in a node's meta of the number by which its time is found; copies of the node have it too."""

LEFT_ALONE = "the config leaves it alone"

Round = Mapping[int | None, float]
"""Seconds of a step by the numbers of the nodes that they were spent in; under `None` of all others."""


def report_of(
    runtime: Runtime,
    captured: Sequence[Captured],
    regions: Sequence[Region],
    warnings: tuple[str, ...] = (),
    rounds: Sequence[Round] = (),
    assumed: Sequence[float] = (),
    policies: Sequence[Policy] = (),
) -> Report:
    """The report of a backend, from its graphs and the state it holds.

    Args:
        runtime: the state.
        captured: the graphs.
        regions: what was found in them.
        warnings: what was warned of.
        rounds: where the time of a step went, for each time that it was measured.
        assumed: timesteps for the schedule where not all are known; default: those seen.
        policies: what it goes by, for what is planned.
    """
    costs = _costs(captured, rounds)
    found = tuple(
        dataclasses.replace(each, **costs[each.name]) if each.name in costs else each
        for each in _regions(captured, regions, {**_ranges_left_alone(regions), **runtime.left_alone})
    )
    timesteps, source = runtime.seen.timesteps(assumed)
    return Report(
        roles=_roles(runtime, regions),
        regions=found,
        graphs=sum(
            len(graph.graphs) + (graph.lowerings.head is not None) for each in captured for graph in each.all_graphs
        ),
        warnings=warnings,
        once=_once(runtime, captured),
        model=", ".join(dict.fromkeys(type(root).__name__ for root in runtime.roots)),
        schedule=schedule_of(_scheduled(captured), timesteps, source),
        captured=tuple(map(_graph, captured)),
        seconds=median(sum(each.values()) for each in rounds) if rounds else None,
        restarts=runtime.restarts,
        planned=()
        if captured
        else tuple(f"{_written(each.where)}: {each.describe()}" for each in policies if each.when),
        decisions=tuple(
            DecisionReport(_label(context), t, named(rule.signal), by, getattr(rule, "threshold", None), reused)
            for context, t, rule, by, reused in list(runtime.decisions)
        ),
        numbers_read=runtime.numbers_read,
    )


def _once(runtime: Runtime, captured: Sequence[Captured]) -> OnceReport:
    kept = [each for store in runtime.stores() for of in list(store.kept.values()) for each in list(of.values())]
    return OnceReport(
        sum(each.graph.once.operations for each in captured if each.graph is not None and each.graph.once is not None),
        runtime.computed_once,
        runtime.taken_as_kept,
        sum(each.bytes for each in kept),
    )


def _roles(runtime: Runtime, regions: Sequence[Region]) -> tuple[RoleReport, ...]:
    roles = []
    for role in ROLES:
        found = [each for each in runtime.cells() if each[2].role == role]
        owned = [(owner, cell) for owner, _, cell in found if cell.rule]
        names = {region.name for region in regions if region.is_broadcast and region.role == role}
        if not owned and (found or not names):  # blocks that share a graph may have a role that is left alone
            continue
        computed, reused = runtime.counts[role, False], runtime.counts[role, True]
        contexts = _contexts((context, cell) for _, context, cell in found if cell.rule or cell.is_signal)
        roles.append(RoleReport(role, len({owner for owner, _ in owned}) or len(names), computed, reused, contexts))
    return tuple(roles)


def _contexts(cells: Iterable[tuple[Hashable, Cell]]) -> tuple[ContextReport, ...]:
    """The caches of these cells by their cache context, those of all requests together."""
    found: dict[str, list[int]] = {}
    for context, cell in cells:
        total = found.setdefault(_label(context), [0, 0])
        # one that is kept on another device comes with what brings it back
        total[0] += sum((kept[0] if isinstance(kept, tuple) else kept).nbytes for kept in cell.caches or ())
        total[1] += sum(spec.size for spec in cell.specs)
    return tuple(ContextReport(label, *total) for label, total in sorted(found.items()))


def _label(context: Hashable) -> str:
    """The name of a cache context, and which call of a step it is where branches of guidance have none."""
    name, branch = cast(tuple[Any, int], context)
    return str(name or "") + (f" #{branch + 1}" if branch else "")


def _ranges_left_alone(regions: Sequence[Region]) -> dict[str, str]:
    """By name, why ranges that span several graphs are left alone: one block that cannot be skipped is enough."""
    return {region.name: region.unsafe for region in regions if region.piece is not None and region.unsafe}


def _regions(
    captured: Sequence[Captured], regions: Sequence[Region], left_alone: Mapping[str, str]
) -> tuple[RegionReport, ...]:
    """Each part once, for each block that runs its graph; left alone if no piece of it is broadcast."""
    instances = {region: of for each in captured for region, of in each.instances.items()}
    found = [each for region in regions for each in _instances(region, instances.get(region, {}), left_alone)]
    broadcast = {each.name for each in found if each.left_alone is None}
    return tuple(dict.fromkeys(each for each in found if each.left_alone is None or each.name not in broadcast))


def _instances(
    region: Region, instances: Mapping[str, tuple[str, Rule | None]], found: Mapping[str, str]
) -> Iterator[RegionReport]:
    """A region in each block that has run it, or as it was captured where none has."""
    for name, (role, rule) in (instances or {region.name: (region.role, _rule(region))}).items():
        why = region.why if name == region.name or region.assign is None else region.assign(name)[2]
        left_alone = region.unsafe or found.get(name) or (None if rule else LEFT_ALONE)
        words = [rule.describe(), _how(region)] if rule is not None and left_alone is None else []
        yield RegionReport(name, role, why, left_alone, region.note, ", ".join(filter(None, words)))


def _rule(region: Region) -> Rule | None:
    return None if region.policy is None else region.policy.when


def _how(region: Region) -> str:
    return "" if region.policy is None else region.policy.how.describe()


def _planned(policies: Iterable[Policy]) -> tuple[str, ...]:
    return tuple(f"{_written(each.where)}: {each.describe()}" for each in policies if each.when)


def _written(where: Any) -> str:
    """A choice as one writes it, without what is so by default.

    Example:
        >>> from ..policy.where import Blocks
        >>> _written(Blocks(1))
        'Blocks(first=1)'
    """
    given = {each.name: getattr(where, each.name) for each in dataclasses.fields(where) if each.repr}
    defaults = {each.name: each.default for each in dataclasses.fields(where)}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != defaults[name])
    return f"{type(where).__name__}({said})"


def _scheduled(graphs: Iterable[Captured]) -> Iterator[Scheduled]:
    """What goes by a schedule, in each graph."""
    for captured in graphs:
        calls = Counter(region.module_id for region in captured.regions)
        broadcast = [region for region in captured.regions if region.is_broadcast]
        for region in broadcast:
            outer = tuple(rule for each in around(region, broadcast) if (rule := _rule(each)) is not None)
            instances = captured.instances.get(region) or {region.name: (region.role, _rule(region))}
            for name, (role, rule) in instances.items():
                if rule is not None:  # two models of a pipeline have parts of one name
                    yield Scheduled(
                        f"{captured.model} {name}", role, rule, calls[region.module_id], _how(region), outer
                    )


def _costs(graphs: Sequence[Captured], rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """By name, what `RegionReport` says that a region costs; of one in several graphs, what it does in the last.

    Shares of floating-point operations are of what all graphs have run, as if nothing were reused. Blocks that run one
    graph have equal parts in it.
    """
    flops_of = {captured: captured.flops for captured in graphs}
    total = sum(captured.runs * sum(found.values()) for captured, found in flops_of.items())
    costs: dict[str, dict[str, Any]] = {}
    shares: dict[str, float] = defaultdict(float)
    for captured in graphs:
        by_module: dict[str, list[Region]] = defaultdict(list)
        for region in captured.regions:
            by_module[region.name].append(region)
        for calls in by_module.values():
            ids = {region.module_id for region in calls}
            names = list(captured.instances.get(calls[0]) or [calls[0].name])
            spared = {node for region in calls for node in captured.spared[region]}
            flops = sum(flops_of[captured].get(node, 0) for node in spared)
            time_share, seconds = _measured(spared, rounds, len(names))
            outer = around(calls[0], [region for region in captured.regions if region.is_broadcast])
            for name in names:
                shares[name] += captured.runs_of(calls[0]) * flops / len(names) / total if total else 0.0
                costs[name] = {
                    "operations": sum(operations(region.nodes) for region in calls),
                    "spared": operations(spared),
                    "flops": flops,
                    "flops_share": shares[name] if total else None,
                    "cache_bytes": sum(captured.cache_bytes.get(each, 0) for each in ids),
                    "seconds": seconds,
                    "time_share": time_share,
                    "inside": outer[-1].name if outer and calls[0].is_broadcast else "",
                }
    return costs


def _measured(nodes: Iterable[fx.Node], rounds: Sequence[Round], count: int) -> tuple[float | None, float | None]:
    """Share and seconds of a step that one of `count` modules spends in these nodes; medians over rounds."""
    numbers = {node.meta.get(NUMBER) for node in nodes} - {None}
    if not rounds:
        return None, None
    spent = [sum(each.get(number, 0.0) for number in numbers) / count for each in rounds]
    totals = [sum(each.values()) for each in rounds]
    return median(own / total for own, total in zip(spent, totals, strict=True)), median(spent)


def _graph(captured: Captured) -> GraphReport:
    graph, size = captured.graph, operations(captured.gm.graph.nodes)
    if graph is None:
        return GraphReport(captured.frame, captured.runs, size, 0, outside=size, once=0, reusing=None)
    conditions, nodes = len(graph.lowerings.conditionals), graph.lowerings.conditional.graph.nodes
    measured: Any = () if graph.lowerings.head is None else graph.lowerings.head.graph.nodes
    reusing = graph.graphs.get(tuple(each.outer is None for each in graph.lowerings.conditionals))  # others rest
    return GraphReport(
        frame=captured.frame,
        runs=captured.runs,
        operations=size,
        conditions=conditions,
        outside=operations(node for node in (*measured, *nodes) if ORIGIN in node.meta),
        once=0 if graph.once is None else graph.once.operations,
        reusing=None if reusing is None else operations(reusing.graph.nodes),
    )
