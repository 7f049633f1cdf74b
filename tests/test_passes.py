"""Other compile passes, before and after the rewrite and inside of Inductor, and PAB beside other compilers."""

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import test_rewrite
import torch
import zoo
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import optimization
from torch.fx.subgraph_rewriter import replace_pattern
from torch.nn import functional as F

import pab_fx
from pab_fx import PABBackend, PABConfig, rewrite
from pab_fx.graph.dataflow import op_name

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
RANGES = {
    "spatial_attention_block_skip_range": 2,
    "temporal_attention_block_skip_range": 3,
    "cross_attention_block_skip_range": 4,
}
MODELS = ("LatteTransformer3DModel", "WanTransformer3DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel")


pytestmark = pytest.mark.usefixtures("no_gradients")


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


def text_first(gm: fx.GraphModule) -> fx.GraphModule:
    """What depends on the text alone comes first: one of the last attentions has the first node then."""
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    moved = set(gm.graph.find_nodes(op="placeholder"))
    moved -= {node for node in moved if "hidden_states" in node.name and "encoder" not in node.name}
    for node in list(gm.graph.nodes):
        if (
            node.op in ("call_function", "call_method")
            and node.all_input_nodes
            and moved.issuperset(node.all_input_nodes)
        ):
            first.prepend(node)
            moved.add(node)
    gm.graph.lint()
    return gm


def nothing(gm: fx.GraphModule) -> fx.GraphModule:
    return gm


PASSES = (fuse_projections, tanh_gelu, scale_outputs, remove_dropouts, text_first)


def generation(name: str, backend: Callable[[zoo.Clock], Any] | None) -> tuple[list[Tensor], Any]:
    """The output of each step of a model of the zoo, and the backend that it was compiled with."""
    torch.compiler.reset()
    entry, clock, outputs = zoo.BY_NAME[name], zoo.Clock(), []
    entry = entry.of_one_block()
    made = None if backend is None else backend(clock)
    model = entry.build() if made is None else torch.compile(entry.build(), backend=made)
    for step, t in enumerate(TIMESTEPS):
        clock.t = t
        outputs.append(zoo.call(entry, model, t, step)[0].clone())
    return outputs, made


def with_passes(name: str, passes: Sequence[Any], **options: Any) -> tuple[list[Tensor], PABBackend]:
    given = {"inner": "eager", "timesteps": TIMESTEPS, "passes": passes, **options}
    return generation(name, lambda clock: PABBackend(PABConfig(**RANGES, current_timestep_callback=clock), **given))


@cache
def without_passes(name: str, lowering: str) -> tuple[list[Tensor], int]:
    """The output of each step without passes, and how often attentions reused."""
    outputs, backend = with_passes(name, [], lowering=lowering)
    return outputs, backend.report().reused


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in L2."""
    return float((found - expected).norm() / expected.norm())


def heavy_but(*light: str) -> list[Any]:
    """All models; those that are not listed in the slow sweep only."""
    return [name if name in light else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


# ------------------------------------------------------------------------------------ before and after


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
@pytest.mark.parametrize("each", PASSES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", heavy_but("LatteTransformer3DModel"))
def test_a_pass_before_the_rewrite_equals_the_same_pass_after_it(name: str, each: Any, lowering: str) -> None:
    changed: list[bool] = []

    def noted(gm: fx.GraphModule) -> fx.GraphModule:
        before = str(gm.graph)
        result = each(gm)
        changed.append(str(result.graph) != before)
        return result

    before, first = with_passes(name, [noted], lowering=lowering)
    after, second = with_passes(name, [rewrite, noted], lowering=lowering)
    assert all(map(torch.equal, before, after))
    assert first.report().reused == second.report().reused > 0
    assert any(changed) or each is remove_dropouts


@pytest.mark.parametrize(
    "options",
    [
        {"lowering": "cond"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"regional": True}, marks=pytest.mark.slow),
        pytest.param({"cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fused_projections_reuse_what_the_separate_ones_do(options: dict[str, Any]) -> None:
    """A sum of the same products in another order: equal to float32's rounding."""
    name = "LatteTransformer3DModel"
    expected, plain = with_passes(name, [], **options)
    for passes in ([fuse_projections], [rewrite, fuse_projections]):
        found, backend = with_passes(name, passes, **options)
        assert backend.report().reused == plain.report().reused > 0
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        roles = {(region.name, region.role) for region in backend.report().regions}
        assert roles == {(region.name, region.role) for region in plain.report().regions}


