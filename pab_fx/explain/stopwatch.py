"""Time each node of the graphs that a model runs: an inner compiler that compiles nothing."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..passes.form import Conditional, mark_of
from ..report.account import NUMBER, Round

_numbers = itertools.count()


def number_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Number the nodes of a captured graph, in place, so that their copies in lowered graphs are known for theirs."""
    for node in gm.graph.nodes:
        node.meta[NUMBER] = next(_numbers)
    return gm


class Stopwatch:
    """Runs graphs node by node, as `inner` of `pab_fx.enable`, and adds up where the time goes.

    On an accelerator the nodes are timed there, by events: the host runs ahead, as it does without.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[int | None, Any, Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph as it is, timed."""
        return _Timed(gm, self._marks, _runs_on_accelerator(example_inputs)).run

    def lap(self) -> Round:
        """Where the time went since the last lap."""
        seconds: Counter[int | None] = Counter()
        if any(not isinstance(begin, float) for _, begin, _ in self._marks):
            torch.accelerator.synchronize()
        for number, begin, end in self._marks:
            seconds[number] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        self._marks.clear()
        return seconds


class _Timed(fx.Interpreter):
    """Runs one graph, and marks when each node began and ended."""

    def __init__(self, gm: fx.GraphModule, marks: list[tuple[int | None, Any, Any]], on_accelerator: bool) -> None:
        super().__init__(gm)
        self._marks, self._now = marks, _event if on_accelerator else time.perf_counter
        self._numbers = {node: _number(gm, node) for node in gm.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call"):
            return super().run_node(n)
        begin = self._now()
        result = super().run_node(n)
        self._marks.append((self._numbers[n], begin, self._now()))
        return result


def _number(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """A node's number; of a condition, whose branch runs as a whole, that of the last node in the computing one."""
    if not isinstance(mark_of(node), Conditional):
        return node.meta.get(NUMBER)
    branch: Any = gm.get_submodule(str(node.args[1].target))  # type: ignore[union-attr]
    return next((inside.meta[NUMBER] for inside in reversed(branch.graph.nodes) if NUMBER in inside.meta), None)


def _runs_on_accelerator(inputs: Sequence[Any]) -> bool:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {each.device.type for each in inputs if isinstance(each, torch.Tensor)}
    return accelerator is not None and accelerator.type in kinds


def _event() -> torch.Event:
    """This moment in the stream of the accelerator."""
    event = torch.Event(device=torch.accelerator.current_accelerator(), enable_timing=True)
    event.record()
    return event
