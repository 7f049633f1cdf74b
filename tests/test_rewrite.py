"""Rewritten and specialized graphs: what they compute, what they print, what they refuse; the backend's graphs."""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import zoo
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from pab_fx import MLPBroadcast, PABBackend, PABConfig, rewrite, specialize
from pab_fx.graph import effects
from pab_fx.passes.form import Predicate, Slot, inputs_of
from pab_fx.select.bounds import UPDATED_LATER
from pab_fx.select.region import Region
from pab_fx.select.tag import tag
from pab_fx.testing import assert_graphs_equivalent

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
RANGES = (2, 3, 4)
CONFIG = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4)
Model = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("no_gradients")


# ------------------------------------------------------------------------------------------------- models


class Attention(nn.Module, AttentionModuleMixin):
    """What diffusers' hooks take for an attention: of `x` to itself, or to `text` where that has a width."""

    def __init__(self, width: int, text_width: int | None = None) -> None:
        super().__init__()
        self.is_cross_attention = text_width is not None
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(text_width or width, width)
        self.to_v = nn.Linear(text_width or width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        source = x if text is None else text
        return self.to_out(scaled_dot_product_attention(self.to_q(x), self.to_k(source), self.to_v(source)))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward on a residual stream, each after its norm."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(8) for _ in range(3))
        self.attn1 = Attention(8)
        self.attn2 = Attention(8, 6)
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if self.in_place:
            x.copy_(x + self.attn1(self.norm1(x)))
            x.copy_(x + self.attn2(self.norm2(x), text))
            x.copy_(x + self.ff(self.norm3(x)))
            return x
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Blocks, called in a given order, on tokens that know the timestep."""

    def __init__(self, order: Sequence[int] = (0, 1), in_place: bool = False) -> None:
        super().__init__()
        self.order = tuple(order)
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(max(order) + 1))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + torch.sin(timestep)[:, None, None]
        for index in self.order:
            x = self.blocks[index](x, encoder_hidden_states)
        return x


class WithoutAttention(nn.Module):
    """A perceptron with an update in place, and no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = self.ff(hidden_states)
        y.add_(hidden_states)
        return y


class Timeless(nn.Module):
    """An attention in a model without a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn(hidden_states)


def build(order: Sequence[int] = (0, 1), in_place: bool = False) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(order, in_place).eval().requires_grad_(False)
        zoo.redraw_(model)
    return model


def inputs(t: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = zoo.Draw(seed)
    return draw.noise(2, 5, 8), draw.noise(2, 3, 6), torch.full((2,), float(t))


def run(model: Model, timesteps: Iterable[float], clock: zoo.Clock | None = None, first: int = 0) -> list[Tensor]:
    """The output of each step; steps have inputs of their own and set the clock."""
    outputs = []
    for step, t in enumerate(timesteps, first):
        if clock is not None:
            clock.t = t
        output = model(*inputs(t, step))
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())
    return outputs


def hooked(model: nn.Module, timesteps: Iterable[float], first: int = 0) -> list[Tensor]:
    """What diffusers' hooks make of one generation."""
    clock = zoo.Clock()
    return run(zoo.hooked(model, zoo.diffusers_config(clock, RANGES)), timesteps, clock, first)


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


# ------------------------------------------------------------------------------------------------ tracers


def symbolic(model: nn.Module, change: Callable[[fx.GraphModule], fx.GraphModule]) -> Model:
    return change(fx.symbolic_trace(model))


def exported(model: nn.Module, change: Callable[[fx.GraphModule], fx.GraphModule]) -> Model:
    return change(torch.export.export(model, inputs(500, 0)).module())


def dynamo(model: nn.Module, change: Callable[[fx.GraphModule], fx.GraphModule]) -> Model:
    return torch.compile(model, backend=lambda gm, example_inputs: change(gm))


tracers = pytest.mark.parametrize("tracer", [symbolic, exported, dynamo], ids=lambda tracer: tracer.__name__)


def op(gm: fx.GraphModule, node: fx.Node) -> str:
    """The operation of a node, spelled alike for modules, functions and aten: "linear", "layernorm"."""
    if node.op == "call_module":
        name = type(gm.get_submodule(str(node.target))).__name__
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target.name().split("::")[1].split(".")[0]
    else:
        name = getattr(node.target, "__name__", str(node.target))
    return name.lower().replace("_", "")


def ops(gm: fx.GraphModule) -> Counter[str]:
    return Counter(op(gm, node) for node in gm.graph.nodes if node.op.startswith("call_"))


ATTENTION_OP = "scaleddotproductattention"


# ------------------------------------------------------------------------------------------------ rewrite


@tracers
@pytest.mark.parametrize("order", [(0, 1), (0, 1, 0)], ids=["once", "called_twice"])
def test_rewritten_graphs_equal_the_hooks(tracer: Callable[..., Model], order: tuple[int, ...]) -> None:
    model, clock = build(order), zoo.Clock()
    config = zoo.diffusers_config(lambda: clock.t, RANGES)
    broadcast = tracer(model, lambda gm: rewrite(gm, config, model=model))
    expected = hooked(model, TIMESTEPS)
    assert all(equal(expected, run(broadcast, TIMESTEPS, clock)))
    assert not all(equal(expected, run(model, TIMESTEPS))), "nothing was reused"


@tracers
def test_roles_and_timestep_read_from_the_graph_give_what_the_hooks_give(tracer: Callable[..., Model]) -> None:
    model = build()
    broadcast = tracer(model, lambda gm: rewrite(gm, CONFIG))
    assert all(equal(hooked(model, TIMESTEPS), run(broadcast, TIMESTEPS)))


@tracers
def test_feed_forwards_are_reused_after_the_listed_timesteps(tracer: Callable[..., Model]) -> None:
    model, listed, skip_count = build(), (700, 400), 2
    config = PABConfig(mlp=MLPBroadcast(timesteps=listed, blocks=(0,), skip_count=skip_count))
    broadcast = tracer(model, lambda gm: rewrite(gm, config))

    reference, clock, kept, left = copy.deepcopy(model), zoo.Clock(), [torch.empty(0)], [0]
    forward = reference.blocks[0].ff.forward

    def feed_forward(x: Tensor) -> Tensor:
        if clock.t in listed:
            left[0], kept[0] = skip_count, forward(x)
            return kept[0]
        left[0] -= 1
        return kept[0] if left[0] >= 0 else forward(x)

    reference.blocks[0].ff.forward = feed_forward
    expected = run(reference, TIMESTEPS, clock)
    assert all(equal(expected, run(broadcast, TIMESTEPS)))
    assert equal(expected, run(model, TIMESTEPS)) == [True, True, False, False, True, False, False]


@pytest.mark.parametrize("tracer", [symbolic, dynamo], ids=lambda tracer: tracer.__name__)
def test_a_rising_timestep_starts_over(tracer: Callable[..., Model]) -> None:
    model = build()
    broadcast = tracer(model, lambda gm: rewrite(gm, CONFIG))
    for generation, timesteps in enumerate([TIMESTEPS, (700, 600, 500), (501, 500, 300), (800, 790)]):
        expected = hooked(model, timesteps, first=10 * generation)
        assert all(equal(expected, run(broadcast, timesteps, first=10 * generation))), timesteps


def test_a_printed_graph_names_its_parts() -> None:
    config = PABConfig(**{**vars(CONFIG), "mlp": MLPBroadcast(timesteps=(700,))})
    rewritten = rewrite(fx.symbolic_trace(build()), config)
    names = {node.name for node in rewritten.graph.nodes}
    text = str(rewritten.graph)
    for name in ("pab_compute_spatial", "pab_compute_cross", "pab_compute_mlp", "pab_reuse_spatial", "cond"):
        assert name in names
        assert f"%{name}" in text
    for name in ("pab_compute_0", "pab_read_0", "pab_slot_0_0"):
        assert name in text


@tracers
def test_a_graph_without_attention_comes_back_as_an_equal_copy(tracer: Callable[..., Model]) -> None:
    model, seen = WithoutAttention().eval().requires_grad_(False), []

    def change(gm: fx.GraphModule) -> fx.GraphModule:
        result = rewrite(gm, CONFIG)
        seen.append((gm, result))
        return result

    x = torch.randn(2, 5, 8)
    result = change(torch.export.export(model, (x,)).module()) if tracer is exported else tracer(model, change)
    output = result(x)
    assert torch.equal(output[0] if isinstance(output, tuple) else output, model(x))
    ((before, after),) = seen
    assert after is not before
    assert after.graph is not before.graph
    assert_graphs_equivalent(after, before, dead_code=True)


@tracers
def test_the_given_graph_is_not_changed(tracer: Callable[..., Model]) -> None:
    model = build()

    def change(gm: fx.GraphModule) -> fx.GraphModule:
        graph, code, members = str(gm.graph), gm.code, state_of(gm)
        assert rewrite(gm, CONFIG).code != code
        assert (str(gm.graph), gm.code, state_of(gm)) == (graph, code, members)
        return gm

    assert all(equal(run(model, TIMESTEPS), run(tracer(model, change), TIMESTEPS)))


def state_of(gm: fx.GraphModule) -> tuple[list[str], list[str], list[str]]:
    return (
        [name for name, _ in gm.named_parameters()],
        [name for name, _ in gm.named_buffers()],
        [name for name, _ in gm.named_modules()],
    )


def test_rewriting_twice_is_refused() -> None:
    rewritten = rewrite(fx.symbolic_trace(build()), CONFIG)
    partial = specialize(rewritten, reuse={"spatial"}, compute=())
    for gm in (rewritten, partial):
        with pytest.raises(ValueError, match=r"already.*original"):
            rewrite(gm, CONFIG)


def test_without_a_timestep_the_error_says_what_to_do() -> None:
    model, x = Timeless().eval().requires_grad_(False), torch.randn(2, 5, 8)
    for gm in (fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        with pytest.raises(ValueError, match=r"timestep.*current_timestep_callback"):
            rewrite(gm, PABConfig())


@pytest.mark.parametrize("kind", ["function", "method", "object"])
def test_a_callback_stands_in_for_the_timestep(kind: str) -> None:
    model, clock = Timeless().eval().requires_grad_(False), zoo.Clock()
    callback = {"function": lambda: clock.t, "method": clock.__call__, "object": clock}[kind]
    broadcast = rewrite(fx.symbolic_trace(model), PABConfig(current_timestep_callback=callback))
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, RANGES))
    for t in TIMESTEPS:
        x, clock.t = torch.randn(2, 5, 8), t
        assert torch.equal(oracle(x), broadcast(x))


