"""Count the steps of a generation and decide rules inside of a graph, as nodes over buffers.

%timestep : placeholder
%rises    : call_function[torch.gt](%timestep, %pab_timestep)          # higher than in the last call
%n        : call_function[torch.where](%rises, 0.0, %pab_calls)        # then a new generation begins
%due      : the nodes of `rule.decide`, such as n mod N != 0 and lo < timestep < hi
%compute  : not (0 < n and due)
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from ..graph.dataflow import value
from ..policy.when import NEVER, Rule, Step
from .buffers import Buffers

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")

CALLS = "pab_calls"
"""Name of the buffer that counts the calls of a graph."""


@dataclass(frozen=True)
class Plan:
    """A generation whose timesteps are known.

    Args:
        timesteps: one for each call, on the windows' scale.
        first: what the model is given for its timestep in the first step; `None` if it takes none.
    """

    timesteps: tuple[float, ...]
    first: float | None


@dataclass(frozen=True)
class Decided:
    """A call of a module as the graph decides it: nodes of shape [] on the CPU.

    Args:
        compute: whether it computes, a bool.
        rests: whether what lies in it is neither run nor read, a bool.
        scalars: its `Scalars` by name, float64.
    """

    compute: fx.Node
    rests: fx.Node
    scalars: Callable[[str], fx.Node]


class Counting:
    """Makes the nodes that count and decide.

    Counters are floating point and live on the CPU, like the predicates made of them: a condition on a device would
    make the host wait for it.

    Args:
        gm: the graph.
        buffers: where counters are held.
        timestep_callback: yields the timestep in place of the graph's input.
        plan: the timesteps of a generation, which take the place of both: the graph counts through them.

    Raises:
        ValueError: if there is no timestep.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        buffers: Buffers,
        timestep_callback: Callable[[], Any] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self._numbers: Mapping[Rule, fx.Node] = {}
        self.graph, self.gm, self._buffers, self._plan = gm.graph, gm, buffers, plan
        self._modules: dict[tuple[Rule, int, fx.Node | None], _Calls] = {}
        self._counts: list[tuple[str, fx.Node]] = []
        self._end = self.graph.create_node("call_function", torch.full, ((), 0.0), {"dtype": torch.float64})
        with self.nodes():
            if plan is None:
                self._follow(self._callback(timestep_callback) if timestep_callback else self._required_input())
            else:
                self._count_through(plan)
            self.started = self.call("started", torch.gt, self.calls, 0.0)
            self._counts.insert(0, (CALLS, self.call("n_next", torch.add, self.calls, 1.0)))

    def go_on_behind(self, numbers: Mapping[Rule, fx.Node]) -> None:
        """Decide behind what is measured in a step, for each rule that looks at a signal."""
        self._numbers = numbers
        max(numbers.values()).append(self._end)

    def noise_level(self) -> fx.Node:
        """The noise level of the step, see `Sigma`; without a plan, timesteps up to 1 are taken as they are."""
        with self.nodes():
            if self._plan is not None:
                return self.call("sigma", torch.div, self.timestep, 1.0 if self._plan.timesteps[0] <= 1 else 1000.0)
            small = self.call("small", torch.le, self.timestep, 1.0)
            scaled = self.call("scaled", torch.div, self.timestep, 1000.0)
            return self.call("sigma", torch.where, small, self.timestep, scaled)

    def decided(self, rule: Rule, role: str, call: int, calls: int, around: Decided | None = None) -> Decided:
        """A call of a module that goes by a rule; modules with the same rule that are called equally often share it.

        Args:
            rule: when the module reuses.
            role: its role, for the names of nodes.
            call: which of its calls in the graph it is; asked for in order.
            calls: how often the graph calls the module.
            around: what is decided of the part in which it lies; `None` for none.
        """
        rests = None if around is None else around.rests
        key = (rule, calls, rests)
        if key not in self._modules:
            self._modules[key] = _Calls(self, rule, calls, role, f"pab_{role}_{len(self._modules)}", rests)
        with self.nodes():
            return self._modules[key].decided(call)

    def number(self, rule: Rule) -> fx.Node:
        """What a rule measures in this step: shape [], float64, on the CPU."""
        return self.call("number", torch.Tensor.to, self._numbers[rule], "cpu", torch.float64)

    def count(self) -> None:
        """Write counters and timestep back, at the end of the graph; the marker node goes."""
        with self.nodes():
            for each in self._modules.values():
                self._counts += each.counts()
        self.graph.erase_node(self._end)
        with self.graph.inserting_before(self.graph.output_node()):
            for name, counted in self._counts:
                self._buffers.write(name, counted)

    @property
    def steps(self) -> float:
        """How many steps a generation has; infinity where that is not known."""
        return math.inf if self._plan is None else float(len(self._plan.timesteps))

    def _follow(self, timestep: fx.Node) -> None:
        """Take the timestep from a node; where it rises a generation begins."""
        self.timestep = self._scalar(timestep)
        rises = self.call("rises", torch.gt, self.timestep, self._held("pab_timestep", math.inf))
        self.calls = self.call("n", torch.where, rises, 0.0, self._held(CALLS, 0.0))
        self._counts.append(("pab_timestep", self.timestep))

    def _count_through(self, plan: Plan) -> None:
        """Take the timestep of a step from a table; a generation begins after its end, or where the input tells it."""
        source = self._input()
        calls = self._unfolded(self._held(CALLS, 0.0), source)
        begins = self.call("over", torch.ge, calls, float(len(plan.timesteps)))
        if source is not None and plan.first is not None:
            again = self._comes_again(plan.timesteps, plan.first, source, calls)
            begins = self.call("begins", torch.logical_or, begins, again)
        self.calls = self.call("n", torch.where, begins, 0.0, calls)
        self.timestep = self._row("pab_timesteps", plan.timesteps, self.calls)

    def _unfolded(self, calls: fx.Node, source: fx.Node | None) -> fx.Node:
        """The counter, as far as a compiler can tell dependent on an input.

        AOTInductor folds what depends on buffers alone, also on those that the graph updates (seen in 2.13): whether
        `pab_calls` has come to the end of the table would be decided when the package is compiled.
        """
        if source is None:
            inputs = self.graph.find_nodes(op="placeholder")
            source = next(node for node in inputs if isinstance(value(node), torch.Tensor))
            source = self.call("any", torch.amax, source)
        never = self.call("never", torch.gt, self._scalar(source), math.inf)
        return self.call("calls", torch.where, never, 0.0, calls)

    def _comes_again(self, timesteps: Sequence[float], first: float, source: fx.Node, calls: fx.Node) -> fx.Node:
        """Whether the first step's input comes in a step whose own input differs, as far as its dtype can tell."""
        later = [float(abs(t - timesteps[0]) > resolution(value(source), timesteps[0])) for t in timesteps]
        step = self.call("step", torch.clamp, calls, max=len(timesteps) - 1.0)
        off = self.call("off", torch.abs, self.call("off", torch.sub, self._scalar(source), first))
        again = self.call("again", torch.le, off, resolution(value(source), first) / 2)
        return self.call("again", torch.logical_and, again, self._row("pab_later", later, step))

    def _row(self, name: str, table: Sequence[float], step: fx.Node) -> fx.Node:
        """The entry of a constant table that belongs to a step."""
        self.gm.register_buffer(name, torch.tensor(table, dtype=torch.float64), persistent=False)
        index = self.call("index", torch.Tensor.to, step, torch.int64)
        index = self.call("index", torch.reshape, index, (1,))
        row = self.call("row", torch.index_select, self.graph.get_attr(name), 0, index)
        return self.call("row", torch.reshape, row, ())

    def _callback(self, callback: Callable[[], Any]) -> fx.Node:
        return self.call("callback", callback if hasattr(callback, "__name__") else lambda: callback())

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
        timestep = self.call("timestep", torch.as_tensor, timestep, dtype=torch.float64, device="cpu")
        return self.call("timestep", torch.amax, timestep)

    def _held(self, name: str, start: float) -> fx.Node:
        self.register(name, start)
        return self.read(name)

    def register(self, name: str, start: float) -> None:
        """Give the graph a counter."""
        self._buffers.register(name, torch.tensor(start, dtype=torch.float64))

    def read(self, name: str) -> fx.Node:
        """What a counter holds."""
        return self._buffers.read(name)

    def nodes(self) -> Any:
        """Where nodes are made."""
        return self.graph.inserting_before(self._end)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls a function."""
        return self.graph.create_node("call_function", function, args, kwargs, name=f"pab_{name}")


class _Calls:
    """The calls of a module in one step, one after the other, and what they leave for the next step.

    Args:
        counting: makes nodes.
        rule: when the module reuses.
        calls: how often it is called.
        role: its role.
        name: of its buffers.
        rests: whether it is neither run nor read in this step; `None` for never.
    """

    def __init__(self, counting: Counting, rule: Rule, calls: int, role: str, name: str, rests: fx.Node | None) -> None:
        self._counting, self._rule, self._calls, self._role, self._name = counting, rule, calls, role, name
        self._rests = rests
        self._decided: list[Decided] = []
        self._state: dict[str, fx.Node] = {}

    def decided(self, call: int) -> Decided:
        """A call, once those before it are decided."""
        while len(self._decided) <= call:
            self._decided.append(self._decide(len(self._decided)))
        return self._decided[call]

    def _decide(self, call: int) -> Decided:
        counting = self._counting
        n, started = self._n(call), counting.started
        if call:
            started = counting.call("started", torch.gt, n, 0.0)
        state = _State(self, n, started)
        tracer = fx.proxy.GraphAppendingTracer(counting.graph)
        progress: Any = _Progress(state, tracer)
        step = Step(fx.Proxy(n, tracer), fx.Proxy(counting.timestep, tracer), counting.steps * self._calls)
        try:
            signal = self._signal(started, tracer)
            due = self._rule.to_graph(step, progress, signal)
        except Exception as error:
            raise TypeError(
                f"{self._rule!r}: decide cannot be traced into a graph, {type(error).__name__}: {error}. It takes "
                "(step, progress, signal) and joins conditions by & and |, in place of and, or, not, if."
            ) from error
        if not isinstance(due, fx.Proxy):  # a rule that always decides alike
            due = fx.Proxy(counting.call("due", torch.full, (), bool(due)), tracer)
        reuse = counting.call(f"reuse_{self._role}", torch.logical_and, started, due.node)
        if signal is not None and self._rule.accumulates:
            self._change = counting.call("change", torch.where, reuse, signal.node, 0.0)
            if self._rests is not None:
                self._change = counting.call("change", torch.where, self._rests, self._state["change"], self._change)
        stays = reuse if self._rests is None else counting.call("stays", torch.logical_or, reuse, self._rests)
        self._last = (n, stays)
        return Decided(counting.call(f"compute_{self._role}", torch.logical_not, reuse), stays, state.scalar)

    def _signal(self, started: fx.Node, tracer: Any) -> Any:
        """What the rule has measured, as it counts, `None` where it looks at nothing."""
        if self._rule.signal is None:
            return None
        found = self._rule.weighed(fx.Proxy(self._counting.number(self._rule), tracer))
        return found + fx.Proxy(self.read("change", 0.0, started), tracer) if self._rule.accumulates else found

    def _n(self, call: int) -> fx.Node:
        """The number of a call of the module."""
        n = self._counting.calls
        if self._calls > 1:
            n = self._counting.call("n", torch.mul, n, float(self._calls))
            n = self._counting.call("n", torch.add, n, float(call))
        return n

    def read(self, name: str, start: float, started: fx.Node) -> fx.Node:
        """What is known of the last call that computed; `start` where none has.

        It depends on the step, as far as a compiler can tell: AOTInductor folds what depends on buffers alone, also on
        those that the graph updates (seen in 2.13).
        """
        if name not in self._state:
            buffer = f"{self._name}_{name}"
            self._counting.register(buffer, start)
            held = self._counting.read(buffer)
            self._state[name] = self._counting.call(name, torch.where, started, held, start)
        return self._state[name]

    def counts(self) -> list[tuple[str, fx.Node]]:
        """What is to be known in the next step, of the names that were asked for in this one."""
        n, stays = self._last
        now = {"computed": lambda held: n, "computed_t": lambda held: self._counting.timestep}
        now["filled"] = lambda held: self._counting.call("filled", torch.add, held, 1.0)
        where = [
            (f"{self._name}_{name}", self._counting.call(name, torch.where, stays, held, now[name](held)))
            for name, held in self._state.items()
            if name != "change"
        ]
        return [*where, (f"{self._name}_change", self._change)] if "change" in self._state else where


@dataclass(frozen=True)
class _State:
    """What a call knows of the calls before it; nodes are made when they are asked for."""

    calls: _Calls
    n: fx.Node
    started: fx.Node

    @cached_property
    def distance(self) -> fx.Node:
        """Calls since the last one that computed, 1 where none has."""
        counting = self.calls._counting
        computed = self.calls.read("computed", -1.0, self.started)
        return counting.call("distance", torch.sub, self.n, computed)

    @cached_property
    def filled(self) -> fx.Node:
        """How many calls have computed so far."""
        return self.calls.read("filled", 0.0, self.started)

    @cached_property
    def t(self) -> fx.Node:
        """Timestep of the last call that computed."""
        return self.calls.read("computed_t", NEVER, self.started)

    def scalar(self, name: str) -> fx.Node:
        """One of the `Scalars`."""
        with self.calls._counting.nodes():
            return getattr(self, name)


@dataclass(frozen=True)
class _Progress:
    """`Progress` as a rule sees it in a graph."""

    state: _State
    tracer: Any

    @property
    def age(self) -> fx.Proxy:
        """As `Progress.age`."""
        return fx.Proxy(self.state.distance, self.tracer)

    @property
    def t(self) -> fx.Proxy:
        """As `Progress.t`."""
        return fx.Proxy(self.state.t, self.tracer)


def timestep_name(node: fx.Node) -> str:
    """The bare name of a graph input: "timestep" for Dynamo's `l_timestep_` and `l_kwargs_timestep_`."""
    name = str(node.target).lower()
    return name[2:-1].removeprefix("kwargs_") if name.startswith("l_") and name.endswith("_") else name


def resolution(recorded: Any, at: float) -> float:
    """How far apart two timesteps near `at` have to be for a tensor like the recorded one to tell them apart."""
    is_floating = isinstance(recorded, torch.Tensor) and recorded.dtype.is_floating_point
    return torch.finfo(recorded.dtype).eps * abs(at) if is_floating else 1.0
