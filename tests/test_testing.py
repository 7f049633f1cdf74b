"""The kit itself: it finds every difference, takes what is the same for the same, and its failures can be read."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pab_fx
from pab_fx import PABConfig
from pab_fx.graph import effects
from pab_fx.testing import (
    TRACERS,
    AttentionSpec,
    Clock,
    GraphSpec,
    Hooked,
    Schedule,
    Site,
    TransformerSpec,
    assert_broadcasts_like,
    assert_graphs_equivalent,
    captured,
    graph_difference,
    traced,
)
from pab_fx.testing.small_graphs import STEPS
from pab_fx.testing.strategies import configs, graphs, schedules, timestep_lists, transformers

search = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


pytestmark = pytest.mark.usefixtures("no_gradients")


def symbolic(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def differ(one: Callable[..., Any], other: Callable[..., Any], **options: Any) -> bool:
    return graph_difference(symbolic(one), symbolic(other), **options) is not None


# --------------------------------------------------------------------------------- what is the same stays the same


def conflicts(earlier: fx.Node, later: fx.Node, placed: dict[fx.Node, Any]) -> bool:
    """Whether two nodes may not change places: said of memory by running the graph on real tensors, not by the kit."""
    if earlier in later.all_input_nodes:
        return True
    if effects.draws_random_numbers(earlier) and effects.draws_random_numbers(later):
        return True
    for one, other in ((earlier, later), (later, earlier)):
        written = {placed[target] for target in effects.updated(one)}
        if written & {placed[each] for each in (other, *other.all_input_nodes) if each in placed}:
            return True
    return False


class Placing(fx.Interpreter):
    """Where the value of each node lies."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.placed: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        tensor = found[0] if isinstance(found, tuple) and n.op != "output" else found
        if isinstance(tensor, Tensor):
            self.placed[n] = tensor.untyped_storage().data_ptr()
        return found


def shuffled(gm: fx.GraphModule, spec: GraphSpec, data: st.DataObject) -> fx.GraphModule:
    """The graph with its nodes in another order that the dataflow allows, under other names."""
    placing = Placing(gm)
    try:
        placing.run(*spec.inputs(0))
    except RuntimeError:  # a tensor that is updated by its own transpose
        assume(False)
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    before = {
        node: {earlier for earlier in nodes[:i] if conflicts(earlier, node, placing.placed)}
        for i, node in enumerate(nodes)
    }
    graph, made = fx.Graph(), {}
    for node in gm.graph.find_nodes(op="placeholder"):
        made[node] = graph.placeholder(f"renamed_{node.name}")
    while nodes:
        ready = [node for node in nodes if before[node] <= made.keys()]
        node = data.draw(st.sampled_from(ready), label="next")
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = graph._graph_namespace.create_name(f"renamed_{node.name}", None)
        nodes.remove(node)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], made.__getitem__))
    for node, copied in made.items():
        copied.meta = dict(node.meta)
    return fx.GraphModule(gm, graph)


@settings(search, max_examples=25)
@given(graphs(), st.data())
def test_another_order_and_other_names_are_the_same_graph(spec: GraphSpec, data: st.DataObject) -> None:
    gm = spec.build()
    assert_graphs_equivalent(gm, shuffled(gm, spec, data))
    assert_graphs_equivalent(gm, shuffled(gm, spec, data), dead_code=True)


@settings(search, max_examples=20)
@given(graphs())
def test_a_graph_is_the_same_without_its_dead_code(spec: GraphSpec) -> None:
    gm = spec.build()
    smaller = copy.deepcopy(gm)
    effects.eliminate_dead_code(smaller.graph)
    assert_graphs_equivalent(gm, smaller)


@pytest.mark.parametrize("tracer", TRACERS)
def test_two_traces_of_a_model_are_one_graph(tracer: str) -> None:
    spec = TransformerSpec((AttentionSpec("joint", "softmax"), AttentionSpec("temporal", returns="halves")))
    model = spec.build()
    one, other = (traced(model, tracer, spec.inputs(500, 0)) for _ in range(2))
    assert_graphs_equivalent(one, other)
    of_copy = traced(copy.deepcopy(model), tracer, spec.inputs(500, 0))
    assert_graphs_equivalent(one, of_copy, tensors="value")
    if tracer != "dynamo":  # whose parameters are inputs
        assert graph_difference(one, of_copy) is not None
        assert graph_difference(one, traced(spec.build(seed=1), tracer, spec.inputs(500, 0)), tensors="value")