@pytest.mark.parametrize("tracer", [symbolic, exported], ids=lambda tracer: tracer.__name__)
@pytest.mark.parametrize("stage", ["rewrite", "compute", "reuse"])
def test_parameters_are_shared_and_buffers_stay_out_of_the_state_dict(
    tracer: Callable[..., fx.GraphModule], stage: str
) -> None:
    seen: list[fx.GraphModule] = []
    rewritten = tracer(build(), lambda gm: seen.append(gm) or rewrite(gm, CONFIG))
    given = {p.data_ptr() for p in seen[0].parameters()}
    run(rewritten, TIMESTEPS)
    gm = {
        "rewrite": lambda: rewritten,
        "compute": lambda: specialize(rewritten),
        "reuse": lambda: specialize(rewritten, reuse={"spatial"}),
    }[stage]()
    found = {p.data_ptr() for p in gm.parameters()}
    assert found < given if stage == "reuse" else found == given
    assert [name for name, _ in gm.named_buffers() if "pab_slot" in name]
    assert not [name for name in gm.state_dict() if name.split(".")[-1].startswith("pab_")]


def test_new_weights_of_the_model_reach_the_rewritten_graph() -> None:
    model = build()
    rewritten = rewrite(fx.symbolic_trace(model), CONFIG)
    zoo.redraw_(model)
    assert all(equal(hooked(model, TIMESTEPS), run(rewritten, TIMESTEPS)))