def test_a_fused_projection_goes_with_the_attention_that_it_feeds() -> None:
    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    with_passes("LatteTransformer3DModel", [fuse_projections], inner=inner, timesteps=None, step_invariants=False)
    fused = [sum(node.target is torch.cat and len(node.args[0]) == 3 for node in gm.graph.nodes) for gm in graphs]
    assert fused[0] > min(fused[1:])


def test_passes_run_in_their_order_around_the_rewrite() -> None:
    seen: list[tuple[str, bool]] = []

    def named(name: str) -> Callable[[fx.GraphModule], fx.GraphModule]:
        def run(gm: fx.GraphModule) -> fx.GraphModule:
            is_lowered = any(str(node.target).startswith("pab_") for node in gm.graph.nodes)
            seen.append((name, is_lowered))
            return gm

        return run

    first, second, third, fourth = map(named, ("first", "second", "third", "fourth"))
    with_passes("WanTransformer3DModel", [first, second, rewrite, third, fourth], step_invariants=False)
    names = [name for name, _ in seen]
    assert names[:4] == ["first", "second", "third", "fourth"]
    assert set(names[4:]) == {"third", "fourth"}
    assert ("third", True) in seen
    assert ("first", True) not in seen


@pytest.mark.parametrize("declared", [False, True])
def test_a_call_that_nobody_reads_stays_behind_the_rewrite_or_where_it_is_declared(
    declared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fx.node, "_side_effectful_functions", set(fx.node._side_effectful_functions))
    calls: list[bool] = []

    def log(x: Tensor) -> None:
        if not isinstance(x, FakeTensor):  # on which its value is recorded
            calls.append(True)

    if declared:
        fx.node.has_side_effect(log)

    def logs(gm: fx.GraphModule) -> fx.GraphModule:
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(log, (gm.graph.find_nodes(op="placeholder")[0],))
        return gm

    with_passes("LatteTransformer3DModel", [logs])
    assert len(calls) == (len(TIMESTEPS) if declared else 0)
    calls.clear()
    with_passes("LatteTransformer3DModel", [rewrite, logs], step_invariants=False)
    assert len(calls) == len(TIMESTEPS)


def test_enable_and_options_take_passes_around_the_rewrite() -> None:
    entry, ran = zoo.BY_NAME["WanTransformer3DModel"], []
    after = lambda gm: ran.append(gm) or gm  # noqa: E731
    model = entry.build()
    with pab_fx.enable(model, PABConfig(**RANGES), inner="eager", passes=[rewrite, after]) as pab:
        for step, t in enumerate(TIMESTEPS):
            zoo.call(entry, model, t, step)
        assert pab.report().reused > 0
    assert len(ran) > 1


# ------------------------------------------------------------------------------------------- refusals


def hide_attentions(gm: fx.GraphModule) -> fx.GraphModule:
    """Puts every attention into a function that tells nothing of it."""

    def opaque(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **kwargs)

    for node in gm.graph.nodes:
        if "scaled_dot_product_attention" in op_name(node):
            node.target = opaque
    return gm


def drops_an_output(gm: fx.GraphModule) -> fx.GraphModule:
    output = gm.graph.output_node()
    output.args = (output.args[0][1:],)
    return gm


def adds_an_input(gm: fx.GraphModule) -> fx.GraphModule:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("another")
    return gm


def breaks_the_order(gm: fx.GraphModule) -> fx.GraphModule:
    first = next(node for node in gm.graph.nodes if node.op.startswith("call") and node.users)
    next(iter(first.users)).append(first)
    return gm


