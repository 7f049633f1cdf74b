"""What a backend broadcasts and has broadcast, for people to read."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .config import ROLES
from .state import Cell

if TYPE_CHECKING:
    from .backend import PABBackend


@dataclass(frozen=True)
class RegionReport:
    """One attention or feed-forward: its name, its role, why it has it, and why it is left alone (or `None`)."""

    name: str
    role: str
    why: str
    left_alone: str | None
    note: str | None


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
class Report:
    """What a backend broadcasts. `str(report)` is a table.

    Args:
        roles: a line for each role that is broadcast.
        regions: every attention found, and every feed-forward where the config broadcasts some.
        graphs: how many lowered graphs there are, beside what is computed once a generation.
        warnings: what the backend has warned of.
        once: what is computed once a generation.
    """

    roles: tuple[RoleReport, ...]
    regions: tuple[RegionReport, ...]
    graphs: int
    warnings: tuple[str, ...] = ()
    once: OnceReport = OnceReport(0, 0, 0, 0)

    @property
    def reused(self) -> int:
        """Calls of attentions and feed-forwards that were answered from a cache."""
        return sum(role.reused for role in self.roles)

    def __str__(self) -> str:
        lines = [f"{'role':<10}{'modules':>8}{'computed':>10}{'reused':>8}{'cache':>12}{'at most':>12}"]
        for r in self.roles:
            calls = f"{r.role:<10}{r.modules:>8}{r.computed:>10}{r.reused:>8}"
            lines.append(calls + f"{_size(r.cache_bytes):>12}{_size(r.full_bytes):>12}")
            if len(r.contexts) > 1:
                lines += [
                    f"  {c.context or 'no context':<34}{_size(c.cache_bytes):>12}{_size(c.full_bytes):>12}"
                    for c in r.contexts
                ]
        if self.once.operations:
            lines.append(
                f"computed once a generation: {self.once.operations} operations, {self.once.computed} times instead of "
                f"{self.once.computed + self.once.taken}; kept now: {_size(self.once.kept_bytes)}"
            )
        lines.append(f"{self.graphs} graph{'' if self.graphs == 1 else 's'} compiled")
        lines += [f"left alone: {r.name} ({r.role}): {r.left_alone}" for r in self.regions if r.left_alone]
        lines += [f"note: {r.name} ({r.role}): {r.note}" for r in self.regions if r.note]
        return "\n".join([*lines, *self.warnings])


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 or not count else f"{count / 2**10:.1f} KiB"


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


def report_of(backend: PABBackend) -> Report:
    """The report of a backend, from its regions and the state it holds."""
    broadcast = {region.name for region in backend.regions if region.is_broadcast}
    regions = tuple(
        dict.fromkeys(
            RegionReport(
                region.name,
                region.role,
                region.why,
                region.unsafe or (None if region.rule else "the config leaves it alone"),
                region.note,
            )
            for region in backend.regions
            if region.is_broadcast or region.name not in broadcast
        )
    )
    graphs = sum(len(graph.graphs) for graph in backend.graphs)
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
    kept = [each for store in backend.stores() for of in list(store.kept.values()) for each in list(of.values())]
    once = OnceReport(
        sum(graph.once.operations for graph in backend.graphs if graph.once is not None),
        backend.computed_once,
        backend.taken_as_kept,
        sum(each.bytes for each in kept),
    )
    return Report(tuple(roles), regions, graphs, backend.notices.messages, once)