# --------------------------------------------------------------------------------------------- specialize


@tracers
@pytest.mark.parametrize("reuse", [("spatial",), ("spatial", "cross")], ids="+".join)
def test_specialized_steps_equal_the_hooks(tracer: Callable[..., Model], reuse: tuple[str, ...]) -> None:
    """A computing step and one that reuses a role, run by hand: the second finds what the first kept."""
    model, clock, seen = build(), zoo.Clock(), []
    ranges = (2 if "spatial" in reuse else None, None, 2 if "cross" in reuse else None)
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, ranges))

    def change(gm: fx.GraphModule) -> fx.GraphModule:
        seen.append(gm)
        return gm

    tracer(model, change)(*inputs(700, 0))
    rewritten = rewrite(seen[0], CONFIG)
    computing, reusing = specialize(rewritten), specialize(rewritten, reuse=reuse)
    if tracer is dynamo:
        steps = iter([computing, reusing])
        torch.compiler.reset()
        first = torch.compile(model, backend=lambda gm, _: next(steps))
        second = torch.compile(copy.copy(model), backend=lambda gm, _: next(steps))
    else:
        first, second = computing, reusing
    for step, (t, graph) in enumerate([(700, first), (600, second)]):
        assert all(equal(run(oracle, (t,), clock, step), run(graph, (t,), first=step)))