@lowerings
def test_a_pass_that_hides_attentions_runs_after_the_rewrite_or_is_refused(lowering: str) -> None:
    name = "WanTransformer3DModel"
    refused = r"after the pass hide_attentions, PAB does not recognise blocks\.0\.attn1"
    with pytest.raises(Exception, match=refused) as error:
        with_passes(name, [hide_attentions], lowering=lowering)
    assert "passes=[pab_fx.rewrite, hide_attentions]" in str(error.value)
    expected, reused = without_passes(name, lowering)
    found, backend = with_passes(name, [rewrite, hide_attentions], lowering=lowering)
    assert all(map(torch.equal, expected, found))
    assert backend.report().reused == reused > 0


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("each", "message"),
    [
        (drops_an_output, r"the pass drops_an_output leaves a graph with \d+ outputs in place of \d+"),
        (adds_an_input, r"the pass adds_an_input leaves a graph with \d+ inputs in place of \d+"),
        (breaks_the_order, r"the pass breaks_the_order leaves a graph that is not well formed"),
        (lambda gm: None, r"the pass <lambda> must return a GraphModule, got None"),
    ],
)
def test_a_pass_that_corrupts_the_graph_is_refused_by_name(each: Any, message: str, where: str) -> None:
    with pytest.raises(Exception, match=message):
        with_passes("WanTransformer3DModel", [each] if where == "before" else [rewrite, each])


def test_the_rewrite_is_listed_once() -> None:
    with pytest.raises(ValueError, match=r"passes has pab_fx.rewrite twice"):
        PABBackend(passes=[rewrite, rewrite])


@pytest.mark.parametrize("given", ["rewrite", {"a": 1}])
def test_what_is_no_list_of_passes_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"passes must be a list of functions gm -> gm, got"):
        PABBackend(passes=given)


def test_a_pass_that_raises_is_named() -> None:
    def fails(gm: fx.GraphModule) -> fx.GraphModule:
        raise KeyError("weights")

    with pytest.raises(Exception, match=r"the pass fails raised KeyError: 'weights'"):
        with_passes("WanTransformer3DModel", [fails])


# ------------------------------------------------------------------------------ torch.fx's own passes


