"""Ranges of blocks that are skipped as a whole, against a plain eager reference."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from diffusers import hooks
from reference import Part, distance, equal
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

import pab_fx
from pab_fx import (
    Blocks,
    Change,
    Every,
    Hermite,
    How,
    Last,
    Magnitude,
    Policy,
    Residual,
    Rule,
    Steps,
    Taylor,
)
from pab_fx.graph.dataflow import activations
from pab_fx.policy.when import reused_calls
from pab_fx.select.streams import streams

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = tuple(float(t) for t in range(1000, 0, -80))
WIDTH = 8
NAMES = ("hidden_states", "timestep", "text")
FORECAST = Policy(Blocks(), Every(3, warmup=2), Taylor(2, of=Residual()))
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


# ------------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(scaled_dot_product_attention(*self.to_qkv(x).chunk(3, dim=-1)))


def feed_forward(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """Of one stream, modulated by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.attn, self.ff = Attention(), feed_forward()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(embedding).unsqueeze(1).chunk(3, dim=-1)
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        return x + self.ff(self.norm(x))


class InPlaceBlock(Block):
    """Updates the stream in place, but not the tensor that it is given."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x) + embedding.unsqueeze(1))
        x += self.ff(self.norm(x))
        return x.sub_(0.1 * self.ff(x))


class DoubleBlock(nn.Module):
    """Of two streams, image and text, that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.image_ff, self.text_ff = feed_forward(), feed_forward()

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.attn(self.norm(torch.cat([text, image], dim=1)) + embedding.unsqueeze(1))
        image = image + joined[:, text.shape[1] :]
        text = text + joined[:, : text.shape[1]]
        return image + self.image_ff(image), text + self.text_ff(text)