def test_reusing_takes_the_attention_and_what_only_fed_it() -> None:
    traced = fx.symbolic_trace(build())
    rewritten = rewrite(traced, CONFIG)

    def left(**decisions: Any) -> tuple[int, int, int]:
        found = ops(specialize(rewritten, **decisions))
        return found[ATTENTION_OP], found["linear"], found["layernorm"]

    everything = ops(traced)
    assert (everything[ATTENTION_OP], everything["linear"], everything["layernorm"]) == (4, 20, 6)
    assert left() == (4, 20, 6)
    assert left(reuse={"spatial"}) == (2, 12, 4)
    assert left(reuse={"cross"}) == (2, 12, 4)
    assert left(reuse={"blocks.0.attn1"}) == (3, 16, 5)
    assert left(reuse={"spatial", "blocks.1.attn2"}) == (1, 8, 3)
    assert left(reuse={"spatial", "cross"}) == (0, 4, 2)


@pytest.mark.parametrize("tracer", [exported, dynamo], ids=lambda tracer: tracer.__name__)
def test_reusing_takes_as_much_from_other_traces(tracer: Callable[..., Model]) -> None:
    found: list[Counter[str]] = []

    def change(gm: fx.GraphModule) -> fx.GraphModule:
        found.extend([ops(gm), ops(specialize(rewrite(gm, CONFIG), reuse={"spatial", "cross"}))])
        return gm

    tracer(build(), change)(*inputs(700, 0))
    counts = [(each[ATTENTION_OP], each["linear"], each["layernorm"]) for each in found]
    assert counts == [(4, 20, 6), (0, 4, 2)]


def test_a_name_decides_one_module() -> None:
    """The other block goes on computing: the hooks, with the identifier of one."""
    model, clock = build(), zoo.Clock()
    rewritten = rewrite(fx.symbolic_trace(model), CONFIG)
    config = zoo.diffusers_config(clock, (2, None, None))
    config.spatial_attention_block_identifiers = (r"blocks\.1\.attn1",)
    oracle = zoo.hooked(model, config)
    graphs = specialize(rewritten), specialize(rewritten, reuse={"blocks.1.attn1"})
    for step, (t, graph) in enumerate(zip((700, 600), graphs, strict=True)):
        assert all(equal(run(oracle, (t,), clock, step), run(graph, (t,), first=step)))


def test_a_numbered_name_decides_one_call() -> None:
    """With a config of diffusers, the second call of a module reuses what the first has just computed."""
    model = build(order=(0, 0))
    config = zoo.diffusers_config(zoo.Clock(), (2, None, 4))
    rewritten = rewrite(fx.symbolic_trace(model), config, model=model)
    reusing = specialize(rewritten, reuse={"blocks.0.attn1#1"})
    assert ops(reusing)[ATTENTION_OP] == 3
    assert ops(specialize(rewritten, reuse={"blocks.0.attn1"}))[ATTENTION_OP] == 2

    reference, kept = copy.deepcopy(model), []
    forward = reference.blocks[0].attn1.forward

    def every_second(x: Tensor) -> Tensor:
        if len(kept) % 2 == 0:
            kept.append(forward(x))
        else:
            kept.append(kept[-1])
        return kept[-1]

    reference.blocks[0].attn1.forward = every_second
    expected = run(reference, (700, 600))
    assert all(equal(expected, run(reusing, (700, 600))))
    assert not any(equal(expected, run(model, (700, 600))))


def test_deciding_in_parts_equals_deciding_at_once() -> None:
    rewritten = rewrite(fx.symbolic_trace(build(order=(0, 1, 0))), CONFIG)
    for reuse, compute in [
        ({"spatial"}, {"cross"}),
        ({"cross"}, {"spatial"}),
        ({"spatial", "cross"}, set[str]()),
        (set[str](), {"spatial", "cross"}),
    ]:
        at_once = specialize(rewritten, reuse=reuse)
        for first in ({"reuse": reuse, "compute": ()}, {"compute": compute}):
            partial = specialize(rewritten, **first)
            if reuse and compute:
                assert "cond" in ops(partial)
            in_parts = specialize(partial, reuse=reuse if first.keys() == {"compute"} and reuse else ())
            assert_graphs_equivalent(in_parts, at_once, dead_code=True)
            assert "cond" not in ops(in_parts)


