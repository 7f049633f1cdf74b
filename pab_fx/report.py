"""What a backend broadcasts and has broadcast, for people to read.

Here are the facts, as frozen data, and how they are read off a backend; `explain` has what renders them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from .captured import Captured
from .config import ROLES
from .costs import operations
from .region import Region
from .schedule import Rule
from .state import Cell
from .strips import Schedule, Scheduled, in_words, schedule_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .backend import PABBackend
    from .explain.outline import Outline

NUMBER = "pab_number"
"""Key in a node's meta of the number by which its time is found; copies of the node have it too."""

LEFT_ALONE = "the config leaves it alone"
NO_SCHEDULE = Schedule((), "assumed")

Round = Mapping[int | None, float]
"""Seconds of a step by the numbers of the nodes that they were spent in; under `None` of all others."""


@dataclass(frozen=True)
class RegionReport:
    """One attention or feed-forward, and what it costs in a call of the model.

    Args:
        name: its qualified name.
        role: "spatial", "temporal", "cross" or "mlp".
        why: why it has that role.
        left_alone: why it is computed in every step; `None` if it is broadcast.
        note: something to know of it.
        rule: when it is computed or reused, in words; "" if it is left alone.
        operations: how many operations it has in the captured graph.
        spared: how many a step that reuses it runs without: its own, and those that only feed it.
        flops: floating-point operations of those that are spared and not computed once a generation.
        flops_share: of the floating-point operations of a step that reuses nothing; `None` where they are not known.
        cache_bytes: what its caches hold when they are kept, in one cache context.
        seconds: time of the operations that are spared; `None` where it was not measured.
        time_share: of the time of a step that reuses nothing; `None` where it was not measured.
    """

    name: str
    role: str
    why: str
    left_alone: str | None
    note: str | None
    rule: str = ""
    operations: int = 0
    spared: int = 0
    flops: int = 0
    flops_share: float | None = None
    cache_bytes: int = 0
    seconds: float | None = None
    time_share: float | None = None


