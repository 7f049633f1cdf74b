"""What decisions come to in a call of a graph: which compiled graph runs, what it is given, and what is kept of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compile.lowering import Compiled, Lowerings
from ..graph.dataflow import value
from ..passes.form import Entering, Predicate, Scalar, mark_of
from ..policy.how import How, Scalars
from .deciding import Decision
from .passages import Visit
from .running import running_module
from .runtime import Runtime
from .state import Cell

COMPUTE, REUSE = torch.tensor(True), torch.tensor(False)
"""Predicates of conditions; made here, since a graph may be compiled inside of a mode that makes fake tensors."""


@dataclass(frozen=True)
class Plan:
    """What a call does once it is decided.

    Args:
        compiled: the graph that it runs.
        given: what it takes after the captured graph's inputs: predicates, and `None` for what is filled in.
        scalars: per scalar: (position among all inputs, number of the decision, call, number of the scalar, device).
        weights: per weight that is read: (position, how, yields the module that it is asked about, device).
        entering: per stream of a range of blocks that is taken as it entered that: (position, number of the stream).
        reads: per slot that is read: (position, cell, number among the cell's caches).
        unread: per slot that is demanded but not read: (position, module, number).
        drops: cells whose caches are not kept on, or are to be replaced.
        writes: per module whose slots are kept: (cell, module, positions among the outputs), `None` for one that stays.
        stand_ins: what was passed for slots that are not read, and what it looks like; of one resolution.
    """

    compiled: Compiled
    given: tuple[torch.Tensor | None, ...]
    scalars: tuple[tuple[int, int, int, int, torch.device], ...]
    weights: tuple[tuple[int, How, Callable[[], nn.Module | None], torch.device], ...]
    entering: tuple[tuple[int, int], ...]
    reads: tuple[tuple[int, Cell, int], ...]
    unread: tuple[tuple[int, int, int], ...]
    drops: tuple[Cell, ...]
    writes: tuple[tuple[Cell, int, tuple[int | None, ...]], ...]
    stand_ins: list[Any]


def reused(lowerings: Lowerings, decisions: Sequence[Decision]) -> tuple[bool, ...]:
    """For each conditional whether it reuses."""
    reuses = [False] * len(lowerings.conditionals)
    for decision in decisions:
        for m in decision.group.modules:
            for conditional, reuse in zip(lowerings.modules[m], decision.reuses, strict=True):
                reuses[conditional.index] = reuse
    return tuple(reuses)


def planned(
    runtime: Runtime,
    lowerings: Lowerings,
    key_of: Callable[[tuple[bool, ...]], Any],
    cells: Sequence[Cell],
    decisions: Sequence[Decision],
    visit: Visit | None,
) -> Plan:
    """What decisions about the modules of a graph come to.

    Args:
        runtime: owner of the state.
        lowerings: the graph in all ways.
        key_of: the key of the graph in which these conditionals reuse.
        cells: the modules' cells.
        decisions: of all groups.
        visit: where in a range of blocks the graph runs, if it does.
    """
    reuses = reused(lowerings, decisions)
    compiled = lowerings.compiled(key_of(reuses))
    number_of = {m: i for i, decision in enumerate(decisions) for m in decision.group.modules}
    of_module = {m: decisions[i] for m, i in number_of.items()}
    is_written = {m for m, each in of_module.items() if each.keeps and not each.rests}
    written = {m: positions for m, positions in compiled.writes if m in is_written}
    # a slot that stays is neither let go nor written; of a module that has one, none is let go before
    stays = {m for m, each in of_module.items() if each.keeps and None in written.get(m, (None,))}
    if visit is not None and not visit.ends:
        stays.add(visit.module)
    given: list[torch.Tensor | None] = []
    scalars, weights = [], []
    inputs = [n for n in compiled.gm.graph.find_nodes(op="placeholder") if mark_of(n) is not None]
    further = list(enumerate(compiled.takes, len(lowerings.inputs)))
    for (p, mark), node in zip(further, inputs, strict=True):
        computes = isinstance(mark, Predicate) and not reuses[mark.conditional]
        given.append((COMPUTE if computes else REUSE) if isinstance(mark, Predicate) else None)
        if isinstance(mark, Scalar):
            conditional = lowerings.conditionals[mark.conditional]
            device = value(node).device
            if mark.name == "weight":
                given[-1] = runtime.scalar(1.0, device)
                if reuses[mark.conditional]:
                    module = _module_of(runtime, cells[conditional.module])
                    weights.append((p, conditional.policy.how, module, device))
                continue
            which = Scalars._fields.index(mark.name)
            scalars.append((p, number_of[conditional.module], conditional.call, which, device))
    reads = [(p, m, i) for p, m, i in compiled.reads if of_module[m].reads]
    return Plan(
        compiled,
        tuple(given),
        tuple(scalars),
        tuple(weights),
        tuple((p, mark.stream) for p, mark in further if isinstance(mark, Entering)),
        tuple((p, cells[m], i) for p, m, i in reads),
        tuple(each for each in compiled.reads if each not in reads),
        tuple(cell for m, cell in enumerate(cells) if m not in stays),
        tuple((cells[m], m, positions) for m, positions in written.items()),
        [],
    )


def _module_of(runtime: Runtime, cell: Cell) -> Callable[[], nn.Module | None]:
    """Yields the module of a cell, which it does not keep alive."""
    found = running_module(cell.name, tuple(runtime.roots))
    return (lambda: None) if found is None else weakref.ref(found)
