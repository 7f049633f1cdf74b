"""Sink the state of a conditional graph into buffers, and count and decide in nodes: a module that is whole by itself.

Before, in functional form:

    %x         : placeholder
    %computes_0: placeholder
    %slot_0_0  : placeholder
    %cond      : call_function[cond](%computes_0, compute_0, read_0, (%slot_0_0, %x))
    %out       : call_function[operator.getitem](%cond, 0)
    return ((%y,), %out)

After:

    %x         : placeholder
    %timestep  : placeholder
    %compute   : not (0 < calls and calls mod N != 0 and lo < timestep < hi)      # see `counting`
    %slot      : get_attr[pab_slot_0_0]
    %cond      : call_function[cond](%compute, compute_0, read_0, (%slot, %x))
    %out       : call_function[operator.getitem](%cond, 0)
    %write     : call_function[aten.copy_](%slot, %out)
    %count     : call_function[aten.copy_](%calls, calls + 1)
    return (%y,)

With cache contexts each buffer is a stack, a `cond` is handed the stack and the index of the context, and its branches
take that entry where they read a slot: where a slot is not read, none is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import effects
from ..graph.copies import traced_into
from ..graph.dataflow import value
from ..policy.when import Rule
from .buffers import CONTEXT, Buffers
from .counting import Counting, Decided, Plan
from .cut import measure, noise_levels, take_signals
from .form import (
    MARK,
    Conditional,
    Predicate,
    Scalar,
    Slot,
    all_conditionals,
    branches_of,
    conditionals,
    device_of,
    inputs_of,
    mark_of,
    operands_of,
    set_slots_returned,
    slots_returned,
    with_branches,
)
from .strides import in_order, stride_order


def sink_state(
    gm: fx.GraphModule,
    timestep_callback: Callable[[], Any] | None = None,
    plan: Plan | None = None,
    contexts: int = 0,
) -> fx.GraphModule:
    """Rewrite `gm`, in place, as the module's docstring shows.

    Args:
        gm: a graph from `insert_conditions`; one without conditions is left as it is.
        timestep_callback: yields the timestep in place of the graph's input.
        plan: the timesteps of a generation, which take the place of both: the graph counts through them.
        contexts: how many cache contexts there are, each with a state of its own; 0 for one without a name.

    Raises:
        ValueError: if the graph has neither a timestep input nor a callback nor a plan.
    """
    if not conditionals(gm):
        return gm
    *_, last = gm.graph.find_nodes(op="placeholder")
    first = last.next
    buffers = Buffers(gm, contexts)
    _sink_slots(gm, buffers)
    with gm.graph.inserting_before(first):
        counting = Counting(gm, buffers, timestep_callback, plan)
    for told in noise_levels(gm.graph):
        _give_noise_level(counting, told)
    signals = _sink_signals(gm, buffers)
    if signals:
        counting.go_on_behind({rule: signal.number for rule, signal in signals.items()})
    found: dict[int, Decided] = {}
    for conditional in all_conditionals(gm):
        assert conditional.policy.when is not None
        around = None if conditional.outer is None else found[conditional.outer]
        decided = counting.decided(
            conditional.policy.when, conditional.role, conditional.call, conditional.calls, around
        )
        found[conditional.index] = decided
        _give(gm, Predicate(conditional.index), decided.compute)
        for mark, node in inputs_of(gm, Scalar).items():
            if mark.conditional == conditional.index:
                _check_weight(mark, conditional)
                _give(gm, mark, _as_scalar(counting, decided.scalars(mark.name), device_of(node)))
        if conditional.policy.when in signals:
            signals[conditional.policy.when].stays.append(decided.rests)
    for i, (rule, signal) in enumerate(signals.items()):
        with counting.nodes():
            kept = signal.now
            for stays in signal.stays[:1] if not rule.accumulates else ():
                there = counting.call("stays", torch.Tensor.to, stays, device_of(kept))
                kept = counting.call("signal", torch.where, there, signal.before, kept)
        with gm.graph.inserting_before(gm.graph.output_node()):
            buffers.write(f"pab_signal_{i}", kept, sizes=not _is_sized(value(signal.now)))
    counting.count()
    _hand_on_once(gm)
    return gm


@dataclass(frozen=True)
class _Sunk:
    """A signal of a graph that counts for itself.

    Args:
        now, before: the tensor in this step and in an earlier one.
        number: what is measured.
        stays: for each part that goes by it, whether what is kept stays.
    """

    now: fx.Node
    before: fx.Node
    number: fx.Node
    stays: list[fx.Node] = field(default_factory=list)


def _sink_signals(gm: fx.GraphModule, buffers: Buffers) -> dict[Rule, _Sunk]:
    """Read each signal of an earlier step from a buffer, and measure how far it has changed.

    %now : sub(%y, %x)                 %now    : sub(%y, %x)
    ...                          ->    %before : get_attr[pab_signal_0]
    return (%z, %now)                  %change : mean(abs(%now - %before)) / mean(abs(%before))
                                       ...
                                       return (%z,)
    """
    found: dict[Rule, _Sunk] = {}
    for i, (rule, now) in enumerate(take_signals(gm).items()):
        name = f"pab_signal_{i}"
        buffers.register(name, _buffer_for(gm, value(now)))
        with gm.graph.inserting_before(now.next):
            before = buffers.read(name)
            if not _is_sized(value(now)):
                before = gm.graph.call_function(fitting, (before, now))
            if value(now) is not None:
                before.meta["example_value"] = value(now)
            rates = {0: buffers.read(_rate_of(gm, rule))} if rule.by_rate else {}
            (number,) = measure(gm.graph, [rule], [now], [before], effects.process_groups(gm.graph), rates)
        found[rule] = _Sunk(now, before, number)
    return found


def _rate_of(gm: fx.GraphModule, rule: Rule) -> str:
    """The buffer of the rate that a rule goes by: the last slot of the part that it decides."""
    decided = next(each for each in all_conditionals(gm) if each.policy.when == rule)
    return _buffer_of(decided.slots[-1])


def _buffer_of(slot: Slot) -> str:
    return f"pab_slot_{slot.module}_{slot.index}"


def _hand_on_once(gm: fx.GraphModule) -> None:
    """Hand each `cond` an operand once: those that lie in others share what is decided alike.

    cond(%p, compute_0, read_0, (%q, %q, %x))    ->    cond(%p, compute_0, read_0, (%q, %x))
    """
    for graph in with_branches(gm):
        for cond in conditionals(graph):
            operands = operands_of(cond)
            for branch in branches_of(graph, cond):
                first: dict[fx.Node, fx.Node] = {}
                for operand, given in zip(operands, branch.graph.find_nodes(op="placeholder"), strict=True):
                    if first.setdefault(operand, given) is not given:
                        given.replace_all_uses_with(first[operand])
                        branch.graph.erase_node(given)
                branch.recompile()
            cond.args = (*cond.args[:3], tuple(dict.fromkeys(operands)))


def _check_weight(mark: Scalar, conditional: Conditional) -> None:
    if mark.name == "weight":
        raise ValueError(
            f"{conditional.name}: {conditional.policy.how!r} reads scalars.weight, which is asked for on the host in "
            "each step, and a graph that runs by itself has nobody to ask: use pab_fx.enable, or another how."
        )


def _give(gm: fx.GraphModule, mark: Predicate | Scalar, node: fx.Node) -> None:
    """Put a node in the place of an input."""
    given = inputs_of(gm, type(mark))[mark]
    given.replace_all_uses_with(node)
    gm.graph.erase_node(given)


def _as_scalar(counting: Counting, node: fx.Node, device: torch.device) -> fx.Node:
    with counting.nodes():
        return counting.call("scalar", torch.Tensor.to, node, device, torch.float32)


def _give_noise_level(counting: Counting, told: fx.Node) -> None:
    """Put the noise level by the timestep in the place of what stands for it."""
    like: Any = told.args[0]
    told.replace_all_uses_with(_as_scalar(counting, counting.noise_level(), device_of(like)))
    counting.graph.erase_node(told)


def _sink_slots(gm: fx.GraphModule, buffers: Buffers) -> None:
    """Read each slot from a buffer, and write it there once it has its last value."""
    graph = gm.graph
    for slot, given in inputs_of(gm, Slot).items():
        name = _buffer_of(slot)
        buffers.register(name, _buffer_for(gm, value(given)))
        (reader,) = given.users  # the first call of its module
        with graph.inserting_before(reader):
            held = graph.get_attr(name)
        held.meta = {"example_value": value(given)} if value(given) is not None and buffers.index is None else {}
        given.replace_all_uses_with(held)
        if buffers.index is not None:
            _choose_inside(gm, buffers, reader, held, name)
        elif not _is_sized(value(held)):
            _fit_inside(gm, reader, held, slot)
        graph.erase_node(given)
    kept = slots_returned(gm)
    set_slots_returned(gm, {})
    output = graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
    output.meta.pop(MARK, None)
    for slot, node in kept.items():
        with graph.inserting_before(effects.end_of_updates(graph, node)):
            buffers.write(_buffer_of(slot), node, sizes=not _is_sized(value(node)))


def _is_sized(recorded: Any) -> bool:
    """Whether it is known how large a tensor is, whatever the graph is given."""
    return isinstance(recorded, torch.Tensor) and all(isinstance(size, int) for size in recorded.shape)


def _fit_inside(gm: fx.GraphModule, cond: fx.Node, held: fx.Node, slot: Slot) -> None:
    """Let a branch that computes read a slot only at its size: a generation may follow one of other sizes.

    branch(%slot, %x)                                  branch(%slot, %x)
    %y = attention(%x)                                 %y = attention(%x)
    %d = sub(%y, %slot)    # what is in the    ->      %look = empty_like(%y)
                           # slot is arbitrary         %fitting = fitting(%slot, %look)
                           # in the first step         %d = sub(%y, %fitting)
    """
    branch, conditional = branches_of(gm, cond)[0], mark_of(cond)
    given = branch.graph.find_nodes(op="placeholder")[operands_of(cond).index(held)]
    users = list(given.users)
    if slot not in conditional.slots:
        for inner in conditionals(branch):
            if given in operands_of(inner):
                _fit_inside(branch, inner, given, slot)
        return
    if not users:
        return
    outputs: Any = branch.graph.output_node().args[0]
    with branch.graph.inserting_before(min(users)):
        looks = traced_into(branch.graph, conditional.policy.how.slots, outputs[: conditional.outputs])
        fitted = branch.graph.call_function(fitting, (given, looks[slot.index]))
    given.replace_all_uses_with(fitted, delete_user_cb=lambda user: user in users)
    branch.recompile()


def fitting(held: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """What is in a slot if it has the shape that it is to have, else one number, which fits any.

    Example:
        >>> fitting(torch.zeros(2, 5), torch.empty(1, 5)).shape
        torch.Size([])
    """
    return held if held.shape == look.shape else torch.zeros((), dtype=held.dtype, device=held.device)


def _buffer_for(gm: fx.GraphModule, recorded: Any) -> torch.Tensor:
    """A buffer of the size that was recorded, in the layout that both branches of a `cond` yield; else one number.

    That one fits any size, for a how that reads its slots before they are filled.
    """
    if _is_sized(recorded):
        strides = torch.empty_like(recorded).stride()
        return torch.empty_strided(recorded.shape, strides, dtype=recorded.dtype, device=recorded.device).zero_()
    like = next((p for p in gm.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _choose_inside(gm: fx.GraphModule, buffers: Buffers, cond: fx.Node, held: fx.Node, name: str) -> None:
    """Hand a `cond` the index of the context, once, and let its branches take that entry of a stack."""
    stack_at = operands_of(cond).index(held)
    index_at = next((i for i, operand in enumerate(operands_of(cond)) if mark_of(operand) == CONTEXT), None)
    if index_at is None:
        with gm.graph.inserting_before(cond):
            index = gm.graph.call_function(torch.clone, (buffers.index_for(name),))
        index.meta[MARK] = CONTEXT
        index_at = len(operands_of(cond))
        cond.args = (*cond.args[:3], (*operands_of(cond), index))
        for branch in branches_of(gm, cond):
            with branch.graph.inserting_after(branch.graph.find_nodes(op="placeholder")[-1]):
                branch.graph.placeholder(CONTEXT)
    for branch in branches_of(gm, cond):
        inputs = branch.graph.find_nodes(op="placeholder")
        stack, recorded, users = inputs[stack_at], value(inputs[stack_at]), list(inputs[stack_at].users)
        stack.meta = {}
        if users:
            with branch.graph.inserting_before(inputs[-1].next):
                chosen = buffers.chosen(branch.graph, stack, inputs[index_at])
                # laid out as it was: both branches of a `cond` yield the same strides
                laid_out = branch.graph.call_function(in_order, (chosen, stride_order(torch.empty_like(recorded))))
            stack.replace_all_uses_with(laid_out, delete_user_cb=lambda user: user in users)  # noqa: B023
        branch.recompile()