SAME: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "independent nodes": (lambda x, y: (x.sin(), y.cos()), lambda x, y: (y.cos(), x.sin())[::-1]),
    "names of arguments": (lambda x, y: torch.sum(x, 1), lambda x, y: torch.sum(x, dim=1)),
    "defaults": (lambda x, y: torch.nn.functional.softmax(x, 1), lambda x, y: torch.nn.functional.softmax(x, 1, 3)),
    "names of a method's": (lambda x, y: x.transpose(0, 1), lambda x, y: x.transpose(dim0=0, dim1=1)),
    "sizes": (lambda x, y: torch.permute(x, [1, 0]), lambda x, y: torch.permute(x, (1, 0))),
    "a view taken twice": (lambda x, y: x.t() * x.t(), lambda x, y: (lambda view: view * view)(x.t())),
    "a view before an update": (
        lambda x, y: (lambda a, v: (a.add_(1), v)[1] * 2)(*(lambda a: (a, a.transpose(0, 1)))(x + y)),
        lambda x, y: (lambda a: (a.add_(1), a.transpose(0, 1))[1] * 2)(x + y),
    ),
    "dead code": (lambda x, y: (x.exp(), y)[1] + 1, lambda x, y: y + 1),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME.keys())
def test_what_computes_the_same_is_the_same(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert_graphs_equivalent(symbolic(one), symbolic(other))


def test_dead_code_counts_where_it_is_asked_for() -> None:
    assert differ(*SAME["dead code"], dead_code=True)
    assert differ(lambda x: (x.exp(), x)[1] + 1, lambda x: (x.sin(), x)[1] + 1, dead_code=True)


# ------------------------------------------------------------------------------------------- what differs is found


def updated(x: Tensor) -> Tensor:
    x.add_(1)
    return x


def read_before(x: Tensor, y: Tensor) -> Tensor:
    a = x + y
    b = a * 2
    a.add_(1)
    return a + b


def read_after(x: Tensor, y: Tensor) -> Tensor:
    a = x + y
    a.add_(1)
    b = a * 2
    return a + b


def under_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ y


def beside_autocast(x: Tensor, y: Tensor) -> Tensor:
    product = x @ y
    with torch.autocast("cpu", torch.bfloat16):
        return product


DIFFERENT: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a constant": (lambda x, y: x * 2, lambda x, y: x * 3),
    "the type of a constant": (lambda x, y: x * 2, lambda x, y: x * 2.0),
    "the sign of zero": (lambda x, y: x * 0.0, lambda x, y: x * -0.0),
    "order of operands": (lambda x, y: x - y, lambda x, y: y - x),
    "a target": (lambda x, y: x + y, lambda x, y: x * y),
    "a default that is not": (lambda x, y: torch.sum(x, 1), lambda x, y: torch.sum(x, 1, True)),
    "lists and tuples that index": (lambda x, y: x[[0, 1]], lambda x, y: x[(0, 1)]),
    "outputs": (lambda x, y: (x, y), lambda x, y: (y, x)),
    "a list of outputs": (lambda x, y: [x, y], lambda x, y: (x, y)),
    "a further input": (lambda x: x + 1, lambda x, y: x + 1),
    "computed twice": (lambda x, y: x.sin() + x.sin(), lambda x, y: (lambda sin: sin + sin)(x.sin())),
    "outputs that share memory": (
        lambda x, y: (lambda z: (z, z))(x + y),
        lambda x, y: (lambda z: (z, z.clone()))(x + y),
    ),
    "an update of an input": (updated, lambda x: x.add(1)),
    "a dropped update": (lambda x, y: (x.mul_(2), y)[1], lambda x, y: y),
    "a read after an update": (read_before, read_after),
    "random numbers": (
        lambda x, y: (torch.rand_like(x), torch.randn_like(y)),
        lambda x, y: (torch.randn_like(y), torch.rand_like(x))[::-1],
    ),
    "random numbers that nobody reads": (lambda x, y: (torch.rand_like(x), y)[1], lambda x, y: y),
    "assertions": (lambda x, y: (torch._assert(x, "x"), y)[1], lambda x, y: y),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_computes_something_else_differs(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert differ(one, other)


def test_what_is_under_autocast_differs() -> None:
    inputs = torch.ones(2, 2), torch.ones(2, 2)

    class Model(nn.Module):
        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.function(x, y)

    under, beside = (captured(Model(each), inputs)[0] for each in (under_autocast, beside_autocast))
    assert_graphs_equivalent(under, captured(Model(under_autocast), inputs)[0])
    assert "inside %_enter_autocast" in (graph_difference(under, beside) or "")


CHANGES = ("constant", "operands", "target", "drop", "move")


def mutated(gm: fx.GraphModule, spec: GraphSpec, change: str, data: st.DataObject) -> fx.GraphModule:
    """The graph with one thing changed that decides what it computes."""
    result = copy.deepcopy(gm)
    calls = [node for node in result.graph.nodes if node.op.startswith("call_")]
    if change == "constant":
        found = [node for node in calls if node.target == "mul_" and 0.5 in node.args]
    elif change == "operands":
        found = [node for node in calls if node.target in (torch.sub, torch.matmul) and node.args[0] != node.args[1]]
    elif change == "target":
        found = [node for node in calls if node.target in ("sin", "relu", "tanh")]
    else:
        found = [node for node in calls if effects.updated(node) and effects.updated(node)[0].op == "placeholder"]
    assume(found)
    node = data.draw(st.sampled_from(found))
    if change == "constant":
        node.args = tuple(0.25 if each == 0.5 else each for each in node.args)
    elif change == "operands":
        node.args = node.args[::-1]
    elif change == "target":
        node.target = "cos"
    elif change == "drop":
        node.replace_all_uses_with(node.args[0])
        result.graph.erase_node(node)
    else:  # to the end: over what reads it
        readers = [each for each in calls if (each > node and effects.may_alias(each, node)) or node in each.users]
        assume(readers and not node.users)
        result.graph.output_node().prepend(node)
    result.recompile()
    return result


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_what_a_graph_yields_is_found(change: str) -> None:
    """Whether a change matters is said by running both: then they differ, by name."""
    found = 0

    @settings(search, max_examples=20)
    @given(graphs(), st.data())
    def check(spec: GraphSpec, data: st.DataObject) -> None:
        nonlocal found
        gm = spec.build()
        other = mutated(gm, spec, change, data)
        outputs = []
        for each in (gm, other):
            given_ = spec.inputs(0)
            torch.manual_seed(0)
            try:
                outputs.append([*each(*given_), *given_])
            except RuntimeError:
                assume(False)
        if not all(map(torch.equal, *outputs)):
            found += 1
            difference = graph_difference(gm, other)
            assert difference is not None
            assert "differ first in " in difference

    check()
    assert found > 3


def test_branches_of_conditions_are_compared() -> None:
    def conditional(factor: float, first: str = "x") -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder(first)
        branches = {"yes": symbolic(lambda x: (x * factor,)), "no": symbolic(lambda x: (x + 1,))}
        operands = (graph.get_attr("yes"), graph.get_attr("no"), (x,))
        graph.output(graph.call_function(torch.ops.higher_order.cond, (True, *operands)))
        return fx.GraphModule(branches, graph)

    assert_graphs_equivalent(conditional(2.0), conditional(2.0, "other"))
    found = graph_difference(conditional(2.0), conditional(3.0))
    assert found is not None
    assert found.startswith("the graphs differ first in %mul of one and %mul of the other")


def test_sizes_of_a_dynamic_graph_are_those_of_its_inputs() -> None:
    def graph(function: Callable[..., Any]) -> fx.GraphModule:
        torch.compiler.reset()
        found: list[fx.GraphModule] = []
        compiled = torch.compile(function, backend=lambda gm, _: found.append(gm) or gm.forward, dynamic=True)
        compiled(torch.ones(3, 5), torch.ones(5, 7))
        return found[0]

    def rows(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y) * x.shape[0]

    def rows_again(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right) * left.shape[0]

    def columns(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y) * y.shape[1]

    assert_graphs_equivalent(graph(rows), graph(rows_again))
    assert graph_difference(graph(rows), graph(columns)) is not None


def test_a_module_that_is_called_after_its_weight_was_updated_differs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.first = True

        def forward(self, x: Tensor) -> Tensor:
            if self.first:
                self.linear.weight.add_(1)
            y = self.linear(x)
            if not self.first:
                self.linear.weight.add_(1)
            return y

    model = Model()
    one = symbolic(model)
    model.first = False
    assert graph_difference(one, symbolic(model)) is not None


def test_private_buffers_are_nobodys_business() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(x.sum())
            return x * 2

    counting, plain = symbolic(Counting()), symbolic(lambda x: x * 2)
    assert "is left as %add_ has it" in (graph_difference(counting, plain) or "")
    assert_graphs_equivalent(counting, plain, private="^calls$")


def test_a_graph_of_5000_nodes_is_compared_in_seconds() -> None:
    class Deep(nn.Module):
        def __init__(self, odd: float) -> None:
            super().__init__()
            self.linear, self.odd = nn.Linear(2, 2), odd

        def forward(self, x: Tensor) -> Tensor:
            for i in range(1250):
                x = self.linear(x).relu() * (self.odd if i == 700 else 2.0) + 1
            return x

    deep = Deep(2.0)
    one = symbolic(deep)
    deep.odd = 3.0
    other = symbolic(deep)
    assert len(one.graph.nodes) > 5000
    start = time.process_time()
    assert graph_difference(one, one) is None
    found = graph_difference(one, other)
    assert time.process_time() - start < 20
    assert found is not None
    assert len(found.splitlines()) < 15


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(TypeError, match="trace the model first"):
        assert_graphs_equivalent(nn.Linear(1, 1), nn.Linear(1, 1))  # type: ignore[arg-type]
    program = torch.export.export(nn.Linear(1, 1), (torch.ones(1),))
    with pytest.raises(TypeError, match=r"got ExportedProgram: pass its module\(\)"):
        assert_graphs_equivalent(program, program)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'identity' or 'value'"):
        assert_graphs_equivalent(symbolic(lambda x: x), symbolic(lambda x: x), tensors="name")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- broadcasts

SPEC = TransformerSpec((AttentionSpec("self"), AttentionSpec("cross")), ((Site(0), Site(1)),))
SCHEDULE = Schedule(ranges=(2, None, None))


def check(config: Any, reference: Any = None, spec: TransformerSpec = SPEC, **options: Any) -> Any:
    given_ = {"inputs": spec.inputs, "generations": SCHEDULE.generations, **options}
    return assert_broadcasts_like(spec.build(), config, reference, **given_)


@pytest.mark.parametrize("given_", [(), ((),), (900, 700), 900])
def test_generations_that_are_none_are_refused(given_: Any) -> None:
    with pytest.raises(ValueError, match=r"generations must be the timesteps of each, .* got"):
        check(SCHEDULE.config(), generations=given_)


def test_a_wrong_schedule_is_shown_and_its_repro_fails_in_the_same_way() -> None:
    with pytest.raises(AssertionError) as failure:
        check(SCHEDULE.config(), Schedule(ranges=(3, None, None)).config())
    said = str(failure.value)
    assert said.startswith("generation 0, step 2 (timestep 600): output 0 [2, 12, 4]: ")
    assert "spatial              C R C R C C | C R C\n" in said
    assert "spatial   reference  C R R C R C | C R R\n" in said
    assert "\n                         ^\n" in said
    headline, code = said.split("\n")[0], said.split("To reproduce:\n")[1]
    assert "generations=[(900, 700, 600)]" in code
    with pytest.raises(AssertionError) as again:
        exec(code, {})
    assert str(again.value).split("\n")[0] == headline


def test_reuse_that_changes_no_output_is_found_too() -> None:
    """An attention whose output nobody uses: bitwise equal, and yet not reused when the hooks reuse it."""
    config = SCHEDULE.config()
    with pytest.raises(AssertionError, match="the reference: "):
        check(config, Schedule(ranges=(3, None, None), windows=((0, 1001),) * 3).config(), tolerance=10.0)


def test_a_comparison_that_shows_nothing_fails() -> None:
    never = Schedule(ranges=(1, None, None))
    with pytest.raises(AssertionError, match=r"no attention was reused.*reuses=False"):
        check(never.config())
    with pytest.raises(AssertionError, match=r"same outputs.*changes=False"):
        check(never.config(), reuses=False)
    check(never.config(), reuses=False, changes=False)


def test_every_context_has_a_reference_of_its_own() -> None:
    found = check(SCHEDULE.config(), contexts=("cond", "uncond"))
    assert {step.context for step in found.steps} == {"cond", "uncond"}
    assert found.backend.report().reused == 6


def test_updates_of_inputs_are_compared() -> None:
    class Updating(nn.Module):
        def __init__(self, updates: bool) -> None:
            super().__init__()
            self.model, self.updates = SPEC.build(), updates

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
            if self.updates:
                encoder_hidden_states.mul_(1.0)
                encoder_hidden_states[0] = 0.0
            return self.model(hidden_states, encoder_hidden_states * 1, timestep)[0] * 0 + 1

    given_ = {"inputs": SPEC.inputs, "generations": [(900, 700)], "reuses": False, "changes": False}
    with pytest.raises(AssertionError, match=r"step 0 .*input 1 \[2, 5, 6\]"):
        assert_broadcasts_like(Updating(True), PABConfig(), Updating(False), **given_)


def test_a_config_of_ones_own_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="reference=PyramidAttentionBroadcastConfig"):
        check(PABConfig())


def test_a_model_of_ones_own_is_named_in_the_repro() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SPEC.build()

        def forward(self, *inputs: Tensor) -> Any:
            return self.model(*inputs)

    with pytest.raises(AssertionError) as failure:
        assert_broadcasts_like(
            Wrapped(),
            SCHEDULE.config(),
            SPEC.build(seed=1),
            inputs=SPEC.inputs,
            generations=[(900,)],
            repro="model, inputs = mine(), its",
        )
    assert "model, inputs = mine(), its" in str(failure.value)


# ---------------------------------------------------------------------------------------------------- strategies


@settings(search, max_examples=15)
@given(transformers(breaks=True), schedules(), configs(), graphs())
def test_what_is_drawn_prints_as_python_that_makes_it(
    spec: TransformerSpec, schedule: Schedule, config: PABConfig, graph: GraphSpec
) -> None:
    for each in (spec, schedule, config, graph):
        assert eval(repr(each), {**vars(pab_fx), **vars(pab_fx.testing)}) == each


@settings(search, max_examples=30)
@given(timestep_lists(), timestep_lists(restarts=True), schedules())
def test_timesteps_rise_only_where_that_is_allowed(
    one: tuple[float, ...], other: tuple[float, ...], schedule: Schedule
) -> None:
    for timesteps in (one, *schedule.generations):
        assert list(timesteps) == sorted(timesteps, reverse=True)
    rises = sum(after > before for before, after in pairwise(other))
    assert rises <= 1


def test_every_step_of_a_small_graph_can_be_built() -> None:
    for name in STEPS:
        gm = GraphSpec(((name, 1, 2),), (0, 1)).build()
        assert [tuple(each.shape) for each in gm(*GraphSpec().inputs(0))] == [(4, 4)] * 2


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "pab_fx.testing.strategies")
    with pytest.raises(ImportError, match=r"pip install 'pab-fx\[testing\]'"):
        importlib.import_module("pab_fx.testing.strategies")


def test_hooks_are_counted_by_role() -> None:
    hooked = Hooked(SPEC.build(), Schedule(ranges=(2, None, 3)).config(Clock(500)))
    for _ in range(2):
        hooked(*SPEC.inputs(500, 0))
    assert +hooked.counts == {("spatial", False): 1, ("spatial", True): 1, ("cross", False): 1, ("cross", True): 1}


@pytest.mark.parametrize("name", [info.name for info in pkgutil.iter_modules(pab_fx.testing.__path__)])
def test_examples_in_docstrings_run(name: str) -> None:
    with torch.enable_grad():
        module = importlib.import_module(f"pab_fx.testing.{name}")
        assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
