"""Blocks compiled one by one: each distinct one once, and the outputs are those of the model compiled as a whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pipelines
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pipelines.oracle import hooked_run
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

import pab_fx
from pab_fx import PABBackend, PABConfig
from pab_fx.compile import regional
from pab_fx.graph.modules import repeated_blocks
from pab_fx.graph.structure import structure_of
from pab_fx.testing import assert_graphs_equivalent

TIMESTEPS = (900, 700, 600, 500, 50)
CONFIG = PABConfig(spatial_attention_block_skip_range=2)
REUSED = 2  # of five steps, the two in the window that are not the 2nd of two
LOWERINGS = ("specialize", "cond")
lowerings = pytest.mark.parametrize("lowering", LOWERINGS)
specialize_first = pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
Run = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("no_gradients")


class Attention(nn.Module):
    """Self-attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query = self.to_q(x)[:, None]  # [B, 1, S, C]
        return self.to_out(F.scaled_dot_product_attention(query, query, query)[:, 0])


class Block(nn.Module):
    """What a test says a block does, with the modules for it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.scale = run, 1.0
        self.norm, self.attn, self.ff = nn.LayerNorm(8), Attention(), nn.Linear(8, 8)

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


class Model(nn.Module):
    """Blocks between two projections."""

    def __init__(self, block: Run, steps: Run, count: int = 4) -> None:
        super().__init__()
        self.steps, self.proj_in, self.proj_out = steps, nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(block) for _ in range(count)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        return self.proj_out(self.steps(self, self.proj_in(hidden_states) + 0.001 * timestep, *args))


def model_of(block: Run, steps: Run, change: Callable[[Any], None] = lambda model: None) -> Model:
    """A model of four blocks, its parameters always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(block, steps)
    change(model)
    return model.eval().requires_grad_(False)


@dataclass
class Outcome:
    """What a generation yielded, and what it took."""

    outputs: list[Tensor]
    captured: int
    compiled: int
    reused: int
    warnings: list[str]


def generate(
    model: nn.Module,
    inner: str = "eager",
    lengths: Sequence[int] = (7,),
    args: Callable[[int], tuple[Any, ...]] = lambda step: (),
    **options: Any,
) -> Outcome:
    """A generation for each length of the sequence, by a copy of the model with PAB on."""
    torch.compiler.reset()
    model, graphs, outputs = copy.deepcopy(model), [], []
    captured: list[fx.GraphModule] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pab_fx.enable(model, CONFIG, inner=inner, passes=[lambda gm: captured.append(gm) or gm], **options) as pab:
            compile = pab.backend._inner

            def counted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
                graphs.append(gm)
                return compile(gm, example_inputs)

            pab.backend._inner = counted
            for length in lengths:
                for step, t in enumerate(TIMESTEPS):
                    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(step))
                    outputs.append(model(x, torch.tensor(float(t)), *args(step)).clone())
            reused = pab.report().reused
    said = [str(each.message) for each in caught if "pab_fx" in str(each.message)]
    return Outcome(outputs, len(captured), len(graphs), reused, said)


def is_equal(one: Outcome, other: Outcome) -> bool:
    return one.reused == other.reused and all(map(torch.equal, one.outputs, other.outputs))


def check(
    model: nn.Module, distinct: tuple[int, int] | None, lowering: str, inners: Sequence[str] = ("aot_eager",)
) -> Outcome:
    """Compiled by block equals the whole, bitwise; how it went with the last compiler.

    Args:
        distinct: how many distinct blocks there are in the computing and in the reusing graph; `None` where they are
            compiled as a whole. With `cond` there is one graph, of the blocks that compute.
        inners: `aot_eager` makes functions without side effects of what it is given, as Inductor does.
    """
    computing, reusing = distinct or (1, 1)
    whole = generate(model, lowering=lowering, regional=False)
    assert whole.compiled == (2 if lowering == "specialize" else 1)
    for inner in inners:
        found = generate(model, inner, lowering=lowering, regional=True)
        assert is_equal(found, whole), inner
        assert found.reused > 0
        assert not torch.is_inference_mode_enabled()
        assert any("compiled as a whole" in each for each in found.warnings) == (distinct is None)
        assert found.compiled == computing + (reusing if lowering == "specialize" else 0)
    return found


# -------------------------------------------------------------------------------------------- what crosses blocks


