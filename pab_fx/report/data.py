"""What a backend broadcasts and has broadcast: frozen data, and nothing but that.

`account` reads it off a backend, `report` adds what renders it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .strips import Schedule

NO_SCHEDULE = Schedule((), "assumed")


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
        inside: name of the part in which it lies, "" for none; what it costs is among what that one costs.
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
    inside: str = ""


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
class DecisionReport:
    """A decision by a signal.

    Args:
        context: as of `ContextReport`.
        timestep: of the step.
        signal: what was looked at, in words.
        measured: what the rule went by: changes that add up are added up.
        threshold: that of the rule, `None` if it has none.
        reused: what was decided.
    """

    context: str
    timestep: float
    signal: str
    measured: float
    threshold: float | None
    reused: bool


@dataclass(frozen=True)
class Box:
    """Nodes that are drawn as one.

    Args:
        label: what they are.
        block: the block that they are in, of several that are alike as one name; "" for none.
        copies: how many blocks that is.
        operations: how many operations it has.
        region: the attention or feed-forward that it is, `None` for others; the first of those that are alike.
    """

    label: str
    block: str = ""
    copies: int = 1
    operations: int = 0
    region: RegionReport | None = None


@dataclass(frozen=True)
class Outline:
    """A graph of boxes.

    Args:
        title: what graph it is.
        boxes: in the order in which they run.
        edges: from a box to one that reads what it yields, by their positions.
    """

    title: str
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ReportData:
    """What a backend broadcasts and has broadcast.

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
        planned: before anything was captured, where and when each policy reuses; empty afterwards.
        numbers_read: how many numbers the host has read from the device, to decide by.
        restarts: generations that began in the middle of another, because a timestep rose a little.
        decisions: the last ones by a signal, in order, at most 256.
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
    restarts: int = 0
    decisions: tuple[DecisionReport, ...] = ()
    planned: tuple[str, ...] = ()
    numbers_read: int = 0
    outlines: tuple[Outline, ...] = field(default=(), repr=False)

    @property
    def reused(self) -> int:
        """Calls of attentions and feed-forwards that were answered from a cache."""
        return sum(role.reused for role in self.roles)