def test_what_is_not_decided_goes_on_by_its_schedule() -> None:
    """A generation with cross-attention decided to compute: the hooks, with spatial attention only."""
    model, clock = build(), zoo.Clock()
    residual = specialize(rewrite(fx.symbolic_trace(model), CONFIG), compute={"cross"})
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, (2, None, None)))
    assert all(equal(run(oracle, TIMESTEPS, clock), run(residual, TIMESTEPS)))


def test_specializing_leaves_the_rewritten_graph_alone() -> None:
    rewritten = rewrite(fx.symbolic_trace(build()), CONFIG)
    before = str(rewritten.graph), rewritten.code, state_of(rewritten)
    specialize(rewritten, reuse={"spatial"})
    specialize(rewritten, compute={"cross"})
    assert (str(rewritten.graph), rewritten.code, state_of(rewritten)) == before


@pytest.mark.parametrize("name", ["blocks.7.attn1", "blocks.0.attn1#5", "Spatial", "blocks.0"])
@pytest.mark.parametrize("side", ["reuse", "compute"])
def test_an_unknown_name_lists_the_names(side: str, name: str) -> None:
    rewritten = rewrite(fx.symbolic_trace(build()), CONFIG)
    with pytest.raises(ValueError, match=f"'{name}'") as error:
        specialize(rewritten, **{side: {name}})
    for known in ("blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"):
        assert repr(known) in str(error.value)


@pytest.mark.parametrize("name", ["spatial", "blocks.0.attn1", "blocks.0.attn1#0"])
def test_what_is_to_reuse_and_to_compute_is_refused(name: str) -> None:
    rewritten = rewrite(fx.symbolic_trace(build()), CONFIG)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1 is in both"):
        specialize(rewritten, reuse={"spatial"}, compute={name})


@tracers
@pytest.mark.parametrize("order", [(0, 1, 0)], ids=["called_twice"])
def test_computing_everything_gives_the_outputs_of_the_model(
    tracer: Callable[..., Model], order: tuple[int, ...]
) -> None:
    model = build(order)
    computing = tracer(model, lambda gm: specialize(rewrite(gm, CONFIG)))
    assert all(equal(run(model, TIMESTEPS), run(computing, TIMESTEPS)))


# --------------------------------------------------------------------------------------- updates in place


@tracers
@pytest.mark.parametrize("stage", ["rewrite", "compute", "partial"])
def test_updates_in_place_survive_every_stage(tracer: Callable[..., Model], stage: str) -> None:
    model = build(in_place=True)
    stages: dict[str, tuple[Callable[[fx.GraphModule], fx.GraphModule], tuple[int | None, None, int | None]]] = {
        "rewrite": (lambda gm: rewrite(gm, CONFIG), (2, None, 4)),
        "compute": (lambda gm: specialize(rewrite(gm, CONFIG)), (None, None, None)),
        "partial": (lambda gm: specialize(rewrite(gm, CONFIG), compute={"spatial"}), (None, None, 4)),
    }
    change, ranges = stages[stage]
    clock = zoo.Clock()
    # without any range diffusers takes spatial attention every 2nd step
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, ranges)) if any(ranges) else model
    assert all(equal(run(oracle, TIMESTEPS, clock), run(tracer(model, change), TIMESTEPS)))


@pytest.mark.parametrize("tracer", [symbolic, exported], ids=lambda tracer: tracer.__name__)
def test_updates_in_place_survive_reuse(tracer: Callable[..., fx.GraphModule]) -> None:
    model, clock = build(in_place=True), zoo.Clock()
    rewritten = tracer(model, lambda gm: rewrite(gm, CONFIG))
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, (2, None, 2)))
    graphs = specialize(rewritten), specialize(rewritten, reuse={"spatial", "cross"})
    for step, (t, graph) in enumerate(zip((700, 600), graphs, strict=True)):
        assert all(equal(run(oracle, (t,), clock, step), run(graph, (t,), first=step)))


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_updates_in_place_survive_the_backend(lowering: str) -> None:
    model = build(in_place=True)
    compiled = torch.compile(model, backend=PABBackend(CONFIG, inner="eager", lowering=lowering))
    assert all(equal(hooked(model, TIMESTEPS), run(compiled, TIMESTEPS)))