@dataclass(frozen=True)
class ContextReport:
    """The caches of one role in one cache context.

    Args:
        context: its name, "" for none; of unnamed branches of guidance also which call of a step it is, as in " #2".
        cache_bytes: what they hold now.
        full_bytes: what they hold, or held last, when all of them are kept.
    """

    context: str
    cache_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class RoleReport:
    """One role: how many modules are broadcast, their calls so far, and their caches.

    Args:
        role: its name.
        modules: how many modules have it.
        computed: calls that computed.
        reused: calls that were answered from a cache.
        contexts: the caches in each cache context.
    """

    role: str
    modules: int
    computed: int
    reused: int
    contexts: tuple[ContextReport, ...] = ()

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold now."""
        return sum(context.cache_bytes for context in self.contexts)

    @property
    def full_bytes(self) -> int:
        """Bytes that the caches hold, or held last, when all of them are kept."""
        return sum(context.full_bytes for context in self.contexts)


@dataclass(frozen=True)
class OnceReport:
    """What is computed once a generation, in place of in every step.

    Args:
        operations: how many operations of the graphs that is.
        computed: how often they ran.
        taken: how often what they had left was taken instead.
        kept_bytes: bytes that they have left, and that are kept now.
    """

    operations: int
    computed: int
    taken: int
    kept_bytes: int


@dataclass(frozen=True)
class GraphReport:
    """A graph that Dynamo captured, and what the rewrite made of it.

    Args:
        frame: qualified name of the module whose code it is; "" for the model itself.
        runs: how often it ran.
        operations: how many operations it has.
        conditions: how many of its attentions and feed-forwards were made conditional.
        outside: how many of its operations are outside of the conditions then, and not computed once a generation.
        once: how many of its operations are computed once a generation.
        reusing: how many operations a step runs that reuses all of them; `None` where no such step was compiled.
    """

    frame: str
    runs: int
    operations: int
    conditions: int
    outside: int
    once: int
    reusing: int | None


@dataclass(frozen=True)
class Report:
    """What a backend broadcasts. `str(report)` is for a terminal, and so is `rich.print(report)`, in colour.

    Args:
        roles: a line for each role that is broadcast.
        regions: every attention found, and every feed-forward where the config broadcasts some.
        graphs: how many lowered graphs there are, beside what is computed once a generation.
        warnings: what the backend has warned of.
        once: what is computed once a generation.
        model: class of the model, of several with commas between; "" where it is not known.
        schedule: what a generation computes and reuses, step by step.
        captured: every graph that Dynamo captured.
        seconds: time of a step that reuses nothing; `None` where it was not measured.
        outlines: the graphs for drawing; only `pab_fx.explain` makes them.
    """

    roles: tuple[RoleReport, ...]
    regions: tuple[RegionReport, ...]
    graphs: int
    warnings: tuple[str, ...] = ()
    once: OnceReport = OnceReport(0, 0, 0, 0)
    model: str = ""
    schedule: Schedule = NO_SCHEDULE
    captured: tuple[GraphReport, ...] = ()
    seconds: float | None = None
    outlines: tuple[Outline, ...] = field(default=(), repr=False)

    @property
    def reused(self) -> int:
        """Calls of attentions and feed-forwards that were answered from a cache."""
        return sum(role.reused for role in self.roles)

    def __str__(self) -> str:
        from .explain.text import plain

        return plain(self)

    def __rich__(self) -> RenderableType:
        from .explain.text import tables

        return tables(self)

    def markdown(self) -> str:
        """The report in Markdown."""
        from .explain.markdown import markdown

        return markdown(self)

    def html(self) -> str:
        """The report as a page of HTML that needs nothing else, with the drawing of the graphs where there is one."""
        from .explain.html import page

        return page(self)

    def svg(self) -> str:
        """The graphs before and after the rewrite, drawn; what is alike is drawn once.

        Raises:
            ValueError: if the report holds no graphs: `pab_fx.explain` makes one that does.
            ImportError: without the extra that lays graphs out, `pip install "pab-fx[explain]"`.
        """
        from .explain.drawing import drawing

        return drawing(self)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it; `Report.of_json` reads it back."""
        from .explain.json import as_json

        return as_json(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Report:
        """A report from what `as_json` made of it.

        Raises:
            ValueError: for something else, or the JSON of another version.
        """
        from .explain.json import of_json

        return of_json(found)


# --------------------------------------------------------------------------------------- read off a backend


def report_of(backend: PABBackend, rounds: Sequence[Round] = (), assumed: Sequence[float] = ()) -> Report:
    """The report of a backend, from its graphs and the state it holds.

    Args:
        backend: the backend.
        rounds: where the time of a step went, for each time that it was measured.
        assumed: timesteps for the schedule where not all are known; default: those seen.
    """
    costs = _costs(backend.captured, rounds)
    regions = tuple(
        dataclasses.replace(each, **costs[each.name]) if each.name in costs else each for each in _regions(backend)
    )
    scheduled = list(_scheduled(backend.captured))
    timesteps, source = backend.seen.timesteps(assumed)
    kept = [each for store in backend.stores() for of in list(store.kept.values()) for each in list(of.values())]
    once = OnceReport(
        sum(graph.once.operations for graph in backend.graphs if graph.once is not None),
        backend.computed_once,
        backend.taken_as_kept,
        sum(each.bytes for each in kept),
    )
    return Report(
        roles=_roles(backend),
        regions=regions,
        graphs=sum(len(graph.graphs) for graph in backend.graphs),
        warnings=backend.notices.messages,
        once=once,
        model=", ".join(dict.fromkeys(type(root).__name__ for root in backend.roots)),
        schedule=schedule_of(scheduled, timesteps, source),
        captured=tuple(map(_graph, backend.captured)),
        seconds=median(sum(each.values()) for each in rounds) if rounds else None,
    )


def _roles(backend: PABBackend) -> tuple[RoleReport, ...]:
    roles = []
    for role in ROLES:
        found = [each for store in backend.stores() for each in store.cells() if each[2].role == role]
        owned = [(owner, cell) for owner, _, cell in found if cell.rule]
        names = {region.name for region in backend.regions if region.is_broadcast and region.role == role}
        if not owned and (found or not names):  # blocks that share a graph may have a role that is left alone
            continue
        computed, reused = backend.counts[role, False], backend.counts[role, True]
        contexts = _contexts((context, cell) for _, context, cell in found if cell.rule)
        roles.append(RoleReport(role, len({owner for owner, _ in owned}) or len(names), computed, reused, contexts))
    return tuple(roles)


def _contexts(cells: Iterable[tuple[Hashable, Cell]]) -> tuple[ContextReport, ...]:
    """The caches of these cells by their cache context, those of all requests together."""
    found: dict[str, list[int]] = {}
    for context, cell in cells:
        name, branch = cast(tuple[Any, int], context)
        label = str(name or "") + (f" #{branch + 1}" if branch else "")
        total = found.setdefault(label, [0, 0])
        total[0] += sum(map(_bytes, cell.caches or ()))
        total[1] += sum(spec.size for spec in cell.specs)
    return tuple(ContextReport(label, *total) for label, total in sorted(found.items()))


def _bytes(kept: Any) -> int:
    tensor = kept[0] if isinstance(kept, tuple) else kept  # on another device, with what brings it back
    return int(tensor.numel() * tensor.element_size())


def _regions(backend: PABBackend) -> tuple[RegionReport, ...]:
    """Each attention and feed-forward once, for each block that runs its graph; left alone if no part is broadcast."""
    instances = {region: of for captured in backend.captured for region, of in captured.instances.items()}
    found = [each for region in backend.regions for each in _instances(region, instances.get(region, {}))]
    broadcast = {each.name for each in found if each.left_alone is None}
    return tuple(dict.fromkeys(each for each in found if each.left_alone is None or each.name not in broadcast))


def _instances(region: Region, instances: Mapping[str, tuple[str, Rule | None]]) -> Iterator[RegionReport]:
    """A region in each block that has run it, or as it was captured where none has."""
    for name, (role, rule) in (instances or {region.name: (region.role, region.rule)}).items():
        why = region.why if name == region.name or region.assign is None else region.assign(name)[2]
        left_alone = region.unsafe or (None if rule else LEFT_ALONE)
        words = in_words(rule) if rule is not None and left_alone is None else ""
        yield RegionReport(name, role, why, left_alone, region.note, words)


def _scheduled(graphs: Iterable[Captured]) -> Iterator[Scheduled]:
    """What goes by a schedule, in each graph."""
    for captured in graphs:
        calls = Counter(region.name for region in captured.regions)
        for region in captured.regions:
            if not region.is_broadcast:
                continue
            instances = captured.instances.get(region) or {region.name: (region.role, region.rule)}
            for name, (role, rule) in instances.items():
                if rule is not None:
                    yield Scheduled(name, role, rule, calls[region.name])


def _costs(graphs: Sequence[Captured], rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """By name, what `RegionReport` says that a region costs.

    Blocks that run one graph share what it costs; of a region in several graphs it is those that the last one has.
    """
    runs = sum(captured.runs * captured.flops for captured in graphs)
    found: dict[str, dict[str, Any]] = {}
    for captured in graphs:
        of_name: dict[str, list[Region]] = {}
        for region in captured.regions:
            of_name.setdefault(region.name, []).append(region)
        for calls in of_name.values():
            names = list(captured.instances.get(calls[0]) or [calls[0].name])
            spared = {node for region in calls for node in captured.spared[region]}
            flops = captured.flops_of(spared)
            shares, seconds = _measured(spared, rounds, len(names))
            cost = {
                "operations": sum(operations(region.nodes) for region in calls),
                "spared": operations(spared),
                "flops": flops,
                "cache_bytes": captured.cache_bytes.get(calls[0].module_id, 0),
                "seconds": seconds,
                "time_share": shares,
            }
            share = captured.runs * flops / len(names) / runs if runs else None
            for name in names:
                before = found.get(name, {}).get("flops_share")
                found[name] = {**cost, "flops_share": share if before is None or share is None else before + share}
    return found


def _measured(nodes: Iterable[fx.Node], rounds: Sequence[Round], count: int) -> tuple[float | None, float | None]:
    """Share and seconds of a step that one of `count` modules spends in these nodes; medians over rounds."""
    numbers = {node.meta.get(NUMBER) for node in nodes} - {None}
    if not rounds:
        return None, None
    spent = [sum(each.get(number, 0.0) for number in numbers) / count for each in rounds]
    totals = [sum(each.values()) for each in rounds]
    return median(own / total for own, total in zip(spent, totals, strict=True)), median(spent)


def _graph(captured: Captured) -> GraphReport:
    return GraphReport(
        frame=captured.frame,
        runs=captured.runs,
        operations=captured.operations,
        conditions=captured.conditions,
        outside=captured.outside,
        once=captured.once,
        reusing=captured.reusing,
    )
