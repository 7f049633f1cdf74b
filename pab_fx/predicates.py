"""The schedule inside a graph: `schedule.SkipRange` and `AfterTimesteps` as nodes over buffers that count.

%timestep : placeholder
%rises    : call_function[torch.gt](%timestep, %pab_timestep)          # higher than in the last call
%n        : call_function[torch.where](%rises, 0.0, %pab_calls)        # then a new generation begins
%compute  : not (0 < n and n mod N != 0 and lo < timestep < hi)
...
%count    : call_function[aten.copy_](%pab_calls, n + 1)

Where the timesteps of a generation are known, the step tells the timestep, and the model's input, on whatever scale,
only when a generation begins:

%over   : call_function[torch.ge](%pab_calls, 50.0)                            # the last one had all its steps
%rises  : %given > %pab_timestep, and the timestep of this step does not rise
%again  : %given == %pab_first, and the timestep of this step is not the first one
%n      : call_function[torch.where](%over or %rises or %again, 0.0, %pab_calls)
%t      : call_function[torch.index_select](%pab_timesteps, 0, %n)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .dataflow import value
from .schedule import NEVER, AfterTimesteps, Rule, SkipRange

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class InGraphSchedule:
    """The schedule as nodes of the graph: `schedule.SkipRange` and `AfterTimesteps` over buffers.

    Counters are floating point and live on the CPU, like the predicates made of them: a condition on a
    device would make the host wait for it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        timestep_callback: Callable[[], Any] | None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        self.graph = gm.graph
        self.gm = gm
        self._predicates: dict[tuple[Rule, int, int], fx.Node] = {}
        self._counts: list[tuple[str, fx.Node]] = []
        *_, last = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_before(last.next):
            self.end = self.graph.create_node("call_function", torch.full, ((), 0.0), {"dtype": torch.float64})
        with self._nodes():
            if timesteps is None:
                self._follow(self._callback(timestep_callback) if timestep_callback else self._required_input())
            else:
                self._count_through([float(t) for t in timesteps])
            self._counts.insert(0, ("pab_calls", self._call("n_next", torch.add, self.calls, 1.0)))

    def _follow(self, timestep: fx.Node) -> None:
        """Take the timestep from a node; where it rises a generation begins."""
        self.timestep = self._scalar(timestep)
        rises = self._call("rises", torch.gt, self.timestep, self._buffer("pab_timestep", math.inf))
        self.calls = self._call("n", torch.where, rises, 0.0, self._buffer("pab_calls", 0.0))
        self._counts.append(("pab_timestep", self.timestep))

    def _count_through(self, timesteps: list[float]) -> None:
        """Take the timestep of a step from a table; a generation begins after its end, or where the input tells it."""
        calls = self._buffer("pab_calls", 0.0)
        begins = self._call("over", torch.ge, calls, float(len(timesteps)))
        source = self._input()
        if source is not None:
            given = self._scalar(source)
            anew = self._begins_anew(given, calls, timesteps, _resolution(value(source), timesteps[0]))
            begins = self._call("begins", torch.logical_or, begins, anew)
        self.calls = self._call("n", torch.where, begins, 0.0, calls)
        self.timestep = self._row("pab_timesteps", timesteps, self.calls)
        if source is not None:
            started = self._call("started", torch.gt, self.calls, 0.0)
            first = self._call("first", torch.where, started, self.graph.get_attr("pab_first"), given)
            self._counts += [("pab_timestep", given), ("pab_first", first)]

    def _begins_anew(self, given: fx.Node, calls: fx.Node, timesteps: list[float], resolution: float) -> fx.Node:
        """Whether the model's input cannot follow in this generation: it rises, or is that of the first step again."""
        steady = [float(not t > before) for before, t in zip([math.inf, *timesteps], timesteps, strict=False)]
        later = [float(abs(t - timesteps[0]) > resolution) for t in timesteps]
        step = self._call("step", torch.clamp, calls, max=len(timesteps) - 1.0)
        rises = self._call("rises", torch.gt, given, self._buffer("pab_timestep", math.inf))
        rises = self._call("rises", torch.logical_and, rises, self._row("pab_steady", steady, step))
        again = self._call("again", torch.eq, given, self._buffer("pab_first", math.inf))
        again = self._call("again", torch.logical_and, again, self._row("pab_later", later, step))
        return self._call("anew", torch.logical_or, rises, again)

    def _row(self, name: str, table: list[float], step: fx.Node) -> fx.Node:
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


def _resolution(recorded: Any, at: float) -> float:
    """How far apart timesteps have to be for an input of that dtype to tell them apart, on the scheduler's scale."""
    is_floating = isinstance(recorded, torch.Tensor) and recorded.dtype.is_floating_point
    return torch.finfo(recorded.dtype).eps * abs(at) if is_floating else 1.0
