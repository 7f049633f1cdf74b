"""Measure: run the head of a graph, and let the host read the numbers that rules ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from ..compile.lowering import Lowerings
from ..compile.specs import TensorSpec
from ..policy.when import Rule
from .contexts import current_sigma
from .deciding import Call, Decision, Lockstep
from .runtime import Runtime
from .state import StateStore


class Measured:
    """The numbers of one call of a graph. One is read when it is asked for: the host waits for it then.

    Args:
        rules: the rules of which there are numbers.
        numbers: for each the number, a tensor of shape [], `None` where there was no signal before.
        step: the timestep of the call, and how many calls there were before it in its cache context.
        on_read: is told a number that was read.
        first: the numbers of the cache context that was called first in this step, `None` if this is it.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        numbers: Sequence[torch.Tensor | None],
        step: tuple[float, int],
        on_read: Callable[[Rule, float], None],
        first: Measured | None = None,
    ) -> None:
        self.step = step
        self._rules, self._numbers, self._on_read, self._first = rules, numbers, on_read, first
        self._read: dict[int, float] = {}

    def __call__(self, rule: Rule) -> float | None:
        """What a rule goes by, `None` where there is no number; with `share_decision` it is the first context's."""
        if rule.share_decision and self._first is not None:
            return self._first(rule)
        i = position_of(rule, self._rules)
        number = None if i is None else self._numbers[i]
        if i is None or number is None:
            return None
        if i not in self._read:
            self._read[i] = float(number)
            self._on_read(rule, self._read[i])
        return self._read[i]


def position_of(rule: Rule, rules: Sequence[Rule]) -> int | None:
    """Which of the rules that a graph was captured with measures for a rule: itself, or one that measures the same."""
    if rule in rules:
        return rules.index(rule)
    return next((i for i, each in enumerate(rules) if _measures(each) == _measures(rule)), None)


def keeper_of(i: int, rules: Sequence[Rule], whens: Iterable[Rule | None]) -> int:
    """Beside which part the signal of the `i`-th rule is kept: of those with these rules the first that goes by it."""
    return next((m for m, when in enumerate(whens) if when is not None and position_of(when, rules) == i), 0)


def _measures(rule: Rule) -> Hashable:
    return type(rule), rule.signal, rule.accumulates, rule.by_rate


def measure(
    runtime: Runtime,
    lowerings: Lowerings,
    modules: Lockstep,
    store: StateStore,
    context: Hashable,
    args: tuple[Any, ...],
    call: Call,
) -> tuple[tuple[Any, ...], Measured]:
    """Run the head of a graph: the inputs with what it hands on, and what it measures.

    A graph without a head goes by what another piece of the model, whose graph breaks, has measured in this step.
    """
    step, rules = (call.t, modules.first.count.n), lowerings.rules
    if not rules:
        found: Measured | None = store.measured.get(context)
        if found is None or found.step != step:
            found = Measured((), (), step, _noted(runtime, context))
        return args, found
    specs = [(spec,) for spec in lowerings.signal_specs(args)]
    cells = zip(modules.signals, specs, strict=True)
    kept = [runtime.lend(cell, 0) if cell.caches is not None and cell.fits(spec) else None for cell, spec in cells]
    before = [runtime.unread(*spec) if each is None else each for each, spec in zip(kept, specs, strict=True)]
    further = [_rate(runtime, modules, rules, i, spec) for i, (spec,) in enumerate(specs) if rules[i].by_rate]
    if lowerings.takes_sigma:
        further.append(runtime.scalar(_noise_level(call, modules), specs[0][0].device))
    numbers, nows, crossing = lowerings.measured(args, before, further)
    known = [None if each is None else number for each, number in zip(kept, numbers, strict=True)]
    modules.nows = tuple(zip(nows, specs, strict=True))
    return (*args, *crossing), note_numbers(runtime, store, context, step, rules, known)


def note_numbers(
    runtime: Runtime,
    store: StateStore,
    context: Hashable,
    step: tuple[float, int],
    rules: Sequence[Rule],
    numbers: Sequence[torch.Tensor | None],
) -> Measured:
    """Note what rules have measured in a step of a cache context."""
    first = next((each for of, each in store.measured.items() if of != context and each.step == step), None)
    store.measured[context] = found = Measured(rules, numbers, step, _noted(runtime, context), first)
    return found


def _noise_level(call: Call, modules: Lockstep) -> float:
    """What `Sigma` is in a call."""
    told = current_sigma.get()
    if told is not None:
        if not 0 <= float(told) <= 1:
            raise ValueError(f"cache_context: sigma must be a noise level from 0 to 1, got {told!r}.")
        return float(told)
    first = call.timesteps[0] if call.timesteps else max(modules.first.count.first_t, call.t)
    return call.t / (1.0 if first <= 1 else 1000.0)


def _rate(runtime: Runtime, modules: Lockstep, rules: Sequence[Rule], i: int, spec: TensorSpec) -> torch.Tensor:
    """The rate that a rule goes by, as the part that it decides keeps it; any number where nothing is kept."""
    cell = modules.cells[keeper_of(i, rules, [cell.rule for cell in modules.cells])]
    if cell.rule is None or not cell.rule.by_rate or not cell.caches:
        return runtime.scalar(0.0, spec.device)
    return runtime.lend(cell, len(cell.caches) - 1)


def _noted(runtime: Runtime, context: Hashable) -> Callable[[Rule, float], None]:
    """What counts the numbers that are read, and warns of those that tell nothing."""

    def note(rule: Rule, number: float) -> None:
        runtime.numbers_read += 1
        runtime.on_number(context, rule, number)
        if not math.isfinite(number):
            runtime.warn_once(
                "not finite",
                f"pab_fx: the change that {rule!r} looks at is {number}: such a step computes. If it stays so, the "
                "model's activations are not finite.",
            )

    return note


def keep_signals(runtime: Runtime, rules: Sequence[Rule], modules: Lockstep, decisions: Sequence[Decision]) -> None:
    """Keep what later steps are measured against: the signals of steps that compute, or of all where changes add up.

    Where no part that goes by it is kept, the next step computes whatever the change: a signal is let go then.
    """
    for i, (rule, cell, (now, spec)) in enumerate(zip(rules, modules.signals, modules.nows, strict=True)):
        alike = [each for each in decisions if each.group.rule and position_of(each.group.rule, rules) == i]
        if alike and not any(each.keeps for each in alike):
            cell.caches = None
        elif rule.accumulates or not any(any(each.reuses) or each.rests for each in alike):
            cell.caches, cell.specs = runtime.hold(cell, (now,)), spec
    modules.nows = ()