def plain(self: Any, x: Tensor, *_: Any) -> Tensor:
    x = x + self.attn(self.norm(x))
    return x + self.ff(x)


def in_sequence(self: Any, x: Tensor, *args: Any) -> Tensor:
    for block in self.blocks:
        x = block(x, *args)
    return x


def in_place(self: Any, x: Tensor) -> Tensor:
    x += self.attn(self.norm(x))
    x += self.ff(x)
    return x


def returns_nothing(self: Any, x: Tensor) -> None:
    in_place(self, x)


def ignores_results(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        block(x)
    return x


def pair(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x + self.attn(self.norm(x))
    return x, y * 0.5 + x


def of_pairs(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    for block in self.blocks:
        x, y = block(x, y)
    return x + y


def and_a_view(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x + self.attn(self.norm(x)) + y[:, :1]
    return x, x[:, :1]


def halves(self: Any, x: Tensor) -> Sequence[Tensor]:
    x = x + self.attn(self.norm(x))
    return x.chunk(2, dim=-1)


def of_halves(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        left, right = block(x)
        x = torch.cat([right, left], dim=-1)
    return x


def skips(self: Any, x: Tensor) -> Tensor:
    first = self.blocks[0](x)
    third = self.blocks[2](self.blocks[1](first) + first)
    return self.blocks[3](third + x)


def under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return in_sequence(self, x).float()


def half_under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        for block in self.blocks[:2]:
            x = block(x)
    for block in self.blocks[2:]:
        x = block(x.float())
    return x


def autocast_inside(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        attended = self.attn(self.norm(x))
    return x + attended.float()


def kernel_inside(self: Any, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return x + self.attn(self.norm(x))


def under_inference_mode(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return in_sequence(self, x)


def one_block_four_times(self: Any, x: Tensor) -> Tensor:
    for _ in range(4):
        x = self.blocks[0](x)
    return x


def slices_of_one_table(self: Any, x: Tensor) -> Tensor:
    for block, each in zip(self.blocks, torch.stack([x, x * 2, x * 3, x * 4]).unbind(0), strict=True):
        x = x + block(each)
    return x


def share_parameters(model: Any) -> None:
    for block in model.blocks[1:]:
        block.ff, block.norm.weight = model.blocks[0].ff, model.blocks[0].norm.weight


def tie_two(model: Any) -> None:
    for block in model.blocks[:2]:
        block.ff.weight = block.attn.to_q.weight


def scales(self: Any, x: Tensor) -> Tensor:
    return x + self.attn(self.norm(x)) * self.scale


def one_of_each_type(model: Any) -> None:
    for block, scale in zip(model.blocks, (1, 1.0, True, 1.0), strict=True):
        block.scale = scale


def nothing(model: Any) -> None:
    pass


CROSSING = {
    "a tensor": (plain, in_sequence, nothing, (1, 1)),
    "updated in place": (in_place, in_sequence, nothing, (1, 1)),
    "updated in place, result unused": (in_place, ignores_results, nothing, (1, 1)),
    "none": (returns_nothing, ignores_results, nothing, (1, 1)),
    "a tuple": (pair, of_pairs, nothing, (1, 1)),
    "a tensor and its view": (and_a_view, of_pairs, nothing, (2, 2)),
    "views of one tensor": (halves, of_halves, nothing, (1, 1)),
    "skip connections": (plain, skips, nothing, (1, 1)),
    "slices of one table": (plain, slices_of_one_table, nothing, (1, 1)),
    "autocast around": (plain, under_autocast, nothing, (2, 2)),
    "autocast around half": (plain, half_under_autocast, nothing, (3, 3)),
    "autocast inside": (autocast_inside, in_sequence, nothing, (1, 1)),
    "a choice of kernel inside": (kernel_inside, in_sequence, nothing, (1, 1)),
    "inference mode around": (plain, under_inference_mode, nothing, (1, 1)),
    "shared parameters": (plain, in_sequence, share_parameters, (1, 1)),
    "parameters tied in two of four": (plain, in_sequence, tie_two, (2, 1)),
    "constants of three types": (scales, in_sequence, one_of_each_type, (3, 3)),
}
AS_THEY_ARE = {
    "a tensor",
    "updated in place",
    "none",
    "a tensor and its view",
    "views of one tensor",
    "autocast around half",
    "a choice of kernel inside",
    "inference mode around",
}
"""Memory and contexts: what differs where an eager compiler runs blocks as they are."""


@specialize_first
@pytest.mark.parametrize("crossing", CROSSING)
def test_blocks_compiled_once_equal_the_whole_bitwise(crossing: str, lowering: str) -> None:
    block, steps, change, distinct = CROSSING[crossing]
    inners = ("eager", "aot_eager") if crossing in AS_THEY_ARE else ("aot_eager",)
    check(model_of(block, steps, change), distinct, lowering, inners)


@lowerings
def test_a_block_that_is_called_several_times_has_a_cache_for_each_call(lowering: str) -> None:
    """All calls reuse in the same steps, each what it has kept, and run what was compiled once."""
    model = model_of(plain, one_block_four_times)
    found, whole = (generate(model, lowering=lowering, regional=by_block) for by_block in (True, False))
    assert is_equal(found, whole)
    assert found.reused > 0


# ------------------------------------------------------------------------------------------- compiled as a whole


def updates_the_view(self: Any, x: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    view.mul_(0.5)
    x = x + self.attn(self.norm(x))
    return x, x[:, 1:]


def hands_on_the_view(self: Any, x: Tensor) -> Tensor:
    view = x[:, 1:]
    for block in self.blocks:
        x, view = block(x, view)
    return x + view.sum()


def updated_between(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    for block in self.blocks:
        x, y = block(x, y)
        y.mul_(0.9)
    return x


def same_tensor_twice(self: Any, x: Tensor) -> Tensor:
    y = x.contiguous()
    for block in self.blocks:
        x, y = block(x, y)
    return x + y


def updates_one(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y + self.attn(self.norm(x))
    x.mul_(0.9)
    return y, x


def kernel_around(self: Any, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        for block in self.blocks[:2]:
            x = block(x)
    for block in self.blocks[2:]:
        x = block(x)
    return x


def returns_a_float(self: Any, x: Tensor, scale: float) -> tuple[Tensor, float]:
    x = x + self.attn(self.norm(x)) * scale
    return x, x.shape[1] ** -0.5


def of_floats(self: Any, x: Tensor) -> Tensor:
    scale = 1.0
    for block in self.blocks:
        x, scale = block(x, scale)
        x = x * scale
    return x


def by_a_conjugate(self: Any, x: Tensor, z: Tensor) -> Tensor:
    x = x + self.attn(self.norm(x))
    return x * torch.view_as_real(z.resolve_conj()).flatten(-2)


def with_conjugates(self: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    for block in self.blocks:
        x = block(x, z.conj())
    return x


TOGETHER = {
    "a view updated by the next": (updates_the_view, hands_on_the_view, "share memory"),
    "a view updated between blocks": (and_a_view, updated_between, "share memory"),
    "one tensor twice": (updates_one, same_tensor_twice, "share memory"),
    "a choice of kernel around some": (plain, kernel_around, "_sdpa_kernel holds for several blocks"),
    "a conjugate": (by_a_conjugate, with_conjugates, "no tensor in memory"),
}


@specialize_first
@pytest.mark.parametrize(("block", "steps", "why"), TOGETHER.values(), ids=TOGETHER.keys())
def test_blocks_that_hang_together_are_compiled_as_a_whole_and_it_is_said(
    block: Run, steps: Run, why: str, lowering: str
) -> None:
    (message,) = check(model_of(block, steps), None, lowering).warnings
    assert why in message


def test_a_graph_that_cannot_be_split_is_compiled_as_a_whole_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cycle exists between partitions!")

    model = model_of(plain, in_sequence)
    expected = generate(model)
    monkeypatch.setattr(regional, "split_module", refuses)
    found = generate(model, regional=True)
    assert is_equal(found, expected)
    assert found.compiled == expected.compiled
    assert "cycle exists between partitions" in found.warnings[0]


# ------------------------------------------------------------------------------------------- sizes and numbers


def with_sizes(self: Any, x: Tensor, length: int) -> tuple[Tensor, int]:
    x = x + self.attn(self.norm(x))
    return x[:, :length].contiguous(), x.shape[1]


def of_sizes(self: Any, x: Tensor) -> Tensor:
    length = x.shape[1]
    for block in self.blocks:
        x, length = block(x, length)
    return x * length


SIZES = {
    "a tensor": (plain, in_sequence),
    "sizes": (with_sizes, of_sizes),
    "numbers made of sizes": (returns_a_float, of_floats),
}


CAPTURES = {"eager": 1, "aot_eager": 2}
"""With the latter Dynamo captures once more as it compiles first, whatever is compiled then."""


@pytest.mark.parametrize(
    ("sizes", "lowering", "inner"),
    [
        ("a tensor", "specialize", "eager"),
        ("sizes", "cond", "eager"),
        ("numbers made of sizes", "specialize", "eager"),
        *(pytest.param(s, low, "aot_eager", marks=pytest.mark.slow) for s in SIZES for low in LOWERINGS),
    ],
)
def test_three_resolutions_are_served_from_one_capture(sizes: str, lowering: str, inner: str) -> None:
    options: dict[str, Any] = {"inner": inner, "lowering": lowering, "lengths": (7, 9, 12), "dynamic": True}
    model = model_of(*SIZES[sizes])
    found, whole = (generate(model, regional=by_block, **options) for by_block in (True, False))
    assert is_equal(found, whole)
    assert found.reused == 3 * 4 * REUSED
    assert found.captured == whole.captured == CAPTURES[inner]


@pytest.mark.parametrize(("inner", "dynamic"), [("eager", None), ("aot_eager", True)])
def test_a_float_that_changes_in_every_step_is_an_input_of_each_block(inner: str, dynamic: bool | None) -> None:
    """A compiler would take a float that it is handed for a constant, and the model be captured in every step."""

    def by_a_float(self: Any, x: Tensor, scale: float) -> Tensor:
        return x + self.attn(self.norm(x)) * (scale + 1)

    options: dict[str, Any] = {"inner": inner, "dynamic": dynamic, "args": lambda step: (0.5 + step,)}
    model = model_of(by_a_float, in_sequence)
    found, whole = (generate(model, regional=by_block, **options) for by_block in (True, False))
    assert is_equal(found, whole)
    # by itself Dynamo takes the first float for a constant
    assert found.captured == whole.captured == (CAPTURES[inner] if dynamic else 2)


def test_a_number_that_only_the_data_tell_is_not_handed_from_block_to_block() -> None:
    def by_its_sum(self: Any, x: Tensor, scale: float) -> tuple[Tensor, float]:
        x = x + self.attn(self.norm(x)) * scale
        return x, x.abs().mean().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        model = model_of(by_its_sum, of_floats)
        found = generate(model, regional=True)
        assert is_equal(found, generate(model))
    assert "no integer and no tensor" in found.warnings[0]


# --------------------------------------------------------------------------------------------------- layouts


def transposed_at_first(self: Any, x: Tensor) -> Tensor:
    return in_sequence(self, x.transpose(1, 2).contiguous().transpose(1, 2))


def transposed_in_turn(self: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(self.blocks):
        x = block(x.transpose(0, 1)).transpose(0, 1) if i % 2 else block(x)
    return x


def views_what_is_transposed(self: Any, x: Tensor) -> Tensor:
    x = x + self.attn(self.norm(x))
    return x + x.transpose(1, 2).view(2, -1).mean()


LAYOUTS = {
    "the first is transposed": (plain, transposed_at_first, 1),
    "every 2nd is transposed": (plain, transposed_in_turn, 2),
    "a view that only that layout allows": (views_what_is_transposed, transposed_at_first, 1),
}


@specialize_first
@pytest.mark.parametrize(("block", "steps", "distinct"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_blocks_of_other_layouts_equal_the_whole(block: Run, steps: Run, distinct: int, lowering: str) -> None:
    """To 1e-5: a matrix product of a dense copy may sum in another order than that of a transposed one."""
    model = model_of(block, steps)
    whole = generate(model, lowering=lowering, regional=False)
    for inner in ("eager", "aot_eager"):
        found = generate(model, inner, lowering=lowering, regional=True)
        for one, other in zip(found.outputs, whole.outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert found.reused == whole.reused > 0
    assert found.compiled == distinct * whole.compiled


# ------------------------------------------------------------------------------------------ frames and breaks


class Broken(Model):
    """A graph break between its second and third block: two frames, of which the second begins in the middle."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.proj_in(hidden_states) + 0.001 * timestep))
        torch._dynamo.graph_break()
        return self.proj_out(self.blocks[3](self.blocks[2](x)))


def breaks(self: Any, x: Tensor) -> Tensor:
    x = x + self.attn(self.norm(x))
    torch._dynamo.graph_break()
    return x + self.ff(x)


@pytest.mark.parametrize(("lowering", "inner"), [("specialize", "aot_eager"), ("cond", "eager")])
@pytest.mark.parametrize("where", ["between", "inside"])
def test_models_whose_graph_breaks_equal_the_whole(where: str, inner: str, lowering: str) -> None:
    """A frame that begins in a block, or holds only one, is compiled as it is."""
    if where == "between":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = Broken(plain, in_sequence).eval().requires_grad_(False)
    else:
        model = model_of(breaks, in_sequence)
    found, whole = (generate(model, inner, lowering=lowering, regional=by_block) for by_block in (True, False))
    assert is_equal(found, whole)
    assert found.reused == 4 * REUSED


# ------------------------------------------------------------------------------------------- models of diffusers


def joined(outputs: list[tuple[Tensor, ...]]) -> Tensor:
    """All outputs of all steps."""
    return torch.cat([each.flatten() for step in outputs for each in step])


def of_roles(clock: Callable[[], float]) -> Any:
    return zoo.diffusers_config(clock)  # type: ignore[arg-type]


def test_two_roles_of_one_class_are_compiled_once_per_set_of_reusing_roles() -> None:
    """Latte's spatial blocks attend to the text as well; its temporal ones are of the same class."""
    entry, clock = zoo.BY_NAME["LatteTransformer3DModel"], zoo.Clock()
    model, found = entry.build(), []
    blocks = len(model.transformer_blocks) + len(model.temporal_transformer_blocks)  # type: ignore[arg-type]
    for lowering, by_block in (("specialize", False), ("specialize", True), ("cond", True)):
        torch.compiler.reset()
        graphs: list[fx.GraphModule] = []
        compiled = copy.deepcopy(model)
        # what is computed once a generation would be a graph of its own
        options: dict[str, Any] = {"lowering": lowering, "regional": by_block, "step_invariants": False}
        with pab_fx.enable(compiled, of_roles(clock), inner="eager", **options) as pab:
            inner = pab.backend._inner
            pab.backend._inner = lambda gm, inputs, inner=inner, graphs=graphs: graphs.append(gm) or inner(gm, inputs)
            found.append(zoo.trajectory(entry, compiled, (950, 790, 700, 650, 600, 500, 90), clock))
            lowered = pab.report().graphs
            assert pab.report().reused > 0
        if by_block:  # eager keeps layouts, and the first block's is another one
            assert len(graphs) <= 3 * lowered < blocks * lowered
        else:
            assert len(graphs) == lowered
    assert torch.equal(joined(found[0]), joined(found[1]))
    assert torch.equal(joined(found[0]), joined(found[2]))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("LatteTransformer3DModel", "each block"),
        ("FluxTransformer2DModel", "compile_repeated_blocks"),
        pytest.param("CogVideoXTransformer3DModel", "each block", marks=pytest.mark.slow),
        pytest.param("WanTransformer3DModel", "compile_repeated_blocks", marks=pytest.mark.slow),
    ],
)
def test_blocks_that_the_user_compiles_equal_the_hooks(name: str, how: str) -> None:
    """Roles by diffusers' config are roles by name, and a block's name is looked up in the model that runs it."""
    entry, clock = zoo.BY_NAME[name], zoo.Clock()
    model = entry.build()
    expected = zoo.trajectory(entry, zoo.hooked(model, of_roles(clock)), (950, 790, 700, 650, 90), clock)
    unlike = zoo.trajectory(entry, copy.deepcopy(model), (950, 790, 700, 650, 90), clock)
    backend = PABBackend(of_roles(clock), inner="eager")
    if how == "compile_repeated_blocks":
        model.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
    else:
        for block in repeated_blocks(model):
            block.compile(backend=backend)
    found = zoo.trajectory(entry, model, (950, 790, 700, 650, 90), clock)
    assert torch.equal(joined(found), joined(expected))
    assert not torch.equal(joined(found), joined(unlike))
    assert backend.report().reused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LattePipeline", "CogVideoXPipeline"])
def test_pipelines_equal_the_hooks_where_a_compiler_makes_functions_of_blocks(name: str) -> None:
    """To 1e-5, a few roundings of float32: the compiler decomposes what the hooks run as it is."""

    def config_of(clock: Callable[[], float] | None) -> Any:
        return zoo.diffusers_config(clock, ranges=(2, 3, 3), window=(100, 900))  # type: ignore[arg-type]

    entry = pipelines.BY_NAME[name]
    expected = hooked_run(entry, config_of)
    pipe = entry.build()
    with pab_fx.enable(pipe, config_of(None), inner="aot_eager", regional=True) as pab:
        torch.testing.assert_close(pipelines.run(pipe, entry), expected, rtol=1e-5, atol=1e-5)
        assert pab.report().reused > 0
        assert not pab.report().warnings


@pytest.mark.slow
@lowerings
def test_inductor_equals_the_whole_to_rounding(lowering: str) -> None:
    """1e-5 relative: what lies between the blocks is not fused, which rounds a few float32 sums in another order."""
    entry, clock = zoo.BY_NAME["LatteTransformer3DModel"], zoo.Clock()
    model, found = entry.build(), []
    for by_block in (True, False):
        torch.compiler.reset()
        compiled = copy.deepcopy(model)
        with pab_fx.enable(compiled, of_roles(clock), lowering=lowering, regional=by_block) as pab:
            outputs = zoo.trajectory(entry, compiled, (950, 700, 650, 600, 90), clock)
            assert pab.report().reused > 0
        found.append(joined(outputs))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5


@pytest.mark.slow
def test_weights_quantised_in_two_ways_make_distinct_blocks() -> None:
    """Both are tensors of one class, shape and type; what is inside differs."""
    torchao = pytest.importorskip("torchao.quantization", reason="quantisation needs torchao")
    model = model_of(plain, in_sequence)
    for i, block in enumerate(model.blocks):
        bits = torch.int4 if i % 2 else torch.int8
        torchao.quantize_(block, torchao.IntxWeightOnlyConfig(weight_dtype=bits))
    for inner in ("eager", "aot_eager"):
        found, whole = (generate(model, inner, regional=by_block) for by_block in (True, False))
        assert is_equal(found, whole)
        assert found.compiled == 2 * whole.compiled


# ---------------------------------------------------------------------------------------------- how it is asked for


@pytest.mark.parametrize("how", ["backend", "options"])
def test_a_backend_of_ones_own_compiles_by_block(how: str) -> None:
    model = model_of(plain, in_sequence)
    expected, compile = generate(model), lookup_backend("eager")
    graphs: list[fx.GraphModule] = []

    def counted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return compile(gm, example_inputs)

    torch.compiler.reset()
    if how == "backend":
        compiled = torch.compile(model, backend=PABBackend(CONFIG, inner=counted, regional=True))
    else:
        options = {"inner": counted, "regional": True, "spatial_attention_block_skip_range": 2}
        compiled = torch.compile(model, backend=pab_fx.pab_backend, options=options)
    for step, (t, output) in enumerate(zip(TIMESTEPS, expected.outputs, strict=True)):
        x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(step))
        assert torch.equal(compiled(x, torch.tensor(float(t))), output)
    assert len(graphs) == 2
    assert all(sum("scaled_dot_product" in str(node.target) for node in gm.graph.nodes) <= 1 for gm in graphs)


@pytest.mark.parametrize("bad", [1, 0, "yes", None, ["Block"]])
def test_regional_is_true_or_false(bad: Any) -> None:
    with pytest.raises(ValueError, match="regional must be True or False"):
        PABBackend(CONFIG, regional=bad)
    with pytest.raises(ValueError, match="regional must be True or False"):
        pab_fx.enable(model_of(plain, in_sequence), CONFIG, regional=bad)


def test_a_model_without_repeated_blocks_is_named_in_the_error() -> None:
    model = torch.compile(nn.Linear(2, 2), backend=PABBackend(CONFIG, inner="eager", regional=True))
    with pytest.raises(Exception, match="Linear has no repeated blocks"):
        model(torch.ones(1, 2))


# ---------------------------------------------------------------------------------------------------- any model


def shifted(x: Tensor) -> Tensor:
    x[:, 1:] = x[:, 1:] * 0.9
    return x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "attend": lambda self, x, y: (x + self.attn(self.norm(x)), y),
    "attend in place": lambda self, x, y: (x.add_(self.attn(self.norm(x))), y),
    "attend and keep": lambda self, x, y: (x, self.attn(x)),
    "feed forward": lambda self, x, y: (x + self.ff(x), y),
    "swap": lambda self, x, y: (y, x),
    "view": lambda self, x, y: (x, x.transpose(0, 1).transpose(0, 1)),
    "itself": lambda self, x, y: (x, x.contiguous()),
    "reshape": lambda self, x, y: (x, x.reshape(-1, 8).reshape(x.shape)),
    "transpose": lambda self, x, y: (transposed(x), y),
    "halves": lambda self, x, y: (torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), y),
    "mix": lambda self, x, y: (x + 0.5 * y, y),
    "update": lambda self, x, y: (x.add_(0.1), y),
    "update the other": lambda self, x, y: (x, y.mul_(0.9)),
    "update a part": lambda self, x, y: (shifted(x), y),
    "size": lambda self, x, y: (x * x.shape[1] ** -0.5, y),
    "dropout": lambda self, x, y: (F.dropout(x, 0.0, training=False), y),
}
ATTENDING = [name for name in OPERATIONS if name.startswith("attend")]
INSIDE = [name for name in OPERATIONS if name not in ATTENDING]
BETWEEN = [name for name in INSIDE if name != "feed forward"]


@st.composite
def sequences(draw: st.DrawFn) -> Model:
    """Four blocks of one or two kinds, each with one attention, and what lies before, between and after them."""

    def program(attends: bool) -> list[str]:
        names = draw(st.lists(st.sampled_from(INSIDE if attends else BETWEEN), max_size=4 if attends else 2))
        if attends:
            names.insert(draw(st.integers(0, len(names))), draw(st.sampled_from(ATTENDING)))
        return names

    kinds = [program(True) for _ in range(draw(st.integers(1, 2)))]
    between = [program(False) for _ in range(5)]

    def run(self: Any, names: list[str], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for name in names:
            x, y = OPERATIONS[name](self, x, y)
        return x, y

    def block(self: Any, x: Tensor, y: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        return run(self, kinds[kind], x, y)

    def steps(self: Any, x: Tensor) -> Tensor:
        x, y = run(self, between[4], x, x * 0.5)
        for i, each in enumerate(self.blocks):
            x, y = run(self, between[i], *each(x, y, i % len(kinds)))
        return x + 0.3 * y

    return model_of(block, steps)


search = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check_random(model: Model, inner: str, lowering: str, dynamic: bool | None) -> None:
    """Bitwise with eager. With another compiler to 1e-4 of what it is: dense copies sum in another order."""
    options: dict[str, Any] = {"lowering": lowering, "dynamic": dynamic, "lengths": (7, 9) if dynamic else (7,)}
    found, whole = (generate(model, inner, regional=by_block, **options) for by_block in (True, False))
    assert found.reused == whole.reused
    for one, other in zip(found.outputs, whole.outputs, strict=True):
        if inner == "eager":
            assert torch.equal(one, other)
        else:
            assert (one - other).norm() <= 1e-4 * other.norm()


drawn = (
    sequences(),
    st.sampled_from(("eager", "aot_eager")),
    st.sampled_from(LOWERINGS),
    st.sampled_from((None, True)),
)


@settings(search, max_examples=3)
@given(*drawn)
def test_random_sequences_of_blocks_equal_the_whole(
    model: Model, inner: str, lowering: str, dynamic: bool | None
) -> None:
    check_random(model, inner, lowering, dynamic)


@pytest.mark.slow
@settings(search, max_examples=200)
@given(*drawn)
def test_many_random_sequences_of_blocks_equal_the_whole(
    model: Model, inner: str, lowering: str, dynamic: bool | None
) -> None:
    check_random(model, inner, lowering, dynamic)


# --------------------------------------------------------------------------------------------------- structures


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """A trace with its inputs recorded."""
    gm = fx.symbolic_trace(function)
    for node, recorded in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        node.meta["example_value"] = recorded
    return gm


def test_graphs_whose_nodes_are_named_otherwise_have_one_structure() -> None:
    def one(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y) * 2

    def other(left: Tensor, right: Tensor) -> Tensor:
        total = left + right
        return torch.relu(total) * 2

    inputs = torch.ones(2, 3), torch.ones(2, 3)
    graph, same = traced(one, *inputs), traced(other, *inputs)
    assert_graphs_equivalent(graph, same)
    assert structure_of(graph) == structure_of(same)
    assert hash(structure_of(graph)) == hash(structure_of(same))


HELD = torch.ones(3), torch.ones(3)
DIFFERENT: dict[str, list[Callable[..., Any]]] = {
    "types of a constant": [lambda x, y: x * 1, lambda x, y: x * 1.0, lambda x, y: x * True, lambda x, y: x * 1j],
    "values of a constant": [lambda x, y: x * 0.0, lambda x, y: x * -0.0, lambda x, y: x * float("nan")],
    "dtypes": [lambda x, y: x.to(torch.float16), lambda x, y: x.to(torch.bfloat16)],
    "targets": [lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x.add(y), lambda x, y: x.sub(y)],
    "order of operands": [lambda x, y: x - y, lambda x, y: y - x, lambda x, y: x - x],
    "keyword arguments": [lambda x, y: x.sum(dim=0), lambda x, y: x.sum(dim=1), lambda x, y: x.sum(0)],
    "lists and tuples": [lambda x, y: torch.cat([x, y]), lambda x, y: torch.cat((x, y))],
    "slices": [
        lambda x, y: x[1:],
        lambda x, y: x[:1],
        lambda x, y: x[1],
        lambda x, y: x[..., 1:],
        lambda x, y: x[None],
    ],
    "outputs": [lambda x, y: x, lambda x, y: y, lambda x, y: (x, y), lambda x, y: (y, x), lambda x, y: (x,)],
    "tensors that are held": [lambda x, y: x + HELD[0], lambda x, y: x + HELD[1]],
}


@pytest.mark.parametrize("functions", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_graphs_that_differ_in_one_thing_have_structures_of_their_own(functions: list[Callable[..., Any]]) -> None:
    inputs = torch.ones(2, 3), torch.ones(2, 3)
    assert len({structure_of(traced(each, *inputs)) for each in functions}) == len(functions)
    assert all(structure_of(traced(each, *inputs)) == structure_of(traced(each, *inputs)) for each in functions)


def test_inputs_of_another_shape_layout_type_or_storage_make_another_structure() -> None:
    whole = torch.ones(2, 6)
    inputs = [
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2, 4), torch.ones(2, 4)),
        (torch.ones(3, 2).T, torch.ones(2, 3)),
        (torch.ones(2, 3).double(), torch.ones(2, 3)),
        (torch.ones(2, 3).requires_grad_(), torch.ones(2, 3)),
        (torch.ones(2, 3, dtype=torch.complex64).conj(), torch.ones(2, 3)),
        (torch.ones(2, 3, device="meta"), torch.ones(2, 3, device="meta")),
        (whole[:, :3], torch.ones(2, 6)[:, 3:]),
        (whole[:, :3], whole[:, 3:]),
        (torch.ones(2, 3), 2),
        (torch.ones(2, 3), 2.0),
    ]
    structures = {structure_of(traced(lambda x, y: x * y, *each)) for each in inputs}
    assert len(structures) == len(inputs)


def test_nested_graphs_count_by_what_they_compute() -> None:
    def conditional(factor: float) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        branches = {"yes": fx.symbolic_trace(lambda x: (x * factor,)), "no": fx.symbolic_trace(lambda x: (x + 1,))}
        arguments = (graph.get_attr("yes"), graph.get_attr("no"), (x,))
        graph.output(graph.call_function(torch.ops.higher_order.cond, (True, *arguments)))
        return fx.GraphModule(branches, graph)

    assert structure_of(conditional(2.0)) == structure_of(conditional(2.0))
    assert structure_of(conditional(2.0)) != structure_of(conditional(3.0))


def test_a_structure_keeps_what_it_knows_by_identity() -> None:
    """Else a tensor of another graph might come to lie where that one was."""
    graphs = [traced(lambda x: x, torch.ones(3)) for _ in range(20)]
    for i, gm in enumerate(graphs):
        gm.register_buffer("held", torch.full((3,), float(i)))
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.output_node().args = (gm.graph.get_attr("held"),)
    structures = set()
    while graphs:
        structures.add(structure_of(graphs.pop()))
    assert len(structures) == 20
