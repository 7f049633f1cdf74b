"""The schedule inside a graph: `schedule.SkipRange` and `AfterTimesteps` as nodes over buffers that count.

%timestep : placeholder
%rises    : call_function[torch.gt](%timestep, %pab_timestep)          # higher than in the last call
%n        : call_function[torch.where](%rises, 0.0, %pab_calls)        # then a new generation begins
%compute  : not (0 < n and n mod N != 0 and lo < timestep < hi)
...
%count    : call_function[aten.copy_](%pab_calls, n + 1)

Where the timesteps of a generation are known, the step tells the timestep, and the model's input, on whatever scale,
only that a generation begins:

%over   : call_function[torch.ge](%pab_calls, 50.0)                        # the last one had all its steps
%again  : %timestep is what the first step is given, and this is a step with another timestep
%n      : call_function[torch.where](%over or %again, 0.0, %pab_calls)
%t      : call_function[torch.index_select](%pab_timesteps, 0, %n)         # takes the place of %timestep
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.dataflow import value
from ..policy.when import NEVER, AfterTimesteps, Rule, SkipRange

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class Plan:
    """A generation whose timesteps are known.

    Args:
        timesteps: one for each call, on the windows' scale.
        first: what the model is given for its timestep in the first step; `None` if it takes none.
    """

    timesteps: tuple[float, ...]
    first: float | None


class InGraphSchedule:
    """The schedule as nodes of the graph: `schedule.SkipRange` and `AfterTimesteps` over buffers.

    Counters are floating point and live on the CPU, like the predicates made of them: a condition on a
    device would make the host wait for it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        timestep_callback: Callable[[], Any] | None,
        plan: Plan | None = None,
    ) -> None:
        self.graph = gm.graph
        self.gm = gm
        self._predicates: dict[tuple[Rule, int, int], fx.Node] = {}
        self._counts: list[tuple[str, fx.Node]] = []
        *_, last = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_before(last.next):
            self.end = self.graph.create_node("call_function", torch.full, ((), 0.0), {"dtype": torch.float64})
        with self._nodes():
            if plan is None:
                self._follow(self._callback(timestep_callback) if timestep_callback else self._required_input())
            else:
                self._count_through(plan)
            self._counts.insert(0, ("pab_calls", self._call("n_next", torch.add, self.calls, 1.0)))

    def _follow(self, timestep: fx.Node) -> None:
        """Take the timestep from a node; where it rises a generation begins."""
        self.timestep = self._scalar(timestep)
        rises = self._call("rises", torch.gt, self.timestep, self._buffer("pab_timestep", math.inf))
        self.calls = self._call("n", torch.where, rises, 0.0, self._buffer("pab_calls", 0.0))
        self._counts.append(("pab_timestep", self.timestep))

    def _count_through(self, plan: Plan) -> None:
        """Take the timestep of a step from a table; a generation begins after its end, or where the input tells it."""
        source = self._input()
        calls = self._unfolded(self._buffer("pab_calls", 0.0), source)
        begins = self._call("over", torch.ge, calls, float(len(plan.timesteps)))
        if source is not None and plan.first is not None:
            again = self._comes_again(plan.timesteps, plan.first, source, calls)
            begins = self._call("begins", torch.logical_or, begins, again)
        self.calls = self._call("n", torch.where, begins, 0.0, calls)
        self.timestep = self._row("pab_timesteps", plan.timesteps, self.calls)

    def _unfolded(self, calls: fx.Node, source: fx.Node | None) -> fx.Node:
        """The counter, as far as a compiler can tell dependent on an input.

        AOTInductor folds what depends on buffers alone, also on those that the graph updates (seen in 2.13): whether
        `pab_calls` has come to the end of the table would be decided when the package is compiled.
        """
        if source is None:
            inputs = self.graph.find_nodes(op="placeholder")
            source = next(node for node in inputs if isinstance(value(node), torch.Tensor))
            source = self._call("any", torch.amax, source)
        never = self._call("never", torch.gt, self._scalar(source), math.inf)
        return self._call("calls", torch.where, never, 0.0, calls)

    def _comes_again(self, timesteps: Sequence[float], first: float, source: fx.Node, calls: fx.Node) -> fx.Node:
        """Whether the first step's input comes in a step whose own input differs, as far as its dtype can tell."""
        later = [float(abs(t - timesteps[0]) > resolution(value(source), timesteps[0])) for t in timesteps]
        step = self._call("step", torch.clamp, calls, max=len(timesteps) - 1.0)
        off = self._call("off", torch.abs, self._call("off", torch.sub, self._scalar(source), first))
        again = self._call("again", torch.le, off, resolution(value(source), first) / 2)
        return self._call("again", torch.logical_and, again, self._row("pab_later", later, step))

    def _row(self, name: str, table: Sequence[float], step: fx.Node) -> fx.Node:
        """The entry of a constant table that belongs to a step."""
        self.gm.register_buffer(name, torch.tensor(table, dtype=torch.float64), persistent=False)
        index = self._call("index", torch.Tensor.to, step, torch.int64)
        index = self._call("index", torch.reshape, index, (1,))
        row = self._call("row", torch.index_select, self.graph.get_attr(name), 0, index)
        return self._call("row", torch.reshape, row, ())

    def compute(self, rule: Rule, role: str, call: int, calls: int) -> fx.Node:
        """Whether a region computes, as a node; regions with the same rule and counter share it.

        Args:
            rule: when the region reuses.
            role: its role, for the node's name.
            call: which of its module's calls in the graph it is.
            calls: how often the graph calls the module.
        """
        key = (rule, call, calls)
        if key not in self._predicates:
            with self._nodes():
                n = self.calls
                if calls > 1:
                    n = self._call("n", torch.mul, n, float(calls))
                    n = self._call("n", torch.add, n, float(call))
                started = self._call("started", torch.gt, n, 0.0)
                due = self._skip_range(rule, n) if isinstance(rule, SkipRange) else self._after_timesteps(rule, n)
                reuse = self._call(f"reuse_{role}", torch.logical_and, started, due)
                if isinstance(rule, AfterTimesteps):
                    self._extend(rule, n, reuse)
                self._predicates[key] = self._call(f"compute_{role}", torch.logical_not, reuse)
        return self._predicates[key]

    def _skip_range(self, rule: SkipRange, n: fx.Node) -> fx.Node:
        above = self._call("above", torch.gt, self.timestep, float(rule.low))
        below = self._call("below", torch.lt, self.timestep, float(rule.high))
        inside = self._call("inside", torch.logical_and, above, below)
        remainder = self._call("remainder", torch.remainder, n, float(rule.skip_range))
        between = self._call("between", torch.ne, remainder, 0.0)
        return self._call("due", torch.logical_and, inside, between)

    def _after_timesteps(self, rule: AfterTimesteps, n: fx.Node) -> fx.Node:
        unlisted = self._call("unlisted", torch.eq, self._lifetime(rule), 0.0)
        fresh = self._call("fresh", torch.le, n, self._buffer(f"pab_until_{len(self._predicates)}", NEVER))
        return self._call("due", torch.logical_and, unlisted, fresh)

    def _extend(self, rule: AfterTimesteps, n: fx.Node, reuse: fx.Node) -> None:
        """Note until when a computed output may be reused."""
        name = f"pab_until_{len(self._predicates)}"
        extended = self._call("extended", torch.add, n, self._lifetime(rule))
        self._counts.append((name, self._call("until", torch.where, reuse, self.graph.get_attr(name), extended)))

    def _lifetime(self, rule: AfterTimesteps) -> fx.Node:
        lifetime = self._call("lifetime", torch.full_like, self.timestep, 0.0)
        for listed, count in sorted(rule.skip_counts, key=lambda entry: entry[1]):
            here = self._call("here", torch.eq, self.timestep, listed)
            lifetime = self._call("lifetime", torch.where, here, float(count), lifetime)
        return lifetime

    def count(self) -> None:
        """Write counters and timestep back, at the end of the graph; the marker node goes."""
        self.graph.erase_node(self.end)
        with self.graph.inserting_before(self.graph.output_node()):
            for name, counted in self._counts:
                self.graph.call_function(torch.ops.aten.copy_.default, (self.graph.get_attr(name), counted))

    def _callback(self, callback: Callable[[], Any]) -> fx.Node:
        return self._call("callback", callback if hasattr(callback, "__name__") else lambda: callback())

    def _required_input(self) -> fx.Node:
        found = self._input()
        if found is None:
            raise ValueError(
                f"the graph has no timestep: none of its inputs is called {', '.join(TIMESTEP_NAMES)}. "
                "Trace a forward that takes one, or set current_timestep_callback in the config."
            )
        return found

    def _input(self) -> fx.Node | None:
        inputs = {node: timestep_name(node) for node in self.graph.find_nodes(op="placeholder")}
        return next((node for name in TIMESTEP_NAMES for node in inputs if inputs[node] == name), None)

    def _scalar(self, timestep: fx.Node) -> fx.Node:
        """The largest element, since tokens of a conditioning image are at 0."""
        timestep = self._call("timestep", torch.as_tensor, timestep, dtype=torch.float64, device="cpu")
        return self._call("timestep", torch.amax, timestep)

    def _buffer(self, name: str, start: float) -> fx.Node:
        self.gm.register_buffer(name, torch.tensor(start, dtype=torch.float64), persistent=False)
        return self.graph.get_attr(name)

    def _nodes(self) -> Any:
        return self.graph.inserting_before(self.end)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", function, args, kwargs, name=f"pab_{name}")


def timestep_name(node: fx.Node) -> str:
    """The bare name of a graph input: "timestep" for Dynamo's `l_timestep_` and `l_kwargs_timestep_`."""
    name = str(node.target).lower()
    return name[2:-1].removeprefix("kwargs_") if name.startswith("l_") and name.endswith("_") else name


def resolution(recorded: Any, at: float) -> float:
    """How far apart two timesteps near `at` have to be for a tensor like the recorded one to tell them apart."""
    is_floating = isinstance(recorded, torch.Tensor) and recorded.dtype.is_floating_point
    return torch.finfo(recorded.dtype).eps * abs(at) if is_floating else 1.0