@tracers
def test_an_updated_input_is_updated_at_reuse_too(tracer: Callable[..., Model]) -> None:
    class Updating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
            hidden_states.copy_(self.model(hidden_states, encoder_hidden_states, timestep))
            return hidden_states.sum()

    model, clock = Updating().eval(), zoo.Clock()
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, RANGES))
    broadcast = tracer(model, lambda gm: rewrite(gm, CONFIG))
    for step, t in enumerate(TIMESTEPS):
        clock.t = t
        expected, found = inputs(t, step), inputs(t, step)
        oracle(*expected)
        broadcast(*found)
        assert torch.equal(expected[0], found[0])
        assert not torch.equal(expected[0], inputs(t, step)[0])


class UpdatedLater(nn.Module):
    """One attention called twice; what the first call yields is updated in place after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.attn2 = Attention(8), Attention(8, 6)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + torch.sin(timestep)[:, None, None]
        x = x + self.attn2(x, encoder_hidden_states)
        y = self.attn(x)
        x = x + self.attn(x + y)
        y.mul_(0.9)
        return x + y


class Rescaled(Attention):
    """Ends as those of diffusers do."""

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        return super().forward(x, text) / 1.5


class UsesRescaled(nn.Module):
    """Adds what a rescaled attention yields, or updates it first."""

    def __init__(self, updates: bool) -> None:
        super().__init__()
        self.attn, self.updates = Rescaled(8), updates

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + torch.sin(timestep)[:, None, None]
        y = self.attn(x)
        return x + (y.add_(1) if self.updates else y)


@pytest.mark.parametrize("updates", [False, True])
def test_a_number_at_the_end_of_an_attention_stays_outside_unless_its_product_is_updated(updates: bool) -> None:
    """What the hooks keep is the product itself, and they reuse it as it was updated since."""
    model, kept = UsesRescaled(updates).eval().requires_grad_(False), []
    clock = zoo.Clock()
    config = zoo.diffusers_config(clock, (2, None, 4))

    def noted(gm: fx.GraphModule) -> fx.GraphModule:
        (region,) = tag(gm, CONFIG.policies())
        kept.extend(op(gm, node) for node in region.outputs)
        return gm

    compiled = torch.compile(model, backend=PABBackend(config, inner="eager", passes=[noted]))
    found = run(compiled, TIMESTEPS, clock)
    assert kept == ["truediv" if updates else "linear"]
    assert all(equal(found, hooked(model, TIMESTEPS)))
    assert not all(equal(found, run(model, TIMESTEPS)))


class DropsNothing(Attention):
    """Ends in a dropout, or updates its input by way of one."""

    def __init__(self, updates_input: bool) -> None:
        super().__init__(8)
        self.dropout, self.updates_input = nn.Dropout(0.5), updates_input

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        if self.updates_input:
            self.dropout(x).mul_(0.9)
            return super().forward(x)
        return self.dropout(super().forward(x))


def regions_of(attention: nn.Module, tracer: Callable[..., Model]) -> tuple[Region, ...]:
    """What is found in a model with that attention."""

    class Model(Timeless):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(hidden_states + timestep[:, None, None])

    model, found = Model(), []
    model.attn = attention
    run(tracer(model.eval().requires_grad_(False), lambda gm: found.extend(tag(gm, CONFIG.policies())) or gm), (500,))
    return tuple(found)


@tracers
def test_a_dropout_that_drops_nothing_is_no_operation_of_an_attention(tracer: Callable[..., Model]) -> None:
    """Whatever torch records of it: in 2.13 another tensor than it is given."""
    (region,) = regions_of(DropsNothing(updates_input=False), tracer)
    (output,) = region.outputs
    assert op(output.graph.owning_module, output) == "linear"
    assert region.nodes[-1] is output


@tracers
def test_an_attention_that_updates_its_input_by_way_of_a_dropout_is_computed_in_every_step(
    tracer: Callable[..., Model],
) -> None:
    (region,) = regions_of(DropsNothing(updates_input=True), tracer)
    assert not region.is_broadcast
    assert str(region.unsafe).startswith("it updates a tensor from outside in place")


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_an_attention_called_twice_whose_output_is_updated_later_is_computed_in_every_step(lowering: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UpdatedLater().eval().requires_grad_(False)
        zoo.redraw_(model)
    clock = zoo.Clock()
    oracle = zoo.hooked(model, zoo.diffusers_config(clock, (None, None, 4)))
    backend = PABBackend(zoo.diffusers_config(clock, (2, None, 4)), inner="eager", lowering=lowering)
    expected = run(oracle, TIMESTEPS, clock)
    found = run(torch.compile(model, backend=backend), TIMESTEPS, clock)
    assert all(equal(expected, found))
    assert {role.role for role in backend.report().roles if role.reused} == {"cross"}
    left = {region.name: region.left_alone for region in backend.report().regions}
    assert left == {"attn": UPDATED_LATER, "attn2": None}
    assert not all(equal(run(model, TIMESTEPS), found))


@pytest.mark.parametrize("combine", [operator.and_, operator.or_], ids=["and", "or"])
def test_masks_that_are_combined_are_not_updated_and_go_when_nothing_reads_them(combine: Callable[..., Any]) -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    unused = graph.call_function(combine, (left, right))
    graph.output(left)
    assert effects.updated(unused) == ()
    assert effects.is_removable(unused)


def test_an_exported_attention_that_nobody_reads_goes() -> None:
    """`torch.fx` takes the operator for impure, since it draws random numbers where it is told to drop some."""

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scaled_dot_product_attention(x, x, x)
            return x + 1

    gm = torch.export.export(Dead(), (torch.ones(1, 2, 3, 4),)).module()
    assert ops(gm)[ATTENTION_OP] == 1
    effects.eliminate_dead_code(gm.graph)
    assert ops(gm)[ATTENTION_OP] == 0


# ------------------------------------------------------------------------------------- the backend's graphs


def attentions(gm: fx.GraphModule) -> int:
    return ops(gm)[ATTENTION_OP]


def compiled(entry: zoo.Entry, config: PABConfig, timesteps: Sequence[float] | None = None) -> tuple[Model, PABBackend]:
    backend = PABBackend(config, inner="eager", timesteps=timesteps, step_invariants=False)
    return torch.compile(entry.build(), backend=backend), backend


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "LatteTransformer3DModel"])
def test_a_reusing_graph_has_no_attention_for_what_it_reuses(name: str) -> None:
    entry = zoo.BY_NAME[name]
    config = PABConfig(spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=3)
    model, backend = compiled(entry, config)
    zoo.trajectory(entry, model, (700, 600, 500))
    (graph,) = backend.graphs
    conditionals = graph.lowerings.conditionals
    total, broadcast = attentions(graph.graphs[(False,) * len(conditionals)]), len(conditionals)
    assert broadcast
    roles = {conditional.role for conditional in conditionals}
    assert len(graph.graphs) == (2 if roles == {"spatial"} else 3)
    for reuses, lowered in graph.graphs.items():
        assert attentions(lowered) == total - sum(reuses)
        assert not inputs_of(lowered, Predicate)
        assert len(inputs_of(lowered, Slot)) >= sum(reuses)
        assert not [node for node in lowered.graph.nodes if "cond" in str(node.target) and node.op != "placeholder"]
    all_reused = graph.graphs[(True,) * broadcast]
    assert ops(all_reused)["linear"] <= ops(graph.graphs[(False,) * broadcast])["linear"] - 4 * broadcast
    if name.startswith("CogVideoX"):
        assert attentions(all_reused) == 0


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "LatteTransformer3DModel"])
def test_a_graph_is_compiled_when_a_step_first_needs_it_and_nothing_is_kept_that_no_step_reuses(name: str) -> None:
    entry, timesteps = zoo.BY_NAME[name], (950, 900, 700, 600, 50)
    model, backend = compiled(entry, PABConfig(spatial_attention_block_skip_range=2), timesteps)
    keys: list[set[Any]] = []
    kept: list[bool] = []
    expected = zoo.trajectory(entry, entry.build(), timesteps)
    for step, t in enumerate(timesteps):
        output = zoo.call(entry, model, t, seed=step)
        (graph,) = backend.graphs
        keys.append(set(graph.graphs))
        kept.append(any(role.cache_bytes for role in backend.report().roles))
        # the calls at 700 (the third) and before compute, the one at 600 reuses, the one at 50 computes
        assert all(equal(output, expected[step])) == (t != 600)
    count = len(graph.lowerings.conditionals)
    compute, reuse = (False,) * count, (True,) * count
    assert keys == [*[{compute}] * 3, *[{compute, reuse}] * 2]
    assert kept == [False, False, True, False, False]
