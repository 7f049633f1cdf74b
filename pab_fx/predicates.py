"""The schedule inside a graph: `schedule.SkipRange` and `AfterTimesteps` as nodes over buffers that count.

%timestep : placeholder
%rises    : call_function[torch.gt](%timestep, %pab_timestep)          # higher than in the last call
%n        : call_function[torch.where](%rises, 0.0, %pab_calls)        # then a new generation begins
%compute  : not (0 < n and n mod N != 0 and lo < timestep < hi)
...
%count    : call_function[aten.copy_](%pab_calls, n + 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .schedule import NEVER, AfterTimesteps, Rule, SkipRange

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class InGraphSchedule:
    """The schedule as nodes of the graph: `schedule.SkipRange` and `AfterTimesteps` over buffers.

    Counters are floating point and live on the CPU, like the predicates made of them: a condition on a
    device would make the host wait for it.
    """

    def __init__(self, gm: fx.GraphModule, timestep_callback: Callable[[], Any] | None) -> None:
        self.graph = gm.graph
        self.gm = gm
        self._predicates: dict[tuple[Rule, int, int], fx.Node] = {}
        self._counts: list[tuple[str, fx.Node]] = []
        *_, last = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_before(last.next):
            self.end = self.graph.create_node("call_function", torch.full, ((), 0.0), {"dtype": torch.float64})
        with self._nodes():
            self.timestep = self._timestep(timestep_callback)
            rises = self._call("rises", torch.gt, self.timestep, self._buffer("pab_timestep", math.inf))
            self.calls = self._call("n", torch.where, rises, 0.0, self._buffer("pab_calls", 0.0))
            self._counts += [
                ("pab_calls", self._call("n_next", torch.add, self.calls, 1.0)),
                ("pab_timestep", self.timestep),
            ]

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

    def _timestep(self, callback: Callable[[], Any] | None) -> fx.Node:
        if callback is not None:
            found = self._call("callback", callback if hasattr(callback, "__name__") else lambda: callback())
        else:
            inputs = {node: timestep_name(node) for node in self.graph.find_nodes(op="placeholder")}
            named = [node for name in TIMESTEP_NAMES for node in inputs if inputs[node] == name]
            if not named:
                raise ValueError(
                    f"the graph has no timestep: none of its inputs is called {', '.join(TIMESTEP_NAMES)}. "
                    "Trace a forward that takes one, or set current_timestep_callback in the config."
                )
            found = named[0]
        found = self._call("timestep", torch.as_tensor, found, dtype=torch.float64, device="cpu")
        return self._call("timestep", torch.amax, found)

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
