"""Sequence parallelism of diffusers and guidance parallelism under PAB: equal to one process, and less to communicate.

The first part is about graphs and needs no processes; see `parallel_ranks` for those.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from pab_fx import PABConfig, effects, rewrite, specialize
from pab_fx.invariants import split_invariants

c10d = torch.ops._c10d_functional
CONFIG = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4)


def collectives(gm: fx.GraphModule) -> list[str]:
    """Names of the collectives and waits in a graph and in the branches of its conditions."""
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
    return [effects.op_name(node) for part in parts for node in part.graph.nodes if effects.is_collective(node)]


def gathered(x: Tensor) -> Tensor:
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "ranks"))


class Attention(nn.Module):
    """Exchanges what it attends to with other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, source: Tensor, exchanges: bool = True) -> Tensor:
        keys = self.to_k(source)
        keys = gathered(keys) if exchanges else keys
        return self.to_out(scaled_dot_product_attention(self.to_q(x), keys, keys))


class Model(nn.Module):
    """Two attentions; what is exchanged where is for its children to say."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()


class Inside(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return gathered(x + self.attn2(x, x))


class Before(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.attn1(x, gathered(x * 2), False)
        return gathered(x + self.attn2(x, gathered(x * 3), False))


class Shared(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        whole = gathered(x * 2)
        x = x + self.attn1(x, whole, False)
        return gathered(x + self.attn2(x, whole, False))


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


ONE = ["all_gather_into_tensor", "wait_tensor"]


@pytest.mark.parametrize("model", [Inside, Before, Shared])
def test_a_graph_that_reuses_has_no_collective_left_but_the_models_own(model: type[Model]) -> None:
    gm = traced(model())
    rewritten = rewrite(gm, CONFIG)
    assert sorted(collectives(rewritten)) == sorted(collectives(gm))
    assert sorted(collectives(specialize(rewritten))) == sorted(collectives(gm))
    roles = {"spatial", "cross"} if model is not Inside else {"spatial"}
    assert collectives(specialize(rewritten, reuse=roles & set(_roles(rewritten)))) == ONE


def _roles(rewritten: fx.GraphModule) -> list[str]:
    return [node.meta["pab_conditional"].role for node in rewritten.graph.nodes if "pab_conditional" in node.meta]


def test_collectives_inside_of_an_attention_stand_in_its_condition() -> None:
    for model in (Inside(), Before()):
        rewritten = rewrite(traced(model), CONFIG)
        outside = [effects.op_name(node) for node in rewritten.graph.nodes if effects.is_collective(node)]
        assert outside == ONE


def test_a_collective_of_two_attentions_goes_when_both_reuse() -> None:
    rewritten = rewrite(traced(Shared()), CONFIG)
    assert len(collectives(specialize(rewritten, reuse={"attn1"}))) == 2 * len(ONE)
    assert len(collectives(specialize(rewritten, reuse={"attn1", "attn2"}))) == len(ONE)


def test_a_collective_that_nobody_reads_stays() -> None:
    """Other ranks take part in it, and may read it."""

    class Unread(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            gathered(x)
            return x + self.attn1(x, x, False)

    rewritten = rewrite(traced(Unread()), CONFIG)
    for decided in (specialize(rewritten), specialize(rewritten, reuse={"spatial"})):
        assert collectives(decided) == ONE


def dead(make: Any) -> tuple[fx.Graph, list[str]]:
    """A graph that yields its input, after what `make` made of that and one user of it have lost their use."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    user = graph.call_function(torch.neg, (make(graph, x),))
    graph.output(x)
    unused = effects.unused(graph) - {user}
    effects.eliminate_dead_code(graph, unused)
    return graph, [effects.op_name(node) for node in graph.nodes if node.op == "call_function"]


def test_collectives_of_several_tensors_go_with_all_of_their_waits() -> None:
    def several(graph: fx.Graph, x: fx.Node) -> fx.Node:
        both = graph.call_function(c10d.all_reduce_coalesced.default, ([x, x], "sum", "ranks"))
        waits = [
            graph.call_function(c10d.wait_tensor.default, (graph.call_function(operator.getitem, (both, i)),))
            for i in range(2)
        ]
        return graph.call_function(torch.add, tuple(waits))

    assert dead(several)[1] == []


def test_a_collective_in_place_stays_with_its_wait() -> None:
    def in_place(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(
            c10d.wait_tensor.default, (graph.call_function(c10d.all_reduce_.default, (x, "sum", "ranks")),)
        )

    assert dead(in_place)[1] == ["all_reduce_", "wait_tensor"]


def test_a_wait_stays_while_its_collective_is_read_otherwise() -> None:
    def read_twice(graph: fx.Graph, x: fx.Node) -> fx.Node:
        whole = graph.call_function(c10d.all_gather_into_tensor.default, (x, 2, "ranks"))
        graph.call_function(torch.ops.aten.copy_.default, (x, whole))
        return graph.call_function(c10d.wait_tensor.default, (whole,))

    assert dead(read_twice)[1] == ["all_gather_into_tensor", "copy_", "wait_tensor"]


def test_no_collective_is_computed_once_a_generation() -> None:
    """Whether a text is the same tensor as in the step before, each rank would find out for itself."""

    def model(x: Tensor, text: Tensor) -> tuple[Tensor]:
        return (x + gathered(text.sin()),)

    gm = fx.symbolic_trace(model)
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.ones(2)
    split = split_invariants(gm, {1})
    assert split is not None
    assert (collectives(split.once), collectives(split.rest)) == ([], ONE)
