"""Other compile passes, before and after the rewrite and inside of Inductor, and PAB beside other compilers."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization
from torch.fx.subgraph_rewriter import replace_pattern
from torch.nn import functional as F

import pab_fx
from pab_fx import PABBackend, PABConfig, effects, rewrite
from pab_fx.dataflow import op_name

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
RANGES = {
    "spatial_attention_block_skip_range": 2,
    "temporal_attention_block_skip_range": 3,
    "cross_attention_block_skip_range": 4,
}
MODELS = ("LatteTransformer3DModel", "WanTransformer3DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------- passes


def fuse_projections(gm: fx.GraphModule) -> fx.GraphModule:
    """One product in place of several linear layers of the same tensor: queries, keys and values."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if op_name(node) == "linear" and node.op == "call_function" and not node.kwargs:
            source, weight, *bias = node.args
            if weight.op == "placeholder":
                groups.setdefault((source, len([b for b in bias if b is not None])), []).append(node)
    for (source, biases), nodes in groups.items():
        if len(nodes) < 2 or len({node.args[1].meta["example_value"].shape[1] for node in nodes}) > 1:
            continue
        sizes = [node.args[1].meta["example_value"].shape[0] for node in nodes]
        with gm.graph.inserting_before(nodes[0]):
            weight = gm.graph.call_function(torch.cat, ([node.args[1] for node in nodes],))
            bias = gm.graph.call_function(torch.cat, ([node.args[2] for node in nodes],)) if biases else None
            whole = gm.graph.call_function(F.linear, (source, weight, bias))
            parts = gm.graph.call_method("split", (whole, sizes, -1))
            items = [gm.graph.call_function(operator.getitem, (parts, i)) for i in range(len(nodes))]
        for node, item in zip(nodes, items, strict=True):
            node.replace_all_uses_with(item)
            gm.graph.erase_node(node)
    return gm


def tanh_gelu(gm: fx.GraphModule) -> fx.GraphModule:
    """A pattern of torch.fx: another gelu."""
    replace_pattern(gm, lambda x: F.silu(x), lambda x: x * torch.sigmoid(x))
    return gm


def scale_outputs(gm: fx.GraphModule) -> fx.GraphModule:
    """Scales what every attention yields: a node inside of each, which changes what is kept."""
    for node in list(gm.graph.nodes):
        if "scaled_dot_product_attention" in op_name(node):
            with gm.graph.inserting_after(node):
                scaled = gm.graph.call_function(torch.mul, (node, 0.5))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)  # noqa: B023
    return gm


def remove_dropouts(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph that is traced anew, node by node, by an `fx.Transformer`."""

    class Remover(fx.Transformer):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return args[0] if target is F.dropout else super().call_function(target, args, kwargs)

    return Remover(gm).transform()


def nothing(gm: fx.GraphModule) -> fx.GraphModule:
    return gm


PASSES = (fuse_projections, tanh_gelu, scale_outputs, remove_dropouts)


def generation(name: str, backend: Callable[[zoo.Clock], Any] | None) -> tuple[list[Tensor], Any]:
    """The output of each step of a model of the zoo, and the backend that it was compiled with."""
    torch.compiler.reset()
    entry, clock, outputs = zoo.BY_NAME[name], zoo.Clock(), []
    made = None if backend is None else backend(clock)
    model = entry.build() if made is None else torch.compile(entry.build(), backend=made)
    for step, t in enumerate(TIMESTEPS):
        clock.t = t
        outputs.append(zoo.call(entry, model, t, step)[0].clone())
    return outputs, made


def with_passes(name: str, passes: Sequence[Any], **options: Any) -> tuple[list[Tensor], PABBackend]:
    given = {"inner": "eager", "timesteps": TIMESTEPS, "passes": passes, **options}
    return generation(name, lambda clock: PABBackend(PABConfig(**RANGES, current_timestep_callback=clock), **given))


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("each", PASSES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_before_the_rewrite_equals_the_same_pass_after_it(name: str, each: Any, lowering: str) -> None:
    before, first = with_passes(name, [each], lowering=lowering)
    after, second = with_passes(name, [rewrite, each], lowering=lowering)
    assert all(map(torch.equal, before, after))
    assert first.report().reused == second.report().reused > 0