class Folding(nn.Module):
    """An attention behind a convolution with batch norm and dropout, as `torch.fx.experimental.optimization` folds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.drop = nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.drop(self.norm(self.embed(hidden_states))).flatten(2).transpose(1, 2) + timestep / 1000
        query, key, value = self.to_qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return x + self.to_out(F.scaled_dot_product_attention(query, key, value).squeeze(1))


def folding() -> Folding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Folding()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


def run(model: Callable[..., Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [model(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor(float(t))) for t in TIMESTEPS]


def test_convolutions_folded_by_torch_fx_before_or_after_the_rewrite() -> None:
    """Folding rounds once where the two layers rounded twice."""
    config = PABConfig(spatial_attention_block_skip_range=2)
    expected = run(rewrite(fx.symbolic_trace(folding()), config))
    before = rewrite(optimization.remove_dropout(optimization.fuse(folding())), config)
    rewritten = rewrite(fx.symbolic_trace(folding()), config)
    after = optimization.fuse(rewritten, no_trace=True)
    for gm in (before, after):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in gm.modules())
        found = run(gm)
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert not all(map(torch.equal, expected, run(folding())))


# ------------------------------------------------------------------------------------- inside of Inductor


@pytest.mark.slow
@lowerings
def test_inductors_own_extension_points_run_under_pab(lowering: str) -> None:
    from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_graph_pattern

    seen, replaced = [], []
    patterns = PatternMatcherPass()

    @register_graph_pattern(CallFunction(torch.ops.aten.silu.default, Arg()), pass_dict=patterns)
    def _(match: Any, x: fx.Node) -> None:
        replaced.append(x)
        match.replace_by_example(lambda x: x * torch.ops.aten.sigmoid.default(x), [x])

    def noting(name: str) -> Callable[[fx.Graph], None]:
        return lambda graph: seen.append(name)

    options = {
        "pre_grad_custom_pass": noting("pre_grad"),
        "joint_custom_pre_pass": noting("joint_pre"),
        "joint_custom_post_pass": noting("joint_post"),
        "post_grad_custom_pre_pass": lambda graph: seen.append("post_grad_pre") or patterns.apply(graph),
        "post_grad_custom_post_pass": noting("post_grad_post"),
    }
    name = "WanTransformer3DModel"
    expected, plain = with_passes(name, [], lowering=lowering)
    found, backend = with_passes(name, [], inner="inductor", options=options, lowering=lowering)
    assert backend.report().reused == plain.report().reused > 0
    assert {"pre_grad", "post_grad_pre", "post_grad_post"} <= set(seen)
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)  # as other kernels round


# ------------------------------------------------------------------------------------- other compilers

INNERS = [
    "eager",
    pytest.param("aot_eager_decomp_partition", marks=pytest.mark.slow),
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
    pytest.param(
        "cudagraphs",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
    ),
]


@lowerings
@pytest.mark.parametrize("inner", INNERS)
def test_other_compilers_compile_what_pab_leaves_of_a_graph(inner: str, lowering: str) -> None:
    name = "WanTransformer3DModel"
    expected, reused = without_passes(name, lowering)
    found, backend = with_passes(name, [], inner=inner, lowering=lowering)
    assert backend.report().reused == reused > 0
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)  # decomposed, operations round differently


@pytest.mark.slow
@lowerings
def test_openvino_compiles_what_pab_leaves_of_a_graph(lowering: str) -> None:
    """A model of the tests' own: of diffusers' (2026.4 with torch 2.13) it compiles none, with or without PAB.

    Within bfloat16's rounding, in which it computes where a CPU has it.
    """
    pytest.importorskip("openvino.torch", reason="pip install openvino")
    model = test_rewrite.build()
    backend = PABBackend(test_rewrite.CONFIG, inner="openvino", lowering=lowering)
    found = test_rewrite.run(torch.compile(model, backend=backend), TIMESTEPS)
    assert backend.report().reused > 0
    expected, plain = test_rewrite.hooked(model, TIMESTEPS), test_rewrite.run(model, TIMESTEPS)
    assert max(map(distance, found, expected)) < 2**-5 < max(map(distance, found, plain))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_inductors_modes_compile_what_pab_leaves_of_a_graph(mode: str) -> None:
    name = "WanTransformer3DModel"
    expected, reused = without_passes(name, "specialize")
    found, backend = with_passes(name, [], inner="inductor", mode=mode)
    assert backend.report().reused == reused > 0
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- pab inside of another backend


@lowerings
def test_pab_is_the_inner_compiler_of_another_backend(lowering: str) -> None:
    name, graphs = "WanTransformer3DModel", []

    def around(clock: zoo.Clock) -> Any:
        pab = PABBackend(PABConfig(**RANGES, current_timestep_callback=clock), inner="eager", lowering=lowering)

        def outer(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            graphs.append(pab)
            return pab(fuse_projections(gm), example_inputs)

        return outer

    expected, plain = with_passes(name, [fuse_projections], lowering=lowering, timesteps=None)
    found, _ = generation(name, around)
    assert all(map(torch.equal, expected, found))
    assert graphs[0].report().reused == plain.report().reused > 0


@lowerings
def test_pab_compiles_what_aot_autograd_hands_it(lowering: str) -> None:
    from torch._dynamo.backends.common import aot_autograd

    name, backends = "WanTransformer3DModel", []

    def around(clock: zoo.Clock) -> Any:
        config = PABConfig(**RANGES, current_timestep_callback=clock)
        backends.append(PABBackend(config, inner="eager", lowering=lowering))
        return aot_autograd(fw_compiler=backends[0])

    expected, reused = without_passes(name, lowering)
    found, _ = generation(name, around)
    assert backends[0].report().reused == reused > 0
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)  # decomposed, operations round differently


@pytest.mark.slow
@lowerings
def test_inductor_folds_parameters_under_pab(lowering: str) -> None:
    """`freezing` makes constants of parameters and folds what is computed of them alone."""
    expected, _ = with_passes("LatteTransformer3DModel", [], inner="inductor", lowering=lowering)
    found, backend = with_passes(
        "LatteTransformer3DModel", [], inner="inductor", lowering=lowering, options={"freezing": True}
    )
    assert backend.report().reused > 0
    assert max(map(distance, found, expected)) < 1e-5