class PostNormBlock(nn.Module):
    """No sum leads from what leaves it to what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm, self.ff = Attention(), nn.LayerNorm(WIDTH), feed_forward()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.norm(x + self.attn(x))
        return self.norm(x + self.ff(x) + embedding.unsqueeze(1))


class Denoiser(nn.Module):
    """What leads up to the blocks, the blocks, and what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.time, self.proj_out = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        embedding = self.time(timestep[:, None] / 1000).sin()
        streams = self.lead(self.proj_in(hidden_states), text)
        return self.proj_out(self.follow(self.run(streams, embedding), text))

    def lead(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return (image,)

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def identity(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What would leave the blocks if they added nothing."""
        return streams

    def follow(self, streams: tuple[Tensor, ...], text: Tensor) -> Tensor:
        return streams[0]


class DiT(Denoiser):
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.block() for _ in range(3)])

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        for block in self.blocks:
            x = block(x, embedding)
        return (x,)


class ScaledBlock(Block):
    """Ends in a division, as some of diffusers do."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return super().forward(x, embedding) / math.sqrt(2)


class ScaledDiT(DiT):
    block = ScaledBlock


class SkippingDiT(DiT):
    """Mixes what enters the blocks with what they yield, between them."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (first,) = (x,) = streams
        for block in self.blocks:
            x = 0.9 * block(x, embedding) + 0.05 * first
        return (block(x, embedding),)


class TurningBlock(Block):
    """What leaves it lies by rows, however the stream was given: as the first operand of the sum."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.ff(self.norm(super().forward(x, embedding))) + x


class TurnedDiT(DiT):
    """The stream that enters lies by columns, as that of a patch embedding."""

    block = TurningBlock

    def lead(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return (image.mT.contiguous().mT,)


class PostNormDiT(DiT):
    block = PostNormBlock


class InPlaceDiT(DiT):
    block = InPlaceBlock


class MMDiT(Denoiser):
    """Two streams, which both leave the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_text = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([DoubleBlock() for _ in range(2)])

    def lead(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return image, self.proj_text(text)

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        image, text = streams
        for block in self.blocks:
            image, text = block(image, text, embedding)
        return image, text

    def follow(self, streams: tuple[Tensor, ...], text: Tensor) -> Tensor:
        return streams[0] + streams[1].mean(dim=1, keepdim=True)


class JoinedMMDiT(MMDiT):
    """Two lists of blocks; the streams are joined between them, and the image is cut out at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList([Block() for _ in range(2)])

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        image, text = super().run(streams, embedding)
        joined = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            joined = block(joined, embedding)
        return (joined,)

    def identity(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([streams[1], streams[0]], dim=1),)

    def follow(self, streams: tuple[Tensor, ...], text: Tensor) -> Tensor:
        return streams[0][:, text.shape[1] :]


class SpaceAndTime(DiT):
    """Blocks that attend the places of a frame, then the frames of a place, in turns (Latte)."""

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        batch, tokens, width = x.shape
        for i, block in enumerate(self.blocks):
            x = x.reshape(batch, 2, tokens // 2, width)
            x = x.transpose(1, 2).flatten(0, 1) if i % 2 else x.flatten(0, 1)
            x = block(x, embedding.repeat_interleave(x.shape[0] // batch, dim=0))
            x = x.unflatten(0, (batch, -1))
            x = (x.transpose(1, 2) if i % 2 else x).flatten(1, 2)
        return (x,)


MODELS = (DiT, InPlaceDiT, MMDiT, JoinedMMDiT, SpaceAndTime, PostNormDiT)
models = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def build(kind: type[Denoiser]) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)


def inputs(
    step: int, t: float, tokens: int = 6, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that go a smooth way, as those of a sampler do, and a text."""
    start, end = torch.randn(2, batch, tokens, 4, generator=torch.Generator().manual_seed(tokens))
    text = torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(99))
    latents = start * math.cos(step / 30) + 0.5 * end * math.sin(step / 20)
    return latents.to(dtype), torch.full((batch,), t, dtype=dtype), text.to(dtype)


def trajectory(model: Any, timesteps: Sequence[float] = TIMESTEPS, **shape: Any) -> list[Tensor]:
    return [model(*inputs(step, t, **shape)).clone() for step, t in enumerate(timesteps)]


class Reference:
    """All blocks of a model under a policy, in plain eager Python."""

    def __init__(self, model: Denoiser, policy: Policy) -> None:
        self.plain, self.model, self._part = copy.deepcopy(model), copy.deepcopy(model), Part(policy, len(TIMESTEPS))
        compute = self.model.run

        def run(streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
            entering = self.model.identity(streams)
            return tuple(self._part(self._n, self._t, entering, lambda: compute(streams, embedding)))

        self.model.run = run  # type: ignore[method-assign]

    @property
    def reused(self) -> int:
        return self._part.reused

    def trajectory(self, timesteps: Sequence[float] = TIMESTEPS, **shape: Any) -> list[Tensor]:
        """One generation."""
        self._part.reset()
        found = []
        for self._n, self._t in enumerate(timesteps):
            found.append(self.model(*inputs(self._n, self._t, **shape)).clone())
        return found


# ------------------------------------------------------------------------------------- to the bit

PAIRS: list[tuple[type[Denoiser], Rule, How]] = [
    (DiT, Every(3, warmup=2), Taylor(2, of=Residual())),
    (DiT, Steps((0, 1, 2, 5, 9), of=len(TIMESTEPS)), Last()),
    (DiT, Magnitude((1.0, 1.1, 1.0, 0.99, 1.01, 0.98) * 2 + (1.0,), 0.05), Residual()),
    (InPlaceDiT, Every(3), Residual()),
    (MMDiT, Every(3), Residual()),
    (MMDiT, Every(2), Hermite(2, of=Residual())),
    (JoinedMMDiT, Every(3), Taylor(1, of=Residual())),
    (JoinedMMDiT, Every(3), Taylor(1)),
    (SpaceAndTime, Every(3), Taylor(1, torch.bfloat16, of=Residual())),
    (PostNormDiT, Every(2), Residual()),
    (ScaledDiT, Every(2), Residual()),
    (SkippingDiT, Every(2), Taylor(1, of=Residual())),
]


@lowerings
@pytest.mark.parametrize(("kind", "rule", "how"), PAIRS, ids=lambda each: getattr(each, "__name__", str(each)))
def test_blocks_do_what_the_policy_says(kind: type[Denoiser], rule: Rule, how: How, lowering: str) -> None:
    model, policy = build(kind), Policy(Blocks(), rule, how)
    reference = Reference(model, policy)
    expected, plain = reference.trajectory(), trajectory(model)
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering, timesteps=TIMESTEPS) as pab:
        assert equal(trajectory(model), expected)
        report = pab.report()
    assert report.reused == reference.reused > 0
    assert not equal(expected, plain)
    (region,) = report.regions
    count = sum(len(each) for each in model.children() if isinstance(each, nn.ModuleList))
    count += kind is SkippingDiT  # which calls the last one twice
    assert region.why.startswith(f"{count} of {count} blocks")


@models
def test_a_reusing_step_runs_nothing_of_the_blocks(kind: type[Denoiser]) -> None:
    model = build(kind)
    with pab_fx.enable(model, Policy(Blocks(), Every(2), Residual()), inner="eager") as pab:
        trajectory(model)
        (graph,) = pab.backend.graphs
        (reusing,) = [gm for key, gm in graph.graphs.items() if all(key)]
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in name]
    left = {str(node.target) + str(node.args) for node in reusing.graph.nodes if "linear" in str(node.target)}
    assert inside
    assert left
    assert not any("blocks" in each for each in left)


def test_a_forecast_residual_is_nearer_than_a_kept_one() -> None:
    model = build(DiT)
    plain, errors = trajectory(model), []
    for how in (Residual(), Taylor(1, of=Residual()), Taylor(2, of=Residual())):
        with pab_fx.enable(model, Policy(Blocks(), Every(3, warmup=2), how), inner="eager"):
            errors.append(distance(trajectory(model), plain))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize(
    ("where", "inside"),
    [(Blocks(1), (1, 2)), (Blocks(0, -1), (0, 1)), (Blocks(1, -1), (1,)), (Blocks(-1), (2,))],
    ids=str,
)
def test_a_range_of_blocks_is_skipped_and_the_others_run(where: Blocks, inside: tuple[int, ...]) -> None:
    model = build(DiT)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(where, Every(2), Residual()), inner="eager") as pab:
        found = trajectory(model)
        (graph,) = pab.backend.graphs
        (reusing,) = [gm for key, gm in graph.graphs.items() if all(key)]
    assert not equal(found, plain)
    ran = {i for i in range(3) if any(f"modules_{i}_modules_attn" in str(node.args) for node in reusing.graph.nodes)}
    assert ran == set(range(3)) - set(inside)


# ------------------------------------------------------------------------------------- in every way


@pytest.mark.parametrize(("lowering", "regional"), [("specialize", True), ("cond", False)])
def test_blocks_with_inductor(lowering: str, regional: bool) -> None:
    model, policy = build(JoinedMMDiT), Policy(Blocks(), Every(3), Taylor(1, of=Residual()))
    expected, plain = Reference(model, policy).trajectory(), trajectory(model)
    with pab_fx.enable(model, policy, lowering=lowering, regional=regional) as pab:
        assert distance(trajectory(model), expected) < 1e-5  # Inductor fuses, so it rounds otherwise
        assert pab.report().reused > 0
    assert distance(expected, plain) > 1e-4


def test_a_stream_may_lie_otherwise_in_memory_where_it_enters_than_where_it_leaves() -> None:
    """Both branches of a condition are to yield the same strides."""
    model = build(TurnedDiT)
    reference = Reference(model, FORECAST)
    with pab_fx.enable(model, FORECAST, inner="aot_eager", lowering="cond") as pab:
        assert distance(trajectory(model), reference.trajectory()) < 1e-5
        assert pab.report().reused == reference.reused > 0
    program = pab_fx.export(model, dict(zip(NAMES, inputs(0, 1000.0), strict=True)), FORECAST).module()
    found = trajectory(lambda *args: program(**dict(zip(NAMES, args, strict=True))))
    assert distance(found, reference.trajectory()) < 1e-5
    assert distance(found, trajectory(reference.plain)) > 1e-4


@lowerings
def test_blocks_with_dynamic_shapes(lowering: str) -> None:
    model, policy = build(JoinedMMDiT), Policy(Blocks(), Every(3), Taylor(1, of=Residual()))
    reference = Reference(model, policy)
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering, dynamic=True) as pab:
        for tokens in (6, 8, 10):
            assert distance(trajectory(model, tokens=tokens), reference.trajectory(tokens=tokens)) < 1e-5
        assert len(pab.backend.captured) == 1
        assert pab.report().reused > 0


@lowerings
def test_contexts_and_sessions_do_not_mix(lowering: str, inner: Any) -> None:
    model, policy = build(MMDiT), Policy(Blocks(), Every(3), Taylor(1, of=Residual()))
    expected = Reference(model, policy).trajectory()
    with pab_fx.enable(model, policy, inner=inner, lowering=lowering) as pab:
        sessions = [pab.session() for _ in range(3)]
        found: list[list[Tensor]] = [[], [], []]
        for step, t in enumerate(TIMESTEPS):
            for i, session in enumerate(sessions):
                with session, pab_fx.cache_context(("cond", "uncond", None)[i]):
                    found[i].append(model(*inputs(step, t)).clone())
        assert all(equal(each, expected) for each in found)
        assert pab.report().reused > 0


def check_generation(model: Any, reference: Reference, timesteps: Sequence[float] = TIMESTEPS, **shape: Any) -> None:
    """The next generation is the reference's, to the bit, and reuses."""
    before, plain = reference.reused, trajectory(reference.plain, timesteps, **shape)
    expected = reference.trajectory(timesteps, **shape)
    assert equal(trajectory(model, timesteps, **shape), expected), (timesteps, shape)
    assert reference.reused > before
    assert not equal(expected, plain)


@pytest.mark.parametrize(
    ("lowering", "inner"),
    [("specialize", "replaying"), pytest.param("cond", "eager", marks=pytest.mark.slow)],
    indirect=["inner"],
)
def test_sizes_and_dtypes_may_change_between_generations_and_within_one(lowering: str, inner: Any) -> None:
    model = build(DiT)
    reference = Reference(model, FORECAST)
    with pab_fx.enable(model, FORECAST, inner=inner, lowering=lowering) as pab:
        check_generation(model, reference)
        trajectory(model, TIMESTEPS[:4])  # in the middle of which others come, at a lower timestep
        check_generation(model, reference, TIMESTEPS[4:], batch=3, tokens=8)
        check_generation(model, reference)
        for part in (model, reference.model, reference.plain):
            part.double()
        check_generation(model, reference, dtype=torch.float64)
        assert pab.report().reused > 0


@pytest.mark.parametrize(
    ("steps", "lowering", "inner"), [(2, "specialize", "replaying"), (3, "cond", "eager")], indirect=["inner"]
)
def test_a_generation_that_was_cut_off_leaves_nothing_to_the_next(steps: int, lowering: str, inner: Any) -> None:
    """After a step that computed, and after one that reused."""
    model = build(DiT)
    reference = Reference(model, FORECAST)
    with pab_fx.enable(model, FORECAST, inner=inner, lowering=lowering) as pab:
        trajectory(model, TIMESTEPS[:steps])
        check_generation(model, reference)
        trajectory(model, TIMESTEPS[:steps])
        with pytest.raises(Exception, match="reduction dim"):
            model(torch.ones(1, 5, 9), *inputs(0, 100.0)[1:])
        check_generation(model, reference, TIMESTEPS[steps:])
        assert pab.report().reused > 0


@pytest.mark.parametrize("inner", ["replaying"], indirect=True)
def test_threads_in_sessions_of_their_own_do_not_mix(inner: Any) -> None:
    """Step by step in turns, as `torch.compile` serves one call at a time."""
    model, sizes = build(DiT), (6, 8)
    references = [Reference(model, FORECAST) for _ in sizes]
    found: list[list[Tensor]] = [[] for _ in sizes]
    with pab_fx.enable(model, FORECAST, inner=inner, dynamic=True) as pab:
        sessions, turn = [pab.session() for _ in sizes], threading.Barrier(len(sizes))
        lock = threading.Lock()

        def serve(i: int) -> None:
            for step, t in enumerate(TIMESTEPS[i:]):
                turn.wait(60)
                with torch.no_grad(), lock, sessions[i]:
                    found[i].append(model(*inputs(step, t, tokens=sizes[i])).clone())
            for _ in range(i):
                turn.wait(60)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert pab.report().reused > 0
    for i, (reference, tokens) in enumerate(zip(references, sizes, strict=True)):
        assert equal(found[i], reference.trajectory(TIMESTEPS[i:], tokens=tokens))
        assert not equal(found[i], trajectory(model, TIMESTEPS[i:], tokens=tokens))


@lowerings
@pytest.mark.parametrize("options", [{"cache_dtype": "bfloat16"}, {"cache_device": "cpu"}], ids=str)
def test_smaller_and_offloaded_residuals_stay_near(options: dict[str, Any], lowering: str) -> None:
    model, policy = build(DiT), Policy(Blocks(), Every(3), Residual())
    expected = Reference(model, policy).trajectory()
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering, **options) as pab:
        found = trajectory(model)
        assert pab.report().reused > 0
    # bfloat16 keeps 1 part in 256
    assert distance(found, expected) <= (0 if "cache_device" in options else 0.05)


def test_a_residual_takes_one_tensor_for_each_stream() -> None:
    sizes = []
    for how in (Residual(), Taylor(1, of=Residual())):
        model = build(MMDiT)
        with pab_fx.enable(model, Policy(Blocks(), Every(3), how), inner="eager") as pab:
            trajectory(model)
            (role,) = pab.report().roles
            sizes.append(role.full_bytes)
    streams = 2 * (6 + 3) * WIDTH * 4  # batch, tokens of image and text, width, bytes
    assert sizes == [streams, 2 * streams]


class ImageOnly(JoinedMMDiT):
    """What goes on of the joined streams is the image, to a norm."""

    def follow(self, streams: tuple[Tensor, ...], text: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().follow(streams, text), (WIDTH,))


@lowerings
def test_of_joined_streams_no_more_is_kept_than_goes_on(lowering: str) -> None:
    """Nor is computed what only led to the rest: the text's last feed-forward before the streams are joined."""
    model, policy = build(ImageOnly), Policy(Blocks(2), Every(3), Residual())
    plain = trajectory(model)
    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    with pab_fx.enable(model, policy, inner=inner, lowering=lowering) as pab:
        found = trajectory(model)
        (role,) = pab.report().roles
    reference = Reference(model, policy)
    compute = MMDiT.run

    def run(streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        """The two lists by hand: the first runs, and what the second adds to the image is kept."""
        image, text = compute(reference.model, streams, embedding)

        def joined() -> tuple[Tensor, ...]:
            whole = torch.cat([text, image], dim=1)
            for block in reference.model.single_blocks:  # type: ignore[union-attr]
                whole = block(whole, embedding)
            return (whole[:, text.shape[1] :],)

        (image,) = reference._part(reference._n, reference._t, (image,), joined)
        return (torch.cat([text, image], dim=1),)

    reference.model.run = run  # type: ignore[method-assign]
    assert equal(found, reference.trajectory())
    assert reference.reused > 0
    assert not equal(found, plain)
    assert role.full_bytes == 2 * 6 * WIDTH * 4  # batch, tokens of the image, width, bytes
    if lowering == "specialize":
        reading = min(graphs, key=lambda gm: len(gm.graph.nodes))
        read = {name for node in reading.graph.nodes if node.op == "call_function" for name in map(str, node.args)}
        assert any("blocks_modules_1_modules_image_ff" in name for name in read)
        assert not any("blocks_modules_1_modules_text_ff" in name for name in read)


@lowerings
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", [Every(3), Change(Blocks(0, 1), 0.3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("how", [Residual(), pytest.param(Last(), marks=pytest.mark.slow)], ids=str)
def test_a_part_of_joined_streams_is_compiled_as_any_output(how: How, rule: Rule, batch: int, lowering: str) -> None:
    """Inductor compares where the outputs of both branches begin in their memory; with a batch of 1 a part is dense."""
    policy, shape = Policy(Blocks(1), rule, how), {"batch": batch}
    with pab_fx.enable(model := build(ImageOnly), policy, inner="eager"):
        expected = trajectory(model, **shape)
    with pab_fx.enable(model := build(ImageOnly), policy, lowering=lowering) as pab:
        found = trajectory(model, **shape)
        assert pab.report().reused > 0
    assert distance(found, expected) < 1e-5  # of float32
    assert distance(found, trajectory(build(ImageOnly), **shape)) > 1e-3


@pytest.mark.parametrize("how", [Residual(), Last()], ids=str)
def test_a_program_keeps_a_part_of_joined_streams(how: How) -> None:
    policy, model = Policy(Blocks(), Every(3), how), build(ImageOnly)
    with pab_fx.enable(own := copy.deepcopy(model), policy, inner="eager"):
        expected = trajectory(own, batch=1)
    program = pab_fx.export(model, dict(zip(NAMES, inputs(0, 1000.0, batch=1), strict=True)), policy).module()
    named = (dict(zip(NAMES, inputs(n, t, batch=1), strict=True)) for n, t in enumerate(TIMESTEPS))
    found = [program(**each).clone() for each in named]
    assert distance(found, expected) < 1e-6  # of float32: a product of a part may be rounded
    assert distance(expected, trajectory(build(ImageOnly), batch=1)) > 1e-3


@pytest.mark.parametrize("kind", [DiT, JoinedMMDiT], ids=lambda kind: kind.__name__)
def test_a_rewritten_program_skips_blocks_too(kind: type[Denoiser]) -> None:
    model, policy = build(kind), Policy(Blocks(), Every(3), Taylor(1, of=Residual()))
    reference = Reference(model, policy)
    exported = torch.export.export(model, inputs(0, 1000.0)).module()
    assert equal(trajectory(pab_fx.rewrite(exported, policy)), reference.trajectory())
    assert reference.reused > 0


@pytest.mark.parametrize("options", [{"timesteps": TIMESTEPS}, {"contexts": ("cond", "uncond")}], ids=str)
def test_an_exported_program_skips_blocks_too(options: dict[str, Any]) -> None:
    model = build(DiT)
    reference = Reference(model, FORECAST)
    program = pab_fx.export(model, dict(zip(NAMES, inputs(0, 1000.0), strict=True)), FORECAST, **options).module()
    more = {"pab_context": torch.tensor(1)} if "contexts" in options else {}
    for timesteps in (TIMESTEPS, TIMESTEPS[:5], TIMESTEPS):
        check_generation(lambda *args: program(**dict(zip(NAMES, args, strict=True)), **more), reference, timesteps)


@pytest.mark.slow
@pytest.mark.parametrize("where", [Blocks(1, -1), Blocks()], ids=str)
@lowerings
def test_ranges_of_blocks_that_are_compiled_one_by_one_equal_the_whole(where: Blocks, lowering: str) -> None:
    """At two resolutions, of one graph of symbolic sizes; the range has a block of each of two lists."""
    model, found = build(JoinedMMDiT), []
    policy = Policy(where, Every(3), Taylor(1, of=Residual()))
    for by_block in (False, True):
        torch.compiler.reset()
        options: dict[str, Any] = {"lowering": lowering, "regional": by_block}
        with pab_fx.enable(model, policy, inner="eager", dynamic=True, **options) as pab:
            found.append([each for tokens in (6, 8) for each in trajectory(model, tokens=tokens)])
            report = pab.report()
            assert report.reused > 0
            assert not report.warnings
            assert len(pab.backend.captured) == 1
    assert equal(*found)
    assert not equal(found[0], [each for tokens in (6, 8) for each in trajectory(model, tokens=tokens)])


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", [Blocks(), Blocks(1)], ids=str)
def test_ranges_of_blocks_that_the_user_compiles_are_skipped_as_a_whole(where: Blocks, dynamic: bool | None) -> None:
    policy = Policy(where, Every(2), Residual())
    whole, model = build(DiT), build(DiT)
    backend = pab_fx.PABBackend(policy, inner="eager")
    for block in model.blocks:
        block.compile(backend=backend, dynamic=dynamic)
    with pab_fx.enable(whole, policy, inner="eager", dynamic=dynamic):
        for tokens in (6, 8) if dynamic else (6,):
            expected, plain = trajectory(whole, tokens=tokens), trajectory(build(DiT), tokens=tokens)
            assert equal(trajectory(model, tokens=tokens), expected)
            assert not equal(expected, plain)
    assert backend.report().reused > 0


def test_blocks_are_explained_in_every_form() -> None:
    policy = Policy(Blocks(), Every(2), Residual())
    report = pab_fx.explain(build(MMDiT), {}, policy, args=inputs(0, 1000.0), rounds=0)
    for written in (str(report), report.markdown(), report.html(), report.svg()):
        assert "blocks" in written


# ------------------------------------------------------------------------------------- streams


def identity_of(function: Any) -> str:
    """The operations by which what enters at the output of a small graph is made."""
    gm = fx.symbolic_trace(function)
    nodes = [node for node in gm.graph.nodes if node.op.startswith("call")]
    found = streams(nodes, (), activations(gm.graph))
    return ", ".join(node.name for node in found.way(nodes[-1])) if nodes[-1] in found.carried else "none"


@pytest.mark.parametrize(
    ("function", "identity"),
    [
        (lambda x: x + x.tanh(), "x, add"),
        (lambda x: x.tanh() + x, "x, add"),
        (lambda x: x - x.tanh(), "x, sub"),
        (lambda x: x.tanh() - x, "none"),  # what is subtracted does not go on
        (lambda x: torch.addcmul(x, x.tanh(), x.sin()), "x, addcmul"),
        (lambda x: torch.addcmul(x.tanh(), x, x), "none"),
        (lambda x: (x.t() + x.tanh().t()).type_as(x), "x, t, add, type_as"),
        (lambda x: torch.cat([x, x + x.sin()]), "x, add, cat"),
        (lambda x: x.tanh(), "none"),
        (lambda x, y: 0.9 * (x + x.tanh()) + y, "none"),  # not from what is added to it
        (lambda x, y: (x + x.tanh()) + y, "x, add, add_1"),
        (lambda x, y: x + y.tanh(), "x, add"),  # whatever is added to it
    ],
)
def test_a_stream_goes_by_sums_views_and_joins(function: Any, identity: str) -> None:
    assert identity_of(function) == identity


# ------------------------------------------------------------------------------------- models of diffusers

FEW = {"CogVideoXTransformer3DModel", "Flux2Transformer2DModel", "Lumina2Transformer2DModel", "WanTransformer3DModel"}
"""One stream, two that are joined on the way, joined by writing into another tensor, and a stream with its cast."""
BREAKS = {"HiDreamImageTransformer2DModel", "MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel"}
"""Of which the graph breaks inside of blocks."""


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in zoo.BY_NAME])
def test_a_residual_leads_back_to_the_output_where_nothing_changes(name: str) -> None:
    """What is added to what enters is found on the right streams: the same inputs give the same outputs again."""
    entry = zoo.BY_NAME[name]
    model, same, others = entry.build(), entry.step(600.0, 0), entry.step(600.0, 1)
    policy = Policy(Blocks(), Every(3, warmup=1), Residual())
    plain = _tensors(model(**others))
    with pab_fx.enable(model, policy, inner="eager", lowering="cond") as pab:
        computed = [_tensors(model(**same)) for _ in range(2)]
        again, changed = _tensors(model(**same)), _tensors(model(**others))
        report = pab.report()
    assert all(map(torch.equal, *computed))
    if name in BREAKS:
        assert report.reused == 0
        return
    assert report.reused > 0
    for found, expected in zip(again, computed[0], strict=True):
        # x + (y - x) rounds
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not all(map(torch.equal, changed, plain))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------------------- rules by lists


@pytest.mark.parametrize(("steps", "ratios"), [(12, 12), (12, 28), (20, 12)])
def test_magnitude_decides_as_the_hooks_do(steps: int, ratios: int) -> None:
    given = [1.0 + 0.05 * math.sin(3 * i) for i in range(ratios)]
    config = hooks.MagCacheConfig(threshold=0.12, retention_ratio=0.2, num_inference_steps=steps, mag_ratios=given)
    entry = zoo.BY_NAME["FluxTransformer2DModel"]
    model, computed = entry.build(), []
    head = model.transformer_blocks[0]
    forward = head.forward
    head.forward = lambda *args, **kwargs: (computed.append(step), forward(*args, **kwargs))[1]
    hooks.apply_mag_cache(model, config)
    for step in range(steps):
        model(**entry.step(900.0 - step, step))
    rule = Magnitude(given, threshold=0.12, retention=0.2)
    plan = reused_calls(rule, range(steps, 0, -1))
    assert [step for step, reuse in enumerate(plan) if not reuse] == computed
    assert any(plan)


# ------------------------------------------------------------------------------------- what is refused


def test_a_range_that_the_model_does_not_have_is_left_alone_and_it_is_said() -> None:
    model = build(DiT)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Blocks(7), Every(2), Residual()), inner="eager") as pab:
        assert equal(trajectory(model), plain)
        (region,) = pab.report().regions
    assert region.left_alone == "the model has 3 blocks, and none of them is in the range"


class Convolutional(Denoiser):
    """Blocks between which a convolution lies, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Block() for _ in range(2)])
        self.between = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        x = self.attentions[0](streams[0], embedding)
        return (self.attentions[1](self.between(x.mT).mT, embedding),)


def test_blocks_without_a_stream_between_them_are_left_alone_and_it_is_said() -> None:
    model = build(Convolutional)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Blocks(), Every(2), Residual()), inner="eager") as pab:
        assert equal(trajectory(model), plain)
        (region,) = pab.report().regions
    assert "no stream goes through all blocks" in str(region.left_alone)


class GreedyBlock(Block):
    """Updates the tensor that it is given."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x += self.attn(self.norm(x))
        return x


class GreedyDiT(DiT):
    block = GreedyBlock


def test_blocks_that_update_what_they_are_given_are_left_alone_and_it_is_said() -> None:
    model = build(GreedyDiT)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Blocks(), Every(2), Residual()), inner="eager") as pab:
        assert equal(trajectory(model), plain)
        (region,) = pab.report().regions
    assert "in place" in str(region.left_alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blocks("first"), "first must be an integer"),
        (lambda: Blocks(3, 2), r"no block lies in \[3:2\]"),
        (lambda: Steps((0, 50), of=50), "a step of compute must be an integer from 0 to 49, got 50"),
        (lambda: Steps((0, -1), of=50), "a step of compute must be an integer from 0 to 49, got -1"),
        (lambda: Magnitude(()), "ratios must be numbers"),
        (lambda: Magnitude((1.0, -1.0)), "ratios must be numbers >= 0"),
        (lambda: Blocks(-1, 0), r"no block lies in \[-1:0\]"),
        (lambda: pab_fx.save_policies(pab_fx.PABConfig(), "unused.json"), "those of a PABConfig are its policies"),
        (lambda: pab_fx.save_policies([], "unused.json"), "save_policies takes policies"),
        (lambda: Magnitude((1.0,), max_skips=-1), "max_skips must be an integer >= 0"),
        (lambda: Magnitude((1.0,), retention=2), "retention must be a number from 0 to 1"),
        (lambda: Taylor(1, of=Taylor(1)), r"of must be Last\(\) or Residual\(\)"),
        (lambda: Hermite(1, scale=0), "scale must be a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ranges_that_overlap_are_refused() -> None:
    policies = [Policy(Blocks(0, 2), Every(2)), Policy(Blocks(1), Every(3))]
    model = build(DiT)
    with pab_fx.enable(model, policies, inner="eager"), pytest.raises(Exception, match="overlap: both have the block"):
        trajectory(model)
