"""What a backend broadcasts and has broadcast, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ROLES

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
class RoleReport:
    """One role: how many modules are broadcast, their calls so far, and the bytes their caches hold now."""

    role: str
    modules: int
    computed: int
    reused: int
    cache_bytes: int


@dataclass(frozen=True)
class Report:
    """What a backend broadcasts. `str(report)` is a table.

    Args:
        roles: a line for each role that is broadcast.
        regions: every attention found, and every feed-forward where the config broadcasts some.
        graphs: how many graphs the inner compiler has compiled.
        warnings: what the backend has warned of.
    """

    roles: tuple[RoleReport, ...]
    regions: tuple[RegionReport, ...]
    graphs: int
    warnings: tuple[str, ...] = ()

    @property
    def reused(self) -> int:
        """Calls of attentions and feed-forwards that were answered from a cache."""
        return sum(role.reused for role in self.roles)

    def __str__(self) -> str:
        lines = [f"{'role':<10}{'modules':>8}{'computed':>10}{'reused':>8}{'cache':>12}"]
        lines += [
            f"{r.role:<10}{r.modules:>8}{r.computed:>10}{r.reused:>8}{_size(r.cache_bytes):>12}" for r in self.roles
        ]
        lines.append(f"{self.graphs} graph{'' if self.graphs == 1 else 's'} compiled")
        lines += [f"left alone: {r.name} ({r.role}): {r.left_alone}" for r in self.regions if r.left_alone]
        lines += [f"note: {r.name} ({r.role}): {r.note}" for r in self.regions if r.note]
        return "\n".join([*lines, *self.warnings])


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 or not count else f"{count / 2**10:.1f} KiB"


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
        cells = [cell for _, cell in owned]
        held = sum(cache.numel() * cache.element_size() for cell in cells for cache in cell.caches or ())
        computed, reused = backend.counts[role, False], backend.counts[role, True]
        roles.append(RoleReport(role, len({owner for owner, _ in owned}) or len(names), computed, reused, held))
    return Report(tuple(roles), regions, graphs, backend.notices.messages)
